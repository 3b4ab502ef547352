"""Published measurements, and what the planner says of the same set-ups. Run by test_plan.py, which prints them and holds docs/planner.md to them.

Models are public facts: the sizes in their config.json on the Hugging Face hub. MiB where a source's "MB" can only be MiB: AXERA's documents give
Qwen3-0.6B's embedding file of 151,936 x 1,024 x 2 bytes as 297 MB.
"""

import functools
import statistics
from dataclasses import dataclass

import numpy as np

from src.core import compose
from src.settings.targets import Board, Target
from src.settings.verbs import Gpu, PlanVerb
from src.sizing import budget, speed
from src.sizing.budget import format_of
from src.sizing.config_reader import shape_of
from src.sizing.gpu import Job, Widths, training
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
    "Qwen2.5-3B": model("qwen2", 2048, 11008, 36, 16, 2, 151936, tied=True),
    "Qwen2.5-7B": model("qwen2", 3584, 18944, 28, 28, 4, 152064, tied=False),
    "Qwen3-0.6B": model("qwen3", 1024, 3072, 28, 16, 8, 151936, tied=True, head_dim=128),
    "Qwen3-1.7B": model("qwen3", 2048, 6144, 28, 16, 8, 151936, tied=True, head_dim=128),
    "MiniCPM-1.2B": model("minicpm", 1536, 3840, 52, 24, 8, 73440, tied=True),
    "MiniCPM-2.4B": model("minicpm", 2304, 5760, 40, 36, 36, 122753, tied=True),
    "Phi-2": model("phi", 2560, 10240, 32, 32, 32, 51200, tied=False),
    "Phi-3-mini": model("phi3", 3072, 8192, 32, 32, 32, 32064, tied=False),
    "Llama-2-7B": model("llama", 4096, 11008, 32, 32, 32, 32000, tied=False),
    "Llama-2-13B": model("llama", 5120, 13824, 40, 40, 40, 32000, tied=False),
    "Llama-3-8B": model("llama", 4096, 14336, 32, 32, 8, 128256, tied=False),
    "Llama-3.1-8B": model("llama", 4096, 14336, 32, 32, 8, 128256, tied=False),
    "Llama-3.2-1B": model("llama", 2048, 8192, 16, 32, 8, 128256, tied=True, head_dim=64),
    "Llama-3.2-3B": model("llama", 3072, 8192, 28, 24, 8, 128256, tied=True, head_dim=128),
    "SmolLM2-135M": model("llama", 576, 1536, 30, 9, 3, 49152, tied=True, head_dim=64),
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


# ---- boards. (model, tokens per second), and (model, milliseconds to the first token) of a prompt of one chunk of 128.

