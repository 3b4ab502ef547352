"""Measuring a running server: a real model behind a stand-in of it answers as it does locally, its speed is its real speed, and every fault has its words."""

import contextlib
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from conftest import CHAT, ROOT, go, hear_ctrl_c, helps, in_process, refused
from stand_ins.openai_server import Behaviour, Server

from src import evaluate
from src.core import artifact
from src.core.errors import ConfigError, NoAnswer, WrongKind
from src.models import checks
from src.serving import measure as served
from src.serving import protocol
from src.serving.client import Client

ASKED = ["What animal goes quack?", "Where is Ottawa?", "What is the child of a pig?"]
SHORT = ["evaluation.prompts=[" + ",".join(f"'{p}'" for p in ASKED) + "]", "evaluation.max_new_tokens=24", "evaluation.rows=3"]
KEY = "sk-stand-in-8f3b1c"


@pytest.fixture(scope="module")
def running():
    server = Server(CHAT)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(running, monkeypatch):
    """The running stand-in, without faults and with no request on its record."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    running.behaviour, running.requests = Behaviour(), []
    return running


@pytest.fixture
def measure(server, finished, tmp_path):
    """measure(*overrides, url=None) -> the finished process; the run `e` is its own."""

    def run(*argv, url=None, source=CHAT):
        usual = [
            f"dataset={finished / 'a' / 'data'}",
            *([f"source={source}"] if source else []),
            f"endpoint.url={url or server.url}",
            *SHORT,
        ]
        return in_process("evaluate", "run=e", f"outputs={tmp_path}", *usual, *argv)

    run.folder = tmp_path / "e" / f"evaluate-127.0.0.1-{server.server_port}"
    return run


def report(measure) -> dict:
    return json.loads((measure.folder / "report.json").read_text())


def rows(measure, by="model") -> list[dict]:
    return [row for line in open(measure.folder / "answers.jsonl") if (row := json.loads(line))["by"] == by]


def chats(server) -> list[dict]:
    return [body for path, _, body in server.requests if path.endswith("/chat/completions")]


def client(server, timeout=5.0) -> Client:
    return Client(server.url, timeout=timeout)


def asked(server, text=ASKED[0], max_tokens=24, **client_settings):
    return client(server, **client_settings).chat("tiny-chat", [{"role": "user", "content": text}], None, max_tokens=max_tokens)


# ---- the same figures as for a local model


@pytest.fixture(scope="module")
def local(finished, tmp_path_factory):
    """(report, answers) of the same model measured without a server."""
    out = tmp_path_factory.mktemp("local")
    assert go(evaluate, "run=l", f"outputs={out}", f"source={CHAT}", f"dataset={finished / 'a' / 'data'}", *SHORT) == 0
    folder = out / "l" / "evaluate-tiny-chat"
    return json.loads((folder / "report.json").read_text()), [json.loads(line) for line in open(folder / "answers.jsonl")]


@pytest.mark.parametrize("echo", ["ids", "text", "next", "next_pieces", "next_deaf"])
def test_all_figures_are_those_of_the_local_model(echo, measure, server, local, monkeypatch):
    server.behaviour.echo = echo
    monkeypatch.setattr(served, "FEW", 1)  # so that the likeliest next token alone is not enough
    done = measure("evaluation.expect='.*'")
    assert done.returncode == 0, done.stderr
    found, (figures, answers) = report(measure), local
    assert found["loss"] == pytest.approx(figures["loss"], abs=2e-6)
    assert found["perplexity"] == pytest.approx(figures["perplexity"], rel=1e-5)
    assert {k: found[k] for k in ("accuracy", "tokens", "turns_ended", "rows", "prompts")} == {
        k: figures[k] for k in ("accuracy", "tokens", "turns_ended", "rows", "prompts")
    }
    assert found["parent_loss"] == pytest.approx(found["loss"], abs=2e-6) and found["agreement"] == 1.0
    assert [(r["prompt"], r["answer"], r["ended"]) for r in rows(measure)] == [(a["prompt"], a["answer"], a["ended"]) for a in answers]
    assert (found["same_answers"], found["same_leading_tokens"], found["prompts_same_length"]) == (1.0, 1.0, 1.0)
    assert found["expected"] == found["parent_expected"] == sum(a["ended"] for a in answers) > 0
    assert found["served"]["id"] == "tiny-chat"
    listed = [body["logprobs"] for path, _, body in server.requests if path.endswith("/completions") and "logprobs" in body]
    assert echo not in ("next", "next_pieces") or max(listed) == 1, "a whole vocabulary is listed where nothing else tells"


def test_the_openings_of_the_validation_split_are_asked(measure, server, finished):
    assert measure("evaluation.prompts=null", "evaluation.samples=2", "evaluation.max_new_tokens=4").returncode == 0
    records = [json.loads(line) for line in open(finished / "a" / "data" / "val.jsonl")][:2]
    for body, record in zip(chats(server), records, strict=True):
        first = next(i for i, m in enumerate(record["messages"]) if m["role"] == "assistant")
        assert body["messages"] == record["messages"][:first]
        assert (body["temperature"], body["max_tokens"], body["model"]) == (0, 4, "tiny-chat")


def test_system_turn_and_tools_go_along(finished):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    cfg = evaluate.EvaluateVerb.model_validate(
        {"run": "r", "outputs": "o", "force": False, "dry_run": False, "room": "check", "source": None, "dataset": None, "parent": None}
        | {"numerics": None, "target": None, "tracker": {}}
        | {
            "evaluation": {
                "batch_size": 1,
                "max_length": 9,
                "rows": None,
                "samples": 5,
                "max_new_tokens": 9,
                "prompts": None,
                "expect": None,
                "check": "none",
                "json_schema": None,
                "general": None,
                "tasks": None,
            }
        }
        | {"endpoint": {"url": None, "model": None, "timeout": 1, "concurrency": 1}}
        | {"gate": dict.fromkeys(("kl", "top1", "perplexity_ratio", "task_drop", "forgetting"))}
    )
    assert checks.asked(cfg.evaluation, [{"messages": messages, "tools": tools}]) == [(messages[:2], tools)]
    assert "endpoint" not in cfg.model_dump(), "an evaluation without an endpoint has the settings it always had"


def test_tools_reach_the_server(server):
    tools = [{"type": "function", "function": {"name": "add"}}]
    client(server).chat("tiny-chat", [{"role": "user", "content": "Hi"}], tools, max_tokens=2)
    assert chats(server)[0]["tools"] == tools


@pytest.mark.parametrize("streams", ["yes", "refused"])
def test_tool_calls_that_a_server_keeps_apart_are_part_of_the_answer(streams, server):
    server.behaviour.streams = streams
    piece = lambda index, name, arguments: {"index": index, "function": {"name": name, "arguments": arguments}}
    whole = (piece(0, "add", '{"a": 1, "b": 2}'), piece(1, "now", ""))
    cut = (piece(0, "add", ""), piece(0, None, '{"a": 1, '), piece(1, "now", None), piece(0, None, '"b": 2}'))
    server.behaviour.calls = cut if streams == "yes" else whole
    reply = asked(server)
    assert reply.ended and [
        (c["name"], json.loads(c["arguments"]) if isinstance(c["arguments"], str) else c["arguments"]) for c in checks.calls(reply.text)
    ] == [("add", {"a": 1, "b": 2}), ("now", {})]
    server.behaviour.calls = (piece(0, "add", '{"a": '),)
    assert json.loads(asked(server).text) == {"name": "add", "arguments": '{"a": '}


def test_another_model_behind_the_url_shows(measure, server, tiny_model, local):
    """Compared with a model of random weights, the server's answers are other ones."""
    done = measure(source=tiny_model())
    assert done.returncode == 0, done.stderr
    found = report(measure)
    assert found["same_answers"] == 0.0 and found["same_leading_tokens"] < 0.5


