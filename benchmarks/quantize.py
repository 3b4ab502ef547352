"""GPTQ int4 of a small Llama: python -m src.quantize beside gptqmodel called plainly, as whole processes: python benchmarks/quantize.py [PAIRS]

A random model of hidden size 512, 8 layers, MLP 1376 and a vocabulary of 32,000, calibrated on 128 rows of 512 tokens, in groups of 32, the widest that
divide 1376. The verb also proves what it wrote in processes of its own. Prints CPU and wall seconds and peak memory of each, their ratios pair by pair, and the
KL of each result to the model on rows that neither has seen.
"""

import json
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import stages

sys.path.insert(0, str(ROOT := Path(__file__).resolve().parent.parent))

ROWS, LENGTH = 128, 512


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        stages.SHAPES["small"] = ("llama", 512, 8, 8, 8, 64, 1376, 32000, False)
        stages.write_model("small", model := place / "model")
        dataset = chats(place)
        ours, theirs = [], []
        quantize = ["-m", "src.quantize", f"outputs={place}", "run=r", "force=true", f"source={model}", f"dataset={dataset}"]
        quantize += ["quantizer.group_size=32", f"calibration.rows={ROWS}", f"calibration.max_length={LENGTH}"]
        for _ in range(pairs):
            ours.append(measured(quantize, place))
            theirs.append(measured([stages.__file__, "--gptqmodel", model, dataset, place / "gptqmodel", 1, ROWS], place))
        report(ours, theirs)
        for name, made in (("src.quantize", place / "r" / "quantize"), ("gptqmodel", place / "gptqmodel")):
            print(f"KL to the model, {name}: {kl(model, made):.5f} nats a token")


def chats(place: Path) -> Path:
    """A dataset whose calib split is conversations of at least LENGTH tokens of the embedded tokenizer."""
    words = (ROOT / "README.md").read_text().split()
    draw = random.Random(0)
    rows = [
        {"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": " ".join(draw.choices(words, k=LENGTH))}]}
        for _ in range(2 * ROWS)
    ]
    (place / "chats.json").write_text(json.dumps(rows))
    measured(["-m", "src.data", f"outputs={place}", "run=d", f"data.path={place / 'chats.json'}", "data.calib=0.8", "data.val=0.1"], place)
    return place / "d" / "data"


def measured(argv: list, place: Path) -> dict:
    found = stages.measured(argv, log := place / "log")
    if found["code"]:
        sys.exit(log.read_text())
    return found


def report(ours: list[dict], theirs: list[dict]) -> None:
    for name, key, unit in (("CPU", "cpu_s", "s"), ("wall", "wall_s", "s"), ("peak", "peak", "MB")):
        one, other = ([each[key] / (1e6 if key == "peak" else 1) for each in found] for found in (ours, theirs))
        ratios = [b / a for a, b in zip(one, other)]
        print(
            f"{name}: src.quantize {statistics.median(one):,.1f} {unit}, gptqmodel {statistics.median(other):,.1f} {unit}, {statistics.median(ratios):.2f} times "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


def kl(model: Path, made: Path) -> float:
    """Mean KL in nats of a quantized folder to its model, on 16 rows of 256 random tokens."""
    from src.chat.encoding import Encoded
    from src.core import artifact
    from src.models import by_layer, fidelity, seen

    draw = random.Random(1)
    ids = [[draw.randrange(1000) for _ in range(256)] for _ in range(16)]
    rows = [Encoded(row, row) for row in ids]
    before = seen.observe(seen.by_layer(by_layer.need(artifact.open_any(model)), "model"), rows)
    shutil.copy(model / "tokenizer.json", made)
    after = seen.observe(seen.by_layer(by_layer.need(artifact.open_any(made)), "quantized"), rows, before.top_k_ids)
    return fidelity.compare(before, after, len(rows)).kl


if __name__ == "__main__":
    main()
