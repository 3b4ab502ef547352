"""What a person sees: nothing from elsewhere steers the terminal, and our own colours still do."""

import io
import sys
from types import SimpleNamespace

import pytest
from conftest import CHAT
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
