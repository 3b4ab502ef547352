"""From messages to token ids and a loss mask, through the model's own chat template.

A row is what a server makes of the conversation: the prompt it would send, then what the model has to produce after it, to the token at which servers
stop. The mask follows from that, never from searching text: an answer is what a turn's own rendering adds after its prompt. Where a prompt opens
the reasoning (`<think>`) and the template shows the turn without, the answer is the reasoning, what closes it, and the text.

Control tokens are the template's to write. Text that would become one (a user who types <|im_end|>, an answer that quotes </s>) is refused: as a
token it would end or forge a turn, and spelled out as text it would not be what a server makes of the same words.

A template may show a turn otherwise as history than as an answer: Qwen3 takes the reasoning out of all turns before the last question, gpt-oss ends
them with another token. One row cannot hold both. `encode` makes one row and leaves out of the loss the turns that it does not show as they are
answered; `encode_turns` makes as many rows as it takes to train each, which is how Qwen's own authors advise to prepare such data
(github.com/QwenLM/Qwen3/discussions/1398). An answer without reasoning gets Qwen3's empty block only as the last turn, and is trained without it in
history. The block is trained: a prompt in thinking mode does not hold it, and the prompt of enable_thinking=False, which does, is a prefix of the
same row.

Nothing is taught that the template does not show: a call that it does not print would be an empty answer, an answer to a result that it drops a guess.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from src.chat import template, unseen
from src.chat.template import CHATML, END, START, THINKING, ChatTemplate, Unteachable, reasoning_of
from src.core.errors import BadData

IGNORE = -100
QWEN_SYSTEM = "You are a helpful assistant."
EMPTY_BLOCK = re.compile("^(?:" + "|".join(rf"{re.escape(a)}\s*{re.escape(b)}" for a, b in THINKING) + r")\s*")
"""reasoning without a word in it"""
LETTERS = 100
"""of a text for each token that is looked at: no more of one are read"""


@dataclass(frozen=True)
class Encoded:
    """One row of training input.

    input_ids: token ids. labels: the same ids where the loss counts, -100 elsewhere. weights: of each label in the loss, None where all are 1. All of
    the same length. untrained: assistant turns out of the loss, because the row shows them otherwise than a model would answer them.
    """

    input_ids: list[int]
    labels: list[int]
    untrained: int = 0
    weights: list[float] | None = None

    @property
    def trained(self) -> int:
        """Tokens the loss counts."""
        return sum(label != IGNORE for label in self.labels)


@dataclass(frozen=True)
class Taught:
    """A conversation's rows, none where it teaches nothing, and counts of what they do not teach as it stands there; see chat.unseen for the reasons."""

    rows: list[Encoded]
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class TrainedTurn:
    """An answer to train: the prompt, the text to produce after it to its stop token, and what the template prints behind."""

    prompt: str
    answer: str
    behind: str
    stop: str
    reasons: bool
    weight: float


def ensure_chat(tokenizer) -> list[str]:
    """Give a tokenizer without a chat template ChatML: the template, its two tokens where missing, and a padding token.

    Returns the tokens added, in id order. A tokenizer that has a template keeps it; one that has none is marked `of_plain_text`, for its model has seen no
    template. Turn end becomes the eos token, as serving tools expect.
    """
    if tokenizer.chat_template:
        added = []
    else:
        tokenizer.of_plain_text = True
        missing = [token for token in (START, END) if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)]
        starts_with_bos = tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        tokenizer.add_special_tokens({"extra_special_tokens": [START, END]} if missing else {})
        tokenizer.eos_token = END
        tokenizer.chat_template = ("{{ bos_token }}" if starts_with_bos else "") + CHATML
        added = missing
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return added


def text_alone(messages: Sequence[dict], tools: Sequence | None) -> str | None:
    """What a record of plain text says: one turn of the assistant's, with nothing before it; None of a conversation."""
    (*before, last) = messages
    return last["content"] if not before and tools is None and last.keys() == {"role", "content"} and last["role"] == "assistant" else None


def of_text(text: str, tokenizer, longest: int | None = None) -> Encoded:
    """Text as it stands, without a template, of which every token counts; `longest` tokens of it at most."""
    ids = tokenizer(text if longest is None else text[: LETTERS * longest]).input_ids[:longest]
    return Encoded(ids, ids)


def set_up(tokenizer, *, text: str | None, keywords: dict, reasoning: str, today: str) -> list[str]:
    """Give a tokenizer the chat template that is asked for; returns the tokens added, see ensure_chat.

    text: a template in place of its own, "chatml" for ours. keywords: of the template. reasoning, today: see settings.verbs. All of it is saved with
    the tokenizer, so that whoever renders with it later renders alike.
    """
    if text:
        tokenizer.chat_template = None if text == "chatml" else text
    added = ensure_chat(tokenizer)
    vars(tokenizer).pop("of_plain_text", None)  # from here on conversations are what it is taught
    tokenizer.chat_template = template.with_defaults(str(tokenizer.chat_template), keywords)
    settings = {"reasoning": reasoning, "today": today}
    tokenizer.init_kwargs[template.SETTINGS] = {name: value for name, value in settings.items() if value != template.USUAL[name]}
    if not tokenizer.init_kwargs[template.SETTINGS]:
        del tokenizer.init_kwargs[template.SETTINGS]
    return added


