"""Every way out that an error of ours prints helps: what it names can be typed, and a test beside its fault takes it as it is written.

Both are read from the source. What can be typed is tried here; a test that takes ways out is marked with them (`helps` in conftest.py), and the marks
are held against every `fix=` in src.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, VERBS
from test_config import ROOTS, composed

from src.core import compose
from src.core.errors import ConfigError

SETTING = re.compile(r"(?<![\w./{}\[-])([a-z_]+(?:\.[a-z0-9_]+)*)=(\{[^\s}]*\}|[^\s,;:()]+)")
COMMAND = re.compile(r"python -m src\.([a-z_]+)")
FOREIGN = {
    *("tie_word_embeddings", "max_tokens", "init_lora_weights", "normalized", "trackio"),
    *("key", "format", "on_fault", "policy", "s", "enable_top_p_sampling"),
}
"""names of other programs' settings, and of functions' arguments in messages about a fault of ours"""
CODE = (
    "completion.py",
    "core/card_text.py",
    "deploy/mobilint/compile.py",
    "deploy/axera/runtime.py",
    "deploy/mobilint/job.py",
    "deploy/mobilint/runtime.py",
    "deploy/gguf/card.py",
    "deploy/openvino/card.py",
    "distill/card.py",
    "distill/batch.py",
)
"""modules whose texts are programs, pages or addresses"""
ANY = "\0"
"""what stands for a value put in at run time"""


def messages() -> Iterator[tuple[str, str]]:
    """(where, text) of every piece of text in src that is no docstring."""
    for file in sorted((ROOT / "src").rglob("*.py")):
        name = str(file.relative_to(ROOT / "src"))
        if name in CODE:
            continue
        tree = ast.parse(file.read_text())
        left_out = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        left_out |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if id(node) in left_out:
                continue
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield f"{name}:{node.lineno}", node.value
            elif isinstance(node, ast.JoinedStr):
                yield f"{name}:{node.lineno}", "".join(p.value if isinstance(p, ast.Constant) else ANY for p in node.values)


@pytest.fixture(scope="module")
def keys() -> dict[str, set[str]]:
    """{dotted key, or a part of one that holds others: the verbs that know it}, options of every group included."""
    found: dict[str, set[str]] = {}
    for verb in ROOTS:
        groups = compose.groups_of(verb)
        known = set(compose.leaves(compose._plain(compose._hydra(verb, [])))) | set(groups)
        for group, options in groups.items():
            for option in options:
                known |= {f"{group}.{key}" for key in compose.leaves(compose._option(group, option))}
        for key in known:
            parts = key.split(".")
            for i in range(1, len(parts) + 1):
                found.setdefault(".".join(parts[:i]), set()).add(verb)
    return found


def test_every_key_that_a_message_names_can_be_typed(keys):
    unknown = [
        f"{where}: {key}= in {text!r}"
        for where, text in messages()
        for key, _ in SETTING.findall(text)
        if key not in FOREIGN and key not in keys and not key.startswith(("recipe.steps.", "prices."))
    ]
    assert not unknown, "\n".join(unknown)


def test_every_value_that_a_message_gives_is_taken(keys):
    """Where it is written out: what is put in at run time and what stands for the user's own (FILE, N, ...) is not. What one message names goes together."""
    named = set()
    for _, text in messages():
        pairs = [
            (key, re.sub("FOLDER|FILE|PATH", "x", value.rstrip(".'\"`")))
            for key, value in SETTING.findall(text)
            if key in keys and key not in FOREIGN
        ]
        named |= {tuple(f"{key}={value}" for key, value in pairs if value and not re.search(rf"[A-Z{ANY}<|]|\.\.\.", value))}
    refused = [f"{settings}: {faults[-1]}" for settings in sorted(named - {()}) if (faults := tries(settings, keys))]
    assert len(named) > 60 and not refused, "\n".join(refused)


