"""What a run says of itself: lines on the terminal, numbers to the trackers, a summary for the manifest, and the checks that stop a run gone wrong."""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from src.chat.rows import parts
from src.core.errors import ProofFailed
from src.core.log import duration, fitted, mark, on_terminal, rank, say, shortened, spark, ticks, warn
from src.core.tracking import FOLDER, TrackedPlace, Trackers
from src.models.generation import greedy_after
from src.settings.verbs import Trains
from src.training.choices import peak_operations, sgemm_operations
from src.training.examples import Example
from src.training.lesson import Lesson
from src.training.trainer import ChatTrainer

ANSWERING = 60
"""seconds for the sample answers of an evaluation"""
STILL = 20
"""steps after which a loss that has not moved at all is a fault"""


class Reports(TrainerCallback):
    """Loss, rate, gradient norm, speed, memory, time left, sample answers; evaluates at the end of each epoch or every eval_steps."""

    def __init__(self, trainer: ChatTrainer, cfg: Trains, out: Path, tokenizer, lesson: Lesson):
        """out: where the artifact is made. lesson: whose prompts are gone on from at every evaluation.

        bar: holds the bar that training shows on a terminal; whoever trains closes it.
        """
        self.trackers, self.tokenizer, self.lesson = open_trackers(cfg, out), tokenizer, lesson
        self.eval_steps = cfg.train.eval_steps
        gpu = torch.cuda.is_available()
        self.checks_every_step, self.unit = not gpu, "the GPU" if gpu else "sgemm"
        # A CPU's own speed in 16 bits is not known; in fp32 it is what its matrix products reach.
        self.peak = peak_operations(torch.cuda.get_device_name()) if gpu else None if trainer.args.bf16 else sgemm_operations(trainer.model)
        self.trainer, self.first_step, self.start = trainer, 0, time.monotonic()
        self.samples: list[tuple[str, str]] = []
        self.train_seconds = self.speed = 0.0
        self.recent: list[float] = []
        self.zero_norms = 0
        self.bar = contextlib.ExitStack()
        self.tick: Callable[[], None] = lambda: None

    def on_train_begin(self, args, state, control, **kwargs):
        # A resumed state brings the steps of the run it was saved by; what is asked for now counts.
        state.logging_steps, state.save_steps = args.logging_steps, args.save_steps
        self.first_step, self.start = state.global_step, time.monotonic()
        self.trainer.totals.clear()
        self.tick = self.bar.enter_context(ticks(state.max_steps, "training", done=state.global_step, lines=False))

    def on_step_end(self, args, state, control, **kwargs):
        self.tick()
        if self.checks_every_step or control.should_log or control.should_save:
            self.check_losses(state.global_step)
        if len(self.trainer.validation) and self.trainer.plan.evaluates(state.global_step, self.eval_steps):
            control.should_evaluate = True

    def check_losses(self, step: int) -> None:
        """Raises ProofFailed where a step since the last check has no finite loss, or the loss has stood still for STILL steps."""
        losses = torch.stack(self.trainer.step_losses)
        self.trainer.step_losses.clear()
        if dist.is_initialized():
            dist.all_reduce(losses)
            losses /= dist.get_world_size()
        values = losses.tolist()
        for at, value in enumerate(values, step - len(values) + 1):
            if not math.isfinite(value):
                raise ProofFailed(
                    f"the loss became {value} at step {at}",
                    where=f"{self.lesson.source}, records {', '.join(self.record_ids(at))}",
                    fix=["a lower tuner.learning_rate, with force=true", "train.precision=fp32 force=true"],
                )
        self.recent = [*self.recent, *values][-STILL:]
        if len(self.recent) == STILL and max(self.recent) - min(self.recent) <= 1e-7 * abs(self.recent[-1]):
            self.stands_still(step, f"is {self.recent[-1]:.6g} for {STILL} steps")

    def stands_still(self, step: int, how: str) -> None:
        raise ProofFailed(
            f"the loss does not move: by step {step} it {how}",
            where=f"{self.lesson.source}, records of the last step: {', '.join(self.record_ids(step))}",
            fix=[
                "a higher tuner.learning_rate, with force=true",
            ],
        )

    def record_ids(self, step: int, most: int = 8) -> list[str]:
        """What the first rows of a step are, which is counted from 1."""
        names = list(dict.fromkeys(map(self.lesson.named, sorted(self.trainer.plan.examples(step - 1))[: most + 1])))
        return names[:most] + (["..."] if len(names) > most else [])

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        logs["epoch"] = self.trainer.plan.epoch(state.global_step)
        self.zero_norms = self.zero_norms + 1 if logs.get("grad_norm") == 0 and logs["learning_rate"] > 0 else 0
        if self.zero_norms == 3:
            self.stands_still(state.global_step, "has had no gradient in three reports")
        passed = time.monotonic() - self.start - self.trainer.eval_seconds
        done = state.global_step - self.first_step
        totals = self.trainer.totals
        self.train_seconds, self.speed = passed, totals["tokens"] / passed
        values = {
            "train/loss": logs["loss"],
            "train/learning_rate": logs["learning_rate"],
            "train/grad_norm": float(logs.get("grad_norm") or 0),
            "train/epoch": logs["epoch"],
            "train/tokens_per_second": self.speed,
            "train/trained_tokens_per_second": totals["trained"] / passed,
            "train/padding_share": 1 - totals["tokens"] / totals["laid"],
            "train/memory_gb": memory() / 1e9,
        }
        used = ""
        if self.peak:
            done_operations = operations(self.trainer.model, totals["tokens"], totals["trained"] if self.trainer.head else totals["tokens"])
            values["train/mfu"] = done_operations / passed / (self.peak * args.world_size)
            used = f", {values['train/mfu']:.0%} of {self.unit}"
        say(
            fitted(
                (f"  step {state.global_step}/{state.max_steps}", 0),
                (f"  loss {logs['loss']:.4f}", 1),
                (f"  lr {logs['learning_rate']:.2e}", 3),
                (f"  grad {values['train/grad_norm']:.2f}", 4),
                (f"  {self.speed:,.0f} tokens/s", 2),
                (f" ({values['train/trained_tokens_per_second']:,.0f} trained, {values['train/padding_share']:.0%} padding{used})", 7),
                (f"  {values['train/memory_gb']:.1f} GB", 5),
                (f"  {duration(passed / done * (state.max_steps - state.global_step))} left", 6),
            )
        )
        self.trackers.numbers(values, state.global_step)

    def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
        say(
            fitted(
                (f"  step {state.global_step}", 1),
                (f"  validation loss {metrics['eval_loss']:.4f}", 0),
                (f", right next token {metrics['eval_accuracy']:.1%} of {metrics['eval_tokens']}", 3),
                (f", {'turn' if self.lesson.chat else 'document'} ends {metrics['eval_turns_ended']:.0%}", 2),
            )
        )
        self.trackers.numbers({f"eval/{name}": metrics[f"eval_{name}"] for name in ("loss", "accuracy", "turns_ended")}, state.global_step)
        first = next(h["eval_loss"] for h in state.log_history if "eval_loss" in h)
        if state.global_step >= STILL and abs(metrics["eval_loss"] - first) <= 1e-6 * first:
            self.stands_still(state.global_step, f"is {first:.6g} on the validation split, as before the first step")
        self.answer(model, state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if not self.samples and len(self.trainer.validation) and state.global_step == state.max_steps:
            self.answer(model, state.global_step)  # a run killed after its last step has only its answers to make again

    def answer(self, model, step: int) -> None:
        prompts = self.lesson.prompts
        if prompts:
            was_training = model.training
            model.eval()
            alone, begun = (
                self.trainer.args.world_size == 1,
                time.monotonic(),
            )  # processes that stop at different tokens would wait for each other
            answers = greedy_after(
                model,
                self.tokenizer,
                [ids for _, ids in prompts],
                max_new_tokens=64,
                eos_id=self.trainer.eos_id,
                seconds=ANSWERING if alone else None,
            )
            if alone and time.monotonic() - begun > ANSWERING:
                say(f"  sample answers are cut off after {ANSWERING} s (train.samples={len(prompts)})")
            model.train(was_training)
            self.samples = [(prompt, text) for (prompt, _), (text, _) in zip(prompts, answers)]
            self.trackers.samples(self.samples, step)
            if not self.lesson.chat:
                prompt, text = (part.replace("\n", "⏎") for part in self.samples[0])
                say(f"  it goes on: {prompt}{mark(text, True)}")


def operations_per_token(model) -> float:
    """Floating-point operations of training on a token without attention: 2 per weight forward, 2 for the gradient of what comes in, 2 for that
    of the weight where it is trained (Kaplan et al. 2020, arXiv:2001.08361). Recomputing does not count as use."""
    tied, total, trained = model.config.get_text_config().tie_word_embeddings, 0, 0
    for name, parameter in model.named_parameters():
        if tied or "embed_tokens" not in name:  # looking a token up computes nothing; a tied table is the output layer too
            count = getattr(parameter, "ds_numel", parameter.numel())
            total, trained = total + count, trained + count * parameter.requires_grad
    return 4.0 * total + 2.0 * trained


def operations(model, tokens: int, put_out: int) -> float:
    """Floating-point operations of training on so many tokens, of which so many went through the output layer."""
    head = model.get_output_embeddings().weight
    each = 4 + 2 * head.requires_grad
    return operations_per_token(model) * tokens - each * getattr(head, "ds_numel", head.numel()) * (tokens - put_out)


def memory() -> int:
    """Peak bytes this process has used: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def preview(example: Example, tokenizer, limit: int = 120) -> None:
    """Show one row as the model will see it, with what is trained standing out; long stretches are shortened in their middle."""
    pieces = [
        mark(shortened(text, limit).replace("\n", "⏎"), trained)
        for text, trained in parts(example.input_ids.tolist(), example.labels.tolist(), tokenizer)
    ]
    say("a row, with what is trained marked: " + "".join(pieces))


def open_trackers(cfg: Trains, out: Path) -> Trackers:
    """The trackers of rank 0, writing into the run, outside the artifact that gets sealed."""
    settings = {**cfg.model_dump(mode="json"), "run": cfg.run, "model_path": cfg.model.path}
    place = TrackedPlace(out.parent / FOLDER, cfg.run, out.name.removesuffix(".partial"))
    return Trackers(cfg.tracker if rank() == 0 else {}, place, settings, journal=rank() == 0)


def summary(trainer, reports: Reports, precision: str, saved: dict) -> dict:
    """The numbers that go into the manifest. saved: the validation of what is saved, where that is narrower than what was trained, else empty."""
    history = trainer.state.log_history
    losses = [h["loss"] for h in history if "loss" in h]
    evals = [h for h in history if "eval_loss" in h]
    if on_terminal():
        say(fitted((f"  loss {losses[0]:.3f}", 0), (f" {spark(losses)}", 2), (f" {losses[-1]:.3f}", 1)))
    metrics = {
        "steps": trainer.state.max_steps,
        "processes": trainer.args.world_size,
        "precision": precision,
        "train_rows": len(trainer.examples),
        **reports.lesson.metrics,
        "tokens_seen": int(trainer.state.num_input_tokens_seen),
        "train_seconds": round(reports.train_seconds, 2),
        "tokens_per_second": round(reports.speed, 1),
        "packed": trainer.plan.packed,
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
            "evaluations": [{"step": h["step"], "loss": h["eval_loss"], "accuracy": h["eval_accuracy"]} for h in evals],
            "val_loss_first": evals[0]["eval_loss"],
            "val_loss_trained": evals[-1]["eval_loss"],
            "val_loss": evals[-1]["eval_loss"],
            "val_accuracy": evals[-1]["eval_accuracy"],
            "turns_ended": evals[-1]["eval_turns_ended"],
        }
        if saved:
            metrics |= {"val_loss": saved["loss"], "val_accuracy": saved["accuracy"], "turns_ended": saved["turns_ended"]}
        if metrics["turns_ended"] < 0.5 and reports.lesson.chat:
            warn(
                f"the model ends only {metrics['turns_ended']:.0%} of its turns where it should, so its answers will run on however good the loss looks; "
                "train for more steps, or raise tuner.learning_rate or tuner.row_learning_rate"
            )
    return metrics
