"""What a board must make of fixed conversations: their token ids, kept in the bundle and equal in training, in the Hugging Face template and on the board.

A board whose template or tokenizer file differs by one token answers worse without a word; so `deploy` compares before it publishes.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from src.chat import encoding
from src.core.errors import BadData, ProofFailed
from src.core.log import say, warn
from src.deploy.vendor import whole
from src.models.complete import PROBES

FILE = "contract.json"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city today",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
# name -> turns of (role, text). Each ends with the user, as a prompt does.
CONVERSATIONS = {
    "plain": (("user", "What is the capital of Sweden?"),),
    "system": (("system", "You are a terse assistant."), ("user", "Add 12 and 345, then say why.\n\n1. Shortly.\n2. In words.")),
    "turns": (
        ("user", "Hi! I'm Ann."),
        ("assistant", "Hello Ann, how can I help?"),
        ("user", "What's my name?  Don't guess."),
        ("assistant", "You said it is Ann."),
        ("user", "Thanks :-)"),
    ),
    "code": (("user", "Fix this:\n\n```python\ndef f(x):\n\treturn x ** 2 if x_1 != 0 else None\n```\n"),),
    "korean": (("system", "당신은 친절한 비서입니다."), ("user", "안녕하세요, 오늘 날씨가 어때요? 3줄로 알려 주세요.")),
    "chinese": (("user", "你好，世界！请用两句话介绍一下上海。"),),
    "emoji": (("user", "Tell me about 🚀 and 👩‍🔬, please 🙂!"),),
    "accents": (("user", "Où est le café “naïve” — à Zürich, señor?"),),
    "tools": (("user", "What is the weather in Seoul?"),),
}
TOOLS = {"tools": [WEATHER]}
ANSWER = "It is so."


def conversations() -> dict[str, tuple[list[dict], list[dict] | None]]:
    """{name: (messages, tools or None)} of the fixed set."""
    return {name: ([{"role": role, "content": text} for role, text in turns], TOOLS.get(name)) for name, turns in CONVERSATIONS.items()}


def prove(tokenizer, out: Path, board: Callable[[list[str]], list[list[int]]]) -> dict:
    """Write contract.json into `out` after comparing three ways to token ids; returns {"conversations", "texts", "ids", "refused"}, counts.

    The ways: a training row's leading ids up to what is trained (chatml.encode), the Hugging Face template's own tokenization of the prompt, and
    `board(texts)`, ids of rendered texts by the file the board reads. A conversation that the template refuses is left out, and said.
    Raises ProofFailed at the first difference.
    """
    talks, refused = [], []
    if tokenizer.chat_template:
        for name, (messages, tools) in conversations().items():
            try:
                text = encoding.render(tokenizer, messages, tools, prompt=True)
                row = encoding.encode(tokenizer, [*messages, {"role": "assistant", "content": ANSWER}], tools)
            except BadData as error:
                refused.append(f"{name}: {error.what}")
                continue
            theirs = list(
                tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=True)[
                    "input_ids"
                ]
            )
            trained_from = len(row.input_ids) - _last_turn(row.labels)
            if row.input_ids[:trained_from] != theirs:
                raise _differs(name, "the training renderer", row.input_ids[:trained_from], "the Hugging Face template", theirs)
            talks.append({"name": name, "messages": messages, "tools": tools, "text": text, "ids": theirs})
    else:
        warn("the model has no chat template: the bundle's contract holds plain texts only")
    plain = [{"text": text, "ids": tokenizer(text, add_special_tokens=False).input_ids} for text in PROBES]
    for entry, ids in zip([*talks, *plain], board([entry["text"] for entry in [*talks, *plain]]), strict=True):
        if list(ids) != entry["ids"]:
            raise _differs(
                entry.get("name", repr(entry["text"])), "the board's tokenizer file", list(ids), "the Hugging Face tokenizer", entry["ids"]
            )
    with whole(out / FILE) as file:
        file.write_text(
            json.dumps({"conversations": talks, "texts": plain, "refused": refused}, indent=1, ensure_ascii=False) + "\n", "utf-8"
        )
    for line in refused:
        say(f"contract: left out {line}")
    count = sum(len(entry["ids"]) for entry in [*talks, *plain])
    say(f"contract: {count} token ids of {len(talks)} conversations and {len(plain)} texts are equal in training, template and board file")
    return {"conversations": len(talks), "texts": len(plain), "ids": count, "refused": len(refused)}


def entries(bundle: Path) -> Iterator[tuple[str, str, list[int]]]:
    """(name, text, token ids) of everything in a bundle's contract.json."""
    content = json.loads((bundle / FILE).read_text("utf-8"))
    for entry in (*content["conversations"], *content["texts"]):
        yield entry.get("name") or repr(entry["text"]), entry["text"], entry["ids"]


def _last_turn(labels: list[int]) -> int:
    """Tokens from the start of the last trained stretch to the end."""
    k = len(labels)
    while k and labels[k - 1] == encoding.IGNORE:
        k -= 1
    while k and labels[k - 1] != encoding.IGNORE:
        k -= 1
    return len(labels) - k


def _differs(name: str, ours: str, a: list[int], theirs: str, b: list[int]) -> ProofFailed:
    at = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return ProofFailed(
        f"token {at} of '{name}' differs: {ours} has {a[at : at + 6]}, {theirs} {b[at : at + 6]}",
        fix="a model whose tokenizer the board's runtime reproduces; the fixed set is src/deploy/contract.py",
    )
