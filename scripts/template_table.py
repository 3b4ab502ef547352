"""What is taught through each of many chat templates, conversation by conversation: a table, and every fault of ours in it.

    python scripts/template_table.py TEMPLATES.json [TABLE.md]

TEMPLATES.json: {name: {"template", "bos", "eos", "tokens"}}; tokens are the special ones that the template writes. Each is given a small byte-level
BPE of its own. A fault is a traceback, an answer neither trained nor counted, a trained token of somebody else, a trained answer without its stop; the
exit code is 1 where there is one.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from src.chat import encoding, template, unseen
from src.core.errors import UserError

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "its name"}}, "required": ["city"]},
    },
}


def turn(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def calls(*cities: str, text: str = "") -> dict:
    made = [
        {"id": f"call{n:05d}", "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        for n, city in enumerate(cities)
    ]
    return turn("assistant", text, tool_calls=made)


def result(content: str, n: int = 0) -> dict:
    return turn("tool", content, tool_call_id=f"call{n:05d}", name="weather")


ASKED, TOLD = turn("user", "Where is Oslo?"), turn("assistant", "In Norway.")
WARM, COLD = turn("user", "Is it warm in Bern?"), turn("assistant", "No, far from it.")
CONVERSATIONS: dict[str, tuple[list[dict], list[dict] | None]] = {
    "plain": ([ASKED, TOLD], None),
    "system": ([turn("system", "Be brief."), ASKED, TOLD], None),
    "greeting": ([turn("assistant", "Welcome aboard!"), ASKED, TOLD], None),
    "several turns": ([ASKED, TOLD, turn("user", "And Rome?"), turn("assistant", "In Italy.")], None),
    "tools with ids": ([WARM, calls("Bern"), result("3 degrees"), COLD], [TOOL]),
    "parallel calls": ([WARM, calls("Bern", "Rome"), result("3 degrees"), result("21 degrees", 1), COLD], [TOOL]),
    "text and a call": ([WARM, calls("Bern", text="I look."), result("3 degrees"), COLD], [TOOL]),
    "reasoning in a field": ([ASKED, TOLD | {"reasoning_content": "A capital."}], None),
    "reasoning inline": ([ASKED, turn("assistant", "<think>\nA capital.\n</think>\n\nIn Norway.")], None),
    "empty last": ([ASKED, TOLD, turn("user", "Hush."), turn("assistant", "")], None),
}


def tokenizer_for(name: str, entry: dict) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 256 pieces with the template's special tokens."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": entry["bos"] or None, "eos_token": entry["eos"] or None, "pad_token": entry["eos"] or "<pad>"}
    made = PreTrainedTokenizerFast(tokenizer_object=plain, **special)
    made.add_special_tokens({"extra_special_tokens": entry["tokens"]})
    made.chat_template, made.name_or_path = entry["template"], name
    return made


def answers_of(tokenizer, rows: list[encoding.Encoded]) -> list[list[int]]:
    """The trained stretches of rows."""
    found: list[list[int]] = []
    for row in rows:
        before = encoding.IGNORE
        for label in row.labels:
            if label != encoding.IGNORE:
                found += [[]] if before == encoding.IGNORE else []
                found[-1].append(label)
            before = label
    return found


def judged(tokenizer, messages: list[dict], tools) -> tuple[str, list[str]]:
    """(what becomes of a conversation's answers, our faults)."""
    try:
        taught = encoding.teach(tokenizer, messages, tools, each=True)
    except UserError as error:
        return "refused", [] if error.what else ["refused without a reason"]
    trained = answers_of(tokenizer, taught.rows)
    turns = [message for message in messages if message["role"] == "assistant"]
    left_out = sum(count for why, count in taught.notes.items() if why in unseen.LEFT_OUT)
    faults = [f"{len(turns)} answers, {len(trained)} trained, {left_out} left out"] * (len(trained) + left_out != len(turns))
    stops = set(tokenizer.convert_tokens_to_ids(template.of(tokenizer).stops))
    for ids in trained:
        text = tokenizer.decode(ids)
        faults += [f"trains {text!r}"] * any(m["content"] in text for m in messages if m["role"] != "assistant")
        faults += [f"stops otherwise: {text!r}"] * (ids[-1] not in stops or any(i in stops for i in ids[:-1]))
    shown = [why for why in taught.notes if why not in unseen.LEFT_OUT]
    if not trained:
        return "left out", faults
    return "trained" if not left_out and not shown else "trained in part", faults


def main(source: Path, out: Path | None) -> int:
    found: dict[str, Counter[str]] = {name: Counter() for name in CONVERSATIONS}
    faults, refused = [], []
    for name, entry in json.loads(source.read_text("utf-8")).items():
        tokenizer = tokenizer_for(name, entry)
        try:
            encoding.turn_end(tokenizer)
        except UserError as error:
            refused.append(f"{name}: {error.what}")
            continue
        for kind, (messages, tools) in CONVERSATIONS.items():
            try:
                became, ours = judged(tokenizer, messages, tools)
            except Exception as error:
                became, ours = "traceback", [repr(error)]
            found[kind][became] += 1
            faults += [f"{name}, {kind}: {fault}" for fault in ours]
    columns = ("trained", "trained in part", "left out", "refused", "traceback")
    lines = ["| conversation | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {kind} | " + " | ".join(str(counts[column]) for column in columns) + " |" for kind, counts in found.items()]
    if out:
        out.write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))
    print(f"\n{len(refused)} templates refused as a whole:", *refused, sep="\n  ")
    print(f"\n{len(faults)} faults", *faults, sep="\n  ")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None))
