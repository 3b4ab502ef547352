"""Run Pulsar2 and judge what it made: by its log and its files, not by its exit code, since its own check at the end may crash after a good build."""

import hashlib
import re
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from src.core.errors import MEMORY, NO_SPACE, ToolFailed, WrongKind
from src.core.log import duration, say, size, status, warn
from src.deploy import preflight
from src.deploy.axera import toolchain
from src.deploy.axera.toolchain import Toolchain
from src.deploy.vendor import BY_HAND, Done, hand_back, run, stop_container
from src.settings.targets import Axera
from src.sizing import budget
from src.sizing.shape import ModelShape

BUILT = "build llm model done!"
LAYER = re.compile(r"(?P<prefix>.+)_p(?P<chunk>\d+)_l(?P<index>\d+)_together\.axmodel")
POST = re.compile(r"(?P<prefix>.+)_post\.axmodel")
SPREAD = 0.05
"""relative difference of layer sizes that equal layers show at most"""
PLAUSIBLE = 0.8
"""least share of its weights' own bytes that a compiled file has; published ones have 1 and more (Qwen3-0.6B in s8: 26 MiB a layer of 15.7 M weights)"""


@dataclass(frozen=True)
class Weights:
    """What the compiled files must hold. layers: bytes of each layer's weights in `type`, in order. post: of the output layer's.
    equal: whether all layers have the same shapes."""

    layers: tuple[int, ...]
    post: int
    type: str
    equal: bool

    @classmethod
    def of(cls, shape: ModelShape, target: Axera) -> "Weights":
        form = budget.format_of(shape, target)
        layers = tuple(round(sum(m.size * form.weight(m) for m in layer.matrices)) for layer in shape.stack)
        return cls(layers, budget.head_bytes(shape, form), form.name, preflight.equal_layers(shape))


def compile_layers(
    tool: Toolchain, target: Axera, arguments: list[str], model: Path, work: Path, weights: Weights
) -> tuple[list[str], str]:
    """(layer files in order, post file), names in work/build, of a compile logged in work/compile.log. Raises ToolFailed or WrongKind with what went wrong."""
    build, log = work / "build", work / "compile.log"
    name = container(work)
    if tool.image:
        stop_container(name)  # left by a run of this bundle that was killed
        hand_back(tool.image, work)
    if build.exists():
        shutil.rmtree(build)
    (work / BY_HAND).unlink(missing_ok=True)
    build.mkdir()
    command = toolchain.command_line(tool, target, arguments, work, model, name)
    try:
        done = run(
            command,
            log,
            cwd=work,
            env=toolchain.environment(target) if tool.image is None else None,
            watch=(BUILT, *(one.text for one in FAILURES)),
            line=CompileProgress(),
            container=name if tool.image else None,
        )
    finally:
        if tool.image:
            hand_back(tool.image, work)
    if BUILT not in done.seen:
        raise failure(done, log)
    files, post = judge(build, target.prefill_chunk, weights, log)
    if done.code:
        warn(
            f"Pulsar2 ended with exit code {done.code} after it had built everything: its own check failed, which the build does not depend on; see {log.name}"
        )
    return _gather(build, files, post)


def bring_back(target: Axera, work: Path, weights: Weights) -> tuple[list[str], str] | None:
    """(layer files in order, post file) of a compile by by_hand.py's script on another machine, brought back into work/build; None where there is
    none. Raises ToolFailed where its files are not as they must be."""
    log = work / "compile.log"
    if not (work / BY_HAND).is_file() or not log.is_file() or BUILT not in log.read_text(errors="replace"):
        return None
    return _gather(work / "build", *judge(work / "build", target.prefill_chunk, weights, log))


def _gather(build: Path, files: list[Path], post: Path) -> tuple[list[str], str]:
    for file in (*files, post):
        if file.parent != build:
            file.rename(build / file.name)
    return [file.name for file in files], post.name


def container(work: Path) -> str:
    """The name of the container that compiles in this folder: always the same, so that one left by a killed run is found."""
    return f"boardwalk-{hashlib.sha256(str(work.resolve()).encode()).hexdigest()[:16]}"


class CompileProgress:
    """Says where a compile stands, from its progress bars: `building llm decode layers ... 12/28`."""

    def __init__(self):
        self.begun: dict[str, float] = {}
        self.said = ""

    def __call__(self, line: str) -> None:
        found = re.search(r"building ([a-z][a-z_ ]*[a-z])[^a-z/]*?\b(\d+)/(\d+)", line)
        if not found:
            return
        what, done, total = found[1], int(found[2]), int(found[3])
        begun = self.begun.setdefault(what, time.monotonic())
        text = f"Pulsar2: {what} {done}/{total}"
        if text != self.said:
            self.said = text
            left = (time.monotonic() - begun) / done * (total - done) if done else 0
            status(text + (f", {duration(left)} left" if 0 < done < total else ""))


ONCE_MORE = "compile once more: here by the same command"


