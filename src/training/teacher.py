"""What a teacher model holds likely at each trained token: computed once, by all processes together, and kept by content beside the token rows."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from src.chat import encoding
from src.core import cache as caches
from src.core.artifact import Artifact, key_of
from src.core.errors import WrongKind
from src.core.files import sha256
from src.core.log import progress, rank, say
from src.models import evaluation
from src.models.loading import tokenizer_of
from src.settings.verbs import FinetuneVerb
from src.training import launch
from src.training.checkpoints import barrier, from_first
from src.training.examples import Examples

TOGETHER = 1024
"""rows that are asked for at a time: on a CPU the teacher is read from its files for each such part"""


@dataclass(frozen=True, eq=False)
class TeacherProbs:
    """A teacher's k likeliest tokens at each trained token of some rows, in their order.

    likely: int32 (trained tokens, k). shares: their probabilities, fp32, same shape. bounds: int64 (rows + 1,), where each row's begin.
    """

    top_k_ids: np.ndarray
    probs: np.ndarray
    bounds: np.ndarray

    def of(self, examples: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(likely, shares) of rows one after another, int64 and fp32."""
        spans = [slice(self.bounds[example], self.bounds[example + 1]) for example in examples]
        top_k_ids, probs = (np.concatenate([part[span] for span in spans]) for part in (self.top_k_ids, self.probs))
        return torch.from_numpy(top_k_ids).long(), torch.from_numpy(probs)


def teacher_probs(cfg: FinetuneVerb, teacher: Artifact, examples: Examples, tokenizer, cache: Path) -> TeacherProbs:
    """The teacher's likeliest tokens for the training rows. Raises WrongKind where its tokenizer is another."""
    check_tokenizer(teacher, tokenizer)
    k = cfg.teacher.top_k
    settings = {"rows": examples.key, "teacher": teacher.key, "top_k": k, "code": sha256(Path(__file__))}
    folder = cache / key_of("teacher-probs", 1, settings, {})
    bounds = np.concatenate([[0], examples.trained_tokens.cumsum()])
    shape = (int(bounds[-1]), k)
    if not from_first(rank() == 0 and caches.reads(folder, partial(opened, shape=shape))):
        place = from_first(caches.place(folder) if rank() == 0 else None)
        make(cfg, teacher, examples, bounds, len(tokenizer), place)
        folder = from_first(caches.published(place, folder, partial(opened, shape=shape)) if rank() == 0 else None)
    top_k_ids, probs = opened(folder, shape)
    say(f"teacher: {teacher.path}, weight {cfg.teacher.weight:g}, its {k} likeliest tokens hold {probs.sum(1).mean():.1%} on average")
    return TeacherProbs(top_k_ids, probs, bounds)


def opened(folder: Path, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(top_k_ids, probs), memory-mapped. Raises OSError or ValueError where a file is missing, damaged or of another shape."""
    arrays = tuple(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("top_k_ids", "probs"))
    if any(array.shape != shape for array in arrays):
        raise ValueError(f"{folder}: not of the shape {shape}")
    return arrays


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
            fix="give a teacher with the student's tokenizer",
        )


def make(cfg: FinetuneVerb, teacher: Artifact, examples: Examples, bounds: np.ndarray, vocabulary: int, folder: Path) -> None:
    """Every process takes its share of the rows through the teacher and writes into the same arrays in `folder`."""
    shape = (int(bounds[-1]), cfg.teacher.top_k)
    if rank() == 0:
        for name, dtype in (("top_k_ids", np.int32), ("probs", np.float32)):
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape).flush()
    barrier()
    top_k_ids, probs = (np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("top_k_ids", "probs"))
    mine = np.argsort(-examples.lengths, kind="stable").tolist()[rank() :: launch.world_size(cfg.launch)]
    read = evaluation.Measured(teacher, "teacher").reader
    for some in progress([mine[at : at + TOGETHER] for at in range(0, len(mine), TOGETHER)], "teacher"):
        rows = [encoding.Encoded(each.input_ids.tolist(), each.labels.tolist()) for each in map(examples.__getitem__, some)]
        at = np.concatenate([np.arange(bounds[example], bounds[example + 1]) for example in some])
        for places, logits in read(rows):
            found = logits[:, :vocabulary].float().softmax(-1).topk(min(cfg.teacher.top_k, vocabulary), dim=-1)
            top_k_ids[at[places]], probs[at[places]] = found.indices.cpu().numpy(), found.values.cpu().numpy()
    for array in (top_k_ids, probs):
        array.flush()
    barrier()
