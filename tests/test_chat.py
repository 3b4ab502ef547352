"""python -m src.chat: piped, and on a terminal as a person types; nothing a model says steers the terminal, and nothing is forgotten unsaid."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from types import SimpleNamespace

import pytest
from conftest import CHAT, ROOT, hear_ctrl_c, helps, in_process, refused
from stand_ins.openai_server import Behaviour, Server

from src.core.compose import compose
from src.core.errors import BadData, ConfigError, MissingInput, NoAnswer, WrongKind
from src.models.speaking import Ended, TooLong
from src.serving.conversation import Conversation
from src.settings.answers import Decoding
from src.settings.verbs import ChatVerb

pytestmark = pytest.mark.usefixtures("one_thread")
DECODING = Decoding(temperature=0, top_p=1, max_tokens=24, seed=0, stop=[])
ASKED = "What animal goes quack?"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {"type": "object", "properties": {}}}}
]


class Parrot:
    """A speaker that gives these answers in turn, a word at a time, and takes so many messages."""

    name, raw = "parrot", False

    def __init__(self, *answers: str, room: int = 99):
        self.answers, self.room, self.heard = list(answers), room, []

    def reply(self, messages, decoding, tools=None):
        if len(messages) > self.room:
            raise TooLong(len(messages), self.room, "here")
        self.heard.append([dict(m) for m in messages])
        text = self.answers.pop(0)
        yield from re.findall(r"\S+\s*", text)
        yield Ended(text, "stop", True, 1, 1)

    def close(self):
        pass


def talk(parrot, *texts, **settings) -> Conversation:
    made = Conversation(parrot, **{"system": None, "tools": None, "forgets": True, **settings})
    for text in texts:
        list(made.ask(text, DECODING))
    return made


# ---- the conversation


def test_all_that_was_said_is_shown_to_the_model_again():
    parrot = Parrot("one", "two")
    made = talk(parrot, "a", "b", system="Be brief.")
    assert parrot.heard[1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "b"},
    ]
    assert [m["content"] for m in made.whole] == ["Be brief.", "a", "one", "b", "two"]


def test_what_is_no_text_is_none_for_the_model(monkeypatch):
    parrot = Parrot("one")
    talk(parrot, "a\udc80b")
    assert parrot.heard[0][0]["content"] == "a?b"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    refused(in_process("chat", CHAT), BadData, "not UTF-8 at byte 3", way=False)


def test_the_oldest_turns_are_forgotten_aloud(capsys):
    parrot = Parrot("1", "2", "3", room=4)
    made = talk(parrot, "a", "b", system="S")
    assert capsys.readouterr().err == ""
    list(made.ask("c", DECODING))
    assert "forgets the oldest 2 messages" in capsys.readouterr().err
    assert [m["content"] for m in parrot.heard[-1]] == ["S", "b", "2", "c"] and len(made.messages) == 6
    with pytest.raises(TooLong):
        talk(Parrot("1", room=0), "too long by itself")
    stays = talk(Parrot("1", "2", room=2), "a", forgets=False)
    with pytest.raises(TooLong):
        list(stays.ask("b", DECODING))
    assert [m["content"] for m in stays.messages] == ["a", "1"], "the turn is taken back"


def test_of_an_answer_broken_off_stays_what_was_said():
    made = talk(Parrot("one two three", "never"))
    parts = made.ask("a", DECODING)
    next(parts)
    parts.close()
    assert made.messages == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one "}]


def test_a_call_is_kept_as_one_and_waits_for_its_result():
    parrot = Parrot("I look.\n" + CALL, "Sunny.")
    made = talk(parrot, "Weather in Paris?", tools=TOOLS)
    assert made.open_calls == ["weather"] and made.messages[-1]["content"] == "I look."
    list(made.ask("sun", DECODING))
    assert [m["role"] for m in made.messages] == ["user", "assistant", "tool", "assistant"] and made.open_calls == []
    assert talk(Parrot(CALL), "Weather?").open_calls == [], "without tools it is text"


# ---- piped


@pytest.fixture
def piped(monkeypatch):
    def run(text: str, *argv):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, read=lambda: text))
        return in_process("chat", *argv)

    return run


def test_what_is_piped_in_is_one_prompt(piped):
    done = piped(f"{ASKED}\n", CHAT)
    assert (done.returncode, done.stdout) == (0, "A duck says quack.\n")
    cut = piped(ASKED, f"source={CHAT}", "decoding.max_tokens=2")
    assert cut.stdout == "A duck\n" and "[cut off at max_tokens=2]" in cut.stderr


def test_two_answer_one_after_the_other(piped):
    done = piped(ASKED, CHAT, f"compare={CHAT}")
    assert done.stdout == "[tiny-chat]\nA duck says quack.\n" * 2


@pytest.fixture(scope="module")
def server():
    running = Server(CHAT)
    yield running
    running.shutdown()
    running.server_close()


def test_a_server_answers_and_hears_how(piped, server, monkeypatch):
    server.behaviour, server.requests = Behaviour(key="sk-secret-1234567"), []
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1234567")
    done = piped(ASKED, f"endpoint.url={server.url}", "decoding.temperature=0.5", "decoding.stop=[zzz]", "decoding.max_tokens=24")
    assert done.stdout == "A duck says quack.\n", done.stderr
    body = server.requests[-1][2]
    assert {k: body[k] for k in ("temperature", "top_p", "seed", "stop", "max_tokens")} == {
        "temperature": 0.5,
        "top_p": 1,
        "seed": 0,
        "stop": ["zzz"],
        "max_tokens": 24,
    }
    assert "sk-secret" not in done.stdout + done.stderr
    server.behaviour = Behaviour(always=400, words='{"error": {"message": "the request exceeds the available context size"}}')
    refused(piped(ASKED, f"endpoint.url={server.url}"), BadData, "exceeds the available context", "begin a new one")
    server.behaviour = Behaviour(always=500)
    refused(piped(ASKED, f"endpoint.url={server.url}"), NoAnswer, "HTTP 500")


@helps("chat/__main__.py", "echo 'Hello.' | python -m src.chat PATH")
def test_nothing_piped_in_is_said(piped):
    refused(piped(" \n", CHAT), MissingInput, "stdin")
    assert piped("Hello.", CHAT).returncode == 0


@helps("core/compose.py", "name one")
def test_one_path_at_a_time(piped):
    refused(piped(ASKED, CHAT, "assets"), ConfigError, "one PATH")


def test_a_path_with_any_letters(tmp_path, piped):
    folder = tmp_path / "it's a=b, (c)"
    folder.symlink_to(CHAT)
    assert piped(ASKED, folder).stdout == "A duck says quack.\n"


@helps("chat/__main__.py", "tools=FILE names one that is there", "write a JSON list of functions there, in OpenAI's form")
def test_tools_come_from_a_file(piped, tmp_path):
    file = tmp_path / "tools.json"
    refused(piped(ASKED, CHAT, f"tools={file}"), MissingInput, file)
    file.write_text("{}")
    refused(piped(ASKED, CHAT, f"tools={file}", "tools=" + str(write(file, '"no"'))), BadData, file)
    assert piped(ASKED, CHAT, f"tools={write(file, json.dumps(TOOLS))}").returncode == 0


def write(file, text):
    file.write_text(text)
    return file


@helps("serving/opening.py", "serve it there, and give http://HOST:PORT as endpoint.url", "give the model that it was made from")
def test_a_bundle_for_a_board_is_sent_there(piped, road, server):
    from src.core import artifact

    made = road / "a" / "deploy-llama2c"
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["settings"]["target"] |= {"kind": "axera", "name": "ax650"}
    (made / "manifest.json").write_text(
        json.dumps(manifest | {"seal": artifact.seal_of({k: v for k, v in manifest.items() if k != "seal"})})
    )
    done = piped(ASKED, made)
    refused(done, WrongKind, "ax650", "on its board")
    server.behaviour = Behaviour()
    assert piped(ASKED, f"endpoint.url={server.url}").returncode == 0
    assert piped(ASKED, road / "a" / "merge").returncode == 0


# ---- on a terminal


class Typed:
    """The terminal of stand_ins/parrot.py, at which a person types."""

    def __init__(self, *argv):
        self.seen, self._from = "", 0
        self.process, self.terminal = pty.fork()
        if not self.process:
            hear_ctrl_c()
            environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
            parrot = str(ROOT / "tests" / "stand_ins" / "parrot.py")
            os.execve(sys.executable, [sys.executable, parrot, *map(str, argv)], environment | {"TERM": "xterm", "NO_COLOR": "1"})
        self.resize(100)
        self.until("Ctrl-D leaves")

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def until(self, text: str, seconds: float = 30) -> str:
        """What has been shown since the last call, up to this text."""
        end = time.monotonic() + seconds
        while (at := self.seen.find(text, self._from)) < 0:
            assert time.monotonic() < end, self.seen
            if select.select([self.terminal], [], [], 0.2)[0]:
                self.seen += os.read(self.terminal, 1 << 16).decode(errors="replace")
        found, self._from = self.seen[self._from : at], at + len(text)
        return found

    def type(self, text: str, then: str = "> ") -> str:
        """What is shown after this line, up to the next prompt."""
        os.write(self.terminal, f"{text}\n".encode())
        self.until("\r\n")  # its echo
        return self.until(then).replace("\r\n", "\n")

    def send(self, key: bytes) -> None:
        os.write(self.terminal, key)

    def press(self, key: bytes, then: str) -> None:
        """A key until it is heard: readline misses a signal that comes just before it waits for one."""
        for _ in range(10):
            self.send(key)
            with contextlib.suppress(AssertionError):
                self.until(then, 2)
                return
        raise AssertionError(self.seen)

    def end(self) -> int:
        while select.select([self.terminal], [], [], 20)[0]:
            try:
                self.seen += os.read(self.terminal, 1 << 16).decode(errors="replace")
            except OSError:
                break
        os.close(self.terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@helps(
    "chat/__main__.py",
    '/help lists them; a prompt that begins with / goes between lines of """',
    "/set shows what there is",
    "/save FILE, once something was said",
    "/save OTHER_FILE",
)
def test_prompts_and_commands(tmp_path):
    """All in one terminal, since each costs a process."""
    at = Typed()
    at.until("> ")
    assert "polly heard Hello." in at.type("Hello.")
    assert "there is no command /hepl" in at.type("/hepl")
    assert "/save FILE" in at.type("/help")
    # settings
    assert "greater than or equal to 0" in at.type("/set temperature -1")
    assert "max_tokens 24" in at.type("/set")
    at.type("/set stop ###")
    at.type("/seed 7")
    assert 'seed 7\nstop ["###"]' in at.type("/set")
    # several lines, and one that begins with a slash
    os.write(at.terminal, b'"""\n/one\ntwo\n"""\n')
    at.until("polly heard /one\r\ntwo\r\n")
    at.until("> ")
    # what was said, kept
    file = tmp_path / "said.jsonl"
    at.type("/system Be kind.")
    assert "saved" in at.type(f"/save {file}")
    messages = json.loads(file.read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"] and messages[3]["content"] == "/one\ntwo"
    assert "/save OTHER_FILE" in at.type(f"/save {file}")
    assert "assistant: polly heard Hello." in at.type("/history")
    at.type("/clear")
    assert "heard Hello" not in at.type("/history")
    assert "once something was said" in at.type("/save x")
    at.send(b"/quit\n")
    assert at.end() == 0


def test_ctrl_c_ends_an_answer_and_nothing_a_model_says_steers_the_terminal():
    at = Typed()
    at.until("> ")
    os.write(at.terminal, b"long\n")
    at.until("word word word")
    at.send(b"\x03")
    assert at.until("[stopped]").count("word") < 500
    at.until("> ")
    assert "polly heard more" in at.type("more")
    at.press(b"\x03", "leaves)")  # at the prompt
    at.until("> ")
    assert "\\x1b[2J\\x1b]0;owned\\x07\\u202edone" in at.type("steer")
    assert '[calls] look(q="\\u001b[31mred")' in at.type("call", "result of look> ")
    assert "polly heard blue" in at.type("blue")
    os.kill(at.process, signal.SIGTERM)
    assert at.end() == 128 + signal.SIGTERM
    assert "\x1b[2J" not in at.seen and "\x1b[31m" not in at.seen and "\x1b]0" not in at.seen


def test_two_side_by_side_where_there_is_room():
    at = Typed("--two")
    at.until("> ")
    assert re.search(r"polly heard Hi +│ lora heard Hi", at.type("Hi"))
    os.write(at.terminal, b"long\n")
    at.until("word word word")
    at.send(b"\x03")
    at.until("[stopped]")
    at.until("> ")
    at.resize(60)
    assert "[polly]\npolly heard Hi\n[lora]\nlora heard Hi" in at.type("Hi")
    at.send(b"\x04")
    assert at.end() == 0


def test_what_was_typed_is_kept_where_it_was_asked_for(tmp_path):
    file = tmp_path / "typed"
    for keys in (b"a secret thought\n", b"\x1b[A\n"):  # the arrow up
        at = Typed(file)
        at.until("> ")
        at.send(keys)
        at.until("polly heard a secret thought")
        at.until("> ")
        at.send(b"\x04")
        assert at.end() == 0
        assert "a secret thought" in file.read_text() and file.stat().st_mode & 0o077 == 0


def test_the_defaults_are_greedy():
    cfg = compose("chat", [], ChatVerb)
    assert cfg.decoding.temperature == 0 and cfg.history is None and cfg.overflow == "forget"