# ax-llm, benchmark/LLM_Benchmark_AX650N.md and ..._AX630C.md: Pulsar2 3.2, s8. Its documents build with --kv_cache_len 1023.
AX650 = ("target=ax650", "target.weight_type=s8", "target.context_len=1024", "target.prompt_len=128")
AX650_DECODE = [
    ("TinyLlama-1.1B", 16.5),
    ("Qwen1.5-0.5B", 28),
    ("Qwen1.5-1.8B", 9),
    ("Qwen1.5-4B", 4.2),
    ("Qwen2-0.5B", 29),
    ("Qwen2-1.5B", 11.2),
    ("Qwen2.5-0.5B", 32),
    ("Qwen2.5-1.5B", 11.5),
    ("Qwen2.5-3B", 5.8),
    ("MiniCPM-1.2B", 11.3),
    ("MiniCPM-2.4B", 6),
    ("Phi-2", 6.6),
    ("Phi-3-mini", 4.5),
    ("Llama-2-7B", 2.7),
    ("Llama-3-8B", 2.5),
    ("Llama-3.2-1B", 14.2),
    ("Llama-3.2-3B", 5.5),
]
AX650_FIRST = [
    ("Qwen2-0.5B", 122),
    ("Qwen2.5-0.5B", 124),
    ("Qwen2.5-1.5B", 230),
    ("Qwen2.5-3B", 420),
    ("Llama-3.2-1B", 183),
    ("Llama-3.2-3B", 450),
    ("Llama-3-8B", 880),
    ("Phi-3-mini", 580),
    ("TinyLlama-1.1B", 200),
    ("MiniCPM-1.2B", 350),
]
AX630C = ("target=ax630c", "target.weight_type=s8", "target.context_len=1024", "target.prompt_len=128")
AX630C_DECODE = [("TinyLlama-1.1B", 5.4), ("Qwen2-0.5B", 10.7), ("Qwen2-1.5B", 3.7), ("MiniCPM-1.2B", 3.9), ("Llama-3.2-1B", 4.5)]
AX630C_FIRST = [("TinyLlama-1.1B", 880), ("Qwen2-0.5B", 360), ("Qwen2-1.5B", 1080), ("MiniCPM-1.2B", 1100), ("Llama-3.2-1B", 880)]
# Advantech-EdgeSync-Containers/Mobilint-NPU, PERFORMANCE_REPORT.md: 240 tokens in, 10 out. It does not say the weights' bits; w8 is assumed.
ARIES = ("target=mobilint_aries", "target.weight_type=w8")
ARIES_IN, ARIES_MEAN = 240, 245
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
ARIES_DECODE = [(name, rate) for name, _, rate in ARIES_ROWS]
ARIES_FIRST = [(name, ms) for name, ms, _ in ARIES_ROWS]
FITTED = {
    "ax650": (AX650, AX650_DECODE, 1024, AX650_FIRST, 128),
    "ax630c": (AX630C, AX630C_DECODE, 1024, AX630C_FIRST, 128),
    "mobilint_aries": (ARIES, ARIES_DECODE, ARIES_MEAN, ARIES_FIRST, ARIES_IN),
}
# Measurements the boards' figures were not fitted to: model, what the build was, tokens/s, then (prompt, ms to the first token) where it is known.
# AXERA's documents and model cards; the M5Stack card is an AX8850 on PCIe. Where a build's context is not published the target's own is taken.
LATER = [
    ("Qwen2.5-0.5B-GPTQ-Int8", ("target=ax650", "target.context_len=1024", "target.prompt_len=512"), 34.04, (128, 135.7)),
    ("Qwen3-0.6B", ("target=ax650", "target.context_len=2560"), 15.68, (128, 173.7)),
    ("Qwen2.5-7B", ("target=ax650", "target.weight_type=s8"), 2.6, None),
    ("Qwen2.5-7B", ("target=ax650", "target.weight_type=s4"), 4.8, None),
    ("HY-MT1.5-1.8B-GPTQ-Int4", ("target=ax650",), 15.7, (1024, 1514)),
    ("HY-MT1.5-1.8B-GPTQ-Int4", ("target=ax630c",), 4.05, (512, 11538)),
    ("Qwen3-0.6B", ("target=ax650", "target.name=m5_llm8850"), 12.88, None),
    ("Qwen3-1.7B", ("target=ax650", "target.name=m5_llm8850"), 7.38, None),
    ("Qwen2.5-0.5B-GPTQ-Int4", ("target=ax650", "target.name=m5_llm8850"), 27.05, None),
    ("Qwen2.5-1.5B-GPTQ-Int4", ("target=ax650", "target.name=m5_llm8850"), 15.06, None),
]


def decode_rate(name: str, build: Target, context: int, board: Board | None = None) -> float:
    shape = MODELS[name]
    return 1000 / speed.decode_ms(shape, format_of(shape, build), board or build.board, context)


def first_token(name: str, build: Target, prompt: int, board: Board | None = None) -> float:
    shape = MODELS[name]
    return speed.first_token_ms(shape, format_of(shape, build), board or build.board, prompt)


