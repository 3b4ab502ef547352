"""Make a model folder complete: tokenizer files, chat template, generation config and custom code; and prove it by loading it alone.

As a verb it serves folders made elsewhere: `python -m src.aux_files source=BASE_MODEL target=FOLDER`. One that AutoGPTQ made gets the names and the
config.json too that transformers, gptqmodel and vLLM look for. `source=model.bin target=NEW_FOLDER` reads files of karpathy/llama2.c back into a folder.
"""

import shutil
from pathlib import Path

from src.core import stage
from src.core.artifact import is_finished
from src.core.errors import MissingInput, WrongKind
from src.core.log import say
from src.models import autogptq, llama2c_folder
from src.models.complete import AUXILIARY, TOKENIZER, copy, prove
from src.models.loading import load_tokenizer
from src.settings.verbs import AuxFilesVerb


def main_aux_files(cfg: AuxFilesVerb) -> int:
    """The verb: works in place on a folder of the user's own, which this project's artifacts never are."""
    source, target = Path(cfg.source), Path(cfg.target)
    if source.is_file():
        return _read_llama2c(source, target, cfg)
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


def _read_llama2c(model: Path, target: Path, cfg: AuxFilesVerb) -> int:
    """A model.bin and its tokenizer.bin become the folder `target`, which appears when it is whole."""
    tokenizer = Path(cfg.tokenizer) if cfg.tokenizer else model.with_name("tokenizer.bin")
    if not tokenizer.is_file():
        raise MissingInput("a model.bin goes with a tokenizer.bin", where=str(tokenizer), fix="tokenizer=FILE names it")
    if target.exists():
        raise WrongKind("what model.bin is read into has to be new", where=str(target), fix="target=FOLDER that is not there yet")
    shape, form = llama2c_folder.read_header(model)
    llama2c_folder.read_pieces(tokenizer, shape.vocab)
    kind = f"int8 in groups of {form.group}" if form.group else "fp32"
    say(
        f"aux_files: llama2.c's version {form.version}, {kind}: {shape.layers} layers of {shape.dim}, {shape.vocab:,} tokens, context {shape.context:,}"
    )
    if cfg.dry_run:
        say(f"aux_files: would write config.json, model.safetensors (fp32) and a tokenizer into {target}")
        return 0
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    llama2c_folder.write_folder(model, tokenizer, partial)
    ids = prove(partial, load_tokenizer(partial))
    partial.rename(target)
    say(f"aux_files: {target} is a Hugging Face folder now; {ids} token ids equal when loaded alone and offline")
    return 0


if __name__ == "__main__":
    stage.main_plain("aux_files", __doc__, AuxFilesVerb, main_aux_files)