def test_another_chat_template_behind_the_url_shows(measure, server, monkeypatch):
    monkeypatch.setattr(server.tokenizer, "chat_template", "<|im_start|>system\nBe kind.<|im_end|>\n" + server.tokenizer.chat_template)
    done = measure()
    assert "3 of 3 prompts have other lengths at the endpoint" in done.stderr
    assert report(measure)["prompts_same_length"] == 0.0


def test_shares_of_equal_tokens():
    letters = type("T", (), {"__call__": lambda self, text, **_: type("E", (), {"input_ids": [ord(c) for c in text]})})()
    row = lambda text, ended=True: {"answer": text, "ended": ended}
    found = served.likeness(
        [row("abcd"), row("ab"), row(""), row("same")], [row("abxx"), row("abcd"), row(""), row("same", False)], letters
    )
    assert found == {"same_answers": 0.25, "same_leading_tokens": (0.5 + 0.5 + 0 + 1) / 4}
    assert served.likeness([row("x") | {"error": "e"}], [row("x")], letters) == {}


def test_a_server_that_keeps_reasoning_apart_is_compared_by_what_is_said(capsys):
    """llama.cpp's takes a Qwen3's empty <think> off."""
    letters = type("T", (), {"__call__": lambda self, text, **_: type("E", (), {"input_ids": [ord(c) for c in text]})})()
    row = lambda text: {"answer": text, "ended": True}
    local = [row("<think>\n\n</think>\n\nJuly 20, 1969."), row("<think>\nhm\n</think>\n\nNo.")]
    found = served.likeness([row("July 20, 1969."), row("Yes.")], local, letters)
    assert found["same_answers"] == 0.5 and "compared by what is said behind it" in capsys.readouterr().err
    assert served.likeness(local, local, letters)["same_answers"] == 1.0 and not capsys.readouterr().err
    assert served.likeness([row("No.")], [row("Yes.")], letters)["same_answers"] == 0.0 and not capsys.readouterr().err


# ---- what a server cannot do


