"""Published measurements, and what the planner says of the same set-ups. Run by test_plan.py, which prints them and holds docs/planner.md to them.

Models are public facts: the sizes in their config.json on the Hugging Face hub. MiB where a source's "MB" can only be MiB: AXERA's documents give
Qwen3-0.6B's embedding file of 151,936 x 1,024 x 2 bytes as 297 MB.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from src.core import compose
from src.settings.targets import Board, Target
from src.settings.verbs import Gpu, PlanVerb
from src.sizing import budget, speed
from src.sizing.budget import format_of
from src.sizing.config_reader import shape_of
from src.sizing.gpu import ADAPTERS, Job, Widths, training
from src.sizing.shape import ModelShape

MIB = 2**20


def model(kind: str, hidden: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, *, tied: bool, **more) -> ModelShape:
    sizes = {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }
    return shape_of(sizes | more, kind)


GPTQ4 = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}}
GPTQ8 = {"quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": 128, "sym": True, "desc_act": False}}
QWEN2_05B = ("qwen2", 896, 4864, 24, 14, 2, 151936)
QWEN2_15B = ("qwen2", 1536, 8960, 28, 12, 2, 151936)
EXAONE_24B = ("exaone", 2560, 7168, 30, 32, 8, 102400)
HUNYUAN_18B = ("hunyuan_v1_dense", 2048, 6144, 32, 16, 4, 120818)
MODELS = {
    "TinyLlama-1.1B": model("llama", 2048, 5632, 22, 32, 4, 32000, tied=False),
    "Qwen1.5-0.5B": model("qwen2", 1024, 2816, 24, 16, 16, 151936, tied=True),
    "Qwen1.5-1.8B": model("qwen2", 2048, 5504, 24, 16, 16, 151936, tied=False),
    "Qwen1.5-4B": model("qwen2", 2560, 6912, 40, 20, 20, 151936, tied=False),
    "Qwen2-0.5B": model(*QWEN2_05B, tied=True),
    "Qwen2-1.5B": model(*QWEN2_15B, tied=True),
    "Qwen2.5-0.5B": model(*QWEN2_05B, tied=True),
    "Qwen2.5-0.5B-GPTQ-Int8": model(*QWEN2_05B, tied=True, **GPTQ8),
    "Qwen2.5-0.5B-GPTQ-Int4": model(*QWEN2_05B, tied=True, **GPTQ4),
    "Qwen2.5-1.5B": model(*QWEN2_15B, tied=True),
    "Qwen2.5-1.5B-GPTQ-Int4": model(*QWEN2_15B, tied=True, **GPTQ4),
    "DeepSeek-R1-1.5B": model(*QWEN2_15B, tied=False),
    "DeepSeek-R1-1.5B-GPTQ-Int4": model(*QWEN2_15B, tied=False, **GPTQ4),
    "Qwen2.5-3B": model("qwen2", 2048, 11008, 36, 16, 2, 151936, tied=True),
    "Qwen2.5-3B-GPTQ-Int4": model("qwen2", 2048, 11008, 36, 16, 2, 151936, tied=True, **GPTQ4),
    "Qwen2.5-7B": model("qwen2", 3584, 18944, 28, 28, 4, 152064, tied=False),
    "Qwen2.5-7B-GPTQ-Int4": model("qwen2", 3584, 18944, 28, 28, 4, 152064, tied=False, **GPTQ4),
    "Qwen3-0.6B": model("qwen3", 1024, 3072, 28, 16, 8, 151936, tied=True, head_dim=128),
    "Qwen3-1.7B": model("qwen3", 2048, 6144, 28, 16, 8, 151936, tied=True, head_dim=128),
    "MiniCPM-1.2B": model("minicpm", 1536, 3840, 52, 24, 8, 73440, tied=True),
    "MiniCPM-2.4B": model("minicpm", 2304, 5760, 40, 36, 36, 122753, tied=True),
    "MiniCPM4-0.5B": model("minicpm", 1024, 4096, 24, 16, 2, 73448, tied=True),
    "Phi-2": model("phi", 2560, 10240, 32, 32, 32, 51200, tied=False),
    "Phi-3-mini": model("phi3", 3072, 8192, 32, 32, 32, 32064, tied=False),
    "Llama-2-7B": model("llama", 4096, 11008, 32, 32, 32, 32000, tied=False),
    "Llama-2-13B": model("llama", 5120, 13824, 40, 40, 40, 32000, tied=False),
    "Llama-3-8B": model("llama", 4096, 14336, 32, 32, 8, 128256, tied=False),
    "Llama-3.1-8B": model("llama", 4096, 14336, 32, 32, 8, 128256, tied=False),
    "Llama-3.2-1B": model("llama", 2048, 8192, 16, 32, 8, 128256, tied=True, head_dim=64),
    "Llama-3.2-3B": model("llama", 3072, 8192, 28, 24, 8, 128256, tied=True, head_dim=128),
    "SmolLM2-135M": model("llama", 576, 1536, 30, 9, 3, 49152, tied=True, head_dim=64),
    "SmolLM2-360M": model("llama", 960, 2560, 32, 15, 5, 49152, tied=True, head_dim=64),
    "HY-MT1.5-1.8B-GPTQ-Int4": model(*HUNYUAN_18B, tied=True, head_dim=128, **GPTQ4),
    "command-r7b": model("cohere2", 4096, 14336, 32, 32, 8, 256000, tied=True),
    "EXAONE-3.5-2.4B": model(*EXAONE_24B, tied=True, head_dim=80),
    "EXAONE-Deep-2.4B": model(*EXAONE_24B, tied=True, head_dim=80),
    "EXAONE-4.0-1.2B": model("exaone4", 2048, 4096, 30, 32, 8, 102400, tied=True, head_dim=64),
    "HyperCLOVAX-SEED-1.5B": model("llama", 2048, 7168, 24, 16, 8, 110592, tied=True, head_dim=128),
    "Qwen-1.8B": model("qwen", 2048, 11008, 24, 16, 16, 151936, tied=False),
    "Qwen-7B": model("qwen", 4096, 22016, 32, 32, 32, 151936, tied=False),
    "Qwen-14B": model("qwen", 5120, 27392, 40, 40, 40, 152064, tied=False),
    "Qwen-72B": model("qwen", 8192, 49152, 80, 64, 64, 152064, tied=False),
}


@dataclass(frozen=True)
class Row:
    """One measurement beside the planner's figure for it."""

    what: str
    published: float
    planned: float
    unit: str

    @property
    def error(self) -> float:
        return self.planned / self.published - 1


