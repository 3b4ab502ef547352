"""docs/ and its site: every command of every tutorial runs, each language has the same, links lead somewhere, and the built pages ask nothing of the network."""

import asyncio
import functools
import http.server
import io
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from browser import CHROMIUM, opened
from conftest import ROOT, VERBS, in_process
from test_mobilint import interpreter

TUTORIALS = ROOT / "docs" / "tutorials"
NAMES = sorted(page.stem for page in TUTORIALS.glob("*.md"))
FIRST = "own-chats-to-a-cpu"
"""the tutorial that makes a run stage by stage, which the others go on from"""
LANGUAGES = ("ko", "zh")
TYPED = r"    ((?:bash|python|echo|cp|scp|ssh|pip|vllm|cd|outputs/[a-z]\S*/run) .*)"
ELSEWHERE = ("scp", "ssh", "pip", "vllm", "cd")
"""what is typed on a board, where a vendor's compiler is, or to a program that is not here, as the tutorials say"""
INSTALLS = "bash scripts/gguf_env.sh"
SMALL = ["train.epochs=1", "train.global_batch_size=32", "tuner.rank=4", "launch.nproc_per_node=1"]
FEWER = ["evaluation.samples=0", "evaluation.rows=2"]
LESS = {
    "finetune": SMALL,
    "evaluate": FEWER,
    "pipeline": [*(f"finetune.{setting}" for setting in SMALL), *(f"evaluate.{setting}" for setting in FEWER), "dry_run=true"],
}
"""what makes a verb quick where the default test types it; each stage of a pipeline is typed by itself in another tutorial"""
PLANNED = r"target\.python=|src\.evaluate run=mine$"
"""commands that the default test plans only: they compile, or measure all that there is"""


def commands(page: Path) -> list[str]:
    """The lines of its blocks that a person types."""
    return [line[1] for line in re.finditer(f"^{TYPED}$", page.read_text(encoding="utf-8"), re.M)]


