"""The CPU bundle's program against llama2.c's: python benchmarks/llama2c.py [LLAMA2C] [THREADS]

Random models, in fp32 and in int8 with groups of 64, 32 and 16, are read by assets/llama2c/run.c and, where LLAMA2C is a folder of karpathy/llama2.c with
its `run` and `runq` built (-Ofast -march=native, and -fopenmp for more threads), by those, in turn. Prints tokens per CPU second (start-up left out) and
their ratios to llama2.c's and to our fp32.
"""

import os
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# hidden size, intermediate size, layers, heads, key-value heads, vocabulary, tokens to write
SHAPES = {
    "260K": (64, 172, 5, 8, 4, 512, 500),
    "15M": (288, 768, 6, 6, 6, 32_000, 100),
    "288 x 16 layers": (288, 768, 16, 6, 6, 512, 100),
    "512 x 8 layers": (512, 1408, 8, 8, 8, 512, 100),
}
GROUPS, ROUNDS = (0, 64, 32, 16, 4), 3


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
        max_position_embeddings=512,
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


def cpu_seconds(program: Path, folder: Path, tokens: int, threads: int) -> float:
    argv = [program, folder / "model.bin", "-z", folder / "tokenizer.bin", "-t", "0", "-n", str(tokens)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{program} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def speed(program: Path, folder: Path, tokens: int, threads: int) -> float:
    """Tokens per CPU second after the second one."""
    return (tokens - 2) / (cpu_seconds(program, folder, tokens, threads) - cpu_seconds(program, folder, 2, threads))


def main(place: Path, theirs: Path | None, threads: int) -> None:
    from src.deploy.llama2c import weights

    ours = place / "program"
    ours.mkdir()
    for name in ("run.c", "Makefile"):
        (ours / name).write_bytes((ROOT / "assets" / "llama2c" / name).read_bytes())
    subprocess.run(["make", "-s", "-C", str(ours), *(["omp"] if threads > 1 else [])], check=True)
    for name in SHAPES:
        folder = place / name
        subprocess.run([sys.executable, __file__, "--write", str(folder), name], check=True, stderr=subprocess.DEVNULL)
        shape = weights.read_shape(folder)
        fp32 = None
        for group in GROUPS:
            if (group and weights.group_size(shape, group) != group) or (group == 4 and name != "260K"):
                continue
            weights.write_model(folder, shape, 2 if group else 0, group, folder / "model.bin")
            programs = [ours / "run"] + ([theirs / ("runq" if group else "run")] if theirs else [])
            rounds = [[speed(program, folder, SHAPES[name][-1], threads) for program in programs] for _ in range(ROUNDS)]
            speeds = [statistics.median(column) for column in zip(*rounds)]
            fp32 = fp32 or speeds[0]
            against = f"  llama2.c {speeds[1]:6,.0f}  ratio {speeds[0] / speeds[1]:.2f}" if theirs else ""
            kind = f"int8, {group}" if group else "fp32"
            print(f"{name:<16} {kind:<9} ours {speeds[0]:6,.0f}{against}  of our fp32 {speeds[0] / fp32:.2f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write_model(Path(sys.argv[2]), sys.argv[3])
    else:
        with tempfile.TemporaryDirectory() as place:
            main(Path(place), Path(sys.argv[1]).resolve() if sys.argv[1:] else None, int(sys.argv[2]) if sys.argv[2:] else 1)
