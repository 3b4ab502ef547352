"""The machinery under `finetune`: rows, batches, the trainer, its reports and its checkpoints. Imported only by worker processes."""

import itertools
import math
import os
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
from safetensors.torch import save_model
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from src import chatml
from src.config import FinetuneVerb
from src.errors import BadData, ConfigError, Moved, ProofFailed
from src.log import duration, mark, on_terminal, progress, rank, say, spark, status, warn
from src.modeling import device, greedy, say_device
from src.rows import folded
from src.tracking import Trackers
from src.zero import deepspeed_json


def start(cfg: FinetuneVerb) -> tuple[str, str]:
    """Join the other processes and seed; returns (device, precision)."""
    init_distributed(cfg.deepspeed.stage)
    set_seed(cfg.train.seed)
    name = device()
    say_device(name)
    return name, precision_of(cfg.train.precision)


def tokenized(cfg: FinetuneVerb, dataset: Path, split: str, out: Path, tokenizer, end: int) -> datasets.Dataset:
    """Rows of {"input_ids", "labels"} for one split, made once by rank 0 and memory-mapped by all.

    Longer rows than train.max_length are dropped; how many rows and tokens that is gets said.
    """
    source, folder, max_length = dataset / f"{split}.jsonl", out / "rows" / split, cfg.train.max_length
    if rank() == 0 and not folder.exists():
        counts = {"rows": 0, "long": 0, "long_tokens": 0, "tools_unseen": 0}

        def rows():
            encode = chatml.encode_qwen_legacy if cfg.legacy_mask == "qwen" else chatml.encode
            for record in progress(read_rows(source), f"tokenizing {split}"):
                try:
                    encoded = encode(tokenizer, record["messages"], record.get("tools"), end=end)
                except BadData as error:
                    raise BadData(
                        error.what, where=f"record '{record['id']}'", fix="mend the record, or use a model whose template takes such turns"
                    ) from None
                counts["rows"] += 1
                if record.get("tools") and chatml.render(tokenizer, record["messages"]) == chatml.render(
                    tokenizer, record["messages"], record["tools"]
                ):
                    counts["tools_unseen"] += 1
                if len(encoded.input_ids) > max_length:
                    counts["long"] += 1
                    counts["long_tokens"] += len(encoded.input_ids)
                else:
                    yield {"input_ids": encoded.input_ids, "labels": encoded.labels}

        features = datasets.Features(
            {"input_ids": datasets.List(datasets.Value("int32")), "labels": datasets.List(datasets.Value("int32"))}
        )
        cache, partial = folder.with_name(f"{folder.name}.cache"), folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(cache, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        datasets.disable_progress_bars()
        try:
            made = datasets.Dataset.from_generator(rows, features=features, cache_dir=str(cache), fingerprint=f"rows-{os.getpid()}")
        except datasets.exceptions.DatasetGenerationError as error:
            raise error.__cause__ or error from None
        except ValueError:
            # datasets makes none of no rows; the folder stays empty.
            if counts["rows"] > counts["long"]:
                raise
            partial.mkdir(parents=True)
        else:
            made.save_to_disk(partial)
        shutil.rmtree(cache, ignore_errors=True)
        partial.rename(folder)
        if counts["long"]:
            warn(
                f"{split}: dropped {counts['long']} of {counts['rows']} rows ({counts['long_tokens']:,} tokens) longer than train.max_length={max_length}"
            )
        if counts["tools_unseen"]:
            warn(f"{split}: the chat template ignores the tools of {counts['tools_unseen']} rows")
    barrier()
    return datasets.load_from_disk(str(folder)) if any(folder.iterdir()) else datasets.Dataset.from_dict({"input_ids": [], "labels": []})


def preview(row: dict, tokenizer, limit: int = 120) -> None:
    """Show one row as the model will see it, with what is trained standing out; long stretches are shortened in their middle."""
    pieces = []
    for trained, group in itertools.groupby(zip(row["input_ids"], row["labels"]), key=lambda pair: pair[1] != chatml.IGNORE):
        text = tokenizer.decode([token for token, _ in group])
        text = text if len(text) <= limit else f"{text[: limit * 2 // 3]} … {text[-limit // 3 :]}"
        pieces.append(mark(text.replace("\n", "⏎"), trained))
    say("a row, with what is trained marked: " + "".join(pieces))


def read_rows(path: Path):
    """Records of a split file of a dataset artifact."""
    import json

    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@dataclass
class Collator:
    """Pads rows on the right to the longest of the batch: input_ids, attention_mask and labels of shape (batch, length), int64."""

    pad: int

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)

        def block(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
        return {"input_ids": block("input_ids", self.pad), "attention_mask": mask, "labels": block("labels", chatml.IGNORE)}


class ChatTrainer(Trainer):
    """transformers' Trainer with an evaluation that weighs every trained token the same over all ranks, and rates of their own for token rows."""

    finished: bool = False
    """what is saved from now on is the result, no longer a checkpoint"""

    turn_end: int = -1
    """id of the token that ends an assistant turn"""

    row_rates: dict[str, float] = {}
    """peak learning rate by parameter name, for those that do not take the common one; without weight decay"""

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        rows = {id(p): self.row_rates[name] for name, p in self.model.named_parameters() if name in self.row_rates}
        found = [p for group in optimizer.param_groups for p in group["params"] if id(p) in rows]
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in rows]
        for parameter in found:
            optimizer.add_param_group({"params": [parameter], "lr": rows[id(parameter)], "weight_decay": 0.0})
        return optimizer

    def _save(self, output_dir=None, state_dict=None):
        """As transformers', but what it cannot do: an adapter never brings the whole embedding along (what was grown or trained in it is kept as
        rows), and rows split off a matrix are folded into it in the result, though not in a checkpoint, which must find them again."""
        folder, writes = output_dir or self.args.output_dir, self.args.should_save
        if hasattr(self.model, "peft_config"):
            self.model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False, is_main_process=writes)
            return
        if not writes:
            return
        if self.row_rates and not self.finished:
            if not self.is_deepspeed_enabled:  # DeepSpeed keeps weights in files of its own
                Path(folder).mkdir(parents=True, exist_ok=True)
                save_model(self.model, str(Path(folder) / "model.safetensors"))
            return
        if self.row_rates:
            state_dict = folded(self.model, state_dict or self.model.state_dict())
        # DeepSpeed hands over a tied output layer as a tensor of its own.
        tied = set(self.model._tied_weights_keys or ()) if self.model.config.tie_word_embeddings else set()
        super()._save(output_dir, {name: t for name, t in state_dict.items() if name not in tied} if state_dict else None)

    eval_seconds = 0.0
    """time spent in evaluations, which training speed leaves out"""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        start = time.monotonic()
        was_training = self.model.training
        self.model.eval()
        loss, tokens, hits, turns, ended = self._measure(eval_dataset or self.eval_dataset).tolist()
        self.model.train(was_training)
        values = {
            "loss": loss / max(tokens, 1),
            "accuracy": hits / max(tokens, 1),
            "tokens": int(tokens),
            "turns_ended": ended / max(turns, 1),
        }
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.eval_seconds += time.monotonic() - start
        return metrics

    @torch.no_grad()
    def _measure(self, rows) -> torch.Tensor:
        """(sum of losses, trained tokens, top-1 hits, turn ends, those predicted) over all ranks, float64.

        Every rank does as many forward passes, as ZeRO-3 needs.
        """
        world, me, size = self.args.world_size, self.args.process_index, self.args.per_device_eval_batch_size
        total = torch.zeros(5, dtype=torch.float64, device=self.args.device)
        model = self.model_wrapped if self.is_deepspeed_enabled and hasattr(self.model_wrapped, "forward") else self.model
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
        for begin in range(0, len(order), world * size):
            mine = order[begin : begin + world * size][me::world]
            batch = self.data_collator([rows[i] for i in mine or order[:1]])
            batch = {key: value.to(self.args.device) for key, value in batch.items()}
            labels = batch.pop("labels")[:, 1:]
            with self.compute_loss_context_manager():
                logits = model(**batch, use_cache=False).logits[:, :-1]
            if mine:
                kept = labels != chatml.IGNORE
                chosen, wanted = logits[kept].float(), labels[kept]
                right, ends = chosen.argmax(-1) == wanted, wanted == self.turn_end
                total += torch.stack(
                    [cross_entropy(chosen, wanted, reduction="sum"), kept.sum(), right.sum(), ends.sum(), (right & ends).sum()]
                ).to(total)
        if dist.is_initialized():
            dist.all_reduce(total)
        return total


