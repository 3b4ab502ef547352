"""What is trained: adapters on the linear layers, layers trained whole beside them, and the rows of control tokens the base model never learnt."""

import difflib
import json
import math
from pathlib import Path
from typing import NamedTuple

from src.config import LoraTuner, Optimizer, QloraTuner
from src.errors import ConfigError, ProofFailed
from src.log import say
from src.modeling import whole

TAKEN_FROM_BASE = ("pissa", "olora")
"""starts that take the adapter's first product out of the base weights"""


class Rate(NamedTuple):
    """How a parameter that does not take the common learning rate is trained."""

    peak: float
    """its peak learning rate"""
    decays: bool
    """whether weight decay applies to it"""


def check(tuner: LoraTuner, *, zero_stage: int, gptq: bool) -> None:
    """Raises ConfigError for what cannot be trained with this ZeRO stage or on a GPTQ base; knows nothing of the model."""
    whats = [w for w, used in (("dora=true", tuner.dora), (f"init={tuner.init}", tuner.init in TAKEN_FROM_BASE)) if used]
    if whats and zero_stage == 3:
        raise ConfigError(
            f"tuner.{whats[0]} reads whole base weights, which ZeRO-3 has partitioned", fix=["deepspeed=zero2", f"drop tuner.{whats[0]}"]
        )
    if tuner.dora and gptq and isinstance(tuner, QloraTuner):
        raise ConfigError("tuner.dora=true: peft has no DoRA for a GPTQ base", fix=["tuner.dora=false", "give the unquantized base"])


def attach(model, tuner: LoraTuner, rows: list[int], *, deepspeed: bool):
    """The model with LoRA adapters on its linear layers and, beside them, layers trained whole and the embedding and output rows `rows`.

    deepspeed: keep what is trained in the base's dtype, since ZeRO refuses parameters of several; without it that is fp32.
    Raises ConfigError where a setting names a layer the model does not have, or one that cannot be trained so.
    """
    from peft import LoraConfig, get_peft_model

    keep_rows_under_zero3()
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
        lora_alpha=tuner.alpha,
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
    if kept and not deepspeed:
        train_in_fp32(attached)
    if tuner.init in TAKEN_FROM_BASE:
        take_from_base(attached, tuner.init)
    return attached


def is_called(name: str, short: str) -> bool:
    """Whether a module's full name is `short` or ends with it, from a dot on."""
    return name == short or name.endswith(f".{short}")


def is_output(model, name: str) -> bool:
    return model.get_submodule(name) is model.get_output_embeddings()


