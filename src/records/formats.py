"""The layouts chat datasets come in: which one a record is in, and its messages and tools in the form chat templates take."""

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from src.records.json_stream import Malformed, quote
from src.records.turns import (
    MEDIA,
    NUMBER,
    QWEN_ROLES,
    REASONING,
    TURN_FIELDS,
    Turn,
    is_empty,
    kind,
    loads,
    messages_of,
    own_reasoning,
    text_of,
    weight_of,
)

LISTS = ("messages", "conversations", "conversation")
"""columns that hold turns"""
PROMPTS = ("instruction", "query", "prompt", "question")
CONTEXTS = ("input", "context")
ANSWERS = ("output", "response", "completion", "answer")
SYSTEMS = ("system", "system_prompt")
RECORD_KEYS = (*LISTS, *PROMPTS)
PAIR = ("chosen", "rejected")
TURNS_IN = {*LISTS, *PROMPTS, *ANSWERS, "chosen"}
"""columns that hold turns, or may"""
UNUSED_ANSWERS = ("rejected", "rejected_response", "rejected_messages")

SHARED_COLUMNS = {"id", "tools", "weight", *SYSTEMS, *MEDIA}
PAIR_COLUMNS = {"history", "label", *PROMPTS, *ANSWERS, *CONTEXTS, *REASONING, *SHARED_COLUMNS}
COLUMNS = {
    "qwen": {*LISTS, *SHARED_COLUMNS},
    "sharegpt": {*LISTS, *SHARED_COLUMNS},
    "openai": {*LISTS, *SHARED_COLUMNS, *UNUSED_ANSWERS},
    "alpaca": PAIR_COLUMNS,
    "prompt_completion": PAIR_COLUMNS,
    "question_answer": PAIR_COLUMNS,
    "preference": {"conversations", "messages", *PAIR, *PAIR_COLUMNS},
    "text": {"text", *SHARED_COLUMNS},
}
KNOWN = tuple(sorted(set().union(*COLUMNS.values())))
"""every column that some layout reads"""
TURN_KEYS = {"qwen": ("conversations", "conversation"), "sharegpt": ("conversations", "conversation"), "openai": ("messages",)}
"""{layout of turns: the columns that hold them}"""
PAIR_FIELDS = ("human", "assistant")
TURN_NAMES = ("role", "content")
"""fields of a turn that data.columns can name too"""

UNUSED = "the rejected answer of a pair, not used"
TEXT_ALONE = "plain text, learnt as the assistant's with nothing before it"
RENDERED = "plain text that looks like a conversation already written out"
PROMPT_TURNS = "assistant turns of a prompt, not trained on"
WEIGHT_0 = "assistant turns of weight 0, not trained on"
WEIGHTED = "assistant turns with a weight of their own"
PYTHON_LIST = "a list in Python's spelling instead of JSON's"
PLACEHOLDER = "a placeholder such as {{name}} is in the text"
DECOMPOSED = "Korean in decomposed letters (NFD), kept as it is; most tokenizers cut it into many more tokens"

PYTHON_LIST_LIMIT = 1 << 20

_PLACEHOLDER = re.compile(r"\{\{ ?[A-Za-z_]\w* ?\}\}")
_LIST_OF_OBJECTS = re.compile(r"\s*\[\s*[{\]]")
_JAMO = re.compile("[\u1100-\u11ff]")
_RENDERED = re.compile(r"^\s*(?:### ?(?:Human|User|Instruction)|Human: |User: |\[INST\]|<\|user\|>|<s>)")


def as_object(value: object) -> dict:
    if isinstance(value, Malformed):
        raise value
    if not isinstance(value, dict):
        raise Malformed("not an object", f"the record is {kind(value)}")
    return value


def detect(record: dict) -> tuple[str, bool]:
    """The format a record is in, and whether it could be no other. Raises Malformed if it is in none."""
    if not is_empty(record.get("chosen")):
        return "preference", True
    for key in LISTS:
        if isinstance(record.get(key), list):
            return _turns_format(record, key)
    if present(record, ANSWERS) and (found := present(record, PROMPTS) or present(record, ("input",))):
        format = {"prompt": "prompt_completion", "question": "question_answer"}.get(found[0], "alpaca")
        return ("prompt_completion" if "completion" in record and found[0] == "prompt" else format), True
    if isinstance(record.get("text"), str):
        return "text", True
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and present(value[0], RECORD_KEYS):
            raise Malformed("unknown format", f"an object with its records under {quote(key)}; expected an array of them, or one a line")
    keys = ", ".join(quote(key) for key in list(record)[:8]) or "no keys"
    raise Malformed(
        "unknown format",
        f"the record has {keys}; expected 'conversations', 'messages', or a question and its answer such as 'instruction' and 'output'",
    )