@pytest.mark.parametrize(
    "echo, reason",
    [
        ("no", "Only no echo is supported"),
        ("ignored", "it gives none of a prompt's tokens; it gives none of the next token's by id"),
        ("next_bos", "tokens where "),
        ("next_biased", "it counts the bias in"),
        ("shifted", "token 2 is"),
        ("other", "token 1 is"),
    ],
)
def test_without_trustworthy_log_probabilities_there_is_no_loss(echo, reason, measure, server):
    server.behaviour.echo = echo
    done = measure()
    assert done.returncode == 0, done.stderr
    assert "no log-probabilities of given tokens" in done.stderr and reason in done.stderr
    found = report(measure)
    assert not {"loss", "perplexity", "accuracy", "turns_ended", "tokens", "parent_loss", "agreement"} & found.keys()
    assert found["same_answers"] == 1.0 and "nan" not in json.dumps(found).lower() and None not in found.values()


@pytest.mark.parametrize(
    "streams, why", [("ignored", "does not stream"), ("refused", "does not stream"), ("one_piece", "sends each answer in one piece")]
)
def test_without_streaming_the_time_to_the_first_token_is_left_out(streams, why, measure, server):
    server.behaviour.streams = streams
    done = measure()
    assert done.returncode == 0 and why in done.stderr, done.stderr
    assert ("it refuses streaming (HTTP 400)" in done.stderr) == (streams == "refused")
    found = report(measure)
    assert "first_token_seconds" not in found and "tokens_per_second" not in found
    assert found["answer_seconds"] > 0 and found["same_answers"] == 1.0


def test_what_a_strict_server_refuses_is_left_out_and_said(measure, server):
    server.behaviour.refuses = ("stream_options", "repetition_penalty", "cache_prompt")
    done = measure()
    assert done.stderr.count("it refuses stream_options (token counts), repetition_penalty or cache_prompt (HTTP 400)") == 1
    assert [set(body) >= {"stream_options"} for body in chats(server)] == [True, False, False, False]
    assert "it counts no tokens, so the local tokenizer does" in done.stderr
    assert report(measure)["answer_tokens"] > 0 and "prompt_tokens" not in report(measure)


def test_without_usage_the_local_tokenizer_counts_the_same(measure, server):
    assert measure().returncode == 0
    counted = report(measure)["answer_tokens"]
    server.behaviour.usage = False
    assert measure("force=true").returncode == 0
    assert report(measure)["answer_tokens"] == counted


def test_without_a_local_model_answers_and_times_remain(measure, server):
    server.behaviour.usage = False
    done = measure(source=None)
    assert done.returncode == 0, done.stderr
    assert "no parent to compare with" in done.stderr and "there is no local tokenizer" in done.stderr
    found = report(measure)
    assert found["first_token_seconds"] > 0 and not {"same_answers", "answer_tokens", "tokens_per_second"} & found.keys()
    assert [r["by"] for r in rows(measure)] == ["model"] * 3
    refused(measure("evaluation.max_new_tokens=4", source=None), artifact_error(), "run=OTHER_NAME dataset=")


def artifact_error():
    from src.core.errors import Moved

    return Moved


# ---- speed


def test_the_time_to_the_first_token_and_the_speed_are_the_servers_own(measure, server):
    """0.4 s to the first token, 0.05 s to each further one: 20 tokens a second less what the model itself takes."""
    server.behaviour.first_delay, server.behaviour.token_delay = 0.4, 0.05
    assert measure("evaluation.rows=1").returncode == 0
    found = report(measure)
    print({k: found[k] for k in ("first_token_seconds", "first_token_seconds_p90", "tokens_per_second", "answer_seconds")})
    assert 0.4 <= found["first_token_seconds"] < 0.7 and found["first_token_seconds"] <= found["first_token_seconds_p90"] < 1
    assert 8 < found["tokens_per_second"] <= 20.2
    for row in rows(measure):
        least = 0.4 + 0.05 * (row["answer_tokens"] - 1)
        assert least <= row["seconds"] < least * 2 + 0.5


def test_waiting_for_a_busy_server_is_no_part_of_its_times(server):
    server.behaviour.statuses, server.behaviour.headers = [503], {"Retry-After": "1"}
    start = time.monotonic()
    reply = asked(server)
    assert time.monotonic() - start > 1 and reply.seconds < 1


def test_figures_by_hand(capsys):
    row = lambda first, seconds, tokens: {
        "answer": "x",
        "ended": True,
        "first_token_seconds": first,
        "seconds": seconds,
        "pieces": tokens,
        "prompt_tokens": 7,
        "cached_tokens": 2,
        "answer_tokens": tokens,
    }
    found = served.speed([row(i / 10, i / 10 + 1, 11) for i in range(1, 11)] + [{"answer": "", "ended": False, "error": "HTTP 500"}])
    assert found["first_token_seconds"] == pytest.approx(0.55) and found["first_token_seconds_p90"] == pytest.approx(0.9)
    assert found["tokens_per_second"] == pytest.approx(10) and found["answer_seconds"] == pytest.approx(1.55)
    assert (found["prompts"], found["errors"], found["prompt_tokens"], found["cached_tokens"], found["answer_tokens"]) == (
        11,
        1,
        70,
        20,
        110,
    )
    assert "20 of 70 prompt tokens in its cache" in capsys.readouterr().err


