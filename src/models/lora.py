"""What is trained: adapters on the linear layers, layers trained whole beside them, and the rows of control tokens the base model never learnt."""

import difflib
from typing import NamedTuple

import torch

from src.core.errors import ConfigError
from src.core.log import say
from src.models.held import is_held
from src.models.loading import import_peft
from src.models.token_rows import row_rates, rows_beside_their_matrix, vocabulary_layers
from src.settings.training import AdapterTuner, Optimizer


class ParameterRate(NamedTuple):
    """How a parameter that does not take the common learning rate is trained."""

    peak: float
    """its peak learning rate"""
    decays: bool
    """whether weight decay applies to it"""


def attach(model, tuner: AdapterTuner, rows: list[int], *, deepspeed: bool):
    """The model with LoRA adapters on its linear layers and, beside them, layers trained whole and the embedding and output rows `rows`.

    deepspeed: keep what is trained in the base's dtype, since ZeRO refuses parameters of several; without it that is fp32.
    Raises ConfigError where a setting names a layer the model does not have, or one that cannot be trained so.
    """
    import_peft()
    from peft import LoraConfig, get_peft_model

    rows_beside_their_matrix()
    kept = layers_to_save(model, tuner.modules_to_save)
    targets = lora_targets(model, tuner)
    tables = [name for name in vocabulary_layers(model) if not any(is_called(k, name) for k in kept)] if rows else []
    if clash := sorted(set(tables) & set(targets)):
        raise ConfigError(
            f"tuner.target_modules: {', '.join(clash)} would get an adapter and, for tokens the base never learnt, trained rows",
            fix=[f"tuner.modules_to_save=[{','.join(clash)}] in its place", "train_new_tokens=never"],
        )
    linear = [name for name in kept if hasattr(model.get_submodule(name), "in_features") and not is_output(model, name)]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=tuner.rank,
        lora_alpha=tuner.alpha,  # type: ignore[arg-type]  # peft says int, and computes with any number
        use_rslora=tuner.rslora,
        use_dora=tuner.dora,
        init_lora_weights=tuner.init if tuner.init in ("gaussian", "orthogonal") else True,
        lora_dropout=tuner.dropout,
        target_modules=targets,
        exclude_modules=linear or None,
        modules_to_save=kept or None,
        ensure_weight_tying=bool(
            model.config.tie_word_embeddings and any(model.get_submodule(k) is model.get_input_embeddings() for k in kept)
        ),
        bias="none",
        trainable_token_indices=dict.fromkeys(tables, rows) if tables else None,
    )
    attached = get_peft_model(model, config, autocast_adapter_dtype=not deepspeed)
    if tuner.dora:
        refuse_zero_lengths(attached)
    if (kept and not deepspeed) or any(map(is_held, model.modules())):
        train_in_fp32(attached)
    if tuner.takes_from_base:
        take_from_base(attached, tuner.init)
    return attached


def is_called(name: str, short: str) -> bool:
    """Whether a module's full name is `short` or ends with it, from a dot on."""
    return name == short or name.endswith(f".{short}")


def is_output(model, name: str) -> bool:
    return model.get_submodule(name) is model.get_output_embeddings()


def lora_targets(model, tuner: AdapterTuner) -> str | list[str]:
    """peft's target_modules. Raises ConfigError for a name the model does not have, and for a table whose weight another layer shares."""
    if tuner.target_modules == "all-linear":
        # peft's own meaning of it leaves out GPTQ's layers, which are no torch.nn.Linear.
        return sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "qweight")}) or "all-linear"
    names = [name for name, _ in model.named_modules()]
    if missing := [t for t in tuner.target_modules if not any(is_called(name, t) for name in names)]:
        raise ConfigError(
            f"tuner.target_modules: the model has no layer called {', '.join(missing)}{nearest(model, missing[0])}",
            fix="tuner.target_modules=all-linear",
        )
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    shared = [t for t in tuner.target_modules if any(is_called(name, t) and module in tables for name, module in model.named_modules())]
    if shared and model.config.tie_word_embeddings:
        raise ConfigError(
            f"tuner.target_modules: {shared[0]} shares its weight with the other end of the model, and an adapter would change one end only",
            fix=f"tuner.modules_to_save=[{shared[0]}] trains both ends as the one matrix they are",
        )
    return list(tuner.target_modules)


def without(names: list[str], name: str) -> str:
    """tuner.modules_to_save less a name."""
    return f"tuner.modules_to_save=[{','.join(other for other in names if other != name)}]"


