"""One turn of a chat file as one message in normal form: whose it is, what it says, thinks and calls, and how much it weighs in the loss."""

import json
import math
from collections.abc import Iterator, Mapping

from src.records.json_stream import Decoder, Malformed, quote, why

CALL = "call"
"""in place of a role: the turn is an assistant's call of tools"""
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatbot", "model", "ai", "chatgpt", "bing", "bard", "claude"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response", "tool_result", "ipython"), "tool"),
    **dict.fromkeys(("tool_call", "function_call"), CALL),
}
"""what roles are called in public data, in small letters, and the role or CALL that each is"""
QWEN_ROLES = ("user", "assistant", "system", "tool")
SHOWN_ROLES = ("user", "assistant", "system", "tool", "tool_call")

MEDIA = ("image", "images", "audio", "audios", "video", "videos")
UNREADABLE = ("refusal", *MEDIA)
REASONING = ("reasoning_content", "reasoning", "thinking")
WEIGHTS = ("weight", "loss_weight", "loss_scale")
SWITCHES = ("train", "training", "loss")
SMALLEST = 1e-6
"""weight but for 0; the largest is its inverse: a record's times a turn's is multiplied in fp32, where 1e39 is infinite and 1e-50 nothing"""
TURN_FIELDS = {
    *("role", "from", "content", "value", "name", "tool_calls", "tool_call_id", "function_call"),
    *REASONING,
    *WEIGHTS,
    *SWITCHES,
    *UNREADABLE,
}
PARTS = {
    "reasoning": "reasoning",
    "thinking": "reasoning",
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "tool_call": "tool_call",
}
"""types of the parts of a content, and what each is"""
ORDER = ("reasoning", "text", "tool_call")

OBJECT_RESULT = "a tool's result given as an object, written as JSON"
EMPTY_RESULT = "a tool's result of null, read as no text"
JOINED_CALL = "a call of tools joined to the assistant's turn right before it"
PARSED_TWICE = "arguments that were JSON within JSON, decoded twice"
FOREIGN_WEIGHT = "a weight on a turn that is not the assistant's, ignored"
NUMBER = "a whole number taken as text"


class Turn(dict):
    """A message that knows its place in the record, such as "turn 3", and what is to be said of how it was read."""

    def __init__(self, message: dict, place: str, notes: list[str] | None = None):
        super().__init__(message)
        self.place, self.notes = place, notes or []


def messages_of(turns: object, key: str, roles: Mapping[str, str]) -> list[Turn]:
    """The messages of a list of turns, calls joined to the assistant's turn they follow. roles: names of roles beside ROLES, and the role of each.

    key: where the list stands in the record. Raises Malformed.
    """
    found: list[Turn] = []
    for number, turn in _items(turns, key):
        message, is_call = message_of(turn, f"turn {number}", roles)
        before = found[-1] if found else None
        # Parallel calls lie one a turn in some layouts, and beside the text in a turn before them: for the template both are one turn.
        if is_call and before and before["role"] == "assistant" and "weight" not in before and "weight" not in message:
            before.setdefault("tool_calls", []).extend(message["tool_calls"])
            before.notes.append(JOINED_CALL)
        else:
            found.append(message)
    return found


def message_of(turn: dict, place: str, roles: Mapping[str, str]) -> tuple[Turn, bool]:
    """The message of one turn, and whether the turn was a call alone. Raises Malformed."""
    role = _role(turn, place, roles)
    if extra := [key for key in UNREADABLE if not is_empty(turn.get(key))]:
        raise Malformed("unsupported field", f"{place} has {extra[0]!r}")
    notes: list[str] = []
    calls = _given_calls(turn, place)
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if role == CALL:
        if not isinstance(content, str | list | dict):
            raise Malformed("ill-typed field", f"{place}: the call is {kind(content)}, not JSON")
        calls = [*calls, *as_list(loads(content, place) if isinstance(content, str) else content)]
        text = reasoning = ""
    elif role == "tool":
        text, reasoning = _result(turn, content, place, notes), ""
    elif isinstance(content, list):
        text, reasoning, more = _parts(content, place)
        calls = [*calls, *more]
    elif content is None and role == "assistant" and (calls or any(turn.get(key) for key in REASONING)):
        text, reasoning = "", ""
    else:
        text, reasoning = text_of(turn, _content_key(turn), place), ""
    reasoning = own_reasoning(turn, place) + reasoning
    if role not in ("assistant", CALL) and (calls or reasoning):
        raise Malformed("only the assistant calls tools or reasons", f"{place} is from {role!r}")
    normal: dict = {"role": "assistant" if role == CALL else role, "content": text}
    if reasoning:
        normal["reasoning_content"] = reasoning
    if calls:
        normal["tool_calls"] = [call_of(call, place, notes) for call in calls]
    if turn.get("name") is not None:
        normal["name"] = text_of(turn, "name", place)
    if role == "tool" and turn.get("tool_call_id") is not None:
        normal["tool_call_id"] = id_of(turn["tool_call_id"], place)
    weight = turn_weight(turn, place)
    if normal["role"] == "assistant":
        normal |= {} if weight == 1 else {"weight": weight}
    elif weight and any(turn.get(key) is not None for key in (*WEIGHTS, *SWITCHES)):
        notes.append(FOREIGN_WEIGHT)
    return Turn(normal, place, notes), role == CALL


