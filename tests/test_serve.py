"""python -m src.serve: OpenAI's protocol with evaluate's answers behind it, closed to all that it is not for; and the page, in a browser."""

import asyncio
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import browser
import pytest
from conftest import CHAT, ROOT, helps, in_process, refused, ways

from src import serve
from src.core.artifact import outside
from src.core.errors import ConfigError, MissingInput, NoMemory
from src.models.speaking import Ended, ModelSpeaker
from src.serving.server import Server, named
from src.settings.answers import Decoding

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = "k-0123456789abcdef"
DECODING = Decoding(temperature=0, top_p=1, max_tokens=24, seed=0, stop=[])
ASKED = "What animal goes quack?"


class Slow:
    """A speaker that says a word each hundredth of a second, until it is told to end."""

    name, raw = "slow", False

    def __init__(self):
        self.over, self.running = threading.Event(), 0

    def reply(self, messages, decoding, tools=None):
        self.running += 1
        try:
            for _ in range(decoding.max_tokens):
                if self.over.wait(0.01):
                    break
                yield "word "
            yield Ended("word " * decoding.max_tokens, "length", False, 1, decoding.max_tokens)
        finally:
            self.running -= 1

    def close(self):
        self.over.set()


def begun(speakers, **settings):
    made = Server("127.0.0.1", 0, **{"key": None, "decoding": DECODING, "waiting": 4, "page": serve.PAGE.read_bytes(), **settings})
    made.listen(named(speakers))
    thread = threading.Thread(target=made.run)
    thread.start()
    return made, thread


def ended(made, thread) -> None:
    made.shutdown()
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def served():
    made, thread = begun([ModelSpeaker(outside(CHAT, "model"), "tiny-chat")])
    yield made
    ended(made, thread)


def send(made, method: str, path: str, body=None, **headers) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", made.server_port, timeout=30)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, text


def ask(made, **body) -> tuple[int, dict]:
    status, text = send(made, "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": ASKED}], **body})
    return status, json.loads(text)


# ---- the protocol


def test_evaluate_finds_its_own_answers_and_probabilities(served, finished, tmp_path):
    usual = [
        f"dataset={finished / 'a' / 'data'}",
        f"source={CHAT}",
        f"endpoint.url={served.url}",
        "evaluation.max_new_tokens=24",
        "evaluation.rows=3",
    ]
    done = in_process("evaluate", "run=e", f"outputs={tmp_path}", *usual)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "e" / f"evaluate-127.0.0.1-{served.server_port}" / "report.json").read_text())
    assert (found["same_answers"], found["same_leading_tokens"], found["prompts_same_length"], found["agreement"]) == (1.0, 1.0, 1.0, 1.0)
    assert found["loss"] == pytest.approx(found["parent_loss"], abs=2e-6) and found["errors"] == 0
    assert found["served"]["id"] == "tiny-chat"


def test_an_answer_whole_and_in_a_stream(served):
    status, whole = ask(served)
    assert (
        status == 200
        and whole["choices"][0]["message"]["content"] == "A duck says quack."
        and whole["choices"][0]["finish_reason"] == "stop"
    )
    assert whole["usage"]["completion_tokens"] > 3 and whole["model"] == "tiny-chat"
    body = {"messages": [{"role": "user", "content": ASKED}], "stream": True, "stream_options": {"include_usage": True}}
    _, text = send(served, "POST", "/v1/chat/completions", body)
    *events, last = [line.removeprefix("data: ") for line in text.strip().split("\n\n")]
    assert last == "[DONE]" and json.loads(events[-1])["usage"] == whole["usage"]
    assert "".join(c["delta"].get("content", "") for e in events for c in json.loads(e)["choices"]) == "A duck says quack."


def test_a_request_says_how(served):
    assert ask(served, max_tokens=2)[1]["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "A duck"},
        "finish_reason": "length",
    }
    assert ask(served, stop=" says")[1]["choices"][0]["message"]["content"] == "A duck"
    drawn = [ask(served, temperature=3, seed=seed, max_tokens=12)[1]["choices"][0]["message"]["content"] for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1


@pytest.mark.parametrize(
    "body, status, words",
    [
        ({"temperature": -1}, 400, "temperature"),
        ({"stop": [""]}, 400, "stop"),
        ({"n": 2}, 400, "n is not done here"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"messages": "hi"}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "half a character"),
        ({"stream_options": 3, "temperature": "hot"}, 400, "temperature"),
        ({"messages": [{"role": "user", "content": "quack " * 600}]}, 400, "the conversation takes"),
        ({"model": "other"}, 404, "tiny-chat"),
    ],
)
def test_what_is_not_done_is_refused(served, body, status, words):
    got, told = ask(served, **body)
    assert got == status and words in told["error"]["message"], told


