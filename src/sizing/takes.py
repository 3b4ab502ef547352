"""What each kind of target takes, by a model's config.json and the target's settings alone: the rules `deploy` goes by, and `plan` foretells. No weights."""

from typing import Any, NamedTuple, NoReturn

from src.core.errors import AGAIN, BadData, ConfigError, WrongKind
from src.settings.targets import Axera, Llama2c, LlamaCpp, Mobilint, Openvino, Target
from src.sizing.config_reader import shape_of
from src.sizing.shape import ModelShape

# Families that Pulsar2's documents and AXERA's published models name (documents 3.2 to 7.0; model repositories to 2026-08).
AXERA = {
    *("llama", "qwen2", "qwen3", "qwen3_5_text", "phi", "phi3", "minicpm", "chatglm", "gemma2", "gemma3_text", "gemma4_text"),
    *("smollm3", "hunyuan_v1_dense"),
}
AX650_ONLY = {"smollm3"}
MOBILINT = {
    "llama": "MobilintLlamaForCausalLM",
    "qwen2": "MobilintQwen2ForCausalLM",
    "qwen3": "MobilintQwen3ForCausalLM",
    "exaone": "MobilintExaoneForCausalLM",
    "exaone4": "MobilintExaone4ForCausalLM",
    "cohere2": "MobilintCohere2ForCausalLM",
}
"""model_type -> class that runs it: the text models of transformers-mblt 0.6.1"""
# config.json's model_type of every decoder-only family that optimum-intel 2.2.0 registers for TASK.
OPENVINO = {
    "afmoe", "aquila", "arcee", "arctic", "baichuan", "biogpt", "bitnet", "bloom", "chatglm", "codegen", "cohere", "cohere2", "dbrx",
    "deci", "deepseek", "deepseek_v2", "deepseek_v3", "exaone", "exaone4", "falcon", "falcon_mamba", "gemma", "gemma2", "gemma3_text",
    "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox",
    "gpt_neox_japanese", "gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid", "hunyuan_v1_dense", "internlm", "internlm2",
    "jais", "lfm2", "lfm2_moe", "llama", "llama4", "llama4_text", "mamba", "minicpm", "minicpm3", "mistral", "mixtral", "mpt",
    "muse_glimmer_text", "olmo", "olmo2", "opt", "orion", "ouro", "persimmon", "phi", "phi3", "phimoe", "qwen", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "qwen3_vl_text", "smollm3", "stablelm", "starcoder2",
    "xglm", "xverse", "zamba2",
}  # fmt: skip
# config.json's model_type -> llama.cpp's architecture, of the families that deploy/gguf writes. Source: llama.cpp's src/models, 2026-10.
GGUF = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "exaone4": "exaone4",
}
GGUF_ROPES = {
    "llama3": {"llama", "exaone4", "smollm3"},
    "longrope": {"phi3"},
    "linear": {*GGUF} - {"phi3"},
    "yarn": {"llama", "mistral", "qwen2", "qwen3"},
}
"""rope scaling -> model types for which llama.cpp computes it; what has none goes with every type"""


BILLION = 10**9
UNQUANTIZED = "give the model that it was quantized from"


def check(config: dict[str, Any], target: Target, *, where: str) -> ModelShape:
    """The shape of a model that the target takes. Raises what `deploy` would: WrongKind for a model it does not take, ConfigError for settings that
    do not go with it, BadData for a config.json that is no model's."""
    shape = shape_of(config, where)
    if shape.quantization and isinstance(target, Mobilint | Openvino | LlamaCpp):
        raise WrongKind(
            f"target={target.name} takes a model, not a quantized one ({shape.quantization.method})",
            where=where,
            fix=UNQUANTIZED,
        )
    if isinstance(target, Axera):
        gptq_block(config, where=where)
        refuse(axera_faults(shape, target), where)
    elif isinstance(target, Mobilint):
        mobilint(config, shape, target, where=where)
    elif isinstance(target, Openvino):
        openvino(shape, target, where=where)
    elif isinstance(target, Llama2c):
        llama2c(config, target.format, where=where)
    elif isinstance(target, LlamaCpp):
        gguf(config, shape, where=where)
    return shape


class Fault(NamedTuple):
    """A setting that contradicts a model, and what to write in its place."""

    what: str
    fix: str


def refuse(faults: list[Fault], where: str) -> None:
    """Raises ConfigError with settings that contradict a model, and what to write for all of them; none: nothing."""
    if faults:
        what = "\n".join(["the settings do not go with this model:", *(f"  - {fault.what}" for fault in faults)])
        raise ConfigError(what, where=where, fix=" ".join(fault.fix for fault in faults))


