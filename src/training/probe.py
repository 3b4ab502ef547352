"""Before step 1: does the longest batch of the run go through, and is there room for what is saved."""

import shutil
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from src.core.errors import NO_SPACE, NoMemory, NoRoom, ProofFailed
from src.core.log import duration, rank, say, size
from src.models.devices import give_back_memory
from src.settings.verbs import TrainingVerb
from src.training.batches import micro_batch
from src.training.checkpoints import barrier
from src.training.head import token_results
from src.training.layout import EQUAL, as_in_use, leaks, losses, sample_examples, smaller
from src.training.trainer import ChatTrainer

COUNTERS = ("global_steps", "global_samples", "micro_steps")
"""of DeepSpeed's engine"""


class Probe(TrainerCallback):
    """Before step 1 of a run, takes its longest batch forward, backward, through the optimizer and to disk, and leaves no trace.

    The loss is multiplied by zero and the rate is zero, so weights stay as they are to the bit; optimizer states, random state and schedule
    are put back.
    """

    def __init__(self, trainer: ChatTrainer, cfg: TrainingVerb, out: Path, precision: str):
        self.trainer, self.cfg, self.out, self.precision = trainer, cfg, out, precision

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            return  # a resumed run has been through it
        begun, trainer = time.monotonic(), self.trainer
        give_back_memory()  # what loading and DeepSpeed's partitioning went through
        examples = trainer.plan.longest()
        try:
            if self.cfg.deepspeed.stage == 3:  # nothing was proven before the model was in the engine
                self.prove_inside()
            self.step(micro_batch(trainer.examples, examples, trainer.pad, packed=trainer.plan.packed))
        except torch.OutOfMemoryError:
            raise NoMemory(
                f"the longest batch of the run, {trainer.plan.size(examples):,} tokens, does not fit on the GPU",
                where=f"{torch.cuda.get_device_name()}, {size(torch.cuda.mem_get_info()[1])}",
                fix=smaller(self.cfg, checkpointing=trainer.model.is_gradient_checkpointing, one=len(examples) == 1),
            ) from None
        written = self.save()
        say(
            f"probe: {len(examples)} rows, {trainer.plan.size(examples):,} tokens, forward, backward, optimizer step and saving ({size(written)}) went "
            f"through in {duration(time.monotonic() - begun)}"
        )

    def step(self, batch: dict) -> None:
        trainer, devices = self.trainer, [torch.cuda.current_device()] if torch.cuda.is_available() else []
        schedule, engine = trainer.lr_scheduler.state_dict(), trainer.model_wrapped if trainer.is_deepspeed_enabled else None
        counters = {name: getattr(engine, name) for name in COUNTERS} if engine else {}
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        for group in trainer.optimizer.param_groups:
            group["lr"] = 0.0
        with torch.random.fork_rng(devices):
            trainer.model_wrapped.train()
            trainer.accelerator.gradient_state._set_sync_gradients(True)
            loss = trainer.loss_sum(trainer.model_wrapped, batch)
            if not loss.isfinite():
                raise ProofFailed(
                    f"the loss of the longest batch is {loss.item()} before anything is trained",
                    fix="train.precision=fp32",
                )
            trainer.accelerator.backward(0.0 * loss)
            trainer.optimizer.step()
            trainer.model_wrapped.zero_grad()
        for name, value in counters.items():
            setattr(engine, name, value)
        inner = trainer.optimizer
        while hasattr(inner, "optimizer"):
            inner = inner.optimizer
        for values in inner.state.values():
            values["step"].zero_() if isinstance(values.get("step"), torch.Tensor) else values.update(step=0)
        trainer.lr_scheduler.load_state_dict(schedule)
        for group, rate in zip(trainer.optimizer.param_groups, rates):
            group["lr"] = rate

    def prove_inside(self) -> None:
        """Under ZeRO-3: packed and chunked losses against those of the plain model, in DeepSpeed's engine."""
        trainer = self.trainer
        model, examples = trainer.model_wrapped, sample_examples(trainer.model)
        with as_in_use(model):
            given = micro_batch(examples, [0, 1], trainer.pad, packed=trainer.plan.packed)
            results = trainer.forward(model, given)
            ours = results[:, 0] if trainer.head else token_results(results, given["targets"].to(trainer.args.device))[:, 0]
            plain = torch.cat([losses(model, micro_batch(examples, [i], trainer.pad, packed=False)) for i in range(2)])
            seen = trainer.plan.packed and leaks(trainer.model, EQUAL[self.precision], inside=model)
        if seen or (ours - plain).abs().max().item() > EQUAL[self.precision]:
            raise ProofFailed(
                "on this model packed rows, or the loss in chunks, do not give the losses of the plain model",
                fix="train.packing=false train.chunked_loss=false",
            )

    def save(self) -> int:
        """Bytes of a trial save. Raises NoRoom where the checkpoints of the run would not fit on the disk."""
        folder = self.out / "probe"
        self.trainer.tidy()
        self.trainer.finished = True
        self.trainer.save_model(str(folder))
        self.trainer.finished = False
        barrier()
        if rank() != 0:
            return 0
        written = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        shutil.rmtree(folder)
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in self.trainer.model.parameters() if p.requires_grad)
        # Two checkpoints of weights and two Adam moments while one replaces the other, and the result.
        need, free = 3 * written + 16 * trained, shutil.disk_usage(self.out).free
        if need > free:
            raise NoRoom(
                f"the run's checkpoints and result need about {size(need)}, {size(free)} are free",
                where=str(self.out),
                fix=NO_SPACE,
            )
        return written
