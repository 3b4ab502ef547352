"""The layouts chat datasets come in: which one a record is in, and its messages and tools in the form chat templates take."""

from collections.abc import Iterator

from src.chat.json_stream import Decoder, Malformed, quote, why

QWEN_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "tool": "tool"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "function_call": "call", "observation": "tool", "tool": "tool"}
OPENAI_ROLES = QWEN_ROLES | {"developer": "system"}

PROMPTS = ("instruction", "query")
CONTEXTS = ("input", "context")
ANSWERS = ("output", "response")
RECORD_KEYS = ("messages", "conversations", "conversation", *PROMPTS)
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
UNREADABLE = ("function_call", "refusal", *MEDIA)

SHARED_COLUMNS = ("id", "system", "tools", *MEDIA)
COLUMNS = {
    "qwen": {"conversations", *SHARED_COLUMNS},
    "sharegpt": {"conversations", "conversation", *SHARED_COLUMNS},
    "openai": {"messages", *SHARED_COLUMNS},
    "alpaca": {"history", *PROMPTS, *CONTEXTS, *ANSWERS, *SHARED_COLUMNS},
}
TURN_FIELDS = {
    "conversations": {"from", "value"},
    "conversation": {"human", "assistant"},
    "messages": {"role", "content", "name", "tool_calls", "reasoning_content", *UNREADABLE},
}


def as_object(value: object) -> dict:
    if isinstance(value, Malformed):
        raise value
    if not isinstance(value, dict):
        raise Malformed("not an object", f"the record is {kind(value)}")
    return value


def kind(value: object) -> str:
    kinds = {str: "a string", list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def detect(record: dict) -> tuple[str, bool]:
    """The format a record is in, and whether it could be no other. Raises Malformed if it is in none."""
    if isinstance(record.get("messages"), list):
        return "openai", True
    if isinstance(record.get("conversations"), list):
        roles = {turn.get("from") for turn in record["conversations"] if isinstance(turn, dict) and isinstance(turn.get("from"), str)}
        if roles & SHAREGPT_ROLES.keys() - QWEN_ROLES.keys():
            return "sharegpt", True
        return "qwen", bool(roles & QWEN_ROLES.keys() - SHAREGPT_ROLES.keys())
    if isinstance(record.get("conversation"), list):
        return "sharegpt", True
    if present(record, PROMPTS) and present(record, ANSWERS):
        return "alpaca", True
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and present(value[0], RECORD_KEYS):
            raise Malformed("unknown format", f"an object with its records under {quote(key)}; expected an array of them, or one a line")
    keys = ", ".join(quote(key) for key in list(record)[:8]) or "no keys"
    raise Malformed("unknown format", f"the record has {keys}; expected 'conversations', 'messages', or 'instruction' and 'output'")


def ignored(record: dict, format: str) -> set[str]:
    """Notes on what the record has beyond its format."""
    notes = {f"unknown column ignored: {quote(key)}" for key in record if key not in COLUMNS[format]}
    turns = next((key for key in TURN_FIELDS if key in COLUMNS[format] and key in record), None)
    if turns:
        notes |= {f"unknown turn field ignored: {quote(key)}" for turn in record[turns] for key in turn if key not in TURN_FIELDS[turns]}
    return notes


def _qwen(record: dict) -> list[dict]:
    return _system(record) + [_turn(turn, QWEN_ROLES, number) for number, turn in _items(record, "conversations")]


def _sharegpt(record: dict) -> list[dict]:
    if "conversation" not in record or "conversations" in record:
        return _system(record) + [_turn(turn, SHAREGPT_ROLES, number) for number, turn in _items(record, "conversations")]
    messages = _system(record)
    for number, pair in _items(record, "conversation"):
        messages.append({"role": "user", "content": _text(pair, "human", f"pair {number}")})
        messages.append({"role": "assistant", "content": _text(pair, "assistant", f"pair {number}")})
    return messages


def _turn(turn: dict, roles: dict[str, str], number: int) -> dict:
    role = _role(turn, "from", roles, number)
    value = _text(turn, "value", f"turn {number}")
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(_loads(value, f"turn {number}"), f"turn {number}")}
    return {"role": role, "content": value}


def _openai(record: dict) -> list[dict]:
    return _system(record) + [_message(message, number) for number, message in _items(record, "messages")]


def _message(message: dict, number: int) -> dict:
    here = f"turn {number}"
    role = _role(message, "role", OPENAI_ROLES, number)
    if extra := [key for key in UNREADABLE if message.get(key)]:
        raise Malformed("unsupported field", f"{here} has {extra[0]!r}")
    calls = _list(message, "tool_calls") if message.get("tool_calls") is not None else []
    content = message.get("content")
    if isinstance(content, list):
        text, reasoning, more = _parts(content, here)
        calls = calls + more
    elif content is None and calls:
        text, reasoning = "", ""
    else:
        text, reasoning = _text(message, "content", here), ""
    if message.get("reasoning_content") is not None:
        reasoning = _text(message, "reasoning_content", here) + reasoning
    if role != "assistant" and (calls or reasoning):
        raise Malformed("only the assistant calls tools or reasons", f"{here} is from {role!r}")
    normal: dict = {"role": role, "content": text}
    if reasoning:
        normal["reasoning_content"] = reasoning
    if calls:
        normal["tool_calls"] = _calls(calls, here)
    if message.get("name") is not None:
        normal["name"] = _text(message, "name", here)
    return normal