def fits(columns: Iterable[str]) -> bool:
    """Whether records with these columns can be in a layout at all."""
    names = set(columns)
    pair = names & {*PROMPTS, "input"} and names & {*ANSWERS}
    return bool(names & {*LISTS, "chosen", "text"} or pair)


def decoded(record: dict, notes: set[str]) -> dict:
    """The record with the turns that a column holds as JSON, as tables of text do, as a list. notes grows by what is to be said of it. Raises Malformed."""
    found: dict = {}
    said: list[str] = []
    for key in LISTS:
        value = record.get(key)
        if isinstance(value, str) and _LIST_OF_OBJECTS.match(value):
            found[key] = listed(record, key, said)
    notes |= set(said)
    return record | found if found else record


def _turns_format(record: dict, key: str) -> tuple[str, bool]:
    named = [turn for turn in record[key] if _has_role(turn)]
    if key == "conversation" and not named:
        return "sharegpt", True
    if (named and "role" in named[0]) or (not named and key == "messages"):
        return "openai", True
    names = {turn.get("from") for turn in named if isinstance(turn.get("from"), str)}
    shared = {"system", "tool"}
    if names - set(QWEN_ROLES):
        return "sharegpt", True
    return "qwen", bool(names - shared)


def _begins_with(turns: object, field: str) -> bool:
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and field in turns[0]


def _has_role(turn: object) -> bool:
    return isinstance(turn, dict) and ("role" in turn or "from" in turn)


def ignored(record: dict, format: str) -> set[str]:
    """Notes on what the record has beyond its format."""
    judged = desired(record, format) is not None
    unread = set() if judged else {"label"}
    if format in TURN_KEYS:
        unread |= {*LISTS} - {_turns_key(record, TURN_KEYS[format])}
    read = COLUMNS[format] - unread | ({"label"} if judged else set())
    notes = {f"unknown column ignored: {quote(key)}" for key in record if key not in read}
    for key in record.keys() & read & TURNS_IN:
        turns = record[key]
        for turn in turns if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns) else ():
            known = TURN_FIELDS if _has_role(turn) else PAIR_FIELDS
            notes |= {f"unknown turn field ignored: {quote(field)}" for field in turn if field not in known}
    return notes


def seen(record: dict, messages: Iterable[dict]) -> set[str]:
    """Notes on how the record was read, and on what in its texts is likely not meant to be learnt."""
    notes: set[str] = set()
    for message in messages:
        notes |= set(getattr(message, "notes", ()))
        text = message["content"]
        if "{{" in text and _PLACEHOLDER.search(text):
            notes.add(PLACEHOLDER)
        if not text.isascii() and _JAMO.search(text):
            notes.add(DECOMPOSED)
        if message.get("weight") is not None and PROMPT_TURNS not in getattr(message, "notes", ()):
            notes.add(WEIGHTED if message["weight"] else WEIGHT_0)
    if present(record, UNUSED_ANSWERS):
        notes.add(UNUSED)
    return notes


# ---- one function a layout


def _turns(record: dict, roles: Mapping[str, str], *keys: str) -> list[Turn]:
    """Turns in a list under one of `keys`, or under another name that lists have, in turns as this layout names their fields."""
    key = _turns_key(record, keys)
    if key == "conversation" and isinstance(record.get(key), list) and not any(_has_role(turn) for turn in record[key]):
        return _system(record) + _pairs(record[key])
    if key not in record:
        raise Malformed("missing field", f"the record has no {key!r}")
    return _after_system(record, messages_of(record[key], key, roles))


def _turns_key(record: dict, keys: tuple[str, ...]) -> str:
    field = "role" if keys[0] == "messages" else "from"
    others = (key for key in LISTS if key not in keys and _begins_with(record.get(key), field))
    here = (key for key in keys if isinstance(record.get(key), list))
    return next(here, None) or next(others, None) or next((key for key in keys if key in record), keys[0])