def _role(turn: dict, place: str, roles: Mapping[str, str]) -> str:
    key = next((key for key in ("role", "from") if turn.get(key) is not None), "from" if "value" in turn or "from" in turn else "role")
    name = text_of(turn, key, place)
    role = roles.get(name) or ROLES.get(name.strip().lower())
    if role is None:
        way = f"data.roles={{{name}:assistant}} (or user, system, tool, tool_call)" if name.isidentifier() and name.isascii() else ""
        raise Malformed(
            "unknown role", f"{place} is from {quote(name)}; known: {', '.join(SHOWN_ROLES)} and what else they are called", way
        )
    return CALL if role == "tool_call" else role


def _content_key(turn: dict) -> str:
    return "value" if "content" not in turn and ("value" in turn or ("from" in turn and "role" not in turn)) else "content"


def _result(turn: dict, content: object, place: str, notes: list[str]) -> str:
    """What a tool gave: text, typed parts of text, or any JSON."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(part, dict) and part.get("type") in PARTS for part in content):
        return _parts(content, place)[0]
    if content is None:
        if _content_key(turn) not in turn:
            raise Malformed("missing field", f"{place} has no {_content_key(turn)!r}")
        notes.append(EMPTY_RESULT)
        return ""
    notes.append(OBJECT_RESULT)
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise Malformed("ill-typed field", f"{place}: the tool's result is no JSON: {error}") from None


def _parts(parts: list, place: str) -> tuple[str, str, list]:
    """Text, reasoning and tool calls of a content in parts; those of one kind are joined as they are."""
    found: dict[str, list] = {name: [] for name in ORDER}
    order = []
    for part in parts:
        type_ = part.get("type") if isinstance(part, dict) else None
        if not isinstance(type_, str) or type_ not in PARTS:
            raise Malformed(
                "unsupported content part",
                f"{place} has {quote(type_) if isinstance(type_, str) else kind(part)}; known: {', '.join(ORDER)}",
            )
        key = next((key for key in ("value", "text", type_) if part.get(key) is not None), "text")
        is_call = PARTS[type_] == "tool_call" and isinstance(part.get(key), dict)
        found[PARTS[type_]].append(part[key] if is_call else text_of(part, key, place))
        order.append(ORDER.index(PARTS[type_]))
    # A normal message says first what it thinks, then what it says, then what it calls; another order could not be given back.
    if order != sorted(order):
        raise Malformed("content parts out of order", f"{place}; expected {', '.join(ORDER)}")
    calls = [loads(call, place) if isinstance(call, str) else call for call in found["tool_call"]]
    return "".join(found["text"]), "".join(found["reasoning"]), calls


def own_reasoning(fields: dict, place: str) -> str:
    """The reasoning under whichever of its names; servers give the same under two of them."""
    found = {text_of(fields, key, place) for key in REASONING if not is_empty(fields.get(key))}
    if len(found) > 1:
        raise Malformed("ambiguous fields", f"{place} has two reasonings, under {' and '.join(k for k in REASONING if fields.get(k))}")
    return found.pop() if found else ""


def _given_calls(turn: dict, place: str) -> list:
    """The calls under tool_calls, or under OpenAI's older function_call."""
    calls = turn.get("tool_calls")
    if isinstance(calls, str):
        calls = loads(calls, place) if calls.strip() else None
    if calls is not None and not isinstance(calls, list):
        raise Malformed("ill-typed field", f"{place}: 'tool_calls' is {kind(calls)}, not a list")
    if is_empty(turn.get("function_call")):
        return calls or []
    if calls:
        raise Malformed("ambiguous fields", f"{place} has both 'tool_calls' and 'function_call'")
    return [turn["function_call"]]


