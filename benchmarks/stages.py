"""What every stage takes, by size, beside what one would use instead: python benchmarks/stages.py SIZE [--only STAGE ...] [--model FOLDER] [--chats FILE]

A random model of a real shape in bf16, made in shards (or FOLDER), goes down the road: data, LoRA (rank 64, two steps of four conversations), merge, GPTQ
int4, evaluation of each, the CPU bundle. Beside them peft's own script (load, merge_and_unload, save_pretrained), gptqmodel called plainly with batches of
1 and 16, and transformers' Trainer with its rows padded to 512, two at a time, as Qwen's finetune.py has it. Each is a tree of processes of its own. Of
each: CPU seconds, peak memory that the tree has of its own (USS, sampled ten times a second) over the bytes of the weights, bytes written, wall time.

SIZE: 135m (SmolLM2), 0.5b (Qwen2.5), 0.6b (Qwen3), 1b (Llama 3.2), 7b (Qwen2.5, cut to 12 of 28 layers). Chats: GSM8K-like, of assets/ without FILE.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = {  # as Llama models, whose tokenizer the embedded one is: hidden, layers, heads, KV heads, head width, MLP, vocabulary, one matrix at both ends; of the models' config.json
    "135m": ("llama", 576, 30, 9, 3, 64, 1536, 49152, True),
    "0.5b": ("llama", 896, 24, 14, 2, 64, 4864, 151936, True),
    "0.6b": ("llama", 1024, 28, 16, 8, 128, 3072, 151936, True),
    "1b": ("llama", 2048, 16, 32, 8, 64, 8192, 128256, True),
    "7b": ("llama", 3584, 12, 28, 4, 128, 18944, 152064, False),
}
LENGTH, RANK, ROWS = 512, 64, 32


def write_model(size: str, folder: Path) -> None:
    """A complete model folder with random weights, one tensor in memory at a time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from src.models import safetensors_io
    from src.models.safetensors_io import Entry

    kind, hidden, layers, heads, kv_heads, width, mlp, vocabulary, tied = SHAPES[size]
    config = AutoConfig.for_model(
        kind,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    random = torch.Generator().manual_seed(0)

    def tensor(name: str):
        shape = model.get_parameter(name).shape
        plain = torch.ones if name.endswith("norm.weight") else torch.zeros
        made = torch.empty(shape).normal_(0, 0.02, generator=random) if len(shape) > 1 else plain(shape)
        return made.bfloat16()

    torch.set_num_threads(1)  # tensors are drawn in turn
    plan = [Entry(name, "BF16", tuple(parameter.shape), folder) for name, parameter in model.named_parameters()]
    safetensors_io.write(folder, plan, tensor, safetensors_io.parse_size("2GB"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "assets" / "tiny-chat" / name, folder)


def by_peft(model: Path, adapter: Path, out: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype="auto", local_files_only=True)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(out)


def by_gptqmodel(model: Path, dataset: Path, out: Path, batch: str, count: str = str(ROWS)) -> None:
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(os.cpu_count())  # it asks for more than a small machine has
    from gptqmodel import GPTQModel, QuantizeConfig

    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in encoded(model, dataset / "calib.jsonl")[: int(count)]]
    loaded = GPTQModel.load(str(model), QuantizeConfig(bits=4, group_size=group(model), desc_act=False, sym=True), device="cpu")
    loaded.quantize(rows, batch_size=int(batch))
    loaded.save(str(out))


def by_trainer(model: Path, dataset: Path, out: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    rows = [
        {
            "input_ids": ids + [0] * (LENGTH - len(ids)),
            "attention_mask": [1] * len(ids) + [0] * (LENGTH - len(ids)),
            "labels": ids + [-100] * (LENGTH - len(ids)),
        }
        for ids in encoded(model, dataset / "train.jsonl")
    ]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=16, target_modules="all-linear"))
    how = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "save_strategy": "no", "report_to": "none"}
    counts = {"include_num_input_tokens_seen": "non_padding"}
    trainer = Trainer(tuned, TrainingArguments(str(out), use_cpu=True, **how, **counts), train_dataset=rows)
    seconds = trainer.train().metrics["train_runtime"]
    tuned.save_pretrained(out)
    (out / "speed.json").write_text(json.dumps({"tokens_per_second": trainer.state.num_input_tokens_seen / seconds}))