def median(rows: list[Row]) -> float:
    return statistics.median(abs(row.error) for row in rows)


def worst(rows: list[Row]) -> float:
    return max(abs(row.error) for row in rows)


@functools.cache
def target(*overrides: str) -> Target:
    return compose.compose("plan", ["model=x", *overrides], PlanVerb).target


# ---- boards


class Decode(NamedTuple):
    """A speed: model, type of its weights, tokens the KV cache has room for, tokens per second."""

    model: str
    weight: str
    context: int
    rate: float


class First(NamedTuple):
    """A time to the first token: model, type of its weights, tokens of a chunk and of the prompt, tokens before it, milliseconds.

    before: the chunk ran in a graph with room for so many, filled or not, after a system prompt.
    """

    model: str
    weight: str
    chunk: int
    prompt: int
    before: int
    ms: float


def first(rows: list[tuple[str, float]], weight: str = "s8") -> list[First]:
    return [First(name, weight, 128, 128, 0, ms) for name, ms in rows]


# ax-llm, benchmark/LLM_Benchmark_AX650N.md and ..._AX630C.md: Pulsar2 3.2, s8. Its documents build with --kv_cache_len 1023.
AX650_32 = {
    "TinyLlama-1.1B": 16.5, "Qwen1.5-0.5B": 28, "Qwen1.5-1.8B": 9, "Qwen1.5-4B": 4.2, "Qwen2-0.5B": 29, "Qwen2-1.5B": 11.2, "Qwen2.5-0.5B": 32,
    "Qwen2.5-1.5B": 11.5, "Qwen2.5-3B": 5.8, "MiniCPM-1.2B": 11.3, "MiniCPM-2.4B": 6, "Phi-2": 6.6, "Phi-3-mini": 4.5, "Llama-2-7B": 2.7,
    "Llama-3-8B": 2.5, "Llama-3.2-1B": 14.2, "Llama-3.2-3B": 5.5,
}  # fmt: skip
AX650_32_FIRST = {
    "Qwen2-0.5B": 122, "Qwen2.5-0.5B": 124, "Qwen2.5-1.5B": 230, "Qwen2.5-3B": 420, "Llama-3.2-1B": 183, "Llama-3.2-3B": 450, "Llama-3-8B": 880,
    "Phi-3-mini": 580, "TinyLlama-1.1B": 200, "MiniCPM-1.2B": 350,
}  # fmt: skip
AX630C_32 = {"TinyLlama-1.1B": 5.4, "Qwen2-0.5B": 10.7, "Qwen2-1.5B": 3.7, "MiniCPM-1.2B": 3.9, "Llama-3.2-1B": 4.5}
AX630C_32_FIRST = {"TinyLlama-1.1B": 880, "Qwen2-0.5B": 360, "Qwen2-1.5B": 1080, "MiniCPM-1.2B": 1100, "Llama-3.2-1B": 880}
AX650_DECODE = [
    *(Decode(name, "s8", 1024, rate) for name, rate in AX650_32.items()),
    # Pulsar2's documents 4.1 and 7.0; the card of AXERA-TECH/Qwen2.5-7B-Instruct-GPTQ-Int4.
    Decode("Qwen2.5-0.5B-GPTQ-Int8", "s8", 1024, 34.04),
    Decode("Qwen3-0.6B", "s8", 2560, 15.68),
    Decode("Qwen2.5-7B", "s8", 1024, 2.6),
    Decode("Qwen2.5-7B-GPTQ-Int4", "s4", 1024, 4.8),
    # m5stack/StackFlow, benchmark results of llm v1.8: an AX650C box (Pyramid), a Sipeed AX650N board; docs.m5stack.com for 9.46.
    Decode("Qwen2.5-0.5B-GPTQ-Int4", "s4", 1024, 40.01),
    Decode("Qwen2.5-1.5B-GPTQ-Int4", "s4", 1024, 17.62),
    Decode("Qwen2.5-3B-GPTQ-Int4", "s4", 1024, 9.79),
    Decode("DeepSeek-R1-1.5B-GPTQ-Int4", "s4", 1024, 18.31),
    Decode("Qwen2.5-3B-GPTQ-Int4", "s4", 1024, 9.46),
    Decode("Qwen2.5-0.5B-GPTQ-Int4", "s4", 1024, 42.34),
    Decode("Qwen2.5-1.5B-GPTQ-Int4", "s4", 1024, 18.31),
    Decode("Qwen2.5-3B-GPTQ-Int4", "s4", 1024, 9.73),
    Decode("Qwen2.5-7B-GPTQ-Int4", "s4", 1024, 4.54),
    Decode("DeepSeek-R1-1.5B-GPTQ-Int4", "s4", 1024, 18.37),
]
AX650_FIRST = [
    *first(list(AX650_32_FIRST.items())),
    *first([("Qwen2.5-0.5B-GPTQ-Int8", 135.7)]),
    *first([("Qwen2.5-0.5B-GPTQ-Int4", 136.65), ("Qwen2.5-1.5B-GPTQ-Int4", 285.93), ("Qwen2.5-3B-GPTQ-Int4", 546.34)], "s4"),
    *first([("DeepSeek-R1-1.5B-GPTQ-Int4", 281.88), ("Qwen2.5-3B-GPTQ-Int4", 550.3)], "s4"),
    *first([("Qwen2.5-0.5B-GPTQ-Int4", 134.49), ("Qwen2.5-1.5B-GPTQ-Int4", 282.07), ("Qwen2.5-3B-GPTQ-Int4", 543.67)], "s4"),
    *first([("Qwen2.5-7B-GPTQ-Int4", 1136.33), ("DeepSeek-R1-1.5B-GPTQ-Int4", 281.8)], "s4"),
]
# Those builds were made without FLOAT_MATMUL_USE_CONV_EU=1, which Pulsar2's recipe has since 5.2 and deploy sets: products with weights ran at these
# rates, fitted to them. The files in configs/target have the rates with it.
WITHOUT_EU = {"tera_ops": 2.28, "tera_ops_4bit": 1.8}
# AX630C: besides the benchmark above, docs.m5stack.com (stackflow/models) and StackFlow's results of llm v1.8: contexts of 1,024, prompts of one chunk.
# The page's row for Qwen3-0.6B repeats Qwen2.5-0.5B's and is left out. HY-MT1.5: the README of AXERA-TECH/HY-MT1.5-1.8B.axera.
AX630C_DECODE = [
    *(Decode(name, "s8", 1024, rate) for name, rate in AX630C_32.items()),
    Decode("Qwen2.5-0.5B", "s8", 1024, 10.32),
    Decode("Qwen2.5-1.5B", "s8", 1024, 3.59),
    Decode("DeepSeek-R1-1.5B", "s8", 1024, 3.57),
    Decode("Llama-3.2-1B", "s8", 1024, 4.48),
    Decode("Qwen2.5-0.5B-GPTQ-Int4", "s4", 1024, 12.52),
    Decode("Qwen2.5-1.5B-GPTQ-Int4", "s4", 1024, 4.63),
    Decode("HY-MT1.5-1.8B-GPTQ-Int4", "s4", 1024, 4.05),
]
AX630C_FIRST = [
    *first(list(AX630C_32_FIRST.items())),
    *first([("Qwen2.5-0.5B", 359.8), ("Qwen2.5-1.5B", 1029.41), ("DeepSeek-R1-1.5B", 1075.04), ("Llama-3.2-1B", 891)]),
    First("Qwen2.5-0.5B", "s8", 256, 256, 0, 1126.19),
    First("Qwen2.5-1.5B", "s8", 256, 256, 0, 3056.54),
    First("DeepSeek-R1-1.5B", "s8", 256, 256, 0, 3056.86),
    First("Llama-3.2-1B", "s8", 256, 256, 0, 2601.11),
    *first([("Qwen2.5-0.5B-GPTQ-Int4", 442.95), ("Qwen2.5-1.5B-GPTQ-Int4", 1219.54)], "s4"),
    # "Maximal TTFT" is the sum of all five prefill graphs: four chunks of history and one more.
    First("HY-MT1.5-1.8B-GPTQ-Int4", "s4", 128, 640, 0, 11538.6),
]
# Radxa's pages on the AX-M1, an AX8850 card in a ROCK 5B+ (radxa-docs/docs, docs/aicore/ax-m1/LLM); contexts by their logs.
AX_M1_DECODE = [
    Decode("Qwen2.5-1.5B", "s8", 2048, 8.89),
    Decode("Qwen2.5-1.5B-GPTQ-Int4", "s4", 2048, 11.27),
    Decode("Qwen3-1.7B", "s8", 2560, 7.3),
    Decode("MiniCPM4-0.5B", "s8", 1024, 17.86),
    Decode("SmolLM2-360M", "s8", 1024, 18.02),
    Decode("DeepSeek-R1-1.5B", "s8", 1024, 8.95),
    Decode("DeepSeek-R1-1.5B-GPTQ-Int4", "s4", 1024, 12.65),
    Decode("Qwen2.5-7B-GPTQ-Int4", "s4", 1024, 4.2),
]
# docs.m5stack.com on the LLM-8850, the same chip on a card in a Raspberry Pi 5. Qwen3's graphs have room for 512 tokens before a chunk.
LLM8850_DECODE = [
    Decode("Qwen3-0.6B", "s8", 2560, 12.88),
    Decode("Qwen3-1.7B", "s8", 2560, 7.38),
    Decode("MiniCPM4-0.5B", "s8", 1024, 21.05),
    Decode("Qwen2.5-0.5B-GPTQ-Int4", "s4", 1024, 27.05),
    Decode("Qwen2.5-1.5B-GPTQ-Int4", "s4", 1024, 15.06),
    Decode("DeepSeek-R1-1.5B-GPTQ-Int4", "s4", 1024, 13.29),
]
LLM8850_FIRST = [
    First("Qwen3-0.6B", "s8", 128, 128, 512, 670.51),
    First("Qwen3-1.7B", "s8", 128, 128, 512, 796.38),
    First("MiniCPM4-0.5B", "s8", 128, 128, 128, 212.91),
]
# Advantech-EdgeSync-Containers/Mobilint-NPU, PERFORMANCE_REPORT.md: 240 tokens in, 10 out. It does not say the weights' bits; w8 is assumed.
ARIES_ROWS = [
    ("command-r7b", 4667, 4.58),
    ("EXAONE-3.5-2.4B", 964, 14.23),
    ("EXAONE-4.0-1.2B", 329, 31.62),
    ("EXAONE-Deep-2.4B", 886, 13.03),
    ("HyperCLOVAX-SEED-1.5B", 436, 22.46),
    ("Llama-3.1-8B", 4431, 5.81),
    ("Llama-3.2-1B", 431, 30.73),
    ("Llama-3.2-3B", 1218, 12.16),
]
ARIES_DECODE = [Decode(name, "w8", 245, rate) for name, _, rate in ARIES_ROWS]
ARIES_FIRST = [First(name, "w8", 128, 240, 0, ms) for name, ms, _ in ARIES_ROWS]
# Sums of the graphs' own times on the NPU, without what a runtime adds to each (README of AXERA-TECH/HY-MT1.5-1.8B.axera; built with the setting above).
HY = "HY-MT1.5-1.8B-GPTQ-Int4"
HY_ALONE = {"layer_ms": 0, "prefill_layer_ms": 0}
HY_DECODE = [Decode(HY, "s4", 2048, 15.7)]
HY_GRAPHS = (4.039, 4.263, 4.533, 4.909, 5.338, 5.527, 5.822, 6.126, 6.369)
"""milliseconds a layer takes for a chunk of 128 tokens with 0, 128, ... 1,024 before it"""
HY_FIRST = [First(HY, "s4", 128, 1152, 0, 1514.3)]