def test_several_requests_at_a_time(measure, server):
    server.behaviour.first_delay = 1
    client_ = client(server)
    start = time.monotonic()
    prompts = [([{"role": "user", "content": p}], None) for p in ASKED]
    measure.folder.mkdir(parents=True)
    found = served.ask(client_, "tiny-chat", prompts, measure.folder, max_tokens=1, workers=3, anew=False)
    assert time.monotonic() - start < 2.5 and [r["prompt"] for r in found] == ASKED


# ---- faults


def test_a_busy_server_is_asked_again_as_it_wishes(measure, server):
    server.behaviour.statuses, server.behaviour.headers = [429, 503], {"Retry-After": "1"}
    start = time.monotonic()
    done = measure()
    assert done.returncode == 0 and time.monotonic() - start > 2
    assert "busy (HTTP 429), asked again in 1 s, for up to 300 s a request" in done.stderr
    assert report(measure)["errors"] == 0


@helps("serving/client.py", "endpoint.timeout=SECONDS waits longer")
def test_a_server_that_stays_busy_ends_it(measure, server):
    server.behaviour.always, server.behaviour.words = 503, '{"error": {"message": "Loading model"}}'
    refused(measure("endpoint.timeout=1.5"), NoAnswer, "stays busy (HTTP 503): Loading model", "endpoint.timeout")
    server.behaviour.always, server.behaviour.headers = 429, {"Retry-After": "3600"}
    start = time.monotonic()
    refused(measure("endpoint.timeout=5"), NoAnswer, "HTTP 429")
    assert time.monotonic() - start < 5, "an hour is not waited for"
    server.behaviour.always, server.behaviour.statuses, server.behaviour.headers = None, [429], {"Retry-After": "2"}
    refused(measure("endpoint.timeout=1.5"), NoAnswer, "endpoint.timeout=SECONDS waits longer")
    server.behaviour.statuses = [429]
    assert measure("endpoint.timeout=5").returncode == 0


@pytest.mark.parametrize(
    "given, low, high",
    [("3", 3, 3), ("0", 0.2, 0.2), ("-5", 0.2, 0.2), (None, 4, 4), ("soon", 4, 4), ("9" * 400, 4, 4), ("²", 4, 4), ("date", 8, 10.1)],
)
def test_retry_after_in_every_spelling(given, low, high):
    given = format_datetime(datetime.now(UTC) + timedelta(seconds=10), usegmt=True) if given == "date" else given
    assert low <= protocol.seconds_to_wait(given, 2) <= high


def test_one_prompt_that_fails_is_counted_and_the_others_go_on(measure, server):
    server.behaviour.statuses, server.behaviour.words = [None, 500], '{"error": {"message": "out of \\u001b[31mKV"}}'
    done = measure()
    assert done.returncode == 0 and "1 of 3 prompts failed" in done.stderr and "\x1b" not in done.stderr
    found = report(measure)
    assert found["errors"] == 1 and found["prompts"] == 3 and found["same_answers"] == 1.0
    assert [("error" in r) for r in rows(measure)] == [False, True, False]
    assert "HTTP 500: out of  [31mKV" in rows(measure)[1]["error"]


@pytest.mark.parametrize(
    "status, words",
    [(500, "each of the 3 prompts failed"), (400, "HTTP 400: as told"), (401, "refuses requests without a key"), (404, "HTTP 404")],
)
def test_a_server_that_refuses_everything(status, words, measure, server):
    server.behaviour.always = status
    refused(measure(), NoAnswer, words, server.url, way=status in (401, 404))
    assert not measure.folder.exists()


@pytest.mark.parametrize(
    "garbage, words",
    [
        (b"data: {broken\n\n", "the reply is not JSON"),
        (b'data: {"choices": 3}\n\n', "not of OpenAI's form"),
        (b'data: {"choices": [{"delta": {"content": 5}}]}\n\n', "not of OpenAI's form"),
        (b'data: {"choices": [{"delta": {"content": [{"text": "x"}]}}]}\n\n', "not of OpenAI's form"),
        (b'data: {"choices": [{"delta": {}}], "usage": 3}\n\n', "not of OpenAI's form"),
        (b"data: [1, 2]\n\n", "not of OpenAI's form"),
        (b"data: " + b"[" * 100_000 + b"\n\n", "the reply is not JSON"),
        (b'data: {"error": {"message": "slot\\u0007 lost"}}\n\n', "failed in the middle of an answer"),
        (b'error: {"message": "slot lost"}\n\n', "failed in the middle of an answer"),
        (b'{"choices": []}\n', "not made of server-sent events"),
        (b": still here\n\n", "cut off after 0 pieces"),
        (b"\xff\xfe\x00\n\n", "cut off"),
    ],
)
def test_a_stream_of_anything_else_is_told(garbage, words, server):
    server.behaviour.garbage = garbage
    with pytest.raises(NoAnswer) as caught:
        asked(server, timeout=2)
    assert words in str(caught.value) and server.url in str(caught.value) and "\x07" not in str(caught.value)