class Reports(TrainerCallback):
    """Lines on the terminal and numbers to the trackers: loss, rate, gradient norm, tokens/s, memory, time left, sample answers."""

    def __init__(self, trackers: Trackers, tokenizer, prompts: list[list[dict]], end: int, eval_steps: float | None):
        """eval_steps: None evaluates at the end of each epoch, infinity never."""
        self.trackers, self.tokenizer, self.prompts, self.end, self.eval_steps = trackers, tokenizer, prompts, end, eval_steps
        self.trainer: ChatTrainer | None = None
        self.samples: list[tuple[str, str]] = []
        self.train_seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        # A resumed state brings the steps of the run it was saved by; what is asked for now counts.
        state.logging_steps, state.save_steps = args.logging_steps, args.save_steps
        self.first_step, self.start, self.tokens = state.global_step, time.monotonic(), state.num_input_tokens_seen

    def on_step_end(self, args, state, control, **kwargs):
        if self.eval_steps and state.global_step % self.eval_steps == 0:
            control.should_evaluate = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if not self.eval_steps:
            control.should_evaluate = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise ProofFailed(
                    f"the loss became {logs['loss']} by step {state.global_step}",
                    fix=["lower tuner.learning_rate", "train.precision=fp32", "look for broken rows in the data"],
                )
            passed = time.monotonic() - self.start - self.trainer.eval_seconds
            done = state.global_step - self.first_step
            speed = (state.num_input_tokens_seen - self.tokens) / passed
            left = duration(passed / done * (state.max_steps - state.global_step))
            self.train_seconds = passed
            status(
                f"  step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  grad {logs.get('grad_norm', 0):.2f}  {speed:,.0f} tokens/s  {left} left"
            )
            names = {"loss": "train/loss", "learning_rate": "train/learning_rate", "grad_norm": "train/grad_norm", "epoch": "train/epoch"}
            values = {names[key]: float(value) for key, value in logs.items() if key in names}
            self.trackers.numbers(values | {"train/tokens_per_second": speed, "train/memory_gb": memory() / 1e9}, state.global_step)

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        say(
            f"  step {state.global_step}  validation loss {metrics['eval_loss']:.4f}, right next token {metrics['eval_accuracy']:.1%} of {metrics['eval_tokens']}, turn ends {metrics['eval_turns_ended']:.0%}"
        )
        self.trackers.numbers({f"eval/{name}": metrics[f"eval_{name}"] for name in ("loss", "accuracy", "turns_ended")}, state.global_step)
        if self.prompts:
            was_training = model.training
            model.eval()
            answers = greedy(model, self.tokenizer, self.prompts, max_new_tokens=64, end=self.end)
            model.train(was_training)
            self.samples = [(prompt[-1]["content"], text) for prompt, (text, _) in zip(self.prompts, answers)]
            self.trackers.samples(self.samples, state.global_step)


