"""A model's shape read from its config.json, whatever its family calls its sizes."""

import re
from collections.abc import Iterator
from pathlib import Path

from src.core.errors import AGAIN, BadData, MissingInput, WrongKind
from src.core.files import read_json
from src.sizing.decoder import LARGEST, Family, Sizes, hybrid_layer, plain_layer
from src.sizing.families import FAMILIES
from src.sizing.shape import ModelShape, Quantization


def read_shape(path: str | Path) -> ModelShape:
    """The shape of the model in a folder, or described by a config.json alone.

    Raises MissingInput where there is no config.json, BadData where it is damaged or lacks a size, WrongKind for what is not a dense
    decoder-only language model.
    """
    config, file = read_config(path)
    return shape_of(config, str(file))


def read_config(path: str | Path) -> tuple[dict, Path]:
    """(config.json of a folder, or the one given, its path). Raises MissingInput, BadData, and WrongKind for an adapter's folder."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        if (path / "adapter_config.json").is_file():
            raise WrongKind(
                "an adapter has no shape of its own", where=str(path), fix="give the model that it was trained on, or the merged one"
            )
        raise MissingInput("no config.json there", where=str(path), fix="give a model folder, or the path of its config.json")
    return read_json(file), file


LAYERS = 1000
"""of a model at most; the deepest published ones have some 130"""
EXPERTS_MOST = 4096
POSITIONS = 1 << 24
"""of a context at most, since some families hold a table of them; Llama 4 Scout has 10 million"""
_LAYERS = re.compile(r"(?:.*_)?(?:n_)?(?:layers?|blocks|depth)")
_EXPERTS = re.compile(r"(?:.*_)?(?:experts|heads?)")
_POSITIONS = re.compile(r"(?:.*_)?(?:positions|position_embeddings|ctx)")
_SIZES = re.compile(r"(?:.*_)?(?:size|dim|rank|embd|inner|d_model|d_ff|ffn|channels)(?:_per_layer_input)?")


def check_sizes(config: dict, where: str, tensors: int | None = None, stored: int | None = None) -> None:
    """Raises BadData for a number in config.json, or in a part of it, by which no model could be built, before anything loops over it or allots by it.

    tensors: how many the model's weights are; each layer has one of its own. stored: their bytes; a size is that of some tensor, of 4 bits a value at least.
    """
    for key, value in _numbers(config):
        most = (
            LAYERS
            if _LAYERS.fullmatch(key)
            else EXPERTS_MOST
            if _EXPERTS.fullmatch(key)
            else POSITIONS
            if _POSITIONS.fullmatch(key)
            else None
        )
        said = f"'{key}' is {value:,}"
        if most is not None and value > most:
            raise BadData(f"{said}; no model has more than {most:,}", where=where, fix=AGAIN)
        if tensors is not None and key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") and value > tensors:
            raise BadData(f"{said}, and the weights are {tensors:,} tensors", where=where, fix=AGAIN)
        if _SIZES.fullmatch(key) and value > (LARGEST if stored is None else max(2 * stored, 1 << 20)):
            raise BadData(f"{said}" + ("" if stored is None else f", and the weights are {stored:,} bytes"), where=where, fix=AGAIN)


def _numbers(value: object, key: str = "") -> Iterator[tuple[str, float]]:
    """(key, number) of every number in a configuration, those of its parts too."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


NAMES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
    "max_positions": "max_position_embeddings",
}
INNER = ("text_config", "llm_config", "language_config")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
ENCODERS = ("is_encoder_decoder", "encoder_layers", "num_encoder_layers")
LOGIT_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
KINDS = {"full_attention": "full", "sliding_attention": "sliding", "linear_attention": "linear"}


def shape_of(config: dict, where: str) -> ModelShape:
    """The shape that a parsed config.json describes; `where` names it in errors. Raises BadData or WrongKind as read_shape does."""
    outer, notes = config, []
    if inner := next((key for key in INNER if isinstance(config.get(key), dict)), None):
        config = {key: outer[key] for key in ("tie_word_embeddings", "torch_dtype", "dtype") if key in outer} | config[inner]
        notes.append(f"only the language model of this {outer.get('model_type')} is counted ({inner}), not what sees or hears")
    name, family = _family(config, where, notes)
    config = _with_defaults(config, family, notes)
    sizes = _sizes(config, family, where)
    build = family.layer or plain_layer
    tables, outside = family.outside(sizes) if family.outside else (0, 0)
    norm = sizes.hidden * (2 if family.norm_bias else 1)
    tied = config.get("tie_word_embeddings")
    longest = family.names.get("max_positions", NAMES["max_positions"])
    return ModelShape(
        model_type=name,
        hidden=sizes.hidden,
        intermediate=sizes.intermediate,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        vocab=sizes.vocab,
        tied=family.tied if tied is None else bool(tied),
        max_positions=sizes.get(longest) if config.get(longest) is not None else None,
        qkv_bias=sizes.flag(family.qkv_bias),
        qk_norm=family.qk_norm,
        scales_logits=any(config.get(key) not in (None, False, 1) for key in LOGIT_SCALES),
        dtype=_dtype(config),
        quantization=_quantization(outer),
        stack=tuple(build(family, sizes, index) for index in range(sizes.layers)),
        extra_embedding=tables,
        outside=norm + outside + (sizes.vocab if family.head_bias else 0),
        notes=(*notes, *([family.note] if family.note else [])),
    )


