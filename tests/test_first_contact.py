"""What a person meets first: the doctor, the list of runs and what it removes, and completion in a shell."""

import contextlib
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, helps, refused

from src import completion, doctor, runs
from src.core import artifact
from src.core.errors import Busy, ConfigError, MissingInput, Moved

# ---- doctor


def found(state: str | None = None, *checks) -> dict[str, doctor.Finding]:
    return {one.what: one for check in checks for one in check if state in (None, one.state)}


def test_a_machine_that_runs_the_tests_has_nothing_to_mend(call, monkeypatch):
    done = call("doctor", "network=false")
    assert done.returncode == 0 and "nothing to mend" in done.stdout, done.stdout
    assert "MEND" not in done.stdout


PLANTED = {
    "packages": lambda m, tmp: m.setattr(
        doctor.importlib.metadata, "version", lambda name, real=doctor.importlib.metadata.version: "0.0.1" if name == "peft" else real(name)
    ),
    "make": lambda m, tmp: m.setenv("PATH", str(tmp)),
    "DeepSpeed": lambda m, tmp: (
        (tmp / "x" / "comm").mkdir(parents=True),
        (tmp / "x" / "comm" / "lock").touch(),
        m.setenv("TORCH_EXTENSIONS_DIR", str(tmp / "x")),
    ),
    "OMP_NUM_THREADS": lambda m, tmp: m.setenv("OMP_NUM_THREADS", "many"),
    "environment": lambda m, tmp: m.setenv("RANK", "x"),
    "outputs": lambda m, tmp: m.setattr(os, "access", lambda path, mode, real=os.access: "outputs" not in str(path) and real(path, mode)),
    "Python": lambda m, tmp: m.setattr(sys, "version_info", (3, 14, 0)),
    "system": lambda m, tmp: m.setattr(doctor.platform, "system", lambda: "Windows"),
    "locale": lambda m, tmp: m.setattr(sys, "getfilesystemencoding", lambda: "ascii"),
    "GPU": lambda m, tmp: m.setattr(
        doctor.Path,
        "glob",
        lambda self, pattern, real=doctor.Path.glob: iter([doctor.Path("/dev/nvidia0")]) if "nvidia" in pattern else real(self, pattern),
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_fault_is_found_and_told_what_to_do(what, monkeypatch, tmp_path, capsys):
    from src.core.compose import compose
    from src.settings.verbs import DoctorVerb

    (tmp_path / "outputs").mkdir()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    PLANTED[what](monkeypatch, tmp_path)
    cfg = compose("doctor", ["network=false", f"outputs={tmp_path / 'outputs'}"], DoctorVerb)
    assert doctor.doctor(cfg) == 7
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("MEND") and what in line)
    assert len(line.split()) > 5


def test_notes_are_no_faults(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SOME_TOKEN", "sesame-open-sesame")
    notes = list(doctor.environment())
    assert {"HF_HUB_OFFLINE"} <= {one.what for one in notes if one.state == doctor.NOTE}
    assert "SOME_TOKEN" in str(notes) and "sesame" not in str(notes), "a key is named and never shown"


def test_a_server_that_does_not_answer_is_said(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert [one.state for one in doctor.network()] == [doctor.NOTE] * 2


def test_a_home_folder_is_not_shown(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert doctor._shown(doctor.Path("/home/somebody/x")) == "~/x"


# ---- runs


def test_runs_are_listed_with_size_age_and_headline(call, road):
    (road / "nothing").mkdir()
    done = call("runs")
    line = next(line for line in done.stdout.splitlines() if line.startswith("a "))
    assert done.returncode == 0 and "deploy-llama2c: 1,000 tokens/s here" in line and " ago" in line
    assert "1 run in" in done.stdout and "nothing" not in done.stdout


@helps("runs.py", "remove={}", "remove those first", "force=true removes it; what was made from it stays, and cannot be traced back")
def test_a_run_is_removed_unless_others_were_made_from_it(call, road):
    refused(call("runs", "remove=b"), MissingInput, "no run 'b'", "remove=a")
    for name in ("../outputs", ".", ""):
        refused(call("runs", f"remove='{name}'"), MissingInput, "no run")
    done = call("quantize", "run=b", f"source={road / 'a' / 'merge'}", f"dataset={road / 'a' / 'data'}", "dry_run=true")
    assert done.returncode == 0, done.stderr
    user = road / "b" / "merge"
    shutil.copytree(road / "a" / "merge", user)
    manifest = artifact.read_json(user / "manifest.json")
    manifest["parents"][0]["path"] = "../a/finetune"
    manifest["seal"] = artifact.seal_of(manifest)
    artifact.write_json(user / "manifest.json", manifest)
    refused(call("runs", "remove=a"), Moved, "b/merge")
    assert call("runs", "remove=b").returncode == 0 and not (road / "b").exists()
    assert call("runs", "remove=a", "dry_run=true").returncode == 0 and (road / "a").exists()
    assert call("runs", "remove=a").returncode == 0 and not (road / "a").exists()
    assert [path.name for path in road.iterdir() if path.name.endswith(runs.REMOVED)] == []


def test_what_nobody_made_here_and_what_is_at_work_are_kept(call, road):
    (road / "a" / "thesis.txt").write_text("years of work")
    refused(call("runs", "remove=a"), Moved, "thesis.txt")
    with contextlib.ExitStack() as held:
        held.enter_context(artifact.held(road / "a" / ".merge.lock", road / "a" / "merge"))
        refused(call("runs", "remove=a", "force=true"), Busy)
    assert (road / "a" / "thesis.txt").is_file()
    assert call("runs", "remove=a", "force=true").returncode == 0 and not (road / "a").exists()


# ---- completion


def completed(line: str) -> list[str]:
    """What bash offers at the end of a line."""
    code = f"{completion.script('bash')}\nCOMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; _boardwalk; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_shell_completes_verbs_settings_and_choices():
    assert completed("python -m src.fine") == ["src.finetune"]
    assert "tuner.rank=" in completed("python -m src.finetune tuner.ra") and "tuner=" in completed(".venv/bin/python -m src.finetune tu")
    assert completed("python -m src.finetune run=x tuner=ql") == ["qlora"]
    assert completed("python -m src.merge rounding=") == ["nearest", "stochastic"]
    assert completed("python3.11 -m src.deploy target=ax6") == ["ax630c", "ax650"]
    assert completed("python -m src.data force=t") == ["true"]
    assert completed("python -m pytest te") == [] and completed("python x.py tuner") == []


@helps("completion.py", "python -m src.completion bash")
def test_another_shell_is_refused(call):
    refused(call("completion", "fish"), ConfigError, "fish", "bash")
    assert call("completion", "bash").returncode == 0 and "bashcompinit" in call("completion", "zsh").stdout


def test_the_list_of_verbs_says_a_line_for_each():
    done = subprocess.run([sys.executable, "-m", "src", "--help"], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) > 10 and all(len(line.split()) > 5 for line in lines)
