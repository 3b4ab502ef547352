"""What each stage takes of this machine's memory and disk, from config.json and the settings alone, before anything is loaded.

A figure is the largest of a stage's phases, each a sum of named parts over all processes that are alive in it. Where its terms come from:

    libraries            measured once on a model of a megabyte (docs/benchmarks.md)
    tokenizer            of a vocabulary's pieces and merges, as `tokenizers` holds them
    layer by layer       models/by_layer.py: the larger of a layer in fp32 with a pass and the output layer as stored, the rows' hidden states
    held                 models/held.py: matrices in the dtype they are stored in, everything else in fp32
    trained              a weight, its gradient and Adam's two moments, fp32
    kept activations     what a layer keeps of a token for its backward pass, and the tokens of a pass by training/rules.py
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from src.core.room import Needs
from src.settings.evaluations import Evaluation
from src.settings.quantizers import AnyQuantizer, Calibration, MixedQuantizer
from src.settings.targets import Llama2c, LlamaCpp, Openvino, Target
from src.settings.training import AdapterTuner, Deepspeed, FullTuner, PlanTrain, TrainLoop, Tuner
from src.sizing import budget
from src.sizing.shape import Layer, Matrix, ModelShape

MB = 1e6
PYTHON, SERVER, PROOF, EVALUATE, TRAINER = 30 * MB, 170 * MB, 40 * MB, 400 * MB, 380 * MB
"""bytes of a process after its imports: settings and records alone; core.processes' server with torch and transformers, as far as a process forked from
it does not share them; what that adds; torch, transformers and peft, and what a first pass leaves behind; the same with transformers' Trainer"""
GGUF_RUN = 300 * MB
"""bytes of llama.cpp's process beside the file: its library, the context, logits"""
LAUNCHER, DEEPSPEED, BITSANDBYTES, GPTQMODEL, PICTURE = 180 * MB, 60 * MB, 100 * MB, 255 * MB, 70 * MB
"""what torchrun's process takes, and what these libraries (PICTURE: matplotlib) add to one that uses them"""
SHARED = {"q": "attention", "k": "attention", "v": "attention", "gate": "mlp", "up": "mlp"}
"""matrices of a layer that have the same input"""
PIECE = 800
"""bytes of a tokenizer in memory for each token of its vocabulary"""
TOGETHER, CHUNK, HIDDEN = 1024, 32 << 20, 256 << 20
"""by_layer's: tokens of a pass through a layer, bytes of logits made at a time, bytes of hidden states held at once"""
WAITING, ROUNDED = 512 << 20, 4096
"""bytes that passes hold which wait within a layer, see models/gptq_layers.py; outputs that GPTQ rounds together"""
HELD_OUT = 4096
"""fidelity's: tokens of the conversations that a proof compares"""
LIKELIEST = 64
"""seen's: tokens of a distribution that are kept"""
LOGITS, KEPT = 64 << 20, 1.2
"""training's: bytes of fp32 logits in a chunk of the loss; what a pass holds at most over what it keeps, gradients and freed tensors that wait to be used
again included"""
BUSY = 512
"""training's: tokens of a forward pass that keep a CPU busy"""
JSON = 3.5
"""bytes of a dataset's lines for each token of its conversations, at least in most languages"""
RANK = 64
"""configs/tuner/lora.yaml's"""
TOKENIZING = 400 * MB
"""what a portion of text (training/text_rows.py) takes while it becomes tokens"""
TOKENS = 1.0
"""bytes of the tokens of a byte of text: 2 or 4 for each, of 2.5 bytes with the smallest vocabularies and of 4 or more with large ones"""
NF4 = 0.5 + 1 / 64
"""bytes of a weight in 4 bit, with a scale of 8 bits for each 64 of them"""
WIDTH = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}


def stored_width(shape: ModelShape) -> float:
    """Bytes of a value that is not quantized, as config.json says it is stored."""
    return WIDTH.get(shape.dtype or "", 4.0)