def render(tokenizer, messages: Sequence[dict], tools=None, *, prompt: bool = False) -> str:
    """The conversation as text; with prompt=True opened for the assistant's next turn. Raises as ChatTemplate.render."""
    return template.of(tokenizer).render(messages, tools, prompt=prompt)


def turn_end(tokenizer) -> int:
    """Id of the special token that ends a plain answer in this template."""
    return tokenizer.convert_tokens_to_ids(template.of(tokenizer).turn_end)


def encode(tokenizer, messages: Sequence[dict], tools=None) -> Encoded:
    """One row of a conversation; trained are the assistant's turns, each with the token that ends it.

    The row ends with the last turn that can be taught, which is always trained; messages after it teach nothing. An earlier turn is out of the loss,
    and counted in `untrained`, where the row does not show it as it is answered.

    Raises BadData where a text holds a control token, Unteachable where there is no turn to train.
    """
    return _some(teach(tokenizer, messages, tools))[0]


def encode_turns(tokenizer, messages: Sequence[dict], tools=None) -> list[Encoded]:
    """The rows, as few as can be, that together train each turn that can be taught exactly once and exactly as the template shows it as an answer.

    One row where the template shows history as it was answered; up to one a turn where it does not. Raises as `encode`.
    """
    return _some(teach(tokenizer, messages, tools, each=True))


def teach(tokenizer, messages: Sequence[dict], tools=None, *, each: bool = False) -> Taught:
    """The row of a conversation, or with each=True the rows that train each of its turns, and what of it they do not teach.

    Raises BadData where a text holds a control token or there is no assistant turn, Unteachable where the template refuses the conversation.
    """
    chat = template.of(tokenizer)
    _refuse_control(chat, messages, tools)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadData("no assistant turn, so nothing to train on")
    turns, notes = _turns(chat, messages, tools)
    rows = []
    left = turns
    while left:
        row, trained = _row(tokenizer, left, turns.index(left[-1]) + 1, exact=each)
        rows.append(row)
        left = [turn for turn in left if turn not in trained] if each else []
    if not each and rows and rows[0].untrained:
        notes["hidden"] += rows[0].untrained
    return Taught(rows[::-1], notes)


def _some(taught: Taught) -> list[Encoded]:
    if not taught.rows:
        raise Unteachable("no answer of it can be taught: " + unseen.in_words(taught.notes))
    return taught.rows


def _refuse_control(chat: ChatTemplate, messages: Sequence[dict], tools) -> None:
    """Raises BadData where a text of the conversation would become a control token."""
    control = _control_tokens(chat)
    places = [f"message {i + 1} ({message['role']})" for i, message in enumerate(messages)]
    for place, part in zip([*places, "the tools"], [*messages, list(tools or [])]):
        if found := control.search(json.dumps(part, ensure_ascii=False)):
            raise BadData(
                f"{found[0]} in {place} is a control token of this model and would end or forge a turn",
                fix="take that text out of the record, or leave the record out",
            )


@lru_cache(maxsize=8)
def _control_tokens(chat: ChatTemplate) -> re.Pattern:
    """The special tokens that the template writes, and those at which a server stops or which fill a batch.

    Others, such as MiniCPM4's <|tool_call|>, are an answer's to use; <unk> is no one's.
    """
    written = str(chat.tokenizer.chat_template) + chat.render(template.PROBE)
    stops = {chat.tokenizer.eos_token, chat.tokenizer.pad_token, chat.turn_end}
    found = {token for token in template.special_tokens(chat.tokenizer) if token in written or token in stops} | {chat.turn_end}
    return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))))


# ---- what is answered


def _turns(chat: ChatTemplate, messages: Sequence[dict], tools) -> tuple[list[TrainedTurn], Counter[str]]:
    """The turns to train, in order, and counts of what is left out or not shown."""
    notes: Counter[str] = Counter()
    messages, taken, whole = _accepted(chat, messages, tools, notes)
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    turns, seen = [], []
    for i, message in enumerate(messages[: last + 1]):
        if message["role"] != "assistant":
            continue
        turn = _turn(chat, messages, taken, tools, whole, i, last)
        if isinstance(turn, str):
            notes[turn] += 1
            continue
        thought, said = reasoning_of(message)
        if thought.strip() and thought.strip() not in turn.answer and chat.reasoning != "drop":
            notes["reasoning"] += 1
        if message.get("tool_calls") and said.strip() and said.strip() not in turn.answer:
            notes["beside"] += 1
        turns.append(turn)
        seen.append(chat.shows(messages[: i + 1], tools, messages[i + 1] if i + 1 < len(messages) else None))
    notes["system"] += not all(shown.system for shown in seen)
    notes["tools"] += not all(shown.tools for shown in seen)
    return turns, +notes


