"""Running the exporter: in the bundle's work folder, offline, its end judged by what it wrote and its known failures told in plain words."""

import json
import re
import resource
import shutil
import time
from pathlib import Path

from src.core.artifact import Artifact
from src.core.errors import MEMORY, NO_SPACE, NoRoom, ProofFailed, ToolFailed
from src.core.files import read_json, write_json
from src.core.log import duration, say, size, status
from src.deploy.answers import OFFLINE
from src.deploy.openvino import recipe
from src.deploy.vendor import COMPILED, Done, run
from src.settings.targets import Openvino
from src.sizing.shape import ModelShape

MADE, LOG = "export", "export.log"
MODEL = ("openvino_model.xml", "openvino_model.bin", "config.json")
TOKENIZER = ("openvino_tokenizer.xml", "openvino_tokenizer.bin", "openvino_detokenizer.xml", "openvino_detokenizer.bin")
READ = "the log has all that it said; its first line is the command, which can be run by hand"
ANOTHER = "bash scripts/openvino_env.sh NEW_FOLDER, then target.environment=NEW_FOLDER"
"""the way out of an environment that is not as the script makes it: one that it made before it takes for finished"""
# What appears in the exporter's output -> what it is doing.
STEPS = {
    "Loading weights": "loading the weights",
    "TracerWarning": "tracing the model",
    "Statistics of the bitwidth": "compressing the weights",
}


def export(model: Artifact, shape: ModelShape, target: Openvino, work: Path) -> dict:
    """The record of an export whose files lie in work/export (or were moved from there), made now unless an earlier run of this bundle ended well.

    The record: {"argv", "versions", "seconds", "peak_memory" (bytes), "weights": {kind: percent of the parameters}}.
    """
    done, made, log = work / COMPILED, work / MADE, work / LOG
    if done.is_file():
        say("the export ended well in an earlier run, so it is not repeated")
        return read_json(done)
    shutil.rmtree(made, ignore_errors=True)
    argv = recipe.export_argv(model, shape, target, MADE)
    begun = time.monotonic()
    ended = run(argv, log, cwd=work, env={**OFFLINE, "TMPDIR": str(work.absolute())}, line=_follow())
    judge(ended, made, log)
    seconds, peak = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    kinds = compressed(log.read_text("utf-8", errors="replace"))
    say(
        f"exported in {duration(seconds)}, {size(peak)} of memory at most: "
        + ", ".join(f"{share} % {kind}" for kind, share in kinds.items())
    )
    _forget_place(made / "openvino_config.json")
    record = {
        "argv": argv,
        "versions": recipe.versions(target),
        "seconds": round(seconds, 1),
        "peak_memory": peak,
        "weights": kinds,
    }
    write_json(done, record)
    return record


def _follow():
    """A listener to the exporter's lines that tells each step once, and on the way how far its progress bar is."""
    said = set()

    def line(text: str) -> None:
        for mark, step in STEPS.items():
            if mark in text and step not in said:
                said.add(step)
                status(f"exporter: {step}")

    return line


def judge(done: Done, made: Path, log: Path) -> None:
    """Raises what the exporter's end means: ToolFailed for a failure, with its reason where it is a known one; NoRoom for a full disk; ProofFailed
    where the model came without its tokenizer, which the exporter only warns of."""
    output = log.read_text("utf-8", errors="replace")
    if done.code:
        raise _known(done, output, log)
    if missing := [name for name in MODEL if not _filled(made / name)]:
        raise ToolFailed(f"the exporter ended without an error, but did not write {', '.join(missing)}", where=str(log), fix=READ)
    if missing := [name for name in TOKENIZER if not _filled(made / name)]:
        reason = next((line.strip() for line in output.splitlines() if "okenizer" in line and "not" in line), "")
        raise ProofFailed(
            f"openvino_tokenizers did not convert this model's tokenizer: no {missing[0]}" + (f" ({reason})" if reason else ""),
            where=str(log),
        )


def _known(done: Done, output: str, log: Path) -> ToolFailed | NoRoom:
    where = f"{log}, exit code {done.code}"
    if done.code == 137:
        return ToolFailed(
            "the exporter was killed, most likely for lack of memory",
            where=where,
            fix=MEMORY,
        )
    if "No space left on device" in output:
        return NoRoom("the exporter ran out of disk", where=where, fix=NO_SPACE)
    if "operator torchvision::" in output:
        return ToolFailed(
            "the environment has a torchvision that does not go with its torch",
            where=where,
            fix=["pip uninstall torchvision there: language models do not need it", ANOTHER],
        )
    if found := re.search(r"model type `([^`]+)` but Transformers does not recognize|Trying to export a (\S+) model", output):
        return ToolFailed(
            f"this exporter does not know the model family '{found[1] or found[2]}'",
            where=where,
            fix="a newer exporter in an environment of your own: target.environment=FOLDER",
        )
    if sizes := re.findall(r"channel size: (\d+)", output):
        return ToolFailed(
            f"the int4 group does not divide every row (rows of {', '.join(sorted(set(sizes), key=int))})",
            where=where,
            fix="target.group_size=-1",
        )
    if "No module named" in output:
        return ToolFailed("the exporter's environment is not whole", where=where, fix=ANOTHER)
    return ToolFailed(f"the exporter failed:\n{done.tail[-1500:]}", where=where, fix=READ)


def _filled(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def compressed(output: str) -> dict[str, int]:
    """{kind of weights: percent of the parameters} from NNCF's table, empty kinds left out."""
    rows = re.findall(r"^│ (\S.*?) +│ +(\d+)% \(\d+ / \d+\)", output, re.MULTILINE)
    return {kind: int(share) for kind, share in rows if int(share)}


def _forget_place(config: Path) -> None:
    """Take the model's folder on this machine out of a file that nothing on the board reads; equal models so give equal files."""
    content = json.loads(config.read_text("utf-8"))
    if isinstance(content.get("quantization_config"), dict):
        content["quantization_config"].pop("tokenizer", None)
        config.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
