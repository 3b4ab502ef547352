"""CPU bundles of a model of one's own against the speed of memory: python benchmarks/bundles.py [--threads N] [--rounds N] [--tokens N] [--llamacpp PYTHON] BUNDLE ...

A BUNDLE is a folder that `python -m src.deploy target=llama2c`, or target=gguf, made; for the latter PYTHON has xllamacpp (`bash scripts/gguf_env.sh V` makes V).
They write the same number of tokens in turn, for as many rounds. Printed are medians of what each program says of its own speed, and which share that is of the
limit: the speed at which as many threads read the same file in the same round, over the bytes that a token takes.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from llama2c import ROOT, bandwidth

PROMPT = "Once upon a time, in a village by the sea, there lived an old fisherman. Every morning he"
PROMPT_TOKENS = 128


def run_ours(model: Path, tokens: int, threads: int, program: Path) -> tuple[float, float]:
    """Tokens per second of (an answer, a prompt)."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    figures = []
    for prompt, wanted in ((PROMPT, tokens), (" ".join([PROMPT] * (PROMPT_TOKENS // 20)), 1)):
        argv = [program, model, "-t", "0", "-n", str(wanted + 20), "-i", prompt]
        said = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment).stderr
        found = re.search(r"prompt: \d+ tokens, ([\d.]+) tok/s; answer: (\d+) tokens, ([\d.]+)", said)
        if not found or int(found[2]) < wanted // 2:
            sys.exit(f"{model}: its answer ended too soon to measure: {said.strip()}")
        figures.append(found)
    return float(figures[0][3]), float(figures[1][1])


def run_llama_cpp(model: Path, tokens: int, threads: int, python: Path) -> tuple[float, float]:
    """The same."""
    argv = [python, ROOT / "benchmarks" / "llama_cpp.py", "run", model, str(tokens), str(threads), str(PROMPT_TOKENS)]
    timings = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    return timings["tokens_per_second"], timings["prompt_tokens_per_second"]


def bytes_a_token(model: Path) -> int:
    """Of the file, those that a token takes: all, but for an embedding that is not the output layer too, of which it takes a row."""
    if model.suffix == ".gguf":
        import gguf

        sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(model).tensors}
        return sum(sizes.values()) - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)
    with open(model, "rb") as file:
        head = file.read(64)
    if struct.unpack_from("<i", head, 4) != (3,):
        sys.exit(f"{model} is no model.bin of version 3")
    dim, vocab, shared = (struct.unpack_from("<i", head, at)[0] for at in (8, 28, 36))
    bits, group = struct.unpack_from("<ii", head, 44)
    embedding = vocab * dim * 4 if bits == 32 else vocab * (dim + 4 * dim // group)
    return model.stat().st_size - (0 if shared else embedding)


def model_of(bundle: Path) -> Path:
    found = [bundle / "model.bin"] if (bundle / "model.bin").is_file() else sorted(bundle.glob("*.gguf"))
    if len(found) != 1:
        sys.exit(f"{bundle} has no model.bin, and not one GGUF")
    return found[0].resolve()


def main(given: argparse.Namespace) -> None:
    models = [model_of(bundle) for bundle in given.bundles]
    if given.llamacpp is None and any(model.suffix == ".gguf" for model in models):
        sys.exit("a GGUF is run by llama.cpp: --llamacpp PYTHON names a Python with xllamacpp")
    rounds: dict[Path, list[tuple[float, float, float]]] = {model: [] for model in models}
    with tempfile.TemporaryDirectory() as place:
        reader = Path(place) / "bandwidth"
        subprocess.run(["cc", "-O3", "-march=native", "-fopenmp", ROOT / "benchmarks" / "bandwidth.c", "-o", reader], check=True)
        program = Path(place) / "run"
        for name in ("run.c", "Makefile"):
            shutil.copy(ROOT / "assets" / "llama2c" / name, place)
        subprocess.run(["make", "-s", "-C", place, *(["omp"] if given.threads > 1 else ["run"])], check=True)
        for _ in range(given.rounds):
            for model in models:
                limit = bandwidth(reader, model, given.threads) / bytes_a_token(model)
                ours = model.suffix == ".bin"
                speeds = (run_ours if ours else run_llama_cpp)(model, given.tokens, given.threads, program if ours else given.llamacpp)
                rounds[model].append((limit, *speeds))
    for model, found in rounds.items():
        limit, answer, prompt = map(statistics.median, zip(*found))
        share = statistics.median(speed / most for most, speed, _ in found)
        name = f"{model.parent.name}/{model.name}"
        print(
            f"{name:<44} {model.stat().st_size / 1e6:6,.0f} MB  limit {limit:8,.1f}  {answer:8,.1f} tokens/s ({share:4.0%})  prompt {prompt:8,.1f}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--llamacpp", type=Path)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    main(parser.parse_args())
