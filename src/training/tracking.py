"""Where training curves go: wandb and TensorBoard, any number at once. A tracker that fails says so once and never stops a run."""

import os
from collections.abc import Callable
from pathlib import Path

from src import __version__
from src.core.log import say, warn
from src.settings.verbs import Tensorboard, Tracker, Wandb


class Trackers:
    """Fan out numbers, texts and settings to every tracker asked for; on ranks other than 0 create it with none."""

    def __init__(self, trackers: dict[str, Tracker], folder: Path, name: str, settings: dict):
        self.sinks: dict[str, dict[str, Callable]] = {}
        settings = {"boardwalk": __version__} | settings
        for key, tracker in trackers.items():
            start = {Wandb: _wandb, Tensorboard: _tensorboard}[type(tracker)]
            self._try(
                key, lambda start=start, tracker=tracker, key=key: self.sinks.__setitem__(key, start(tracker, folder / key, name, settings))
            )

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Scalars at an optimizer step, by names such as train/loss."""
        self._each(lambda sink: sink["numbers"](values, step))

    def samples(self, rows: list[tuple[str, str]], step: int) -> None:
        """(prompt, answer) pairs at an optimizer step."""
        self._each(lambda sink: sink["samples"](rows, step))

    def close(self) -> None:
        self._each(lambda sink: sink["close"]())

    def _each(self, call: Callable) -> None:
        for key, sink in list(self.sinks.items()):
            self._try(key, lambda sink=sink: call(sink))

    def _try(self, key: str, call: Callable) -> None:
        try:
            call()
        except Exception as error:  # whatever goes wrong in a dashboard, the training run is worth more
            self.sinks.pop(key, None)
            warn(f"tracker {key} stopped, training goes on: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _wandb(tracker: Wandb, folder: Path, name: str, settings: dict) -> dict[str, Callable]:
    import wandb

    mode = ("online" if os.environ.get("WANDB_API_KEY") else "offline") if tracker.mode == "auto" else tracker.mode
    folder.mkdir(parents=True, exist_ok=True)
    for place in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        os.environ.setdefault(place, str(folder.resolve()))  # else it writes to the home folder
    run = wandb.init(
        project=tracker.project, name=name, dir=folder, config=settings, mode=mode, settings=wandb.Settings(silent=True, init_timeout=30)
    )
    say(f"wandb: {mode}, in {folder}" + (f"; `wandb sync {run.dir.removesuffix('/files')}` sends it later" if mode == "offline" else ""))
    return {
        "numbers": lambda values, step: run.log(values, step=step),
        "samples": lambda rows, step: run.log(
            {"samples": wandb.Table(columns=["prompt", "answer"], data=[list(r) for r in rows])}, step=step
        ),
        "close": run.finish,
    }


def _tensorboard(tracker: Tensorboard, folder: Path, name: str, settings: dict) -> dict[str, Callable]:
    import json

    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)
    writer.add_text("settings", f"```json\n{json.dumps(settings, indent=1)}\n```")
    say(f"tensorboard: tensorboard --logdir {folder}")

    def numbers(values, step):
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return {
        "numbers": numbers,
        "samples": lambda rows, step: writer.add_text("samples", "\n\n".join(f"**{p}**\n\n{a}" for p, a in rows), step),
        "close": writer.close,
    }