@dataclass(frozen=True)
class Published:
    """What was published of one board. fitted_decode, fitted_first: the figures of its YAML that its rows give, in an order that is one of solving.

    change: figures of its YAML that are others for these builds, by name.
    """

    title: str
    target: str
    decode: list[Decode]
    first: list[First]
    fitted_decode: tuple[str, ...] = ()
    fitted_first: tuple[str, ...] = ()
    change: dict[str, float] = field(default_factory=dict)

    def board(self) -> Board:
        return target(f"target={self.target}").board.model_copy(update=self.change)


BOARDS = [
    Published(
        "AX650",
        "ax650",
        AX650_DECODE,
        AX650_FIRST,
        ("layer_ms", "bandwidth", "kv_bandwidth"),
        ("prefill_layer_ms", *WITHOUT_EU),
        WITHOUT_EU,
    ),
    Published("AX650 by its graphs alone", "ax650", HY_DECODE, HY_FIRST, change=HY_ALONE),
    Published(
        "AX630C",
        "ax630c",
        AX630C_DECODE,
        AX630C_FIRST,
        ("layer_ms", "bandwidth", "bandwidth_4bit"),
        ("tera_ops", "tera_ops_4bit", "attention_tera_ops", "spilled_tera_ops"),
    ),
    Published("AX8850 card in a ROCK 5B+", "ax_m1", AX_M1_DECODE, [], ("layer_ms",), change=WITHOUT_EU),
    Published(
        "AX8850 card in a Raspberry Pi 5",
        "llm8850",
        LLM8850_DECODE,
        LLM8850_FIRST,
        ("layer_ms",),
        ("prefill_layer_ms", "kv_copy"),
        WITHOUT_EU,
    ),
    Published("Mobilint ARIES", "mobilint_aries", ARIES_DECODE, ARIES_FIRST, ("layer_ms", "bandwidth"), ("prefill_layer_ms", "tera_ops")),
]


