"""Embedding extraction against copying the same bytes: python benchmarks/embedding.py [FOLDER]

Writes a sharded checkpoint with Qwen2.5-0.5B's table (151,936 x 896) in bf16, fp16 and fp32 into FOLDER (a temporary one by default), then in turn
copies as many bytes with shutil.copyfile and extracts the table, and prints the ratio of each pair, with the peak memory of a process that only extracts.
"""

import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

ROWS, WIDTH, PAIRS = 151_936, 896, 9


def write_checkpoint(folder: Path, dtype: str) -> None:
    """Two shards, the table in the second behind another tensor, so that it neither begins the file nor is alone in it."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    dtype = getattr(torch, dtype)
    table = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(4864, WIDTH, dtype=dtype)}, folder / "model-00001-of-00002.safetensors")
    save_file(
        {"lm_head.bias": torch.zeros(7, dtype=dtype), "model.embed_tokens.weight": table}, folder / "model-00002-of-00002.safetensors"
    )


def extract(folder: Path, out: Path) -> None:
    from src.deploy.embedding import find_embedding, write_bf16

    write_bf16(find_embedding(folder), out)


def timed(work, *args) -> float:
    begun = time.perf_counter()
    work(*args)
    return time.perf_counter() - begun


def peak(folder: Path, out: Path) -> float:
    """Peak resident MB of a fresh process that extracts and does nothing else."""
    done = subprocess.run([sys.executable, __file__, "--extract", str(folder), str(out)], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1000


def main(place: Path) -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        folder = place / dtype
        # In a process of its own: a child's peak memory counts that of the process it was forked from.
        subprocess.run([sys.executable, __file__, "--write", str(folder), dtype], check=True)
        extract(folder, place / "table.bin")
        same_bytes = place / "same_bytes.bin"
        shutil.copyfile(place / "table.bin", same_bytes)
        pairs = []
        for _ in range(PAIRS):
            for old in ("copy.bin", "table.bin"):
                (place / old).unlink(missing_ok=True)
            pairs.append((timed(extract, folder, place / "table.bin"), timed(shutil.copyfile, same_bytes, place / "copy.bin")))
        ratios = [ours / copy for ours, copy in pairs]
        print(
            f"{dtype:<9} extract {statistics.median(p[0] for p in pairs):.3f} s, "
            f"copy of the same {same_bytes.stat().st_size / 1e6:.0f} MB {statistics.median(p[1] for p in pairs):.3f} s, "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), peak memory {peak(folder, place / 'table.bin'):.0f} MB",
            flush=True,
        )
        shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--extract"]:
        extract(Path(sys.argv[2]), Path(sys.argv[3]))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    elif sys.argv[1:2] == ["--write"]:
        write_checkpoint(Path(sys.argv[2]), sys.argv[3])
    else:
        with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as place:
            main(Path(place))
