"""Conversations into train, val and calib as they come, each content in one split alone."""

import hashlib
from array import array
from pathlib import Path

from src.records.conversations import Conversation, place_of

SPLITS = ("train", "val", "calib")


class Splits:
    """The files train.jsonl, val.jsonl and calib.jsonl of a dataset under way; `rows`: lines in each.

    By hash, a record's split follows from its content alone. A share that would stay empty gets the records nearest to its bound, as long as two records
    are left to train on. exact: shares to the record; those of equal content stay together, so duplicates can make them a few more.
    Memory: 9 bytes a line of train.jsonl.
    """

    def __init__(self, out: Path, *, seed: int, val: float, calib: float, exact: bool):
        self._out, self._seed, self._shares, self._exact = out, seed, {"val": val, "calib": calib}, exact
        self._files = {split: open(out / f"{split}.jsonl", "w", encoding="utf-8") for split in SPLITS}
        self._places, self._repeats = array("Q"), bytearray()
        self.rows = dict.fromkeys(SPLITS, 0)

    def add(self, conversation: Conversation, times: int = 1) -> None:
        """Write a conversation into its split; into train so many times, elsewhere once."""
        place = place_of(conversation.digest(), self._seed)
        split = "train" if self._exact else self._split(place / 2**64)
        if split == "train":
            self._places.extend([place] * times)
            self._repeats.extend([0] + [1] * (times - 1))
        self.write(split, conversation, times if split == "train" else 1)

    def write(self, split: str, conversation: Conversation, times: int = 1) -> None:
        """Write a conversation into a split of the caller's choice."""
        self._files[split].write((conversation.to_json() + "\n") * times)
        self.rows[split] += times

    def finish(self) -> dict[str, int]:
        """Close the files, and move what train still owes the others. Returns the lines of each split."""
        self.close()
        moves = self._exact_moves() if self._exact else self._least_moves()
        if moves:
            self._move(moves)
        return self.rows

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _split(self, place: float) -> str:
        if place < self._shares["val"]:
            return "val"
        return "calib" if place < self._shares["val"] + self._shares["calib"] else "train"

    def _exact_moves(self) -> dict[int, str]:
        """{place: split} of as many records as the shares say, the first places to val, the next to calib; at least one each where there are three."""
        ordered = sorted(place for place, repeat in zip(self._places, self._repeats) if not repeat)
        moves: dict[int, str] = {}
        begin = 0
        for split, share in self._shares.items():
            count = max(round(share * len(ordered)), 1 if share and len(ordered) > 2 else 0)
            moves |= dict.fromkeys((p for p in ordered[begin : begin + count] if p not in moves), split)
            begin += count
        return moves

    def _least_moves(self) -> dict[int, str]:
        """{place: split} of one record for each share that stayed empty: that of train whose place is the lowest."""
        owed = [split for split, share in self._shares.items() if share and not self.rows[split]]
        spare = sorted(set(self._places))[: len(owed)] if owed else []
        return dict(zip(spare, owed)) if len(set(self._places)) > len(owed) else {}

    def _move(self, moves: dict[int, str]) -> None:
        """Write train.jsonl anew without the records at these places, and those into their splits, once each."""
        train, left = self._out / "train.jsonl", self._out / "train.jsonl.partial"
        files = {split: open(self._out / f"{split}.jsonl", "a", encoding="utf-8") for split in self._shares}
        try:
            with open(train, encoding="utf-8", newline="\n") as lines, open(left, "w", encoding="utf-8", newline="\n") as kept:
                for line, place, repeat in zip(lines, self._places, self._repeats):
                    split = moves.get(place, "train")
                    (kept if split == "train" else files[split]).write("" if repeat and split != "train" else line)
                    self.rows["train"] -= split != "train"
                    if split != "train":
                        self.rows[split] += not repeat
        finally:
            for file in files.values():
                file.close()
        left.replace(train)


def times(digest: str, weight: float, seed: int) -> int:
    """How often a record of a source with this weight comes into train: the whole part, and once more for as large a share of records as its rest."""
    whole = int(weight)
    if whole == weight:
        return whole
    drawn = int.from_bytes(hashlib.sha256(f"{seed}:weight:{digest}".encode()).digest()[:8], "big") / 2**64
    return whole + (drawn < weight - whole)
