"""Training on GPUs: memory of one and seconds per optimizer step, in closed form, for full, LoRA and Q-LoRA training by ZeRO stage.

What is kept follows ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), LoRA (arXiv:2106.09685), Q-LoRA (arXiv:2305.14314) and activation
checkpointing (Chen et al. 2016, arXiv:1604.06174). Attention is taken to keep no matrix of scores (FlashAttention, arXiv:2205.14135; PyTorch's
own does the same). The constants below were fitted once to the Qwen-1 README's table on A100-80G; docs/planner.md has every row with its error.
"""

from dataclasses import dataclass

from src.core.log import size
from src.settings.verbs import Gpu
from src.sizing.budget import Quantity
from src.sizing.shape import Layer, ModelShape

# What the allocator holds beside what is alive, and what CUDA, cuBLAS and NCCL take before any tensor.
SLACK = 1.05
CONTEXT = 1.7e9
# Share of the datasheet's peak that matrix products reach, and times that a kept activation moves through memory in forward, recomputation and
# backward together.
EFFICIENCY = 0.60
MOVES = 12
# Seconds to launch one layer's kernels in one pass, twice that where ZeRO follows each weight with hooks of its own.
LAUNCH = 1.8e-3
# Weights per second that a 4-bit kernel restores, per byte per second of memory bandwidth.
DEQUANTIZE = 80e9 / 2.039e12
# Share of the link's rate that collectives reach.
LINK = 0.83
SUBGROUP = 1e9  # weights that ZeRO-3 steps, and holds gathered, at once (DeepSpeed's sub_group_size and stage3_max_live_parameters)


@dataclass(frozen=True)
class Widths:
    """Bytes per trained value (weight, gradient, optimizer states, temporaries of the step) and per logit while its loss is differentiated."""

    weight: float
    gradient: float
    states: float
    step: float
    logit: float


# 16-bit weights and gradients; fp32 master weights and Adam's two moments; fp32 gradients while stepping.
ZERO = Widths(2, 2, 12, 4, 14)
# fp32 weights with autocast: 16-bit copies of them, torch's multi-tensor Adam with a temporary of their size.
AUTOCAST = Widths(6, 4, 8, 4, 14)
# Adapters in fp32 on a frozen 16-bit base.
ADAPTERS = Widths(4, 4, 8, 4, 14)
# Where the loss is not computed in chunks: per logit 16-bit 2, fp32 4, a copy of it that becomes the gradient 4, its gradient 4.


@dataclass(frozen=True)
class Job:
    """One training set-up. base: width in bytes of frozen weights' type before quantization; bits: 4 where the base is quantized, else None.

    quantized: bytes per weight of the quantized matrices. upcast: embedding and output layer stand in fp32, as peft prepares NF4 models.
    logits: bytes the loss may take at the output layer where it is computed in chunks; None: the logits of a whole pass, each `widths.logit` bytes.
    rank, targets: LoRA's, targets None for every linear layer; rank 0: full training. dropout: adapters' inputs are dropped out.
    token_tables: the embedding and output layer are trained whole beside the adapters.
    """

    method: str
    rank: int
    targets: frozenset[str] | None
    dropout: bool
    base: float
    quantized: float | None
    upcast: bool
    token_tables: bool
    stage: int
    offload: bool
    bucket: int
    gpus: int
    micro_batch: int
    accumulation: int
    length: int
    checkpointing: bool
    widths: Widths
    logits: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass on one GPU, padding included."""
        return self.micro_batch * self.length

    def adapted(self, layer: Layer) -> list:
        return [m for m in layer.matrices if self.rank and (self.targets is None or m.name in self.targets)]


@dataclass(frozen=True)
class Training:
    """parts: memory of one GPU, part by part; peak and total of it; host: memory of the machine for all its GPUs; seconds of an optimizer step."""

    parts: list[Quantity]
    peak: Quantity
    total: Quantity
    host: Quantity
    trained: int
    seconds: Quantity
    tokens_per_second: float


def trained_values(shape: ModelShape, job: Job) -> int:
    """Values that get gradients: all, or the adapters' (rank x (rows + columns) for each matrix) and token tables trained with them."""
    if not job.rank:
        return shape.params
    adapters = sum(job.rank * (m.rows + m.columns) for layer in shape.stack for m in job.adapted(layer))
    return adapters + (2 * shape.embedding if job.token_tables else 0)


def layer_activations(layer: Layer, shape: ModelShape, job: Job) -> int:
    """Bytes a layer keeps per token for its backward pass, in 16 bit: norms' inputs in fp32 too, q, k and v before and after rotation, attention's
    output, four values per unit of the MLP, and for adapters with dropout each input again with its mask."""
    width, q = shape.hidden, shape.heads * shape.head_dim
    kv = layer.kv_values // 2
    down = next(m.columns for m in layer.matrices if m.name == "down")
    dropped = 3 * sum(m.columns for m in job.adapted(layer)) if job.dropout else 0
    return 16 * width + 6 * q + 6 * kv + 8 * down + dropped


