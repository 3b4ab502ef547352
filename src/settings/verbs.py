"""Every setting's type, rule and meaning. Defaults live in configs/, so no field here has one.

A string under a field is its documentation and its line in `--help`. A field marked `Unkeyed` changes where or how a stage runs, not what
it makes, so it takes no part in an artifact's key.
"""

from datetime import date
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_serializer,
    field_validator,
    model_validator,
)

from src.settings.answers import Decoding
from src.settings.base import Fraction, Settings, Unkeyed, check_address
from src.settings.quantizers import AnyQuantizer, Calibration
from src.settings.recipes import Recipe
from src.settings.targets import AnyTarget
from src.settings.teachers import AnyJudge, AnyTeacher

Rounding = Literal["stochastic", "nearest"]
Weights = Literal["exact", "stored"]
BYTE_LEVEL = 256 + 3
"""tokens of a tokenizer that pretrain learns at least: all bytes, and those that begin a text, end it and pad"""


class Verb(Settings):
    run: Annotated[str, Field(exclude=True, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """name of the run; its artifacts live in <outputs>/<run>/"""
    outputs: Annotated[str, Field(exclude=True, min_length=1)]
    """folder that holds all runs"""
    force: Annotated[bool, Unkeyed]
    """make the artifact again even if one is there"""
    dry_run: Annotated[bool, Unkeyed]
    """check everything, print the plan, make nothing"""
    room: Annotated[Literal["check", "ignore"], Unkeyed]
    """check: refuse what takes more memory or disk than there is, by an estimate; ignore: say it and go on"""


class Wandb(Settings):
    kind: Literal["wandb"]
    project: str
    """wandb project"""
    mode: Literal["auto", "online", "offline"]
    """auto: online where WANDB_API_KEY is set, else offline"""


class Tensorboard(Settings):
    kind: Literal["tensorboard"]


class Trackio(Settings):
    kind: Literal["trackio"]
    project: str
    """trackio project"""
    system: bool
    """log the load of CPU and GPU too"""


class Mlflow(Settings):
    kind: Literal["mlflow"]
    project: str
    """mlflow experiment"""


Tracker = Annotated[Wandb | Tensorboard | Trackio | Mlflow, Field(discriminator="kind")]


class TrackedVerb(Verb):
    tracker: Annotated[dict[str, Tracker], Unkeyed]
    """where its figures go beside <run>/metrics.jsonl: wandb, tensorboard, trackio, mlflow, several as [wandb,tensorboard], or none"""


class SourcedVerb(Verb):
    source: Annotated[str | None, Unkeyed]
    """artifact or Hugging Face folder to work on; null: the run's own"""


class StageVerb(TrackedVerb, SourcedVerb):
    """One that makes an artifact from another."""


class Holdout(Settings):
    val: Fraction
    """share of records held out for evaluation"""
    calib: Fraction
    """share of records held out to calibrate quantization"""
    split_seed: int
    """seed of the hash that gives each record its split"""

    @model_validator(mode="after")
    def _leaves_train(self) -> Self:
        if self.val + self.calib >= 1:
            raise ValueError("val + calib must stay below 1, or nothing is left to train on")
        return self


Role = Literal["user", "assistant", "system", "tool", "tool_call"]
COLUMNS = (
    *("messages", "role", "content", "prompt", "response", "system", "tools", "input", "history", "reasoning", "weight", "id"),
    *("text", "chosen", "rejected", "label"),
)
"""what a column can be to us"""


class Data(Settings):
    path: Annotated[str | list[str], Field(exclude=True, min_length=1)]
    """conversations: a file, folder, glob or hub id; several as [a,b]. JSON, JSON Lines, CSV, TSV, Parquet, Arrow, text; gz, bz2, xz, zst, zip"""
    format: Literal["auto", "qwen", "sharegpt", "openai", "alpaca", "prompt_completion", "question_answer", "preference", "text"]
    """layout of the records; auto detects it and says which"""
    columns: dict[str, str | None]
    """what columns are called, as "data.columns={prompt:question,response:reply}"; null: a column that is not what its name says"""
    roles: dict[str, Role]
    """what roles are called beside the usual names, as "data.roles={agent:assistant,customer:user}" """
    weights: list[PositiveFloat] | None
    """for each path how often its records come into train: 2 twice, 0.5 a half of them, drawn by their hash; null: once"""
    subset: Annotated[str | None, Unkeyed]
    """subset (config) of a data set on the hub, or of a folder laid out like one; null: its default"""
    hub_split: Annotated[str, Unkeyed]
    """split of a data set on the hub, or of a folder whose files are named by split"""
    revision: Annotated[str | None, Unkeyed]
    """commit, tag or branch on the hub; null: its default"""
    on_fault: Literal["error", "drop"]
    """malformed records: fail and list them by fault, or drop and count them, each named in dropped.jsonl"""
    val: Fraction | Annotated[str, Field(strict=True, pattern="[^0-9.eE+-]")]
    """share of records held out for evaluation; or a file, folder or glob of conversations held out"""
    calib: Fraction
    """share of records held out to calibrate quantization"""
    split: Literal["hash", "exact"]
    """hash: a record's split follows from its content alone; exact: the shares to the record, so adding records may move others"""
    split_seed: int
    """seed of the hash that gives each record its split"""

    @property
    def paths(self) -> list[str]:
        """What is read, in order."""
        return [self.path] if isinstance(self.path, str) else self.path

    @field_serializer("val")
    def _keyed(self, val: float | str) -> float | str:
        # A file of its own is a parent, known by its content and not by its name.
        return "file" if isinstance(val, str) else val

    @field_validator("columns")
    @classmethod
    def _known(cls, columns: dict[str, str | None]) -> dict[str, str | None]:
        for ours, theirs in columns.items():
            if ours not in COLUMNS:
                turned = f"; it is {{OURS:YOURS}}: {{{theirs}:{ours}}}" if theirs in COLUMNS else f"; there is {', '.join(COLUMNS)}"
                raise ValueError(f"no column is called '{ours}' here{turned}")
        if double := next((name for name in columns.values() if name and list(columns.values()).count(name) > 1), None):
            raise ValueError(f"'{double}' can be one column only")
        return columns

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if (0 if isinstance(self.val, str) else self.val) + self.calib >= 1:
            raise ValueError("val + calib must stay below 1, or nothing is left to train on")
        if self.weights is not None and len(self.weights) != len(self.paths):
            raise ValueError(
                f"data.weights has {len(self.weights)} numbers for {len(self.paths)} paths; it has one for each, in their order"
            )
        return self


class DataVerb(TrackedVerb):
    data: Data
    """what to read and how to split it"""
    preview: Annotated[str | None, Unkeyed]
    """model folder or hub id: show the rows as that model would see them, with lengths, writing and duplicates, and make nothing; null: make the dataset"""


class Model(Settings):
    path: Annotated[str, Unkeyed]
    """Hugging Face folder, or the id of a model on the hub"""
    revision: Annotated[str | None, Unkeyed]
    """commit, tag or branch on the hub; null: its default"""
    trust_remote_code: bool
    """run Python code that comes with the model"""
    allow_pickle: bool
    """load pytorch_model.bin where there are no safetensors; a pickle can run any code"""


class Optimizer(Settings):
    learning_rate: PositiveFloat
    """peak learning rate"""
    row_learning_rate: Literal["auto"] | PositiveFloat
    """peak rate of token rows the base never learnt; auto: 1 % of a typical entry of their matrix, at least learning_rate"""


class FullTuner(Optimizer):
    kind: Literal["full"]
    """every weight is trained"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    """dtype of the saved weights; auto: the base's; float32 keeps every bit for quantize and deploy, in twice the space"""
    rounding: Rounding
    """how trained fp32 weights become 16 bits; stochastic keeps small updates, nearest loses most of them"""


class AdapterTuner(Optimizer):
    """What is trained beside a frozen base, whatever holds the base."""

    rank: PositiveInt
    """rank of the update matrices"""
    alpha: PositiveFloat
    """the update is scaled by alpha / rank"""
    rslora: bool
    """scale by alpha / sqrt(rank) instead, so that large ranks learn as fast as small ones (Kalajdzievski 2023, arXiv:2312.03732)"""
    dora: bool
    """train the length of each output's weights apart from their direction (Liu et al. 2024, arXiv:2402.09353)"""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"]
    """where the matrices start; pissa: the base's largest singular directions (arXiv:2404.02948), olora: its QR (arXiv:2406.01775)"""
    lora_plus: PositiveFloat
    """learning rate of the B matrices over that of the A matrices, 16 in the paper (Hayou et al. 2024, arXiv:2402.12354); 1: the same"""
    dropout: Fraction
    """dropout on the adapter's input"""
    target_modules: Literal["all-linear"] | list[str]
    """names of the linear layers that get adapters; all-linear: every one but the output layer"""
    modules_to_save: list[str]
    """names of layers trained whole beside the adapters, such as embed_tokens and lm_head"""

    @property
    def takes_from_base(self) -> bool:
        """Whether the adapter's first product is taken out of the base weights."""
        return self.init in ("pissa", "olora")

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.takes_from_base and self.dora:
            raise ValueError(
                f"tuner.init={self.init} takes its part out of the base weights, whose lengths tuner.dora=true would train; choose one of them"
            )
        if self.takes_from_base and self.dropout:
            raise ValueError(
                f"tuner.dropout={self.dropout} would drop parts of the base's own weights, which tuner.init={self.init} moves; tuner.dropout=0"
            )
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"tuner.init=orthogonal splits tuner.rank in halves, so it must be even, not {self.rank}")
        if both := set(self.modules_to_save) & (set() if self.target_modules == "all-linear" else set(self.target_modules)):
            raise ValueError(f"target_modules and modules_to_save both name {', '.join(sorted(both))}; a layer is adapted or trained whole")
        return self


class LoraTuner(AdapterTuner):
    kind: Literal["lora"]
    """low-rank adapters on a frozen base (Hu et al. 2021, arXiv:2106.09685)"""


class QloraTuner(AdapterTuner):
    kind: Literal["qlora"]
    """low-rank adapters on a 4-bit base (Dettmers et al. 2023, arXiv:2305.14314)"""
    double_quant: bool
    """quantize the NF4 scales too; unused when the base is a GPTQ folder"""

    @model_validator(mode="after")
    def _base_stays_as_quantized(self) -> Self:
        if self.init not in ("default", "gaussian"):
            raise ValueError(
                f"tuner.init={self.init} works on the base's own weights, and here they are 4-bit; tuner.init=default or tuner=lora"
            )
        return self


Tuner = Annotated[FullTuner | LoraTuner | QloraTuner, Field(discriminator="kind")]


class Deepspeed(Settings):
    stage: Literal[0, 2, 3]
    """ZeRO stage; 0: plain data parallel without DeepSpeed"""
    offload: bool
    """keep optimizer states (and under ZeRO-3 parameters) in host memory"""
    bucket_size: PositiveInt | Literal["auto"]
    """elements per reduce or all-gather bucket; auto: 200 million on a GPU, under ZeRO-3 by the model's width, and 5 million on a CPU"""
    config: Annotated[str | None, Unkeyed]
    """a DeepSpeed JSON file merged over these settings; optimizer and scheduler blocks in it are refused"""


class TrainLoop(Settings):
    """How long, in what portions and in what precision. A row is what a model sees by itself: a conversation, or a stretch of a text."""

    epochs: PositiveFloat
    """passes over the training split"""
    max_steps: PositiveInt | None
    """stop after this many optimizer steps; null: as many as the epochs take"""
    global_batch_size: PositiveInt
    """rows (conversations, stretches of text) per optimizer step over all processes"""
    micro_batch_size: Annotated[PositiveInt | Literal["auto"], Unkeyed]
    """rows as long as the longest per forward pass and process, more where they are shorter; auto: as many as fit in memory"""
    packing: Annotated[Literal["auto"] | bool, Unkeyed]
    """lay rows end to end instead of padding them, each seeing itself alone; auto: where that is proven equal on the model"""
    max_length: Annotated[int, Field(ge=2)]
    """tokens per row"""
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    """auto: bf16 on GPUs and CPUs with units for it, else fp32"""
    attention: Annotated[Literal["auto", "sdpa", "eager", "flash_attention_2"], Unkeyed]
    """auto: each packed row by itself, on a GPU in one kernel; else as transformers calls it"""
    chunked_loss: Annotated[Literal["auto"] | bool, Unkeyed]
    """compute the output layer for trained tokens only and a chunk at a time; auto: where that is proven equal on the model"""
    optimizer: Literal["auto", "adamw", "adamw_8bit"]
    """auto: AdamW, its step in one kernel; adamw_8bit: bitsandbytes' with states in 8 bit, on a GPU"""
    kernels: Annotated[Literal["auto", "torch", "liger"], Unkeyed]
    """auto: Liger's for norms, rotation and MLP on a GPU where liger-kernel is installed; on a CPU ours for adapters, norms and rotation"""
    compile: Annotated[bool, Unkeyed]
    """torch.compile the model; off, since batches of chats change shape with every step"""
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"]
    """shape of the learning rate over the run"""
    warmup: Fraction
    """share of the steps over which the rate rises, from above zero, to its peak"""
    weight_decay: NonNegativeFloat
    """decoupled weight decay"""
    adam_beta1: Fraction
    """first-moment decay of AdamW"""
    adam_beta2: Fraction
    """second-moment decay of AdamW"""
    max_grad_norm: NonNegativeFloat
    """gradients are clipped to this norm; 0: never"""
    gradient_checkpointing: Annotated[Literal["auto"] | bool, Unkeyed]
    """recompute activations in the backward pass: less memory, about a third more time; auto: only where the longest row needs it"""
    eval_steps: Annotated[PositiveInt | None, Unkeyed]
    """evaluate every so many steps; null: at the end of each epoch"""
    eval_rows: Annotated[PositiveInt | Literal["auto"], Unkeyed]
    """validation rows measured at each evaluation; auto: as many as take about 2 % of the training, at least 64"""
    checkpoint_steps: Annotated[PositiveInt, Unkeyed]
    """save a resumable state every so many steps"""
    checkpoint_minutes: Annotated[PositiveFloat, Unkeyed]
    """and every so many minutes, so that slow steps lose little when a run is killed"""
    log_steps: Annotated[PositiveInt, Unkeyed]
    """report every so many steps"""
    samples: Annotated[NonNegativeInt, Unkeyed]
    """beginnings of validation rows answered or continued greedily at each evaluation, to be looked at; under ZeRO-3 every token of theirs gathers the weights"""
    seed: int
    """seed of initialisation, order and dropout"""


class Train(TrainLoop):
    max_length: PositiveInt
    """tokens per conversation; see long_rows for longer ones"""
    long_rows: Literal["drop", "split_turns", "keep_end", "error"]
    """conversations over max_length: left out, cut between turns into several, cut to their last tokens, or an error; counted and said"""
    long_share: Annotated[float, Field(ge=0, le=1)]
    """share of conversations that may be left out or cut for their length; above it the stage fails"""
    hidden_turns: Literal["skip", "rows"]
    """answers that the template shows otherwise once they are history (Qwen3's reasoning): out of the loss and counted, or a row for each"""


class Teacher(Settings):
    path: Annotated[str | None, Unkeyed]
    """model, quantized or adapter folder whose probabilities are learnt beside the tokens; null: none"""
    weight: Annotated[float, Field(ge=0, le=1)]
    """its part of the loss, alpha in alpha KL + (1 - alpha) cross-entropy (Hinton et al. 2015, arXiv:1503.02531)"""
    top_k: PositiveInt
    """likeliest tokens kept of each of its distributions; the others count together"""


class Launch(Settings):
    nproc_per_node: PositiveInt | Literal["auto"]
    """processes on this machine; auto: one per GPU, one on a machine without"""
    nnodes: PositiveInt
    """machines taking part"""
    node_rank: NonNegativeInt
    """number of this machine, from 0"""
    master_addr: str
    """address of machine 0"""
    master_port: Annotated[int, Field(ge=0, lt=65536)]
    """port on machine 0; 0: a free one (one machine only)"""

    @model_validator(mode="after")
    def _rank_in_range(self) -> Self:
        if self.node_rank >= self.nnodes:
            raise ValueError(f"node_rank {self.node_rank} needs nnodes above it, not {self.nnodes}")
        if self.nnodes > 1 and self.master_port == 0:
            raise ValueError("several machines need a master_port they all know")
        return self


class TrainingVerb(TrackedVerb):
    """What every verb that trains is told."""

    tuner: Tuner
    """which weights are trained, and how fast"""
    deepspeed: Deepspeed
    """how training is spread over memory"""
    train: TrainLoop
    """how long, in what portions and in what precision"""
    max_loss_change: Annotated[PositiveFloat, Unkeyed]
    """nats that the loss on held-out rows may differ between what was trained and what is saved, beside what other rows would explain"""
    launch: Annotated[Launch, Unkeyed]
    """processes and machines"""


class FinetuneVerb(StageVerb, TrainingVerb):
    model: Model
    """the model to start from"""
    train: Train
    """how long, in what portions and in what precision"""
    teacher: Annotated[Teacher, Field(exclude_if=lambda teacher: teacher.path is None)]
    """a larger model to learn from"""
    chat_template: str | None
    """null: the base's, or chatml where it has none; chatml: ours, which shows tools, calls, results, system turns and reasoning; FILE: a Jinja file"""
    template: dict[str, JsonValue]
    """keywords for the chat template, such as template.enable_thinking=false; saved in the result's template, so that every server has them"""
    reasoning: Literal["template", "inline", "drop"]
    """reasoning of answers: as the template shows it; inline: in the text, in the model family's own tags; drop: not learnt"""
    unseen: Literal["auto", "skip", "error"]
    """what the chat template does not show is left out of the loss, counted and said: auto up to a tenth of the answers; skip any share; error none"""
    today: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
    """the day that a chat template is told which prints today's date, so that the same rows are made on any day"""
    legacy_mask: Literal["none", "qwen"]
    """none: train on the assistant's text and its <|im_end|>; qwen: the labels of Qwen's finetune.py, turn markers included"""
    train_new_tokens: Literal["auto", "never"]
    """auto: rows of ChatML tokens found untrained are trained, at a rate of their own; never: as the base left them, or as the tuner moves them"""

    @field_validator("today")
    @classmethod
    def _is_a_day(cls, value: str) -> str:
        date.fromisoformat(value)
        return value


class TextVerb(TrainingVerb):
    """What a verb that trains on plain text is told."""

    text: Annotated[str, Field(exclude=True, min_length=1)]
    """text to learn: a file, folder, glob or hub id of .txt, or of records with a column `text`; tinystories: that set, from the hub"""
    separator: Annotated[str, Field(min_length=1)]
    """what parts the documents of a .txt: auto (<|endoftext|> where the file has it, else the file is one), blank_line, file, or the words themselves"""
    val: Fraction
    """share of documents held out for validation"""
    split_seed: int
    """seed of the hash that gives each document its split"""


class Size(Settings):
    """The shape of a new model, in the words of config.json."""

    family: Literal["llama", "qwen3"]
    """which model's layers; qwen3's have norms on queries and keys"""
    hidden: PositiveInt
    """width of the model"""
    intermediate: PositiveInt | Literal["auto"]
    """width of the MLP; auto: 8/3 of hidden, up to a multiple of 32, as llama2.c has it"""
    layers: PositiveInt
    """layers"""
    heads: PositiveInt
    """attention heads"""
    kv_heads: PositiveInt
    """heads of keys and values; below heads: several heads share one"""
    vocab: PositiveInt
    """tokens of the tokenizer that is trained; with tokenizer=FOLDER as many as that has"""
    max_length: PositiveInt
    """tokens of the context"""
    rope_theta: PositiveFloat
    """base of the rotary embedding"""
    tied: bool
    """output layer and embedding are one table"""

    @model_validator(mode="after")
    def _is_a_model(self) -> Self:
        faults, pairs = [], 2 * self.heads  # rotary embeddings turn pairs of a head's values
        if self.hidden % pairs:
            faults.append(
                f"size.hidden={self.hidden} cannot be shared by size.heads={self.heads}; size.hidden={-(-self.hidden // pairs) * pairs} can"
            )
        if self.heads % self.kv_heads:
            divides = max(n for n in range(1, min(self.kv_heads, self.heads) + 1) if self.heads % n == 0)
            faults.append(f"size.heads={self.heads} cannot share size.kv_heads={self.kv_heads}; size.kv_heads={divides} divides them")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def inner(self) -> int:
        """Width of the MLP, by llama2.c's rule (model.py, `hidden_dim`, `multiple_of`) where it is not given."""
        return -(-(8 * self.hidden // 3) // 32) * 32 if self.intermediate == "auto" else self.intermediate


class PretrainVerb(TextVerb):
    size: Size
    """the shape of the model: 260k, 15m, 42m, 110m, or single sizes"""
    tokenizer: Annotated[str | None, Unkeyed]
    """folder or hub id of a model whose tokenizer is taken; null: one of size.vocab tokens is trained on the text"""
    tuner: FullTuner
    """how fast, and what is saved; every weight is trained"""

    @field_validator("tuner", mode="before")
    @classmethod
    def _is_full(cls, value: object) -> object:
        if not isinstance(value, dict | FullTuner):
            raise ValueError("a new model has every weight to train; adapters on a model there is are cpt's, or finetune's")
        return value

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        faults = []
        if self.train.max_length > self.size.max_length:
            faults.append(
                f"train.max_length={self.train.max_length} is beyond size.max_length={self.size.max_length}; train.max_length={self.size.max_length}"
            )
        if self.tokenizer is None and self.size.vocab < BYTE_LEVEL:
            faults.append(
                f"size.vocab={self.size.vocab} has no room for all bytes and the control tokens; size.vocab={BYTE_LEVEL} is the least"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self


class CptVerb(TextVerb):
    model: Model
    """the model to go on from"""


Trains = FinetuneVerb | CptVerb
"""what trains a model that is there; pretrain makes one and is cpt on it from then on"""


class MergeVerb(StageVerb):
    base: Annotated[str | None, Unkeyed]
    """base model folder; null: the one the adapter was trained on"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    """dtype of the merged weights; auto: as the base stores each"""
    rounding: Rounding
    """how the exact sum becomes 16 bits; stochastic keeps small updates, nearest gives peft's bytes and loses them"""
    tolerance: Literal["auto"] | PositiveFloat
    """largest relative difference of random tokens' logits between adapter-on-base and the merged folder; auto: what rounding to its dtype explains"""
    max_loss_change: Annotated[PositiveFloat, Unkeyed]
    """nats that the loss on held-out conversations may differ from the adapter's on its base, beside what other conversations would explain"""
    shard_size: Annotated[str, Field(pattern=r"^\d+(\.\d+)?[MG]B$")]
    """largest weight file, such as 5GB"""


class AuxFilesVerb(Verb):
    source: Annotated[str, Unkeyed]
    """folder with the tokenizer and auxiliary files; or a model.bin of karpathy/llama2.c"""
    target: Annotated[str, Unkeyed]
    """model folder made elsewhere that lacks them; or the new folder that a model.bin is read into"""
    tokenizer: Annotated[str | None, Unkeyed]
    """the tokenizer.bin of a model.bin; null: beside it"""


class QuantizeVerb(StageVerb):
    quantizer: AnyQuantizer
    """the method and its numbers"""
    weights: Weights
    """of a merged adapter, quantize the exact sum, made anew in fp32 on the way, or the weights as the merge stored them"""
    calibration: Calibration
    """the conversations it looks at"""
    dataset: Annotated[str | None, Unkeyed]
    """dataset artifact to calibrate on; null: the run's own"""
    max_kl: Annotated[Literal["auto"] | PositiveFloat, Unkeyed]
    """nats a token of KL to the weights that were quantized, on held-out conversations, beside what others would explain; auto: by bit width"""
    min_agreement: Annotated[Literal["auto"] | Annotated[float, Field(ge=0, le=1)], Unkeyed]
    """share of held-out tokens with the same likeliest token; auto: by bit width"""


class Evaluation(Settings):
    batch_size: PositiveInt
    """prompts answered together"""
    max_length: PositiveInt
    """tokens per conversation; longer ones are left out, and counted"""
    rows: PositiveInt | None
    """rows used at most, of the validation split and of general; null: all"""
    samples: NonNegativeInt
    """prompts answered greedily"""
    max_new_tokens: PositiveInt
    """tokens per answer at most"""
    prompts: list[str] | None
    """prompts to answer; null: first user turns of the validation split"""
    expect: str | None
    """regular expression that prompt, newline and answer together must match whole; answers that do not end their turn count as wrong"""
    check: Literal["auto", "none", "number", "choice", "json", "schema", "calls"]
    """what of an answer has to be that of the data's own: its last number, the letter of a choice, that it is JSON, or follows json_schema, its tool calls; auto:
    what the data's answers are made for, and says it"""
    json_schema: Annotated[str | None, Unkeyed]
    """file with the JSON Schema that every answer has to follow"""
    general: Annotated[str | None, Unkeyed]
    """text or chats of another domain, as data.path takes them, to see what of that the model forgot; of a text each line is a row, cut at max_length"""
    tasks: Annotated[list[str] | None, Field(exclude_if=lambda names: names is None)]
    """tasks of lm-eval, by name or as a YAML file of your own, of which `rows` documents are taken at most; null: none"""

    @model_validator(mode="after")
    def _schema_where_it_is_checked(self) -> Self:
        if self.check == "schema" and self.json_schema is None:
            raise ValueError("to check by a schema, give evaluation.json_schema=FILE too")
        if self.json_schema is not None and self.check not in ("auto", "schema"):
            raise ValueError("evaluation.json_schema is of use where schema is what is checked")
        return self


class Endpoint(Settings):
    url: str | None
    """OpenAI-compatible server, http://HOST:PORT with or without /v1; null: a model on this machine. A key comes from OPENAI_API_KEY"""
    model: str | None
    """name of the model to ask; null: the only one it serves"""
    timeout: Annotated[PositiveFloat, Unkeyed]
    """seconds it may be silent or busy; a whole answer may take ten times as many while it goes on"""
    concurrency: PositiveInt
    """requests at a time; boards serve one"""

    # Raised for the group, not the field: a field's fault is printed with its value, and that may hold a password.
    @model_validator(mode="after")
    def _plain_address(self) -> Self:
        if self.url is not None:
            check_address(self.url, "endpoint.url")
        elif self.model is not None:
            raise ValueError("endpoint.model is of use with endpoint.url only")
        return self


class Gate(Settings):
    """Limits of a report's figures against the parent; null: none."""

    kl: PositiveFloat | None
    """nats of KL to the parent at most"""
    top1: Annotated[float, Field(gt=0, le=1)] | None
    """share of tokens whose likeliest is the parent's, at least"""
    perplexity_ratio: PositiveFloat | None
    """perplexity over the parent's at most"""
    task_drop: Annotated[float, Field(ge=0, le=1)] | None
    """share of answers right that may be lost of the parent's (evaluation.check)"""
    forgetting: NonNegativeFloat | None
    """nats of loss over the parent's at most, on evaluation.general"""


class EvaluateVerb(StageVerb):
    dataset: Annotated[str | None, Unkeyed]
    """dataset artifact to evaluate on; null: the run's own"""
    parent: Annotated[str | None, Unkeyed]
    """model to compare with; null: the one this one was made from"""
    evaluation: Evaluation
    """what is measured and asked"""
    endpoint: Annotated[Endpoint, Field(exclude_if=lambda endpoint: endpoint.url is None)]
    """a running board or server to measure in place of a model on this machine"""
    gate: Annotated[Gate, Unkeyed]
    """limits that turn the report into a verdict: none, or strict"""
    numerics: Annotated[str | list[str] | None, Field(exclude_if=lambda names: names is None)]
    """numbers to try the model in, a target's name and a type of its weights, such as ax650_s8, several as [a,b], or all; null: the model as it is"""
    target: Annotated[str | list[str] | None, Field(exclude_if=lambda names: names is None)]
    """target, or several as [a,b], of which numerics=all takes every type of weights; null: of all"""

    @model_validator(mode="after")
    def _one_thing(self) -> Self:
        if self.numerics and self.endpoint.url is not None:
            raise ValueError("an endpoint computes in its own numbers; leave numerics or endpoint.url out")
        if self.target is not None and self.numerics is None:
            raise ValueError("target says whose numbers; write numerics=all with it")
        return self


class DeployVerb(StageVerb):
    target: AnyTarget
    """what to build for"""
    weights: Weights
    """of a merged adapter, build from the exact sum, made anew in fp32 on the way, or from the weights as the merge stored them"""
    dataset: Annotated[str | None, Unkeyed]
    """dataset artifact to calibrate on, for targets that do; null: the run's own"""
    preview: Annotated[NonNegativeInt, Unkeyed]
    """held-out conversations on which the model is tried in a vendor's numbers before its compiler is run; 0: none"""
    gate: Annotated[Gate, Unkeyed]
    """limits of what the model loses in those numbers (kl, top1, perplexity_ratio), beyond which the compiler is not run: none, or strict"""


class Gpu(Settings):
    name: str
    """what the GPU is called"""
    memory: PositiveFloat
    """GB of memory, by the vendor's datasheet"""
    bandwidth: PositiveFloat
    """GB/s of that memory"""
    tflops: PositiveFloat
    """dense 16-bit TFLOP/s with fp32 accumulation, without sparsity"""
    link: PositiveFloat
    """GB/s in one direction to the other GPUs of the machine"""


class PlanTrain(Settings):
    """What of finetune's settings its memory and time follow from; the same words, values and defaults."""

    max_length: PositiveInt
    """tokens per conversation; all are taken to have so many"""
    global_batch_size: PositiveInt
    """conversations per optimizer step over all GPUs"""
    micro_batch_size: PositiveInt | Literal["auto"]
    """conversations per forward pass and GPU; auto: as many as fit in memory"""
    gradient_checkpointing: Literal["auto"] | bool
    """recompute activations in the backward pass: less memory, about a third more time; auto: only where a conversation needs it"""
    chunked_loss: Literal["auto"] | bool
    """compute the output layer a chunk of tokens at a time; auto: where config.json scales no logits behind it"""
    optimizer: Literal["auto", "adamw", "adamw_8bit"]
    """adamw_8bit: states in 8 bit"""


class PlanVerb(Verb):
    model: str
    """model folder, a config.json alone, or the id of a model on the hub; several, as [a,b], are compared in a table"""
    revision: str | None
    """commit, tag or branch on the hub; null: its default"""
    target: AnyTarget
    """what to plan for, unless a GPU is named; target=[a,b] compares several"""
    gpu: Gpu | None
    """GPU to plan training on; null: plan for the target; gpu=[a,b] compares several"""
    gpus: PositiveInt
    """GPUs that train together"""
    tuner: Tuner
    """which weights are trained"""
    deepspeed: Deepspeed
    """how training is spread over memory"""
    train: PlanTrain
    """in what portions"""
    plot: str | None
    """PNG file to draw memory and speed against context length into; null: none"""


class Budget(Settings):
    tokens: PositiveInt | None
    """tokens spent at most, prompts and answers together, over all commands that share the run's journal; null: without limit"""
    money: PositiveFloat | None
    """USD spent at most, the same way; null: without limit"""


class Prompts(Settings):
    path: Annotated[str | None, Unkeyed]
    """file of prompts or conversations (JSON, JSON Lines or lines of text), or folder of text to ask about; null: none, for recipes that draw their own"""
    count: PositiveInt | None
    """rows to read at most; null: all"""
    on_fault: Literal["error", "drop"]
    """malformed records: fail and list the first ten before anything is asked, or set them aside"""


class PipelineVerb(Verb):
    recipe: str
    """the stages in their order: a name in configs/pipeline, or a YAML file of your own"""
    objective: str
    """of a sweep: the figure that its runs are ordered by, the smallest first, and that a sweeper like Optuna's makes small: STAGE.figure of a manifest"""


class ReportVerb(Verb):
    rows: PositiveInt
    """conversations of the training split whose lengths are drawn"""


class DoctorVerb(Verb):
    network: bool
    """see whether hub and tracker answer; nothing is sent to them"""


class RunsVerb(Verb):
    remove: str | None
    """a run to remove; null: list them"""


class DistillVerb(TrackedVerb):
    recipe: Recipe
    """the steps from prompts to rows"""
    prompts: Prompts
    """what to begin with"""
    teacher: AnyTeacher
    """who answers"""
    judge: AnyJudge
    """who rates answers"""
    budget: Annotated[Budget, Unkeyed]
    """what all of it may cost"""
    estimate: Annotated[NonNegativeInt, Unkeyed]
    """work on so many rows alone, say what all would cost, and stop; 0: make the dataset"""
    allow_cut_off: bool
    """take answers that were cut off at their longest (finish_reason=length)"""
    retry_set_aside: Annotated[bool, Unkeyed]
    """ask anew what earlier commands set aside"""
    holdout: Holdout
    """how the rows are split"""
    samples: NonNegativeInt
    """rows on the page of samples"""
    seed: int
    """seed of every draw"""


class ChatVerb(SourcedVerb):
    base: str | None
    """folder of an adapter's base model; null: where it was trained"""
    environment: str | None
    """Python environment of a bundle's runtime; null: .venv-openvino or .venv-gguf"""
    compare: str | None
    """another artifact, bundle or folder that answers beside it"""
    system: str | None
    """system text that conversations begin with"""
    tools: str | None
    """JSON file with a list of tools, in OpenAI's form, that the model may call"""
    history: str | None
    """file that keeps what you typed for the next time; null: none"""
    overflow: Literal["forget", "stop"]
    """where a conversation has grown too long: forget its oldest turns, and say so, or stop"""
    decoding: Decoding
    """how answers are made"""
    endpoint: Endpoint
    """an OpenAI-compatible server to talk to in place of a model on this machine"""


class Listen(Settings):
    host: str
    """address to listen on; another than this machine's own (127.0.0.1, ::1) takes a key"""
    port: Annotated[int, Field(ge=0, lt=65536)]
    """port; 0: a free one, which is said"""
    key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    """environment variable with the key that requests have to bear; where it is not set they need none"""
    waiting: PositiveInt
    """requests that may wait for their turn; the next is told to come again (HTTP 503)"""


class ServeVerb(SourcedVerb):
    base: str | None
    """folder of an adapter's base model; null: where it was trained"""
    environment: str | None
    """Python environment of a bundle's runtime; null: .venv-openvino or .venv-gguf"""
    compare: str | None
    """another artifact, bundle or folder to serve beside it"""
    decoding: Decoding
    """how answers are made where a request does not say"""
    listen: Listen
    """where, and to whom"""


class AnswerVerb(StageVerb):
    base: Annotated[str | None, Unkeyed]
    """folder of an adapter's base model; null: where it was trained"""
    environment: Annotated[str | None, Unkeyed]
    """Python environment of a bundle's runtime; null: .venv-openvino or .venv-gguf"""
    prompts: Prompts
    """what is asked; of a conversation, what comes up to its last user turn"""
    system: str | None
    """system text of the prompts that have none"""
    decoding: Decoding
    """how answers are made"""
    batch_size: PositiveInt
    """prompts answered together by a model on this machine"""
    endpoint: Annotated[Endpoint, Field(exclude_if=lambda endpoint: endpoint.url is None)]
    """an OpenAI-compatible server that answers in place of a model on this machine"""

    @model_validator(mode="after")
    def _one_thing(self) -> Self:
        if self.endpoint.url is not None and self.source is not None:
            raise ValueError("source and endpoint.url both say who answers; leave one out")
        return self
