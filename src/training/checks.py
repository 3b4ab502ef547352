"""What every verb that trains looks at before torch: the tuner against DeepSpeed and the base, how a step is shared, a user's DeepSpeed file."""

import os
from pathlib import Path

from src.core import stage
from src.core.artifact import Artifact, outside
from src.core.errors import ConfigError, MissingInput
from src.core.processes import import_quietly
from src.models.folder import check_folder, check_tokenizer, locate
from src.models.loading import import_peft
from src.settings.verbs import TrainingVerb, Trains
from src.training import launch, rules
from src.training.deepspeed_config import user_deepspeed_json


def base_model(cfg: Trains, run: stage.Run) -> Artifact:
    """The model that is gone on from."""
    folder = locate(cfg.model.path, cfg.model.revision, download=not cfg.dry_run, allow_pickle=cfg.model.allow_pickle)
    return run.source(str(folder), kinds={"model", "quantized"})


def base_config(cfg: Trains, base: Path) -> dict:
    """Its config.json. Raises where its folder is not whole, not safe to load, or knows fewer positions than a row has."""
    config = check_folder(base, allow_pickle=cfg.model.allow_pickle, trust_remote_code=cfg.model.trust_remote_code)
    check_tokenizer(base, trust_remote_code=cfg.model.trust_remote_code)
    rules.check_length(cfg.train.max_length, config.get("max_position_embeddings"), where=str(base))
    return config


def deepspeed_file(cfg: TrainingVerb, run: stage.Run) -> dict[str, Artifact]:
    """A user's DeepSpeed file as an input, if there is one."""
    if not cfg.deepspeed.config:
        return {}
    if not Path(cfg.deepspeed.config).is_file():
        raise MissingInput(
            "no such DeepSpeed file",
            where=cfg.deepspeed.config,
            fix=["give a JSON file that is there", "deepspeed=zero2 or deepspeed=zero3 needs none"],
        )
    return {"deepspeed": outside(Path(cfg.deepspeed.config), "file", run.cache)}


def check(cfg: TrainingVerb, where: str, quantization: str | None, rows: str) -> str:
    """How it is trained, in words. where, quantization: of the base, see rules.check; rows: what a step consists of."""
    rules.check(cfg.tuner, zero_stage=cfg.deepspeed.stage, quantization=quantization, where=where)
    if cfg.deepspeed.config:
        user_deepspeed_json(Path(cfg.deepspeed.config), cfg)
        if not cfg.deepspeed.stage:
            raise ConfigError(
                "deepspeed.config is given, but deepspeed=none would ignore it",
                fix="name its stage too: deepspeed=zero2 or deepspeed=zero3",
            )
    world, batch = launch.world_size(cfg.launch), cfg.train.global_batch_size
    rules.check_batch(batch, world, fewer="launch.nproc_per_node", machines=cfg.launch.nnodes)
    name = rules.zero_name(cfg.deepspeed.stage, cfg.deepspeed.offload)
    return f"{name}, {world} process{'es' * (world > 1)}, {batch} {rows} a step"


def import_libraries(cfg: TrainingVerb) -> None:
    """Import what trains, without what it does without."""
    if not launch.gpu_count():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed finds it too, with a warning
    import_peft()
    import_quietly("transformers.trainer", *(["deepspeed"] if cfg.deepspeed.stage else []), without=["datasets"])
