"""What is taught through each kind of chat template that is about: a dozen small ones, each with one habit of a real family."""

import json

import pytest
from conftest import CHAT, helps
from test_chatml import TOOL, spans

from src.chat import encoding, template, unseen
from src.chat.rows import rows_of
from src.chat.template import Unteachable
from src.core.errors import BadData, ConfigError
from src.models import evaluation
from src.models.loading import load_tokenizer

START, END = "<|im_start|>", "<|im_end|>"
HEAD = "{{ '<|im_start|>' + m.role + '\n' }}"
GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def says(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def calls(*cities: str, id: str | None = None, text: str = "") -> dict:
    made = [{"type": "function", "function": {"name": "weather", "arguments": {"city": city}}} for city in cities]
    return says(text, tool_calls=[call | ({"id": id} if id else {}) for call in made])


def result(text: str, **more) -> dict:
    return {"role": "tool", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
TOLD = [user("Warm?"), calls("Bern"), result("21 degrees"), says("It is.")]
THOUGHT = [user("One?"), says("Two.", reasoning_content="Count."), user("And?"), says("Three.", reasoning_content="Go on.")]
CALL = '{"name": "weather", "arguments": {"city": "Bern"}}'

PLAIN = "{% for m in messages %}" + HEAD + "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + GENERATION
CALLING = (
    "{% for m in messages %}"
    + HEAD
    + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    + GENERATION
)
OPENED = (
    "{% for m in messages %}" + HEAD + "{{ m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
GPT_OSS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.tool_calls %}{{ '<|start|>assistant to=' + m.tool_calls[0].function.name + '<|message|>' + m.tool_calls[0].function.arguments | tojson + '<|call|>' }}"
    "{% else %}{% if m.reasoning_content and loop.last %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}{% endif %}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
GLM = (
    "{{ '[gMASK]' }}{% for m in messages %}{{ '<|' + ('observation' if m.role == 'tool' else m.role) + '|>' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NEMO = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}{{ '<s>' }}"
    "{% for m in messages %}{% if m.role == 'user' %}{% if loop.last and system is defined %}{{ '[INST]' + system + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST]' + m.content + '[/INST]' }}{% endif %}"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id is undefined or m.tool_call_id | length != 9 %}{{ raise_exception('ids of nine characters') }}{% endif %}"
    "{{ '[TOOL_RESULTS]' + m.content + m.tool_call_id + '[/TOOL_RESULTS]' }}{% elif m.tool_calls %}{{ '[TOOL_CALLS]' }}{% for c in m.tool_calls %}"
    "{% if c.id is undefined or c.id | length != 9 %}{{ raise_exception('ids of nine characters') }}{% endif %}{{ c.function | tojson + c.id }}{% endfor %}{{ '</s>' }}"
    "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)
# A call's turn goes on with its result, and ends only with the text after it.
GEMMA4 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|turn>user\n' + m.content + '<turn|>\n' }}"
    "{% elif m.role == 'tool' %}{{ m.content + '<tool_response|>' }}{% elif m.tool_calls %}"
    "{{ '<|turn>model\n<|tool_call>' + m.tool_calls[0].function | tojson + '<tool_call|><|tool_response>' }}"
    "{% else %}{% if messages[loop.index0 - 1].role == 'user' %}{{ '<|turn>model\n' }}{% endif %}{{ m.content + '<turn|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role == 'user' %}{{ '<|turn>model\n<|channel>thought\n<channel|>' }}{% endif %}"
)
BLOCKS = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.reasoning_content %}"
    "{{ '<|im_start|>assistant/think\n' + m.reasoning_content + '<|im_end|>\n' }}{% endif %}" + HEAD + "{{ m.content + '<|im_end|>' }}"
    "{{ '<|endofturn|>\n' if m.role == 'assistant' else '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
COHERE = "{% for m in messages %}{{ '<|' + m.role + '|>' + '<|START|>' + m.content + '<|STOP|><|EOT|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><|START|>' }}{% endif %}"
TURNS = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"