def call_of(call: object, place: str, notes: list[str]) -> dict:
    """A call in normal form. Raises Malformed."""
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise Malformed("bad tool call", f"{place}: a call is {kind(function)}, not an object")
    name, arguments = text_of(function, "name", f"{place}: a tool call"), _arguments(function, place, notes)
    own = call.get("id") if isinstance(call, dict) and "function" in call else None
    return ({} if own in (None, "") else {"id": id_of(own, place)}) | {
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _arguments(function: dict, place: str, notes: list[str]) -> dict:
    """An object; none, null and "" stand for a call without arguments."""
    arguments = function.get("arguments", function.get("parameters"))
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if isinstance(arguments, str):
        arguments = loads(arguments, f"{place}: arguments")
        if isinstance(arguments, str):
            inner = loads(arguments, f"{place}: arguments")
            if isinstance(inner, dict):
                notes.append(PARSED_TWICE)
                return inner
    if not isinstance(arguments, dict):
        raise Malformed("bad tool call", f"{place}: arguments are {kind(arguments)}, not an object")
    return arguments


def id_of(value: object, place: str) -> str:
    if type(value) not in (str, int):
        raise Malformed("ill-typed field", f"{place}: the id of a call is {kind(value)}, not a string")
    return str(value)


def turn_weight(turn: dict, place: str) -> float:
    """What the turn's loss is multiplied by; 1 where the turn says nothing of it. Raises Malformed for two that disagree."""
    given = {key: turn[key] for key in (*WEIGHTS, *SWITCHES) if turn.get(key) is not None}
    found = {key: weight_of(value, key, place, switch=key in SWITCHES) for key, value in given.items()}
    if len(set(found.values())) > 1:
        (one, a), (other, b) = list(found.items())[:2]
        raise Malformed("ambiguous fields", f"{place}: {one!r} is {a:g} and {other!r} is {b:g}")
    return next(iter(found.values()), 1.0)


def weight_of(value: object, key: str, place: str, *, switch: bool = False) -> float:
    """A weight of the loss. switch: true and false stand for 1 and 0."""
    if switch and isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        shown = f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else kind(value)
        raise Malformed("bad weight", f"{place}: {key!r} is {shown}; a weight is a number from 0 on")
    if value and not SMALLEST <= value <= 1 / SMALLEST:
        raise Malformed("bad weight", f"{place}: {key!r} is beyond {SMALLEST:g} to {1 / SMALLEST:g}, which the loss is summed in")
    return float(value)


# ---- what is in JSON


def kind(value: object) -> str:
    kinds = {
        str: "a string",
        list: "a list",
        dict: "an object",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return kinds.get(type(value), f"of the type {type(value).__name__}")


def is_empty(value: object) -> bool:
    """Whether there is nothing in it: null, "", 0, false, or a list or object of such alone."""
    if isinstance(value, dict):
        return all(is_empty(inner) for inner in value.values())
    return all(is_empty(inner) for inner in value) if isinstance(value, list) else not value


def loads(text: str, place: str) -> object:
    """JSON within a JSON string. Raises Malformed."""
    decoder = Decoder()
    try:
        value = decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise Malformed("bad JSON in a string", f"{place}: {why(error)}") from None
    if decoder.constant:
        raise Malformed("not a JSON number", f"{place}: {decoder.constant}")
    return value


def as_list(value: object) -> list:
    return value if isinstance(value, list) else [value]


def text_of(fields: dict, key: str, place: str) -> str:
    if key not in fields:
        raise Malformed("missing field", f"{place} has no {key!r}")
    if not isinstance(fields[key], str):
        raise Malformed("ill-typed field", f"{place}: {key!r} is {kind(fields[key])}, not a string")
    return fields[key]


def _items(turns: object, key: str) -> Iterator[tuple[int, dict]]:
    """The objects of a list that must not be empty, numbered from 1."""
    if not isinstance(turns, list):
        raise Malformed("ill-typed field", f"{key!r} is {kind(turns)}, not a list")
    if not turns:
        raise Malformed("empty list", repr(key))
    for number, item in enumerate(turns, 1):
        if not isinstance(item, dict):
            raise Malformed("ill-typed field", f"{key!r} item {number} is {kind(item)}, not an object")
        yield number, item