class Checkpoints(TrainerCallback):
    """Marks a checkpoint as whole once every rank has written its part, and keeps only the newest; resume looks at nothing unmarked."""

    MARK = "whole"

    def __init__(self, world: int):
        self.world = world

    def on_save(self, args, state, control, **kwargs):
        barrier()
        if rank() == 0:
            folder = Path(args.output_dir)
            newest = folder / f"checkpoint-{state.global_step}"
            (newest / self.MARK).write_text(str(self.world))
            for other in folder.glob("checkpoint-*"):
                if other != newest:
                    shutil.rmtree(other)
        barrier()

    @classmethod
    def last(cls, folder: Path, world: int) -> Path | None:
        """The newest whole checkpoint, or None. Raises Moved when it was made by another number of processes, which cannot continue it."""
        newest = max(folder.glob(f"checkpoint-*/{cls.MARK}"), key=lambda p: int(p.parent.name.split("-")[1]), default=None)
        if newest is None:
            return None
        if (made := int(newest.read_text())) != world:
            raise Moved(
                f"the unfinished run was trained by {made} processes and cannot go on with {world}",
                where=str(newest.parent),
                fix=[f"launch.nproc_per_node={made}", f"remove {folder.parent} to start over"],
            )
        say(f"goes on from step {newest.parent.name.split('-')[1]}")
        return newest.parent