def tries(settings: tuple[str, ...], keys: dict[str, set[str]]) -> list[str]:
    """The faults of composing verbs with these settings, together or one by one; none where a verb takes them, each a verb that takes it."""
    faults = []
    for verb in sorted(set.intersection(*(keys[setting.partition("=")[0]] for setting in settings))):
        for choice in choices(verb, settings[0].partition("=")[0]):
            try:
                composed(verb, *choice, *settings)
                return []
            except ConfigError as error:
                faults.append(str(error))
    if len(settings) > 1:  # alternatives, or for two commands
        return [fault for setting in settings for fault in tries((setting,), keys)[-1:]]
    return faults


def choices(verb: str, key: str) -> list[list[str]]:
    """Overrides under which a key of a group's option is there."""
    group, _, rest = key.partition(".")
    options = compose.groups_of(verb).get(group, ())
    return [[]] + [[f"{group}={option}"] for option in sorted(options) if rest and rest in compose.leaves(compose._option(group, option))]


def test_every_command_that_a_message_gives_is_a_verb():
    named = {verb for _, text in messages() for verb in COMMAND.findall(text)}
    assert named and named <= {*VERBS, "finetune"}


# ---- every way out is taken by a test


Value = tuple[ast.AST, int | None]
"""what a name is given, and which part of it where several are given at once"""


class Module:
    """A file of src, with what its names are given anywhere in it, what its functions return, and what it imports from src."""

    def __init__(self, file: Path):
        self.name, self.tree = str(file.relative_to(ROOT / "src")), ast.parse(file.read_text())
        self.given, self.imported, self.functions = dict[str, list[Value]](), dict[str, str](), set[str]()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and node.value:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for place, name in enumerate(target.elts) if isinstance(target, ast.Tuple) else [(None, target)]:
                        if isinstance(name, ast.Name):
                            self.given.setdefault(name.id, []).append((node.value, place))
            elif isinstance(node, ast.FunctionDef):
                self.functions.add(node.name)
                self.given.setdefault(node.name, []).extend(
                    (n.value, None) for n in ast.walk(node) if isinstance(n, ast.Return) and n.value
                )
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("src."):
                self.imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}


@functools.cache
def modules() -> dict[str, Module]:
    """{src.core.files: its Module}."""
    files = sorted((ROOT / "src").rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): Module(file) for file in files}