def built(of: Published, weight: str, context: int, chunk: int, prompt: int) -> Target:
    lengths = [f"target.context_len={max(context, prompt + 1)}"]
    if of.target != "mobilint_aries":
        lengths += [f"target.prefill_chunk={chunk}", f"target.prompt_len={prompt}"]
    return target(f"target={of.target}", f"target.weight_type={weight}", *lengths)


def decode_time(of: Published, row: Decode, board: Board) -> float:
    shape, build = MODELS[row.model], built(of, row.weight, row.context, 128, 128)
    return speed.decode_ms(shape, format_of(shape, build), rates(board), row.context)


def first_time(of: Published, row: First, board: Board) -> float:
    """A chunk after others is what a prompt takes longer with it than without; the output layer then comes once more."""
    shape, build = MODELS[row.model], built(of, row.weight, 4096, row.chunk, row.chunk)
    form, known = format_of(shape, build), rates(board)
    ms = lambda prompt: speed.first_token_ms(shape, form, known, prompt)
    if not row.before:
        return ms(row.prompt)
    return ms(row.before + row.prompt) - ms(row.before) + budget.head_bytes(shape, form) / known.bandwidth / 1e6


def rates(board: Board) -> speed.Rates:
    found = speed.rates_of(board)
    assert found is not None
    return found