def memory() -> int:
    """Peak bytes this process has used: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def arguments(cfg: FinetuneVerb, out: Path, splits: dict, batch: tuple[int, int], precision: str, *, resumes: bool) -> TrainingArguments:
    """transformers' TrainingArguments for our settings. Trackers, saving of the result and reports are ours, so its own are off.

    batch: conversations per forward pass and process, and forward passes per step.
    """
    micro, accumulation = batch
    steps = cfg.train.max_steps or max(1, math.ceil(round(len(splits["train"]) * cfg.train.epochs) / cfg.train.global_batch_size))
    t = cfg.train
    return TrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=max(micro, 8),
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=cfg.tuner.learning_rate,
        lr_scheduler_type=t.lr_scheduler,
        # transformers 5 reads a float below 1 as a share of the steps and rounds up.
        warmup_steps=t.warmup,
        weight_decay=t.weight_decay,
        adam_beta1=t.adam_beta1,
        adam_beta2=t.adam_beta2,
        max_grad_norm=t.max_grad_norm,
        optim="adamw_torch",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        gradient_checkpointing=t.gradient_checkpointing,
        eval_strategy="no",
        eval_on_start=len(splits["val"]) > 0 and not resumes,
        save_strategy="steps",
        save_steps=t.checkpoint_steps,
        logging_steps=t.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        seed=t.seed,
        data_seed=t.seed,
        deepspeed=deepspeed_json(cfg.deepspeed, gpu=torch.cuda.is_available()) if cfg.deepspeed.stage else None,
    )


def init_distributed(deepspeed_stage: int) -> None:
    """Join the other processes. On a CPU the trainer would leave DeepSpeed's part out, which ZeRO-3 needs before the model is made."""
    if "WORLD_SIZE" not in os.environ:
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not deepspeed_stage:
        dist.init_process_group(backend)
        return
    import deepspeed
    import deepspeed.ops

    # DeepSpeed would compile a shared-memory all-reduce for CPUs (40 s), and a compile killed half-way hangs every later run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def precision_of(asked: str) -> str:
    """fp32, bf16 or fp16: what was asked for, or what the device is good at."""
    if asked == "fp16" and not torch.cuda.is_available():
        raise ConfigError("train.precision=fp16 needs a GPU", fix="train.precision=auto")
    if asked != "auto":
        return asked
    chosen = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    say(f"precision: {chosen}")
    return chosen


def open_trackers(cfg: FinetuneVerb, out: Path) -> Trackers:
    """The trackers of rank 0, writing to <run>/tracking/, outside the artifact that gets sealed."""
    settings = {**cfg.model_dump(mode="json"), "run": cfg.run, "model_path": cfg.model.path}
    return Trackers(cfg.tracker if rank() == 0 else {}, out.parent / "tracking", cfg.run, settings)


def first_prompts(path: Path, count: int) -> list[list[dict]]:
    """The first `count` conversations of a split, cut before their first answer."""
    prompts = []
    for record in itertools.islice(read_rows(path), count * 4):
        messages = record["messages"]
        cut = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), 0)
        if cut and len(prompts) < count:
            prompts.append(messages[:cut])
    return prompts


def trainer(
    cfg: FinetuneVerb, model, args: TrainingArguments, splits: dict, tokenizer, end: int, rates: dict, dataset: Path, out: Path
) -> ChatTrainer:
    """The trainer with our reports and checkpoints, and without its own printing. rates: see ChatTrainer.row_rates."""
    reports = Reports(
        open_trackers(cfg, out),
        tokenizer,
        first_prompts(dataset / "val.jsonl", 3),
        end,
        cfg.train.eval_steps if splits["val"] else math.inf,
    )
    made = ChatTrainer(
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["val"],
        data_collator=Collator(tokenizer.pad_token_id),
        callbacks=[reports, Checkpoints(args.world_size)],
    )
    made.remove_callback(PrinterCallback)
    made.reports, made.turn_end, made.row_rates = reports, end, rates
    reports.trainer = made
    if rates:
        say("peak learning rate of the token rows: " + ", ".join(sorted({f"{rate:.1e}" for rate in rates.values()})))
    return made


def summary(trainer: ChatTrainer, splits: dict, precision: str) -> dict:
    """The numbers that go into the manifest."""
    history, reports = trainer.state.log_history, trainer.reports
    losses = [h["loss"] for h in history if "loss" in h]
    evals = [h for h in history if "eval_loss" in h]
    if on_terminal():
        say(f"  loss {losses[0]:.3f} {spark(losses)} {losses[-1]:.3f}")
    metrics = {
        "steps": trainer.state.max_steps,
        "processes": trainer.args.world_size,
        "precision": precision,
        "train_rows": len(splits["train"]),
        "tokens_seen": int(trainer.state.num_input_tokens_seen),
        "train_seconds": round(reports.train_seconds, 2),
        "train_loss_first": losses[0],
        "train_loss_last": losses[-1],
        "memory_bytes": memory(),
        "curve": [
            {"step": h["step"], "loss": h["loss"], "learning_rate": h["learning_rate"], "grad_norm": h.get("grad_norm")}
            for h in history
            if "loss" in h
        ],
        "samples": [{"prompt": p, "answer": a} for p, a in reports.samples],
    }
    if evals:
        metrics |= {
            "val_loss_first": evals[0]["eval_loss"],
            "val_loss": evals[-1]["eval_loss"],
            "val_accuracy": evals[-1]["eval_accuracy"],
            "turns_ended": evals[-1]["eval_turns_ended"],
        }
        if metrics["turns_ended"] < 0.5:
            warn(
                f"the model ends only {metrics['turns_ended']:.0%} of its turns where it should, so its answers will run on however good the loss looks; "
                "train for more steps, or raise tuner.learning_rate or tuner.row_learning_rate"
            )
    return metrics
