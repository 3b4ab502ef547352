"""What stands between a stage and the machine: pipes, environment, rights, names and disks. Each fault has words and a code of its own."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import CHAT, ROOT, helps, refused, ways

from src.core import artifact, stage
from src.core.errors import BadData, ConfigError, MissingInput, NoRoom, ProofFailed, WrongKind


def shell(script: str, *argv: object, **environment: str) -> subprocess.CompletedProcess:
    given = ["bash", "-o", "pipefail", "-c", script, "bash", sys.executable, *map(str, argv)]
    return subprocess.run(given, cwd=ROOT, capture_output=True, text=True, errors="replace", env={**os.environ, **environment})


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_whoever_reads_may_stop_reading(finished, unbuffered):
    done = shell('"$@" | true', "-m", "src.lineage", finished / "a" / "data", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode in (0, 141) and not done.stderr


OPEN = """
import os, src
file = open(os.devnull)
assert file.fileno() > 2
print("said")
print(src.sys.stdout.fileno(), [os.readlink(f"/proc/self/fd/{n}") for n in range(3)].count(os.devnull), file=src.sys.stderr, flush=True)
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-"])
def test_a_stream_that_is_closed_gives_its_number_to_no_file(closed, tmp_path):
    """What libraries write to it would be written into that."""
    done = shell(f'"$@" </dev/zero {closed}', "-c", OPEN)
    assert done.returncode == 0 and done.stderr.split() == ["1", str(closed.count("&"))], done.stderr
    rest = ["-m", "src.data", f"outputs={tmp_path}", f"data.path={ROOT / 'assets' / 'conversations.json'}"]
    assert shell(f'"$@" {closed}', *rest).returncode == 0
    assert shell('"$@" <&- >&- 2>&-', *rest, "run=b").returncode == 0 and (tmp_path / "b" / "data").is_dir()


@helps("core/stage.py", "unset {}")
@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK"])
def test_a_rank_that_is_no_number(call, name, monkeypatch):
    monkeypatch.setenv(name, "abc")
    refused(call("data"), ConfigError, f"{name}=abc in the environment is no number", f"unset {name}")
    monkeypatch.delenv(name)
    assert call("data", "dry_run=true").returncode == 0


