"""How a model is trained: the groups of settings that finetune, pretrain, cpt and plan share."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from src.settings.base import Fraction, Settings, Unkeyed

Rounding = Literal["stochastic", "nearest"]


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
