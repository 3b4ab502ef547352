"""Near-duplicate filtering against datasketch and rensa: CPU seconds and peak memory over the same texts, each in a process of its own.

    python benchmarks/near_duplicates.py 20000

Needs datasketch and rensa beside the project's packages (pip install datasketch rensa). Every text is looked up and, where nothing earlier is like it,
added; features are word 3-grams, 128 permutations, similarity 0.7. Texts have 30 to 200 words of a vocabulary of 20,000, one in ten is an earlier one
with 5 % of its words changed. What each finds among those, and beside them, is printed too.
"""

import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

N, PERMUTATIONS, SIMILARITY = 3, 128, 0.7


def texts(count: int) -> Iterator[tuple[str, bool]]:
    """(text, whether it is a changed copy of an earlier one)."""
    draw, kept = random.Random(7), []
    for _ in range(count):
        if kept and draw.random() < 0.1:
            copied = draw.choice(kept).copy()
            for _ in range(max(1, len(copied) // 20)):
                copied[draw.randrange(len(copied))] = f"w{draw.randrange(20_000)}"
            yield " ".join(copied), True
        else:
            parts = [f"w{draw.randrange(20_000)}" for _ in range(draw.randrange(30, 200))]
            if len(kept) < 5000:
                kept.append(parts)
            yield " ".join(parts), False


def ours() -> Callable[[int, str], bool]:
    from src.records.near_duplicates import MinHashIndex

    index = MinHashIndex(n=N, permutations=PERMUTATIONS, similarity=SIMILARITY)
    return lambda number, text: index.near(text) is not None


def features(text: str) -> set[str]:
    from src.distill.texts import words
    from src.records.near_duplicates import ngrams

    return set(ngrams(words(text), N))


def datasketch() -> Callable[[int, str], bool]:
    from datasketch import MinHash, MinHashLSH

    def signature(text: str) -> MinHash:
        made = MinHash(num_perm=PERMUTATIONS)
        made.update_batch([feature.encode() for feature in features(text)])
        return made

    return by(MinHashLSH(threshold=SIMILARITY, num_perm=PERMUTATIONS), signature)


def rensa() -> Callable[[int, str], bool]:
    from rensa import RMinHash, RMinHashLSH

    def signature(text: str) -> RMinHash:
        made = RMinHash(num_perm=PERMUTATIONS, seed=42)
        made.update(list(features(text)))
        return made

    return by(RMinHashLSH(threshold=SIMILARITY, num_perm=PERMUTATIONS, num_bands=32), signature)


def by(index, signature: Callable) -> Callable[[int, str], bool]:
    """Whether a text is near an earlier one, by a library's index of its own signatures."""
    kept: dict = {}

    def near(number: int, text: str) -> bool:
        own = signature(text)
        found = any(kept[key].jaccard(own) >= SIMILARITY for key in index.query(own))
        if not found:
            index.insert(number, own)
            kept[number] = own
        return found

    return near


MAKERS = {"ours": ours, "datasketch": datasketch, "rensa": rensa}


def one(name: str, count: int) -> dict:
    """{seconds: of the processor, megabytes: at the peak beside what was there before, found: copies found, other: others taken for copies}."""
    near = MAKERS[name]()
    near(0, "to have all that is imported late")
    before, begun = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
    found = other = copies = 0
    for number, (text, copied) in enumerate(texts(count), 1):
        hit = near(number, text)
        found, other, copies = found + (hit and copied), other + (hit and not copied), copies + copied
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before.ru_maxrss
    return {"seconds": time.process_time() - begun, "megabytes": peak / 1024, "found": found, "copies": copies, "other": other}


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(one(sys.argv[1], int(sys.argv[2]))))
        sys.exit()
    rows = {
        name: json.loads(subprocess.run([sys.executable, __file__, name, sys.argv[1]], capture_output=True, text=True, check=True).stdout)
        for name in MAKERS
    }
    for name, row in rows.items():
        print(
            f"{name:<12} {row['seconds']:.1f} CPU s ({row['seconds'] / rows['ours']['seconds']:.2f} of ours), {row['megabytes']:.0f} MB at the peak, "
            f"found {row['found']} of {row['copies']} copies and {row['other']} that are none"
        )
