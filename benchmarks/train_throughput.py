"""Training speed and memory against what one would pick instead: python benchmarks/train_throughput.py [--shape S] [--chats NAME] [--steps N] [--rounds R]

The same rows in the same steps, each run in a process of its own, in turn:
  padded   transformers' Trainer as Qwen's finetune.py uses it: every row padded to the maximum length, full logits, 2 rows a forward pass
  trl      TRL's SFTTrainer, rows padded to the longest of a step
  trl-free TRL, padding-free
  trl-pack TRL, packing (best fit), as many packed sequences a step as hold about as many rows
  ours     python -m src.finetune
Times are of training alone: for ours without the probe, which takes the longest batch through a step once a run. A useful token is one of a row,
padding left out. Peak memory is the process's, as the kernel gives it. Needs benchmarks/requirements.txt and the
chats of ../shared/data; models have random weights in real shapes: 15m (Llama, 32,000 tokens) and half (Qwen2.5-0.5B, 151,936 tokens, 2 layers).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))

BATCH, LENGTH = 8, 512
SHAPES = {
    "15m": (
        "mistral-7b-v0.2",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 288,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "vocab_size": 32000,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "half": (
        "qwen2.5",
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 2,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
        },
    ),
}
CHATS = {"songys_ko": "songys_ko_2000", "gsm8k": "gsm8k_train_500", "fastchat_dummy": "fastchat_dummy_200"}
VARIANTS = ("padded", "trl", "trl-free", "trl-pack", "ours")
RATE = {"lora": 3e-4, "full": 1e-5}


def make_model(folder: Path, shape: str) -> None:
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer, config = SHAPES[shape]
    torch.manual_seed(0)
    settings = {k: v for k, v in config.items() if k != "model_type"} | {"max_position_embeddings": 2048, "dtype": "float32"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))
    model.save_pretrained(folder)
    for file in (SHARED / "tokenizers" / tokenizer).iterdir():
        shutil.copy(file, folder)


def our_command(place: Path, run: str, tuner: str, steps: int) -> list[str]:
    return [
        *(sys.executable, "-m", "src.finetune", f"outputs={place / 'outputs'}", f"run={run}", f"source={place / 'outputs/rows/data'}"),
        *(f"model.path={place / 'model'}", f"tuner={tuner}", f"tuner.learning_rate={RATE[tuner]}", "train_new_tokens=never"),
        *(f"train.max_steps={steps}", f"train.global_batch_size={BATCH}", f"train.max_length={LENGTH}", "train.log_steps=1"),
        *("train.warmup=0", "launch.nproc_per_node=1", "train.long_rows=keep_end", "train.long_share=1"),
        *(["tuner.dropout=0"] if tuner == "lora" else []),
    ]


def our_rows(place: Path, tuner: str, steps: int) -> None:
    """The rows our command trains on, step by step, for the others to train on: rows.json holds [[{"input_ids", "labels"}, ...], ...]."""
    from src.core.artifact import open_any, open_artifact
    from src.core.compose import compose
    from src.settings.verbs import FinetuneVerb
    from src.training.batches import BatchPlan
    from src.training.examples import examples_of

    cfg = compose("finetune", our_command(place, "x", tuner, steps)[3:], FinetuneVerb)
    rows = examples_of(cfg, open_artifact(place / "outputs/rows/data"), open_any(place / "model"), "train", place / "outputs/.cache/tokens")
    plan = BatchPlan(rows.lengths, BATCH, 1, BATCH * LENGTH, True, BATCH * steps, cfg.train.seed)
    listed = [
        [{"input_ids": rows[i].input_ids.tolist(), "labels": rows[i].labels.tolist()} for i in plan.examples(s)] for s in range(steps)
    ]
    (place / "rows.json").write_text(json.dumps(listed))


def ours(place: Path, tuner: str, steps: int) -> dict:
    from src.core.artifact import open_artifact

    run = f"ours-{time.time_ns()}"
    subprocess.run(our_command(place, run, tuner, steps), check=True, cwd=ROOT, capture_output=True)
    metrics = open_artifact(place / "outputs" / run / "finetune").metrics
    return {
        "seconds": metrics["train_seconds"],
        "tokens": metrics["tokens_seen"],
        "memory": metrics["memory_bytes"],
        "losses": [c["loss"] for c in metrics["curve"]],
    }


def theirs(variant: str, place: Path, tuner: str) -> dict:
    """Train as `variant` does and return what our manifest says of ours."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

    steps = json.loads((place / "rows.json").read_text())
    rows = [row for step in steps for row in step]
    set_seed(1234)
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    model.config.use_cache = False
    adapter = LoraConfig(task_type="CAUSAL_LM", r=64, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", bias="none")
    if tuner == "lora":
        model = get_peft_model(model, adapter)
    common = {
        "output_dir": str(place / "theirs"),
        "learning_rate": RATE[tuner],
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        "seed": 1234,
    }
    if variant == "padded":

        def pad(batch):
            block = lambda key, fill: torch.tensor([r[key] + [fill] * (LENGTH - len(r[key])) for r in batch])
            mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (LENGTH - len(r["input_ids"])) for r in batch])
            return {"input_ids": block("input_ids", 0), "labels": block("labels", -100), "attention_mask": mask}

        arguments = TrainingArguments(
            **common,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=BATCH // 2,
            max_steps=len(steps),
            remove_unused_columns=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), data_collator=pad)
    else:
        from transformers import AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        tokens = sum(len(r["input_ids"]) for r in rows)
        per_step = BATCH if variant != "trl-pack" else max(1, round(tokens / len(steps) / LENGTH))
        arguments = SFTConfig(
            **common,
            per_device_train_batch_size=per_step,
            num_train_epochs=1,
            max_length=None if variant == "trl-free" else LENGTH,
            packing=variant == "trl-pack",
            padding_free=variant == "trl-free",
            dataset_num_proc=None,
        )
        tokenizer = AutoTokenizer.from_pretrained(place / "model")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    done = trainer.train()
    return {
        "seconds": done.metrics["train_runtime"],
        "tokens": sum(len(r["input_ids"]) for r in rows),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": [h["loss"] for h in trainer.state.log_history if "loss" in h],
    }


