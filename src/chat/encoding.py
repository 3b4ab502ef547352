"""From messages to token ids and a loss mask, through the model's own chat template.

The mask is built from token spans, never by searching text: for each assistant turn the template is rendered up to its opening (as a prompt
would be), the rendering is a prefix of the whole conversation, and the turn runs from there to its stop token. What is trained is so exactly
what a served model has to produce after the prompt it gets.

Control tokens are the template's to write. Text that would become one (a user who types <|im_end|>, an answer that quotes </s>) is refused: as a
token it would end or forge a turn, and spelled out as text it would not be what a server makes of the same words.

A template may show a turn otherwise as history than as an answer: Qwen3 takes the reasoning out of all turns before the last question. One row
cannot hold both. `encode` makes one row and leaves the reasoning turns that it cannot show out of the loss, since trained without their reasoning
they would teach to answer without it; `encode_turns` makes as many rows as it takes to train each turn as it is answered, which is how Qwen's own
authors advise to prepare such data (github.com/QwenLM/Qwen3/discussions/1398). An answer without reasoning gets Qwen3's empty block only as the
last turn. The block is trained: a prompt in thinking mode does not hold it, and the prompt of enable_thinking=False, which does, is a prefix of
the same row.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from src.core.errors import BadData, WrongKind, using

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}{{ '\\n<tool_call>\\n' + (call['function'] | tojson) + '\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
IGNORE = -100
QWEN_SYSTEM = "You are a helpful assistant."
PROBE = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good morning."}]


@dataclass(frozen=True)
class Encoded:
    """One conversation as training input.

    input_ids: token ids. labels: the same ids where the loss counts, -100 elsewhere; both of the same length.
    untrained: assistant turns out of the loss, because the row shows them otherwise than a model would answer them.
    """

    input_ids: list[int]
    labels: list[int]
    untrained: int = 0

    @property
    def trained(self) -> int:
        """Tokens the loss counts."""
        return sum(label != IGNORE for label in self.labels)


def ensure_chat(tokenizer) -> list[str]:
    """Give a tokenizer without a chat template ChatML: the template, its two tokens where missing, and a padding token.

    Returns the tokens added, in id order. A tokenizer that has a template keeps it. Turn end becomes the eos token, as serving tools expect.
    """
    if tokenizer.chat_template:
        added = []
    else:
        missing = [token for token in (START, END) if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)]
        starts_with_bos = tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        tokenizer.add_special_tokens({"extra_special_tokens": [START, END]} if missing else {})
        tokenizer.eos_token = END
        tokenizer.chat_template = ("{{ bos_token }}" if starts_with_bos else "") + TEMPLATE
        added = missing
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return added


def render(tokenizer, messages: Sequence[dict], tools=None, *, prompt: bool = False) -> str:
    """The conversation as text; with prompt=True opened for the assistant's next turn.

    Arguments of tool calls may be objects or their JSON; templates get objects, as servers of the OpenAI protocol give them.
    Raises BadData where the template refuses such turns, or arguments are neither.
    """
    from jinja2 import TemplateError

    bound_templates()
    messages = [_with_objects(message) if message.get("tool_calls") else message for message in messages]
    given = {"tools": list(tools) if tools else None, "tokenize": False, "add_generation_prompt": prompt}
    with using(
        "the chat template", tokenizer.name_or_path, "mend chat_template in tokenizer_config.json, or remove it to train with ChatML"
    ):
        try:
            return tokenizer.apply_chat_template(messages, **given)
        except TemplateError as error:
            raise BadData(f"the chat template refuses this conversation: {error}") from None


@lru_cache
def bound_templates() -> None:
    """From here on no chat template loops without end (template_bounds)."""
    from src.chat import template_bounds

    template_bounds.install()


def _with_objects(message: dict) -> dict:
    """The message with the arguments of each tool call as an object."""
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise BadData(f"a tool call's arguments are no JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise BadData("a tool call's arguments are no JSON object")
        function = function | {"arguments": arguments}
        calls.append(call | {"function": function} if "function" in call else function)
    return message | {"tool_calls": calls}


def turn_end(tokenizer) -> int:
    """Id of the special token that ends an assistant turn in this template."""
    head = render(tokenizer, PROBE[:1], prompt=True)
    whole = render(tokenizer, PROBE)
    closing = whole[len(head) :].rpartition(PROBE[1]["content"])[2]
    special = set(tokenizer.convert_tokens_to_ids(list(_special_tokens(tokenizer))))
    eos_id = next((i for i in tokenizer(closing, add_special_tokens=False).input_ids if i in special), None)
    if not whole.startswith(head) or eos_id is None:
        raise WrongKind(
            "the chat template does not end an assistant turn with a special token, so a tuned model could not learn to stop",
            where=str(tokenizer.name_or_path),
            fix="remove chat_template from tokenizer_config.json (and chat_template.jinja) to train with ChatML",
        )
    return eos_id


def encode(tokenizer, messages: Sequence[dict], tools=None, *, eos_id: int) -> Encoded:
    """Token ids and labels of one conversation; trained are the assistant's text and the token `eos_id` that closes it.

    The row ends with the last assistant turn, which is always trained; messages after it teach nothing. An earlier turn is out of the loss, and
    counted in `untrained`, where the row does not show it after the prompt it answered, or shows it without its reasoning.

    Raises BadData where there is no assistant turn, a text holds a control token, or the template does not render the last turn after its prompt.
    """
    _refuse_control(tokenizer, messages, tools, eos_id)
    turns = _assistant_turns(messages)
    text, cuts = _answers(tokenizer, messages[: turns[-1] + 1], tools, eos_id, turns, exact=False)
    return _labelled(*_ids(tokenizer, text, list(cuts.values())), eos_id, len(turns) - len(cuts))


def encode_turns(tokenizer, messages: Sequence[dict], tools=None, *, eos_id: int) -> list[Encoded]:
    """The rows, as few as can be, that together train each assistant turn exactly once and exactly as the template shows it as an answer.

    One row where the template shows history as it was answered; up to one a turn where it does not. Raises as `encode`.
    """
    _refuse_control(tokenizer, messages, tools, eos_id)
    left = turns = _assistant_turns(messages)
    rows = []
    while left:
        text, cuts = _answers(tokenizer, messages[: left[-1] + 1], tools, eos_id, left, exact=True)
        shown = turns.index(left[-1]) + 1
        rows.append(_labelled(*_ids(tokenizer, text, list(cuts.values())), eos_id, shown - len(cuts)))
        left = [i for i in left if i not in cuts]
    return rows[::-1]


def _assistant_turns(messages: Sequence[dict]) -> list[int]:
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise BadData("no assistant turn, so nothing to train on")
    return turns


def _refuse_control(tokenizer, messages: Sequence[dict], tools, eos_id: int) -> None:
    """Raises BadData where a text of the conversation would become a control token."""
    control = _control_tokens(tokenizer, str(tokenizer.chat_template), eos_id)
    places = [f"message {i + 1} ({message['role']})" for i, message in enumerate(messages)]
    for place, part in zip([*places, "the tools"], [*messages, list(tools or [])]):
        if found := control.search(json.dumps(part, ensure_ascii=False)):
            raise BadData(f"{found[0]} in {place} is a control token of this model and would end or forge a turn")


@lru_cache(maxsize=4)
def _control_tokens(tokenizer, template: str, eos_id: int) -> re.Pattern:
    """The special tokens that the template writes, and those at which a server stops or which fill a batch.

    Others, such as MiniCPM4's <|tool_call|>, are an answer's to use; <unk> is no one's.
    """
    written = template + render(tokenizer, PROBE)
    stops = {tokenizer.eos_token, tokenizer.pad_token, tokenizer.convert_ids_to_tokens(eos_id)}
    found = {token for token in _special_tokens(tokenizer) if token in written or token in stops}
    return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))))


def _special_tokens(tokenizer) -> set[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return (added | set(tokenizer.all_special_tokens)) - {tokenizer.unk_token}


def _answers(tokenizer, messages: Sequence[dict], tools, eos_id: int, turns: Sequence[int], *, exact: bool) -> tuple[str, dict[int, int]]:
    """The conversation as text, and of those `turns` that it shows as they are answered, the character position where each answer begins.

    exact: compare every turn with the template's rendering of it as an answer; otherwise only those that reason. The last message is one of
    `turns` and of those found. Raises BadData where it is not rendered after its prompt.
    """
    whole, stop = render(tokenizer, messages, tools), tokenizer.convert_ids_to_tokens(eos_id)
    cuts = {}
    for i in turns:
        head = render(tokenizer, messages[:i], tools, prompt=True)
        if not whole.startswith(head):
            continue
        if i + 1 < len(messages) and (exact or _reasons(messages[i])):
            before, closing, _ = render(tokenizer, messages[: i + 1], tools).rpartition(stop)
            if not whole.startswith(before + closing):
                continue
        cuts[i] = len(head)
    if len(messages) - 1 not in cuts:
        raise BadData(
            f"the chat template renders message {len(messages)} differently as a prompt and as history, so its tokens cannot be told apart"
        )
    return whole, cuts


def _reasons(message: dict) -> bool:
    return bool(message.get("reasoning_content")) or "</think>" in (message.get("content") or "")


def _labelled(ids: list[int], starts: list[int], eos_id: int, untrained: int) -> Encoded:
    """The row with labels from each start to the first `eos_id` at or after it."""
    labels = [IGNORE] * len(ids)
    for start, limit in zip(starts, [*starts[1:], len(ids)]):
        stop = next((k for k in range(start, limit) if ids[k] == eos_id), None)
        if stop is None:
            raise BadData("an assistant turn has no stop token after the template")
        labels[start : stop + 1] = ids[start : stop + 1]
    return Encoded(ids, labels, untrained)


def _ids(tokenizer, text: str, cuts: list[int]) -> tuple[list[int], list[int]]:
    """Token ids of the text and the index of the first token at or after each cut (character positions, rising).

    Where one token would reach over a cut, the text is tokenized in two there: a served model gets the prompt's tokens without what follows.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if (starts := _starts(encoded["offset_mapping"], cuts)) is not None:
            return encoded["input_ids"], starts
    return _ids_by_piece(tokenizer, text, cuts)