def stored(shape: ModelShape) -> float:
    """Bytes of the weights as they are stored."""
    width = stored_width(shape)
    if not (quantization := shape.quantization):
        return width * shape.params
    packed = budget.quantized(quantization.bits or 4, quantization.group_size)
    return packed * shape.matrix_params + width * (shape.params - shape.matrix_params)


def held(shape: ModelShape) -> float:
    """Bytes of the weights in memory where 16-bit matrices stay as they are stored and GPTQ's become fp16; norms and biases are fp32."""
    vectors = sum(layer.vectors for layer in shape.stack) + shape.outside
    matrices = 2 if shape.quantization else stored_width(shape)
    return matrices * shape.matrix_params + stored_width(shape) * (shape.params - shape.matrix_params) + (4 - stored_width(shape)) * vectors


def tokenizer(shape: ModelShape) -> float:
    return PIECE * shape.vocab


class Conversations(NamedTuple):
    """What is known of a split before its template is: rows, and the mean of their tokens."""

    rows: float
    length: float

    def tokens(self, rows: int | None, longest: int) -> float:
        """Of so many of them at most, each of `longest` tokens at most."""
        return min(self.rows, self.rows if rows is None else rows) * min(self.length, longest)


def conversations(split: Path) -> Conversations:
    """By the bytes of a dataset's file."""
    with open(split, "rb") as lines:
        rows = sum(1 for _ in lines)
    return Conversations(rows, split.stat().st_size / JSON / max(1, rows))


def by_layer(shape: ModelShape, tokens: float = HELD_OUT, adapter: float = 0, *, ends: bool = False) -> dict[str, float]:
    """Parts of a model gone through layer by layer over rows of so many tokens: the larger of a layer in fp32 with a pass, and of the output layer as it is
    stored with its logits. adapter: bytes of one. ends: it has an embedding or output layer of its own; then the base's are in fp32 and stay."""
    layer = 4 * max(layer.params for layer in shape.stack) + 4 * TOGETHER * max(map(_widest, shape.stack))
    table = 0.0 if ends else stored_width(shape) * shape.embedding
    kept = {"adapter": adapter, "embedding and output layer in fp32": 4.0 * (shape.embedding + shape.head) if ends else 0.0}
    last = ("output layer and its logits", table + 3 * min(CHUNK, 4 * shape.vocab * tokens))
    what, most = max(("layer in fp32 and a pass", layer), last, key=lambda part: part[1])
    return {**kept, what: most, "hidden states": 2 * min(HIDDEN, 4 * shape.hidden * tokens)}


def _widest(layer: Layer) -> int:
    """Values of a token that a layer holds at once, without gradients: three of the MLP's width and a few of the model's."""
    down = max(layer.matrices, key=lambda m: m.columns)
    return 3 * down.columns + 4 * down.rows


def proof(shape: ModelShape, adapter: float = 0, *, ends: bool = False) -> dict[str, float]:
    """Parts of a process that loads what was made and says what it says at held-out conversations."""
    return {"libraries of the proof": SERVER + PROOF, "its tokenizer": tokenizer(shape), **by_layer(shape, adapter=adapter, ends=ends)}


def largest(*phases: dict[str, float]) -> dict[str, float]:
    return max(phases, key=lambda parts: sum(parts.values()))


# ---- the stages


def data(read: int, *, packed: int = 0) -> Needs:
    """Records stream from `read` bytes of files into three others; packed: of those, the bytes that are compressed."""
    return Needs({"libraries and a record at a time": 2 * PYTHON}, 1.2 * read + 4 * packed)


