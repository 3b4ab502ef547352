"""Where a stage's figures may go."""

from typing import Annotated, Literal

from pydantic import Field

from src.settings.base import Settings


class Wandb(Settings):
    kind: Literal["wandb"]
    project: str
    """wandb project"""
    mode: Literal["auto", "online", "offline"]
    """auto: online where WANDB_API_KEY is set, else offline"""


class Tensorboard(Settings):
    kind: Literal["tensorboard"]


class Trackio(Settings):
    kind: Literal["trackio"]
    project: str
    """trackio project"""
    system: bool
    """log the load of CPU and GPU too"""


class Mlflow(Settings):
    kind: Literal["mlflow"]
    project: str
    """mlflow experiment"""


Tracker = Annotated[Wandb | Tensorboard | Trackio | Mlflow, Field(discriminator="kind")]