def apart(variant: str, place: Path, tuner: str) -> dict:
    """A run of a peer in a process of its own."""
    out = place / "result.json"
    out.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, __file__, "--one", variant, "--place", str(place), "--tuner", tuner], capture_output=True, text=True, cwd=place
    )
    if not out.is_file():
        raise SystemExit(f"{variant} failed:\n{done.stderr[-3000:]}")
    return json.loads(out.read_text())


def compare(shape: str, chats: str, tuner: str, steps: int, rounds: int, variants: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        subprocess.run([sys.executable, __file__, "--make", shape, "--place", str(place)], check=True, capture_output=True)
        file = SHARED / "chat" / "qwen" / f"{CHATS[chats]}.json"
        data = [sys.executable, "-m", "src.data", f"outputs={place / 'outputs'}", "run=rows", f"data.path={file}"]
        subprocess.run([*data, "data.val=0", "data.calib=0"], check=True, cwd=ROOT, capture_output=True)
        our_rows(place, tuner, steps)
        results = {variant: [] for variant in variants}
        for _ in range(rounds):
            for variant in variants:
                results[variant].append(ours(place, tuner, steps) if variant == "ours" else apart(variant, place, tuner))
        print(
            f"\n{shape}, {chats}, {tuner}, {steps} steps of {BATCH} rows, {results['ours'][0]['tokens']:,} useful tokens, {rounds} rounds"
        )
        speed = {v: [r["tokens"] / r["seconds"] for r in rs] for v, rs in results.items()}
        for variant, found in results.items():
            ratios = [a / b for a, b in zip(speed["ours"], speed[variant])]
            peak = statistics.median(r["memory"] for r in found)
            print(
                f"{variant:<9} {statistics.median(speed[variant]):>7,.0f} tokens/s, peak {peak / 1e9:.2f} GB, loss {found[0]['losses'][0]:.4f} -> {found[0]['losses'][-1]:.4f}; "
                f"ours is {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times as fast",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--chats", choices=CHATS, action="append")
    parser.add_argument("--tuner", choices=RATE, default="lora")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--make", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.make:
        make_model(asked.place / "model", asked.make)
    elif asked.one:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
        (asked.place / "result.json").write_text(json.dumps(theirs(asked.one, asked.place, asked.tuner)))
    else:
        for shape in asked.shape or SHAPES:
            for chats in asked.chats or CHATS:
                compare(shape, chats, asked.tuner, asked.steps, asked.rounds, asked.variants)
