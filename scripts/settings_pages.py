"""Writes docs/settings.md, every setting of every verb, from the schemas and configs/: python scripts/settings_pages.py"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from src.completion import schema_of  # noqa: E402
from src.core import compose  # noqa: E402

HEAD = """# Settings

Every setting of every verb, with its default and meaning, as `python -m src.VERB --help` has them. Made by `scripts/settings_pages.py`; not edited by hand.
"""


def first_line(verb: str) -> str:
    file = ROOT / "src" / f"{verb}.py"
    doc = ast.get_docstring(ast.parse((file if file.is_file() else ROOT / "src" / verb / "__main__.py").read_text(encoding="utf-8"))) or ""
    return " ".join(doc.split("\n\n")[0].split())


def page() -> str:
    parts = [HEAD]
    shared = set(lines(compose.defaults("data", []), schema_of("data"), only=compose.leaves(compose.defaults("summary", []))))
    parts += ["## Of every verb\n", table(sorted(shared))]
    for verb in compose.verbs():
        groups = compose.groups_of(verb)
        parts += [f"## {verb}\n", f"{first_line(verb)}\n"]
        parts += [
            f"`{group}` is one of " + ", ".join(f"`{option}`" for option in sorted(options)) + ".\n"
            for group, options in sorted(groups.items())
        ]
        tree = compose.defaults(verb, [])
        rows = dict.fromkeys(lines(tree, schema_of(verb)))
        for group in groups:
            for option, own in compose.options(group).items():
                if option != "none":
                    found = lines(tree | {group: {option: own} if group == "tracker" else own}, schema_of(verb))
                    known = {key for key, _, _ in rows}
                    rows |= dict.fromkeys(row for row in found if row[0] not in known)
        parts.append(table([row for row in rows if row not in shared]))
    return "\n".join(parts)


def lines(tree: dict, schema: type, only: dict | None = None) -> list[tuple[str, str, str]]:
    found = []
    for left, meaning in compose.with_meaning(tree, schema):
        key, _, default = left.partition("=")
        if only is None or key in only:
            found.append((key, default, " ".join(meaning.split())))
    return found


def table(rows: list[tuple[str, str, str]]) -> str:
    cell = lambda text: text.replace("|", "\\|").replace("<", "&lt;").replace("???", "(must be given)")
    made = [f"| `{key}` | {f'`{cell(default)}`' if default else ''} | {cell(meaning)} |" for key, default, meaning in rows]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *made, ""])


if __name__ == "__main__":
    (ROOT / "docs" / "settings.md").write_text(page(), encoding="utf-8")