def decode_rows(of: Published) -> list[Row]:
    board = of.board()
    named = lambda r: f"{r.model} {r.weight}, context {r.context:,}"
    return [Row(named(r), r.rate, 1000 / decode_time(of, r, board), "tokens/s") for r in of.decode]


def first_rows(of: Published) -> list[Row]:
    board = of.board()
    named = lambda r: f"{r.model} {r.weight}, {r.prompt:,} tokens" + (f" in chunks of {r.chunk}" if r.prompt > r.chunk else "")
    after = lambda r: f" after room for {r.before}" if r.before else ""
    return [Row(named(r) + after(r), r.ms, first_time(of, r, board), "ms") for r in of.first]


def fit(of: Published) -> dict[str, float]:
    """The board's figures as its rows give them. Both times are linear in milliseconds and in the inverses of rates; what is not fitted stands as it is."""
    decode = [(1000 / r.rate, functools.partial(decode_time, of, r)) for r in of.decode]
    first = [(r.ms, functools.partial(first_time, of, r)) for r in of.first]
    found = solve(decode, of.fitted_decode, of.board().model_copy(update={"tera_ops": 1e9}))  # one sequence waits for memory alone
    return found | solve(first, of.fitted_first, of.board().model_copy(update=found))


def solve(rows: list[tuple[float, Callable[[Board], float]]], names: tuple[str, ...], board: Board) -> dict[str, float]:
    """The figures called `names` by least squares of the rows' relative errors; none is below 0.

    rows: (published milliseconds, planned ones of a board).
    """
    if not names:
        return {}
    free = {name: 0.0 if name.endswith("_ms") else 1e15 for name in names}
    probe = lambda **values: board.model_copy(update={**free, **values})
    y = np.array([ms for ms, _ in rows])
    fixed = np.array([time(probe()) for _, time in rows])
    x = np.array([[time(probe(**{name: 1.0})) for name in names] for _, time in rows]) - fixed[:, None]
    x, z, keep = x / y[:, None], (y - fixed) / y, list(range(len(names)))
    while ((part := np.linalg.lstsq(x[:, keep], z, rcond=None)[0]) < 0).any():
        keep = [k for k, value in zip(keep, part) if value >= 0]  # a cost below nothing is none
    costs = dict.fromkeys(names, 0.0) | {names[k]: float(value) for k, value in zip(keep, part)}
    return {name: cost if name.endswith("_ms") else 1 / cost if cost else float("inf") for name, cost in costs.items()}


