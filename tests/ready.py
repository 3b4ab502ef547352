"""The libraries of training as a verb imports them, so without those that it does without: what `conftest.ready_processes` begins its processes with."""

from src.core.processes import import_quietly
from src.models.loading import import_peft

import_peft()
import_quietly("transformers.trainer", "deepspeed", "src.training.session", "src.finetune", "src.pretrain", without=["datasets"])