def finetune(shape: ModelShape, tuner: Tuner, zero: Deepspeed, train: TrainLoop | PlanTrain, *, processes: int = 1, gpus: int = 0) -> Needs:
    """processes, gpus: of this machine. On GPUs a model is in the machine's memory until it has been moved, and what is offloaded stays there."""
    adapter = None if isinstance(tuner, FullTuner) else tuner
    trained = adapter_values(shape, adapter) if adapter else shape.params
    set_up = Training(
        shape, tuner.kind, adapter.rank if adapter else 0, trained, zero, train, processes, gpus, bool(adapter and tables(adapter))
    )
    lora = replace(set_up, kind="lora", rank=adapter.rank if adapter else RANK, trained=adapter_values(shape, adapter))
    qlora = replace(lora, kind="qlora")
    lengths = (n for n in (4096, 2048, 1024, 512, 256, 128) if n < train.max_length)
    ways = [
        {"train.gradient_checkpointing=true": replace(set_up, checkpointing=True)} if train.gradient_checkpointing is False else {},
        {"train.micro_batch_size=1": replace(set_up, micro_batch=1)} if train.micro_batch_size not in (1, "auto") else {},
        {"launch.nproc_per_node=1": replace(set_up, processes=1)} if processes > 1 and not gpus else {},
        {"tuner=lora": lora} if tuner.kind == "full" else {},
        {"tuner=qlora": qlora} if tuner.kind != "qlora" and not shape.quantization and zero.stage != 3 else {},
        {f"train.max_length={n}": replace(set_up, length=n) for n in lengths},
    ]
    return replace(set_up.needs(), ways=[{way: then.needs() for way, then in tried.items()} for tried in ways])


def with_text(needs: Needs, text_bytes: float, start: float = 0) -> Needs:
    """A training's needs where it begins with so many bytes of text, tokenized before, and with a model of `start` bytes that is written first."""
    asked = {"libraries": TRAINER, "a portion of text and its tokens": TOKENIZING}
    disk = needs.disk + TOKENS * text_bytes + start
    smaller = needs.smaller and with_text(needs.smaller, text_bytes, start)
    ways = [{way: with_text(then, text_bytes, start) for way, then in tried.items()} for tried in needs.ways]
    return replace(needs, parts=largest(dict(needs.parts), asked), disk=disk, smaller=smaller, ways=ways)


def with_teacher(needs: Needs, teacher: ModelShape, tokens: float, processes: int) -> Needs:
    """A training's needs where on a CPU a teacher goes through rows of so many tokens first, in each process, layer by layer."""
    libraries = {"libraries": processes * EVALUATE, "tokenizers": 2 * processes * tokenizer(teacher)}
    asked = libraries | {f"teacher: {name}": processes * count for name, count in by_layer(teacher, tokens / processes).items()}
    smaller = needs.smaller and with_teacher(needs.smaller, teacher, tokens, processes)
    ways = [{way: with_teacher(then, teacher, tokens, processes) for way, then in tried.items()} for tried in needs.ways]
    return replace(needs, parts=largest(dict(needs.parts), asked), smaller=smaller, ways=ways)