def _accepted(chat: ChatTemplate, messages: Sequence[dict], tools, notes: Counter) -> tuple[Sequence[dict], list[dict], str]:
    """(messages, those as the template takes them, their rendering to the last answer). Where it refuses what is given: with ids of its own kind, and
    without what the assistant says before any user. Raises Unteachable where it refuses that too."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    first = next(i for i, message in enumerate(messages) if message["role"] != "system" or i == last)
    begins = next((i for i, message in enumerate(messages[first:], first) if message["role"] != "assistant"), last)
    shorter = [*messages[:first], *messages[begins:]]
    refusal = None
    for some, anew in ((messages, False), (messages, True), (shorter, False), (shorter, True)):
        if not any(message["role"] == "assistant" for message in some):
            continue
        taken = chat.taken(some, anew=anew)
        end = max(i for i, message in enumerate(some) if message["role"] == "assistant") + 1
        try:
            whole = chat.rendered(taken[:end], tools)
        except Unteachable as error:
            refusal = refusal or error
            continue
        if some is shorter:
            notes["opening"] += begins - first
        return some, taken, whole
    assert refusal
    raise refusal


def _turn(chat: ChatTemplate, messages, taken, tools, whole: str, i: int, last: int) -> TrainedTurn | str:
    """The answer of message i, or the reason why it is not taught. whole: the rendering up to message `last`."""
    message = messages[i]
    thought, said = reasoning_of(message)
    weight = message.get("weight", 1)
    if not weight:
        return "weight"
    if not said.strip() and not message.get("tool_calls"):
        return "empty"
    if i:
        try:
            prompt = chat.rendered(taken[:i], tools, prompt=True)
        except Unteachable:
            return "opening"
    elif (opening := chat.opening(message, tools)) is None:
        return "opening"
    else:
        prompt = opening
    shown = chat.shows(messages[: i + 1], tools, messages[i + 1] if i + 1 < len(messages) else None)
    if not shown.calls:
        return "calls"
    if shown.hidden:
        return "unseen"
    if not shown.text and not message.get("tool_calls"):
        return "text"
    if shown.stop is None or shown.early or (shown.closing and shown.stop not in chat.stops):
        return "stop"
    answer = ""
    # A template may write two turns of the assistant as one, and put a later system turn anywhere.
    moved = any(m["role"] == "system" for m in messages[i + 1 : last]) or (i < last and messages[i + 1]["role"] == "assistant")
    if shown.faithful and not moved and whole.startswith(prompt):
        ends_here = shown.closing and i == last
        answer = whole[len(prompt) :] if ends_here else whole[len(prompt) : whole.find(shown.stop, len(prompt)) + len(shown.stop)]
    if not answer or said.strip() not in answer or (shown.reasoning and thought.strip() not in answer):
        # Later messages may change how a turn stands in history.
        full = whole if i == last else chat.rendered(taken[: i + 1], tools)
        text = chat.after(prompt, full, asked=taken[i - 1]["content"] if i else "", thought=thought)
        if text is None:
            return "unlike"
        answer = text if shown.closing else text[: text.rfind(shown.stop) + len(shown.stop)]
    if shown.closing and not answer.endswith(shown.closing):
        answer += shown.closing
    if shown.stop in answer[: -len(shown.stop)] or not answer.endswith(shown.stop):
        return "stop"
    if shown.text and said.strip() not in answer:
        return "text"
    return TrainedTurn(prompt, answer, shown.behind, shown.stop, bool(thought.strip()), weight)


# ---- rows


def _row(tokenizer, turns: list[TrainedTurn], shown: int, *, exact: bool) -> tuple[Encoded, list[TrainedTurn]]:
    """(the row that ends with the last of the turns, those of them it trains). shown: how many of the conversation's turns stand in it."""
    last = turns[-1]
    text = last.prompt + last.answer + last.behind
    trained, starts = [], []
    for turn in turns:
        as_answered = turn is last or text.startswith(turn.prompt + turn.answer)
        if not as_answered and not exact and not turn.reasons:
            as_answered = text.startswith(turn.prompt + EMPTY_BLOCK.sub("", turn.answer))
        if as_answered:
            trained.append(turn)
            starts.append(len(turn.prompt))
    ids, at = _ids(tokenizer, text, starts)
    labels, weights = [IGNORE] * len(ids), [1.0] * len(ids)
    for turn, start, limit in zip(trained, at, [*at[1:], len(ids)]):
        stop = ids.index(tokenizer.convert_tokens_to_ids(turn.stop), start, limit) + 1
        labels[start:stop] = ids[start:stop]
        weights[start:stop] = [turn.weight] * (stop - start)
    weighted = any(turn.weight != 1 for turn in trained)
    return Encoded(ids, labels, shown - len(trained), weights if weighted else None), trained


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


def encode_qwen_legacy(tokenizer, messages: Sequence[dict], *, eos_id: int) -> Encoded:
    """Token ids and labels as Qwen's finetune.py makes them (QwenLM/Qwen, `preprocess`): every turn's markers and newline are trained too,
    a default system turn is put first where there is none, and each piece is tokenized by itself. Tools, calls and weights are not known to it.

    Raises BadData where a text holds a control token.
    """
    _refuse_control(template.of(tokenizer), messages, None)
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