def _after_system(record: dict, messages: list[Turn]) -> list[Turn]:
    """The messages after the system turn of a column of its own, where it is not the one they begin with."""
    own = _system(record)
    return messages if own and own[0] == messages[0] else own + messages


def _pairs(pairs: list) -> list[Turn]:
    """ms-swift's own layout: {"human", "assistant"} for each question and its answer."""
    if not pairs:
        raise Malformed("empty list", "'conversation'")
    messages = []
    for number, pair in enumerate(pairs, 1):
        place = f"pair {number}"
        if not isinstance(pair, dict):
            raise Malformed("ill-typed field", f"'conversation' item {number} is {kind(pair)}, not an object")
        messages.append(Turn({"role": "user", "content": text_of(pair, "human", place)}, place))
        messages.append(Turn({"role": "assistant", "content": text_of(pair, "assistant", place)}, place))
    return messages


def _question_and_answer(record: dict, roles: Mapping[str, str]) -> list[Turn]:
    """A prompt and its answer, each a text or a list of turns, with what went before."""
    key = _one_of(record, PROMPTS if present(record, PROMPTS) else (*PROMPTS, "input"))
    before = _before(record, roles, key, CONTEXTS if key != "input" else ("context",))
    return [*before, *_answer(record, _one_of(record, ANSWERS), roles)]


def _before(record: dict, roles: Mapping[str, str], key: str, contexts: tuple[str, ...]) -> list[Turn]:
    """System turn, history and prompt of a question and its answer."""
    if isinstance(record.get(key), list):
        messages = _after_system(record, messages_of(record[key], key, roles))
        # What a prompt quotes of earlier answers is context: other trainers of this layout learn the completion alone.
        for message in messages:
            if message["role"] == "assistant":
                message["weight"] = 0.0
                message.notes.append(PROMPT_TURNS)
        return messages
    messages = _system(record)
    notes: list[str] = []
    for number, pair in enumerate(listed(record, "history", notes) if not is_empty(record.get("history")) else [], 1):
        place = f"'history' pair {number}"
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise Malformed("ill-typed field", f"{place} is not [question, answer]")
        messages += [Turn({"role": "user", "content": pair[0]}, place), Turn({"role": "assistant", "content": pair[1]}, place)]
    prompt = _text(record, key, notes)
    context = _text(record, _one_of(record, contexts), notes) if present(record, contexts) else ""
    # Joined by one newline, as LLaMA-Factory and ms-swift do.
    messages.append(Turn({"role": "user", "content": "\n".join(text for text in (prompt, context) if text)}, f"{key!r}", notes))
    return messages


def _answer(record: dict, key: str, roles: Mapping[str, str]) -> list[Turn]:
    value = record.get(key)
    if isinstance(value, list | dict):
        messages = messages_of(value if isinstance(value, list) else [value], key, roles)
        if messages[-1]["role"] != "assistant":
            raise Malformed("no answer", f"{key!r} ends with a turn of {messages[-1]['role']!r}")
        return messages
    notes: list[str] = []
    text, reasoning = _text(record, key, notes), own_reasoning(record, "the record")
    return [Turn({"role": "assistant", "content": text} | ({"reasoning_content": reasoning} if reasoning else {}), f"{key!r}", notes)]


def _preference(record: dict, roles: Mapping[str, str]) -> list[Turn]:
    """The conversation with the chosen answer at its end."""
    answer = _answer(record, "chosen", roles)
    for key in ("conversations", "messages"):
        if isinstance(record.get(key), list):
            return [*_turns(record, roles, key), *answer]
    if answer[0]["role"] != "assistant":  # the prompt is in both answers, and what it quotes of earlier ones is not what was chosen
        for message in answer[:-1]:
            if message["role"] == "assistant":
                message["weight"] = 0.0
                message.notes.append(PROMPT_TURNS)
        return _after_system(record, answer)
    return [*_before(record, roles, _one_of(record, PROMPTS), CONTEXTS), *answer]


def _plain(record: dict, roles: Mapping[str, str]) -> list[Turn]:
    text = text_of(record, "text", "the record")
    notes = [TEXT_ALONE, *([RENDERED] if _RENDERED.search(text) else [])]
    return [*_system(record), Turn({"role": "assistant", "content": text}, "'text'", notes)]


