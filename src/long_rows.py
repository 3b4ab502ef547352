"""What becomes of a conversation longer than a training row may be: left out, cut between exchanges, cut to its end, or an error.

Cutting tokens off the end, as is common, takes the stop token away and teaches to talk on. No policy here does: each row keeps a trained stop token
at its end or is left out, and what is lost is counted in conversations and in tokens, so that a run in which much is lost stops and says so.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from src.chatml import IGNORE, Encoded
from src.errors import BadData

POLICIES = ("drop", "split_turns", "keep_end", "error")
NAMED = 10


@dataclass(frozen=True)
class Counts:
    """What became of the conversations of a split. Counts of parts of it add up with `+`; the parts' order is that of `named`.

    rows, tokens: conversations seen, and their tokens.
    dropped, tokens_dropped: conversations of which no row is left, and their tokens.
    cut, tokens_cut: conversations of which part is left, and those of their tokens that no row holds.
    made, tokens_repeated: rows made of the cut ones, and the tokens they hold beyond those of the conversation: its system turn in each row but
        the first, and what the template shows otherwise in a part than in the whole.
    unseen: messages before a row's first that were part of its context in the conversation, summed over rows.
    lengths: {tokens: conversations} of those longer than allowed. named: (record id, tokens) of the first ten of them.

    dropped + cut conversations are longer than allowed, and under any policy but error all longer ones are one or the other.
    Tokens of all rows = tokens - tokens_dropped - tokens_cut + tokens_repeated.
    """

    rows: int = 0
    tokens: int = 0
    dropped: int = 0
    tokens_dropped: int = 0
    cut: int = 0
    tokens_cut: int = 0
    made: int = 0
    tokens_repeated: int = 0
    unseen: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    named: tuple[tuple[str, int], ...] = ()

    def __add__(self, other: "Counts") -> "Counts":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Counts(**sums | {"named": sums["named"][:NAMED]})

    @property
    def long(self) -> int:
        """Conversations longer than allowed."""
        return self.lengths.total()

    @property
    def lost_share(self) -> float:
        """Share of all conversations that were dropped or cut."""
        return (self.dropped + self.cut) / self.rows if self.rows else 0.0


def fit(
    encoded: Encoded,
    record: Mapping,
    *,
    policy: str,
    max_length: int,
    encode: Callable[[Sequence[dict]], Encoded],
) -> tuple[list[Encoded], Counts]:
    """The rows of one conversation, none longer than max_length tokens and each with trained tokens, and what was lost.

    encoded: the whole conversation, as encode(record["messages"]) makes it. record: {"id", "messages", ...}, as in a split file.
    encode: from messages to a row, with the record's tools in it.
    policy: drop leaves a longer conversation out. split_turns cuts it before user turns into as few rows as can be, each with the leading
        system turns in front, and leaves out an exchange too long by itself. keep_end takes its last max_length tokens. error makes no row of it;
        `check` then raises.
    """
    length = len(encoded.input_ids)
    seen = Counts(rows=1, tokens=length)
    if length <= max_length:
        return [encoded], seen
    seen += Counts(lengths=Counter([length]), named=((str(record["id"]), length),))
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r}")
    if policy == "error":
        return [], seen
    rows, lost = [], Counts()
    if policy == "keep_end":
        rows, lost = _keep_end(encoded, max_length)
    elif policy == "split_turns":
        rows, lost = _split_turns(encoded, record["messages"], max_length, encode)
    return rows, seen + (lost if rows else Counts(dropped=1, tokens_dropped=length))


def _keep_end(encoded: Encoded, max_length: int) -> tuple[list[Encoded], Counts]:
    """The last max_length tokens. The first of them has nothing before it to be predicted from, so it is not trained."""
    ids, labels = encoded.input_ids[-max_length:], [IGNORE, *encoded.labels[-max_length:][1:]]
    row = Encoded(ids, labels, encoded.untrained)
    return ([row] if row.trained else []), Counts(cut=1, tokens_cut=len(encoded.input_ids) - max_length, made=1)


def _split_turns(encoded: Encoded, messages: Sequence[dict], max_length: int, encode) -> tuple[list[Encoded], Counts]:
    """Greedy: each row takes exchanges while they fit. A row cannot span an exchange that is left out, as its context would then be false."""
    system, parts = exchanges(messages)
    rows, left_out, unseen, k = [], 0, 0, 0
    while k < len(parts):
        row, following = _longest(system, parts, k, max_length, encode)
        if row is None:
            left_out += _size(encoded, system, parts, k, encode)
        else:
            rows.append(row)
            unseen += sum(map(len, parts[:k]))
        k = following
    held = sum(len(row.input_ids) for row in rows)
    repeated = held - (len(encoded.input_ids) - left_out)
    return rows, Counts(cut=1, tokens_cut=left_out, made=len(rows), tokens_repeated=repeated, unseen=unseen)


def exchanges(messages: Sequence[dict]) -> tuple[list[dict], list[list[dict]]]:
    """(the leading system turns, the exchanges after them), all messages in order.

    An exchange begins where the user speaks after the assistant and holds at least one assistant turn, with any tool calls and results. What the
    assistant says before any user belongs to the first, what nobody answers to the last.
    """
    start = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    system, rest = list(messages[:start]), messages[start:]
    last = max((i for i, message in enumerate(rest) if message["role"] == "assistant"), default=-1)
    parts, roles = [[]], set()
    for i, message in enumerate(rest):
        if message["role"] in ("user", "system") and {"user", "assistant"} <= roles and i < last:
            parts.append([])
            roles = set()
        parts[-1].append(message)
        roles.add(message["role"])
    return system, parts


def _longest(system: list, parts: list, k: int, max_length: int, encode) -> tuple[Encoded | None, int]:
    """(the longest row that begins with exchange k, the exchange after it); (None, k + 1) where that one alone is too long."""
    found, messages = None, list(system)
    for following in range(k, len(parts)):
        messages += parts[following]
        row = encode(messages)
        if len(row.input_ids) > max_length or not row.trained:
            return found, max(following, k + 1)
        found = row
    return found, len(parts)


def _size(encoded: Encoded, system: list, parts: list, k: int, encode) -> int:
    """Tokens by which exchange k makes the conversation longer, 0 where a template takes more out of the turn before; the first has the system turns."""

    def upto(n: int) -> int:
        if n == len(parts):
            return len(encoded.input_ids)
        return len(encode(system + [message for part in parts[:n] for message in part]).input_ids) if n else 0

    return max(0, upto(k + 1) - upto(k))


def report(counts: Counts, split: str, setting: str) -> list[str]:
    """Lines that say what was dropped and cut, none where nothing was. split: "train". setting: "train.max_length=512"."""
    lines = []
    if counts.dropped:
        lines.append(
            f"{split}: dropped {counts.dropped:,} of {counts.rows:,} rows ({counts.tokens_dropped:,} tokens) longer than {setting}"
        )
    if counts.cut:
        rows = f"{counts.made:,} row" + "s" * (counts.made != 1)
        lines.append(
            f"{split}: cut {counts.cut:,} of {counts.rows:,} rows ({counts.tokens_cut:,} tokens) longer than {setting}; {rows} made of them"
        )
    if counts.unseen:
        lines[-1] += f", which miss {counts.unseen:,} earlier messages"
    return lines


def shortest_limit(counts: Counts, limit: float) -> int:
    """The smallest max_length at which at most `limit` of the conversations would be longer."""
    allowed, longer = int(limit * counts.rows + 1e-9), 0
    for length in sorted(counts.lengths, reverse=True):
        longer += counts.lengths[length]
        if longer > allowed:
            return length
    return 1


def check(counts: Counts, limit: float, *, policy: str, max_length: int, split: str = "train") -> None:
    """Raises BadData where more than the share `limit` of the conversations was dropped or cut, or under policy error where any is longer.

    The ways out are settings of `train`: max_length (the smallest that brings the share under the limit), long_rows, long_share.
    """
    share = counts.long / counts.rows if policy == "error" and counts.rows else counts.lost_share
    if share <= (0 if policy == "error" else limit):
        return
    fix = [f"train.max_length={shortest_limit(counts, 0 if policy == 'error' else limit)}"]
    fix += ["train.long_rows=split_turns"] * (policy != "split_turns")
    fix += ["train.long_rows=drop"] if policy == "error" else ["train.long_share=1"]
    raise BadData(_too_many(counts, limit, policy, max_length), where=f"the {split} split", fix=fix)


def _too_many(counts: Counts, limit: float, policy: str, max_length: int) -> str:
    lines = [f"{counts.long:,} of {counts.rows:,} rows are longer than train.max_length={max_length}"]
    if policy != "error":
        lines[0] += f"; {counts.dropped:,} were dropped and {counts.cut:,} cut, more than train.long_share={limit:g} allows"
    lines += [f"  record '{name}': {length:,} tokens" for name, length in counts.named]
    return "\n".join(lines + [f"  and {counts.long - len(counts.named):,} more"] * (counts.long > len(counts.named)))
