"""States a killed run goes on from."""

import shutil
from pathlib import Path

import torch.distributed as dist
from transformers import Trainer, TrainerCallback

from src.core.errors import Moved
from src.core.log import rank, say
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


class Checkpoints(TrainerCallback):
    """Opens a checkpoint and marks it as whole once every rank has written its part, and keeps only the newest; resume looks at nothing unmarked."""

    MARK = "whole"

    def __init__(self, trainer: Trainer, world: int):
        self.trainer, self.world = trainer, world

    def on_save(self, args, state, control, **kwargs):
        barrier()
        if rank() == 0:
            folder = Path(args.output_dir)
            newest = folder / f"checkpoint-{state.global_step}"
            if any(newest.glob("*.safetensors")):  # DeepSpeed keeps a whole model in files of its own
                adapter = hasattr(self.trainer.model, "peft_config")
                adapter_files.check_saved(newest, moved=False, expected=adapter_files.saved_names(self.trainer.model) if adapter else set())
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
