"""The CPU bundle's program against the speed of memory, llama2.c's programs and llama.cpp: python benchmarks/llama2c.py [--threads N] [--llama2c FOLDER] [--llamacpp PYTHON] [SHAPE ...]

Random models in fp32, int8 and int4 are read by assets/llama2c/run.c and, in turn with it, by what else is given: FOLDER is karpathy/llama2.c with its `run` and `runq`
built (-Ofast -march=native, and -fopenmp for more threads); PYTHON has xllamacpp, gguf and safetensors (`python -m venv V && V/bin/pip install xllamacpp gguf safetensors`).

Prints tokens per CPU second (on more threads than one: per second), start-up left out, medians of the rounds; which share that is of the limit, the speed at which the
same threads read the same file in the same round, over the bytes a token takes; the same of the others; and tokens of a prompt read per second. On a shared machine only
figures of one line compare.
"""

import argparse
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# hidden size, intermediate size, layers, heads, key-value heads, vocabulary, tokens to write
SHAPES = {
    "260K": (64, 172, 5, 8, 4, 512, 500),
    "15M": (288, 768, 6, 6, 6, 32_000, 100),
    "288 x 16 layers": (288, 768, 16, 6, 6, 512, 100),
    "512 x 8 layers": (512, 1408, 8, 8, 8, 512, 100),
    "110M": (768, 2048, 12, 12, 12, 32_000, 50),
}
# format, group, what llama2.c has for it, what llama.cpp calls its like
KINDS = (
    ("fp32_v0", 64, "run", "F32"),
    ("int8_v2", 64, "runq", "Q8_0"),
    ("int8_v2", 32, "runq", "Q8_0"),
    ("int8_v2", 16, "runq", None),
    ("int8_v2", 4, "runq", None),
    ("int4_v3", 64, None, "Q4_0"),
    ("int4_v3", 32, None, "Q4_0"),
)
ROUNDS, PROMPT = 3, 256


def write_model(folder: Path, name: str) -> None:
    """A random Llama that never says <s> or </s>, at which either program would end, and a tokenizer.bin that llama2.c takes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, kv_heads, vocab, _ = SHAPES[name]
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data[1:3] = 0
    model.save_pretrained(folder)
    with open(folder / "tokenizer.bin", "wb") as file:
        file.write(struct.pack("<i", 8))
        for token in range(vocab):
            piece = b" " if token == 3 else b"%d " % token
            file.write(struct.pack("<fi", 0.0, len(piece)) + piece)


def spent(argv: list, threads: int) -> float:
    """Seconds that a command takes: of all its threads' CPU on one thread, of the clock on more, where waiting counts."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    start = time.monotonic()
    process = subprocess.Popen(list(map(str, argv)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{argv[0]} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime if threads == 1 else time.monotonic() - start


def speed(argv: Callable[[int], list], tokens: int, threads: int, few: int = 2) -> float:
    """Tokens per second after the first `few`."""
    return (tokens - few) / max(1e-6, spent(argv(tokens), threads) - spent(argv(few), threads))


def bandwidth(program: Path, model: Path, threads: int) -> float:
    """Bytes per second at which the threads read the file."""
    done = subprocess.run(
        [program, model, "3"], env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[threads == 1])


def main(place: Path, given: argparse.Namespace) -> None:
    from src.models import llama2c_file
    from src.sizing import takes

    ours, threads = place / "program", given.threads
    ours.mkdir()
    for name in ("run.c", "Makefile"):
        (ours / name).write_bytes((ROOT / "assets" / "llama2c" / name).read_bytes())
    subprocess.run(["make", "-s", "-C", ours, *(["omp"] if threads > 1 else [])], check=True)
    subprocess.run(["cc", "-O3", "-march=native", "-fopenmp", ROOT / "benchmarks" / "bandwidth.c", "-o", ours / "bandwidth"], check=True)
    for name in given.shapes or SHAPES:
        folder, tokens = place / name, SHAPES[name][-1]
        subprocess.run([sys.executable, __file__, "--write", str(folder), name], check=True, stderr=subprocess.DEVNULL)
        first = None
        for format, group, theirs, gguf in KINDS:
            shape = llama2c_file.read_shape(folder, format)
            if (group == 4 and name != "260K") or (format != "fp32_v0" and takes.llama2c_group(group, *shape.widths) != group):
                continue
            if format == "int4_v3" and any(width % 64 for width in shape.widths):
                continue
            form = llama2c_file.form_of(shape, format, group)
            model = folder / "model.bin"
            llama2c_file.write_model(folder, shape, form, model)
            read = sum(
                form.size(part)
                for part in llama2c_file.layout(shape, form)
                if part.name not in (llama2c_file.EMBEDDING, llama2c_file.ROPE_TABLES)
            )
            commands: dict[str, Callable[[int], list]] = {}
            options = lambda program, n: [program, model, "-z", folder / "tokenizer.bin", "-t", "0", "-n", n]
            commands["ours"] = lambda n: options(ours / "run", n)
            if given.llama2c and theirs:
                commands["llama2.c"] = lambda n, theirs=theirs: options(given.llama2c / theirs, n)
            if given.llamacpp and gguf:
                other, script = folder / f"{gguf}.gguf", ROOT / "benchmarks" / "llama_cpp.py"
                if not other.is_file():
                    subprocess.run([given.llamacpp, script, "gguf", folder, gguf, other], check=True)
                commands["llama.cpp"] = lambda n, other=other: [given.llamacpp, script, "run", other, n, threads]
            rounds = []
            for _ in range(given.rounds):
                limit = bandwidth(ours / "bandwidth", model, threads) / read
                rounds.append([limit, *(speed(argv, tokens, threads) for argv in commands.values())])
            limit, *speeds = (statistics.median(column) for column in zip(*rounds))
            shares = [statistics.median(row[i + 1] / row[0] for row in rounds) for i in range(len(speeds))]
            prompted = lambda n: [*options(ours / "run", n), "-i", " " * n]
            prompt = speed(prompted, PROMPT, threads)
            first = first or speeds[0]
            told = "  ".join(f"{whose} {rate:8,.1f} ({share:4.0%})" for whose, rate, share in zip(commands, speeds, shares))
            ratios = "".join(f"  ours / {whose} {speeds[0] / rate:.2f}" for whose, rate in list(zip(commands, speeds))[1:])
            kind = "fp32" if form.bits == 32 else f"int{form.bits}, {group}"
            print(
                f"{name:<16} {kind:<9} limit {limit:8,.1f}  {told}{ratios}  of our fp32 {speeds[0] / first:.2f}  prompt {prompt:8,.1f}",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write_model(Path(sys.argv[2]), sys.argv[3])
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--threads", type=int, default=1)
        parser.add_argument("--rounds", type=int, default=ROUNDS)
        parser.add_argument("--llama2c", type=Path)
        parser.add_argument("--llamacpp", type=Path)
        parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=", ".join(SHAPES))
        with tempfile.TemporaryDirectory() as place:
            main(Path(place), parser.parse_args())
