"""Does a fault in each place that matters most make a test fail? Fourteen faults, one at a time, each in a copy of the project.

    python scripts/mutations.py [NAME ...]

A fault is one line changed; the copy's tests that should notice it are run. Prints a line for each and `14 of 14`; exits 1 where one went unnoticed.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("src", "configs", "assets", "tests", "scripts", "finetune", "docs", "README.md", "pyproject.toml", "requirements.txt")


class Mutation(NamedTuple):
    """file: which holds `right`, once, to become `wrong`. tests: what pytest is given."""

    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


STEPS = ("tests/test_steps.py",)
MUTATIONS = {
    "mask off by one": Mutation(
        "src/chat/encoding.py",
        "labels[start:stop] = ids[start:stop]",
        "labels[start + 1 : stop] = ids[start + 1 : stop]",
        ("tests/test_chatml.py",),
    ),
    "targets not shifted": Mutation(
        "src/training/batches.py",
        "after = [np.append(example[1:], encoding.IGNORE) for example in labels]",
        "after = [np.append(example[:-1], encoding.IGNORE) for example in labels]",
        STEPS,
    ),
    "weight decay 0": Mutation("src/training/choices.py", "weight_decay=t.weight_decay", "weight_decay=0.0", STEPS),
    "beta2": Mutation("src/training/choices.py", "adam_beta2=t.adam_beta2", "adam_beta2=0.999", STEPS),
    "schedule shifted": Mutation("src/training/choices.py", "max_steps=steps", "max_steps=steps + 1", STEPS),
    "sampler without epoch": Mutation(
        "src/training/batches.py",
        "np.random.default_rng([self.seed, epoch])",
        "np.random.default_rng([self.seed])",
        ("tests/test_properties.py", "tests/test_training.py", "-k", "epoch or order"),
    ),
    "journal key without seed": Mutation(
        "src/distill/endpoint.py",
        '        "seed": request.seed,\n        "schema"',
        '        "schema"',
        ("tests/test_teachers.py", "-k", "known"),
    ),
    "budget <": Mutation(
        "src/distill/limits.py",
        "self.tokens + reserved_tokens + tokens <= most",
        "self.tokens + reserved_tokens + tokens < most",
        ("tests/test_teachers.py", "-k", "budget"),
    ),
    "rename order": Mutation(
        "src/core/artifact.py",
        "        if path.exists():\n            os.replace(path, replaced)\n        os.replace(partial, path)\n",
        "        os.replace(partial, path)\n        if path.exists():\n            os.replace(path, replaced)\n",
        ("tests/test_artifact.py", "-k", "renames or aside"),
    ),
    "a field made Unkeyed": Mutation(
        "src/settings/training.py",
        "    rank: PositiveInt\n",
        "    rank: Annotated[PositiveInt, Unkeyed]\n",
        ("tests/test_config.py", "-k", "key"),
    ),
    "merge scale": Mutation(
        "src/models/merging.py",
        'return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)',
        "return alpha / (rank + 1)",
        ("tests/test_merge.py", "-x"),
    ),
    "bf16 rounded": Mutation(
        "src/models/rounding.py", '    if rounding == "nearest":\n', "    if dtype == torch.bfloat16:\n", ("tests/test_rounding.py", "-x")
    ),
    "tokenizer.txt type": Mutation(
        "src/deploy/axera/tokenizer_txt.py", "MAGIC, HUGGINGFACE = 430, 3", "MAGIC, HUGGINGFACE = 430, 2", ("tests/test_axera.py", "-x")
    ),
    "KV formula halved": Mutation(
        "src/sizing/shape.py",
        "return round(width * sum(layer.kv_values * kept(layer)",
        "return round(width / 2 * sum(layer.kv_values * kept(layer)",
        ("tests/test_shape.py",),
    ),
}


def notices(mutation: Mutation) -> tuple[bool, str]:
    """(whether the tests fail, the first line that says why). Raises ValueError where the line to change is not there once."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        copy.mkdir()
        for name in COPIED:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
        file = copy / mutation.file
        text = file.read_text(encoding="utf-8")
        if text.count(mutation.right) != 1:
            raise ValueError(f"{mutation.file} holds {mutation.right!r} {text.count(mutation.right)} times")
        file.write_text(text.replace(mutation.right, mutation.wrong), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", *mutation.tests], cwd=copy, capture_output=True, text=True
        )
    why = next((line for line in done.stdout.splitlines() if line.startswith(("E  ", "FAILED", "ERROR"))), "")
    # 1: tests failed; 2 and more: pytest itself had trouble, such as no test of that name.
    if done.returncode not in (0, 1):
        raise ValueError(f"pytest ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}")
    return done.returncode == 1, why


def main(names: list[str]) -> int:
    chosen = {name: MUTATIONS[name] for name in names or MUTATIONS}
    noticed = 0
    for name, mutation in chosen.items():
        found, why = notices(mutation)
        noticed += found
        print(f"{'noticed' if found else 'UNNOTICED':<10} {name:<26} {why[:110]}", flush=True)
    print(f"{noticed} of {len(chosen)}")
    return int(noticed < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
