"""Token ids and loss masks: literals for the embedded model, and rules that hold for every real tokenizer at hand."""

import json
from pathlib import Path

import pytest
from conftest import NO_SHARED, SHARED, each_kind, helps
from makers import KINDS, tokenizer_folder

from src.chat import encoding
from src.chat.rows import rows_of
from src.core.errors import BadData, WrongKind
from src.models import generation
from src.models.loading import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny-chat"
# Decoding one of these models' trained spans gives this before the last answer's own text.
THINKS = dict.fromkeys(["qwen3", "made-qwen3"], "<think>\n\n</think>\n\n")
TAKES_SYSTEM = {"qwen2", "qwen2.5", "qwen3", "yi-6b-chat", "minicpm4"}
NAMES = [*sorted(TAKES_SYSTEM), "mistral-7b-v0.2"]

TURNS = [
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Ahoy! A cat, captain."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Fin"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALLING = [
    {"role": "user", "content": "Is it warm?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Söul"}}}],
    },
    {"role": "tool", "name": "weather", "content": "21 degrees"},
    {"role": "assistant", "content": "It is warm."},
]
HARD = [
    [("user", "안녕하세요?"), ("assistant", "네, 선장님! 반갑습니다.")],
    [("user", "code"), ("assistant", "def f(x):\n    return x ** 2\n")],
    [("user", "emoji 🚀"), ("assistant", "👩‍🔬 déjà vu, ok")],
    [("user", "user\nassistant\nsystem"), ("assistant", "assistant\nuser"), ("user", "Ahoy!"), ("assistant", "Ahoy!")],
    [("user", "numbers"), ("assistant", "3.14 + 2,718 = 12345?"), ("user", "  spaces \n"), ("assistant", "a  b   c")],
    [("user", "tail"), ("assistant", "ends in newlines\n\n")],
]


def talk(pairs):
    return [{"role": role, "content": text} for role, text in pairs]


@pytest.fixture(scope="module")
def load():
    """Tokenizers made here or of ../shared, and tiny-chat, by name."""
    kept = {}

    def load(name):
        if name in NAMES and not SHARED.is_dir():
            pytest.skip(NO_SHARED)
        if name not in kept:
            kept[name] = load_tokenizer(
                TINY if name == "tiny-chat" else tokenizer_folder(name) if name in KINDS else SHARED / "tokenizers" / name
            )
        return kept[name]

    return load


@pytest.fixture(scope="module")
def pilot():
    """The 400 embedded conversations as messages, without their system turns."""
    rows = json.loads((ROOT / "assets" / "conversations.json").read_text())
    return [[{"role": t["from"], "content": t["value"]} for t in row["conversations"] if t["from"] != "system"] for row in rows]


def spans(encoded):
    """The runs of trained labels, each a list of ids."""
    found, before = [], encoding.IGNORE
    for label in encoded.labels:
        if label != encoding.IGNORE:
            if before == encoding.IGNORE:
                found.append([])
            found[-1].append(label)
        before = label
    return found


def check(tokenizer, messages, answers, tools=None):
    """The trained spans are exactly `answers`, each closed by the stop token; every trained label is its own input id."""
    end = encoding.turn_end(tokenizer)
    encoded = encoding.encode(tokenizer, messages, tools)
    assert len(encoded.labels) == len(encoded.input_ids)
    assert all(label in (encoding.IGNORE, token) for label, token in zip(encoded.labels, encoded.input_ids))
    runs = spans(encoded)
    stop = tokenizer.decode([end])
    assert [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs] == [answer + stop for answer in answers]
    assert all(run[-1] == end and run.count(end) == 1 for run in runs)
    assert encoded.trained == sum(map(len, runs))
    return encoded


def test_golden_ids_and_mask_of_the_embedded_model(load):
    # 1022 <|im_start|>, 1023 <|im_end|>, 13 newline; 573 'user', 412 818 'as' 'sistant'; the rest spelled out in the comments.
    ignore, encoded = encoding.IGNORE, encoding.encode(load("tiny-chat"), [SYSTEM, *TURNS])
    system = [1022, 341, 347, 539, 327, 335, 13, 663, 884, 415, 328, 272, 1023, 13]  # s y st e m \n Be _br ie f .
    first = [1022, 573, 13, 847, 259, 1023, 13, 1022, 412, 818, 13]  # Hi !
    answer = [577, 259, 470, 616, 270, 589, 272, 1023]  # Ahoy ! _A _cat , _captain .
    second = [13, 1022, 573, 13, 551, 289, 1023, 13, 1022, 412, 818, 13]  # And ?
    last = [296, 373, 1023]  # F in
    assert encoded.input_ids == [*system, *first, *answer, *second, *last, 13]
    assert encoded.labels == [*[ignore] * (len(system) + len(first)), *answer, *[ignore] * len(second), *last, ignore]
    assert encoded.trained == 11
    assert encoding.turn_end(load("tiny-chat")) == 1023


