"""Limits and replies by themselves: what a reply of any shape means, how fast and how much is asked, when a run stops."""

import asyncio
import json
import random
import time

import pytest
from conftest import CHAT, helps
from test_config import composed

from src.core.errors import BudgetSpent, ConfigError, NoAnswer, ProofFailed
from src.distill import limits
from src.distill.dispatch import value_of
from src.distill.endpoint import Failed, RemoteTeacher
from src.distill.pipeline import Record, Request, SetAside, Work, check_flows, through
from src.serving import protocol
from src.settings.verbs import Budget


def teacher(*overrides: str) -> RemoteTeacher:
    return RemoteTeacher(composed("distill", "teacher.model=m", *overrides).teacher)


def request(**changes) -> Request:
    return Request(**{"messages": [{"role": "user", "content": "Hi"}], "temperature": 0.5, "top_p": 1.0, "max_tokens": 10} | changes)


def chat(text="fine", finish="stop", **message) -> dict:
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    return {"choices": [{"message": {"content": text, **message}, "finish_reason": finish}], "usage": usage}


# ---- what makes two requests one


def test_a_request_is_known_by_what_is_asked_and_of_whom_not_by_where():
    here, there = teacher("teacher.url=http://127.0.0.1:1"), teacher("teacher.url=https://elsewhere.example/v1")
    key = here.key_of(request())
    assert key == there.key_of(request()) == here.key_of(request(teacher="judge"))
    others = [request(seed=1), request(max_tokens=11), request(temperature=0.6), request(top_p=0.9), request(schema={"type": "object"})]
    others += [request(messages=[{"role": "user", "content": "Ho"}]), request(messages=[], prefix="Hi"), request(stop=("x",))]
    keys = {here.key_of(other) for other in others} | {teacher("teacher.revision=2").key_of(request())}
    keys |= {teacher("teacher.model=n").key_of(request()), teacher("teacher.extra={a: 1}").key_of(request())}
    assert key not in keys and len(keys) == len(others) + 3


def test_what_is_sent_is_what_the_server_is_said_to_take():
    body = teacher().body_of(request(schema={"type": "object"}, stop=("END",)), 7)
    assert body["seed"] == 7 and body["max_tokens"] == 10 and body["stop"] == ["END"]
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    plain = teacher("teacher.seed=false", "teacher.structured=none", "teacher.token_limit=max_completion_tokens", "teacher.extra={a: 1}")
    body = plain.body_of(request(schema={"type": "object"}), 7)
    assert body.keys() == {"model", "max_completion_tokens", "temperature", "top_p", "messages", "a"}
    assert teacher("teacher.structured=json_object").body_of(request(schema={}, messages=[], prefix="<|user|>"), 0)["prompt"] == "<|user|>"
    with pytest.raises(ConfigError, match="extra sets messages"):
        teacher("teacher.extra={messages: []}")


def test_a_prompt_is_never_counted_too_small():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHAT, local_files_only=True)
    draw, asked = random.Random(0), teacher()
    for _ in range(50):
        text = "".join(chr(draw.choice([65, 32, 0xE9, 0x4E2D, 0xAC00, 0x1F600, 10])) for _ in range(draw.randrange(200)))
        messages = [{"role": "user", "content": text}] * draw.randrange(1, 4)
        counted = len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
        assert counted <= asked.most(request(messages=messages))[0]


# ---- replies


@pytest.mark.parametrize(
    "status, body, reason, again",
    [
        (200, chat(""), "empty answer", True),
        (200, chat(" \n"), "empty answer", True),
        (200, chat(None), "empty answer", True),
        (200, chat("x", "content_filter"), "refused by the endpoint", False),
        (200, chat("", refusal="I will not"), "refused by the endpoint", False),
        (200, chat("x", None), "no finish_reason", True),
        (200, chat("x" * 5000), "longer than its limit", False),
        (200, chat("\ud800"), "half of a surrogate pair", True),
        (200, {"error": {"message": "out of memory"}}, "the server failed", True),
        (200, {"choices": []}, "reply is not of OpenAI's form", True),
        (200, [1], "reply is not of OpenAI's form", True),
        (429, {"error": "slow"}, "HTTP 429", True),
        (503, {}, "HTTP 503", True),
        (500, {}, "HTTP 500", True),
        (400, {"error": {"message": "too long"}}, "HTTP 400", False),
        (413, {}, "HTTP 413", False),
    ],
)
def test_what_a_reply_means(status, body, reason, again):
    with pytest.raises(Failed) as caught:
        teacher().reply_of(status, json.dumps(body).encode(), 10)
    assert (caught.value.reason, caught.value.again) == (reason, again)