def lora_targets(model, tuner: LoraTuner) -> str | list[str]:
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
            raise ConfigError(f"tuner.modules_to_save: the model has no layer called {short}{nearest(model, short)}", fix="name its layers")
        for name, module in matches:
            inside = sorted({child for child, _ in module.named_children()})
            if inside or not any(True for _ in module.parameters()):
                raise ConfigError(
                    f"tuner.modules_to_save: {short} is no single layer with weights",
                    fix=f"name its layers: {', '.join(inside)}" if inside else "drop it",
                )
            if hasattr(module, "qweight") or not all(p.is_floating_point() for p in module.parameters()):
                raise ConfigError(f"tuner.modules_to_save: {short} is quantized and cannot be trained whole", fix=["tuner=lora", "drop it"])
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
    import torch
    from peft.tuners.lora import LoraLayer

    for name, layer in attached.named_modules():
        if not isinstance(layer, LoraLayer) or not layer.lora_A:
            continue
        weight, scale = layer.get_base_layer().weight, layer.scaling["default"]
        matrix = weight.detach().float().to("cuda" if torch.cuda.is_available() else weight.device)
        matrix = matrix.T if layer.fan_in_fan_out else matrix
        rank = layer.r["default"]
        if rank > min(matrix.shape):
            raise ConfigError(
                f"tuner.rank={rank} is above what init={init} can take out of {name.removeprefix('base_model.model.')}, {tuple(matrix.shape)}",
                fix=f"tuner.rank={min(matrix.shape)}",
            )
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            for parameter, start in zip((b, a), parts(matrix, rank, init, scale)):
                parameter.copy_(start)
            taken = (b.float() @ a.float()).to(matrix) * scale
            residual = matrix - taken
            weight.copy_(residual.T if layer.fan_in_fan_out else residual)
    attached.initial = {
        name.replace(".default", ""): parameter.detach().float().cpu().clone()
        for name, parameter in attached.named_parameters()
        if any(part in name for part in (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B."))
    }


def parts(matrix, rank: int, init: str, scale: float):
    """(B of shape (out, rank), A of shape (rank, in)), fp32, to start from; pissa divides by the scale that the update is multiplied by."""
    import torch

    if init == "olora":
        q, r = torch.linalg.qr(matrix)
        return q[:, :rank], r[:rank]
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def save(attached, folder: Path, *, state_dict: dict | None, writes: bool, finished: bool) -> None:
    """Write the adapter without the embedding (what is trained in it is kept as rows or as a layer of its own).

    writes: whether this process does. finished: the result is for the untouched base, which whoever loads it has; a checkpoint keeps the matrices
    as they are trained, since a resumed run takes the same part out of its base again.
    """
    attached.save_pretrained(str(folder), state_dict=state_dict, save_embedding_layers=False, is_main_process=writes)
    if finished and writes and hasattr(attached, "initial"):
        as_plain_lora(Path(folder), attached.initial)


def as_plain_lora(folder: Path, initial: dict) -> None:
    """Rewrite a saved adapter for the base as it was: W - s B0 A0 + s B A = W + s [B, -B0] [A; A0], of twice the rank and the same scale.

    initial: the saved tensors' values before training. What else is saved (rows, whole layers) stays as it is.
    """
    import torch
    from safetensors.torch import load_file, save_file

    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    for name, start in initial.items():
        trained = tensors[name]
        start = start.to(trained.dtype)
        first = name.removesuffix(".weight").endswith("_A")
        tensors[name] = torch.cat([trained, start], 0) if first else torch.cat([trained, -start], 1)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads(settings.read_text())
    config["r"] *= 2
    config["lora_alpha"] *= math.sqrt(2) if config["use_rslora"] else 2
    settings.write_text(json.dumps(config, indent=2) + "\n")


def vocabulary_layers(model) -> list[str]:
    """Names, by their last part, of the layers with a row per token: the embedding, and the output layer unless it is the same weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding] if head is None or model.config.tie_word_embeddings else [embedding, head]
    return [name.rsplit(".", 1)[-1] for layer in layers for name, module in model.named_modules() if module is layer]


def untrained(model, ids: list[int], used: int) -> list[int]:
    """Those of the token ids whose embedding or output row shows no training.

    used: rows the tokenizer can produce; rows behind them are padding that was surely never trained, and a row as close to their centre as they
    are themselves is like them (Land & Bartolo 2024, arXiv:2405.05417). A zero row, or one equal to the mean of all, was only initialised.
    """
    import torch

    found = set()
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is None:
            continue
        with torch.no_grad(), whole([layer.weight]):
            weight = layer.weight.detach()
            sample = sample_rows(weight, used)
            centres = [(torch.zeros_like(sample[0]), 0.0), (sample.mean(0), 0.0)]
            if len(weight) > used:
                unused = weight[used:].float()
                centres.append((unused.mean(0), (unused - unused.mean(0)).norm(dim=1).max().item()))
            typical = sample.norm(dim=1).median().item()
            for token in ids:
                row = weight[token].float()
                if any((row - centre).norm().item() <= 1.5 * radius + 0.02 * typical for centre, radius in centres):
                    found.add(token)
    return sorted(found)


def row_rates(model, tuner: Optimizer, used: int) -> dict[str, float]:
    """{name of a trained-rows parameter: its peak learning rate}.

    The rows start from nothing while the matrix they join has a scale of its own, small in wide models and large in narrow ones. Adam moves an
    entry by about its rate each step, so a rate of 1 % of a typical entry brings a row there in some hundred steps in either.
    """
    rates = {}
    for name, _ in model.named_parameters():
        owner, _, last = name.rpartition(".")
        layer = None
        if ".trainable_tokens_delta." in name:
            layer = model.get_submodule(name.split(".trainable_tokens_delta")[0]).base_layer
        elif last == "rows":
            layer = model.get_submodule(owner).base
        if layer is not None:
            with whole([layer.weight]):
                typical = sample_rows(layer.weight, used).square().mean(1).median().sqrt().item()
            rates[name] = max(tuner.learning_rate, 0.01 * typical) if tuner.row_learning_rate == "auto" else tuner.row_learning_rate
    return rates


def rates(model, tuner: Optimizer, used: int) -> dict[str, Rate]:
    """{name of a parameter: Rate} for each that does not take the common learning rate with weight decay.

    Token rows: see row_rates. LoRA+ gives the B matrices lora_plus times the rate of the A matrices (Hayou et al. 2024, arXiv:2402.12354); its
    analysis is of linear layers, so an adapted embedding keeps the common one. What stands for a part of the base's own weights (DoRA's lengths,
    PiSSA's and OLoRA's matrices) has no decay, which would pull it to zero instead of to the base.
    """
    found = {name: Rate(peak, False) for name, peak in row_rates(model, tuner, used).items()}
    if not isinstance(tuner, LoraTuner):
        return found
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or name in found:
            continue
        second = ".lora_B." in name
        holds_base = ".lora_magnitude_vector." in name or (tuner.init in TAKEN_FROM_BASE and (second or ".lora_A." in name))
        rate = Rate(tuner.learning_rate * (tuner.lora_plus if second else 1), not holds_base)
        if rate != Rate(tuner.learning_rate, True):
            found[name] = rate
    return found


def sample_rows(weight, used: int):
    """Up to 4,096 rows spread over the `used` first of a (vocabulary, width) matrix, fp32."""
    import torch

    return weight.detach()[torch.linspace(0, used - 1, min(used, 4096)).long()].float()


def keep_rows_under_zero3() -> None:
    """Let peft's trainable token rows work where ZeRO-3 has partitioned the matrix, on CPU and GPU, and without copying it each step.

    peft 0.21 gathers the first rows through `torch.cuda` alone and, in every forward, writes the rows into a copy of the whole matrix outside
    the layer ZeRO-3 gathers. Here the layer runs as it is and the rows' part of its output is replaced.
    """
    import torch
    import torch.nn.functional as F
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    def first_rows(self, weight, rows, embed_dim):
        with whole([weight]):
            return weight[rows].detach().clone()

    def forward(self, x, active_adapters, *args, **kwargs):
        if self.disable_adapters or not active_adapters or self.merged:
            return stock_forward(self, x, active_adapters, *args, **kwargs)
        out = self.base_layer(x, *args, **kwargs)
        for adapter in active_adapters:
            index = torch.as_tensor(self.token_indices[adapter], device=out.device)
            rows = self.trainable_tokens_delta[adapter].to(out.dtype)
            if isinstance(self.base_layer, torch.nn.Embedding):
                hits = x.unsqueeze(-1) == index
                new = F.embedding(hits.int().argmax(-1), rows)
                scale = self._get_embed_scale()
                out = torch.where(hits.any(-1, keepdim=True), new if scale is None else new * scale.to(new.dtype), out)
            else:
                out = out.index_copy(-1, index, F.linear(x, rows.to(x.dtype)).to(out.dtype))
        return out

    if TrainableTokensLayer.forward_adapters.__module__ != __name__:
        stock_forward = TrainableTokensLayer.forward_adapters
        TrainableTokensLayer.forward_adapters = forward
        TrainableTokensLayer._collect_token_weights = first_rows


def tidy(folder: Path) -> None:
    """peft writes names of layers in the order of a set, which differs between runs, and the weights for the owner's eyes only."""
    config = folder / "adapter_config.json"
    content = json.loads(config.read_text())
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        content[key] = content.get(key) and sorted(content[key])
    config.write_text(json.dumps(content, indent=2) + "\n")
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)