# name: (template, special tokens, eos token, messages, tools, answers trained in one row each where they need one, what is noted)
KINDS = {
    "calls not printed": (PLAIN, [], END, TOLD, [TOOL], [["It is.<|im_end|>"]], {"calls": 1, "tools": 1}),
    "results not printed": (
        CALLING.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"),
        *([], END, TOLD, None, [[CALL + END]], {"unseen": 1}),
    ),
    "text beside a call dropped": (
        CALLING.replace("{{ m.content }}", "{{ m.content if not m.tool_calls else '' }}"),
        *([], END, [user("Warm?"), calls("Bern", text="I look.")], None, [[CALL + END]], {"beside": 1}),
    ),
    "system turn dropped": (
        PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
        *([], END, [SYSTEM, user("Hi!"), says("Ahoy!")], None, [["Ahoy!<|im_end|>"]], {"system": 1}),
    ),
    "reasoning not printed": (PLAIN, [], END, THOUGHT, None, [["Two.<|im_end|>", "Three.<|im_end|>"]], {"reasoning": 2}),
    "the prompt opens the reasoning": (
        *(OPENED, [], END, THOUGHT, None),
        *([["Count.\n</think>\n\nTwo.<|im_end|>"], ["Go on.\n</think>\n\nThree.<|im_end|>"]], {}),
    ),
    "the prompt opens reasoning that is not there": (
        *(OPENED, [], END, [user("Hi!"), says("Ahoy!")], None, [["\n</think>\n\nAhoy!<|im_end|>"]], {}),
    ),
    "reasoning in the text, which history drops": (
        *(OPENED, [], END, [user("One?"), says("<think>\nCount.\n</think>\n\nTwo.")], None),
        *([["Count.\n</think>\n\nTwo.<|im_end|>"]], {}),
    ),
    "history ends turns otherwise": (
        *(GPT_OSS, ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>"], "<|return|>", THOUGHT, None),
        [
            ["<|channel|>analysis<|message|>Count.<|end|><|start|>assistant<|channel|>final<|message|>Two.<|return|>"],
            ["<|channel|>analysis<|message|>Go on.<|end|><|start|>assistant<|channel|>final<|message|>Three.<|return|>"],
        ],
        {},
    ),
    "a call ends with a token of its own": (
        *(GPT_OSS, ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>"], "<|return|>", TOLD, None),
        *([[' to=weather<|message|>{"city": "Bern"}<|call|>', "<|channel|>final<|message|>It is.<|return|>"]], {}),
    ),
    "the next role's marker ends a turn": (
        *(GLM, ["[gMASK]", "<|user|>", "<|assistant|>", "<|observation|>"], "<|endoftext|>", [*TOLD, user("And?"), says("Too.")], None),
        *([[CALL + "<|observation|>", "It is.<|user|>", "Too.<|user|>"]], {}),
    ),
    "the system turn stands in the last question only": (
        *(NEMO, ["<s>", "</s>", "[INST]", "[/INST]"], "</s>", [SYSTEM, user("Hi!"), says("Ahoy!"), user("And?"), says("Fin")], None),
        *([["Ahoy!</s>"], ["Fin</s>"]], {}),
    ),
    "ids are made where they have to be": (
        *(NEMO, ["<s>", "</s>", "[INST]", "[/INST]"], "</s>", TOLD, None),
        *([["[TOOL_CALLS]" + CALL + "000000000</s>", "It is.</s>"]], {}),
    ),
    "ids that do not fit are made anew": (
        *(NEMO, ["<s>", "</s>", "[INST]", "[/INST]"], "</s>"),
        [user("Warm?"), calls("Bern", id="call_1"), result("21 degrees", tool_call_id="call_1"), says("It is.")],
        *(None, [["[TOOL_CALLS]" + CALL + "000000000</s>", "It is.</s>"]], {}),
    ),
    "ids that fit are kept": (
        *(NEMO, ["<s>", "</s>", "[INST]", "[/INST]"], "</s>"),
        [user("Warm?"), calls("Bern", id="abcdefghi"), result("21 degrees", tool_call_id="abcdefghi"), says("It is.")],
        *(None, [["[TOOL_CALLS]" + CALL + "abcdefghi</s>", "It is.</s>"]], {}),
    ),
    "a turn goes on behind its result": (
        *(GEMMA4, ["<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"], "<eos>", TOLD, None),
        *([["<|tool_call>" + CALL + "<tool_call|><|tool_response>"], ["It is.<turn|>"]], {}),
    ),
    "a turn of several blocks": (
        *(BLOCKS, ["<|endofturn|>"], "<|endofturn|>", THOUGHT, None),
        [
            [
                f"/think\n{thought}<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|><|endofturn|>"
                for thought, said in (("Count.", "Two."), ("Go on.", "Three."))
            ]
        ],
        {},
    ),
    "a closing token before the stop": (
        *(COHERE, ["<|START|>", "<|STOP|>", "<|EOT|>"], "<|EOT|>", [user("Hi!"), says("Ahoy!")], None, [["Ahoy!<|STOP|><|EOT|>"]], {}),
    ),
    "arguments as text": (
        CALLING.replace("c.function | tojson", "'<' + c.function.arguments + '>'"),
        *([], END, TOLD, None, [['<{"city": "Bern"}>' + END, "It is." + END]], {}),
    ),
    "arguments that would be printed as Python has them": (
        CALLING.replace("c.function | tojson", "c.function.arguments"),
        *([], END, TOLD, None, [['{"city": "Bern"}' + END, "It is." + END]], {}),
    ),
    "tools have to be a list": (
        "{% for t in tools %}{% endfor %}{{ tools | length }}" + PLAIN,
        *([], END, [user("Hi!"), says("Ahoy!")], None, [["Ahoy!" + END]], {}),
    ),
    "a greeting has a prompt": (
        PLAIN,
        [],
        END,
        [says("Welcome!"), user("Hi!"), says("Ahoy!")],
        None,
        [["Welcome!" + END, "Ahoy!" + END]],
        {},
    ),
    "a greeting that is refused": (
        TURNS + PLAIN,
        [],
        END,
        [says("Welcome!"), user("Hi!"), says("Ahoy!")],
        None,
        [["Ahoy!" + END]],
        {"opening": 1},
    ),
    "a greeting without a prompt": (
        NEMO,
        ["<s>", "</s>"],
        "</s>",
        [says("Welcome!"), user("Hi!"), says("Ahoy!")],
        None,
        [["Ahoy!</s>"]],
        {"opening": 1},
    ),
    "empty answers": (PLAIN, [], END, [user("Hi!"), says("Ahoy!"), user("Hush."), says("")], None, [["Ahoy!" + END]], {"empty": 1}),
    "an answer that the template changes": (
        *(OPENED, [], END, [user("What closes it?"), says("</think> does."), user("Hi!"), says("Ahoy!")], None),
        *([["\n</think>\n\nAhoy!<|im_end|>"]], {"text": 1}),
    ),
    "weights of zero": (
        *(PLAIN, [], END, [user("Hi!"), says("Bad.", weight=0), user("And?"), says("Good.")], None, [["Good." + END]], {"weight": 1}),
    ),
}


def made(text: str, tokens: list[str], eos: str):
    tokenizer = load_tokenizer(CHAT)
    tokenizer.add_special_tokens({"extra_special_tokens": [*tokens, eos]})
    tokenizer.eos_token, tokenizer.chat_template = eos, text
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_template(kind):
    """Trained is what a model has to produce after the prompt that a server makes; the rest is counted."""
    text, tokens, eos, messages, tools, expected, notes = KINDS[kind]
    tokenizer = made(text, tokens, eos)
    taught = encoding.teach(tokenizer, messages, tools, each=True)
    found = [[tokenizer.decode(run) for run in spans(row)] for row in taught.rows]
    assert [answer for row in found for answer in row] == [answer for row in expected for answer in row]
    assert len(found) == len(expected), "as few rows as can be"
    assert dict(taught.notes) == notes
    asked = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i]
    prompts = {encoding.render(tokenizer, messages[:i], tools, prompt=True) for i in asked if "opening" not in notes and "ids" not in kind}
    for row in taught.rows if prompts and messages[0]["role"] != "assistant" else ():
        begins = [k for k, label in enumerate(row.labels) if label != -100 and row.labels[k - 1] == -100]
        assert all(tokenizer.decode(row.input_ids[:k]) in prompts for k in begins)
    one = encoding.teach(tokenizer, messages, tools)
    assert one.notes == taught.notes | ({"hidden": len(expected) - 1} if len(expected) > 1 else {})
    assert [tokenizer.decode(run) for run in spans(one.rows[0])][-1] == expected[-1][-1]


def test_what_a_row_holds_by_reasoning_setting():
    """Inline writes it as the family does, drop leaves it out without a word; the template decides otherwise."""
    inline = "<think>\nCount.\n</think>\n\nTwo."
    for reasoning, given, expected, notes in (
        ("template", THOUGHT[:2], "Two.", {"reasoning": 1}),
        ("inline", THOUGHT[:2], inline, {}),
        ("drop", THOUGHT[:2], "Two.", {}),
        ("template", [user("One?"), says(inline)], inline, {}),
        ("drop", [user("One?"), says(inline)], "Two.", {}),
    ):
        tokenizer = load_tokenizer(CHAT)
        encoding.set_up(tokenizer, text=PLAIN, keywords={}, reasoning=reasoning, today="2026-01-01")
        taught = encoding.teach(tokenizer, given)
        assert [tokenizer.decode(run) for run in spans(taught.rows[0])] == [expected + END] and dict(taught.notes) == notes
    tokenizer = load_tokenizer(CHAT)
    encoding.set_up(tokenizer, text=PLAIN + "{# [THINK] #}", keywords={}, reasoning="inline", today="2026-01-01")
    assert tokenizer.decode(spans(encoding.encode(tokenizer, THOUGHT[:2]))[0]) == "[THINK]\nCount.\n[/THINK]\n\nTwo." + END


def test_chatml_of_ours_shows_everything():
    """The way out where a template drops tools, calls, results, reasoning or the system turn."""
    tokenizer = made(PLAIN, [], END)
    encoding.set_up(tokenizer, text="chatml", keywords={}, reasoning="template", today="2026-01-01")
    talk = [SYSTEM, user("Warm?"), calls("Bern", text="I look.") | {"reasoning_content": "A call."}, result("21 degrees"), says("It is.")]
    taught = encoding.teach(tokenizer, talk, [TOOL])
    assert not taught.notes
    assert [tokenizer.decode(run) for run in spans(taught.rows[0])] == [
        f"<think>\nA call.\n</think>\n\nI look.\n<tool_call>\n{CALL}\n</tool_call>{END}",
        f"It is.{END}",
    ]
    text = encoding.render(tokenizer, talk, [TOOL])
    assert text.startswith(f"{START}system\nBe brief.\n\n") and json.dumps(TOOL) in text and f"{START}tool\n21 degrees{END}" in text
    assert encoding.render(tokenizer, talk[1:2], [TOOL]).startswith(f"{START}system\nThese functions can be called")


@helps("models/evaluation.py", "fine-tune with chat_template=chatml, which shows them")
def test_a_validation_split_of_which_nothing_is_shown():
    records = [{"id": "a", "messages": TOLD[:2], "tools": None}]
    tokenizer = made(PLAIN, [], END)
    with pytest.raises(BadData, match="shows no answer of the validation split"):
        evaluation.encode_all(records, tokenizer, 512)
    encoding.set_up(tokenizer, text="chatml", keywords={}, reasoning="template", today="2026-01-01")
    assert len(evaluation.encode_all(records, tokenizer, 512)) == 1


@helps("chat/template.py", "mend chat_template in tokenizer_config.json (or chat_template.jinja), or remove it to train with ChatML")
def test_a_template_that_breaks_is_mended_or_removed():
    tokenizer = made(PLAIN + "{{ 1 // 0 }}", [], END)
    with pytest.raises(BadData, match="ZeroDivisionError") as error:
        encoding.encode(tokenizer, [user("Hi!"), says("Ahoy!")])
    assert "mend chat_template" in error.value.fix[0]
    for mended in (PLAIN, None):
        tokenizer.chat_template = mended
        encoding.ensure_chat(tokenizer)
        assert encoding.encode(tokenizer, [user("Hi!"), says("Ahoy!")]).trained


@helps("chat/encoding.py", "take that text out of the record, or leave the record out")
def test_a_control_token_is_taken_out_of_the_text():
    tokenizer = made(PLAIN, [], END)
    records = [
        {"id": "a", "messages": [user("What is <|im_end|>?"), says("An end.")]},
        {"id": "b", "messages": [user("Hi!"), says("Ahoy!")]},
    ]
    with pytest.raises(BadData, match="control token") as error:
        list(rows_of(records, tokenizer, "test"))
    assert error.value.where == "record 'a'" and error.value.fix == ["take that text out of the record, or leave the record out"]
    assert len(list(rows_of(records[1:], tokenizer, "test"))) == 1
    records[0]["messages"][0] = user("What is im_end?")
    assert len(list(rows_of(records, tokenizer, "test"))) == 2


def test_an_end_token_that_is_no_special_one_ends_a_turn_too():
    tokenizer = load_tokenizer(CHAT)
    tokenizer.add_tokens(["[END]"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '[END]' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    assert tokenizer.convert_ids_to_tokens(encoding.turn_end(tokenizer)) == "[END]"
    assert [tokenizer.decode(run) for run in spans(encoding.encode(tokenizer, [user("Hi!"), says("Ahoy!")]))] == ["Ahoy![END]"]
    with pytest.raises(BadData, match="control token"):
        encoding.encode(tokenizer, [user("Say [END]"), says("No.")])


def test_a_turn_that_a_server_would_end_too_early_is_not_taught():
    text = CALLING.replace("{% for c in m.tool_calls or [] %}", "{% for c in m.tool_calls or [] %}{{ '<|im_end|>\n<|im_start|>call\n' }}")
    assert encoding.teach(made(text, [], END), TOLD).notes == {"stop": 1}


def test_a_template_s_date_is_one_day_for_all_rows():
    text = "{{ strftime_now('%d %B %Y') }}" + PLAIN
    tokenizer = made(text, [], END)
    assert template.of(tokenizer).dated and encoding.render(tokenizer, [user("Hi!")]).startswith("01 January 2026")
    encoding.set_up(tokenizer, text=None, keywords={}, reasoning="template", today="2027-03-02")
    assert encoding.render(tokenizer, [user("Hi!")]).startswith("02 March 2027")
    with template.as_served_today():
        today = tokenizer.apply_chat_template([user("Hi!")], tokenize=False)
        assert encoding.render(tokenizer, [user("Hi!")]) == today and not today.startswith("02 March 2027")


@helps("chat/template.py", "it reads {}", "template={}: it reads no keyword")
def test_keywords_are_the_template_s_own_from_then_on(tmp_path):
    """They are saved in the template, so that whoever loads the folder renders alike, and can still say otherwise."""
    text = "{% if thinking is defined and thinking %}{{ 'think ' + level }}{% endif %}" + PLAIN
    tokenizer = made(text, [], END)
    encoding.set_up(tokenizer, text=None, keywords={"thinking": True, "level": "high"}, reasoning="inline", today="2027-03-02")
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.apply_chat_template([user("Hi!")], tokenize=False).startswith("think high")
    assert again.apply_chat_template([user("Hi!")], tokenize=False, thinking=False).startswith(START)
    assert again.apply_chat_template([user("Hi!")], tokenize=False, level="low").startswith("think low")
    assert template.of(again).reasoning == "inline" and encoding.teach(again, THOUGHT).notes == {}
    template.check_keywords(text, {"thinking": True})
    with pytest.raises(ConfigError, match="does not read thinkin; did you mean 'thinking'") as error:
        template.check_keywords(text, {"thinkin": True})
    assert error.value.fix == ["it reads level, thinking"]
    template.check_keywords(text, dict.fromkeys(["level", "thinking"], True))
    with pytest.raises(ConfigError, match="does not read thinking") as error:
        template.check_keywords(PLAIN, {"thinking": True})
    assert error.value.fix == ["template={}: it reads no keyword"]
    template.check_keywords(PLAIN, {})
    for value in (None, 1.5, "a 'quoted' \"text\"\n", ["x", {"y": False}]):
        given = template.with_defaults("{{ value | tojson }}", {"value": value})
        tokenizer.chat_template = given
        assert json.loads(tokenizer.apply_chat_template([user("Hi!")], tokenize=False)) == value


def test_a_conversation_of_which_nothing_can_be_taught_says_why():
    with pytest.raises(Unteachable, match="the chat template does not print their tool calls"):
        encoding.encode(made(PLAIN, [], END), TOLD[:2])


def test_weights_of_turns_are_those_of_their_tokens():
    row = encoding.encode(made(PLAIN, [], END), [user("Hi!"), says("Ahoy!", weight=0.5), user("And?"), says("Fin")])
    weights = [weight for weight, label in zip(row.weights, row.labels) if label != -100]
    first = len(spans(row)[0])
    assert weights == [0.5] * first + [1.0] * (len(weights) - first)


def test_every_reason_is_counted_and_too_many_are_refused():
    notes = encoding.Counter(calls=3, reasoning=5, hidden=50, tools=2, empty=1)
    lines = unseen.report(notes, "train")
    assert len(lines) == 5 and lines[0].startswith(
        "train: 3 answers left out of the loss: the chat template does not print their tool calls"
    )
    unseen.check(notes, 100, {}, policy="auto", split="train")
    unseen.check(notes, 4, {}, policy="skip", split="train")
    with pytest.raises(BadData, match="3 of 20 answers cannot be trained") as error:
        unseen.check(notes, 20, {"calls": ["a", "b"]}, policy="auto", split="train")
    assert "(records 'a', 'b')" in error.value.what and "reasoning" not in error.value.what
    with pytest.raises(BadData, match="does not show their reasoning"):
        unseen.check(encoding.Counter(reasoning=1), 100, {}, policy="error", split="train")
    unseen.check(encoding.Counter(hidden=9, weight=3, empty=1), 10, {}, policy="error", split="train")


MERGING = (  # the assistant's turns in a row are one (Apertus); a system turn stands at the top wherever it was (DeepSeek V3.2)
    "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}{% for m in messages if m.role != 'system' %}"
    "{% if m.role != 'assistant' %}{{ '<|im_start|>' + m.content + '<|im_end|><|im_start|>' }}{% else %}{{ m.content }}"
    "{% if loop.last or loop.nextitem.role != 'assistant' %}{{ '<|im_end|>' }}{% endif %}{% endif %}{% endfor %}"
)
MARKED = (  # GLM: a turn ends where the next role's marker stands
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MARKERS = ["<|user|>", "<|system|>", "<|assistant|>", "<|tool|>"]
ONE_END = (  # Phi-3: no results, and a token behind all
    "{% for m in messages if m.role != 'tool' %}{{ '<|' + m.role + '|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
MIDDLE = {"role": "system", "content": "Now shout."}


@pytest.mark.parametrize(
    "text, special, eos, conversation, answers",
    [
        (MERGING, [], END, [user("A?"), says("One."), says("Two."), user("B?"), says("Three.")], ["One.", "Two.", "Three."]),
        (MERGING, [], END, [SYSTEM, user("A?"), says("One."), MIDDLE, user("B?"), says("Three.")], ["One.", "Three."]),
        (MARKED, MARKERS, END, [user("A?"), says("One."), says("Two."), user("B?"), says("Three.")], ["One.", "Two.", "Three."]),
        (MARKED, MARKERS, END, [user("A?"), says("One."), MIDDLE, user("B?"), says("Three.")], ["One.", "Three."]),
        (ONE_END, MARKERS, "<|end|>", [user("A?"), says("One."), result("3"), says("Two.")], ["One."]),
    ],
)
def test_an_answer_holds_no_other_turn_and_ends_where_servers_stop(text, special, eos, conversation, answers):
    tokenizer = made(text, [*special, END], eos)
    stops = template.of(tokenizer).stops
    taught = encoding.teach(tokenizer, conversation, each=True)
    trained = [tokenizer.decode(ids) for row in taught.rows for ids in spans(row)]
    trained = [answer for answer in "".join(trained).split(stops[0]) if answer]  # one may begin right behind another
    assert sorted(trained) == sorted(answers)
    assert len(trained) + sum(taught.notes[why] for why in unseen.LEFT_OUT) == sum(m["role"] == "assistant" for m in conversation)


def test_what_follows_a_message_without_text_is_no_traceback():
    """Of a turn after one that calls alone, where the prompt is not how history goes on."""
    assert template.of(made(PLAIN, [], END)).after("a turn begins", "a turn ended", asked="", thought="") is None


def test_a_system_turn_that_only_one_prompt_hides_is_said():
    text = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content if messages[-1].role != 'tool' and messages[-2].role != 'tool' }}{% else %}"
        + HEAD
        + "{{ m.content + (m.tool_calls | tojson if m.tool_calls else '') + '<|im_end|>' }}{% endif %}{% endfor %}"
        + GENERATION
    )
    assert encoding.teach(made(text, [], END), [SYSTEM, *TOLD, user("And?"), says("So.")], each=True).notes["system"] == 1


def test_a_word_of_the_template_that_is_no_variable_is_no_keyword():
    text = "{% for m in messages %}{% generation %}{{ m.thinking + 'effort' if deep }}{% endgeneration %}{{ documents }}{% endfor %}"
    template.check_keywords(text, {"deep": True})
    for word in ("thinking", "effort", "m", "if", "documents"):
        with pytest.raises(ConfigError, match=f"does not read {word}"):
            template.check_keywords(text, {word: True})