@pytest.mark.parametrize(
    "path, body, status",
    [
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b"[" * 9999, 400),
        ("/v1/nothing", b"{}", 404),
        ("/v1/completions", {"prompt": [1]}, 501),
    ],
)
def test_damaged_requests(served, path, body, status):
    assert send(served, "POST", path, body)[0] == status
    assert send(served, "GET", "/nothing")[0] == 404
    connection = http.client.HTTPConnection("127.0.0.1", served.server_port, timeout=5)
    connection.request("POST", "/v1/chat/completions", headers={"Content-Length": str(1 << 40)})
    assert connection.getresponse().status == 413


def test_pages_of_other_sites_are_refused(served):
    assert send(served, "GET", "/v1/models")[0] == 200
    assert send(served, "GET", "/v1/models", Host="evil.example")[0] == 403
    assert send(served, "GET", "/v1/models", Host="[")[0] == 403
    assert send(served, "GET", "/v1/models", Origin="http://evil.example")[0] == 403
    assert send(served, "GET", "/v1/models", Origin=f"http://127.0.0.1:{served.server_port}")[0] == 200


def test_a_key_is_demanded_and_never_shown():
    made, thread = begun([Slow()], key=KEY)
    try:
        assert send(made, "GET", "/")[0] == 200, "the page holds no secret"
        for wrong in ({}, {"Authorization": "Bearer no"}, {"Authorization": KEY}):
            status, text = send(made, "GET", "/v1/models", **wrong)
            assert status == 401 and KEY not in text
        assert send(made, "GET", "/v1/models", Authorization=f"Bearer {KEY}")[0] == 200
    finally:
        ended(made, thread)


def test_too_many_are_told_to_come_again_and_who_leaves_ends_its_answer():
    slow = Slow()
    made, thread = begun([slow], waiting=1)
    try:
        open_now = []
        for _ in range(2):
            connection = http.client.HTTPConnection("127.0.0.1", made.server_port, timeout=30)
            connection.request(
                "POST",
                "/v1/chat/completions",
                json.dumps({"messages": [{"role": "user", "content": "a"}], "stream": True, "max_tokens": 9999}),
            )
            open_now.append(connection.getresponse())
            open_now[-1].read(200)
        status, told = ask(made)
        assert status == 503 and "wait" in told["error"]["message"]
        for reply in open_now:
            reply.close()
        end = time.monotonic() + 20
        while slow.running and time.monotonic() < end:
            time.sleep(0.02)
        assert not slow.running
        assert ask(made, max_tokens=1)[0] == 200
    finally:
        ended(made, thread)


def test_a_connection_that_waits_keeps_nobody_waiting():
    made, thread = begun([Slow()])
    with socket.create_connection(("127.0.0.1", made.server_port)) as idle:
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert b"200" in idle.recv(1 << 12)
        start = time.monotonic()
        ended(made, thread)
        assert time.monotonic() - start < 10


def test_two_of_one_name_have_two_names():
    assert list(named([Slow(), Slow()])) == ["slow", "slow 2"]


# ---- the verb


@helps(
    "serve.py",
    "export {}=... with a key of your own",
    "listen.host=127.0.0.1 is for this machine alone",
    'export {}="$(openssl rand -hex 16)"',
)
def test_others_are_let_in_with_a_key_alone(monkeypatch):
    monkeypatch.delenv("BOARDWALK_API_KEY", raising=False)
    plan = lambda *argv: in_process("serve", CHAT, "dry_run=true", *argv)
    done = plan("listen.host=0.0.0.0")
    refused(done, ConfigError, "lets others in", "BOARDWALK_API_KEY")
    assert plan(ways(done)[1].split()[0]).returncode == 0
    monkeypatch.setenv("BOARDWALK_API_KEY", "short")
    refused(plan("listen.host=0.0.0.0"), ConfigError, "shorter than 16")
    monkeypatch.setenv("BOARDWALK_API_KEY", KEY)
    done = plan("listen.host=0.0.0.0")
    assert done.returncode == 0 and KEY not in done.stderr
    assert plan("listen.host=::1").returncode == 0 and serve.is_own("localhost") and not serve.is_own("example.org")


@helps("serving/server.py", "listen.port=0 takes a free port", "listen.host=127.0.0.1 is this machine's own")
def test_a_port_in_use_and_an_address_of_another_machine():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(in_process("serve", CHAT, f"listen.port={port}"), ConfigError, f"port {port}", "listen.port=0")
    with pytest.raises(ConfigError, match="cannot listen"):
        Server("192.0.2.1", 0, key=KEY, decoding=DECODING, waiting=1, page=b"")
    Server("127.0.0.1", 0, key=None, decoding=DECODING, waiting=1, page=b"").server_close()


