"""Make a model folder complete: tokenizer files, chat template, generation config and custom code; and prove it by loading it alone.

As a verb it serves folders made elsewhere: `python -m src.aux_files source=BASE_MODEL target=FOLDER`. One that AutoGPTQ made gets the names and the
config.json too that transformers, gptqmodel and vLLM look for.
"""

from pathlib import Path

from src.core import stage
from src.core.artifact import is_finished
from src.core.errors import MissingInput, WrongKind
from src.core.log import say
from src.models import autogptq
from src.models.complete import AUXILIARY, TOKENIZER, copy, prove
from src.models.loading import load_tokenizer
from src.settings.verbs import AuxFilesVerb


def main_aux_files(cfg: AuxFilesVerb) -> int:
    """The verb: works in place on a folder of the user's own, which this project's artifacts never are."""
    source, target = Path(cfg.source), Path(cfg.target)
    for folder in (source, target):
        if not folder.is_dir():
            raise MissingInput("no such folder", where=str(folder), fix="give a folder that is on this machine")
    adopts = autogptq.is_one(target)
    if not adopts and not (target / "config.json").is_file():
        raise WrongKind(
            "the target is not a model folder: it has no config.json",
            where=str(target),
            fix="give the folder of weights and config.json to complete",
        )
    if is_finished(target):
        raise WrongKind(
            "the target is an artifact of this project: it is complete and sealed",
            where=str(target),
            fix="give a copy of it without manifest.json",
        )
    for step in (steps := autogptq.steps(source, target) if adopts else []):
        say(f"aux_files: AutoGPTQ's folder: {'would ' * cfg.dry_run}{step}")
    if cfg.dry_run:
        wanted = [f.name for p in (*TOKENIZER, *AUXILIARY) for f in sorted(source.glob(p)) if not (target / f.relative_to(source)).exists()]
        say(f"aux_files: would copy {', '.join(wanted) or 'nothing'} into {target}")
        return 0
    if steps:
        autogptq.complete(source, target)
    tokenizer = load_tokenizer(source)
    copied = copy(source, target)
    say(f"aux_files: copied {', '.join(copied) or 'nothing: all were there'}")
    say(f"aux_files: {prove(target, tokenizer)} token ids equal to the source's, loaded alone and offline")
    return 0


if __name__ == "__main__":
    stage.main_plain("aux_files", __doc__, AuxFilesVerb, main_aux_files)
