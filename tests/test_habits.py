"""What keeps a project in order around its code: one version everywhere, locks that agree with the pins, an environment made from them, short commands."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib

import pytest
from conftest import FEW, ROOT, VERBS

from src import __version__
from src.core import artifact, tracking
from src.settings.trackers import Tensorboard, Wandb

LOCKS = ("requirements.lock", "requirements.cpu.lock", "requirements.cuda.lock")
STUB = r"""#!/usr/bin/env bash
# pip's answers: which wheel of torch it would take, then what it is asked to install. All else is Python's.
case "$*" in
  *--dry-run*) cat "$REPORT" ;;
  "-m pip"*) printf '%s\n' "$*" >>"$CALLS" ;;
  *) exec "$REAL" "$@" ;;
esac
"""

# ---- the version


def test_the_version_is_printed():
    done = subprocess.run([sys.executable, "-m", "src", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"boardwalk {__version__}\n")


def test_pyproject_reads_the_version_there_is():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "src.__version__"
    assert project["project"]["license"] == "Apache-2.0" and "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_newest_entry_of_the_changelog_is_this_version():
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == __version__
    assert versions == sorted(versions, key=lambda v: [int(part) for part in v.split(".")], reverse=True)


def test_a_manifest_says_which_version_made_it(call, tmp_path):
    done = call("data", "run=v", f"data.path={ROOT / 'assets' / 'conversations.json'}", *FEW)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "v" / "data"
    made = artifact.open_artifact(folder)
    assert made.manifest["boardwalk"] == __version__

    # One from before there was a version, sealed as it was then.
    older = {k: v for k, v in made.manifest.items() if k not in ("boardwalk", "seal")}
    (folder / artifact.MANIFEST).write_text(json.dumps(older | {"seal": artifact.seal_of(older)}))
    assert artifact.open_artifact(folder).key == made.key, "the version is no part of what an artifact is"


def test_trackers_are_told_the_version(tmp_path, monkeypatch):
    told = {}
    monkeypatch.setattr(
        tracking, "SINKS", dict.fromkeys(tracking.SINKS, lambda tracker, place, settings: told.update({tracker.kind: settings}))
    )
    trackers = {"wandb": Wandb(kind="wandb", project="p", mode="offline"), "tensorboard": Tensorboard(kind="tensorboard")}
    tracking.Trackers(trackers, tracking.TrackedPlace(tmp_path, "r", "s"), {"a": 1})
    assert told == {name: {"boardwalk": __version__, "a": 1} for name in trackers}


# ---- requirements and their locks


def pins(name: str) -> dict[str, set[str]]:
    """{package: versions} of the lines of a requirements file or a lock that pin one; two versions where Pythons differ."""
    found: dict[str, set[str]] = {}
    for package, version in re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", (ROOT / name).read_text(), re.M):
        found.setdefault(package.lower().replace("_", "-"), set()).add(version)
    return found


def test_every_requirement_is_pinned_and_says_which_stage_needs_it():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+ +# [a-z].*", line), line


def test_the_locks_have_what_requirements_ask_for():
    wanted, common, cuda = pins("requirements.txt"), pins("requirements.lock"), pins("requirements.cuda.lock")
    assert not common.keys() & cuda.keys()
    assert {name: (common | cuda).get(name) for name in wanted} == wanted, "bash scripts/lock.sh"
    assert pins("requirements.cpu.lock") == {"torch": {f"{version}+cpu" for version in wanted["torch"]}}
    assert not [name for name in common if name.startswith(("nvidia", "cuda", "triton"))]


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_of_a_lock_has_its_hashes(name):
    for entry in re.split(r"\n(?=[a-z])", (ROOT / name).read_text())[1:]:
        head, *rest = entry.rstrip().splitlines()
        hashes = [line for line in rest if "# via" not in line]
        assert head.endswith(" \\") and hashes, head
        assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in hashes), head


@pytest.fixture
def make_env(tmp_path):
    """make_env(wheel) -> (what was said, what pip was asked to install) in a copy of scripts/ and the pins, where pip takes that wheel of torch."""
    root = tmp_path / "a project"
    (root / ".venv" / "bin").mkdir(parents=True)
    shutil.copytree(ROOT / "scripts", root / "scripts")
    for name in ("requirements.txt", *LOCKS):
        shutil.copy(ROOT / name, root)
    stub = root / ".venv" / "bin" / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def make_env(wheel: str) -> tuple[str, list[str]]:
        calls, report = tmp_path / "calls", tmp_path / "report"
        calls.write_text("")
        report.write_text(json.dumps({"install": [{"download_info": {"archive_info": {"hashes": {"sha256": wheel}}}}]}))
        environment = {**os.environ, "PYTHON": sys.executable, "REAL": sys.executable, "REPORT": str(report), "CALLS": str(calls)}
        script = "set -euo pipefail; source scripts/env.sh; make_env"
        done = subprocess.run(["bash", "-c", script], cwd=root, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        asked = calls.read_text().replace(f"{root}/", "").splitlines()
        return done.stderr.replace(f"{root}/", ""), [line.split("--no-input ")[1] for line in asked]

    make_env.root = root
    return make_env


def wheel_of(lock: str) -> str:
    return re.search(r"^torch==[^\n]*\n    --hash=sha256:(\w+)", (ROOT / lock).read_text(), re.M)[1]


@pytest.mark.parametrize("lock", ["requirements.cpu.lock", "requirements.cuda.lock"])
def test_the_wheel_of_torch_that_pip_takes_decides_the_lock(make_env, lock):
    said, installed = make_env(wheel_of(lock))
    assert installed == [f"--require-hashes --no-deps -r requirements.lock -r {lock}"]
    assert f"from requirements.lock and {lock}" in said


def test_an_unknown_build_of_torch_is_installed_by_its_pin_and_that_is_said(make_env):
    said, installed = make_env("0" * 64)
    assert installed == ["-r requirements.txt"]
    assert "from requirements.txt" in said and "do not know the build of torch" in said


def test_a_requirement_that_was_not_locked_is_named(make_env):
    with open(make_env.root / "requirements.txt", "a") as file:
        file.write("Some_Package==1.2\n")
    said, installed = make_env(wheel_of("requirements.cuda.lock"))
    assert installed == ["-r requirements.txt"]
    assert "they lack some-package==1.2 (bash scripts/lock.sh" in said


def test_a_changed_lock_or_requirement_brings_the_environment_up_to_date(make_env):
    wheel = wheel_of("requirements.cuda.lock")
    assert make_env(wheel)[1] and make_env(wheel) == ("", [])
    for name in ("requirements.txt", *LOCKS):
        with open(make_env.root / name, "a") as file:
            file.write("# changed\n")
        assert make_env(wheel)[1], name
        assert not make_env(wheel)[1], name


# ---- commands


def test_make_s_commands_are_the_ones_that_readme_and_contributing_name():
    wanted = {
        "quickstart": ["bash scripts/quickstart.sh"],
        "test": ["bash scripts/test.sh"],
        "slow": ["bash scripts/test.sh -m slow"],
        "lock": ["bash scripts/lock.sh"],
    }
    told = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert ", ".join(f"`{target}`" for target in targets) in told
    for target in targets:
        done = subprocess.run(["make", "--dry-run", "--no-print-directory", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and len(done.stdout.splitlines()) == 1, done.stdout + done.stderr
        assert done.stdout.splitlines() == wanted.get(target, done.stdout.splitlines())
        for command in wanted.get(target, []):
            assert command in told and (ROOT / command.split()[1]).is_file()


def test_hooks_and_make_lint_run_the_same():
    hooks = re.findall(r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert f"lint:\n\t{' && '.join(hooks)}\n" in (ROOT / "Makefile").read_text()


def test_scripts_are_sound_shell():
    for script in (ROOT / "scripts").glob("*.sh"):
        assert subprocess.run(["bash", "-n", script]).returncode == 0, script


def test_python_s_range_is_the_same_wherever_it_is_said():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == ">=3.11,<3.14"
    assert project["tool"]["uv"]["environments"] == ["sys_platform == 'linux' and python_version < '3.14'"]
    assert "(3, 11) <= sys.version_info < (3, 14)" in (ROOT / "scripts" / "env.sh").read_text()
    assert "Python 3.11, 3.12 or 3.13" in (ROOT / "README.md").read_text()


def test_each_mutation_finds_what_it_changes():
    """scripts/mutations.py, run by hand, looks for a line of the code as it is."""
    namespace = runpy.run_path(str(ROOT / "scripts" / "mutations.py"), run_name="read")
    lost = [name for name, mutation in namespace["MUTATIONS"].items() if (ROOT / mutation.file).read_text().count(mutation.right) != 1]
    assert not lost and len(namespace["MUTATIONS"]) == 14


# ---- other languages


def outline(text: str) -> list[int]:
    """The levels of its headings."""
    return [len(line.split()[0]) for line in text.splitlines() if re.match("#+ ", line)]


def typed(text: str) -> list[str]:
    """The lines of its blocks that a person types."""
    return [line.strip() for line in text.splitlines() if re.match(r"    (bash |python |outputs/[a-z])", line)]


@pytest.mark.parametrize("language", ["ko", "zh"])
def test_the_readme_of_each_language_has_every_section_and_command_of_the_english(language):
    english, other = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", f"README.{language}.md"))
    assert outline(other) == outline(english)
    assert typed(other) == typed(english)
    named = set(re.findall(r"python -m src\.([a-z_]+)", other))
    assert named <= set(VERBS), named - set(VERBS)
    missing = [page for page in re.findall(r"\]\((docs/[^)#]+)", other) if not (ROOT / page).is_file()]
    assert not missing


# ---- the container


def test_the_dockerfile_copies_what_is_there_and_no_environment():
    """There is no Docker here to build it with: its steps are those of scripts/env.sh and the quickstart, which run in every clone."""
    text = (ROOT / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources), line
    assert "make_env" in (ROOT / "scripts" / "env.sh").read_text() and "scripts/quickstart.sh" in text
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv*", "outputs"} <= set(ignored)


def test_the_page_of_settings_is_what_the_schemas_say():
    page = runpy.run_path(str(ROOT / "scripts" / "settings_pages.py"))["page"]()
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == page, "python scripts/settings_pages.py makes it anew"


def test_one_thread_is_asked_for_before_torch_reads_it():
    """torch takes OMP_NUM_THREADS as it is when it is imported; with more threads than cores a training step here takes four times the CPU, or more."""
    code = "import sys, conftest; early = 'torch' in sys.modules; import torch; print(early, torch.get_num_threads())"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", env=kept, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False 1\n", done.stdout + done.stderr