def test_a_reply_that_is_fine():
    reply = teacher().reply_of(200, json.dumps(chat("Hello", reasoning_content="Greet.")).encode(), 10)
    assert (reply.text, reply.reasoning, reply.finish, reply.prompt_tokens, reply.tokens) == ("Hello", "Greet.", "stop", 5, 2)
    cut = teacher().reply_of(200, json.dumps(chat("Hel", "length")).encode(), 10)
    assert cut.finish == "length"
    uncounted = teacher().reply_of(200, json.dumps(chat("x") | {"usage": {"prompt_tokens": -1, "completion_tokens": True}}).encode(), 10)
    assert uncounted.tokens is None
    assert teacher().reply_of(200, json.dumps({"choices": [{"text": "more", "finish_reason": "stop"}]}).encode(), 10).text == "more"


@pytest.mark.parametrize("count", [-5, True, False, 10**30, 2**63, 2**31, 5.0, 1e300, "5", [5], None])
def test_what_is_no_count_of_tokens_is_none(count):
    for usage in ({"prompt_tokens": count, "completion_tokens": 2}, {"prompt_tokens": 5, "completion_tokens": count}):
        reply = teacher().reply_of(200, json.dumps(chat() | {"usage": usage}).encode(), 10)
        assert reply.paid is None
        with pytest.raises(Failed) as caught:
            teacher().reply_of(200, json.dumps(chat("") | {"usage": usage}).encode(), 10)
        assert caught.value.paid is None
    assert (
        teacher().reply_of(200, json.dumps(chat() | {"usage": {"prompt_tokens": 0, "completion_tokens": 2**31 - 1}}).encode(), 10).tokens
        == 2**31 - 1
    )


def test_replies_of_any_shape_never_crash():
    draw, server = random.Random(1), teacher()
    whole = json.dumps(chat("An answer.", reasoning_content="hm"))
    values = [None, 1, "x", [], {}, True, {"a": 1}, [[]], "\ud800", 1e300]

    def broken(tree):
        if draw.random() < 0.15:
            return draw.choice(values)
        if isinstance(tree, dict):
            return {key: broken(value) for key, value in tree.items() if draw.random() > 0.1}
        return [broken(value) for value in tree] if isinstance(tree, list) else tree

    seen = set()
    for _ in range(3000):
        data = json.dumps(broken(json.loads(whole))).encode()
        if draw.random() < 0.2:
            data = bytes(b if draw.random() > 0.03 else draw.randrange(256) for b in data)
        try:
            server.reply_of(draw.choice([200, 200, 200, 400, 429, 500]), data, 10)
            seen.add("fine")
        except Failed as failed:
            seen.add(failed.reason)
            failed.detail.encode()
    assert {"fine", "reply is not JSON", "reply is not of OpenAI's form", "empty answer", "HTTP 500"} <= seen