def other_targets(model_type: str) -> list[str]:
    """Ways out for a family that a target does not know: targets of other vendors that do."""
    known = {"ax650": AXERA, "mobilint_aries": MOBILINT, "openvino_npu": OPENVINO, "openvino_cpu": OPENVINO, "gguf": GGUF}
    return [f"target={name}" for name, families in known.items() if model_type in families]


def axera_faults(shape: ModelShape, target: Axera) -> list[Fault]:
    """What of the target's settings this model contradicts, each with its way out."""
    faults, family = [], target.model_type or shape.model_type
    limit, quantization = shape.max_positions, shape.quantization
    if limit and target.context_len > limit:
        chunk = next((c for c in (target.prefill_chunk, 64, 32) if c < limit), 32)
        prompt = max(chunk, limit // 2 // chunk * chunk)
        faults.append(
            Fault(
                f"target.context_len={target.context_len} is above the model's own limit of {limit}",
                fix=f"target.context_len={limit} target.prompt_len={prompt} target.prefill_chunk={chunk}",
            )
        )
    if quantization and target.weight_type not in ("auto", f"s{quantization.bits}"):
        faults.append(
            Fault(
                f"target.weight_type={target.weight_type}: the model is GPTQ int{quantization.bits} already", fix="target.weight_type=auto"
            )
        )
    if target.model_type is None and shape.model_type not in AXERA:
        faults.append(
            Fault(
                f"model family '{shape.model_type}' is not known to Pulsar2 (target.model_type={shape.model_type} tries it all the same)",
                fix="target.model_type=llama, if it is a Llama in all but name",
            )
        )
    if family in AX650_ONLY and target.chip != "AX650":
        faults.append(Fault(f"model family '{family}' runs on AX650 only", fix="target=ax650"))
    return faults


def gptq_block(config: dict[str, Any], *, where: str) -> dict[str, Any] | None:
    """{"bits", "group_size"} of a symmetric GPTQ int4 or int8 model; None for a plain one. Raises WrongKind for every other quantization."""
    block = part(config, "quantization_config", where)
    if not block:
        return None
    method, bits, symmetric, ordered = (block.get(key) for key in ("quant_method", "bits", "sym", "desc_act"))
    reasons = [f"it is {method}"] if method != "gptq" else []
    reasons += [f"{bits} bits"] if method == "gptq" and bits not in (4, 8) else []
    reasons += ["not symmetric"] if method == "gptq" and symmetric is not True else []
    reasons += ["columns quantized out of order (desc_act)"] if method == "gptq" and ordered else []
    reasons += ["matrices of more than one width"] if block.get("dynamic") else []
    reasons += ["its output layer is quantized too"] if block.get("lm_head") else []
    reasons += ["its format is gptq_v2"] if block.get("checkpoint_format") == "gptq_v2" else []
    if reasons:
        raise WrongKind(
            f"only symmetric GPTQ int4 and int8 models in column order can be taken; this one: {', '.join(reasons)}",
            where=where,
            fix=[UNQUANTIZED, "quantize that one with quantizer=gptq_int4"],
        )
    return {"bits": bits, "group_size": block.get("group_size")}


def mobilint(config: dict[str, Any], shape: ModelShape, target: Mobilint, *, where: str) -> None:
    """Raises WrongKind for a family Mobilint's runtime has no class for, ConfigError for a context beyond the model's own."""
    if str(config.get("model_type")) not in MOBILINT:
        raise WrongKind(
            f"Mobilint's runtime has no language model of type '{config.get('model_type')}'; it has {', '.join(MOBILINT)}",
            where=where,
            fix=other_targets(str(config.get("model_type"))),
        )
    limit = shape.max_positions
    if limit and target.context_len > limit:
        raise ConfigError(
            f"target.context_len={target.context_len} is above the model's own limit of {limit} tokens",
            where=where,
            fix=f"target.context_len={limit}",
        )


def openvino(shape: ModelShape, target: Openvino, *, where: str) -> None:
    """Raises WrongKind for a family the exporter does not know, ConfigError with every setting that this model contradicts."""
    if shape.model_type not in OPENVINO:
        raise WrongKind(
            f"OpenVINO's exporter (optimum-intel 2.2.0) does not know the model family '{shape.model_type}'",
            where=where,
            fix=other_targets(shape.model_type),
        )
    faults, limit = list[Fault](), shape.max_positions
    if limit and target.context_len > limit:
        faults.append(
            Fault(
                f"target.context_len={target.context_len} is above the model's own limit of {limit}",
                fix=f"target.context_len={limit} target.prompt_len={min(target.prompt_len, limit // 2)}",
            )
        )
    if (
        target.weight_type == "int4"
        and target.group_size != "auto"
        and target.group_size > 0
        and (odd := undivided(shape, target.group_size))
    ):
        fitting = next((g for g in (128, 64, 32) if not undivided(shape, g)), -1)
        faults.append(
            Fault(
                f"target.group_size={target.group_size} does not divide the model's rows of {', '.join(map(str, odd))}",
                fix=f"target.group_size={fitting if target.device == 'CPU' or fitting == 128 else -1}",
            )
        )
    refuse(faults, where)


def openvino_group(shape: ModelShape, target: Openvino) -> tuple[int | None, str]:
    """(int4 weights that share a scale, -1 for a row, None for int8; how it was chosen, in words), by "OpenVINO GenAI on NPU" (docs.openvino.ai,
    2025): groups of 128, or whole rows for models above a billion parameters."""
    if target.weight_type == "int8":
        return None, "int8, a scale for each row" + (", symmetric" if target.device == "NPU" else "")
    if target.group_size != "auto":
        return target.group_size, f"symmetric int4, target.group_size={target.group_size}"
    if shape.params >= BILLION:
        return -1, f"symmetric int4, a scale for each row (auto: {shape.params:,} parameters, a billion or more)"
    if odd := undivided(shape, 128):
        return -1, f"symmetric int4, a scale for each row (auto: 128 does not divide rows of {', '.join(map(str, odd))})"
    return 128, f"symmetric int4 in groups of 128 (auto: {shape.params:,} parameters, below a billion)"


def undivided(shape: ModelShape, group: int) -> list[int]:
    """Row lengths of the layers' matrices that `group` does not divide."""
    return sorted({m.columns for layer in shape.stack for m in layer.matrices if m.columns % group})


LLAMA2C = {"llama", "mistral", "qwen2", "qwen3"}
"""model_type of what version 3 of model.bin holds; the others hold Llama and Mistral, with nothing that Llama 2 has not"""
STATIC_ROPE = {"default", "linear", "llama3", "yarn"}
"""scalings of the rotary embedding that do not change with the text's length"""


def llama2c_form(format: str) -> tuple[int, int]:
    """(version of model.bin, bits of its weights) of a format such as int8_v2."""
    bits, _, version = format.partition("_v")
    return int(version), {"fp32": 32, "int8": 8, "int4": 4}[bits]


def llama2c(config: dict[str, Any], format: str, *, where: str) -> ModelShape:
    """The shape of a model that the format and run.c can express. Raises WrongKind for every other model, BadData where its length is not said."""
    kind, (version, bits) = config.get("model_type"), llama2c_form(format)
    elsewhere = ["target=openvino_cpu"] if str(kind) in OPENVINO else []

    def refuse(what: str) -> NoReturn:
        raise WrongKind(what, where=where, fix=elsewhere)

    if kind not in LLAMA2C:
        refuse(f"target=llama2c takes models of the architectures {', '.join(sorted(LLAMA2C))} only; this one is '{kind}'")
    if (block := gptq_block(config, where=where)) and (version, bits) != (3, block["bits"]):
        raise WrongKind(
            f"the model is GPTQ int{block['bits']} already, which target.format={format} does not keep",
            where=where,
            fix=[f"target.format=int{block['bits']}_v3", UNQUANTIZED],
        )
    rope, scaling = part(config, "rope_parameters", where), rope_type(config, where)
    if scaling not in STATIC_ROPE:
        refuse(f"rope scaling '{scaling}' is unknown to run.c, which has {', '.join(sorted(STATIC_ROPE))}")
    if (share := rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1))) != 1:
        refuse(f"the rotary embedding turns {share} of each head; run.c turns all of it")
    if config.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act is '{config['hidden_act']}'; run.c has silu only")
    shape = shape_of(config, where)
    if shape.max_positions is None:
        raise BadData("config.json does not say 'max_position_embeddings'", where=where)
    if not shape.kv_heads or shape.heads % shape.kv_heads or shape.head_dim % 2:
        refuse(
            f"{shape.heads} heads of {shape.head_dim}, {shape.kv_heads} KV heads: run.c takes heads of an even width, as many for each KV head"
        )
    if version < 3:
        beyond = [f"rope scaling '{scaling}'"] if scaling != "default" else []
        beyond += ["biases"] if llama2c_biases(config, shape) else []
        beyond += ["norms of queries and keys"] if shape.qk_norm else []
        beyond += [f"head_dim {shape.head_dim}, not {shape.hidden} / {shape.heads}"] if shape.head_dim * shape.heads != shape.hidden else []
        if beyond:
            raise WrongKind(
                f"llama2.c's own formats cannot hold this model: {', '.join(beyond)}",
                where=where,
                fix=[f"target.format={'fp32' if bits == 32 else 'int8'}_v3", *elsewhere],
            )
    return shape


