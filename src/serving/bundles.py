"""Bundles that answer on this machine through their own runtimes, each in a process of its own: the C program, OpenVINO GenAI, llama.cpp's server."""

import codecs
import contextlib
import json
import os
import re
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from src.core.artifact import Artifact
from src.core.errors import AGAIN, BadData, MissingTool, ToolFailed, UserError, WrongKind
from src.core.files import read_json
from src.models.speaking import Asked, Ended, TooLong
from src.serving.client import Client
from src.serving.speakers import ServerSpeaker, whole
from src.settings.answers import Decoding

CHILDREN = Path(__file__).parent
REMADE = "make the bundle again with force=true"
STARTS = 600
"""seconds that a server may take to read its model"""


def targets(bundle: Artifact) -> dict[str, Any]:
    """The target that a bundle was made for, by its manifest; of a GGUF made elsewhere what can be known."""
    return (bundle.manifest or {"settings": {"target": {"kind": "gguf", "name": "gguf"}}})["settings"]["target"]


class OneByOne:
    """A speaker that answers several conversations one after the other."""

    raw = False

    def replies(self, asked: Sequence[Asked], decoding: Decoding) -> list[Ended | UserError]:
        return [whole(self, one, decoding) for one in asked]  # type: ignore[arg-type]


class Llama2cSpeaker(OneByOne):
    """The bundle's C program, started for each answer with the whole conversation."""

    def __init__(self, bundle: Artifact, name: str):
        self.name, self._folder = name, bundle.path.resolve()
        self._running: set[subprocess.Popen[bytes]] = set()

    def close(self) -> None:
        for process in list(self._running):
            process.kill()

    def reply(self, messages: list[dict], decoding: Decoding, tools: list | None = None) -> Iterator[str | Ended]:
        argv, lines = self._asked(messages, decoding, tools)
        with tempfile.TemporaryFile() as heard:
            try:
                process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=heard, cwd=self._folder)
            except OSError as error:
                why = f"the bundle's program does not start here: {error.strerror}"
                raise MissingTool(why, where=argv[0], fix=f"make -B -C {shlex.quote(str(self._folder))}") from None
            self._running.add(process)
            assert process.stdin and process.stdout
            try:
                process.stdin.write(lines)
                process.stdin.close()
                said = _Text()
                yield from _until_stop(process.stdout.fileno(), decoding.stop, said)
                if said.cut:
                    yield Ended(said.text, "stop", False, None, None)
                    return
                process.wait()
                heard.seek(0)
                words = heard.read().decode(errors="replace")
                if process.returncode:
                    raise self._fault(words)
                if (found := re.search(r"finish: (stop|length) (\d+) (\d+)", words)) is None:
                    raise ToolFailed("the bundle's program ended without a word", where=argv[0], fix=REMADE)
                yield Ended(said.text, found[1], found[1] == "stop", int(found[2]), int(found[3]))
            except BrokenPipeError:
                heard.seek(0)
                raise self._fault(heard.read().decode(errors="replace")) from None
            finally:
                process.kill()
                process.wait()
                process.stdout.close()
                self._running.discard(process)

    def _asked(self, messages: list[dict], decoding: Decoding, tools: list | None) -> tuple[list[str], bytes]:
        """(argv, stdin) of a conversation. Raises BadData for one that the program cannot hold."""
        if tools:
            raise BadData("the C program shows a model no tools", where=str(self._folder), fix="leave the tools out")
        system, rest = (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
        if [m["role"] for m in rest] != [("user", "assistant")[i % 2] for i in range(len(rest))] or len(rest) % 2 == 0:
            raise BadData(
                "the C program takes turns of user and assistant, one after the other", where=str(self._folder), fix="begin a new one"
            )
        texts = [message["content"].replace("\0", "") for message in rest]
        argv = [str(self._folder / "run"), "model.bin", "-m", "chat", "--reply", "-n", str(decoding.max_tokens), "-i", texts[0]]
        argv += ["-t", str(decoding.temperature), "-p", str(decoding.top_p), "-s", str(decoding.seed + 1)]  # a seed of 0 is the clock's
        argv += ["-y", system[0]["content"]] if system else []
        escaped = (text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r") for text in texts[1:])
        return argv, "".join(f"{line}\n" for line in escaped).encode(errors="replace")

    def _fault(self, words: str) -> UserError:
        if found := re.search(r"the prompt has (\d+) tokens, the model takes (\d+)", words):
            return TooLong(int(found[1]), int(found[2]), str(self._folder))
        older = "unknown option" in words
        what = "the bundle's program is of an earlier version" if older else words.strip()[-300:] or "the bundle's program was killed"
        return ToolFailed(what, where=str(self._folder / "run"), fix=REMADE)


class _Text:
    """What was read so far. cut: one of the texts that end an answer came."""

    def __init__(self) -> None:
        self.text, self.cut = "", False


def _until_stop(source: int, stop: Sequence[str], said: _Text) -> Iterator[str]:
    """The pieces of UTF-8 that a program writes, until it ends or one of the texts that end an answer comes, without the new line at its end."""
    decoder, held = codecs.getincrementaldecoder("utf-8")("replace"), ""
    longest = max([1, *map(len, stop)])
    while True:
        data = os.read(source, 1 << 16)
        held += decoder.decode(data, final=not data)
        at = min((k for k in map((said.text + held).find, stop) if k >= 0), default=None)
        if at is not None:
            said.cut, held = True, (said.text + held)[len(said.text) : at]
        elif not data:
            held = held.removesuffix("\n")
        keep = (
            0 if said.cut or not data else min(longest, len(held))
        )  # the last new line is the program's, and a stop text may be half there
        piece, held = held[: len(held) - keep], held[len(held) - keep :]
        said.text += piece
        if piece:
            yield piece
        if said.cut or not data:
            return


class OpenvinoSpeaker(OneByOne):
    """OpenVINO GenAI, in the environment that the bundle was made in."""

    def __init__(self, bundle: Artifact, name: str, environment: str):
        target = targets(bundle)
        self.name, self._where, self._lock = name, str(bundle.path), threading.Lock()
        npu = target["device"] == "NPU"
        most = read_json(bundle.path / "config.json").get("max_position_embeddings") or target["context_len"]
        room = target["context_len"] if npu else most
        argv = [str(bundle.path.resolve()), target["device"], str(room), str(target["prompt_len"])]
        self._child = Child(environment, "openvino_child.py", argv, "bash scripts/openvino_env.sh")
        self._child.read()

    def close(self) -> None:
        self._child.close()

    def reply(self, messages: list[dict], decoding: Decoding, tools: list | None = None) -> Iterator[str | Ended]:
        with self._lock:
            self._child.write({"messages": messages, "tools": tools, **decoding.model_dump()})
            done = False
            try:
                while True:
                    told = self._child.read()
                    done = "piece" not in told
                    if "fault" in told:
                        raise BadData(
                            f"the chat template refuses this conversation: {told['fault']}", where=self._where, fix="begin a new one"
                        )
                    if "room" in told:
                        raise TooLong(told["tokens"], told["room"], self._where)
                    yield Ended(**told) if done else told["piece"]
                    if done:
                        return
            finally:
                if not done:
                    self._child.write(None)
                    while "piece" in self._child.read():
                        pass


class Child:
    """A script of ours that runs in another environment and says lines of JSON. Raises MissingTool without that environment, ToolFailed where it ends."""

    def __init__(self, environment: str, script: str, argv: list[str], made_by: str):
        python = Path(environment).expanduser().absolute() / "bin" / "python"
        if not python.exists():
            raise MissingTool(
                f"there is no Python environment {environment}", where=str(python), fix=[made_by, "environment=FOLDER names another"]
            )
        self._heard, self._script, self._python = tempfile.TemporaryFile(), script, str(python)
        self._process = subprocess.Popen(
            [str(python), "-I", str(CHILDREN / script), *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._heard,
            start_new_session=True,
        )

    def write(self, asked: dict | None) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write((json.dumps(asked) if asked else "").encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._fault() from None

    def read(self) -> dict:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._fault()
        return json.loads(line)

    def _fault(self) -> ToolFailed:
        self._process.wait()
        self._heard.seek(0)
        tail = self._heard.read().decode(errors="replace")[-1500:]
        return ToolFailed(f"{self._script} ended with code {self._process.returncode}:\n{tail}", where=self._python, fix=AGAIN)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._heard.close()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe:
                    pipe.close()


def threads() -> str:
    """Threads of a runtime: as many as torch is told to take here, else one a core."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return told if told.isdecimal() and int(told) else str(os.cpu_count() or 1)


class GgufSpeaker(ServerSpeaker):
    """llama.cpp's server on a GGUF, started for us alone."""

    def __init__(self, bundle: Artifact, name: str, environment: str):
        files = [bundle.path] if bundle.path.is_file() else sorted(bundle.path.glob("*.gguf"))
        if len(files) != 1:
            raise WrongKind(f"the folder has {len(files)} GGUF files", where=str(bundle.path), fix="give one of the files")
        self._child = Child(environment, "gguf_child.py", [str(files[0].resolve()), threads()], "bash scripts/gguf_env.sh")
        super().__init__(Client(self._child.read()["url"], timeout=STARTS), None, 1)
        self.name = name

    def close(self) -> None:
        super().close()
        self._child.close()


OPENERS: dict[str, tuple[Callable[..., Any], str | None]] = {
    "llama2c": (Llama2cSpeaker, None),
    "openvino": (OpenvinoSpeaker, ".venv-openvino"),
    "gguf": (GgufSpeaker, ".venv-gguf"),
}
"""kind of target -> (what runs it, the Python environment it takes)"""
