"""What each stage of a road takes of this machine, told before what it works from is there: by the config.json of the model at its start, and settings."""

from typing import Any

from src.core.room import Needs
from src.sizing import host
from src.sizing.shape import ModelShape


def needs(
    verb: str, cfg: Any, shape: ModelShape, chats: host.Conversations, *, exact: bool, processes: int = 1, gpus: int = 0
) -> Needs | None:
    """A stage's own estimate; None for one that is made from more than a model and its conversations.

    cfg: the verb's settings, or a plan's, which hold the same groups. exact: a merge stands before it, whose exact sum it starts from.
    processes, gpus: of this machine.
    """
    match verb:
        case "data":
            return host.data(0)
        case "finetune":
            return host.finetune(shape, cfg.tuner, cfg.deepspeed, cfg.train, processes=processes, gpus=gpus)
        case "merge":
            return host.merge(shape)
        case "quantize":
            return host.quantize(shape, cfg.quantizer, cfg.calibration, chats, exact=exact)
        case "evaluate":
            return host.evaluate([shape], cfg.evaluation, chats)
        case "deploy":
            return host.deploy(shape, cfg.target, exact=exact)
    return None
