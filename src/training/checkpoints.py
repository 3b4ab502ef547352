"""States a killed run goes on from."""

import contextlib
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

from src.core.errors import Moved
from src.core.files import write_text
from src.core.log import rank, say
from src.core.processes import Interrupted
from src.models import adapter_files


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def from_first(value):
    """Rank 0's value, on every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def agreed(values: list[int], device) -> list[int]:
    """The largest that any process has of each value."""
    if not dist.is_initialized():
        return [int(value) for value in values]
    largest = torch.tensor([int(value) for value in values], device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


class Stop:
    """Within the block SIGINT, SIGTERM and SIGHUP ask for an end after the step that is under way; a second one ends it at once. Those that come
    within ONCE are one: what is sent to all processes of a job is handed on to them too by those that started them.

    number: of the signal that asked; 0: none did.
    """

    ONCE = 0.5
    """seconds"""

    def __init__(self):
        self.number, self._asked, self._before = 0, 0.0, {}

    def __enter__(self) -> Self:
        with contextlib.suppress(ValueError):  # signals are the main thread's
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if (before := signal.getsignal(number)) != signal.SIG_IGN:
                    self._before[number] = before
                    signal.signal(number, self._ask)
        return self

    def __exit__(self, *_) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _ask(self, number: int, frame) -> None:
        if self.number and time.monotonic() - self._asked > self.ONCE:
            raise Interrupted(number)
        if self.number:
            return
        self.number, self._asked = number, time.monotonic()
        # By another thread: this one may be saying something, and Python's buffer takes no words between those of one thread.
        threading.Thread(target=say, args=("stops after this step, with a checkpoint; asked again, at once",)).start()


class Checkpoints(TrainerCallback):
    """Opens a checkpoint and marks it as whole once every rank has written its part, and keeps only the newest; resume looks at nothing unmarked.

    One is made, besides the trainer's own, when as many minutes have passed, and before a run ends that was asked to stop.
    """

    MARK = "whole"

    def __init__(self, trainer: Trainer, world: int, minutes: float, stop: Stop):
        self.trainer, self.world, self.seconds, self.stop, self.saved = trainer, world, 60 * minutes, stop, time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        self.saved = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        # Every rank has to save at the same step, so what one was asked or sees on its clock all do.
        asked, due = agreed([self.stop.number, time.monotonic() - self.saved > self.seconds], args.device)
        self.stop.number = asked
        control.should_save = control.should_save or bool(asked or due)
        control.should_training_stop = control.should_training_stop or bool(asked)

    def on_save(self, args, state, control, **kwargs):
        barrier()
        self.saved = time.monotonic()
        if rank() == 0:
            folder = Path(args.output_dir)
            newest = folder / f"checkpoint-{state.global_step}"
            if any(newest.glob("*.safetensors")):  # DeepSpeed keeps a whole model in files of its own
                adapter = hasattr(self.trainer.model, "peft_config")
                adapter_files.check_saved(newest, moved=False, expected=adapter_files.saved_names(self.trainer.model) if adapter else set())
            write_text(newest / self.MARK, str(self.world))
            for other in folder.glob("checkpoint-*"):
                if other != newest:
                    shutil.rmtree(other)
        barrier()

    @classmethod
    def last(cls, folder: Path, world: int) -> Path | None:
        """The newest whole checkpoint, or None. Raises Moved when it was made by another number of processes, which cannot continue it."""
        marks = {mark: int(text) for mark in folder.glob(f"checkpoint-*/{cls.MARK}") if (text := mark.read_text().strip()).isdigit()}
        newest = max(marks, key=lambda mark: int(mark.parent.name.split("-")[1]), default=None)
        if newest is None:
            return None
        if (made := marks[newest]) != world:
            raise Moved(
                f"the unfinished run was trained by {made} processes and cannot go on with {world}",
                where=str(newest.parent),
                fix=[f"launch.nproc_per_node={made}", f"remove {folder.parent} to start over"],
            )
        say(f"goes on from step {newest.parent.name.split('-')[1]}")
        return newest.parent
