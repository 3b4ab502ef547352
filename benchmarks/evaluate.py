"""The loss pass of an evaluation against plain transformers: python benchmarks/evaluate.py [ROUNDS]

Random Llamas on disk, and rows of conversations (the embedded ones, and ones of 512 tokens of which a quarter is an answer). In turn, in one process: what lm-eval's and most
scripts' loops do, a row at a time, logits of every token, the loss and the likeliest token of the answers; and the pass of `python -m src.evaluate`, the
same figures and the 64 likeliest tokens with their log-probabilities. The model is loaded beforehand in the first, and read from disk in the second. Prints tokens of the rows per
CPU second, their ratio round by round, and how far the losses are apart.
"""

import json
import resource
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# hidden size, intermediate size, layers, heads, key-value heads, vocabulary
SHAPES = {"15M": (288, 768, 6, 6, 6, 32_000), "0.5B's, 2 layers": (896, 4864, 2, 14, 2, 151_936)}
ROUNDS = 3


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def write_model(folder: Path, shape: tuple) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**dict(zip(names, shape)), tie_word_embeddings=True)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "assets" / "tiny-chat" / name, folder)


def rows_of_chats() -> list:
    from src.models import evaluation
    from src.models.loading import load_tokenizer
    from src.records.conversations import Tally, read

    chats = list(read(ROOT / "assets" / "conversations.json", format="auto", on_fault="error", tally=Tally()))[:30]
    return evaluation.encode_all([json.loads(chat.to_json()) for chat in chats], load_tokenizer(ROOT / "assets" / "tiny-chat"), 512)


def long_rows() -> list:
    import numpy as np

    from src.chat.encoding import IGNORE, Encoded

    ids = np.random.default_rng(0).integers(0, 1000, (4, 512)).tolist()
    return [Encoded(row, [IGNORE] * 384 + row[384:]) for row in ids]


def plainly(model, rows: list) -> float:
    """The mean loss of the rows' answers, a row at a time."""
    import torch

    losses, likeliest = [], []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row.input_ids])).logits[0, :-1].float().log_softmax(-1)
        labels = torch.tensor(row.labels[1:])
        losses.append(-logits.gather(1, labels.clamp(min=0)[:, None])[labels >= 0])
        likeliest.append(logits.argmax(-1)[labels >= 0])
    return float(torch.cat(losses).mean())


def main() -> None:
    from transformers import AutoModelForCausalLM

    from src.core.artifact import open_any
    from src.models import evaluation, seen

    chosen = {"conversations": rows_of_chats(), "512 tokens": long_rows()}
    print(f"{'':30} {'plain':>9} {'ours':>9} {'ratio':>7}   tokens per CPU second")
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), shape)
            plain, ours = AutoModelForCausalLM.from_pretrained(folder), open_any(Path(folder))
            seen.observe(evaluation.Measured(ours, "model").reader, long_rows()[:1])  # imports
            for kind, rows in chosen.items():
                tokens, speeds, apart = sum(len(row.input_ids) for row in rows), [], 0.0
                for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS):
                    marks = [cpu_seconds()]
                    loss = plainly(plain, rows)
                    marks.append(cpu_seconds())
                    found = seen.observe(evaluation.Measured(ours, "model").reader, rows)
                    marks.append(cpu_seconds())
                    speeds.append((tokens / (marks[1] - marks[0]), tokens / (marks[2] - marks[1])))
                    apart = max(apart, abs(float(found.losses.mean()) - loss))
                one, other = (statistics.median(speed[i] for speed in speeds) for i in (0, 1))
                ratio = statistics.median(b / a for a, b in speeds)
                print(f"{name + ', ' + kind:30} {one:9,.0f} {other:9,.0f} {ratio:7.2f}   losses within {apart:.0e}", flush=True)


if __name__ == "__main__":
    main()
