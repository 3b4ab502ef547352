"""Bundles answer through their own runtimes: the C program as compiled, OpenVINO and llama.cpp as stand-ins of their environments (real ones: docs/chat.md)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHAT, helps
from stand_ins.openai_server import Server

from src.core.artifact import Artifact, outside
from src.core.compose import compose
from src.core.errors import BadData, MissingTool, ToolFailed, WrongKind
from src.deploy import llama2c
from src.models.speaking import Ended, ModelSpeaker, TooLong
from src.serving.bundles import GgufSpeaker, Llama2cSpeaker, OpenvinoSpeaker
from src.serving.opening import open_speaker
from src.settings.answers import Decoding
from src.settings.verbs import DeployVerb

pytestmark = pytest.mark.usefixtures("one_thread")
DECODING = Decoding(temperature=0, top_p=1, max_tokens=24, seed=0, stop=[])
ASKED = "What animal goes quack?"
TALK = [
    {"role": "system", "content": "Be kind.\nAnd brief."},
    {"role": "user", "content": ASKED},
    {"role": "assistant", "content": "A \\duck\nsays quack."},
    {"role": "user", "content": "Where is Ottawa?\r\n"},
]


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def told(speaker, messages, **changes) -> Ended:
    *pieces, ended = speaker.reply(messages, DECODING.model_copy(update=changes))
    assert "".join(pieces) == ended.text
    return ended


# ---- the C program


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    """tiny-chat's bundle, without its proof."""
    if not (shutil.which("cc") and shutil.which("make")):
        pytest.skip("no C compiler and make")
    out, model = tmp_path_factory.mktemp("compiled"), outside(CHAT, "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CFLAGS", "-O0")  # compiled six times as fast
        patch.setattr(llama2c.proof, "prove_ids", lambda *_, **__: {})
        patch.setattr(llama2c.proof, "prove", lambda *_, **__: {"tokens_per_second": 1.0, "prompts_equal": 1, "prompts": 1})
        target = compose("deploy", ["target=llama2c", "target.format=fp32_v1"], DeployVerb).target
        llama2c.build({"model": model, "stored": model}, out, target)
    return out


def bundle(folder: Path, **target) -> Artifact:
    return Artifact(folder, "bundle", "k", {"settings": {"target": target}}, {})


@pytest.fixture
def program(compiled) -> Llama2cSpeaker:
    return open_speaker(bundle(compiled, kind="llama2c", name="llama2c"))