def judge(build: Path, chunk: int, weights: Weights, log: Path) -> tuple[list[Path], Path]:
    """(layer files by index, post file) in a build folder, each one checked. Raises ToolFailed at the first that is not as it must be."""

    def wrong(what: str, fix: str | list[str] = ONCE_MORE) -> ToolFailed:
        return ToolFailed(what, where=f"{build}, log {log}", fix=fix)

    layers = len(weights.layers)
    found: dict[tuple[str, int], dict[int, Path]] = {}
    for file in sorted(build.rglob("*_together.axmodel")):
        if match := LAYER.fullmatch(file.name):
            found.setdefault((match["prefix"], int(match["chunk"])), {})[int(match["index"])] = file
    if len(found) > 1:
        raise wrong(
            f"layers of more than one build lie together: {', '.join(f'{p}_p{c}' for p, c in sorted(found))}",
            f"leave one in {build}",
        )
    if not found:
        raise wrong("Pulsar2 says it is done, but no layer file is there")
    ((prefix, made), by_index) = next(iter(found.items()))
    if made != chunk:
        raise wrong(f"the layers are for chunks of {made} tokens ({prefix}_p{made}_...), target.prefill_chunk={chunk} was asked for")
    missing = sorted(set(range(layers)) - by_index.keys())
    extra = sorted(by_index.keys() - set(range(layers)))
    if missing or extra:
        raise wrong(
            f"of {layers} layers, {'missing: ' + ', '.join(map(str, missing[:8])) if missing else 'too many: ' + ', '.join(map(str, extra[:8]))}",
            NO_SPACE,
        )
    posts = sorted(file for file in build.rglob("*_post.axmodel") if POST.fullmatch(file.name))
    if len(posts) != 1:
        raise wrong(f"one post model is needed, {len(posts)} are there")
    files = [by_index[index] for index in range(layers)]
    for file, least in zip((*files, posts[0]), (*weights.layers, weights.post)):
        if not file.stat().st_size:
            raise wrong(f"{file.name} is empty", NO_SPACE)
        if (producer := onnx_producer(file)) != "Pulsar2":
            raise wrong(f"{file.name} is not an ONNX file by Pulsar2" + (f" but by {producer!r}" if producer else ""))
        if file.stat().st_size < PLAUSIBLE * least:
            raise wrong(
                f"{file.name} has {size(file.stat().st_size)}; the weights it holds are {size(least)} in {weights.type}, so it is cut off or empty",
                NO_SPACE,
            )
    sizes = [file.stat().st_size for file in files]
    middle = statistics.median(sizes)
    if weights.equal and (odd := next((f for f, s in zip(files, sizes) if abs(s - middle) > SPREAD * middle), None)):
        raise wrong(
            f"{odd.name} has {size(odd.stat().st_size)}, the layers' median is {size(middle)}: one of equal layers is cut off or broken"
        )
    say(f"Pulsar2 made {layers} layers of {size(middle)} and {posts[0].name} of {size(posts[0].stat().st_size)}")
    return files, posts[0]


def onnx_producer(file: Path) -> str | None:
    """producer_name of an ONNX ModelProto (field 2), read from the top of the file; None where it is not one.

    Wire format: protobuf.dev/programming-guides/encoding. ModelProto begins with ir_version, field 1, whose tag is the byte 0x08.
    """
    with open(file, "rb") as stream:
        head = stream.read(4096)
    if head[:1] != b"\x08":
        return None
    at = 0
    while at < len(head):
        tag, at = _varint(head, at)
        value, at = _varint(head, at)
        if tag & 7 == 2:
            if tag >> 3 == 2:
                return head[at : at + value].decode(errors="replace")
            at += value
        elif tag & 7:
            return None
    return None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            break
    return value, at


class Known(NamedTuple):
    """What a text in the log means, and the ways out."""

    text: str
    what: str
    fix: list[str]


OTHER_VERSION = "target.image=IMAGE of another version of Pulsar2"
SMALLER = ["a smaller target.prefill_chunk, such as 32", "target.weight_type=s4"]
FAILURES = (  # the first that was printed counts
    Known(
        "model_type error",
        "this Pulsar2 does not know the model's family",
        fix=["target.model_type=llama, if it is a Llama in all but name", OTHER_VERSION],
    ),
    Known("unrecognized arguments", "Pulsar2 does not know an option that its help lists", fix=[OTHER_VERSION]),
    Known("ocm alloc", "a layer does not fit the chip's on-chip memory", fix=SMALLER),
    Known("NPUBackendError", "a layer does not fit the chip", fix=SMALLER),
    Known("LLM_PREPARE", "Pulsar2 could not read the model", fix=[]),
    Known("No space left on device", "the disk is full", fix=NO_SPACE),
    Known(
        "ermission denied",
        "Pulsar2 may not write where it should",
        fix=["remove the folder that an earlier container left as root's, then run the same command again"],
    ),
)


def failure(done: Done, log: Path) -> ToolFailed | WrongKind:
    """What a run without the success line died of."""
    own = [line for line in done.tail.splitlines() if not line.startswith(("Traceback", "  "))]
    last = "\n".join(f"    {line[:200]}" for line in own[-6:])
    known = next((one for one in FAILURES if one.text in done.seen), None)
    fix: list[str] = []
    if done.code == 137:
        what = "the compile was killed (exit code 137), most likely for lack of memory; AXERA asks for more than 32 GB for large models"
        fix = ["target.parallel=1 takes less memory", MEMORY]
    elif known:
        told = next(line.strip() for line in log.read_text(errors="replace").splitlines() if known.text in line)
        what, fix = f"{known.what}: {told[:200]}", known.fix
    elif done.code:
        what = f"Pulsar2 ended with exit code {done.code}"
    else:
        what, fix = f"Pulsar2 ended well, but never said '{BUILT}'", [ONCE_MORE]
    return (WrongKind if known and known.text == "model_type error" else ToolFailed)(f"{what}\n{last}", where=str(log), fix=fix)