def decode_rows(board: str) -> list[Row]:
    overrides, rows, context, _, _ = FITTED[board]
    return [Row(name, rate, decode_rate(name, target(*overrides), context), "tokens/s") for name, rate in rows]


def first_rows(board: str) -> list[Row]:
    overrides, _, _, rows, prompt = FITTED[board]
    return [Row(name, ms, first_token(name, target(*overrides), prompt), "ms") for name, ms in rows]


def later_rows() -> list[Row]:
    rows = []
    for name, overrides, rate, first in LATER:
        build = target(*overrides)
        what = f"{name} {format_of(MODELS[name], build).name}, {build.name}, context {build.context_len:,}"
        rows.append(Row(what, rate, decode_rate(name, build, build.context_len), "tokens/s"))
        if first:
            rows.append(Row(f"{what}, prompt {first[0]:,}", first[1], first_token(name, build, first[0]), "ms"))
    return rows


def fit(board: str) -> dict[str, float]:
    """The board's four figures by least squares of the relative errors of its rows: both times are linear in the figures or their inverses."""
    overrides, decode, context, first, prompt = FITTED[board]
    build = target(*overrides)
    probe = lambda **values: Board(**{**dict.fromkeys(Board.model_fields), "tera_ops": 1e9, "bandwidth": 1e12, **values})
    small = {"layer_ms": 0, "prefill_layer_ms": 0}

    def solve(rows, time, *probes, less=0.0):
        y = np.array([ms for _, ms in rows])
        x = np.array([[time(name, probe(**{**small, **p})) for p in probes] for name, _ in rows])
        fixed = np.array([less and time(name, probe(**small, bandwidth=less)) for name, _ in rows])
        found = np.linalg.lstsq(x / y[:, None], (y - fixed) / y, rcond=None)[0]
        if (found < 0).any():  # a cost below nothing is none
            keep = found > 0
            found = np.where(keep, 0, 0.0)
            found[keep] = np.linalg.lstsq(x[:, keep] / y[:, None], (y - fixed) / y, rcond=None)[0]
        return found

    ms = [(name, 1000 / rate) for name, rate in decode]
    layer, per_gb = solve(ms, lambda n, b: 1000 / decode_rate(n, build, context, b), {"layer_ms": 1}, {"bandwidth": 1})
    prefill, per_top = solve(
        first, lambda n, b: first_token(n, build, prompt, b), {"prefill_layer_ms": 1}, {"tera_ops": 1}, less=1 / per_gb
    )
    return {"bandwidth": 1 / per_gb, "layer_ms": layer, "prefill_layer_ms": prefill, "tera_ops": 1 / per_top}


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


# ---- tables, as docs/planner.md shows them


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def markdown(rows: list[Row]) -> str:
    lines = ["| what | published | planned | error |", "|---|---:|---:|---:|"]
    lines += [f"| {r.what} | {shown(r.published)} {r.unit} | {shown(r.planned)} {r.unit} | {r.error:+.0%} |" for r in rows]
    return "\n".join([*lines, "", summary(rows)])


def summary(rows: list[Row]) -> str:
    return f"Median error {median(rows):.1%}, worst {worst(rows):.0%}, {len(rows)} rows."


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
    for board, name in (("ax650", "AX650N"), ("ax630c", "AX630C"), ("mobilint_aries", "Mobilint ARIES")):
        found[f"{name}: decoding"] = markdown(decode_rows(board))
        found[f"{name}: time to first token"] = markdown(first_rows(board))
    found["AXERA, builds the figures were not fitted to"] = markdown(later_rows())
    found["AX650: one layer of SmolLM2-135M"] = markdown(layer_rows())
    found["AXERA: files and device memory"] = markdown(size_rows())
    found["KV cache"] = markdown(kv_rows())
    found["Training: the Qwen-1 README"] = training_markdown(training_rows())
    return found