def saved_names(model) -> set[str]:
    """Names that a save of what is trained must hold: an adapter's matrices, rows and whole layers, or every weight of a model."""
    if hasattr(model, "peft_config"):
        trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
        names = {name.replace(".modules_to_save.default", "").replace(".default", "") for name in trained}
        # peft saves DoRA's lengths under the name they had before they were a layer of their own.
        return {name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector") for name in names}
    return {folded_name(name) for name, _ in model.named_parameters() if not name.endswith(".rows")}


def folded_name(name: str) -> str:
    """The name that a parameter of a model trained whole is saved under; rows.py keeps a matrix whose rows are split off as `base`."""
    return name.replace(".base.weight", ".weight")


def check_saved(folder: Path, *, moved: bool, expected: set[str]) -> int:
    """Open what was saved: every expected name there, no tensor empty or not finite and, with `moved`, every adapter's update not zero.

    Returns the tensors seen.
    """
    from safetensors import safe_open

    seen, missing = 0, set(expected)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                tensor = weights.get_tensor(name)
                missing.discard(name)
                seen += 1
                if tensor.numel() == 0 or not tensor.isfinite().all():
                    raise ProofFailed(
                        f"'{name}' was saved {'empty' if tensor.numel() == 0 else 'with values that are not finite'}", where=str(file)
                    )
                first = name.replace("lora_B", "lora_A").replace("lora_embedding_B", "lora_embedding_A")
                if moved and first != name and is_no_update(weights.get_tensor(first), tensor):
                    raise ProofFailed(
                        f"'{name}' changes nothing: this adapter learnt nothing",
                        where=str(file),
                        fix="raise tuner.learning_rate or train.epochs",
                    )
    if not seen:
        raise ProofFailed("no weights were saved", where=str(folder))
    if missing:
        raise ProofFailed(f"{len(missing)} tensors were not saved, such as '{min(missing)}'", where=str(folder))
    return seen


def is_no_update(a, b) -> bool:
    """Whether B A is zero, or what rounding leaves of it: |B A|^2 = sum of (A A^T) x (B^T B), of shape (rank, rank) in fp64."""
    a, b = a.double(), b.double()
    inside, outside = a @ a.T, b.T @ b
    return bool((inside * outside).sum() <= 1e-12 * inside.trace() * outside.trace())


def count(model, *, trained: bool = False) -> int:
    """Parameters of a model, those of ZeRO-3's partitions counted whole; only the trained ones if asked for."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad or not trained)


def describe(model, rows: list[int]) -> None:
    trained, total = count(model, trained=True), count(model)
    say(f"trains {trained:,} of {total:,} parameters ({trained / total:.2%})" + (f", {len(rows)} token rows among them" if rows else ""))
