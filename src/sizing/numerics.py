"""The formats a board computes in: of its weights, embedding, output layer, hidden states and KV cache, for each target and each type of its weights.

What `budget.Format` counts in bytes, as values. Sources: Pulsar2's and Mobilint's documents and helper scripts, reports on their boards, NNCF 3.4.0 and
OpenVINO 2026.4.1 as they stand, llama2.c's runq.c and our run.c. What a vendor does not publish is assumed, and each such assumption is a sentence in `assumed`.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import TypeAdapter

from src.core import compose
from src.core.errors import ConfigError, WrongKind
from src.settings.targets import AnyTarget, Axera, Gguf, Llama2c, Mobilint, Openvino, Target
from src.sizing import takes
from src.sizing.budget import axera_weights
from src.sizing.shape import ModelShape

ALL = "all"


@dataclass(frozen=True)
class Integers:
    """Values as integers of so many bits, times a scale for each `group` of a row's values; -1: a scale for the row.

    levels: symmetric, the largest value of either sign at the largest integer; signed, the same at the one integer that is further from zero, by a
    scale of its sign; asymmetric, from the smallest to the largest value, zero among them. scale: the scales' dtype. search: of several smaller scales
    the one with the least squared error.
    """

    bits: int
    group: int = -1
    levels: Literal["symmetric", "signed", "asymmetric"] = "symmetric"
    scale: Literal["fp32", "fp16"] = "fp32"
    search: bool = False

    def __str__(self) -> str:
        return f"int{self.bits}, {self.levels}, a scale for each {'row' if self.group == -1 else self.group}"


@dataclass(frozen=True)
class Floats:
    """Values in a float dtype. cut: the bits that do not fit are cut off, not rounded. scaled: by row, the largest value at the dtype's largest."""

    dtype: Literal["fp32", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2"]
    cut: bool = False
    scaled: bool = False

    def __str__(self) -> str:
        return self.dtype + (", cut off" if self.cut else "") + (", a scale for each row" if self.scaled else "")


Values = Integers | Floats
FP32, BF16, FP16 = Floats("fp32"), Floats("bf16"), Floats("fp16")


@dataclass(frozen=True)
class Numerics:
    """name: as in numerics=ax650_s8. weights: of the layers' matrices; None: as they are stored. apart: of those whose names end so, others. hidden: what
    every product, norm and activation gives, and their inputs, the sums themselves being fp32. inputs: what a matrix multiplies. kv: of keys and values. logits: what
    the output layer gives.
    assumed: what no document says, a sentence each."""

    name: str
    target: Target
    weights: Values | None
    apart: dict[str, Values]
    embedding: Values
    head: Values
    hidden: Floats
    inputs: Values
    kv: Values
    logits: Floats
    assumed: tuple[str, ...]

    def of_weight(self, name: str) -> Values | None:
        """The format of a matrix in a layer, by its name in the folder."""
        module = name.removesuffix(".weight").rpartition(".")[2]
        return self.apart.get(module, self.weights)

    def words(self) -> dict[str, str]:
        """Each part's format, for the report."""
        parts = {"weights": self.weights or "as stored", **self.apart, "embedding": self.embedding, "output layer": self.head}
        return {
            name: str(values)
            for name, values in {
                **parts,
                "hidden states": self.hidden,
                "inputs": self.inputs,
                "KV cache": self.kv,
                "logits": self.logits,
            }.items()
        }


def of(shape: ModelShape, target: Target) -> Numerics:
    """What the target, with its settings as they stand, computes this model in. Raises ConfigError for a kind of which nothing is known."""
    if found := KINDS.get(type(target)):
        return found(shape, target)
    raise ConfigError(f"nothing is known of the numbers that target={target.name} computes in")


SUMS = "Sums are taken in fp32, and what comes out of each product, norm and activation is rounded to the type of the hidden states, to the nearest."


def _axera(shape: ModelShape, target: Axera) -> Numerics:
    """Weight only, as measured on boards: inputs, outputs and KV cache have the hidden type. The embedding is what AXERA's fp32_to_bf16 makes of it."""
    name, stored = axera_weights(shape, target.weight_type), axera_weights(shape, "auto")
    if shape.quantization and name != stored:
        raise WrongKind(
            f"the model is GPTQ int{shape.quantization.bits} already, which {target.name}_{name} is not",
            fix=f"numerics={target.name}_{stored}",
        )
    hidden = Floats(target.hidden_type)
    group = 128 if not takes.undivided(shape, 128) else -1
    types: dict[str, Values] = {"s8": Integers(8), "s4": Integers(4, group)}
    assumed = [] if hidden == FP32 else [SUMS]
    if shape.quantization:
        assumed += ["The GPTQ model's own integers and scales are computed with as they are."]
    elif name == "s4":
        each = (
            "128 weights, as GPTQ models have; one for a whole row would lose more"
            if group == 128
            else "row, since 128 does not divide every row"
        )
        assumed += [f"s4 rounds to the nearest by a symmetric scale for each {each}."]
    elif name == "s8":
        assumed += ["s8 has a symmetric scale for each output channel, and rounds to the nearest."]
    elif name.startswith("fp8"):
        assumed += ["fp8 weights have a scale for each output channel, which brings the largest to fp8's largest."]
    if target.post_weight_type == "s8":
        assumed += ["The output layer's s8 is that of the layers' weights."]
    return Numerics(
        name=f"{target.name}_{name}",
        target=target,
        weights=None if shape.quantization else types.get(name) or _float(name),
        apart={},
        embedding=Floats("bf16", cut=True),
        head=types.get(target.post_weight_type) or _float(target.post_weight_type),
        hidden=hidden,
        inputs=hidden,
        kv=hidden,
        logits=hidden,
        assumed=tuple(assumed),
    )


def _float(name: Any) -> Floats:
    return Floats(name, scaled=name.startswith("fp8"))


def _mobilint(shape: ModelShape, target: Mobilint) -> Numerics:
    """Bits by matrix as its scripts set them; with 4 bits it searches each scale, and the embedding is turned and stored in bf16."""
    bits, value = {"w8": (8, 8), "w4v8": (4, 8), "w4": (4, 4)}[target.weight_type]
    kind = lambda bits: Integers(bits, search=bits == 4)
    return Numerics(
        name=f"{target.name}_{target.weight_type}",
        target=target,
        weights=kind(bits),
        apart={"v_proj": kind(value)} if value != bits else {},
        embedding=FP32 if bits == 8 else BF16,
        head=kind(bits),
        hidden=FP16,
        inputs=FP16,
        kv=FP16,
        logits=FP32,
        assumed=(
            "Weights have a symmetric scale for each output channel.",
            "Hidden states, products and KV cache are fp16; the board's are integers by calibrated ranges of unpublished width, and may lose more.",
            "The compiler's turning and scaling of weights (SpinR1 and the others) is left out; with it 4 bits may lose less.",
        ),
    )


def _openvino(shape: ModelShape, target: Openvino) -> Numerics:
    """As NNCF compresses: int8 between the smallest and largest of a row (symmetric for an NPU), int4 with a signed scale; embedding and output layer stay
    int8 there. A CPU's plugin computes in bf16 where it can, rounds what matrices multiply, and keeps keys and values in 8 bits
    for each token and head."""
    wide = Integers(8, -1, "signed" if target.device == "NPU" and target.weight_type == "int8" else "asymmetric", "fp16")
    group, _ = takes.openvino_group(shape, target)
    cpu = target.device == "CPU"
    hidden = BF16 if cpu else FP16
    return Numerics(
        name=f"{target.name}_{target.weight_type}",
        target=target,
        weights=wide if group is None else Integers(4, group, "signed", "fp16"),
        apart={},
        embedding=wide,
        head=wide,
        hidden=hidden,
        inputs=Integers(8, 32) if cpu and not takes.undivided(shape, 32) else hidden,
        kv=Integers(8, -1, "asymmetric") if cpu else FP16,
        logits=hidden,
        assumed=(
            (
                SUMS,
                "Hidden states are bf16, and what a matrix multiplies is int8 in groups of 32, as on a processor with AVX512-BF16; others may do without either.",
            )
            if cpu
            else (SUMS, "Hidden states and KV cache are fp16 on an NPU.")
        ),
    )


def llama2c_integers(bits: int, group: int) -> Integers:
    """8 bits are runq.c's, also of what matrices multiply; 4 bits by the best of several scales."""
    return Integers(8, group) if bits == 8 else Integers(4, group, "signed", search=True)


def _llama2c(shape: ModelShape, target: Llama2c) -> Numerics:
    """Integers: weights and what they multiply by groups, embedding and output layer of 8 bits at least, all else fp32. The other formats are fp32 throughout."""
    _, bits = takes.llama2c_form(target.format)
    name = f"{target.name}_{target.format}"
    if bits == 32:
        return Numerics(name, target, FP32, {}, FP32, FP32, FP32, FP32, FP32, FP32, ())
    wanted = (shape.quantization and shape.quantization.group_size) or target.group_size
    group = takes.llama2c_group(wanted, shape.hidden, shape.intermediate, shape.heads * shape.head_dim)
    eight = llama2c_integers(8, group)
    return Numerics(
        name, target, None if shape.quantization else llama2c_integers(bits, group), {}, eight, eight, FP32, eight, FP32, FP32, ()
    )


GGUF_BLOCKS: dict[str, Values] = {
    **{"f32": FP32, "f16": FP16, "bf16": BF16, "q8_0": Integers(8, 32, "symmetric", "fp16")},
    **{"q5_0": Integers(5, 32, "signed", "fp16"), "q4_0": Integers(4, 32, "signed", "fp16")},
}
"""llama.cpp's types of weights, of those whose blocks are integers and a scale (ggml-quants.c: quantize_row_q8_0_ref, q5_0, q4_0)"""


def _gguf(shape: ModelShape, target: Gguf) -> Numerics:
    """As llama.cpp computes on a CPU: what a matrix of integers multiplies is rounded to q8_0, all else fp32; below 8 bits the output layer is q8_0."""
    weights, eight = GGUF_BLOCKS[target.weight_type], GGUF_BLOCKS["q8_0"]
    in_blocks = isinstance(weights, Integers)
    if odd := takes.undivided(shape, 32) if in_blocks else []:
        raise WrongKind(f"blocks of 32 do not divide the model's rows of {', '.join(map(str, odd))}", fix=f"numerics={target.name}_f16")
    head = eight if in_blocks else weights
    return Numerics(
        name=f"{target.name}_{target.weight_type}" + (f"_kv_{target.kv_cache}" if target.kv_cache != "f16" else ""),
        target=target,
        weights=weights,
        apart={},
        embedding=head if shape.tied else weights,
        head=head,
        hidden=FP32,
        inputs=eight if in_blocks else FP32,
        kv=GGUF_BLOCKS[target.kv_cache],
        logits=FP32,
        assumed=(),
    )


KINDS: dict[type[Target], Callable[[ModelShape, Any], Numerics]] = {
    Axera: _axera,
    Mobilint: _mobilint,
    Openvino: _openvino,
    Llama2c: _llama2c,
    Gguf: _gguf,
}
"""each function takes the settings it stands under"""


# ---- by name


def named() -> dict[str, Target]:
    """{name, such as ax650_s8: the target that it stands for} of every target in configs/target and each type that its weights can be given."""
    read = TypeAdapter[Target](AnyTarget).validate_python
    found: dict[str, Target] = {}
    for target in map(read, compose.options("target").values()):
        setting = "format" if isinstance(target, Llama2c) else "weight_type"
        types = get_args(type(target).model_fields[setting].annotation) if type(target) in KINDS else ()
        if isinstance(target, Gguf):
            types = tuple(GGUF_BLOCKS)
        found |= {f"{target.name}_{each}": target.model_copy(update={setting: each}) for each in types if each != "auto"}
        if isinstance(target, Gguf):
            eight = {"kv_cache": "q8_0"}
            found |= {f"{target.name}_{each}_kv_q8_0": target.model_copy(update={setting: each, **eight}) for each in types}
    return found


def chosen(names: list[str], targets: list[str] | None) -> dict[str, Target]:
    """What is meant by these names, `all` standing for every one of `targets`, or of all there are. Raises ConfigError for a name that is none."""
    known = named()
    boards = {target.name for target in known.values()}
    for name in targets or ():
        _known(f"target={name}", name, boards)
    found: dict[str, Target] = {}
    for name in names:
        if name == ALL:
            found |= {each: target for each, target in known.items() if not targets or target.name in targets}
        else:
            _known(f"numerics={name}", name, {*known, ALL})
            found[name] = known[name]
    return found


def _known(typed: str, name: str, options: set[str]) -> None:
    if name not in options:
        near = difflib.get_close_matches(name, sorted(options), 1, 0.4)
        raise ConfigError(
            f"{typed}: there is no such one; there is {', '.join(sorted(options))}",
            fix=f"{typed.partition('=')[0]}={near[0]}" if near else (),
        )