def fit_graphs() -> dict[str, float]:
    """ax650's rate of products and of attention by the prefill graphs of HY-MT1.5, whose times have no part of a runtime's."""
    shape = MODELS[HY]
    ops = np.array(
        [[2 * shape.matrix_params / shape.layers * 128, 4 * 128 * 128 * (i + 1) * shape.heads * shape.head_dim] for i in range(9)]
    )
    y = np.array(HY_GRAPHS)
    products, attention = np.linalg.lstsq(ops / 1e9 / y[:, None], np.ones(9), rcond=None)[0]
    return {"tera_ops": 1 / products, "attention_tera_ops": 1 / attention}


# ---- sizes: SmolLM2-135M and its layers (onnxsim PR #1240, built with 2 subgraphs a layer), Qwen3-0.6B's files and the memory of Qwen2.5-0.5B.


def size_rows() -> list[Row]:
    rows = []
    for weight, whole in (("s4", 98.2), ("s8", 152.7), ("fp16", 253.4)):
        shape, build = MODELS["SmolLM2-135M"], target("target=ax650", f"target.weight_type={weight}", "target.prompt_len=128")
        form = format_of(shape, build)
        planned = budget.layer_bytes(shape, form) + budget.graph_bytes(shape, form, 128) + budget.head_bytes(shape, form)
        rows.append(Row(f"SmolLM2-135M {weight}, all files", whole, planned / MIB, "MiB"))
    shape, build = MODELS["Qwen3-0.6B"], target("target=ax650", "target.prompt_len=2048", "target.context_len=2560")
    form = format_of(shape, build)
    layer = (budget.layer_bytes(shape, form) + budget.graph_bytes(shape, form, 2048)) / shape.layers
    rows += [
        Row("Qwen3-0.6B s8, a layer, prompt 2,048", 26, layer / MIB, "MiB"),
        Row("Qwen3-0.6B s8, output layer", 162, budget.head_bytes(shape, form) / MIB, "MiB"),
        Row("Qwen3-0.6B, embedding table", 297, budget.embedding_bytes(shape, form) / MIB, "MiB"),
    ]
    build = target("target=ax650")
    needed = budget.board_fit(MODELS["Qwen2.5-0.5B-GPTQ-Int4"], build).needed
    rows.append(Row("Qwen2.5-0.5B-GPTQ-Int4, device memory, prompt 1,024, context 2,048", 560, needed / MIB, "MiB"))
    return rows