def _family(config: dict, where: str, notes: list[str]) -> tuple[str, Family]:
    name = config.get("model_type")
    if name is None and (name := _by_class(config)):
        notes.append(f"config.json names no model_type; by its architectures it is {name}")
    if not isinstance(name, str):
        raise BadData("config.json names no model_type", where=where, fix=AGAIN)
    if any(config.get(key) for key in EXPERTS):
        raise WrongKind(f"'{name}' is a mixture of experts; the planner knows dense models only", where=where)
    if any(config.get(key) for key in ENCODERS):
        raise WrongKind(f"'{name}' is not a decoder-only language model", where=where)
    if name not in FAMILIES:
        notes.append(f"the family '{name}' is not in src/sizing/families.py: its layers are counted as if they were Llama's")
    return name, FAMILIES.get(name, Family())


def _by_class(config: dict) -> str | None:
    """minicpm3 of architectures ["MiniCPM3ForCausalLM"]; None where that names no family here."""
    classes = config.get("architectures")
    name = str(classes[0]).removesuffix("ForCausalLM").lower() if isinstance(classes, list) and classes else ""
    return name if name in FAMILIES else None


def _with_defaults(config: dict, family: Family, notes: list[str]) -> dict:
    left_out = {key: value for key, value in family.defaults.items() if config.get(key) is None}
    if left_out:
        notes.append("config.json leaves to its family's defaults: " + ", ".join(f"{key} {value}" for key, value in left_out.items()))
    return config | left_out


def _sizes(config: dict, family: Family, where: str) -> Sizes:
    names = NAMES | family.names
    read = Sizes(0, 0, 0, 0, 0, 0, 0, (), None, config, where).get
    layers, hidden, heads = (read(names[size]) for size in ("layers", "hidden", "heads"))
    if not 0 < layers <= LAYERS or not hidden or not heads:
        raise BadData(f"{layers} layers of width {hidden} with {heads} heads is no model", where=where, fix=AGAIN)
    head_dim = read(names["head_dim"], hidden // heads)
    window = read("sliding_window") if config.get("sliding_window") is not None else None
    return Sizes(
        layers=layers,
        hidden=hidden,
        intermediate=int(read(names["intermediate"]) * family.mlp_share),
        heads=heads,
        kv_heads=read(names["kv_heads"], heads),
        head_dim=head_dim,
        vocab=read(names["vocab"]),
        kinds=_kinds(config, family, layers, window, where),
        window=window,
        config=config,
        where=where,
    )


def _kinds(config: dict, family: Family, layers: int, window: int | None, where: str) -> tuple[str, ...]:
    """full, sliding or linear for each layer: as config.json lists them, or by the family's pattern."""
    listed = config.get("layer_types")
    if listed is not None:
        if not isinstance(listed, list) or len(listed) != layers or not all(isinstance(kind, str) and kind in KINDS for kind in listed):
            raise BadData(f"layer_types should list {layers} of {', '.join(KINDS)}", where=where, fix=AGAIN)
        return tuple(KINDS[kind] for kind in listed)
    if family.full_below:
        first = config.get(family.full_below, layers) if config.get("use_sliding_window") and window else layers
        return tuple("full" if i < first else "sliding" for i in range(layers))
    between, every = (
        ("linear", config.get("full_attention_interval") or 4) if family.layer is hybrid_layer else ("sliding", family.full_every)
    )
    if every is None or (between == "sliding" and not window):
        return ("full",) * layers
    every = config.get("sliding_window_pattern") or every
    return tuple("full" if isinstance(every, int) and every and (i + 1) % every == 0 else between for i in range(layers))


def _dtype(config: dict) -> str | None:
    named = config.get("dtype") or config.get("torch_dtype")
    flagged = next((name for key, name in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")) if config.get(key)), None)
    return named if isinstance(named, str) else flagged


def _quantization(config: dict) -> Quantization | None:
    block = config.get("quantization_config")
    if not isinstance(block, dict):
        return None
    bits = block.get("bits") or (4 if block.get("load_in_4bit") else 8 if block.get("load_in_8bit") else None)
    return Quantization(str(block.get("quant_method", "unknown")), bits, block.get("group_size"), block.get("sym"), block.get("desc_act"))
