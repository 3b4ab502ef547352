"""Every setting's type, rule and meaning. Defaults live in configs/, so no field here has one.

A string under a field is its documentation and its line in `--help`. A field marked `Unkeyed` changes where or how a stage runs, not what
it makes, so it takes no part in an artifact's key.
"""

from datetime import date
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from src.settings.answers import Decoding
from src.settings.base import Fraction, Settings, Unkeyed
from src.settings.data import Data, Holdout
from src.settings.evaluations import Endpoint, Evaluation, Gate
from src.settings.quantizers import AnyQuantizer, Calibration
from src.settings.recipes import Recipe
from src.settings.targets import AnyTarget
from src.settings.teachers import AnyJudge, AnyTeacher
from src.settings.trackers import Tracker
from src.settings.training import Deepspeed, FullTuner, Launch, Model, PlanTrain, Rounding, Size, Teacher, Train, TrainLoop, Tuner

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


class TrackedVerb(Verb):
    tracker: Annotated[dict[str, Tracker], Unkeyed]
    """where its figures go beside <run>/metrics.jsonl: wandb, tensorboard, trackio, mlflow, several as [wandb,tensorboard], or none"""


class SourcedVerb(Verb):
    source: Annotated[str | None, Unkeyed]
    """artifact or Hugging Face folder to work on; null: the run's own"""


class StageVerb(TrackedVerb, SourcedVerb):
    """One that makes an artifact from another."""


class DataVerb(TrackedVerb):
    data: Data
    """what to read and how to split it"""
    preview: Annotated[str | None, Unkeyed]
    """model folder or hub id: show the rows as that model would see them, with lengths, writing and duplicates, and make nothing; null: make the dataset"""


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
    private: Annotated[bool | None, Unkeyed]
    """true: push shares nothing that is made from the text; marks what is finished, too, and makes nothing anew; false takes a mark away; null: as it is"""
    val: Fraction
    """share of documents held out for validation"""
    split_seed: int
    """seed of the hash that gives each document its split"""


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
    private: Annotated[bool | None, Unkeyed]
    """true: push shares nothing that is made from them; marks what is finished, too, and makes nothing anew; false takes a mark away; null: as it is"""
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


class PushVerb(Verb):
    source: str
    """finished artifact: a dataset, adapter, model, quantized model or bundle"""
    id: str
    """name on the hub, as people/name"""
    private: bool
    """true: only you and who you let in see it; false: everyone does"""


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