def _system(record: dict) -> list[Turn]:
    """The system message of a column of its own; none if it is absent, null or empty."""
    key = next(iter(present(record, SYSTEMS)), None)
    text = text_of(record, key, "the record") if key else ""
    return [Turn({"role": "system", "content": text}, f"{key!r}")] if text else []


# ---- what lies beside the turns


def tools_of(record: dict) -> tuple[dict, ...] | None:
    """The tools declared, a list or its JSON; a bare function gets the wrapping that templates expect."""
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = loads(tools, "'tools'") if tools.strip() else None
    if isinstance(tools, list) and tools and all(isinstance(tool, str) for tool in tools):
        tools = [loads(tool, "'tools'") for tool in tools]
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and isinstance(tool.get("function", tool), dict) for tool in tools):
        raise Malformed("ill-typed field", "'tools' is not a list of functions")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def weight_of_record(record: dict) -> float:
    """What the losses of all its turns are multiplied by; 1 where it says nothing. Raises Malformed."""
    value = record.get("weight")
    if value is None or value == "":
        return 1.0
    if isinstance(value, str):  # as a CSV has it
        try:
            return weight_of(float(value), "weight", "the record")
        except ValueError:
            way = "data.columns={weight:null} if that column is no weight"
            raise Malformed("bad weight", f"the record: 'weight' is {quote(value)}; a weight is a number from 0 on", way) from None
    return weight_of(value, "weight", "the record")


def desired(record: dict, format: str) -> bool | None:
    """Whether a record's answer is one to learn or to unlearn, where its label says so as data sets for KTO do: beside a completion, or beside turns.
    Beside other questions and answers a label is more likely the class that the answer names."""
    label = record.get("label") if format in TURN_KEYS or "completion" in record else None
    return {"true": True, "false": False}.get(str(label).lower()) if isinstance(label, bool | str) else None


def listed(record: dict, key: str, notes: list[str]) -> list:
    """The list in a column, or its JSON where the column holds text."""
    value: object = record.get(key)
    if isinstance(value, str) and value.lstrip().startswith("["):
        text = value
        try:
            value = loads(text, f"{key!r}")
        except Malformed as fault:
            value = _python_list(text, fault)
            notes.append(PYTHON_LIST)
    if key not in record:
        raise Malformed("missing field", f"the record has no {key!r}")
    if not isinstance(value, list):
        raise Malformed("ill-typed field", f"{key!r} is {kind(value)}, not a list")
    return value


def _python_list(text: str, fault: Malformed) -> object:
    """A list as pandas writes one into a CSV. Raises `fault` where the text is no such thing either, or so long that to parse it takes gigabytes."""
    if len(text) > PYTHON_LIST_LIMIT:
        raise fault
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise fault from None


def _text(record: dict, key: str, notes: list[str]) -> str:
    """The text of a column. A whole number has one spelling; of one with a fraction, and of true, it is not known."""
    if type(record.get(key)) is int:
        notes.append(NUMBER)
        return str(record[key])
    return text_of(record, key, "the record")


def _one_of(record: dict, keys: tuple[str, ...]) -> str:
    """Whichever of `keys` the record has; two would say different things."""
    found = present(record, keys) or [next((key for key in keys if key in record), keys[0])]
    if len(found) > 1:
        name = {PROMPTS[0]: "prompt", ANSWERS[0]: "response"}.get(keys[0], "input")
        raise Malformed("ambiguous fields", f"the record has both {found[0]!r} and {found[1]!r}", f"data.columns={{{name}:{found[0]}}}")
    return found[0]


def present(fields: dict, keys: tuple[str, ...]) -> list[str]:
    return [key for key in keys if fields.get(key) is not None]


def _parser(read: Callable[..., list[Turn]], *keys: str) -> Callable[..., list]:
    """roles: names of roles beside the known ones. Raises Malformed."""
    return lambda record, roles=MappingProxyType({}): read(record, roles, *keys)


PARSERS = {
    **{format: _parser(_turns, *keys) for format, keys in TURN_KEYS.items()},
    **{format: _parser(_question_and_answer) for format in ("alpaca", "prompt_completion", "question_answer")},
    "preference": _parser(_preference),
    "text": _parser(_plain),
}
"""{format: its records' messages, each a Turn}"""