@helps("training/launch.py", "unset OMP_NUM_THREADS")
def test_threads_that_are_a_list(call, eighty, monkeypatch):
    """OpenMP knows one, accelerate fails at it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")
    argv = ["finetune", f"source={eighty}", f"model.path={CHAT}", "launch.nproc_per_node=2"]
    refused(call(*argv), ConfigError, "OMP_NUM_THREADS=2,1", "unset OMP_NUM_THREADS")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert call(*argv, "dry_run=true").returncode == 0


def test_help_without_docstrings():
    done = shell('"$@"', "-OO", "-m", "src.data", "--help")
    assert done.returncode == 0 and "data.path=" in done.stdout


@helps("core/files.py", "rename it")
def test_a_name_that_is_no_text(call, tmp_path):
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.json")
    shutil.copy(ROOT / "assets" / "conversations.json", strange)
    refused(call("data", f"data.path={strange}"), ConfigError, "not UTF-8 text")
    model = shutil.copytree(CHAT, tmp_path / "model")
    (tmp_path / "model" / os.fsdecode(b"\xff.txt")).write_text("")
    refused(call("merge", f"source={model}", f"base={model}"), BadData, "a file's name is not UTF-8 text", "rename it")
    (tmp_path / "model" / os.fsdecode(b"\xff.txt")).rename(tmp_path / "model" / "notes.txt")
    refused(call("merge", f"source={model}", f"base={model}"), WrongKind, "takes adapter, not model")


@helps("core/stage.py", "chmod u+rX {}")
def test_what_cannot_be_read_is_not_called_unwritable(tmp_path):
    """As somebody without root's power over rights, where root runs this."""
    without = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
    start = without if os.geteuid() == 0 and shutil.which("setpriv") else []
    if os.geteuid() == 0 and subprocess.run([*start, "true"]).returncode:
        pytest.skip("nobody here whom rights bind")
    file, folder, shut = tmp_path / "chats.json", tmp_path / "model", tmp_path / "shut"
    shutil.copy(ROOT / "assets" / "conversations.json", file)
    shutil.copytree(CHAT, folder)
    shut.mkdir()
    for place, mode in ((file, 0o000), (folder, 0o000), (shut, 0o555)):
        place.chmod(mode)
    run = lambda verb, *argv: subprocess.run(
        [*start, sys.executable, "-m", f"src.{verb}", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    try:
        refused(run("data", f"outputs={tmp_path / 'o'}", f"data.path={file}"), MissingInput, "it cannot be read: Permission denied", file)
        told = run("plan", f"model={folder}", "target=llama2c")
        refused(told, MissingInput, "it cannot be read: Permission denied", folder)
        subprocess.run(ways(told)[0], shell=True, check=True)
        assert run("plan", f"model={folder}", "target=llama2c").returncode == 0
        refused(run("data", f"outputs={shut}"), NoRoom, "Permission denied", shut)
    finally:
        for place in (file, folder, shut):
            place.chmod(0o755)


def test_a_write_that_numpy_could_not_end_is_a_full_disk(capsys):
    def work() -> int:
        with open("/dev/full", "wb", buffering=0) as full:
            np.zeros(1 << 20).tofile(full)
        return 0

    assert stage.guarded(work) == NoRoom.exit_code and "cannot write" in capsys.readouterr().err


def test_a_figure_that_is_no_number_is_not_published(tmp_path):
    given = {"stage": "evaluate", "kind": "evaluation", "version": 1, "settings": {}, "inputs": {}, "seconds": 1.0}
    with pytest.raises(ProofFailed, match=r"result\.losses\.1 is nan"):
        artifact.seal(tmp_path, **given, metrics={"result": {"losses": [1.0, float("nan")]}})
    assert not (tmp_path / "manifest.json").exists()


@pytest.fixture
def model(tmp_path):
    """A copy of the embedded model, and change(file, **values) for its JSON."""
    folder = shutil.copytree(CHAT, tmp_path / "model")

    def change(file: str, **values):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | values))
        return folder

    return change


def test_code_that_only_the_tokenizer_names_does_not_run(model, call, finished, tmp_path):
    folder = model("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="T")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    done = call("evaluate", f"source={folder}", f"dataset={finished / 'a' / 'data'}")
    refused(done, WrongKind, "the tokenizer brings Python code of its own", "tokenizer_config.json")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [10**30, [[7]], "x", True])
def test_a_special_token_that_is_no_id(value, model, call, finished):
    folder = model("generation_config.json", bos_token_id=value)
    done = call("evaluate", f"source={folder}", f"dataset={finished / 'a' / 'data'}", "evaluation.samples=1")
    assert done.returncode == BadData.exit_code and "Traceback" not in done.stderr


@helps("models/loading.py", "copy the model's own tokenizer files into it")
def test_a_token_that_the_model_has_no_row_for(model, call, finished):
    folder = model("tokenizer_config.json")
    content = json.loads((folder / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    first = json.loads((finished / "a" / "data" / "val.jsonl").read_text().splitlines()[0])["messages"][0]["content"]
    content["added_tokens"].append({"id": 1024, "content": first[:9], **plain})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    done = call("evaluate", f"source={folder}", f"dataset={finished / 'a' / 'data'}", "evaluation.samples=0")
    refused(done, BadData, "the tokenizer gives token id 1024, and the model has 1024 rows", "copy the model's own tokenizer files into it")
    shutil.copy(CHAT / "tokenizer.json", folder)
    argv = [f"source={folder}", f"dataset={finished / 'a' / 'data'}", "evaluation.samples=0", "evaluation.rows=1"]
    assert call("evaluate", *argv).returncode == 0