def layer_rows() -> list[Row]:
    """Milliseconds a SmolLM2-135M layer decodes in (onnxsim PR #1240); its s4 weights have no group scales."""
    rows = []
    for weight, ms in (("s4", 0.441), ("s8", 0.485), ("fp16", 0.639)):
        shape, build = MODELS["SmolLM2-135M"], target("target=ax650", f"target.weight_type={weight}")
        form = format_of(shape, build)
        each = (budget.layer_bytes(shape, form) + budget.kv_cache_bytes(shape, form, 128)) / shape.layers
        rows.append(Row(f"SmolLM2-135M {weight}, a layer", ms, build.board.layer_ms + each / build.board.bandwidth / 1e6, "ms"))
    return rows


def kv_rows() -> list[Row]:
    """Qwen2-0.5B: an independent measurement of 12,167 to 12,307 B per token. Llama-2-13B: the formula's own result for 4,096 tokens."""
    return [
        Row("Qwen2-0.5B, per token", 12237, MODELS["Qwen2-0.5B"].kv_bytes_per_token(), "B"),
        Row("Llama-2-13B, 4,096 tokens", 3.125, MODELS["Llama-2-13B"].kv_bytes(4096) / 2**30, "GiB"),
    ]


# ---- training: the Qwen-1 README's table. A100-80G, batch 1, accumulation 8, FlashAttention 2; GB and seconds per optimizer step by length.

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
QWEN1 = {
    ("Qwen-1.8B", "LoRA", 1): "6.7 1.0  7.4 1.0  8.4 1.1  11.0 1.7  16.2 3.3  21.8 6.8",
    ("Qwen-1.8B", "LoRA (emb)", 1): "13.7 1.0  14.0 1.0  14.0 1.1  15.1 1.8  19.7 3.4  27.7 7.0",
    ("Qwen-1.8B", "Q-LoRA", 1): "5.8 1.4  6.0 1.4  6.6 1.4  7.8 2.0  10.2 3.4  15.8 6.5",
    ("Qwen-1.8B", "full", 1): "43.5 2.1  43.5 2.2  43.5 2.2  43.5 2.3  47.1 2.8  48.3 5.6",
    ("Qwen-7B", "LoRA", 1): "20.1 1.2  20.4 1.5  21.5 2.8  23.8 5.2  29.7 10.1  36.6 21.3",
    ("Qwen-7B", "LoRA (emb)", 1): "33.7 1.4  34.1 1.6  35.2 2.9  35.1 5.3  39.2 10.3  48.5 21.7",
    ("Qwen-7B", "Q-LoRA", 1): "11.5 3.0  11.5 3.0  12.3 3.5  13.9 7.0  16.9 11.6  23.5 22.3",
    ("Qwen-7B", "full", 2): "139.2 4.0  148.0 4.0  162.0 4.5",
    ("Qwen-14B", "LoRA", 1): "34.6 1.6  35.1 2.4  35.3 4.4  37.4 8.4  42.5 17.0  55.2 36.0",
    ("Qwen-14B", "Q-LoRA", 1): "18.7 5.3  18.4 6.3  18.9 8.2  19.9 11.8  23.0 20.1  27.9 38.3",
    ("Qwen-72B", "LoRA", 4): "215.4 17.6  217.7 20.5  222.6 29.4  228.8 45.7  249.0 83.4  289.2 161.5",
    ("Qwen-72B", "Q-LoRA", 1): "61.4 27.4  61.4 31.5  62.9 41.4  64.1 59.5  68.0 97.7  75.6 179.8",
}
# LoRA on one GPU: the Trainer alone, adapters and Adam in bf16, the loss autocast to fp32. All else: DeepSpeed, the loss in 16 bit.
ALONE = Widths(weight=2, gradient=2, states=4, step=3, logit=12)
DEEPSPEED = Widths(weight=2, gradient=2, states=12, step=4, logit=8)