@functools.cache
def ways_out() -> frozenset[tuple[str, str]]:
    """(file under src, text with {} for what is put in) of everything that is given as `fix=`, through constants, names and functions."""
    found = set[tuple[str, str]]()

    def text(module: Module, node: ast.AST, part: int | None, seen: tuple) -> None:
        if isinstance(node, ast.Constant | ast.JoinedStr):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            words = "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in parts)
            if words and (isinstance(node, ast.JoinedStr) or isinstance(node.value, str)):
                found.add((module.name, words))
        elif isinstance(node, ast.Tuple) and part is not None:
            text(module, node.elts[part], None, seen)
        elif isinstance(node, ast.IfExp):
            text(module, node.body, part, seen), text(module, node.orelse, part, seen)
        elif isinstance(node, ast.BinOp):
            sides = [node.left] if isinstance(node.op, ast.Mult) else [node.left, node.right]
            [text(module, side, part, seen) for side in sides]
        elif isinstance(node, ast.List | ast.Tuple | ast.BoolOp):
            [text(module, one, part, seen) for one in (node.values if isinstance(node, ast.BoolOp) else node.elts)]
        elif isinstance(node, ast.ListComp | ast.GeneratorExp):
            text(module, node.elt, part, seen)
        elif isinstance(node, ast.Subscript):
            whole = isinstance(node.slice, ast.Slice)
            text(module, node.value, None if whole or not isinstance(node.slice, ast.Constant) else node.slice.value, seen)
        elif isinstance(node, ast.Dict):
            [text(module, value, part, seen) for value in node.values]
        elif isinstance(node, ast.Starred | ast.keyword):
            text(module, node.value, part, seen)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            text(module, node.func, part, seen)
        elif isinstance(node, ast.Name | ast.Attribute) and (module.name, name := ast.unparse(node)) not in seen:
            first, _, rest = name.partition(".")
            place = module.imported.get(first, "")
            there, what = (
                (modules()[place], rest) if place in modules() else (modules().get(place.rpartition(".")[0], module), rest or first)
            )
            if first not in module.given and first not in module.imported:  # a method
                what = name.rpartition(".")[2]
                there = next((other for other in modules().values() if what in other.functions), module)
            for value, inner in there.given.get(what, []):
                text(there, value, inner if part is None else part, (*seen, (module.name, name)))

    takes = {  # a function's name: where among its arguments `fix` stands
        node.name: [a.arg for a in node.args.args].index("fix")
        for module in modules().values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef) and "fix" in [a.arg for a in node.args.args]
    }
    for module in modules().values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call):
                if ast.unparse(node.func).endswith(".fix.append"):
                    text(module, node.args[0], None, ())
                at = takes.get(ast.unparse(node.func).rpartition(".")[2], len(node.args))
                [text(module, given, None, ()) for given in (*(k for k in node.keywords if k.arg == "fix"), *node.args[at : at + 1])]
            elif isinstance(node, ast.FunctionDef):
                named = dict(zip(reversed(node.args.args), reversed(node.args.defaults))) | dict(
                    zip(node.args.kwonlyargs, node.args.kw_defaults)
                )
                [text(module, default, None, ()) for name, default in named.items() if name.arg == "fix" and default]
    return frozenset(found)


def marked() -> dict[tuple[str, str], str]:
    """{(file under src, way out): the test that is marked with it}."""
    marks = {}
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            for call in getattr(node, "decorator_list", []):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "helps":
                    where, *ways = map(ast.literal_eval, call.args)
                    marks |= {(where, way): f"{file.name}::{node.name}" for way in ways}
    return marks


NOT_HERE = {
    ("training/layout.py", "train.micro_batch_size=1"),
    ("training/layout.py", "train.max_length=N, lower, for shorter conversations; train.long_rows says what becomes of the longer"),
    ("training/layout.py", "train.max_length=N, lower, for shorter rows"),
    ("training/layout.py", "tuner=lora or tuner=qlora, which train fewer weights"),
    ("training/layout.py", "deepspeed=zero3_offload, which shares what is left between processes and the host's memory"),
    *(("training/probe.py", way) for way in ("train.precision=fp32", "train.packing=false train.chunked_loss=false")),
    ("training/reports.py", "train.precision=fp32 force=true"),
    ("deploy/axera/compile.py", "remove the folder that an earlier container left as root's, then run the same command again"),
    ("deploy/axera/chat.py", "target.tokenizer_type=TYPE where axllm has the model's own: {}"),
    ("records/sources/hub.py", "data.revision=refs/convert/parquet, where the hub keeps one as Parquet"),
    ("distill/batch.py", "teacher.batch=false asks one by one"),
    ("distill/batch.py", "the same command goes on"),
}
"""ways out of what no test here runs into: a GPU's memory or fp16, ZeRO-3 inside its engine, a container's root, what the hub made of a data set, a batch API that fails"""


def test_every_way_out_is_taken_by_a_test():
    """One that nobody can take has no place in an error: leave `fix` out, or say what a person can do."""
    unshown = sorted(f"{file}: {way}" for file, way in ways_out() - set(marked()) - NOT_HERE)
    assert not unshown, "\n".join(unshown)


def test_no_test_is_marked_with_a_way_out_that_is_gone():
    gone = sorted(f"{test} {file}: {way}" for (file, way), test in marked().items() if (file, way) not in ways_out())
    assert not gone, "\n".join(gone)