def _starts(offsets: list[tuple[int, int]], cuts: list[int]) -> list[int] | None:
    """The index of the first token at or after each cut; None where a token reaches over one."""
    starts, k = [], 0
    for cut in cuts:
        while k < len(offsets) and offsets[k][0] < cut:
            if offsets[k][1] > cut:
                return None
            k += 1
        starts.append(k)
    return starts


def _ids_by_piece(tokenizer, text: str, cuts: list[int]) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    starts: list[int] = []
    for begin, stop in zip([0, *cuts], [*cuts, len(text)]):
        if begin:
            starts.append(len(ids))
        ids += tokenizer(text[begin:stop], add_special_tokens=False).input_ids
    return ids, starts


def encode_qwen_legacy(tokenizer, messages: Sequence[dict], tools=None, *, eos_id: int) -> Encoded:
    """Token ids and labels as Qwen's finetune.py makes them (QwenLM/Qwen, `preprocess`): every turn's markers and newline are trained too,
    a default system turn is put first where there is none, and each piece is tokenized by itself. Tools are not known to it.

    Raises BadData where a text holds a control token.
    """
    _refuse_control(tokenizer, messages, tools, eos_id)
    start, newline = tokenizer.convert_tokens_to_ids(START), tokenizer("\n", add_special_tokens=False).input_ids
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": QWEN_SYSTEM}, *messages]
    ids, labels = [], []
    for message in messages:
        role = tokenizer(message["role"], add_special_tokens=False).input_ids
        content = tokenizer(message["content"], add_special_tokens=False).input_ids
        hidden = [IGNORE] * (len(role) + len(newline))
        ids += [start, *role, *newline, *content, eos_id, *newline]
        labels += [start, *hidden, *(content if message["role"] == "assistant" else [IGNORE] * len(content)), eos_id, *newline]
    return Encoded(ids, labels)
