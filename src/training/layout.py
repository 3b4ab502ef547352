"""How a run computes: packed or padded, how much at a time, which attention, loss and recomputing. What is fast is taken where it is proven right on
the model itself."""

import contextlib
import inspect
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch

from src.chat import encoding
from src.core.errors import NoMemory, ProofFailed
from src.core.files import read_json, write_json
from src.core.log import rank, say, size
from src.core.memory import available
from src.settings.verbs import FinetuneVerb, TrainingVerb
from src.training import attention, launch, rules
from src.training.batches import Rows, micro_batch
from src.training.checkpoints import barrier
from src.training.examples import Example
from src.training.head import HeadLoss, Targets, token_results

EQUAL = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""largest difference of a token's loss (nats) that a precision explains"""


BUSY = 512
"""tokens of a forward pass that keep a CPU busy; more take memory and no less time (docs/benchmarks.md)"""


@dataclass(frozen=True)
class Layout:
    """How a run computes, which does not change what it learns but its last bits: a resumed run keeps it.

    packed: rows end to end. capacity: tokens of a forward pass. fused: the loss is computed chunk by chunk at the output layer.
    checkpointing: activations are recomputed.
    """

    packed: bool
    capacity: int
    fused: bool
    checkpointing: bool


def choose_layout(cfg: TrainingVerb, model, examples: Rows, out: Path, precision: str) -> Layout:
    """The layout of the unfinished run in `out`, or a new one that this model is proven to take. Leaves the model set up for it."""
    file, asked = out / "layout.json", {name: getattr(cfg.train, name) for name in ASKED}
    if not file.is_file():
        layout = new_layout(cfg, model, examples, precision)
        barrier()  # every process has looked for the file
        if rank() == 0:
            write_json(file, {"layout": asdict(layout), "asked": asked})
        barrier()
    kept = read_json(file)
    if kept["asked"] != asked:
        moved = ", ".join(f"train.{name}={kept['asked'][name]}" for name in ASKED if kept["asked"][name] != asked[name])
        say(f"goes on as it began, with {moved}: another layout would change the last bits of what is learnt")
    layout = Layout(**kept["layout"])
    set_up(model, layout, kept["asked"]["attention"])
    say(
        f"batches: {'packed' if layout.packed else 'padded'}, up to {layout.capacity:,} tokens a forward pass; attention "
        f"{model.config._attn_implementation}; loss {'in chunks at the trained tokens' if layout.fused else 'from the logits of the trained tokens'}; "
        f"activations {'recomputed' if layout.checkpointing else 'kept'}"
    )
    return layout


ASKED = ("micro_batch_size", "packing", "attention", "chunked_loss", "gradient_checkpointing")


def new_layout(cfg: TrainingVerb, model, examples: Rows, precision: str) -> Layout:
    t, longest = cfg.train, int(examples.lengths.max())
    share = t.global_batch_size // launch.world_size(cfg.launch)
    # Under ZeRO-3 the model runs inside DeepSpeed's engine only: what looks right is taken, and Probe proves it there.
    partitioned = cfg.deepspeed.stage == 3
    packed = t.packing is not False and (may_pack(model) if partitioned else packs(model, t.attention, precision))
    fused = t.chunked_loss is not False and (partitioned or fuses(model, precision))
    for name, asked, holds in (("packing", t.packing, packed), ("chunked_loss", t.chunked_loss, fused)):
        if asked is True and not holds:
            raise ProofFailed(f"train.{name}=true, but on this model it changes the loss", fix=f"train.{name}=auto")
    layout = Layout(packed, share * longest, fused, t.gradient_checkpointing is True)

    def fits(checkpointing: bool) -> int:
        tried = replace(layout, checkpointing=checkpointing)
        set_up(model, tried, t.attention)
        return tokens_that_fit(cfg, model, examples, tried)

    capacity, checkpointing = rules.layout(
        share=share,
        longest=longest,
        micro_batch=t.micro_batch_size,
        checkpointing=t.gradient_checkpointing,
        partitioned=partitioned,
        useful=share * longest if torch.cuda.is_available() else BUSY,
        fits=fits,
    )
    layout = replace(layout, capacity=capacity, checkpointing=checkpointing)
    set_up(model, layout, t.attention)
    return layout


