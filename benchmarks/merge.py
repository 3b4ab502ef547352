"""Merging against peft: python benchmarks/merge.py [FOLDER] [PAIRS]

Makes a random base of Qwen2.5-0.5B's shape in bf16 and a LoRA adapter of rank 64 on all its linear layers in FOLDER (a temporary one by default), then in
turn runs as whole processes: peft (load the base, PeftModel.from_pretrained, merge_and_unload, save_pretrained), our streamed merge alone, rounding
stochastically as it does by default and to the nearest as peft does, and `python -m src.merge`, which also hashes its inputs and result and proves the
result by reloading it in a fresh process. Prints wall time and the peak memory that each tree of processes has of its own, their ratios pair by pair, and whether the
tensors rounded to the nearest are peft's byte for byte. Takes 3.2 GB of disk.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from stages import measured

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RANK, PAIRS = 64, 5
SHAPE = {  # as a Llama model, whose tokenizer the embedded one is
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}


def write_inputs(base: Path, adapter: Path) -> None:
    """A complete model folder with random weights and an adapter for it whose update is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, dtype="bfloat16")).to(torch.bfloat16)
    model.save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "assets" / "tiny-chat" / name, base)
    model.name_or_path = str(base)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=16, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model.save_pretrained(adapter)


def by_peft(base: Path, adapter: Path, out: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16", local_files_only=True)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


def by_us(base: Path, adapter: Path, out: Path, how: str = "stochastic") -> None:
    from src.core.artifact import Artifact
    from src.models import merging, safetensors_io

    source = Artifact(adapter, "adapter", "", None, {})
    out.mkdir()
    written, changes = merging.plan(source, base)
    safetensors_io.write(out, written, merging.merged_tensors(source, base, written, changes, how), safetensors_io.parse_size("5GB"))
    merging.add_files(source, base, out, written)


def by_us_nearest(base: Path, adapter: Path, out: Path) -> None:
    by_us(base, adapter, out, "nearest")


def compare(one: Path, other: Path) -> None:
    """Prints how many tensors of two model folders are equal byte for byte; fails where one is not."""
    import torch
    from safetensors import safe_open

    with safe_open(one / "model.safetensors", "pt") as ours, safe_open(other / "model.safetensors", "pt") as theirs:
        assert set(ours.keys()) == set(theirs.keys())
        for name in ours.keys():
            a, b = ours.get_tensor(name), theirs.get_tensor(name)
            assert a.dtype == b.dtype and torch.equal(a.view(torch.int16), b.view(torch.int16)), name
        print(json.dumps(len(ours.keys())))


def run(*argv) -> tuple[float, float]:
    """(seconds, peak MB of its own) of a process with all that it starts."""
    with tempfile.NamedTemporaryFile() as log:
        found = measured(list(argv), Path(log.name))
        if found["code"]:
            sys.exit(Path(log.name).read_text())
    return found["wall_s"], found["peak"] / 1e6


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main(place: Path, pairs: int) -> None:
    base, adapter, theirs, ours, proven = (place / name for name in ("base", "adapter", "peft", "ours", "outputs"))
    run(__file__, "--write", base, adapter)
    rows = []
    for number in range(pairs + 1):  # the first is not counted: memory and files are touched for the first time
        row = {"peft": run(__file__, "--peft", base, adapter, theirs), "stochastic": run(__file__, "--ours", base, adapter, ours)}
        shutil.rmtree(ours)
        row["nearest"] = run(__file__, "--nearest", base, adapter, ours)
        equal = subprocess.run([sys.executable, __file__, "--compare", ours, theirs], capture_output=True, text=True, check=True).stdout
        shutil.rmtree(theirs)
        shutil.rmtree(ours)
        row["with proof"] = run("-m", "src.merge", f"source={adapter}", f"base={base}", f"outputs={proven}", "run=a")
        shutil.rmtree(proven)
        rows += [row] if number else []
        print(
            "  ".join(f"{name} {seconds:.1f} s {memory:,.0f} MB" for name, (seconds, memory) in row.items()),
            f" {equal.strip()} tensors equal",
            flush=True,
        )
    for name in rows[0]:
        seconds, memory = zip(*(row[name] for row in rows))
        ratios = [spread([row[name][i] / row["peft"][i] for row in rows]) for i in (0, 1)]
        print(
            f"{name:<10} {statistics.median(seconds):.1f} s, of peft's {ratios[0]}; {statistics.median(memory):,.0f} MB, of peft's {ratios[1]}"
        )


if __name__ == "__main__":
    work = {"--write": write_inputs, "--peft": by_peft, "--ours": by_us, "--nearest": by_us_nearest, "--compare": compare}.get(
        (sys.argv[1:] or [""])[0]
    )
    if work:
        work(*map(Path, sys.argv[2:]))
    else:
        with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as place:
            main(Path(place), int(sys.argv[2]) if sys.argv[2:] else PAIRS)