@pytest.mark.parametrize(
    "garbage",
    [b"<html>hello", b"{}", b'{"choices": []}', b'{"choices": [{"message": "x"}]}', b'{"choices": [{}]}', b"null", b"[" * 100_000],
)
def test_a_reply_of_anything_else_is_told(garbage, server):
    server.behaviour.garbage, server.behaviour.streams = garbage, "ignored"
    with pytest.raises(NoAnswer, match=r"not JSON|OpenAI's form"):
        asked(server, timeout=2)


@helps("serving/client.py", "the same command goes on after the answers it has")
def test_a_stream_that_is_cut_loses_no_answer_that_came_before(measure, server):
    """The second answer breaks off; the same command asks for that one and the next only, and says so."""
    ask = Server.tokens
    cut = {"at": 2, "seen": 0}

    def tokens(self, ids, limit):
        cut["seen"] += 1
        self.behaviour.cut_after = 2 if cut["seen"] == cut["at"] else None
        return ask(self, ids, limit)

    server.tokens = tokens.__get__(server)
    try:
        refused(measure(), NoAnswer, "the stream was cut off after 2 pieces", "same command goes on")
        partial = measure.folder.with_name(measure.folder.name + ".partial")
        assert (partial / served.RECEIVED).read_text().count("\n") == 1
        with open(partial / served.RECEIVED, "a") as file:
            file.write('{"model": "tiny-chat", "index": 1, "row": 7}\n[]\n{"model": "another", "index": 1, "row": {}}\n{"model": "tiny-ch')
        server.requests.clear()
        done = measure()
    finally:
        del server.tokens
    assert done.returncode == 0 and "1 of 3 answers kept from before the interruption" in done.stderr
    assert [body["messages"][0]["content"] for body in chats(server)] == ASKED[1:]
    assert [r["prompt"] for r in rows(measure)] == ASKED and report(measure)["same_answers"] == 1.0
    assert sorted(p.name for p in measure.folder.iterdir()) == ["answers.jsonl", "manifest.json", "report.json"]


def test_half_characters_and_infinities_do_not_reach_a_file(measure, server):
    """Split emoji are put together; what stays half becomes the replacement character. A description that no manifest can hold is left out."""
    server.behaviour.models = [{"id": "tiny-chat", "n": float("nan"), "half": "\ud83d"}]
    reply = {"choices": [{"message": {"content": "\ud83d\ude00 \ud83d"}, "finish_reason": "stop"}]}
    server.behaviour.garbage, server.behaviour.streams = json.dumps(reply).encode(), "ignored"
    done = measure()
    assert done.returncode == 0, done.stderr
    assert {r["answer"] for r in rows(measure)} == {"😀 \ufffd"} and report(measure)["served"] == {"id": "tiny-chat"}
    server.behaviour.models = ["half \ud83d"]
    refused(measure("force=true"), NoAnswer, "not of OpenAI's form")


@helps("serving/client.py", "give the address of an OpenAI-compatible API as endpoint.url")
@pytest.mark.parametrize("models", [[{"id": 7}], [{}], ["a"] * 3, [{"id": "x" * 10_000}]])
def test_lists_of_anything_else(models, measure, server):
    server.behaviour.models = models
    done = measure("evaluation.max_new_tokens=2")
    assert done.returncode in (0, NoAnswer.exit_code) and "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0 or ("not of OpenAI's form" in done.stderr and "an OpenAI-compatible API as endpoint.url" in done.stderr)
    server.behaviour.models = ["tiny-chat"]
    assert done.returncode == 0 or measure("evaluation.max_new_tokens=2").returncode == 0


@pytest.mark.parametrize(
    "logprobs",
    [
        7,
        {"tokens": 3},
        {"tokens": [[1]] * 30, "token_logprobs": [0] * 30, "top_logprobs": [{}] * 30},
        {"tokens": ["x"] * 30, "token_logprobs": [float("nan")] * 30, "top_logprobs": [{"x": 0}] * 30},
        {"tokens": ["x"] * 30, "token_logprobs": ["a"] * 30, "top_logprobs": [{"x": "a", "y": 1}] * 30},
        {"content": [{"top_logprobs": [{"id": [1], "logprob": 0}]}]},
        {"content": [{"top_logprobs": [{"id": 1, "logprob": "much"}]}]},
        {"content": [7]},
    ],
)
def test_log_probabilities_of_anything_else(logprobs, server, monkeypatch):
    monkeypatch.setattr(server, "echoed", lambda ids: logprobs)
    server.behaviour.echo = "ids"
    for ask in (lambda: client(server).echo("m", [5] * 30), lambda: client(server).following("m", [5] * 30, 4, whole=7)):
        try:
            ask()
        except NoAnswer:
            continue
        assert ask().logprobs[0] != ask().logprobs[0], "NaN is for the one who sums up to refuse"
    row = type("Row", (), {"input_ids": [5] * 30, "labels": [5] * 30})
    assert served._way(client(server), "m", row, server.tokenizer) is None