def training(shape: ModelShape, job: Job, gpu: Gpu) -> Training:
    """Memory and time of one GPU; see Training."""
    parts = memory_parts(shape, job)
    of = {part.name: part.value for part in parts}
    held = of["weights"] + of["gradients"] + of["optimizer states"] + of["buffers"]
    loss = of["kept activations"] + max(of["logits"], of["widest layer"])
    peak = held + max(loss, of["step"])
    backward = loss >= of["step"]
    words = "kept activations + the larger of logits and widest layer" if backward else "step"
    total = SLACK * peak + CONTEXT
    trained = trained_values(shape, job)
    seconds, why = step_seconds(shape, job, gpu)
    return Training(
        parts=parts,
        peak=Quantity("peak", peak, "B", f"weights + gradients + optimizer states + buffers + {words}"),
        total=Quantity("needed per GPU", total, "B", f"{SLACK:g} x peak + {size(CONTEXT)} of CUDA"),
        host=host_memory(shape, job, trained),
        trained=trained,
        seconds=Quantity("step", seconds, "s", why),
        tokens_per_second=job.tokens * job.accumulation * job.gpus / seconds,
    )


def memory_parts(shape: ModelShape, job: Job) -> list[Quantity]:
    """What one GPU holds in the course of a step."""
    w, trained, tokens = job.widths, trained_values(shape, job), job.tokens
    share = job.gpus if job.stage else 1
    frozen, how = frozen_bytes(shape, job)
    weights, words = frozen + w.weight * trained, f"{how}trained {trained:,} x {w.weight:g} B"
    by3, ways = (share, f" / {job.gpus} GPUs") if job.stage == 3 else (1, "")
    device = 0 if job.offload else 1
    by2 = f" / {share} GPUs" if share > 1 else ""
    away = " (in the host's memory)" if job.offload else ""
    twice = 2 if job.gpus > 1 and not job.stage else 1
    dense = max(layer.params for layer in shape.stack)
    kept, widest = (tokens * part for part in kept_per_token(shape, job, checkpointing=job.checkpointing))
    each = max(layer_activations(layer, shape, job) for layer in shape.stack)
    per_layer = f"{each:,} B (16 x width + 6 x q + 6 x kv + 8 x MLP{' + 3 x adapted inputs' if job.rank and job.dropout else ''})"
    local = trained / share
    stepped = min(local, SUBGROUP) if job.stage == 3 else local
    buffers, buffered = buffer_bytes(shape, job, trained, dense)
    params_away = job.offload and job.stage == 3
    return [
        Quantity(
            "weights",
            0 if params_away else weights / by3,
            "B",
            "in the host's memory" if params_away else f"({words}){ways}" if ways else words,
        ),
        Quantity(
            "gradients",
            w.gradient * twice * (local if job.stage >= 2 else trained),
            "B",
            f"trained {trained:,} x {w.gradient:g} B{' x 2 (data-parallel buckets)' if twice == 2 else ''}{by2}",
        ),
        Quantity("optimizer states", device * w.states * local, "B", f"trained {trained:,} x {w.states:g} B{by2}{away}"),
        Quantity("buffers", buffers, "B", buffered),
        Quantity(
            "kept activations",
            kept,
            "B",
            f"{tokens:,} tokens x {shape.layers} layers x " + (f"2 x {shape.hidden:,} B (checkpoints)" if job.checkpointing else per_layer),
        ),
        Quantity("widest layer", widest, "B", f"{tokens:,} tokens x {per_layer}" if job.checkpointing else "kept already"),
        logits_of(shape, job),
        Quantity(
            "step",
            device * w.step * stepped,
            "B",
            f"temporaries of the optimizer, {w.step:g} B x {stepped:,.0f}{away}",
        ),
    ]


def logits_of(shape: ModelShape, job: Job) -> Quantity:
    """What the loss holds at the output layer."""
    whole, each = job.tokens * shape.vocab * job.widths.logit, f"{job.tokens:,} tokens x {shape.vocab:,} x {job.widths.logit:g} B"
    if job.logits is None or job.logits >= whole:
        return Quantity("logits", whole, "B", each)
    return Quantity("logits", job.logits, "B", "the loss a chunk at a time")


def kept_per_token(shape: ModelShape, job: Job, *, checkpointing: bool) -> tuple[float, float]:
    """Bytes a token keeps for the backward pass, all layers together, and those that one layer holds while it is recomputed."""
    each = [layer_activations(layer, shape, job) for layer in shape.stack]
    return (2.0 * shape.hidden * shape.layers, max(each)) if checkpointing else (sum(each), 0)


