"""docs/adding-a-target.md as it stands: its blocks go into a copy of the project, which then knows a new board and a new vendor."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PAGE = ROOT / "docs" / "adding-a-target.md"


def blocks() -> dict[str, str]:
    """{what the first line names: the block} of the page's code blocks."""
    found = re.findall(r"```(?:python|yaml)\n# ([\w./]+\.(?:py|yaml)(?:: AnyTarget)?)[^\n]*\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return dict(found)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with every block of the page in its place."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("src", "configs", "assets"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    named = blocks()
    for name in ("configs/target/m4n_dock.yaml", "configs/target/rk3588.yaml", "src/deploy/rkllm.py"):
        (copy / name).write_text(named[name], encoding="utf-8")
    targets = copy / "src" / "settings" / "targets.py"
    text = targets.read_text(encoding="utf-8")
    before, union, after = text.partition("\nAnyTarget = ")
    assert union and after.count("\n") == 1, "the union of all targets is the file's last line"
    targets.write_text(f"{before}\n{named['src/settings/targets.py']}\n\n{named['src/settings/targets.py: AnyTarget']}", encoding="utf-8")
    main = copy / "src" / "deploy" / "__main__.py"
    text = main.read_text(encoding="utf-8")
    main.write_text(text.replace("BUILDERS = {\n", "BUILDERS = {\n" + named["src/deploy/__main__.py"]), encoding="utf-8")
    return copy


def run(project: Path, verb: str, *argv, toolkit: bool = False) -> subprocess.CompletedProcess:
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT / "tests" / "stand_ins")} if toolkit else {}
    return subprocess.run(
        [sys.executable, "-m", f"src.{verb}", *map(str, argv)], cwd=project, env=environment, capture_output=True, text=True
    )


def test_a_board_is_one_file(project):
    done = run(project, "deploy", "source=assets/tiny-chat", "target=m4n_dock", "dry_run=true")
    assert "target.context_len=4096 is above the model's own limit of 512" in done.stderr, done.stderr
    planned = run(project, "plan", "model=assets/tiny-chat", "target=m4n_dock", "target.context_len=512", "target.prompt_len=256")
    assert planned.returncode == 0 and "12.9 GB" in planned.stdout, planned.stdout + planned.stderr
    assert "m4n_dock" in run(project, "deploy", "--help").stdout


def test_a_vendor_is_a_schema_a_module_and_a_line(project):
    assert run(project, "data", "run=a", "data.calib=0.1").returncode == 0
    argv = ["run=a", "source=assets/tiny-chat", "target=rk3588", "target.context_len=512", f"target.python={sys.executable}"]
    told = run(project, "deploy", *argv, "target.weight_type=W9", "target.coers=2")
    assert told.returncode == 2 and "did you mean 'target.cores'?" in told.stderr and "target.weight_type=W9: " in told.stderr
    waiting = run(project, "deploy", *argv)
    assert waiting.returncode == 12 and "RKLLM-Toolkit is not in that Python" in waiting.stderr, waiting.stderr
    done = run(project, "deploy", *argv, toolkit=True)
    assert done.returncode == 0, done.stderr
    bundle = project / "outputs" / "a" / "deploy-rk3588"
    assert {p.name for p in bundle.iterdir()} == {"model.rkllm", "compile.log", "README.md", "manifest.json"}
    assert json.loads((bundle / "manifest.json").read_text())["metrics"]["calibration_rows"] > 5
    verified = run(project, "lineage", bundle, "--verify")
    assert verified.returncode == 0 and "target.chip = RK3588" in verified.stdout
    failed = run(project, "deploy", *argv, "target.cores=9", "force=true", toolkit=True)
    assert failed.returncode == 13 and "build returned -2" in failed.stderr, failed.stderr
