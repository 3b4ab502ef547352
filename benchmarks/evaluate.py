"""The loss pass of an evaluation against plain transformers, and against lm-eval where that is installed: python benchmarks/evaluate.py [ROUNDS]

Random Llamas on disk, and rows of conversations (the embedded ones, and ones of 512 tokens of which a quarter is an answer). In turn, in one process: what lm-eval's and most
scripts' loops do, a row at a time, logits of every token, the loss and the likeliest token of the answers; and the pass of `python -m src.evaluate`, the
same figures and the 64 likeliest tokens with their log-probabilities; and lm-eval's own model class at its batches of 1 and of 16, asked for each answer of a row. The model is read from disk
in ours, and loaded beforehand in the others. Prints tokens of the rows per CPU second, ratios round by round, and how far the losses are apart.
"""

import importlib.util
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


def by_lm_eval(lm, rows: list) -> float:
    """The mean loss of the rows' answers, each asked for with all that stands before it."""
    from itertools import groupby

    requests = []
    for row in rows:
        for answers, pairs in groupby(range(len(row.labels)), key=lambda i: row.labels[i] >= 0):
            at = list(pairs)
            if answers:
                requests.append((("", ""), row.input_ids[: at[0]], row.input_ids[at[0] : at[-1] + 1]))
    said = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    return -sum(log_prob for log_prob, _ in said) / sum(len(request[2]) for request in requests)


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from src.core.artifact import open_any
    from src.models import evaluation, seen

    chosen = {"conversations": rows_of_chats(), "512 tokens": long_rows()}
    peers = ["plain"]
    if importlib.util.find_spec("lm_eval"):
        from lm_eval.models.huggingface import HFLM

        peers += ["lm-eval by 1", "by 16"]
    print(f"{'tokens per CPU second':30} {'ours':>9}" + "".join(f" {name:>13} {'ratio':>7}" for name in peers))
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), shape)
            plain, ours = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval(), open_any(Path(folder))
            ask = {"plain": lambda rows, plain=plain: plainly(plain, rows)}
            for batch, peer in zip((1, 16), peers[1:]):
                lm = HFLM(plain, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=batch, device="cpu")
                ask[peer] = lambda rows, lm=lm: by_lm_eval(lm, rows)
            seen.observe(evaluation.Measured(ours, "model").reader, long_rows()[:1])  # imports
            for kind, rows in chosen.items():
                tokens, seconds, apart = sum(len(row.input_ids) for row in rows), [], 0.0
                for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS):
                    begun = cpu_seconds()
                    loss = float(seen.observe(evaluation.Measured(ours, "model").reader, rows).losses.mean())
                    took = [cpu_seconds() - begun]
                    for peer in peers:
                        begun = cpu_seconds()
                        apart = max(apart, abs(ask[peer](rows) - loss))
                        took.append(cpu_seconds() - begun)
                    seconds.append(took)
                own, *others = (tokens / statistics.median(column) for column in zip(*seconds))
                ratios = [statistics.median(took[i] / took[0] for took in seconds) for i in range(1, len(peers) + 1)]
                told = "".join(f" {speed:13,.0f} {ratio:7.2f}" for speed, ratio in zip(others, ratios))
                print(f"{name + ', ' + kind:30} {own:9,.0f}{told}   losses within {apart:.0e}", flush=True)


if __name__ == "__main__":
    main()