def set_up(model, layout: Layout, asked: str) -> None:
    """Give the model the attention and the recomputing of a layout."""
    if asked != "auto":
        model.set_attn_implementation(asked)
    elif layout.packed:
        attention.register()
        model.set_attn_implementation(attention.NAME)
    if layout.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()


# ---- is it right


def may_pack(model) -> bool:
    """Whether the model's class takes attention from outside and each token's position from its caller."""
    config = model.config
    return (
        model._supports_attention_backend
        and {"position_ids", "kwargs"} <= arguments_of(model)
        and not getattr(config, "attention_chunk_size", None)
        and not getattr(config, "attn_logit_softcapping", None)
    )


def arguments_of(model) -> set[str]:
    """Names of the arguments the model's own forward takes, also where peft wraps it."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    return set(inspect.signature(inner.forward).parameters)


def packs(model, asked: str, precision: str) -> bool:
    """Whether two short rows have the same losses end to end as each has alone, through the attention the model came with, and the second the same
    to the bit whatever the first says."""
    if not may_pack(model):
        return False
    before, examples = model.config._attn_implementation, sample_examples(model)
    with as_in_use(model):
        alone = torch.cat([losses(model, micro_batch(examples, [i], 0, packed=False)) for i in range(len(examples))])
        set_up(model, Layout(True, 0, False, False), asked)
        try:
            together = losses(model, micro_batch(examples, list(range(len(examples))), 0, packed=True))
            if (alone - together).abs().max().item() > EQUAL[precision]:
                wrong = "packing changes the losses of this model"
            else:
                wrong = "in this model a packed conversation sees the one before it" if leaks(model, EQUAL[precision]) else ""
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
            # A class that takes no packed rows says so in ways of its own.
            wrong = f"this model takes no packed conversations ({type(error).__name__})"
    if wrong:
        model.set_attn_implementation(before)
        say(f"{wrong}, so its batches are padded")
    return not wrong


def leaks(model, most: float, inside=None) -> bool:
    """Whether another first row changes the losses of the second in a packed pass, which must be equal to the bit.

    Where tokens are sorted among experts, sums of other lengths may change last bits (less than `most` nats): there a first row without any gradient
    from the second's losses is not seen by it. inside: what to call in place of the model, DeepSpeed's engine, which gives no gradients of that kind.
    """
    call = inside or model
    one, second = sample_examples(model, trained=1.0)
    first, vocabulary = len(one.input_ids), model.config.get_text_config().vocab_size
    other = Example((one.input_ids + 1) % vocabulary, one.labels)
    passes = [micro_batch([row, second], [0, 1], 0, packed=True) for row in (one, other)]
    before, after = (losses(call, batch)[first - 1 :] for batch in passes)
    if torch.equal(before, after):
        return False
    routed = any("expert" in name for name, _ in model.named_modules())
    if not routed or (before - after).abs().max().item() > most:
        return True
    if inside:
        return False
    embedded: list[torch.Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, given, out: embedded.append(out.requires_grad_()))
    with torch.enable_grad():
        loss = losses(model, passes[0])[first - 1 :].sum()
        (gradient,) = torch.autograd.grad(loss, embedded[:1])
    hook.remove()
    return bool(gradient[0, :first].any())


def fuses(model, precision: str) -> bool:
    """Whether the loss computed at the output layer is the loss of the model's logits, which some models scale or cap behind that layer."""
    if "logits_to_keep" not in arguments_of(model) or precision == "fp16":
        return False
    examples = sample_examples(model)
    batch = micro_batch(examples, [0], 0, packed=False)
    with as_in_use(model):
        plain = losses(model, batch)
        head = HeadLoss(model, chunked=True)
        with head.learning(Targets(batch["targets"]).to(model.device)):
            fused = model(**inputs_of(batch, model.device), logits_to_keep=batch["keep"].to(model.device), use_cache=False).logits
        head.remove()
    return fused.shape == (len(plain), 2) and (fused[:, 0] - plain).abs().max().item() <= EQUAL[precision]


def sample_examples(model, trained: float = 0.5) -> list[Example]:
    """Rows of 9 and 14 token ids drawn at random, the same in every process; the last `trained` of each is trained."""
    vocabulary = model.config.get_text_config().vocab_size
    draw, examples = np.random.default_rng(0), []
    for length in (9, 14):
        ids = draw.integers(0, vocabulary, length, dtype=np.int32)
        examples.append(Example(ids, np.where(np.arange(length) < int(length * (1 - trained)), encoding.IGNORE, ids)))
    return examples