def test_a_model_that_is_missing_and_no_memory(monkeypatch, tmp_path):
    refused(in_process("serve", tmp_path / "nothing"), MissingInput, "nothing", way=False)
    from src.core import memory

    monkeypatch.setattr(memory, "available", lambda: 1000)
    monkeypatch.setattr(memory, "swap", lambda: 0)
    refused(in_process("serve", CHAT), NoMemory, "memory")


SLOWLY = """
import sys; sys.path[:0] = ["tests", "."]
from test_serve import Slow
from src import serve
from src.core import stage
serve.opening.open_speaker = lambda *_: Slow()
sys.exit(stage.guarded(lambda: serve.serve(sys.argv[1:])))
"""


def test_sigterm_ends_it_cleanly():
    """A process of its own, in which a request is under way."""
    argv = [sys.executable, "-c", SLOWLY, str(CHAT), "listen.port=0"]
    process = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    line = next(line for line in process.stderr if "/v1" in line)
    connection = http.client.HTTPConnection("127.0.0.1", int(line.split("/v1")[0].rpartition(":")[2]), timeout=30)
    body = {"messages": [{"role": "user", "content": "Tell me a story."}], "stream": True, "max_tokens": 9999}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    reply = connection.getresponse()
    assert b"data" in reply.readline()
    process.send_signal(signal.SIGTERM)
    rest = reply.read()
    assert process.wait(30) == 0 and process.stderr.read() == "serve: ended\n"
    assert b"[DONE]" not in rest and b'"length"' not in rest, "a client is not told that the answer is whole"


# ---- the page


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium")
def test_the_page_talks_compares_and_fits_a_phone(served, tmp_path):
    async def work():
        async with browser.opened(served.url, tmp_path / "profile") as page:
            await page.until("panes.length === 1")
            text = "What animal goes <b>quack</b>?"
            await page.run(f"$('text').value = {json.dumps(text)}; ask()")
            assert await page.run("panes[0].log.querySelector('.user').textContent") == text
            assert await page.run("panes[0].log.querySelectorAll('b').length") == 0, "text is no markup"
            first = await page.run("panes[0].messages[1].content")
            await page.run("$('compare').click(); $('text').value = 'Where is Ottawa?'; ask()")
            assert await page.run("panes.map(pane => pane.messages.length)") == [4, 2]
            assert await page.run("panes[1].messages[1].content") and first
            for width in (1200, 360):
                for dark in (False, True):
                    await page.shape(width, 800, dark=dark)
                    assert await page.run("document.documentElement.scrollWidth") <= width
                    ink, paper = await page.run("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
                    assert (brightness(ink) > brightness(paper)) == dark and abs(brightness(ink) - brightness(paper)) > 150
            beside = "(() => { const [a, b] = panes.map(pane => pane.root.getBoundingClientRect()); return a.right <= b.left ? 'beside' : 'below'; })()"
            assert await page.run(beside) == "below"
            await page.shape(1200, 800)
            assert await page.run(beside) == "beside"
            await page.run("$('anew').click()")
            assert await page.run("panes.map(pane => pane.messages.length)") == [0, 0]
            await page.run("panes[0].fields.temperature.value = '-1'; $('text').value = 'Hi'; ask()")
            assert "temperature" in await page.run("panes[0].log.querySelector('.fault').textContent")
            assert page.problems == [p for p in page.problems if "400" in p], page.problems

    asyncio.run(work())


def brightness(color: str) -> float:
    return sum(float(part) for part in color[4:-1].split(",")[:3]) / 3


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium")
def test_the_page_asks_for_the_key_and_stops_an_answer(tmp_path):
    made, thread = begun([Slow()], key=KEY)

    async def work():
        async with browser.opened(made.url, tmp_path / "profile") as page:
            await page.until("$('lock').open")
            await page.run(f"$('key').value = '{KEY}'; $('lock').close()")
            await page.until("panes.length === 1")
            await page.run("panes[0].fields.max_tokens.value = '5000'; $('text').value = 'Hi'; ask(); 0")
            await page.until("panes[0].log.lastChild.textContent.length > 20")
            await page.run("$('stop').click(); 0")
            await page.until("!under_way")
            assert await page.run("panes[0].log.lastChild.textContent") == "Stopped."
            assert (await page.run("panes[0].messages[1].content")).startswith("word word")
            assert KEY not in await page.run("document.documentElement.outerHTML")

    try:
        asyncio.run(work())
    finally:
        ended(made, thread)
