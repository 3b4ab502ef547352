"""The rules that keep the house in order: imports point one way, help and plans come without torch, nothing unsafe is called."""

import ast
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FEW, ROOT, VERBS, write_model

SOURCES = sorted((ROOT / "src").rglob("*.py"))
HEAVY = {"torch", "transformers", "peft", "deepspeed", "gptqmodel", "datasets", "accelerate"}
FLOORS = (("settings",), ("core",), ("records", "chat", "sizing"), ("models",), ("serving",), ("training",))
"""the rooms of src/ from the ground up; the verbs live above them all"""
# Runs verbs as they are asked for on stdin, each in a fork of a process that has imported what all of them need, and tells of each as JSON: its exit code,
# what it wrote, the processor seconds that it took (with those of the imports, as if it had made them itself), and which libraries were loaded when it ended.
DOOR = """
import atexit, json, os, resource, runpy, sys, tempfile
import src.core.stage
used = lambda whose: sum(resource.getrusage(whose)[:2])
start = used(resource.RUSAGE_SELF)
for line in sys.stdin:
    before, files = used(resource.RUSAGE_CHILDREN), [tempfile.TemporaryFile() for _ in range(3)]
    if not (child := os.fork()):
        for number, file in enumerate(files):
            os.dup2(file.fileno(), number)
        atexit.register(lambda: print("LOADED", [m for m in ("torch", "transformers") if m in sys.modules]))
        sys.argv = json.loads(line)
        runpy.run_module(f"src.{sys.argv[0]}", run_name="__main__", alter_sys=True)
        sys.exit()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = [(file.seek(0), file.read().decode())[1] for file in files[1:]]
    print(json.dumps([code, *said, start + used(resource.RUSAGE_CHILDREN) - before]), flush=True)
"""


