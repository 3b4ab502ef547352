"""What a person sees: nothing from elsewhere steers the terminal, and our own colours still do."""

import io
import os
import pty
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import CHAT, ROOT, in_terminal
from rich.cells import cell_len
from transformers import AutoTokenizer

from src.chat import encoding
from src.core import log
from src.core.errors import BadData
from src.core.stage import guarded
from src.distill import card
from src.distill.pipeline import Record

HOSTILE = "\x1b]0;owned\x07 \x1b[2J \x9b31m \r\x7f \u202egpj.exe \u2028 \ud800"
SPELLED = r"\x1b]0;owned\x07 \x1b[2J \x9b31m \r\x7f \u202egpj.exe \u2028 \ud800"
SEEN = "two\n\tlines, 中文, é, 👩\u200d🚀"


@pytest.fixture(params=[False, True], ids=["file", "terminal"])
def stderr(request, monkeypatch):
    """stderr as a file or a terminal, and what was written there."""
    found = io.StringIO()
    found.isatty = lambda: request.param
    monkeypatch.setattr(log, "sys", SimpleNamespace(stderr=found, stdout=sys.stdout))
    monkeypatch.setattr(log, "_unfinished", False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return found


def test_controls_are_spelled_out_and_all_else_is_as_it_is():
    assert log.shown(HOSTILE) == SPELLED and log.shown(SEEN) == SEEN and log.shown("a\r\nb") == "a\nb"


def test_every_way_onto_a_terminal_spells_them_out(stderr, capsys):
    for way in (log.say, log.warn, log.tell):
        way(HOSTILE)
        assert SPELLED in stderr.getvalue() and HOSTILE[:3] not in stderr.getvalue()
    log.status(HOSTILE)
    assert stderr.getvalue().count(SPELLED) == 4
    log.out(HOSTILE)
    print(log.table(["a"], [[HOSTILE]]))
    assert capsys.readouterr().out.count(SPELLED) == 2


def test_our_own_colours_stay(stderr):
    log.warn("x")
    log.say(f"a {log.mark('b', True)} c")
    plain, coloured = "warning: x\na [[b]] c\n", "\033[33mwarning:\033[0m x\na \033[32mb\033[0m c\n"
    assert stderr.getvalue() == (coloured if stderr.isatty() else plain)


def test_an_error_and_a_template_s_own_words(stderr, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(CHAT, local_files_only=True)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no " + HOSTILE[:-2] + "') }}")
    assert guarded(lambda: encoding.render(tokenizer, [{"role": "user", "content": "Hi"}])) == BadData.exit_code
    assert SPELLED[:20] in stderr.getvalue() and "\x1b" not in stderr.getvalue()


def test_a_page_of_samples(tmp_path):
    import random

    samples = card.Samples(1, random.Random(0))
    messages = [{"role": "user", "content": SEEN}, {"role": "assistant", "content": HOSTILE}]
    samples.offer(Record(HOSTILE, messages, {"split": "train", "distill": {"requests": [], "teacher": HOSTILE}}))
    samples.write(tmp_path / "page.html", HOSTILE)
    page = (tmp_path / "page.html").read_text()
    assert page.count(SPELLED) == 5 and SEEN in page and not set(page) & set("\x1b\x07\x9b\u202e")


# ---- on a terminal and elsewhere

WORK = """
import time
from src.core import log
with log.ticks(30, "training with a name that is long", done=6, lines=LINES) as tick:
    for step in range(6, 30):
        time.sleep(0.12)
        tick()
        log.say(log.fitted(("  step", 0), (f" {step}", 1), ("  loss 1.2345", 2), ("  right", 9), (" 한국어 다섯 글자", 4), ("  3 min 05 s left", 3)))
        if step == 20:
            for _ in log.progress(range(3), "validation"):
                time.sleep(0.3)
log.status("a line about where a long work stands, which is longer than forty columns, 3 min left")
for _ in log.progress(range(2), "after"):
    pass
log.say("end")
"""
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def lines_of(text: str) -> list[str]:
    """What stood on a line of the terminal at any time."""
    return re.split(r"[\r\n]+", ESCAPE.sub("", text))


@pytest.mark.parametrize(("columns", "to"), [(80, 40), (40, 20)])
def test_no_line_is_wider_than_the_terminal(columns, to):
    before, after = in_terminal(["-c", WORK.replace("LINES", "True")], columns=columns, to=to)
    drawn = after[after.index("\n") :]  # a line may be on its way as the width changes
    for text, width in ((before, columns), (drawn, to)):
        assert max(map(cell_len, lines_of(text))) <= width
        assert any(re.search(r"━ .*\d+/30 \d\d:\d\d$", line.rstrip()) for line in lines_of(text)), "no bar with the time left"
    found = [line.rstrip() for line in lines_of(after)]
    report = {20: "  step 25", 40: "  step 25  loss 1.2345  3 min 05 s left"}
    assert report[to] in found and any(re.match(r"va.* \d/3 ", line) for line in found) and found[-2:] == ["end", ""]
    assert any(line.startswith("a line about where") and line.endswith("…") for line in found)


def test_no_colour_is_a_terminal_without_colour():
    plain, coloured = ("".join(in_terminal(["-c", WORK.replace("LINES", "True")], columns=60, NO_COLOR=value)) for value in ("1", ""))
    assert "━" in plain and not re.search(r"\x1b\[[0-9;]*m", plain) and re.search(r"\x1b\[[0-9;]*m", coloured)


@pytest.mark.parametrize("lines", [True, False])
def test_a_pipe_gets_plain_lines(lines):
    done = subprocess.run([sys.executable, "-c", WORK.replace("LINES", str(lines))], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not re.search(r"[\x00-\x09\x0b-\x1f]", done.stderr), done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("  training")]
    assert len(told) == lines and all(re.fullmatch(r"  training with a name that is long: 2\d of 30, \d\.\d s left", line) for line in told)
    assert "  step 6  loss 1.2345  right 한국어 다섯 글자  3 min 05 s left" in done.stderr.splitlines()


def test_shares_of_a_part_tell_the_time_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    with log.ticks(4, "layers") as tick:
        for share in (0.1, 0.2, 0.7, 0.5, 0.5, 2):
            now[0] += 60 * share
            tick(share)
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"  layers: {done} of 4, {left} left"
        for done, left in ((0, "3 min 54 s"), (0, "3 min 42 s"), (1, "3 min 00 s"), (1, "2 min 30 s"), (2, "2 min 00 s"))
    ]


GONE = """
import os, signal, sys, time
from src.core import log
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with log.ticks(30, "training") as tick:
    for step in range(30):
        time.sleep(0.05)
        tick()
        log.say("step")
        if step == 20:
            assert not log.on_terminal()
            assert list(log.progress([1, 2], "validation")) == [1, 2]
open(sys.argv[1], "w").close()
"""


def test_work_outlives_its_terminal(tmp_path):
    terminal, end = pty.openpty()
    running = subprocess.Popen([sys.executable, "-c", GONE, tmp_path / "done"], cwd=ROOT, stdin=end, stdout=end, stderr=end)
    os.close(end)
    said = b""
    while b"step" not in said:
        said += os.read(terminal, 1 << 16)
    os.close(terminal)
    running.wait(timeout=60)
    assert (tmp_path / "done").exists()