class Reader:
    """Somebody at a terminal in a project's folder. whole: with nothing made smaller, each command a process of its own."""

    def __init__(self, folder: Path, *, whole: bool = False):
        self.folder, self.whole = folder, whole
        for name in ("assets", "configs", "finetune", "scripts", "src"):
            (folder / name).symlink_to(ROOT / name)
        for name in (".venv", ".venv-gguf"):
            if whole and (ROOT / name).exists():
                (folder / name).symlink_to(ROOT / name)

    def types(self, line: str) -> subprocess.CompletedProcess | None:
        """The command, done; None where it is typed elsewhere or installs something."""
        if line.split()[0] in ELSEWHERE or (line == INSTALLS and (ROOT / line.split()[1]).is_file()):
            return None
        if line.startswith("cp ") and not self.whole:
            rows = json.loads((ROOT / line.split()[1]).read_text())[:80]
            (self.folder / line.split()[2]).write_text(json.dumps(rows))
            return subprocess.CompletedProcess(line, 0)
        if "endpoint.url=" in line:
            line += " dry_run=true"  # whoever has that address here is not asked
        said, _, rest = line.rpartition(" | ")
        words = shlex.split(rest)
        if self.whole or words[:2] != ["python", "-m"]:
            environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            return subprocess.run(
                ["bash", "-c", line], cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
        verb = words[2].removeprefix("src.")
        less = [*LESS.get(verb, []), *(["dry_run=true"] if re.search(PLANNED, line) else [])]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setenv("CFLAGS", "-O0")  # the C program compiles six times as fast
            patch.setattr(sys, "stdin", io.StringIO(shlex.split(said)[1] if said else ""))
            return in_process(verb, *words[3:], *less)


@pytest.fixture(scope="module")
def reader(tmp_path_factory, proofs_in_this_process, one_thread) -> Reader:
    """Somebody who has followed the first tutorial to its end."""
    made = Reader(tmp_path_factory.mktemp("project"))
    for line in commands(TUTORIALS / f"{FIRST}.md"):
        done = made.types(line)
        assert done is None or done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return made


def test_the_first_tutorial_ends_with_an_answer_of_the_bundle(reader):
    run = next(line for line in commands(TUTORIALS / f"{FIRST}.md") if line.startswith("outputs/"))
    assert reader.types(run).stdout.strip()
    made = {path.name for path in (reader.folder / "outputs" / "mine").iterdir()}
    assert made >= {"data", "finetune", "merge", "quantize", "deploy-llama2c-quantize"}


def compilers(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Stand-ins of Pulsar2, on PATH, and of qbcompiler, in qb/bin/python, from here on."""
    for name in ("bin", "qb/bin"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if not (folder / "qb" / "bin" / "python").exists():
        (folder / "qb" / "bin" / "python").symlink_to(interpreter(folder, "1.3.0"))
        (folder / "bin" / "pulsar2").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/stand_ins/pulsar2.py" pulsar2 "$@"\n')
        (folder / "bin" / "pulsar2").chmod(0o755)
    patch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    patch.setenv("STAND_IN", json.dumps({"state": str(folder)}))


def walk(reader: Reader, name: str, patch: pytest.MonkeyPatch) -> None:
    """Every command of a tutorial. A board's compiler comes only once it was missed."""
    lines = commands(TUTORIALS / f"{name}.md")
    assert lines
    missed = []
    for line in lines:
        board = re.search("ax650|mobilint", line)
        codes = {0}
        if "gate=" in line:
            codes = {0, 17}
        elif "chat outputs/mine/deploy-gguf" in line and not (reader.folder / ".venv-gguf").exists():
            codes = {7}
        elif board and "src.deploy" in line:
            if board[0] not in missed:
                missed.append(board[0])
                assert reader.types(re.sub(r" target.python=\S+", "", line)).returncode == 12, "no compiler is here"
            compilers(reader.folder, patch)
            if board[0] == "mobilint" and "target.python=" not in line and not reader.whole:
                codes = {12}  # the compile before it was planned only
        elif board and "src.pipeline" in line and "dry_run=true" not in line and reader.whole:
            codes = {12}
        done = reader.types(line)
        assert done is None or done.returncode in codes, f"{line}\n{done.returncode}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("name", [name for name in NAMES if name != FIRST])
def test_every_command_of_a_tutorial_runs(reader, name, monkeypatch):
    walk(reader, name, monkeypatch)


@pytest.mark.parametrize("page", sorted(TUTORIALS.rglob("*.md")), ids=lambda page: str(page.relative_to(TUTORIALS)))
def test_a_block_is_typed_or_shown_not_both(page):
    """One who copies a block gets commands alone."""
    for block in re.findall(r"(?:^(?:    .*)?\n)+", page.read_text(encoding="utf-8"), re.M):
        lines = [line for line in block.splitlines() if line.strip()]
        assert len({bool(re.match(TYPED, line)) for line in lines}) < 2, block


@pytest.mark.slow
def test_the_tutorials_run_as_they_are(tmp_path, monkeypatch):
    reader = Reader(tmp_path, whole=True)
    for name in (FIRST, *(name for name in NAMES if name != FIRST)):
        walk(reader, name, monkeypatch)


# ---- languages


def sections(page: Path) -> list[tuple[int, int]]:
    """(level, rows of tables) of each heading and what stands under it."""
    parts = re.split(r"^(#+) .*$", page.read_text(encoding="utf-8"), flags=re.M)[1:]
    return [(len(level), len(re.findall(r"^\|", text, re.M))) for level, text in zip(parts[::2], parts[1::2])]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", NAMES)
def test_each_language_has_every_section_table_and_command(language, name):
    english, other = TUTORIALS / f"{name}.md", TUTORIALS / language / f"{name}.md"
    assert sections(other) == sections(english)
    assert commands(other) == commands(english)
    own = {"ko": "[가-힣]", "zh": "[一-鿿]"}[language]
    titles = re.findall(r"^#+ .*$", other.read_text(encoding="utf-8"), re.M)
    assert all(re.search(own, title) for title in titles), [title for title in titles if not re.search(own, title)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_language_has_a_tutorial_of_its_own(language):
    assert sorted(page.stem for page in (TUTORIALS / language).glob("*.md")) == NAMES


# ---- links

ROOT_PAGES = [ROOT / name for name in ("README.md", "README.ko.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*ROOT_PAGES, *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(page: Path) -> set[str]:
    """What GitHub names the headings: words in lower case with hyphens between them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.*)$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_of_the_documents_leads_somewhere():
    lost = []
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
            file, _, anchor = link.partition("#")
            to = (page.parent / file).resolve() if file else page
            if not to.is_file() or (anchor and anchor not in anchors(to)):
                lost.append(f"{page.relative_to(ROOT)}: {link}")
    assert not lost


def test_a_link_that_leads_nowhere_is_seen(tmp_path):
    (page := tmp_path / "a.md").write_text("# What `a` is, in short\n")
    assert anchors(page) == {"what-a-is-in-short"}


# ---- the site


def navigation() -> set[str]:
    return set(re.findall(r"([\w./-]+\.md)\b", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))


def test_every_page_is_in_the_site_s_navigation():
    """Which the strict build holds, too, where mkdocs is."""
    made = {"index.md", "index.ko.md", "index.zh.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    assert navigation() == made | {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


def test_the_settings_have_a_part_for_every_verb_that_has_settings():
    parts = re.findall(r"^## ([a-z_]+)$", (ROOT / "docs" / "settings.md").read_text(encoding="utf-8"), re.M)
    assert parts == [verb for verb in sorted(VERBS) if verb not in ("completion", "lineage")]


def test_the_site_s_packages_are_pinned_and_say_what_for():
    for line in (ROOT / "docs" / "requirements.txt").read_text().splitlines():
        assert re.fullmatch(r"[\w.-]+==[\w.]+ +# [a-z].*", line), line


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if not (ROOT / ".venv-docs" / "requirements.sha256").is_file():
        pytest.skip("no .venv-docs: bash scripts/docs.sh makes it")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(["bash", "scripts/docs.sh", folder], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{folder}/index.html\n"), done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_names_no_other_machine(site):
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    made = {str(page.relative_to(site)) for page in pages}
    assert made == {page.replace(".md", ".html") for page in navigation()} | {
        f"settings/{verb}.html" for verb in VERBS if verb not in ("completion", "lineage")
    }
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(
            r"""<(?:script|img|iframe|source)[^>]* src=["']?(?:https?:)?//[^>]*>|<link[^>]* href=["']?(?:https?:)?//[^>]*>""", text
        ), page


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_pages_ask_nothing_of_the_network_and_fit_a_phone(site, tmp_path):
    asked = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}/"

    async def work() -> None:
        async with opened(f"{here}index.html", tmp_path / "profile") as page:
            for name in (
                "index",
                "settings/finetune",
                "planner",
                "tutorials/reading-a-report",
                "tutorials/ko/own-chats-to-ax650",
                "tutorials/zh/own-chats-to-ax650",
            ):
                await page.send("Page.navigate", url=f"{here}{name}.html")
                await page.until(f"document.readyState === 'complete' && location.href.endsWith('{name}.html')")
                resources = await page.run("performance.getEntriesByType('resource').map(entry => entry.name)")
                assert resources and all(name.startswith(here) for name in resources), resources
                for width in (1200, 400):
                    for dark in (False, True):
                        await page.shape(width, 800, dark=dark)
                        await page.until(f"document.documentElement.scrollWidth <= {width}", 5)
                        await page.until(f"document.body.dataset.mdColorScheme === '{'slate' if dark else 'default'}'", 5)
            assert not page.problems

    try:
        asyncio.run(work())
    finally:
        server.shutdown()
        server.server_close()
    assert asked


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("word", ["tuner.rank", "양자화", "量化"])
def test_a_page_opened_from_disk_is_searched(site, tmp_path, word):
    async def work() -> None:
        async with opened(f"file://{site}/index.html", tmp_path / "profile") as page:
            await page.until("typeof __index === 'object'")
            await page.run("document.querySelector('#__search').click()")
            typed = f"const field = document.querySelector('[data-md-component=search-query]'); field.value = {json.dumps(word)};"
            await page.run(f"{{ {typed} field.dispatchEvent(new Event('input')); field.dispatchEvent(new Event('keyup')) }}")
            await page.until("document.querySelectorAll('.md-search-result__item').length > 0", 20)
            assert not page.problems

    asyncio.run(work())
