"""What mkdocs cannot do by itself: README and its like are pages of the site, and docs/settings.md is a page a verb. Links stay as GitHub follows them."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = {"README.md": "index.md", "README.ko.md": "index.ko.md", "README.zh.md": "index.zh.md"} | {
    n: n for n in ("CHANGELOG.md", "CONTRIBUTING.md")
}
"""files of the project's root, and the pages that they are"""
PLAIN = {"LICENSE": "LICENSE.txt", "Dockerfile": "Dockerfile.txt"}
"""files of the project's root that pages link to, and what a browser shows as text"""

BLOCK = re.compile(r"(?<=\n\n)(?:    .*\n)+")
TYPED = re.compile(r"    (?:bash|python|echo|cp|scp|ssh|sh|pip|vllm|cd|make|ollama|outputs/\S+|\./\S+) ")


def by_verb(text: str) -> dict[str, str]:
    """{verb: its page} of docs/settings.md; "" is what stands before the first verb."""
    first, *rest = re.split(r"^## (?=[a-z])", text, flags=re.M)
    return {"": first} | {part.split("\n", 1)[0]: f"# {part}" for part in rest}


def settings() -> dict[str, str]:
    return by_verb((ROOT / "docs" / "settings.md").read_text(encoding="utf-8"))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    for section in config.nav:
        for entry in section.get("Reference", []):
            if "Settings" in entry:
                entry["Settings"] += [{verb: f"settings/{verb}.md"} for verb in settings() if verb]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in (PAGES | PLAIN).items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for verb, text in settings().items():
        if verb:
            files.append(File.generated(config, f"settings/{verb}.md", content=text))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    here = page.file.src_uri
    if here == "settings.md":
        verbs = [(verb, text.split("\n")[2]) for verb, text in by_verb(markdown).items() if verb]
        rows = "\n".join(f"| [{verb}](settings/{verb}.md) | {meaning} |" for verb, meaning in verbs)
        markdown = f"{by_verb(markdown)['']}\n## Of each verb\n\n| verb | |\n|---|---|\n{rows}\n"
    source = next((file for file, made in PAGES.items() if made == here), f"docs/{here}")
    markdown = BLOCK.sub(shell, markdown)
    return re.sub(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)", lambda link: linked(link[1], source, here), markdown)


def shell(block: re.Match) -> str:
    """A block of lines that a person types, fenced as such, so that long ones wrap; output is left as it is, in columns."""
    lines = block[0].splitlines()
    return "```sh\n" + "\n".join(line[4:] for line in lines) + "\n```\n" if all(map(TYPED.match, lines)) else block[0]


def linked(link: str, source: str, here: str) -> str:
    """A link of a file of the project as one from the page that the file became."""
    to = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    target = (PAGES | PLAIN).get(to, to.removeprefix("docs/"))
    return posixpath.relpath(target, posixpath.dirname(here) or ".")
