"""What of a conversation is not taught as it stands there, by reason: counted, said, and refused where it is too much."""

from collections import Counter

from src.core.errors import BadData

LEFT_OUT = {
    "calls": "the chat template does not print their tool calls, so they would teach to say nothing",
    "text": "the chat template drops or changes their text",
    "unseen": "they answer a message that the chat template does not show",
    "unlike": "the chat template shows what they answer otherwise in a prompt than in history",
    "stop": "no token at their end, or one within, would end them on a server",
    "opening": "they begin a conversation, and the chat template has no prompt for that",
    "refused": "the chat template refuses their conversation",
    "legacy": "legacy_mask=qwen knows no tool calls, reasoning or weights, which their conversation has; legacy_mask=none does",
    "empty": "they are empty",
    "weight": "their weight is 0",
    "hidden": "the chat template shows them otherwise as history; train.hidden_turns=rows trains each in a row of its own",
}
"""reasons for an answer to be out of the loss"""
NOT_SHOWN = {
    "reasoning": "the chat template does not show their reasoning; reasoning=inline writes it into the text, reasoning=drop says that it is not to be learnt",
    "beside": "the chat template does not show the text beside their tool calls",
}
"""parts of answers that are trained without them"""
CONVERSATIONS = {
    "system": "the chat template does not show their system turn",
    "tools": "the chat template ignores the tools they declare",
}
ON_PURPOSE = ("weight", "hidden", "empty")
"""what the data or another setting asks for, or what holds nothing to learn"""
SHARE = 0.1
"""of the answers: what unseen=auto leaves out at most"""


def report(notes: Counter[str], split: str) -> list[str]:
    """Lines that say what is left out and what is not shown. split: "train"."""
    what = (
        (LEFT_OUT, "answer", "left out of the loss"),
        (NOT_SHOWN, "answer", "trained as shown"),
        (CONVERSATIONS, "conversation", "trained as shown"),
    )
    return [
        f"{split}: {notes[why]:,} {one}{'s' * (notes[why] != 1)} {done}: {text}"
        for reasons, one, done in what
        for why, text in reasons.items()
        if notes[why]
    ]


def in_words(notes: Counter[str]) -> str:
    """The reasons for answers left out, without their numbers: "they are empty"."""
    return "; ".join(text for why, text in LEFT_OUT.items() if notes[why]) or "it has none"


def check(notes: Counter[str], answers: int, named: dict[str, list[str]], *, policy: str, split: str) -> None:
    """Raises BadData where more is left out than the policy allows: skip anything, auto a tenth of the answers, error nothing that the template does not show.

    answers: assistant turns of the split. named: {reason: ids of the first records}.
    """
    lost = {why: notes[why] for why in LEFT_OUT if notes[why] and why not in ON_PURPOSE}
    part = {why: notes[why] for why in (*NOT_SHOWN, *CONVERSATIONS) if notes[why]}
    over = sum(lost.values()) > SHARE * answers if policy == "auto" else policy == "error" and bool(lost or part)
    if not over:
        return
    listed = lost if policy == "auto" else lost | part
    words = LEFT_OUT | NOT_SHOWN | CONVERSATIONS
    lines = [f"{sum(lost.values()):,} of {answers:,} answers cannot be trained as they stand"]
    for why, count in listed.items():
        names = ", ".join(f"'{name}'" for name in named.get(why, ()))
        lines.append(f"  {count:,}: {words[why].partition(';')[0]}" + (f" (records {names})" if names else ""))
    ways = ["chat_template=chatml: a template that shows calls, results and system turns"] * any(
        why in listed for why in ("calls", "text", "unseen", "system", "tools", "refused", "beside")
    )
    ways += ["reasoning=inline"] * ("reasoning" in listed) + ["unseen=skip: leave them out and count them"]
    raise BadData("\n".join(lines), where=f"the {split} split", fix=ways)