@dataclass(frozen=True)
class Training:
    """A training as it is set up. kind, rank: of the tuner, rank 0 of a model that is trained whole; trained: values; processes, gpus: of this machine. tables: an
    adapter has an embedding or output layer of its own.

    length, micro_batch, checkpointing: in place of those that `train` has.
    """

    shape: ModelShape
    kind: str
    rank: int
    trained: int
    zero: Deepspeed
    train: TrainLoop | PlanTrain
    processes: int
    gpus: int
    tables: bool
    length: int | None = None
    micro_batch: int | None = None
    checkpointing: bool | None = None

    def needs(self) -> Needs:
        disk = 3 * 12 * self.trained  # two checkpoints with Adam's moments while one replaces the other, and the result
        proven = proof(self.shape, 4 * self.trained, ends=self.tables) if self.kind != "full" else proof(self.shape)
        after = {**self.own, **proven}
        if self.gpus:
            return Needs(largest(self.loading(), self.offloaded(), after), disk)
        asked = self.train.gradient_checkpointing if self.checkpointing is None else self.checkpointing
        needs = Needs(largest(self.step(self.tokens(), checkpointing=asked is True), after), disk)
        if asked != "auto":
            return needs
        return replace(needs, smaller=Needs(largest(self.step(self.tokens(least=True), checkpointing=True), after), disk))

    @property
    def nf4(self) -> bool:
        return self.kind == "qlora" and not self.shape.quantization

    @property
    def own(self) -> dict[str, float]:
        more = (DEEPSPEED if self.zero.stage else 0) + (BITSANDBYTES if self.nf4 else 0)
        launcher = LAUNCHER if self.zero.stage or self.processes > 1 else 0
        return {"libraries": launcher + self.processes * (TRAINER + more), "tokenizers": self.processes * tokenizer(self.shape)}

    def loading(self) -> dict[str, float]:
        width = 2 if self.zero.stage or self.kind != "full" else 4
        copies = (
            {0: self.processes, 2: self.processes, 3: 1}[self.zero.stage] if self.kind != "qlora" else 0
        )  # 4-bit weights are made on the GPU
        return {**self.own, "weights on their way to the GPUs": copies * width * self.shape.params}

    def offloaded(self) -> dict[str, float]:
        weights = self.weights() if self.zero.stage == 3 else 0
        return {**self.own, "offloaded": weights + 16 * self.trained if self.zero.offload else 0}

    def resident(self) -> dict[str, float]:
        """Parts that are there from the first step to the end of the proof."""
        copies = 1 if self.zero.stage == 3 else self.processes
        shared = 1 if self.zero.stage else self.processes
        moments = 12 if self.kind == "full" else 16  # of a model that is trained whole the weights are counted already
        states = {"trained weights, gradients and moments": shared * moments * self.trained}
        return {**self.own, "weights": copies * self.weights(), **states}

    def step(self, tokens: float, *, checkpointing: bool) -> dict[str, float]:
        """Parts of a forward and backward pass over so many tokens in each process, and of the optimizer's step."""
        fused = not self.nf4 and self.zero.stage != 3 and (isinstance(self.train, PlanTrain) or self.train.kernels == "auto")
        kept = KEPT * kept_bytes(self.shape, self.rank, checkpointing=checkpointing, fused=fused)
        return {
            **self.resident(),
            "kept activations": self.processes * kept * tokens,
            "chunks of the loss": self.processes * 2 * min(LOGITS, 4 * tokens * self.shape.vocab),
        }

    def weights(self) -> float:
        """Bytes of the model's weights in one process."""
        shape = self.shape
        if self.kind == "full":
            return 4 * shape.params
        if self.nf4:
            return NF4 * shape.matrix_params + 4 * (shape.params - shape.matrix_params)
        return held(shape)

    def tokens(self, *, least: bool = False) -> float:
        """Tokens of a pass: as many as keep a CPU busy, or the fewest that a conversation allows."""
        longest = min(self.length or self.train.max_length, self.shape.max_positions or self.train.max_length)
        share = max(1, self.train.global_batch_size // self.processes) * longest
        together = self.micro_batch or self.train.micro_batch_size
        if together == "auto":
            return longest if least else min(share, max(longest, BUSY))
        return min(share, together * longest)


def adapter_values(shape: ModelShape, tuner: AdapterTuner | None) -> int:
    """Values that are trained beside a frozen base: rank x (rows + columns) of every adapted matrix, and layers trained whole.

    tuner: None for the adapters that configs/tuner/lora.yaml has.
    """
    listed, rank = (tuner.target_modules, tuner.rank) if tuner else ("all-linear", RANK)
    names = None if listed == "all-linear" else {name.removesuffix("_proj") for name in listed}
    adapted = (m for layer in shape.stack for m in layer.matrices if names is None or m.name in names)
    return rank * sum(m.rows + m.columns for m in adapted) + (len(tables(tuner)) if tuner else 0) * shape.embedding


def tables(tuner: AdapterTuner) -> set[str]:
    """Which of embedding and output layer are trained whole."""
    return {name.rsplit(".", 1)[-1] for name in tuner.modules_to_save} & {"embed_tokens", "lm_head"}


def kept_bytes(shape: ModelShape, rank: int, *, checkpointing: bool, fused: bool = True) -> float:
    """Bytes a token keeps for the backward pass, in fp32: both norms' inputs, queries, keys and values, with norms of their own what comes into those, what
    attention gives, as it comes and by token, the MLP's two halves; beside adapters of a rank their narrow products, in a model that is trained whole both
    norms' outputs and the halves' product.

    fused: with training/kernels.py. Without it norms, the activation and the product are kept as well, and of each adapter's input what peft's
    dropout lets through with its mask. Of what is recomputed: each layer's input, and one layer.
    """

    def of(layer: Layer) -> float:
        width, q, kv, middle = shape.hidden, shape.heads * shape.head_dim, layer.kv_values // 2, max(m.columns for m in layer.matrices)
        kept = 4 * (2 * width + 2 * q + 2 * kv + 2 * middle) + 4 * rank * len(layer.matrices)
        kept += 4 * (q + kv) * shape.qk_norm
        if not (rank and fused):
            kept += 4 * (2 * width + middle)
        if not fused:
            kept += 4 * middle + (5 * sum(m.columns for m in layer.matrices) if rank else 0)
        return kept

    each = [of(layer) for layer in shape.stack]
    return 4 * shape.hidden * shape.layers + max(each) if checkpointing else sum(each)


def merge(shape: ModelShape, adapter: float | None = None, dtype: str = "auto", *, ends: bool = False) -> Needs:
    """Each in a process of its own: tensor by tensor into the result; the adapter on its base, where training has not kept what it said; the result.

    adapter: its bytes, where the adapter on its base has to be asked. ends: see by_layer.
    """
    matrix = max(m.size for layer in shape.stack for m in layer.matrices)
    work = {"libraries": SERVER + PROOF, "a matrix, its sum and its rounding": 12 * matrix}
    asked = [] if adapter is None else [proof(shape, adapter, ends=ends)]
    parts = largest(*({"this process": PYTHON, **phase} for phase in (work, *asked, proof(shape))))
    return Needs(parts, stored(shape if dtype == "auto" else replace(shape, dtype=dtype)))


def evaluate(models: list[ModelShape], evaluation: Evaluation, split: Conversations, general: float = 0) -> Needs:
    """One model after the other: its loss layer by layer, then its answers from the weights as they are stored. Of a model and its parent, what either says at
    the parent's likeliest tokens is kept: their ids and two log-probabilities. general: bytes of files of another domain."""
    tokens = split.tokens(evaluation.rows, evaluation.max_length)
    tokens += min(general / JSON, float("inf") if evaluation.rows is None else evaluation.rows * evaluation.max_length)
    compared = {"likeliest tokens": 3 * 8 * LIKELIEST * tokens} if len(models) > 1 else {}

    def of(batch: int, *, answers: int) -> Needs:
        return Needs(largest({"libraries": PYTHON}, *(phase for shape in models for phase in phases(shape, batch, answers))), 10 * MB)

    def phases(shape: ModelShape, batch: int, answers: int) -> Iterator[dict[str, float]]:
        own = {"libraries": EVALUATE, "tokenizer": tokenizer(shape), **compared}
        yield {**own, **by_layer(shape, tokens)}
        if answers:
            together, prompt = min(batch, answers), min(split.length, evaluation.max_length)
            cache = together * shape.kv_bytes(round(prompt) + evaluation.max_new_tokens, 4)
            inside = 4 * together * prompt * max(map(_widest, shape.stack))
            looked_up = 0 if shape.tied else stored_width(shape) * shape.embedding  # of which a few rows come off the disk
            yield {**own, "weights as they are held": held(shape) - looked_up, "keys and values": cache, "a pass": inside}

    answers = evaluation.samples if evaluation.prompts is None else len(evaluation.prompts)
    fewer = {f"evaluation.batch_size={n}": of(n, answers=answers) for n in (4, 1) if n < evaluation.batch_size}
    none = {"evaluation.samples=0": of(1, answers=0)} if answers and evaluation.prompts is None else {}
    return replace(of(evaluation.batch_size, answers=answers), ways=[fewer, none])


def preview(shape: ModelShape, evaluation: Evaluation, split: Conversations) -> Needs:
    """A model layer by layer in a board's numbers, which its embedding and output layer are rounded to in fp32; for its answers all of it."""
    own = {"libraries": EVALUATE + PICTURE, "tokenizer": tokenizer(shape), "rounding": 32 << 20}
    wide = replace(shape, dtype="float32")
    walk = {**own, **by_layer(wide, split.tokens(evaluation.rows, evaluation.max_length))}
    if not (answers := evaluation.samples if evaluation.prompts is None else len(evaluation.prompts)):
        return Needs(walk, 10 * MB)
    together, prompt = min(evaluation.batch_size, answers), min(split.length, evaluation.max_length)
    cache = together * shape.kv_bytes(round(prompt) + evaluation.max_new_tokens, 4)
    inside = 4 * together * prompt * max(map(_widest, shape.stack))
    whole = {"weights in fp32, for answers": stored(wide) + 4 * shape.embedding * shape.tied, "keys and values": cache, "a pass": inside}
    fewer = {"evaluation.samples=0": Needs(walk, 10 * MB)} if evaluation.prompts is None else {}
    return Needs(largest(walk, {**own, **whole}), 10 * MB, ways=[fewer])


def quantize(shape: ModelShape, how: AnyQuantizer, calibration: Calibration, split: Conversations, *, exact: bool = False) -> Needs:
    """A layer in fp32, the calibration rows' hidden states, and of the matrices that share an input one group at a time; an output layer of its own as it is
    stored, and what 4 and 8 bits change of it; then the first layer by the kernels that will run it, and the proof.

    A group takes its Hessian, sorted and factored in place, and beside it what one of its matrices becomes, as integers and as weights, with two copies of
    the outputs that are rounded together; passes wait within the layer (models/gptq_layers.py). exact: the sum of adapter and base is written in fp32 first.
    """
    result = 0.6 * shape.matrix_params + stored(shape) * (1 - shape.matrix_params / shape.params)
    sum_bytes = stored(replace(shape, dtype="float32")) if exact else 0
    with_head = isinstance(how, MixedQuantizer) and how.output_layer
    own = {"this process": PYTHON, "libraries": SERVER + PROOF, "tokenizer": tokenizer(shape)}
    layer = max(shape.stack, key=lambda layer: layer.params)
    groups = [list(group) for _, group in groupby(layer.matrices, key=lambda m: SHARED.get(m.name, m.name))]
    group = max(_group(g) for g in groups)

    def of(rows: int, *, exact: bool) -> Needs:
        source = replace(shape, dtype="float32") if exact else shape
        tokens = split.tokens(rows, calibration.max_length)
        hidden = {"hidden states of the calibration rows": 4 * tokens * shape.hidden}
        widest = max(m.columns for m in layer.matrices)
        waiting = {"passes that wait within a layer": min(WAITING, 4 * tokens * (3 * shape.hidden + widest))}
        work = {**own, "layer in fp32": 4 * layer.params, "Hessians and weights of one input": group, **hidden, **waiting}
        start = {**own, "embedding": stored_width(source) * shape.embedding, **hidden}
        head = {**start, "output layer, and what it becomes": (stored_width(source) + 4) * shape.head if with_head else 0}
        checked = {"this process": PYTHON, "libraries": SERVER + PROOF + GPTQMODEL, "embedding in fp32": 4 * shape.embedding}
        checked |= {"first layer, by their kernels and by ours": 8 * layer.params}
        proven = {"this process": PYTHON, **proof(source)}
        summed = [{**own, **exact_sum(shape)}] if exact else []
        return Needs(largest(work, start, head, *summed, checked, proven), exact * sum_bytes + 2 * result)

    fewer = {f"calibration.rows={n}": of(n, exact=exact) for n in (128, 64, 32) if n < calibration.rows}
    as_stored = {"weights=stored": of(calibration.rows, exact=False)} if exact else {}
    return replace(of(calibration.rows, exact=exact), ways=[fewer, as_stored])


def exact_sum(shape: ModelShape) -> dict[str, float]:
    """Part of the fp32 sum of an adapter and its base, tensor by tensor: the embedding, widened as a whole, or a matrix with its product."""
    matrix = max(m.size for layer in shape.stack for m in layer.matrices)
    return {"the largest tensor, stored and in fp32": max((stored_width(shape) + 4) * shape.embedding, 12.0 * matrix)}


def _group(matrices: list[Matrix]) -> int:
    columns = matrices[0].columns
    together = max(*(m.size for m in matrices), min(sum(m.size for m in matrices), ROUNDED * columns))
    return 4 * columns**2 + 7 * together + 8 * columns * min(ROUNDED, together // columns)


def deploy(shape: ModelShape, target: Target, *, exact: bool = False) -> Needs:
    """What the bundle is made with on this machine; what a vendor's compiler may take is said by deploy/preflight.py.

    exact: it begins with the sum of adapter and base in fp32.
    """
    start = replace(shape, dtype="float32") if exact else shape
    own = {"libraries": SERVER + PROOF, "tokenizer": tokenizer(shape)}
    if isinstance(target, LlamaCpp):
        disk = float(budget.host_needs(start, target)[1])
        model = budget.format_of(shape, target)
        mapped = budget.layer_bytes(shape, model) + budget.embedding_bytes(shape, model) + budget.head_bytes(shape, model)
        run_by_llama_cpp = {"llama.cpp": float(GGUF_RUN + mapped)}
        parts = largest({"libraries": EVALUATE, "tokenizers": 4 * tokenizer(shape), **by_layer(start)}, {**own, **run_by_llama_cpp})
    elif isinstance(target, Llama2c):
        form = budget.format_of(shape, target)
        written = budget.layer_bytes(shape, form) + budget.embedding_bytes(shape, form) + budget.head_bytes(shape, form)
        # In this process: model.bin is read as fp32, by the tokenizer's two readers.
        read = {"libraries": EVALUATE, "tokenizers": 2 * tokenizer(shape), **by_layer(replace(shape, dtype="float32"))}
        parts, disk = read, float(written)
    elif isinstance(target, Openvino):
        memory, disk, _ = budget.host_needs(start, target)
        parts = {**own, "the exporter": memory}
    else:
        disk = 4 * shape.embedding
        parts = {**own, "a block of the embedding table": 64 * MB}
    if exact:
        parts = largest(dict(parts), {**own, **exact_sum(shape)})
    ways = [{"weights=stored": deploy(shape, target)}] if exact else []
    return Needs(parts, disk + (stored(start) if exact else 0), ways=ways)


def answers(shapes: list[ModelShape], batch: int) -> Needs:
    """Models that answer on this machine, all loaded at once: teachers and judges, and whatever is talked to."""
    own = {"libraries": EVALUATE if shapes else 2 * PYTHON, "tokenizers": sum(map(tokenizer, shapes))}
    cache = sum(batch * shape.kv_bytes(HELD_OUT, 4) for shape in shapes)
    return Needs({**own, "weights as stored": sum(map(held, shapes)), "keys and values": cache}, 50 * MB)
