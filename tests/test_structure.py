"""The rules that keep the house in order: imports point one way, help and plans come without torch, nothing unsafe is called."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import FEW, ROOT, VERBS, write_model

SOURCES = sorted((ROOT / "src").rglob("*.py"))
LIGHT = ("errors", "log", "config", "artifact", "compose", "stage", "conversations", "chatml")
# Prints what was loaded after the verb has ended, however it ended.
WATCH = """
import atexit, runpy, sys
atexit.register(lambda: print("LOADED", [m for m in ("torch", "transformers") if m in sys.modules]))
sys.argv = sys.argv[1:]
runpy.run_module(f"src.{sys.argv[0]}", run_name="__main__", alter_sys=True)
"""


def loaded_by(code: str, *argv) -> tuple[subprocess.CompletedProcess, float]:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done, time.monotonic() - start


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(node: ast.AST) -> set[str]:
    """Every module a syntax tree imports, `from src import x` counted as src.x."""
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            names |= {alias.name for alias in part.names}
        elif isinstance(part, ast.ImportFrom):
            names |= {part.module} | {f"{part.module}.{alias.name}" for alias in part.names}
    return names


def test_light_modules_import_neither_torch_nor_transformers():
    done, _ = loaded_by(
        "import sys; from src import " + ", ".join(LIGHT) + "; print([m for m in ('torch', 'transformers', 'hydra') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_no_module_imports_torch_or_transformers_when_it_is_imported():
    for path in SOURCES:
        top = ast.Module([node for node in tree(path).body if not isinstance(node, ast.FunctionDef | ast.ClassDef)], [])
        heavy = {name.split(".")[0] for name in imported(top)} & {"torch", "transformers", "peft", "deepspeed", "gptqmodel"}
        assert not heavy or path.parent.name == "training" or path.stem == "rows", f"{path} imports {heavy}"


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_fast_and_says_every_setting(verb):
    done, seconds = loaded_by(WATCH, verb, "--help")
    print(f"{verb} --help: {seconds:.2f} s")
    assert done.returncode == 0 and "LOADED []" in done.stdout, done.stdout + done.stderr
    assert seconds < 3
    assert f"python -m src.{verb}" in done.stdout
    if verb != "lineage":
        assert "dry_run=false" in done.stdout and "???" not in done.stdout.replace("=???", "")


@pytest.mark.parametrize("verb", VERBS)
def test_a_plan_is_fast_and_makes_nothing(verb, finished, tmp_path):
    a = finished / "a"
    argv = {
        "data": [f"data.path={finished / 'inputs' / 'chats.json'}", *FEW],
        "distill": [f"prompts.path={finished / 'inputs' / 'chats.json'}", "teacher.model=m"],
        "finetune": [f"source={a / 'data'}", f"model.path={finished / 'inputs' / 'base'}", "launch.nproc_per_node=1"],
        "merge": [f"source={a / 'finetune'}"],
        "quantize": [f"source={a / 'merge'}", f"dataset={a / 'data'}"],
        "evaluate": [f"source={a / 'merge'}", f"dataset={a / 'data'}"],
        "deploy": [f"source={a / 'merge'}"],
        "plan": [f"model={finished / 'inputs' / 'base'}", f"plot={tmp_path / 'plan.png'}"],
        "aux_files": [f"source={finished / 'inputs' / 'base'}", f"target={write_model(tmp_path / 'made')}"],
        "summary": ["run=a", f"outputs={finished}"],
        "lineage": [a / "deploy-llama2c"],
    }[verb]
    common = [] if verb == "lineage" else ["dry_run=true", *([] if verb == "summary" else ["run=new", f"outputs={tmp_path / 'outputs'}"])]
    done, seconds = loaded_by(WATCH, verb, *argv, *common)
    print(f"{verb} dry_run: {seconds:.2f} s")
    assert done.returncode == 0 and "LOADED []" in done.stdout, done.stdout + done.stderr
    assert seconds < 3
    assert not (tmp_path / "outputs" / "new").exists()
    if verb == "plan":
        assert not (tmp_path / "plan.png").exists()
    if verb not in ("plan", "summary", "lineage", "aux_files"):
        assert f"{verb}: would make {tmp_path / 'outputs' / 'new'}" in done.stderr


def test_verbs_never_import_each_other():
    for path in SOURCES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__").removesuffix(".__init__")
        # aux_files is a verb and also the step by which every stage completes its folder.
        others = {f"src.{verb}" for verb in VERBS if verb != "aux_files"} - {name}
        found = {
            module
            for module in imported(tree(path))
            if module in others and not any(name.startswith(room) and module.startswith(room) for room in ("src.deploy", "src.distill"))
        }
        assert not found, f"{path} imports {found}"


def test_lower_modules_import_only_downwards():
    below = {
        "errors": set(),
        "log": set(),
        "settings": set(),
        "targets": {"settings"},
        "recipes": {"settings"},
        "teachers": {"settings"},
        "config": {"settings", "targets", "recipes", "teachers"},
        "artifact": {"errors", "log"},
        "compose": {"errors", "log", "config"},
    }
    for name, allowed in below.items():
        found = {m.split(".")[1] for m in imported(tree(ROOT / "src" / f"{name}.py")) if m.startswith("src.")}
        assert found <= allowed, f"{name} imports {found - allowed}"


def test_only_the_door_knows_hydra():
    users = {path.stem for path in SOURCES if {m.split(".")[0] for m in imported(tree(path))} & {"hydra", "omegaconf"}}
    assert users == {"compose"}


def test_no_shell_no_pickle_no_catch_all():
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            at = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ExceptHandler):
                caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"everything"}
                reraises = any(isinstance(part, ast.Raise) and part.exc is None for part in ast.walk(node))
                allowed = reraises or path.stem in ("stage", "tracking")
                assert allowed or not caught & {"Exception", "BaseException", "everything"}, f"{at} catches everything"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                words = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert words.get("shell", "False") == "False", f"{at} runs a shell"
                assert called not in ("os.system", "os.popen", "eval", "exec"), f"{at} calls {called}"
                assert not (called == "torch.load" and words.get("weights_only") != "True"), f"{at} unpickles"
        assert not imported(tree(path)) & {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}, f"{path} imports a pickle reader"