def llama2c_biases(config: dict[str, Any], shape: ModelShape) -> int:
    """The biases of a model of LLAMA2C: 1 of q, k and v, plus 2 of the output projection, plus 4 of the MLP."""
    of_output = config.get("attention_bias") if shape.model_type in ("llama", "qwen3") else False
    of_mlp = config.get("mlp_bias") if shape.model_type == "llama" else False
    return bool(shape.qkv_bias) + 2 * bool(of_output) + 4 * bool(of_mlp)


def llama2c_group(wanted: int, *widths: int) -> int:
    """The integers that share a scale: so many, halved until they divide rows of all these widths."""
    while any(width % wanted for width in widths):
        wanted //= 2
    return wanted


def gguf(config: dict[str, Any], shape: ModelShape, *, where: str) -> None:
    """Raises WrongKind for a family llama.cpp has none of, or computes otherwise than this config.json says: what its file cannot tell it."""
    kind, head = str(config.get("model_type")), shape.head_dim

    def refuse(what: str) -> None:
        raise WrongKind(f"llama.cpp {what}", where=where, fix=[way for way in other_targets(kind) if way != "target=gguf"])

    if kind not in GGUF:
        refuse(f"has no architecture that this writes for a model of type '{kind}'; there is {', '.join(GGUF)}")
    gelu = kind.startswith("gemma")
    act = config.get("hidden_activation") or config.get("hidden_act") or ("gelu_pytorch_tanh" if gelu else "silu")
    # Gemma's first configurations say "gelu" and mean the approximation by tanh, as transformers takes it.
    if act not in (("gelu_pytorch_tanh", "gelu") if gelu else ("silu",)):
        refuse(f"computes {'gelu by tanh' if gelu else 'silu'} in {GGUF[kind]}; this model has '{act}'")
    for rope in rope_types(config, where):
        rope = "longrope" if rope == "su" else rope
        if rope != "default" and kind not in GGUF_ROPES.get(rope, ()):
            refuse(f"has no rope scaling '{rope}' in {GGUF[kind]}")
    if gelu and kind != "gemma":
        # Its 27B models, told by their layers, divide by the width of a head as if heads filled the hidden size.
        large = shape.layers == (46 if kind == "gemma2" else 62)
        scale = shape.hidden // shape.heads if large else head
        if (given := config.get("query_pre_attn_scalar", 256)) != scale:
            refuse(f"scales attention by {scale} ** -0.5 in a {GGUF[kind]} of {shape.layers} layers; this model by {given} ** -0.5")
    period = {"gemma2": 2, "gemma3_text": 6, "exaone4": 4}.get(kind)
    wanted = ["full" if (i + 1) % (period or 1) == 0 else "sliding" for i in range(shape.layers)]
    if period and any(layer.window for layer in shape.stack) and (kinds := [layer.kind for layer in shape.stack]) != wanted:
        refuse(
            f"has full attention in every layer {period} of {GGUF[kind]}; this model in {[i + 1 for i, k in enumerate(kinds) if k == 'full']}"
        )
    if kind == "exaone4" and any(layer.window for layer in shape.stack) != (shape.layers == 64):
        refuse("has sliding windows in an exaone4 of 64 layers, and in no other")
    yarn = {"attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True, "beta_fast": 32, "beta_slow": 1}
    for block in (part(config, "rope_parameters", where), part(config, "rope_scaling", where)):
        if other := [
            name for name, usual in yarn.items() if "yarn" in rope_types(config, where) and block.get(name, usual) not in (usual, None)
        ]:
            refuse(f"computes YaRN with the usual constants alone; this model has {other[0]} {block[other[0]]}")
    bare = config.get("no_rope_layers")
    if kind == "smollm3" and bare and list(bare) != [int((i + 1) % 4 != 0) for i in range(shape.layers)]:
        refuse("leaves rotary positions out in every fourth layer of smollm3; this model in others")


def by_llama_cpp(target: Any) -> bool:
    """Whether llama.cpp's own quantizer makes this type of weights; all others the gguf package makes."""
    return "_k" in target.weight_type or target.weight_type.startswith("iq")


def rope_types(config: dict[str, Any], where: str) -> set[str]:
    """How rotary embeddings are scaled, for each kind of layer where they differ; see rope_type."""
    parts = [block for block in part(config, "rope_parameters", where).values() if isinstance(block, dict)]
    return {rope_type(config, where), *(str(block.get("rope_type", "default")) for block in parts)}


def rope_type(config: dict[str, Any], where: str) -> str:
    """How the rotary embedding is scaled, under the keys of transformers 4 and 5; default: not at all."""
    rope, scaling = part(config, "rope_parameters", where), part(config, "rope_scaling", where)
    return scaling.get("rope_type") or scaling.get("type") or rope.get("rope_type") or "default"


def part(config: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """A block of config.json; empty where it has none. Raises BadData for anything else."""
    block = config.get(key)
    if block is None:
        return {}
    if not isinstance(block, dict):
        raise BadData(f"'{key}' should be a JSON object, not {str(block)[:100]!r}", where=where, fix=AGAIN)
    return block
