"""A model that answers piece by piece: the greedy answers are evaluate's byte for byte, draws repeat, and what came out in pieces is the whole."""

import threading

import pytest
from conftest import CHAT, go, helps, write_model

from src import evaluate
from src.core.artifact import outside
from src.core.errors import NoMemory
from src.models import speaking
from src.models.loading import load_tokenizer
from src.models.speaking import Ended, GrowingText, ModelSpeaker, TooLong
from src.settings.answers import Decoding

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = Decoding(temperature=0, top_p=1, max_tokens=24, seed=0, stop=[])
DRAWN = GREEDY.model_copy(update={"temperature": 3.0, "top_p": 0.95})
PROMPTS = ["What animal goes quack?", "Where is Ottawa?", "What is the child of a pig?", "Hello!"]


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def speaker() -> ModelSpeaker:
    return ModelSpeaker(outside(CHAT, "model"), "tiny")


def said(speaker, text: str, decoding: Decoding = GREEDY) -> tuple[list[str], Ended]:
    *pieces, ended = speaker.reply(user(text), decoding)
    assert "".join(pieces) == ended.text
    return pieces, ended


def test_greedy_answers_are_those_of_evaluate_byte_for_byte(speaker, finished, tmp_path):
    import json

    asked = "evaluation.prompts=[" + ",".join(f"'{p}'" for p in PROMPTS) + "]"
    usual = ["run=e", f"outputs={tmp_path}", f"source={CHAT}", f"dataset={finished / 'a' / 'data'}", "evaluation.rows=2"]
    assert go(evaluate, *usual, asked, "evaluation.max_new_tokens=24") == 0
    rows = [json.loads(line) for line in open(tmp_path / "e" / "evaluate-tiny-chat" / "answers.jsonl", encoding="utf-8")]
    one_by_one = [said(speaker, prompt)[1] for prompt in PROMPTS]
    together = speaker.replies([(user(prompt), None) for prompt in PROMPTS], GREEDY)
    assert len(rows) == len(PROMPTS)
    for row, alone, batched in zip(rows, one_by_one, together):
        assert (alone.text, alone.ended) == (batched.text, batched.ended) == (row["answer"], row["ended"])
        assert (alone.prompt_tokens, alone.tokens) == (batched.prompt_tokens, batched.tokens)
    assert any(len(said(speaker, prompt)[0]) > 3 for prompt in PROMPTS), "it came in pieces"


def test_a_turn_that_goes_on_computes_what_is_new_alone(speaker, monkeypatch):
    import torch

    begun, seen = user(PROMPTS[0]), []
    hook = speaker.model.register_forward_pre_hook(
        lambda _, args, given: seen.append((args or [given["input_ids"]])[0].shape[1]), with_kwargs=True
    )
    *_, first = speaker.reply(begun, GREEDY)
    further = [*begun, {"role": "assistant", "content": first.text}, *user(PROMPTS[2])]
    *_, second = speaker.reply(further, GREEDY)
    assert seen[0] == first.prompt_tokens and seen[first.tokens] < second.prompt_tokens - first.prompt_tokens - first.tokens + 4
    *_, anew = ModelSpeaker(outside(CHAT, "model"), "other").reply(further, GREEDY)
    assert second == anew
    for talk in (begun, begun, user(PROMPTS[1])):  # the same again, and another: from its first token on
        seen.clear()
        *_, ended = speaker.reply(talk, GREEDY)
        assert seen[0] == ended.prompt_tokens
    hook.remove()
    with torch.no_grad():
        assert said(speaker, PROMPTS[0])[1] == first


def test_draws_repeat_by_seed_alone_or_in_a_batch(speaker):
    first, again = said(speaker, PROMPTS[0], DRAWN)[1], said(speaker, PROMPTS[0], DRAWN)[1]
    assert first == again
    assert speaker.replies([(user(p), None) for p in PROMPTS], DRAWN)[0] == first
    assert any(said(speaker, PROMPTS[0], DRAWN.model_copy(update={"seed": k}))[1].text != first.text for k in range(1, 6))