def test_golden_labels_of_the_old_recipe(load):
    ignore, encoded = encoding.IGNORE, encoding.encode_qwen_legacy(load("tiny-chat"), [SYSTEM, *TURNS[:2]], eos_id=1023)
    assert encoded.input_ids == encoding.encode(load("tiny-chat"), [SYSTEM, *TURNS[:2]]).input_ids
    assert encoded.labels == [
        *[1022, *[ignore] * 11, 1023, 13],
        *[1022, *[ignore] * 4, 1023, 13],
        *[1022, *[ignore] * 3, 577, 259, 470, 616, 270, 589, 272, 1023, 13],
    ]


@each_kind(["tiny-chat", *KINDS], NAMES)
def test_only_answers_and_their_stop_tokens_are_trained(load, pilot, name):
    tokenizer, think = load(name), THINKS.get(name, "")
    for messages in [TURNS, *pilot[::4], *map(talk, HARD)]:
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if think:  # this template takes newlines off the last answer's beginning
            answers[-1] = think + answers[-1].lstrip("\n")
        if "mistral" in name:
            messages = [m | {"content": m["content"].strip()} if m["role"] == "user" else m for m in messages]
        check(tokenizer, messages, answers)


@each_kind(["tiny-chat", *KINDS], NAMES)
def test_ids_are_those_of_the_template(load, pilot, name):
    tokenizer = load(name)
    for messages in [TURNS, *pilot[::4], *map(talk, HARD)]:
        assert encoding.encode(tokenizer, messages).input_ids == tokenizer.apply_chat_template(messages, return_dict=False)


@each_kind(["tiny-chat", *(name for name in KINDS if name != "made-mistral")], sorted(TAKES_SYSTEM))
def test_a_system_turn_is_seen_and_not_trained(load, name):
    tokenizer = load(name)
    encoded = check(tokenizer, [SYSTEM, *TURNS], ["Ahoy! A cat, captain.", THINKS.get(name, "") + "Fin"])
    assert "Be brief." in tokenizer.decode(encoded.input_ids)


@each_kind(["tiny-chat", *KINDS], NAMES)
def test_the_trained_prompt_is_the_served_prompt(load, name):
    """What stands before an answer is token for token what a server makes of the conversation so far, also where the answer begins with a newline."""
    tokenizer = load(name)
    end = encoding.turn_end(tokenizer)
    for answer in ("Fin", "\n\nFin", "\nFin"):
        messages = [*TURNS[:3], {"role": "assistant", "content": answer}]
        encoded = encoding.encode(tokenizer, messages)
        prompt = tokenizer(encoding.render(tokenizer, messages[:3], prompt=True), add_special_tokens=False).input_ids
        last = max(
            i
            for i, label in enumerate(encoded.labels)
            if label == encoding.IGNORE and any(x != encoding.IGNORE for x in encoded.labels[i:])
        )
        assert encoded.input_ids[: last + 1] == prompt
        if not THINKS.get(name):
            assert tokenizer.decode(spans(encoded)[-1]) == answer + tokenizer.decode([end])


@each_kind(["made-qwen2.5", "made-qwen3"], ["qwen2.5", "qwen3"])
def test_tool_calls_are_trained_and_tool_results_are_not(load, name):
    tokenizer = load(name)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Söul"}}\n</tool_call>'
    encoded = check(tokenizer, CALLING, [call, THINKS.get(name, "") + "It is warm."], [TOOL])
    untrained = tokenizer.decode([i for i, label in zip(encoded.input_ids, encoded.labels) if label == encoding.IGNORE])
    assert "21 degrees" in untrained and '"description": "Weather."' in untrained


@each_kind(["made-plain"], ["stories260K-hf"])
def test_a_tokenizer_without_chatml_is_given_it(name):
    tokenizer = load_tokenizer(tokenizer_folder(name) if name == "made-plain" else SHARED / "models" / name)
    old, bos = len(tokenizer), tokenizer.bos_token_id
    assert encoding.ensure_chat(tokenizer) == [encoding.START, encoding.END]
    start, end = tokenizer.convert_tokens_to_ids([encoding.START, encoding.END])
    assert [start, end] == [old, old + 1] and len(tokenizer) == old + 2
    assert tokenizer.eos_token_id == end == encoding.turn_end(tokenizer) and tokenizer.pad_token_id is not None
    encoded = check(tokenizer, TURNS, ["Ahoy! A cat, captain.", "Fin"])
    # This tokenizer puts BOS before a text, so its conversations begin with one, and only one.
    assert tokenizer("").input_ids == [bos]
    assert encoded.input_ids[:2] == [bos, start] and encoded.input_ids.count(bos) == 1
    assert encoding.ensure_chat(tokenizer) == [], "a second call finds nothing to add"