@pytest.fixture(scope="module")
def door():
    """door(verb, *argv): the finished process, and the processor seconds of `python -m src.VERB argv`."""
    with subprocess.Popen([sys.executable, "-c", DOOR], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def ask(*argv) -> tuple[subprocess.CompletedProcess, float]:
            process.stdin.write(json.dumps(list(map(str, argv))) + "\n")
            process.stdin.flush()
            *done, seconds = json.loads(process.stdout.readline())
            return subprocess.CompletedProcess(argv, *done), seconds

        yield ask
        process.stdin.close()


def loaded_by(code: str, *argv) -> tuple[subprocess.CompletedProcess, float]:
    """The finished process, and the seconds of processor time it took, which other work on the machine does not stretch as it does the clock's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture(scope="module")
def libraries() -> float:
    """Processor seconds that what every verb composes and validates with takes to import, on this machine and now: a start-up is held against it."""
    return loaded_by("import hydra, omegaconf, pydantic")[1]


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


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def room_of(module: str) -> str:
    """The folder a module lives in: core of src.core.log; a verb's own name for the verbs, of which chat has its door in the folder of that name; empty for
    src itself."""
    return module if module == "src.chat.__main__" else (module.split(".") + [""])[1].removesuffix("__main__")


def edges(path: Path) -> set[str]:
    """The modules of src that a file imports, inside functions too; of a package only what is taken from it."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {name if (name := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names}
    return found & MODULES.keys() - {module_of(path), "src"}


def test_the_floors_are_the_folders_there_are():
    folders = {path.parent.name for path in (ROOT / "src").glob("*/__init__.py")}
    assert folders == {room for floor in FLOORS for room in floor} | {"plan", "distill", "deploy", "pipeline", "report"}
    assert {path.stem for path in (ROOT / "src").glob("*.py")} | {"plan", "distill", "deploy", "pipeline", "report", "chat"} == {
        "__init__",
        "__main__",
        *VERBS,
    }, "src/ holds verbs and rooms, nothing else"
    assert not [path for path in SOURCES if {"utils", "util", "helpers", "common", "misc"} & set(path.with_suffix("").parts)]


def test_imports_point_down_and_never_to_a_verb():
    """A room knows the floors below it, a verb all floors and no other verb."""
    below: set[str] = {""}
    allowed = {}
    for floor in FLOORS:
        allowed |= {room: below | {room} for room in floor}
        below = below | set(floor)
    for module, path in MODULES.items():
        room = room_of(module)
        known = allowed.get(room, below | {room}) if room else {""}
        found = {name for name in edges(path) if room_of(name) not in known}
        assert not found, f"{module} may import {', '.join(sorted(known))}, and imports {found}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: edges(path) for module, path in MODULES.items()}
    left = dict(graph)
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"a circle among {sorted(left)}"


def test_settings_import_pydantic_alone():
    for path in (ROOT / "src" / "settings").glob("*.py"):
        outside = {name.split(".")[0] for name in imported(tree(path))} - set(sys.stdlib_module_names) - {"src"}
        assert outside <= {"pydantic"}, f"{path} imports {outside}"


def test_core_never_imports_torch():
    for path in (ROOT / "src" / "core").glob("*.py"):
        heavy = {name.split(".")[0] for name in imported(tree(path))} & HEAVY
        assert not heavy, f"{path} imports {heavy}"


def test_what_a_plan_needs_comes_without_torch():
    rooms = ("settings", "core", "chat", "sizing", "serving", "plan", "deploy", "distill", "pipeline")
    modules = [module for module in MODULES if room_of(module) in rooms and not module.endswith(("__main__", ".inside", ".job"))]
    done, _ = loaded_by(
        f"import importlib, sys; [importlib.import_module(m) for m in {modules}]; print(sorted({HEAVY} & set(sys.modules)))"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_fast_and_says_every_setting(verb, door, libraries):
    done, seconds = door(verb, "--help")
    print(f"{verb} --help: {seconds:.2f} s")
    assert done.returncode == 0 and "LOADED []" in done.stdout, done.stdout + done.stderr
    assert seconds < 10 * libraries
    assert f"python -m src.{verb}" in done.stdout
    if verb not in ("lineage", "completion"):
        assert "dry_run=false" in done.stdout and "???" not in done.stdout.replace("=???", "")


@pytest.mark.parametrize("verb", VERBS)
def test_a_plan_is_fast_and_makes_nothing(verb, door, finished, tmp_path, libraries):
    a = finished / "a"
    argv = {
        "data": [f"data.path={finished / 'inputs' / 'chats.json'}", *FEW],
        "distill": [f"prompts.path={finished / 'inputs' / 'chats.json'}", "teacher.model=m"],
        "pretrain": [f"text={finished / 'inputs' / 'chats.txt'}"],
        "cpt": [f"text={finished / 'inputs' / 'chats.txt'}", f"model.path={finished / 'inputs' / 'base'}"],
        "finetune": [f"source={a / 'data'}", f"model.path={finished / 'inputs' / 'base'}", "launch.nproc_per_node=1"],
        "merge": [f"source={a / 'finetune'}"],
        "quantize": [f"source={a / 'merge'}", f"dataset={a / 'data'}"],
        "evaluate": [f"source={a / 'merge'}", f"dataset={a / 'data'}"],
        "deploy": [f"source={a / 'merge'}"],
        "chat": [a / "merge"],
        "push": [a / "merge", "id=people/name"],
        "serve": [a / "merge"],
        "answer": [f"source={a / 'merge'}", f"prompts.path={finished / 'inputs' / 'chats.json'}"],
        "plan": [
            f"model={finished / 'inputs' / 'base'}",
            f"plot={tmp_path / 'plan.png'}",
            "target.context_len=512",
            "target.prompt_len=256",
        ],
        "pipeline": [f"finetune.model.path={finished / 'inputs' / 'base'}"],
        "aux_files": [f"source={finished / 'inputs' / 'base'}", f"target={write_model(tmp_path / 'made')}"],
        "summary": ["run=a", f"outputs={finished}"],
        "report": ["a", f"outputs={finished}"],
        "runs": [f"outputs={finished}"],
        "doctor": [],
        "completion": ["bash"],
        "lineage": [a / "deploy-llama2c"],
    }[verb]
    common = (
        []
        if verb in ("lineage", "completion")
        else ["dry_run=true", *([] if verb in ("summary", "report", "runs") else ["run=new", f"outputs={tmp_path / 'outputs'}"])]
    )
    done, seconds = door(verb, *argv, *common)
    print(f"{verb} dry_run: {seconds:.2f} s")
    assert done.returncode == 0 and "LOADED []" in done.stdout, done.stdout + done.stderr
    assert seconds < 10 * libraries
    assert not (tmp_path / "outputs" / "new").exists()
    if verb == "plan":
        assert not (tmp_path / "plan.png").exists()
    if verb not in (
        "plan",
        "summary",
        "lineage",
        "aux_files",
        "pipeline",
        "report",
        "runs",
        "doctor",
        "completion",
        "chat",
        "serve",
        "push",
    ):
        assert f"{verb}: would make {tmp_path / 'outputs' / 'new'}" in done.stderr


def test_only_the_door_knows_hydra_and_what_has_it_sweep():
    users = {path.stem for path in SOURCES if {m.split(".")[0] for m in imported(tree(path))} & {"hydra", "omegaconf"}}
    assert users == {"compose", "sweep"}


def test_no_shell_no_pickle_no_catch_all():
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            at = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ExceptHandler):
                caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"everything"}
                reraises = any(isinstance(part, ast.Raise) and part.exc is None for part in ast.walk(node))
                allowed = reraises or path.stem in ("stage", "tracking", "processes")  # the last hands it to the process that asked
                assert allowed or not caught & {"Exception", "BaseException", "everything"}, f"{at} catches everything"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                words = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert words.get("shell", "False") == "False", f"{at} runs a shell"
                assert called not in ("os.system", "os.popen", "eval", "exec"), f"{at} calls {called}"
                assert not (called == "torch.load" and words.get("weights_only") != "True"), f"{at} unpickles"
        assert not imported(tree(path)) & {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}, f"{path} imports a pickle reader"


def test_errors_open_with_their_own_tree():
    """core/errors.py says the hierarchy and exit codes; it is that of the classes."""
    from src.core import errors
    from src.serving.protocol import Refused

    said = [line.split()[:2] + [len(line) - len(line.lstrip())] for line in errors.__doc__.splitlines() if line.startswith("    ")]
    found = {name: int(code) for name, code, _ in said}
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.UserError)]
    assert found == {c.__name__: c.exit_code for c in [*classes, Refused]}
    depth = {name: indent for name, _, indent in said}
    assert all(depth[c.__name__] == 4 + 2 * (len(c.__mro__) - len(errors.UserError.__mro__)) for c in [*classes, Refused])
    codes = [c.exit_code for c in classes if c is not errors.UserError]
    assert len(set(codes)) == len(codes), "each its own"