def test_the_program_answers_whole_conversations_as_transformers_does(program):
    theirs = ModelSpeaker(outside(CHAT, "model"), "tiny")
    for talk in (user(ASKED), user("a\nb \\n c\t"), TALK):
        ours, expected = told(program, talk), told(theirs, talk)
        assert (ours.text, ours.finish, ours.ended, ours.tokens) == (expected.text, expected.finish, expected.ended, expected.tokens)
        assert ours.prompt_tokens == expected.prompt_tokens
    assert told(program, user(ASKED), max_tokens=2).finish == "length"
    whole = told(program, user(ASKED)).text
    cut = told(program, user(ASKED), stop=[whole[5:8]])
    assert cut.text == whole[: whole.index(whole[5:8])] and cut.finish == "stop"
    drawn = [told(program, user("Tell me a story."), temperature=3.0, seed=seed).text for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    assert [e.text for e in program.replies([(user(ASKED), None)] * 2, DECODING)] == [whole] * 2


@helps(
    "serving/bundles.py",
    "leave the tools out",
    "begin a new one",
    "make -B -C {}",
    "make the bundle again with force=true",
)
def test_what_the_program_cannot_do_is_said(program, compiled, tmp_path):
    with pytest.raises(TooLong) as long:
        told(program, user("quack " * 600))
    assert long.value.tokens > long.value.room == 512
    assert isinstance(program.replies([(user("quack " * 600), None)], DECODING)[0], TooLong)
    with pytest.raises(BadData, match="no tools"):
        list(program.reply(user(ASKED), DECODING, [{"type": "function", "function": {"name": "x"}}]))
    with pytest.raises(BadData, match="one after the other"):
        told(program, [*user("a"), *user("b")])
    assert told(program, user(ASKED)).ended, "without tools, and begun anew, it answers"
    older = Path(shutil.copytree(compiled, tmp_path / "older"))
    (older / "run").write_text("#!/bin/sh\necho 'run: unknown option --reply (try --help)' >&2\nexit 1\n")
    speaker = open_speaker(bundle(older, kind="llama2c", name="llama2c"))
    with pytest.raises(ToolFailed, match="earlier version") as old:
        told(speaker, user(ASKED))
    assert old.value.fix == ["make the bundle again with force=true"]
    (older / "run").write_bytes(b"\x7fELF of a board")
    with pytest.raises(MissingTool) as board:
        told(speaker, user(ASKED))
    subprocess.run([*board.value.fix[0].split(), "CFLAGS=-O0"], check=True, capture_output=True)
    assert told(speaker, user(ASKED)).ended


def test_an_answer_is_ended_from_outside(program):
    parts = program.reply(user("Tell me a story."), DECODING.model_copy(update={"temperature": 9.0, "max_tokens": 100}))
    next(parts)
    parts.close()
    assert not program._running


# ---- environments of their own

OPENVINO = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    if not line.strip():
        continue
    asked = json.loads(line)
    text = asked["messages"][-1]["content"]
    if text == "long":
        print(json.dumps({"tokens": 999, "room": 512}), flush=True)
    elif text == "odd":
        print(json.dumps({"fault": "no such role"}), flush=True)
    elif text == "die":
        sys.exit("it died")
    else:
        for _ in range(50 if text == "much" else 1):
            print(json.dumps({"piece": "heard " + text}), flush=True)
        print(json.dumps({"text": "heard " + text, "finish": "stop", "ended": True, "prompt_tokens": 1, "tokens": 2}), flush=True)
"""


def environment(folder: Path, script: str) -> Path:
    """A Python environment whose interpreter runs this script, whatever it is told to."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    (folder / "script.py").write_text(script)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {folder / "script.py"} "$@"\n')
    python.chmod(0o755)
    return folder


OV = {"kind": "openvino", "name": "openvino_cpu", "device": "CPU", "prompt_len": 256, "context_len": 512}


@helps("serving/bundles.py", "environment=FOLDER names another", "begin a new one")
def test_openvino_answers_in_its_environment(tmp_path):
    with pytest.raises(MissingTool) as missing:
        open_speaker(bundle(CHAT, **OV), environment=str(tmp_path / "none"))
    assert missing.value.fix == ["bash scripts/openvino_env.sh", "environment=FOLDER names another"]
    speaker = open_speaker(bundle(CHAT, **OV), environment=str(environment(tmp_path / "env", OPENVINO)))
    assert isinstance(speaker, OpenvinoSpeaker)
    assert told(speaker, user("Hi")) == Ended("heard Hi", "stop", True, 1, 2)
    with pytest.raises(TooLong, match="999"):
        told(speaker, user("long"))
    with pytest.raises(BadData, match="no such role"):
        told(speaker, user("odd"))
    parts = speaker.reply(user("much"), DECODING)
    next(parts)
    parts.close()
    assert told(speaker, user("Hi again")).text == "heard Hi again", "what was left of the one before is not taken for the next"
    with pytest.raises(ToolFailed, match="it died"):
        told(speaker, user("die"))
    speaker.close()


@helps("serving/bundles.py", "give one of the files")
def test_a_gguf_is_served_by_llama_cpp(tmp_path):
    server = Server(CHAT)
    try:
        script = f"import sys, json; print(json.dumps({{'url': '{server.url}'}}), flush=True); sys.stdin.read()"
        env = str(environment(tmp_path / "env", script))
        folder = tmp_path / "made"
        folder.mkdir()
        for name in ("a.gguf", "b.gguf"):
            (folder / name).write_bytes(b"GGUF")
        with pytest.raises(WrongKind, match="2 GGUF files"):
            open_speaker(bundle(folder, kind="gguf", name="gguf"), environment=env)
        speaker = open_speaker(outside(folder / "a.gguf", "bundle"), environment=env)
        assert isinstance(speaker, GgufSpeaker) and told(speaker, user(ASKED)).text == "A duck says quack."
        speaker.close()
        assert json.loads(json.dumps(server.requests[-1][2]))["max_tokens"] == 24
    finally:
        server.shutdown()
        server.server_close()
