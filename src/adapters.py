"""What is trained: adapters on the linear layers, and the rows of control tokens the base model never learnt."""

import json
from pathlib import Path

from src.config import LoraTuner, Optimizer
from src.errors import ConfigError, ProofFailed
from src.log import say
from src.modeling import whole


def attach(model, tuner: LoraTuner, rows: list[int], *, deepspeed: bool):
    """The model with LoRA adapters on its linear layers and, beside them, the embedding and output rows `rows` made trainable.

    deepspeed: keep adapters in the base's dtype, since ZeRO refuses parameters of several.
    """
    from peft import LoraConfig, get_peft_model

    keep_rows_under_zero3()
    targets = tuner.target_modules
    if targets == "all-linear":
        # peft's own meaning of it leaves out GPTQ's layers, which are no torch.nn.Linear.
        targets = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "qweight")}) or targets
    else:
        names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        missing = [t for t in targets if t not in names and not any(n.endswith(t) for n, _ in model.named_modules())]
        if missing:
            raise ConfigError(
                f"tuner.target_modules: the model has no layer called {', '.join(missing)}", fix="tuner.target_modules=all-linear"
            )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=tuner.rank,
        lora_alpha=tuner.alpha,
        lora_dropout=tuner.dropout,
        target_modules=targets if targets == "all-linear" else list(targets),
        bias="none",
        trainable_token_indices=dict.fromkeys(vocabulary_layers(model), rows) if rows else None,
    )
    return get_peft_model(model, config, autocast_adapter_dtype=not deepspeed)


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
    """peft writes target_modules in the order of a set, which differs between runs, and the weights for the owner's eyes only."""
    config = folder / "adapter_config.json"
    content = json.loads(config.read_text())
    content["target_modules"] = sorted(content["target_modules"])
    config.write_text(json.dumps(content, indent=2) + "\n")
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)


def check_saved(folder: Path, *, adapter: bool) -> int:
    """Open what was saved: no tensor empty or not finite, and every adapter's update moved from zero. Returns the tensors seen."""
    from safetensors import safe_open

    seen = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                tensor = weights.get_tensor(name)
                seen += 1
                if tensor.numel() == 0 or not tensor.isfinite().all():
                    raise ProofFailed(
                        f"'{name}' was saved {'empty' if tensor.numel() == 0 else 'with values that are not finite'}", where=str(file)
                    )
                if adapter and "lora_B" in name and not tensor.any():
                    raise ProofFailed(
                        f"'{name}' is all zero: this adapter learnt nothing",
                        where=str(file),
                        fix="raise tuner.learning_rate or train.epochs",
                    )
    if not seen:
        raise ProofFailed("no weights were saved", where=str(folder))
    return seen


def describe(model, rows: list[int]) -> None:
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    total = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    say(f"trains {trained:,} of {total:,} parameters ({trained / total:.2%})" + (f", {len(rows)} token rows among them" if rows else ""))