def qwen1_job(method: str, gpus: int, length: int) -> Job:
    """The published recipe: rank 64 on every linear layer, gradient checkpointing, ZeRO-3 over several GPUs, ZeRO-2 for Q-LoRA and full."""
    alone = method.startswith("LoRA") and gpus == 1
    return Job(
        method=method,
        rank=0 if method == "full" else 64,
        targets=None,
        dropout=method != "full",
        base=2,
        quantized=0.5 + 2.5 / 128 if method == "Q-LoRA" else None,
        upcast=False,
        token_tables="emb" in method,
        stage=0 if alone else 3 if gpus > 1 else 2,
        offload=False,
        bucket=200_000_000,
        gpus=gpus,
        micro_batch=1,
        accumulation=8,
        length=length,
        checkpointing=True,
        widths=ALONE if alone else DEEPSPEED,
    )


def training_rows() -> list[tuple[str, str, int, Row, Row]]:
    """(model, method, length, memory of all GPUs in GB, seconds per step)."""
    a100: Gpu = compose.compose("plan", ["model=x", "gpu=a100_80g"], PlanVerb).gpu
    rows = []
    for (name, method, gpus), cells in QWEN1.items():
        numbers = [float(cell) for cell in cells.split()]
        for length, memory, seconds in zip(LENGTHS, numbers[::2], numbers[1::2]):
            found = training(MODELS[name], qwen1_job(method, gpus, length), a100)
            how = method + (f", {gpus} GPUs" if gpus > 1 else "")
            rows.append(
                (
                    name,
                    how,
                    length,
                    Row(f"{name} {how} {length}", memory, gpus * found.total.value / 1e9, "GB"),
                    Row(f"{name} {how} {length}", seconds, found.seconds.value, "s"),
                )
            )
    return rows


# LLaMA-Factory's wiki: Llama-2-7B, Q-LoRA of rank 8, batch 1, an A100 of 40 GB; whole GB. Its loader leaves the embedding and output layer in 16 bit.
WIKI = {1024: 6, 2048: 7, 4096: 9, 8192: 12, 16384: 19, 32768: 32}


def wiki_rows() -> list[Row]:
    a100: Gpu = compose.compose("plan", ["model=x", "gpu=a100_40g"], PlanVerb).gpu
    recipe = dataclasses.replace(
        qwen1_job("Q-LoRA", 1, 0), rank=8, dropout=False, quantized=0.5 + 1 / 64 + 4 / 16384, stage=0, widths=ADAPTERS
    )
    planned = lambda length: training(MODELS["Llama-2-7B"], dataclasses.replace(recipe, length=length), a100).total.value / 1e9
    return [Row(f"Llama-2-7B Q-LoRA, {length:,} tokens", gb, planned(length), "GB") for length, gb in WIKI.items()]


# ---- tables, as docs/planner.md shows them


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def markdown(rows: list[Row]) -> str:
    lines = ["| what | published | planned | error |", "|---|---:|---:|---:|"]
    lines += [f"| {r.what} | {shown(r.published)} {r.unit} | {shown(r.planned)} {r.unit} | {r.error:+.0%} |" for r in rows]
    return "\n".join([*lines, "", summary(rows)])


def summary(rows: list[Row]) -> str:
    return f"Median error {median(rows):.1%}, worst {worst(rows):.1%}, {len(rows)} rows."


def training_markdown(rows) -> str:
    lines = [
        "| model | method | tokens | published GB | planned | error | published s | planned | error |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, how, length, memory, seconds in rows:
        lines.append(
            f"| {name} | {how} | {length:,} | {memory.published:g} | {memory.planned:.1f} | {memory.error:+.0%} "
            f"| {seconds.published:g} | {seconds.planned:.1f} | {seconds.error:+.0%} |"
        )
    return "\n".join([*lines, "", f"Memory: {summary([r[3] for r in rows])} Seconds: {summary([r[4] for r in rows])}"])


def tables() -> dict[str, str]:
    """{heading: markdown} of everything compared."""
    found = {}
    for board in BOARDS:
        found |= {f"{board.title}: decoding": markdown(decode_rows(board))} if board.decode else {}
        found |= {f"{board.title}: time to first token": markdown(first_rows(board))} if board.first else {}
    found["AX650: one layer of SmolLM2-135M"] = markdown(layer_rows())
    found["AXERA: files and device memory"] = markdown(size_rows())
    found["KV cache"] = markdown(kv_rows())
    found["Training memory: LLaMA-Factory's wiki"] = markdown(wiki_rows())
    found["Training: the Qwen-1 README"] = training_markdown(training_rows())
    return found