def test_an_answer_ends_at_its_limit_and_at_a_text(speaker):
    whole = said(speaker, PROMPTS[0])[1]
    assert whole.finish == "stop" and whole.ended
    short = said(speaker, PROMPTS[0], GREEDY.model_copy(update={"max_tokens": 2}))[1]
    assert (short.finish, short.ended, short.tokens) == ("length", False, 2) and whole.text.startswith(short.text)
    at = whole.text[4:7]
    cut = said(speaker, PROMPTS[0], GREEDY.model_copy(update={"stop": [at, "zzz"]}))[1]
    assert cut.text == whole.text[: whole.text.index(at)] and (cut.finish, cut.ended) == ("stop", False)


def test_whoever_listens_ends_it(speaker):
    parts = speaker.reply(user("Tell me a story."), GREEDY.model_copy(update={"max_tokens": 400, "temperature": 2.0}))
    next(parts)
    parts.close()
    assert threading.active_count() < 10
    assert said(speaker, PROMPTS[0])[1].ended, "and the next one is answered"


@helps("models/speaking.py", "begin a new one, or shorten it")
def test_a_conversation_that_is_too_long_is_refused_with_its_length(speaker):
    with pytest.raises(TooLong) as caught:
        list(speaker.reply(user("quack " * 600), GREEDY))
    assert caught.value.tokens > caught.value.room == 512
    one, two = speaker.replies([(user("quack " * 600), None), (user(PROMPTS[0]), None)], GREEDY)
    assert isinstance(one, TooLong) and isinstance(two, Ended)
    assert said(speaker, "quack " * 6)[1].text, "a shorter one is answered"


def test_log_probabilities_are_those_of_the_whole_sequence(speaker, monkeypatch):
    import torch

    monkeypatch.setattr(speaking, "ROWS", 3)
    ids = speaker.prompt(user(PROMPTS[0]), None)
    own, likeliest = speaker.scored(ids, 2)
    with torch.no_grad():
        table = speaker.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    assert own == pytest.approx([table[k, id].item() for k, id in enumerate(ids[1:])], abs=1e-12)
    assert [row[0][0] for row in likeliest] == table[:-1].argmax(-1).tolist() and all(len(row) == 2 for row in likeliest)


def test_a_model_without_a_chat_template_goes_on_with_the_text(tmp_path):
    import json

    folder = write_model(tmp_path / "plain")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    raw = ModelSpeaker(outside(folder, "model"), "plain")
    assert (
        raw.raw
        and raw.prompt([{"role": "user", "content": "Once"}, {"role": "assistant", "content": " upon"}], None)
        == raw.tokenizer("Once upon").input_ids
    )
    ended = said(raw, "Once upon", GREEDY.model_copy(update={"max_tokens": 5}))[1]
    assert ended.tokens == 5 and not ended.ended


def test_no_memory_left_is_said(speaker, monkeypatch):
    def fail(**_):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."
        )

    monkeypatch.setattr(speaker.model, "generate", fail)
    with pytest.raises(NoMemory):
        list(speaker.reply(user("Hi"), GREEDY))


@pytest.mark.parametrize("text", ["🙂 ok", "안녕하세요", "a  b\n\tc", "é"])
def test_pieces_never_show_half_a_character(text):
    tokenizer = load_tokenizer(CHAT)
    growing, pieces = GrowingText(tokenizer), []
    for id in tokenizer(text, add_special_tokens=False).input_ids:
        pieces.append(growing.add(id))
    assert "".join(pieces) == tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) and not any(
        "\ufffd" in p for p in pieces
    )


def test_what_may_begin_a_stop_text_is_kept_back():
    tokenizer = load_tokenizer(CHAT)
    growing = GrowingText(tokenizer, ["END"])
    told = [growing.add(id) for id in tokenizer("say EN", add_special_tokens=False).input_ids]
    assert "".join(told) == "say "
    assert growing.add(tokenizer("D", add_special_tokens=False).input_ids[0]) is None