def frozen_bytes(shape: ModelShape, job: Job) -> tuple[float, str]:
    """Bytes of weights that are not trained, and their sum in words."""
    if not job.rank:
        return 0, ""
    if job.quantized is None:
        return job.base * shape.params, f"frozen {shape.params:,} x {job.base:g} B + "
    rest, wide = shape.params - shape.matrix_params, 4 if job.upcast else job.base
    return (
        job.quantized * shape.matrix_params + wide * rest,
        f"frozen {shape.matrix_params:,} x {job.quantized:.4g} B + unquantized {rest:,} x {wide:g} B + ",
    )


def buffer_bytes(shape: ModelShape, job: Job, trained: int, dense: int) -> tuple[float, str]:
    """Buckets of ZeRO-2, gathered weights of ZeRO-3, and one matrix restored from 4 bit."""
    total, words = 0.0, []
    if job.stage == 2:
        bucket = min(job.bucket, trained)
        total, words = 6.0 * bucket, [f"3 buckets x 2 B x {bucket:,}"]
    if job.stage == 3:
        one = max(dense, shape.embedding)
        total = 2.0 * (min(SUBGROUP, shape.params) + one)
        words = [f"gathered 2 B x ({min(SUBGROUP, shape.params):,.0f} + largest piece {one:,})"]
    if job.quantized is not None:
        largest = max(m.size for layer in shape.stack for m in layer.matrices)
        total += job.base * largest
        words.append(f"one matrix restored {largest:,} x {job.base:g} B")
    return total, " + ".join(words) or "none"


def host_memory(shape: ModelShape, job: Job, trained: int) -> Quantity:
    """What offloading puts into the host's memory: the optimizer's share, and with ZeRO-3 the weights."""
    if not job.offload:
        return Quantity("host", 0, "B", "nothing offloaded")
    frozen, how = frozen_bytes(shape, job)
    states = (job.widths.states + job.widths.step) * trained
    if job.stage < 3:
        return Quantity("host", states, "B", f"trained {trained:,} x {job.widths.states + job.widths.step:g} B")
    weights = frozen + job.widths.weight * trained
    words = f"{how}trained {trained:,} x {job.widths.weight + job.widths.states + job.widths.step:g} B"
    return Quantity("host", states + weights, "B", words)


def step_seconds(shape: ModelShape, job: Job, gpu: Gpu) -> tuple[float, str]:
    """Seconds of one optimizer step of `accumulation` forward and backward passes, and the sum in words.

    Products of matrices: 2 operations per weight and token forward, the same again to recompute, 2 for the inputs' gradients and, where weights
    are trained, 2 for theirs. The output layer is not recomputed. Attention counts the causal half of its pairs.
    """
    tokens, passes = job.tokens * job.accumulation, 3 if job.checkpointing else 2
    per_weight = 2 * passes + (0 if job.rank else 2)
    per_head = 4 if job.rank and not job.token_tables else 6
    pairs = 2 * job.length * shape.heads * shape.head_dim * shape.attending
    operations = tokens * (per_weight * shape.matrix_params + per_head * shape.embedding + (passes + 1) * pairs)
    compute = operations / (EFFICIENCY * gpu.tflops * 1e12)
    moved = tokens * sum(layer_activations(layer, shape, job) for layer in shape.stack)
    moving = MOVES * passes / 3 * moved / (gpu.bandwidth * 1e9)
    hooks = 2 if job.stage and not job.rank else 1
    launch = job.accumulation * passes * shape.layers * LAUNCH * hooks
    restored = job.accumulation * passes * shape.matrix_params / (DEQUANTIZE * gpu.bandwidth * 1e9) if job.quantized is not None else 0.0
    sent = sent_bytes(shape, job, passes)
    sending = sent / (LINK * gpu.link * 1e9)
    words = [
        f"{operations / 1e12:,.0f} TFLOP / ({EFFICIENCY:g} x {gpu.tflops:g} TFLOP/s) + {size(moved)} x {MOVES * passes // 3} / {gpu.bandwidth:,g} GB/s"
    ]
    if launch > compute + moving:
        words = [f"launching {job.accumulation} x {passes} x {shape.layers} layers x {1000 * LAUNCH * hooks:g} ms"]
    if restored:
        words.append(
            f"restoring 4 bit {job.accumulation} x {passes} x {shape.matrix_params / 1e9:.3g} G weights / {DEQUANTIZE * gpu.bandwidth:.3g} G/s"
        )
    if sent:
        words.append(f"sending {size(sent)} / ({LINK:g} x {gpu.link:g} GB/s)")
    return max(compute + moving, launch) + restored + sending, " + ".join(words)


def sent_bytes(shape: ModelShape, job: Job, passes: int) -> float:
    """Bytes each GPU sends in a step: ZeRO-3 gathers the weights in every pass; gradients are reduced, once where they accumulate, else each pass."""
    if job.gpus == 1:
        return 0.0
    others, trained = (job.gpus - 1) / job.gpus, trained_values(shape, job)
    if job.stage == 3:
        return job.accumulation * others * 2 * (passes * shape.params + trained)
    return (job.accumulation if job.stage else 1) * 2 * others * job.widths.gradient * trained