def test_text_stands_as_it_is_for_a_model_that_knows_no_template_and_is_a_turn_once_it_is_to_learn_one():
    record = {"id": "1", "messages": [{"role": "assistant", "content": "A cat sat."}]}
    asked = [{"role": "user", "content": "A cat"}]
    (base, learns) = (load_tokenizer(tokenizer_folder("made-plain")) for _ in range(2))
    text, prompt = base("A cat sat.").input_ids, base("A cat").input_ids
    encoding.ensure_chat(base)
    encoding.set_up(learns, text=None, keywords={}, reasoning="template", today="2026-01-01")
    assert [row.input_ids for _, row in rows_of([record], base, "it")] == [text] and generation.prompt_of(base, asked, None) == prompt
    ((_, row),) = rows_of([record], learns, "it")
    assert row.input_ids != text and learns.eos_token_id in row.input_ids
    assert (
        generation.prompt_of(learns, asked, None)
        == learns(encoding.render(learns, asked, None, prompt=True), add_special_tokens=False).input_ids
    )


def test_chatml_on_a_tokenizer_that_adds_no_bos_begins_with_the_first_turn():
    tokenizer = load_tokenizer(TINY)
    own = encoding.encode(tokenizer, [SYSTEM, *TURNS])
    tokenizer.chat_template = None
    assert encoding.ensure_chat(tokenizer) == [], "it has both tokens already"
    assert encoding.encode(tokenizer, [SYSTEM, *TURNS]) == own
    call = '<|im_start|>assistant\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Söul"}}\n</tool_call><|im_end|>\n'
    assert call in encoding.render(tokenizer, CALLING, [TOOL])


def test_padding_falls_back_to_the_turn_end():
    tokenizer = load_tokenizer(TINY)
    tokenizer.pad_token = None
    encoding.ensure_chat(tokenizer)
    assert tokenizer.pad_token_id == 1023
    # The collator masks by length, so a pad token that is also the stop token stays trained where it is one.
    assert encoding.encode(tokenizer, TURNS).labels.count(1023) == 2


@helps("chat/template.py", "remove chat_template from tokenizer_config.json (and chat_template.jinja) to train with ChatML")
def test_a_template_without_a_stop_token_is_refused():
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    with pytest.raises(WrongKind, match="stop"):
        encoding.turn_end(tokenizer)
    tokenizer.chat_template = None
    encoding.ensure_chat(tokenizer)
    assert encoding.turn_end(tokenizer) == 1023


def test_where_history_is_rewritten_a_row_is_what_a_server_makes():
    """The prompt as it is served, and the answer; an earlier answer is not in it as it was given."""
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    row = encoding.encode(tokenizer, TURNS)
    served = encoding.render(tokenizer, TURNS[:3], prompt=True)
    assert served[0] == "3" and tokenizer.decode(row.input_ids).startswith(served)
    assert [tokenizer.decode(run) for run in spans(row)] == ["Fin<|im_end|>"] and row.untrained == 1
    assert [[tokenizer.decode(run) for run in spans(row)] for row in encoding.encode_turns(tokenizer, TURNS)] == [
        ["Ahoy! A cat, captain.<|im_end|>"],
        ["Fin<|im_end|>"],
    ]


@each_kind(["made-mistral"], ["mistral-7b-v0.2"])
def test_what_a_template_refuses_is_the_data_s_fault(load, name):
    """Mistral's template raises on a system turn; that must name the data, not end in a traceback."""
    tokenizer = load(name)
    with pytest.raises(BadData, match="alternate"):
        encoding.encode(tokenizer, [SYSTEM, *TURNS])


def old_recipe(tokenizer, messages):
    """Labels of QwenLM/Qwen finetune.py as that script lays them out: per turn, which of (marker, role and newline, content, closing marker, newline) count."""

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    turns = [("system", "You are a helpful assistant."), *((m["role"], m["content"]) for m in messages)]
    layout = []
    for role, text in turns:
        layout += [("<|im_start|>", True), (role, False), ("\n", False), (text, role == "assistant"), ("<|im_end|>", True), ("\n", True)]
    flat = [(i, i if counts else -100) for text, counts in layout for i in ids(text)]
    return [i for i, _ in flat], [label for _, label in flat]


@each_kind(["tiny-chat", "made-qwen2", "made-yi"], ["qwen2", "qwen2.5", "qwen3"])
def test_the_old_recipe_s_labels(load, pilot, name):
    tokenizer = load(name)
    for messages in [TURNS, *pilot[::4], *map(talk, HARD)]:
        encoded = encoding.encode_qwen_legacy(tokenizer, messages, eos_id=encoding.turn_end(tokenizer))
        assert (encoded.input_ids, encoded.labels) == old_recipe(tokenizer, messages)