def test_a_silent_server_is_given_up(server):
    server.behaviour.first_delay = 3
    start = time.monotonic()
    with pytest.raises(NoAnswer, match=r"silent for 0\.5 s"):
        asked(server, timeout=0.5)
    assert time.monotonic() - start < 2


def test_a_server_that_only_says_it_is_alive_is_given_up(running):
    """Comments keep the connection busy without an answer ever coming."""

    class Alive(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b": ping\n\n")
                    time.sleep(0.1)
            except OSError:
                pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Alive) as alive:
        threading.Thread(target=alive.serve_forever, daemon=True).start()
        with pytest.raises(NoAnswer, match="silent for 1 s"):
            Client(f"http://127.0.0.1:{alive.server_port}", timeout=1).chat("m", [], None, max_tokens=4)
        alive.shutdown()


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
PIECE = b'data: {"choices": [{"delta": {"%s": "a"}}]}\n\n'
# What a server sends: at once, then again and again, so many seconds apart; and what is said of it.
ENDLESS = {
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.001, "silent for 0.3 s"),
    "a header byte by byte": (b"HTTP/1.1 200 OK\r\nX: ", b"a", 0.05, "silent for 0.3 s"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: a\r\n", 0.05, "silent for 0.3 s"),
    "a reply byte by byte": (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n", b" ", 0.05, "silent for 0.3 s"),
    "a refusal byte by byte": (b"HTTP/1.1 500 No\r\nContent-Length: 99999999\r\n\r\n", b" ", 0.05, "HTTP 500"),
    "an event byte by byte": (STREAM + b"data: ", b" ", 0.05, "silent for 0.3 s"),
    "events of nothing": (STREAM, b'data: {"choices": [{"delta": {}}]}\n\n', 0.05, "silent for 0.3 s"),
    "text": (STREAM, PIECE % b"content", 0.1, "not whole after 3 s"),
    "reasoning": (STREAM, PIECE % b"reasoning", 0.01, "not whole after 3 s"),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_what_never_ends_is_given_up(what):
    first, again, every, words = ENDLESS[what]

    def serve(listening):
        with listening.accept()[0] as connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(first)
            while True:
                connection.sendall(again)
                time.sleep(every)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        start = time.monotonic()
        with pytest.raises(NoAnswer, match=words):
            Client(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=0.3).chat("m", [], None, max_tokens=4000)
        assert time.monotonic() - start < 4


def test_a_server_that_is_slow_and_busy_is_given_up(server, monkeypatch):
    """Each refusal takes long, so it is the time that counts, not what is waited between."""
    monkeypatch.setattr(server, "verify_request", lambda *_: time.sleep(0.4) or True)
    server.behaviour.always, server.behaviour.headers = 503, {"Retry-After": "0"}
    start = time.monotonic()
    with pytest.raises(NoAnswer, match="stays busy"):
        asked(server, timeout=1)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("count", [-5, True, 10**30, 10**400, 1.5, "7"])
def test_what_is_no_count_of_tokens_is_none(server, count):
    usage = {"prompt_tokens": count, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": count}}
    events = [{"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}, {"choices": [], "usage": usage}]
    server.behaviour.garbage = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    reply = asked(server)
    assert (reply.text, reply.prompt_tokens, reply.tokens, reply.cached) == ("a", None, None, 0)


def test_a_log_probability_beyond_numbers_is_told(server, monkeypatch):
    monkeypatch.setattr(
        server, "echoed", lambda ids: {"tokens": ["x"] * 2, "token_logprobs": [None, -(10**400)], "top_logprobs": [None, {"x": 0}]}
    )
    server.behaviour.echo = "ids"
    with pytest.raises(NoAnswer, match="OpenAI's form"):
        client(server).echo("m", [5, 5])


def test_a_server_that_ignores_the_limit_is_stopped(server):
    server.behaviour.garbage = b"data: " + json.dumps({"choices": [{"delta": {"content": "x" * 5000}}]}).encode() + b"\n\n"
    with pytest.raises(NoAnswer, match="long after max_tokens=4"):
        asked(server, max_tokens=4)


@helps("serving/client.py", "start the server there, listening on all interfaces (0.0.0.0) if it is another machine")
@helps("serving/client.py", "http://HOST:PORT of the server as endpoint.url, if that is another")
def test_nothing_there(measure, server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    refused(measure(url=f"http://127.0.0.1:{port}"), NoAnswer, "nothing listens there", f"127.0.0.1:{port}", "0.0.0.0")
    refused(measure(url="http://no-such-host.invalid:8000"), NoAnswer, "no-such-host.invalid")
    refused(measure(url=f"http://{'a' * 70}.invalid"), NoAnswer, "no connection", "http://HOST:PORT of the server as endpoint.url")
    assert measure(f"endpoint.url={server.url}", "evaluation.max_new_tokens=2").returncode == 0


@helps("serving/client.py", "http://HOST:PORT as endpoint.url, for a server without TLS")
def test_a_server_of_another_protocol(server):
    with pytest.raises(NoAnswer, match="no secure connection") as told:
        Client(server.url.replace("http:", "https:"), timeout=2).models()
    assert told.value.fix == ["http://HOST:PORT as endpoint.url, for a server without TLS"] and Client(server.url, timeout=2).models()
    with socket.create_server(("127.0.0.1", 0)) as ssh:
        threading.Thread(target=lambda: ssh.accept()[0].sendall(b"SSH-2.0-OpenSSH_9.2\r\n"), daemon=True).start()
        with pytest.raises(NoAnswer, match=r"SSH-2\.0"):
            Client(f"http://127.0.0.1:{ssh.getsockname()[1]}", timeout=2).models()


# ---- models


@helps("serving/measure.py", "endpoint.model=NAME chooses one")
def test_which_model_is_asked(measure, server):
    server.behaviour.models = ["a", "b\x1b[31m"]
    refused(measure(), ConfigError, "serves 2 models: 'a', 'b\\x1b[31m'", "endpoint.model=NAME")
    refused(measure("endpoint.model=c"), ConfigError, "does not serve 'c', but 'a'")
    assert measure("endpoint.model=a").returncode == 0
    assert {body["model"] for body in chats(server)} == {"a"}


@helps("serving/measure.py", "endpoint.model=NAME, for a server that does not list its models")
def test_a_server_that_lists_no_models(measure, server):
    server.behaviour.lists_models = False
    refused(measure(), NoAnswer, "HTTP 404", "endpoint.model=NAME")
    assert measure("endpoint.model=tiny-chat").returncode == 0
    assert report(measure)["served"] == {"id": "tiny-chat"}


# ---- the key, and where it goes


def everything_written(folder) -> str:
    return "".join(p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file())


def test_the_key_goes_to_the_server_and_nowhere_else(measure, server, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.behaviour.key, server.behaviour.models = KEY, [f"model-{KEY}"]
    done = measure()
    assert done.returncode == 0, done.stderr
    assert {headers.get("Authorization") for _, headers, _ in server.requests} == {f"Bearer {KEY}"}
    assert "with the key in OPENAI_API_KEY (unencrypted, over http)" in done.stderr
    assert KEY not in done.stderr + done.stdout + everything_written(tmp_path)
    assert report(measure)["served"]["id"] == "model-***"


def test_a_key_in_two_pieces_or_escaped_is_masked(measure, server, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    parts = [KEY[:5], f"{KEY[5:]} {''.join(f'{chr(92)}u{ord(c):04x}' for c in KEY)}"]
    events = [{"choices": [{"delta": {"content": part}, "finish_reason": None}]} for part in parts]
    server.behaviour.garbage = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in [*events, {"choices": [STOP]}])
    done = measure(source=None)
    assert done.returncode == 0, done.stderr
    assert {row["answer"] for row in rows(measure)} == {"*** ***"}
    assert KEY not in done.stderr + everything_written(tmp_path) and r"\u0073" not in everything_written(tmp_path)


STOP = {"delta": {}, "finish_reason": "stop"}


@helps("serving/protocol.py", "export {}=... with the key it wants", "export {}=... with the key alone", "unset {}")
def test_a_wrong_key_is_told_without_showing_it(measure, server, monkeypatch, tmp_path):
    """The server's own words hold the key it got."""
    server.behaviour.key = "another"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    done = measure()
    refused(done, NoAnswer, "refuses the key in OPENAI_API_KEY (HTTP 401): wrong key: Bearer ***")
    assert KEY not in done.stderr + everything_written(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX-Other: 1")
    done = measure()
    refused(done, ConfigError, "OPENAI_API_KEY holds", "export OPENAI_API_KEY=... with the key alone", "unset OPENAI_API_KEY")
    assert KEY not in done.stderr
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    assert measure("evaluation.max_new_tokens=2").returncode == 0
    monkeypatch.delenv("OPENAI_API_KEY")
    server.behaviour.key = None
    assert measure("evaluation.max_new_tokens=2", "force=true").returncode == 0


@helps("serving/protocol.py", "if you trust that address, give it as {}")
def test_no_redirect_is_followed(measure, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(0.2)
        server.behaviour.always = 307
        server.behaviour.headers = {"Location": f"http://user:secret@127.0.0.1:{elsewhere.getsockname()[1]}/v1?token=secret"}
        done = measure()
        there = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/v1"
        refused(done, NoAnswer, f"sends us on to {there}, which is not followed", "if you trust that address, give it as endpoint.url")
        assert "secret" not in done.stderr
        with pytest.raises(TimeoutError):
            elsewhere.accept()
    server.behaviour.headers = {"Location": f"{server.url}/v1"}
    told = measure()
    server.behaviour.always = None
    assert measure(url=re.search("on to ([^ ,]+)", told.stderr)[1]).returncode == 0


@pytest.mark.parametrize(
    "url, words",
    [
        ("http://me:secret@127.0.0.1:8000", "user name or password"),
        ("http://me@127.0.0.1:8000", "user name or password"),
        ("127.0.0.1:8000", "must begin with http://"),
        ("board.local", "must begin with http://"),
        ("ftp://127.0.0.1", "must begin with http://"),
        ("http://", "must begin with http://"),
        ("http://127.0.0.1:99999", "not an address"),
        ("http://[::1", "not an address"),
        ("http://127.0.0.1:8000/v1?key=secret", "plain address"),
        ("http://127.0.0.1:8000/a b", "plain address"),
        ("http://127.0.0.1:8000/v1/chat/completions", "names the server, not a request"),
    ],
)
def test_addresses_that_are_none(url, words, measure):
    done = measure(url=f"'{url}'")
    refused(done, ConfigError, words)
    assert "secret" not in done.stderr


@helps("evaluate.py", "leave parent out")
def test_settings_that_make_no_sense(measure, finished):
    done = in_process("evaluate", "run=e", "endpoint.model=x")
    refused(done, ConfigError, "of use with endpoint.url only")
    refused(in_process("evaluate", "run=e", "endpoint=http://127.0.0.1:8000"), ConfigError, "endpoint=http://127.0.0.1:8000: ")
    refused(measure(f"parent={CHAT}"), ConfigError, "leave parent out")
    assert measure("dry_run=true").returncode == 0
    refused(measure(source=finished / "a" / "data"), WrongKind, "not dataset")


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_an_address_with_or_without_v1(end):
    assert protocol.api_of(f"http://h:8000{end}") == "http://h:8000/v1"


# ---- the artifact


def test_what_it_is_made_from(measure, server, finished, tmp_path):
    assert measure().returncode == 0
    found = artifact.open_artifact(measure.folder)
    assert found.kind == "report" and [p["role"] for p in found.manifest["parents"]] == ["parent", "dataset"]
    assert found.settings["endpoint"] == {"url": server.url, "model": None, "concurrency": 1}
    assert artifact.verify(found) == []
    count = len(server.requests)
    assert "up to date, skipped" in measure().stderr and len(server.requests) == count
    assert measure("force=true").returncode == 0 and len(server.requests) > count
    table = in_process("summary", "run=e", f"outputs={tmp_path}").stdout
    assert "100% of answers as the parent's, first token 0." in table and "tokens/s" in table


def test_a_bundle_names_the_model_it_was_built_from(measure, server, finished):
    done = measure("dry_run=true", source=finished / "a" / "deploy-llama2c")
    assert done.returncode == 0, done.stderr
    assert f"from parent: {finished / 'a' / 'merge'}" in done.stderr


def test_in_a_run_its_merge_is_the_parent(server, finished):
    done = in_process("evaluate", "run=a", f"outputs={finished}", f"endpoint.url={server.url}", "dry_run=true")
    assert done.returncode == 0 and f"from parent: {finished / 'a' / 'merge'}" in done.stderr
    assert f"{server.url}/v1, the one model it serves, without a key" in done.stderr and "asks 5 prompts" in done.stderr


def test_a_plan_sends_nothing_and_loads_no_torch(server, finished, tmp_path):
    code = (
        "import atexit, runpy, sys\natexit.register(lambda: print('LOADED', [m for m in ('torch', 'transformers') if m in sys.modules]))\n"
        "sys.argv = sys.argv[1:]\nrunpy.run_module('src.evaluate', run_name='__main__', alter_sys=True)"
    )
    argv = [
        "evaluate",
        "run=e",
        f"outputs={tmp_path}",
        f"source={CHAT}",
        f"dataset={finished / 'a' / 'data'}",
        f"endpoint.url={server.url}",
    ]
    done = subprocess.run([sys.executable, "-c", code, *argv, "dry_run=true"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "LOADED []" in done.stdout, done.stderr
    assert server.requests == [] and not (tmp_path / "e").exists()


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ctrl_c_ends_it_at_once_and_keeps_the_answers(workers, measure, server, finished, tmp_path):
    server.behaviour.token_delay = 0.2
    argv = ["run=e", f"outputs={tmp_path}", f"dataset={finished / 'a' / 'data'}", f"endpoint.url={server.url}", *SHORT]
    child = subprocess.Popen(
        [sys.executable, "-m", "src.evaluate", *argv, f"endpoint.concurrency={workers}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_ctrl_c,
    )
    journal = measure.folder.with_name(measure.folder.name + ".partial") / served.RECEIVED
    limit = time.monotonic() + 40
    while time.monotonic() < limit and not (journal.is_file() and journal.stat().st_size):
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, err = child.communicate(timeout=20)
    assert child.returncode == 130 and "Traceback" not in err, err
    assert time.monotonic() - start < 10
    kept = journal.read_text().count("\n")
    assert 1 <= kept < 3