def nearest(model, name: str) -> str:
    """`; did you mean 'x'?` with the layer name most like a mistyped one."""
    known = {n.rsplit(".", 1)[-1] for n, module in model.named_modules() if n and not any(True for _ in module.children())}
    near = difflib.get_close_matches(name, sorted(known), 1, 0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def layers_to_save(model, names: list[str]) -> list[str]:
    """Full names of the layers that tuner.modules_to_save names by their ends. An output layer tied to the embedding counts as the embedding.

    Raises ConfigError where the model has no such layer, or where it is a block of several, or quantized.
    """
    found = set()
    for short in names:
        matches = [(name, module) for name, module in model.named_modules() if is_called(name, short)]
        if not matches:
            raise ConfigError(
                f"tuner.modules_to_save: the model has no layer called {short}{nearest(model, short)}", fix=without(names, short)
            )
        for name, module in matches:
            inside = sorted({child for child, _ in module.named_children()})
            if inside or not any(True for _ in module.parameters()):
                raise ConfigError(
                    f"tuner.modules_to_save: {short} is no single layer with weights",
                    fix=[f"name layers in it: {', '.join(inside)}"] * bool(inside) + [without(names, short)],
                )
            if hasattr(module, "qweight") or not all(p.is_floating_point() for p in module.parameters()):
                ways = [without(names, short), *([] if hasattr(module, "qweight") else ["tuner=lora"])]
                raise ConfigError(f"tuner.modules_to_save: {short} is quantized and cannot be trained whole", fix=ways)
            found.add(name)
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    tied = model.config.tie_word_embeddings
    return sorted({embedding if tied and is_output(model, name) else name for name in found})


def train_in_fp32(attached) -> None:
    """Hold layers trained whole in fp32 where the base has 16 bits, in which small updates would round to nothing; the base sees its own dtype."""
    from peft.utils.other import ModulesToSaveWrapper

    def widened(layer, args):
        return tuple(a.float() if hasattr(a, "is_floating_point") and a.is_floating_point() else a for a in args)

    for wrapper in [module for module in attached.modules() if isinstance(module, ModulesToSaveWrapper)]:
        dtype = next(wrapper.original_module.parameters()).dtype
        if is_held(wrapper.original_module):
            wrapper.modules_to_save.float()  # which computes in fp32 as it is
            continue
        for layer in wrapper.modules_to_save.values():
            if dtype.itemsize < 4:
                layer.float()
                layer.register_forward_pre_hook(widened)
                layer.register_forward_hook(lambda layer, args, out, dtype=dtype: out.to(dtype))


def refuse_zero_lengths(attached) -> None:
    """DoRA divides each output's weights by their length. Raises ConfigError where all of an output's weights are zero, as in pruned or widened models."""
    for name, parameter in attached.named_parameters():
        if ".lora_magnitude_vector." in name and not parameter.detach().all():
            layer = name.removeprefix("base_model.model.").split(".lora_magnitude_vector")[0]
            raise ConfigError(
                f"tuner.dora=true divides by the length of each output's weights, and {layer} has outputs whose weights are all zero",
                fix="tuner.dora=false",
            )


def take_from_base(attached, init: str) -> None:
    """Start every adapter B A at a part of its base weight W and take that part out of W, so that the model starts as it was.

    pissa: W's largest singular directions (Meng et al. 2024, arXiv:2404.02948); olora: the first columns of its QR (Büyükakyüz 2024,
    arXiv:2406.01775). What the matrices start as is kept in `attached.initial`, {name of the saved tensor: fp32}, for `as_plain_lora`. On a resumed
    run this is called on the same base again; only the product taken out matters then, and both decompositions fix it.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in attached.named_modules():
        if not isinstance(layer, LoraLayer) or not layer.lora_A:
            continue
        weight = layer.get_base_layer().get_parameter("weight").detach()
        scale, turned = layer.scaling["default"], bool(getattr(layer, "fan_in_fan_out", False))
        matrix = weight.float().to("cuda" if torch.cuda.is_available() else weight.device)
        matrix = matrix.T if turned else matrix
        rank = layer.r["default"]
        if rank > min(matrix.shape):
            raise ConfigError(
                f"tuner.rank={rank} is above what tuner.init={init} can take out of {name.removeprefix('base_model.model.')}, {tuple(matrix.shape)}",
                fix=f"tuner.rank={min(matrix.shape)}",
            )
        a, b = layer.lora_A["default"].get_parameter("weight"), layer.lora_B["default"].get_parameter("weight")
        with torch.no_grad():
            for parameter, start in zip((b, a), parts(matrix, rank, init, scale)):
                parameter.copy_(start)
            taken = (b.float() @ a.float()).to(matrix) * scale
            residual = matrix - taken
            weight.copy_(residual.T if turned else residual)
    attached.initial = {
        name.replace(".default", ""): parameter.detach().float().cpu().clone()
        for name, parameter in attached.named_parameters()
        if any(part in name for part in (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B."))
    }


def parts(matrix, rank: int, init: str, scale: float):
    """(B of shape (out, rank), A of shape (rank, in)), fp32, to start from; pissa divides by the scale that the update is multiplied by."""
    if init == "olora":
        q, r = torch.linalg.qr(matrix)
        return q[:, :rank], r[:rank]
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def rates(model, tuner: Optimizer, used: int) -> dict[str, ParameterRate]:
    """{name of a parameter: Rate} for each that does not take the common learning rate with weight decay.

    Token rows: see row_rates. LoRA+ gives the B matrices lora_plus times the rate of the A matrices (Hayou et al. 2024, arXiv:2402.12354); its
    analysis is of linear layers, so an adapted embedding keeps the common one. What stands for a part of the base's own weights (DoRA's lengths,
    PiSSA's and OLoRA's matrices) has no decay, which would pull it to zero instead of to the base.
    """
    found = {name: ParameterRate(peak, False) for name, peak in row_rates(model, tuner, used).items()}
    if not isinstance(tuner, AdapterTuner):
        return found
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or name in found:
            continue
        second = ".lora_B." in name
        holds_base = ".lora_magnitude_vector." in name or (tuner.takes_from_base and (second or ".lora_A." in name))
        rate = ParameterRate(tuner.learning_rate * (tuner.lora_plus if second else 1), not holds_base)
        if rate != ParameterRate(tuner.learning_rate, True):
            found[name] = rate
    return found


def count(model, *, trained: bool = False) -> int:
    """Parameters of a model, those of ZeRO-3's partitions counted whole; only the trained ones if asked for."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad or not trained)


def describe(model, rows: list[int]) -> None:
    trained, total = count(model, trained=True), count(model)
    say(f"trains {trained:,} of {total:,} parameters ({trained / total:.2%})" + (f", {len(rows)} token rows among them" if rows else ""))
