"""Every setting and command that a message of ours names is one that can be typed: keys exist, values are taken, verbs are there.

Whether a way out helps is shown beside the fault it belongs to; that it can be typed at all is shown here for every one in src, read from the source.
"""

import ast
import re
from collections.abc import Iterator

import pytest
from conftest import ROOT, VERBS
from test_config import ROOTS, composed

from src.core import compose
from src.core.errors import ConfigError

SETTING = re.compile(r"(?<![\w./{}\[-])([a-z_]+(?:\.[a-z0-9_]+)*)=(\{[^\s}]*\}|[^\s,;:()]+)")
COMMAND = re.compile(r"python -m src\.([a-z_]+)")
FOREIGN = {
    *("safe_serialization", "tie_word_embeddings", "max_tokens", "init_lora_weights", "normalized"),
    *("key", "format", "on_fault", "policy", "s", "enable_top_p_sampling"),
}
"""names of other programs' settings, and of functions' arguments in messages about a fault of ours"""
CODE = (
    "deploy/mobilint/compile.py",
    "deploy/axera/runtime.py",
    "deploy/mobilint/job.py",
    "deploy/mobilint/runtime.py",
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
        groups = compose._groups(verb)
        known = set(compose._leaves(compose._plain(compose._hydra(verb, [])))) | set(groups)
        for group, options in groups.items():
            for option in options:
                known |= {f"{group}.{key}" for key in compose._leaves(compose._option(group, option))}
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
    options = compose._groups(verb).get(group, ())
    return [[]] + [[f"{group}={option}"] for option in sorted(options) if rest and rest in compose._leaves(compose._option(group, option))]


def test_every_command_that_a_message_gives_is_a_verb():
    named = {verb for _, text in messages() for verb in COMMAND.findall(text)}
    assert named and named <= {*VERBS, "finetune"}
