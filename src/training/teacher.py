"""What a teacher model holds likely at each trained token: computed once, by all processes together, and kept by content beside the token rows."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from src.chat import encoding
from src.core.artifact import Artifact, key_of
from src.core.errors import WrongKind
from src.core.files import sha256
from src.core.log import progress, rank, say
from src.models.loading import load_any, tokenizer_of
from src.settings.verbs import FinetuneVerb
from src.training import launch
from src.training.batches import micro_batch
from src.training.checkpoints import barrier
from src.training.layout import inputs_of
from src.training.tokens import TokenRows


@dataclass(frozen=True, eq=False)
class SoftTargets:
    """A teacher's k likeliest tokens at each trained token of some rows, in their order.

    likely: int32 (trained tokens, k). shares: their probabilities, fp32, same shape. bounds: int64 (rows + 1,), where each row's begin.
    """

    likely: np.ndarray
    shares: np.ndarray
    bounds: np.ndarray

    def of(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(likely, shares) of rows one after another, int64 and fp32."""
        spans = [slice(self.bounds[row], self.bounds[row + 1]) for row in rows]
        likely, shares = (np.concatenate([part[span] for span in spans]) for part in (self.likely, self.shares))
        return torch.from_numpy(likely).long(), torch.from_numpy(shares)


def soft_targets(cfg: FinetuneVerb, teacher: Artifact, rows: TokenRows, tokenizer, cache: Path) -> SoftTargets:
    """The teacher's likeliest tokens for the training rows. Raises WrongKind where its tokenizer is another."""
    check_tokenizer(teacher, tokenizer)
    k = cfg.teacher.top_k
    settings = {"rows": rows.key, "teacher": teacher.key, "top_k": k, "code": sha256(Path(__file__))}
    folder = cache / key_of("soft-targets", 1, settings, {})
    bounds = np.concatenate([[0], rows.trained_tokens.cumsum()])
    if not folder.is_dir():
        barrier()
        make(cfg, teacher, rows, bounds, len(tokenizer), folder)
    barrier()
    likely, shares = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("likely", "shares"))
    say(f"teacher: {teacher.path}, weight {cfg.teacher.weight:g}, its {k} likeliest tokens hold {shares.sum(1).mean():.1%} on average")
    return SoftTargets(likely, shares, bounds)


def check_tokenizer(teacher: Artifact, tokenizer) -> None:
    """Raises WrongKind where a token id means another token to the teacher."""
    theirs = tokenizer_of(teacher)
    encoding.ensure_chat(theirs)
    ours, other = tokenizer.get_vocab(), theirs.get_vocab()
    different = sorted((i, token) for token, i in ours.items() if other.get(token) != i)
    if different or len(ours) != len(other):
        at = (
            f"token {different[0][0]} is '{different[0][1]}' here and another there"
            if different
            else f"{len(ours)} and {len(other)} tokens"
        )
        raise WrongKind(
            f"the teacher's tokenizer differs from the student's ({at}), so its probabilities are of other tokens",
            where=str(teacher.path),
            fix=["a teacher of the same family", "python -m src.distill: the teacher writes rows, whatever its tokenizer"],
        )


def make(cfg: FinetuneVerb, teacher: Artifact, rows: TokenRows, bounds: np.ndarray, vocabulary: int, folder: Path) -> None:
    """Every process takes its share of the rows through the teacher and writes into the same arrays; `folder` appears when all are done."""
    partial, shape = folder.with_name(f"{folder.name}.partial"), (int(bounds[-1]), cfg.teacher.top_k)
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, dtype in (("likely", np.int32), ("shares", np.float32)):
            np.lib.format.open_memmap(partial / f"{name}.npy", "w+", dtype, shape).flush()
    barrier()
    likely, shares = (np.load(partial / f"{name}.npy", mmap_mode="r+") for name in ("likely", "shares"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _ = load_any(teacher, dtype="auto" if device == "cuda" else "float32", device=device)
    world = launch.world_size(cfg.launch)
    mine = np.argsort(-rows.lengths, kind="stable").tolist()[rank() :: world]
    for row in progress(mine, "teacher", total=len(mine)):
        batch = micro_batch(rows, [row], 0, packed=False)
        with torch.no_grad():
            logits = model(**inputs_of(batch, device), use_cache=False).logits[batch["keep"].to(device)]
            found = logits[:, :vocabulary].float().softmax(-1).topk(min(cfg.teacher.top_k, vocabulary), dim=-1)
        span = slice(bounds[row], bounds[row + 1])
        likely[span], shares[span] = found.indices.cpu().numpy(), found.values.cpu().numpy()
    for array in (likely, shares):
        array.flush()
    barrier()
    if rank() == 0:
        partial.rename(folder)