def losses(model, batch: dict) -> torch.Tensor:
    """fp32 losses of a micro-batch's trained tokens, from the model's full logits."""
    logits = model(**inputs_of(batch, model.device), use_cache=False).logits
    return token_results(logits[batch["keep"].to(logits.device)], batch["targets"].to(logits.device))[:, 0]


def inputs_of(batch: dict, device) -> dict:
    """What of a micro-batch the model takes."""
    given = {name: value for name, value in batch.items() if name not in ("keep", "targets", "examples")}
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}


@contextlib.contextmanager
def as_in_use(model):
    """The model without dropout and gradients."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(was_training)


# ---- how much fits


def tokens_that_fit(cfg: TrainingVerb, model, examples: Rows, layout: Layout) -> int:
    """Tokens whose activations fit beside the weights, gradients and optimizer states of this process, by the bytes a short forward pass keeps.

    Raises NoMemory where a machine without a GPU could not hold even one row: there the system would kill the process without a word.
    """
    longest = int(np.argmax(examples.lengths))
    example = examples[longest]
    short = Example(example.input_ids[:512], example.labels[:512])
    batch = micro_batch([short], [0], 0, packed=layout.packed)
    kept: float = kept_bytes(model, batch)
    if layout.checkpointing:  # a layer at a time is computed again, and held as if nothing were recomputed
        model.gradient_checkpointing_disable()
        kept += kept_bytes(model, batch) / getattr(model.config.get_text_config(), "num_hidden_layers", 1)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    each = kept / len(short.input_ids)
    world = launch.world_size(cfg.launch) if cfg.deepspeed.stage else 1
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    offload = cfg.deepspeed.offload and torch.cuda.is_available()
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        left: float = free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    else:
        left = available() / launch.per_node(cfg.launch)
        if layout.checkpointing or cfg.train.gradient_checkpointing is False:
            need, there = rules.needed(examples.lengths[longest], each, trained=trained, shards=world), psutil.virtual_memory().total
            if need > there:
                raise NoMemory(
                    f"the longest conversation needs about {size(need)} beside the weights, this machine has {size(there)}",
                    fix=smaller(cfg, checkpointing=layout.checkpointing, one=True),
                )
    return rules.tokens_that_fit(left, each, trained=trained, shards=world, offload=offload)


def smaller(cfg: TrainingVerb, *, checkpointing: bool, one: bool) -> list[str]:
    """Settings that take less memory than the run's own. one: a single conversation is too much already.

    Offloading moves what a GPU holds into the machine's memory, where all of it is where there is no GPU.
    """
    gpu, kind, zero, chat = torch.cuda.is_available(), cfg.tuner.kind, cfg.deepspeed, isinstance(cfg, FinetuneVerb)
    return [
        *["train.micro_batch_size=1"] * (not one),
        *["train.gradient_checkpointing=true"] * (not checkpointing),
        *["train.max_length=N, lower, for shorter conversations; train.long_rows says what becomes of the longer"] * chat,
        *["train.max_length=N, lower, for shorter rows"] * (not chat),
        *["tuner=lora or tuner=qlora, which train fewer weights"] * (kind == "full" and chat),
        *["deepspeed=zero3_offload, which shares what is left between processes and the host's memory"]
        * (gpu and kind != "qlora" and not (zero.stage == 3 and zero.offload)),
    ]


def kept_bytes(model, batch: dict) -> int:
    """Bytes that a forward pass in training keeps for its backward pass, output layer not counted."""
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: list[torch.UntypedStorage] = []

    def note(tensor):
        """Nothing goes backward, so nothing is handed on: a graph given its own tensors again would hold them, and itself, for good."""
        kept.append(tensor.untyped_storage())

    was_training = model.training
    model.train()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.autograd.graph.saved_tensors_hooks(note, lambda nothing: nothing):
        last = torch.zeros_like(batch["keep"])
        last[0, -1] = True
        inputs = inputs_of(batch, model.device)
        model(**inputs, use_cache=False, **({"logits_to_keep": last.to(model.device)} if "logits_to_keep" in arguments_of(model) else {}))
    model.train(was_training)
    return sum({storage.data_ptr(): storage.nbytes() for storage in kept if storage.data_ptr() not in owned}.values())
