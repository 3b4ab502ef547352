"""What becomes of a conversation longer than a training row may be: left out, cut between exchanges, cut to its end, or an error.

Cutting tokens off the end, as is common, takes the stop token away and teaches to talk on. No policy here does: each row keeps a trained stop token
at its end or is left out, and what is lost is counted in conversations and in tokens, so that a run in which much is lost stops and says so.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from src.chat.encoding import IGNORE, Encoded
from src.core.errors import BadData

POLICIES = ("drop", "split_turns", "keep_end", "error")
NAMED = 10


@dataclass(frozen=True)
class Counts:
    """What became of the conversations of a split. Counts of parts of it add up with `+`; the parts' order is that of `named`.

    rows, tokens: conversations seen, and the tokens of their rows before anything is lost.
    dropped, tokens_dropped: conversations of which no row is left, and their tokens.
    cut, tokens_cut: conversations of which part is left, and those of their tokens that no row holds.
    made, tokens_repeated: rows made of the cut ones, and the tokens they hold beyond those of the conversation: its system turn in each row but
        the first, and what the template shows otherwise in a part than in the whole.
    unseen: messages before a row's first that were part of its context in the conversation, summed over rows.
    lengths: {tokens of its longest row: conversations} of those longer than allowed. named: (record id, such tokens) of the first ten of them.

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
    encoded: Encoded, record: Mapping, *, policy: str, max_length: int, encode: Callable[[Sequence[dict]], Encoded]
) -> tuple[list[Encoded], Counts]:
    """`fit_rows` for conversations of one row each."""
    return fit_rows([encoded], record, policy=policy, max_length=max_length, encode=lambda messages: [encode(messages)])


def fit_rows(
    encoded: list[Encoded], record: Mapping, *, policy: str, max_length: int, encode: Callable[[Sequence[dict]], list[Encoded]]
) -> tuple[list[Encoded], Counts]:
    """The rows of one conversation, none longer than max_length tokens and each with trained tokens, and what was lost.

    encoded: its rows, as encode(record["messages"]) makes them. record: {"id", "messages", ...}, as in a split file.
    encode: from messages to rows that together train each assistant turn once, with the record's tools in them.
    policy: what becomes of a conversation with a longer row. drop leaves that row out. split_turns cuts the conversation before user turns into as
        few parts as can be, each with the leading system turns in front, and leaves out an exchange too long by itself. keep_end takes the row's
        last max_length tokens. error makes no row; `check` then raises.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r}")
    longest, tokens = max(len(row.input_ids) for row in encoded), _tokens(encoded)
    seen = Counts(rows=1, tokens=tokens)
    if longest <= max_length:
        return encoded, seen
    seen += Counts(lengths=Counter([longest]), named=((str(record["id"]), longest),))
    if policy == "error":
        return [], seen
    if policy == "split_turns":
        rows, cut, unseen = _split_turns(encoded, record["messages"], max_length, encode)
    else:
        shorter = [_end(row, max_length) if policy == "keep_end" else row for row in encoded]
        rows = [row for row in shorter if len(row.input_ids) <= max_length and row.trained]
        cut, unseen = tokens - _tokens(rows), 0
    if not rows:
        return [], seen + Counts(dropped=1, tokens_dropped=tokens)
    repeated = _tokens(rows) - (tokens - cut)
    return rows, seen + Counts(cut=1, tokens_cut=cut, made=len(rows), tokens_repeated=repeated, unseen=unseen)


def _tokens(rows: Sequence[Encoded]) -> int:
    return sum(len(row.input_ids) for row in rows)


def _end(row: Encoded, max_length: int) -> Encoded:
    """The last max_length tokens. The first of them has nothing before it to be predicted from, so it is not trained."""
    if len(row.input_ids) <= max_length:
        return row
    weights = row.weights[-max_length:] if row.weights else None
    return Encoded(row.input_ids[-max_length:], [IGNORE, *row.labels[-max_length:][1:]], row.untrained, weights)


def _split_turns(encoded: list[Encoded], messages: Sequence[dict], max_length: int, encode) -> tuple[list[Encoded], int, int]:
    """(rows, tokens of the exchanges left out, messages unseen).

    Greedy: each part takes exchanges while they fit. None spans an exchange that is left out, as its context would then be false.
    """
    system, parts = exchanges(messages)
    rows: list[Encoded] = []
    left_out = unseen = k = 0
    while k < len(parts):
        found, following = _longest(system, parts, k, max_length, encode)
        if found:
            unseen += sum(map(len, parts[:k]))
        else:
            left_out += _size(encoded, system, parts, k, encode)
        rows, k = rows + found, following
    return rows, left_out, unseen


def exchanges(messages: Sequence[dict]) -> tuple[list[dict], list[list[dict]]]:
    """(the leading system turns, the exchanges after them), all messages in order.

    An exchange begins where the user speaks after the assistant and holds at least one assistant turn, with any tool calls and results. What the
    assistant says before any user belongs to the first, what nobody answers to the last.
    """
    start = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    system, rest = list(messages[:start]), messages[start:]
    last = max((i for i, message in enumerate(rest) if message["role"] == "assistant"), default=-1)
    parts: list[list[dict]] = [[]]
    roles: set[str] = set()
    for i, message in enumerate(rest):
        if message["role"] in ("user", "system") and {"user", "assistant"} <= roles and i < last:
            parts.append([])
            roles = set()
        parts[-1].append(message)
        roles.add(message["role"])
    return system, parts


def _longest(system: list, parts: list, k: int, max_length: int, encode) -> tuple[list[Encoded], int]:
    """(rows of the longest part that begins with exchange k, the exchange after it); ([], k + 1) where that one alone is too long."""
    found: list[Encoded] = []
    messages = list(system)
    for following in range(k, len(parts)):
        messages += parts[following]
        rows = encode(messages)
        if any(len(row.input_ids) > max_length for row in rows):
            return found, max(following, k + 1)
        found = rows
    return found, len(parts)


def _size(encoded: list[Encoded], system: list, parts: list, k: int, encode) -> int:
    """Tokens by which exchange k makes the conversation longer, 0 where a template takes more out of the turn before; the first has the system turns."""

    def upto(n: int) -> int:
        if n == len(parts):
            return _tokens(encoded)
        return _tokens(encode(system + [message for part in parts[:n] for message in part])) if n else 0

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