def _parts(parts: list, here: str) -> tuple[str, str, list]:
    """Text, reasoning and tool calls of a content in parts; those of one kind are joined as they are."""
    found: dict[str, list] = {"reasoning": [], "text": [], "tool_call": []}
    order = []
    for part in parts:
        type_ = part.get("type") if isinstance(part, dict) else None
        if not isinstance(type_, str) or type_ not in found:
            raise Malformed(
                "unsupported content part", f"{here} has {quote(type_) if isinstance(type_, str) else kind(part)}; known: {_known(found)}"
            )
        found[type_].append(_text(part, "value" if "value" in part else "text", here))
        order.append(list(found).index(type_))
    # A normal message says first what it thinks, then what it says, then what it calls; another order could not be given back.
    if order != sorted(order):
        raise Malformed("content parts out of order", f"{here}; expected {_known(found)}")
    return "".join(found["text"]), "".join(found["reasoning"]), [_loads(call, here) for call in found["tool_call"]]


def _alpaca(record: dict) -> list[dict]:
    messages = _system(record)
    for number, pair in enumerate(_list(record, "history") if record.get("history") is not None else [], 1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise Malformed("ill-typed field", f"'history' pair {number} is not [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    prompt, answer = _one(record, PROMPTS), _one(record, ANSWERS)
    context = _one(record, CONTEXTS) if present(record, CONTEXTS) else ""
    # Joined by one newline, as LLaMA-Factory and ms-swift do.
    messages.append({"role": "user", "content": "\n".join(text for text in (prompt, context) if text)})
    messages.append({"role": "assistant", "content": answer})
    return messages


def _system(record: dict) -> list[dict]:
    """The system message of a top-level "system" column; none if it is absent, null or empty."""
    text = _text(record, "system", "the record") if record.get("system") is not None else ""
    return [{"role": "system", "content": text}] if text else []


def tools_of(record: dict) -> tuple[dict, ...] | None:
    """The tools declared, a list or its JSON; a bare function gets the wrapping that templates expect."""
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _loads(tools, "'tools'") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and isinstance(tool.get("function", tool), dict) for tool in tools):
        raise Malformed("ill-typed field", "'tools' is not a list of functions")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _calls(calls: object, here: str) -> list[dict]:
    return [_call(call, here) for call in (calls if isinstance(calls, list) else [calls])]


def _call(call: object, here: str) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise Malformed("bad tool call", f"{here}: a call is {kind(function)}, not an object")
    name, arguments = _text(function, "name", f"{here}: a tool call"), function.get("arguments")
    if isinstance(arguments, str):
        arguments = _loads(arguments, f"{here}: arguments")
    if not isinstance(arguments, dict):
        raise Malformed("bad tool call", f"{here}: arguments are {kind(arguments)}, not an object")
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _loads(text: str, here: str) -> object:
    """JSON within a JSON string."""
    decoder = Decoder()
    try:
        value = decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise Malformed("bad JSON in a string", f"{here}: {why(error)}") from None
    if decoder.constant:
        raise Malformed("not a JSON number", f"{here}: {decoder.constant}")
    return value


def _role(turn: dict, key: str, roles: dict[str, str], number: int) -> str:
    role = _text(turn, key, f"turn {number}")
    if role not in roles:
        raise Malformed("unknown role", f"turn {number} is from {quote(role)}; known: {_known(roles)}")
    return roles[role]


def _items(record: dict, key: str) -> Iterator[tuple[int, dict]]:
    """The objects of a list that must not be empty, numbered from 1."""
    items = _list(record, key)
    if not items:
        raise Malformed("empty list", repr(key))
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise Malformed("ill-typed field", f"{key!r} item {number} is {kind(item)}, not an object")
        yield number, item


def _list(record: dict, key: str) -> list:
    if key not in record:
        raise Malformed("missing field", f"the record has no {key!r}")
    if not isinstance(record[key], list):
        raise Malformed("ill-typed field", f"{key!r} is {kind(record[key])}, not a list")
    return record[key]


def _text(fields: dict, key: str, here: str) -> str:
    if key not in fields:
        raise Malformed("missing field", f"{here} has no {key!r}")
    if not isinstance(fields[key], str):
        raise Malformed("ill-typed field", f"{here}: {key!r} is {kind(fields[key])}, not a string")
    return fields[key]


def _one(record: dict, keys: tuple[str, ...]) -> str:
    """The text under whichever of `keys` the record has; two would say different things."""
    found = present(record, keys) or [next((key for key in keys if key in record), keys[0])]
    if len(found) > 1:
        raise Malformed("ambiguous fields", f"the record has both {found[0]!r} and {found[1]!r}")
    return _text(record, found[0], "the record")


def present(fields: dict, keys: tuple[str, ...]) -> list[str]:
    return [key for key in keys if fields.get(key) is not None]


def _known(names) -> str:
    return ", ".join(names)


PARSERS = {"qwen": _qwen, "sharegpt": _sharegpt, "openai": _openai, "alpaca": _alpaca}