@helps("distill/endpoint.py", "the same command goes on once it has", "the same command goes on then")
def test_what_no_try_can_mend_and_the_key_is_never_told(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = teacher()
    for status, words, told in (
        (401, "bad key sk-secret", "OPENAI_API_KEY"),
        (404, "no model", "the model that the server has: teacher.url and teacher.model"),
        (429, "insufficient_quota", "quota"),
    ):
        with pytest.raises(NoAnswer) as caught:
            server.reply_of(status, json.dumps({"error": {"message": words}}).encode(), 10)
        assert told in str(caught.value) and "sk-secret" not in str(caught.value)
    with pytest.raises(NoAnswer, match="wait 7,200 s"):
        server.reply_of(429, b"{}", 10, 7200.0)
    assert "sk-secret" not in server.reply_of(200, json.dumps(chat("it is sk-secret")).encode(), 10).text, (
        "and goes on once it answers again"
    )
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    with pytest.raises(ConfigError, match="characters that no key has"):
        teacher()


def escaped(key: str) -> str:
    return "".join(f"\\u{ord(char):04x}" for char in key)


SLASHED = "sk/se-cret"
SPELLED = {
    "as it is": json.dumps(SLASHED),
    "every character escaped": f'"{escaped(SLASHED)}"',
    "in capitals": f'"{escaped(SLASHED)}"'.replace("\\u002f", "\\u002F"),
    "a slash escaped": r'"sk\/se-cret"',
    "JSON within the text": json.dumps(f'{{"a": "{escaped(SLASHED)}"}}'),
    "a slash escaped within the text": json.dumps(r'{"a": "sk\/se-cret"}'),
    "in an address": '"?key=sk%2Fse-cret"',
}


@pytest.mark.parametrize("how", SPELLED)
def test_the_key_is_masked_however_a_reply_spells_it(how, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", SLASHED)
    server = teacher()
    body = json.dumps(chat("KEY", reasoning_content="KEY")).replace('"KEY"', SPELLED[how]).encode()
    reply = server.reply_of(200, body, 100)
    assert "***" in reply.text and "***" in reply.reasoning
    assert capsys.readouterr().err == "warning: the teacher repeats the key in OPENAI_API_KEY; *** stands in its place\n"
    for error in (f'{{"error": {{"message": {SPELLED[how]}}}}}', f'{{"detail": [{SPELLED[how]}]}}', f"<p>{SPELLED[how]}</p>"):
        with pytest.raises(Failed) as caught:
            server.reply_of(400, error.encode(), 10)
        assert "***" in caught.value.detail and "cret" not in caught.value.detail
    value = value_of(server.reply_of(200, json.dumps(chat("KEY")).replace('"KEY"', json.dumps(SPELLED[how])).encode(), 99).text, {})
    assert "cret" not in str(value)


@pytest.mark.parametrize(
    "text", ["\\\\" * 10**6, "sk-proj-aB3aB" * 10**5 + "%41", "a" * 4 * 10**6 + "%41", "\\\\u00" * 10**5], ids=range(4)
)
def test_a_key_is_looked_for_in_time_with_any_text(text, monkeypatch):
    for key in ("sk-proj-" + "aB3" * 40, "a" * 100 + "b"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        start = time.monotonic()
        assert teacher().server.hidden(text) == text
        assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    "extra, place",
    [
        ("{api_key: abc}", "extra.api_key"),
        ("{headers: {Authorization: abc}}", "extra.headers.Authorization"),
        ("{user: 'Bearer abcdefgh1'}", "extra.user"),
        ("{list: [{a: sk-abcdefgh1}]}", "extra.list.0.a"),
    ],
)
def test_a_key_is_no_setting(extra, place):
    with pytest.raises(ConfigError, match=f"{place} looks like a key") as caught:
        teacher(f"teacher.extra={extra}")
    assert "abc" not in str(caught.value)
    assert teacher("teacher.extra={stop_token_ids: [1], prompt_cache_key: a, token: 5}").settings.extra


SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "integer", "minimum": 1}},
    "required": ["score"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("text", ['{"score": 3}', '```json\n{"score": 3}\n```', ' {"score":3}\n'])
def test_json_that_fits(text):
    assert value_of(text, SCHEMA) == {"score": 3}
    assert value_of(text, None) is None


@pytest.mark.parametrize(
    "text", ["three", '{"score": 0}', '{"score": "3"}', '{"score": 3, "more": 1}', "[]", '{"score": NaN}', '{"score": 3', "[" * 100000]
)
def test_json_that_does_not(text):
    with pytest.raises(Failed):
        value_of(text, SCHEMA)


def test_half_a_surrogate_pair_in_json():
    with pytest.raises(Failed):
        value_of('{"a": "\\ud800"}', {"type": "object"})


# ---- limits


def test_a_rate_holds_in_every_minute():
    """By a clock of our own: what Rate lets through, counted in every window of a minute."""
    for per_minute in (3, 60, 1000):
        rate, now, times = limits.RateLimiter(per_minute), 1000.0, []
        with pytest.MonkeyPatch.context() as patch:

            async def sleep(seconds):
                nonlocal now
                now += seconds

            patch.setattr(limits.time, "monotonic", lambda: now)
            patch.setattr(limits.asyncio, "sleep", sleep)

            async def go():
                for _ in range(per_minute * 3):
                    await rate.wait(1)
                    times.append(now)

            asyncio.run(go())
        assert max(sum(begin <= t < begin + 60 for t in times) for begin in times) <= per_minute + 1
        assert times[-1] - times[0] < 200


def test_slots_rise_and_fall():
    slots = limits.AdaptiveConcurrency(16)
    now = time.monotonic()
    slots.busy(now)
    assert slots.limit == 8
    slots.busy(now - 1.0)
    assert slots.limit == 8, "sent before the last halving: it tells nothing new"
    for _ in range(9):
        slots.well()
    assert 8.9 < slots.limit < 9.1
    for _ in range(1000):
        slots.well()
    assert slots.limit == 16
    for _ in range(50):
        slots.busy(time.monotonic())
    assert slots.limit == 1


def test_no_more_slots_than_there_are_and_none_lost():
    async def go():
        slots, now, most = limits.AdaptiveConcurrency(5), 0, 0

        async def work(seconds):
            nonlocal now, most
            await slots.take()
            try:
                now += 1
                most = max(most, now)
                await asyncio.sleep(seconds)
            finally:
                now -= 1
                slots.give_back()

        draw = random.Random(0)
        tasks = [asyncio.create_task(work(draw.random() / 100)) for _ in range(200)]
        await asyncio.sleep(0.02)
        for task in draw.sample(tasks, 60):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return most, slots.used

    assert asyncio.run(go()) == (5, 0)


def test_back_off_doubles_is_drawn_and_ends_at_a_minute():
    for tries, longest in ((1, 1.0), (2, 2.0), (4, 8.0), (30, 60.0)):
        drawn = [limits.back_off(tries, 1.0) for _ in range(200)]
        assert longest / 2 <= min(drawn) < max(drawn) <= longest
        assert len(set(drawn)) > 100


def test_the_breaker_trips_on_first_tries_that_fail_on_end():
    breaker = limits.Breaker(3, grace=0.0)
    assert not any(breaker.failed(first=False, together=True) for _ in range(50)), "later tries say nothing new"
    assert not breaker.failed(True, False) and not breaker.failed(True, True)
    breaker.aside.append("key")
    breaker.well()
    assert breaker.aside == []
    assert [breaker.failed(True, False) for _ in range(3)] == [False, False, True]
    patient = limits.Breaker(3, grace=60.0)
    assert not any(patient.failed(True, together=True) for _ in range(50)), "a server that is started anew"
    assert patient.failed(True, together=False)


def test_a_budget_is_never_overdrawn_and_waits_for_what_may_come_back():
    async def go():
        budget, most = limits.BudgetTracker(Budget(tokens=100, money=None)), 0

        async def ask(reserved, used):
            nonlocal most
            await budget.reserve(reserved, 0.0)
            most = max(most, budget.tokens + budget.reserved_tokens)
            await asyncio.sleep(0)
            budget.settle(reserved, 0.0, used, 0.0)

        results = await asyncio.gather(*(ask(40, 10) for _ in range(20)), return_exceptions=True)
        return most, budget.tokens, sum(isinstance(r, BudgetSpent) for r in results)

    # 40 have to be free: after 7 answers of 10 tokens only 30 are.
    assert asyncio.run(go()) == (100, 70, 13)


# ---- rows


def flow(count: int, work_on, window: int = 8):
    aside = []
    work = Work(seed=1, ask=None, window=window, on_aside=lambda row, step, reason, detail: aside.append((row.id, reason)))

    async def source():
        for n in range(count):
            yield Record(str(n), [])

    async def step(rows, settings, work):
        async for row in work.each(rows, work_on):
            yield row

    async def go():
        return [row async for row in through(source(), [("one", step, None), ("two", step, None)], work)]

    return asyncio.run(go()), aside, work


def test_rows_come_out_in_the_order_they_went_in_whichever_is_done_first():
    draw = random.Random(2)

    async def slow(row):
        await asyncio.sleep(draw.random() / 200)
        if row.id.endswith("7"):
            raise SetAside("seven")
        return [Record(f"{row.id}/{k}", []) for k in range(2)] if row.id.endswith("3") else row

    rows, aside, work = flow(60, slow)
    numbers = [int(row.id.split("/")[0]) for row in rows]
    assert numbers == sorted(numbers) and {id for id, _ in aside} == {f"{n}7" if n else "7" for n in range(6)}
    check_flows(work)
    work.flows["one"].went -= 1
    with pytest.raises(ProofFailed, match="step 'one'"):
        check_flows(work)


def test_no_more_rows_under_work_than_the_window():
    now = most = 0

    async def counted(row):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        return row

    flow(100, counted, window=4)
    assert most <= 8, "two steps of four"


def test_a_bug_in_a_step_comes_out_as_it_is_and_nothing_is_left_running():
    ended = []

    async def bad(row):
        if row.id == "5":
            raise ZeroDivisionError
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(row.id)

    with pytest.raises(ZeroDivisionError):
        flow(5, lambda row: bad(Record("5", [])))
    assert ended == []

    async def nothing(row):
        return []

    with pytest.raises(RuntimeError, match="gave no reason"):
        flow(1, nothing)


def test_draws_follow_from_seed_and_words_alone():
    work = Work(seed=1, ask=None)
    assert work.draw("a", 1).random() == work.at("b").draw("a", 1).random()
    assert work.draw("a", 1).random() != work.draw("a", 2).random()
    assert work.draw("a").random() != Work(seed=2, ask=None).draw("a").random()


def test_words_from_outside_steer_no_terminal():
    assert protocol.plain("a\x1b[31mb\u202e\n" + "x" * 500)[:4] == "a [3"
