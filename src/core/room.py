"""What a stage takes of this machine's memory and disk against what there is, said before anything is loaded. The estimates are sizing/host.py's."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from src.core import memory
from src.core.errors import MEMORY, NO_SPACE, NoMemory, NoRoom
from src.core.log import size, warn

REGARDLESS = "room=ignore goes on regardless"
"""the way out of an estimate that is wrong"""


@dataclass(frozen=True)
class Needs:
    """What a stage takes at its peak, estimated.

    parts: bytes of memory by what they are for, of all its processes together. disk: bytes it writes that are there at once.
    smaller: the way that it goes by itself where memory is short, if there is one. ways: settings of one kind and what it takes with each, of which the
    first that fits is shown; what changes least comes first.
    """

    parts: Mapping[str, float]
    disk: float = 0
    smaller: Self | None = None
    ways: Sequence[Mapping[str, Self]] = ()

    @property
    def memory(self) -> float:
        return sum(self.parts.values())

    @property
    def equation(self) -> str:
        return " + ".join(f"{name} {size(count)}" for name, count in self.parts.items() if count)

    def within(self, bytes_there: float) -> Self:
        """These, or the smaller way where these are more than there is."""
        return self if self.smaller is None or self.memory <= bytes_there else self.smaller.within(bytes_there)

    def ways_out(self, room: "Room") -> list[str]:
        """The settings with which it fits."""

        def fits(then: Self) -> bool:
            found = then.within(room.memory)
            return found.memory <= room.memory and found.disk <= room.disk

        shown = (next((way for way, then in tried.items() if fits(then)), None) for tried in self.ways)
        return [way for way in shown if way]


@dataclass(frozen=True)
class Room:
    """What there is. memory, swap beside it, disk: bytes. at: an existing folder of that disk."""

    memory: int
    swap: int
    disk: int
    at: Path


def here(folder: Path) -> Room:
    """What this process may take on this machine, and what is free on the disk of a folder that may still be made."""
    at = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return Room(memory.available(), memory.swap(), shutil.disk_usage(at).free, at)


def check(needs: Needs, room: Room, *, ignore: bool = False) -> str:
    """What is needed of what is there, in a line. Raises NoMemory or NoRoom where that is too little, which `ignore` makes a warning.

    What swap makes up for is a warning too: it is slow, and it works.
    """
    found = needs.within(room.memory)
    line = f"needs about {size(found.memory)} of memory of {size(room.memory)}, {size(found.disk)} of disk of {size(room.disk)}"
    if found.memory > room.memory + room.swap:
        short = f"this takes about {size(found.memory)} of memory, {size(room.memory)} are available"
        if not ignore:
            raise NoMemory(short, where=found.equation, fix=[*needs.ways_out(room), MEMORY, REGARDLESS])
        warn(f"{short}; goes on, and may be killed (room=ignore)")
    elif found.memory > room.memory:
        warn(f"{size(found.memory - room.memory)} of the memory this takes will be swapped out, which is slow")
    if found.disk > room.disk:
        short = f"this takes about {size(found.disk)} of disk, {size(room.disk)} are free"
        if not ignore:
            raise NoRoom(short, where=str(room.at), fix=[*NO_SPACE, *needs.ways_out(room), REGARDLESS])
        warn(f"{short}; goes on, and may run out of it (room=ignore)")
    return line