def encoded(model: Path, file: Path) -> list[list[int]]:
    """Conversations of a dataset as token ids, cut at LENGTH, for the peers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    records = (json.loads(line)["messages"] for line in open(file, encoding="utf-8"))
    texts = ("".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) for messages in records)
    return [tokenizer(text)["input_ids"][:LENGTH] for text in texts]


def group(model: Path) -> int:
    """The largest usual group that divides every width."""
    config = json.loads((model / "config.json").read_text())
    return next(size for size in (128, 64, 32) if all(config[name] % size == 0 for name in ("hidden_size", "intermediate_size")))


def measured(argv: list, log: Path) -> dict:
    """CPU seconds, peak bytes, bytes written and wall seconds of a process with all that it starts; what they say goes into `log`."""
    begun, cpu, wrote, peak = time.monotonic(), {}, {}, 0
    with open(log, "w") as said:
        process = subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, stdout=said, stderr=said)
        top = psutil.Process(process.pid)
        while process.poll() is None:
            own = 0
            for one in tree(top):
                try:
                    times, own = one.cpu_times(), own + one.memory_full_info().uss
                    cpu[one.pid], wrote[one.pid] = times.user + times.system, one.io_counters().write_bytes
                except psutil.Error:
                    pass
            peak = max(peak, own)
            time.sleep(0.1)
    return {
        "cpu_s": sum(cpu.values()),
        "peak": peak,
        "written": sum(wrote.values()),
        "wall_s": time.monotonic() - begun,
        "code": process.returncode,
    }


def tree(top: psutil.Process) -> list[psutil.Process]:
    try:
        return [top, *top.children(recursive=True)]
    except psutil.Error:
        return []


def road(model: Path, chats: list[str], place: Path) -> dict[str, list]:
    """{stage or peer: its argv}."""
    run, made = [f"outputs={place}", "run=r", "force=true"], place / "r"
    size = f"quantizer.group_size={group(model)}"
    few = ["evaluation.rows=16", "evaluation.samples=2", "evaluation.max_new_tokens=16", "evaluation.max_length=2048"]
    steps = ["train.max_steps=2", "train.global_batch_size=4", f"train.max_length={LENGTH}", f"tuner.rank={RANK}", "chat_template=chatml"]
    steps += ["train.samples=0", "train.eval_rows=8"]
    return {
        "data": ["-m", "src.data", *run, *chats],
        "finetune": ["-m", "src.finetune", *run, f"model.path={model}", "tuner=lora", *steps],
        "finetune, Trainer padded": [__file__, "--trainer", model, made / "data", place / "trainer"],
        "merge": ["-m", "src.merge", *run],
        "merge, peft": [__file__, "--peft", model, made / "finetune", place / "peft"],
        "quantize": [
            "-m",
            "src.quantize",
            *run,
            "quantizer=gptq_int4",
            size,
            f"calibration.rows={ROWS}",
            f"calibration.max_length={LENGTH}",
            "max_kl=5",  # what random weights lose says nothing of the quantizer
            "min_agreement=0.01",
        ],
        "quantize, gptqmodel by 1": [__file__, "--gptqmodel", made / "merge", made / "data", place / "gptqmodel", 1],
        "quantize, gptqmodel by 16": [__file__, "--gptqmodel", made / "merge", made / "data", place / "gptqmodel", 16],
        "evaluate finetune": ["-m", "src.evaluate", *run, f"source={made / 'finetune'}", *few],
        "evaluate merge": ["-m", "src.evaluate", *run, f"source={made / 'merge'}", *few],
        "evaluate quantize": ["-m", "src.evaluate", *run, f"source={made / 'quantize'}", *few],
        "deploy llama2c": ["-m", "src.deploy", *run, "target=llama2c", "target.format=int8_v2"],
    }


def speeds(place: Path) -> dict[str, float]:
    """Tokens per second of the trainings that are done."""
    files = {"finetune": place / "r" / "finetune" / "manifest.json", "finetune, Trainer padded": place / "trainer" / "speed.json"}
    read = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    return {name: found.get("metrics", found)["tokens_per_second"] for name, found in read.items()}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("size", choices=SHAPES)
    words.add_argument("--only", nargs="*", default=[], help="names of the stages to run, or patterns: 'quantize*' has the peers with it")
    words.add_argument("--model", type=Path)
    words.add_argument("--chats")
    words.add_argument("--place", type=Path, help="folder to work in and leave as it is; a temporary one without")
    asked = words.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = (asked.place or Path(temporary)).absolute()
        place.mkdir(parents=True, exist_ok=True)
        if (model := asked.model or place / "model") == place / "model" and not model.is_dir():
            write_model(asked.size, model)
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        chats = [f"data.path={asked.chats}"] * bool(asked.chats) + ["data.val=0.04", "data.calib=0.15"]
        print(f"{asked.size}: {weights / 1e9:.3f} GB of weights, {os.cpu_count()} cores")
        for name, argv in road(model, chats, place).items():
            if asked.only and not any(fnmatch(name, pattern) for pattern in asked.only):
                continue
            found = measured(argv, log := place / f"{name.replace(' ', '-')}.log")
            words = f"{found['cpu_s']:8.1f} CPU s  {found['peak'] / 1e6:8,.0f} MB  {found['peak'] / weights:5.2f} of the weights"
            print(f"{name:<26}{words}  {found['written'] / 1e6:8,.0f} MB written  {found['wall_s']:7.1f} s", flush=True)
            if (speed := speeds(place).get(name)) is not None:
                print(f"  {speed:,.0f} tokens/s of the rows, padding left out")
            if found["code"]:
                print(f"  ended with {found['code']}: {log.read_text()[-300:].strip()}")


if __name__ == "__main__":
    peers = {"--peft": by_peft, "--gptqmodel": by_gptqmodel, "--trainer": by_trainer}
    if peer := peers.get((sys.argv[1:] or [""])[0]):
        peer(*(Path(text) if "/" in text else text for text in sys.argv[2:]))
    else:
        main()
