"""A model taken over many rows a layer at a time: each layer is read once from its file, all rows go through it, and it is let go again.

Memory is that of the largest of embedding, layer and output layer in fp32, and of the rows' hidden states, however deep the model is. What a model does
before its layers, between them and after the last is its own code, run as it stands: its forward is called with layers that note what they are given
and hand their input on, later with a last layer that gives the true hidden states.
"""

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from src.core.artifact import Artifact
from src.core.errors import BadData
from src.core.files import read_json
from src.core.log import progress
from src.core.processes import import_quietly
from src.models import adapter_files, bnb, held, loading, merging, packed, safetensors_io
from src.models.folder import base_of, check_adapter_file, has_tokenizer, trust_of
from src.models.vocabulary import grow_vocabulary, vocabulary_rows

TOGETHER = 1024
"""tokens of the rows that go through a layer together, padding included: enough for the products to reach the processor's speed"""
HIDDEN = 256 << 20
"""bytes of hidden states held at once, fp32; more rows go in several rounds, each of which reads the model again"""
PROBE = list(range(8))
LOGITS = 32 << 20
"""bytes of logits made at a time, fp32"""


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs, and where it is stored: its entry, or a function that loads it. full: its name in the folder."""

    module: Any
    name: str
    full: str
    source: safetensors_io.Entry | packed.Packed | Callable[[], torch.Tensor]

    def load(self, into: torch.Tensor | None, *, narrow: bool) -> torch.Tensor:
        """The tensor, fp32; written over `into` where that is given. narrow: as it is stored, if its module computes in fp32 from that."""
        if narrow and held.is_held(self.module) and isinstance(self.source, safetensors_io.Entry):
            return safetensors_io.load(self.source)
        if isinstance(self.source, safetensors_io.Entry):
            return safetensors_io.load_wide(self.source, into)
        return self.source().float()


@dataclass(frozen=True)
class Places:
    """What of a model is on disk. name: of the list of its decoder's layers. layers: in order. tensors: of each layer by its number, of "embedding" and "head"."""

    name: str
    layers: list[torch.nn.Module]
    tensors: dict[int | str, list[Place]]


@dataclass
class Pass:
    """A batch of rows on its way. ids: int64 (rows, longest). mask: int64 of the same shape; None without padding. hidden: fp32 (rows, longest, width),
    as the next layer takes it. calls: for each layer what its model gives it beside the hidden states."""

    ids: torch.Tensor
    mask: torch.Tensor | None
    hidden: torch.Tensor
    calls: list[tuple[tuple, dict]] = field(default_factory=list)


class Reached(Exception):
    """The part of a forward pass that was wanted is done."""


class ByLayer:
    """See the module, and `load`, which makes one."""

    def __init__(self, model: Any, *, nf4: dict | None = None, device: str = "cpu"):
        """model: of `load`, also with an adapter on it. nf4: how its layers' weights are rounded, as bitsandbytes would; see merging."""
        self.model, self.nf4, self.device = model.eval(), nf4, device
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_meta:
                tensor.data = tensor.data.to(device)
        self.places: Places = (model.get_base_model() if hasattr(model, "peft_config") else model).places
        self.layers = self.places.layers
        self._forwards = [layer.forward for layer in self.layers]
        self.changed: Callable[[int | str, Place, torch.Tensor], torch.Tensor] | None = None
        """what a weight, fp32, becomes when it is read, by what it is of and its place; see on_board"""
        self._tuple: bool | None = None
        self._spare: dict[tuple, list[torch.Tensor]] = defaultdict(list)

    @property
    def chunk(self) -> int:
        """Tokens to take through the output layer at a time."""
        return max(32, LOGITS // (4 * vocabulary_rows(self.model)))

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return self.model.config.get_text_config().hidden_size

    # ---- weights

    @contextlib.contextmanager
    def held(self, what: int | str) -> Iterator[None]:
        """The weights of a layer, the embedding or the output layer are in memory within the block."""
        empty = []
        for place in self.places.tensors.get(what, ()):
            meta = place.module._parameters[place.name]
            spare = self._spare[tuple(meta.shape)]
            tensor = place.load(spare.pop() if spare else None, narrow=not isinstance(what, int))
            if self.nf4 and isinstance(what, int) and isinstance(place.module, torch.nn.Linear):
                tensor = merging.as_nf4_made_it(tensor, self.nf4).float()
            if self.changed:
                tensor = self.changed(what, place, tensor.float())
            place.module._parameters[place.name] = torch.nn.Parameter(tensor.to(self.device), requires_grad=False)
            empty.append((place, meta))
        try:
            yield
        finally:
            for place, meta in empty:
                if isinstance(what, int) and self.device == "cpu":  # memory for the next layer, which costs time to ask the kernel for
                    self._spare[tuple(meta.shape)].append(place.module._parameters[place.name].data)
                place.module._parameters[place.name] = meta

    @contextlib.contextmanager
    def whole(self) -> Iterator[Any]:
        """The model with all of its weights in memory within the block, in fp32, as transformers' own."""
        with contextlib.ExitStack() as stack:
            for what in self.places.tensors:
                stack.enter_context(self.held(what))
            yield self.model
        self._spare.clear()

    def names(self, number: int) -> list[tuple[str, torch.nn.Module]]:
        """(name in the folder, without ".weight"; module) of a layer's modules that have a weight."""
        return [(p.full.removesuffix(".weight"), p.module) for p in self.places.tensors[number] if p.name == "weight"]

    @property
    def own_head(self) -> str | None:
        """Name in the folder, without ".weight", of an output layer that is not the embedding too; None where it is."""
        tables, heads = (
            [place.full for place in self.places.tensors.get(what, ()) if place.name == "weight"] for what in ("embedding", "head")
        )
        return heads[0].removesuffix(".weight") if heads and heads != tables else None

    def take(self, tensor: Callable[[str], torch.Tensor]) -> None:
        """From here on every weight is what `tensor` gives for its name in the folder, read anew each time; those held all along are replaced once."""
        tensors = {
            what: [replace(place, source=partial(tensor, place.full)) for place in places] for what, places in self.places.tensors.items()
        }
        self.places = replace(self.places, tensors=tensors)
        for name, parameter in self.model.named_parameters():
            if not parameter.is_meta:
                parameter.data.copy_(tensor(name))

    # ---- a pass

    def batches(self, rows: list[list[int]]) -> Iterator[list[int]]:
        """Numbers of rows that go together, the longest first."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        while order:
            count = max(1, TOGETHER // max(1, len(rows[order[0]])))
            yield order[:count]
            order = order[count:]

    def start(self, rows: list[list[int]], factor: float = 1.0) -> Pass:
        """Rows of token ids through the embedding, with what their layers will be given noted. The embedding has to be held.

        factor: of the hidden states that the layers hand on meanwhile, which what they are given must not depend on.
        """
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
        even = all(len(row) == longest for row in rows)
        mask = None if even else torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.device)
        begun = Pass(ids, mask, torch.empty(0))
        if self._tuple is None:
            self._tuple = self._gives_tuple(begun)

        def note(number: int) -> Callable:
            def forward(*args, **kwargs):
                hidden, args, kwargs = _apart(args, kwargs)
                begun.calls.append((args, kwargs))
                if number == 0:
                    begun.hidden = hidden
                if number == len(self.layers) - 1:
                    raise Reached
                return self._as_given(hidden * factor)

            return forward

        with self._layers_as(note), contextlib.suppress(Reached), torch.no_grad():
            self._forward(begun)
        return begun

    def through(self, number: int, passes: Iterable[Pass]) -> None:
        """Every pass through a layer, which has to be held."""
        with torch.no_grad():
            for each in passes:
                each.hidden = self.call(number, each)

    def call(self, number: int, each: Pass) -> torch.Tensor:
        args, kwargs = each.calls[number]
        given = self.layers[number](each.hidden, *args, **kwargs)
        return given[0] if isinstance(given, tuple) else given

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `head` gives them, without what a gradient would need."""
        with torch.no_grad():
            return self.head(hidden)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model makes of the last layer's hidden states, (tokens, width): logits, fp32 (tokens, vocabulary). The output layer has to be held."""

        def give(number: int) -> Callable:
            last = number == len(self.layers) - 1
            return lambda *args, **kwargs: self._as_given(hidden[None] if last else _apart(args, kwargs)[0])

        with self._layers_as(give):
            return self.model(inputs_embeds=hidden[None], use_cache=False).logits[0].float()

    def into_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the output layer is given of the last layer's hidden states, (tokens, width): fp32 of the same shape."""
        found: list[torch.Tensor] = []

        def note(module, given) -> None:
            found.append(given[0][0])
            raise Reached

        hook = self.model.get_output_embeddings().register_forward_pre_hook(note)
        with contextlib.suppress(Reached):
            self.logits(hidden)
        hook.remove()
        return found[0]

    def run(self, rows: list[list[int]], what: str) -> list[torch.Tensor]:
        """The last layer's hidden states of each row of token ids, fp32 (tokens, width). what: told with the progress."""
        groups = list(self.batches(rows))
        with self.held("embedding"):
            passes = [self.start([rows[i] for i in group]) for group in groups]
        for number in progress(range(len(self.layers)), what):
            with self.held(number):
                self.through(number, passes)
            for each in passes:
                each.calls[number] = ((), {})
        self._spare.clear()
        found: dict[int, torch.Tensor] = {}
        for group, each in zip(groups, passes):
            found |= {i: each.hidden[at, : len(rows[i])] for at, i in enumerate(group)}
        return [found[i] for i in range(len(rows))]

    def works(self) -> bool:
        """Whether this model can be taken so: its layers hand hidden states alone to the next, and are given nothing that is made of them."""
        try:
            with self.held("embedding"):
                one, other = (self.start([PROBE], factor) for factor in (1.0, -2.0))
            with self.held(0):
                hidden = self.call(0, one)
            self._spare.clear()
            with self.held("head"):
                self.logits(hidden[0])
            return hidden.shape == one.hidden.shape and _same(one.calls, other.calls)
        except (BadData, RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):
            return False
        finally:
            self._spare.clear()

    # ---- the model's own code

    @contextlib.contextmanager
    def _layers_as(self, stand_in: Callable[[int], Callable]) -> Iterator[None]:
        for number, layer in enumerate(self.layers):
            layer.forward = stand_in(number)
        try:
            yield
        finally:
            for layer, forward in zip(self.layers, self._forwards):
                layer.forward = forward

    def _forward(self, begun: Pass) -> None:
        self.model(input_ids=begun.ids, **({} if begun.mask is None else {"attention_mask": begun.mask}), use_cache=False)

    def _as_given(self, hidden: torch.Tensor) -> Any:
        return (hidden,) if self._tuple else hidden

    def _gives_tuple(self, begun: Pass) -> bool:
        """Whether layers return a tuple: the first one is asked."""
        found: list[bool] = []

        def ask(number: int) -> Callable:
            def forward(*args, **kwargs):
                found.append(isinstance(self._forwards[0](*args, **kwargs), tuple))
                raise Reached

            return forward

        with self.held(0), self._layers_as(ask), contextlib.suppress(Reached), torch.no_grad():
            self._forward(begun)
        return found[0]


def _apart(args: tuple, kwargs: dict) -> tuple[torch.Tensor, tuple, dict]:
    """(hidden states, the other arguments) of a layer's call."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


def _same(one: Any, other: Any) -> bool:
    """Whether two values of any make hold equal tensors."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return all(_same(one[name], other[name]) for name in one)
    return len(one) == len(other) and all(map(_same, one, other)) if isinstance(one, list | tuple) else True


# ---- loading


def load(artifact: Artifact, base: Path | None = None, tokens: int = 0, device: str = "cpu") -> tuple[ByLayer, Any] | None:
    """(the model to be taken layer by layer, tokenizer) of a model, or of an adapter on its base; None where that cannot be: weights quantized otherwise
    than by GPTQ, symmetrically, to 3, 4 or 8 bits, or by bitsandbytes, code of the model's own, layers that are no one list or share more than hidden states, adapters with more
    than A and B, and trained token rows, in them.

    base: where the adapter's base is, if not where it was. tokens: ids it has to know. device: where layers are computed.
    """
    trust = bool(trust_of(artifact))
    if trust:
        return None
    if artifact.kind in ("model", "quantized"):
        if not (model := _on_disk(artifact.path)) or vocabulary_rows(model) < tokens:
            return None
        loading.refuse_unknown_ids(model, artifact.path)
        return (found, loading.load_tokenizer(artifact.path)) if (found := ByLayer(model, device=device)).works() else None
    check_adapter_file(artifact.path)
    base = base or base_of(artifact)
    if not adapter_files.streams(artifact.path):
        return None
    tokenizer = loading.load_tokenizer(artifact.path if has_tokenizer(artifact.path) else base)
    grows = max(tokens, len(tokenizer)) > (read_json(base / "config.json").get("vocab_size") or 0)
    inside = all(
        safetensors_io.INSIDE.search(name) or name.endswith(".trainable_tokens_delta")
        for name in safetensors_io.entries(artifact.path, "adapter_model*.safetensors")
    )
    if any(base.glob("*.bin")) or not (model := _on_disk(base, ends=inside and not grows)):
        return None
    loading.grow_for_adapter(model, artifact.path, len(tokenizer))
    grow_vocabulary(model, tokens)
    model = loading.with_adapter(model, artifact.path)
    bring_back(artifact.path, model)
    loading.refuse_unknown_ids(model, artifact.path)
    return (found, tokenizer) if (found := ByLayer(model, nf4=artifact.metrics.get("nf4"), device=device)).works() else None


def need(artifact: Artifact) -> ByLayer:
    """The same of a model that is known to be one: another one that its shape comes from has been taken so."""
    if not (found := load(artifact)):
        raise RuntimeError(f"{artifact.path} cannot be taken layer by layer")
    return found[0]


def _on_disk(path: Path, *, ends: bool = True) -> Any:
    """transformers' model of a folder with its places, its layers and, with `ends`, its embedding and output layer still on disk.

    None where transformers cannot leave them there.
    """
    import_quietly("transformers.modeling_utils", "transformers.quantizers.auto")
    from transformers import AutoConfig

    from src.models import skeleton

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    quantized = getattr(config, "quantization_config", None)
    if quantized and quantized.get("quant_method") not in packed.METHODS:
        return None
    if config.is_encoder_decoder or config.model_type.startswith("bigbird"):  # the latter's attention sees padding
        return None
    model = skeleton.build(config)
    count = config.get_text_config().num_hidden_layers
    lists = (name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList) and len(module) == count)
    if (layers := next(lists, None)) is None:
        return None
    entries = packed.matrices(safetensors_io.entries(path))
    stored = {parameter: name for name, parameter in model.named_parameters(remove_duplicate=False) if name in entries}
    if not skeleton.stored_as_named(model, entries):
        return None if quantized else _left_by_transformers(path, model, layers, ends=ends)
    tensors: dict[int | str, list[Place]] = defaultdict(list)
    loaded: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for module, own, name, what in _parameters(model, layers):
        empty = module._parameters[own]
        at = entries[name] if name in entries else entries[stored[empty]]  # one that is tied is stored once
        if what is not None and (ends or isinstance(what, int)):
            tensors[what].append(Place(module, own, at.name, at))
        else:
            if empty not in loaded:
                loaded[empty] = torch.nn.Parameter(Place(module, own, name, at).load(None, narrow=False), requires_grad=False)
            module._parameters[own] = loaded[empty]
    skeleton.fill_buffers(model, entries)
    bnb.round_inputs(model, entries, quantized or {})
    _hold_ends(tensors)
    model.places = Places(layers, list(model.get_submodule(layers)), dict(tensors))
    return model


def _parameters(model: Any, layers: str) -> Iterator[tuple[Any, str, str, int | str | None]]:
    """(module, name in it, name in the model, what it belongs to: a layer's number, "embedding", "head" or None) of every parameter, tied ones twice."""
    ends = {id(model.get_input_embeddings()): "embedding", id(model.get_output_embeddings()): "head"}
    for name, module in model.named_modules():
        inside = re.match(rf"{re.escape(layers)}\.(\d+)(\.|$)", name)
        for own in module._parameters:
            if module._parameters[own] is not None:
                yield module, own, f"{name}.{own}", int(inside[1]) if inside else ends.get(id(module))


def _hold_ends(tensors: dict[int | str, list[Place]]) -> None:
    for place in (*tensors.get("embedding", ()), *tensors.get("head", ())):
        vars(place.module).pop("forward", None)  # of the class it was, left behind by accelerate's hook
        held.hold_one(place.module)


def _left_by_transformers(path: Path, empty: Any, layers: str, *, ends: bool) -> Any:
    """The same of a model that transformers stores otherwise than it holds it, such as experts one by one: it reads every tensor once and writes those
    into a folder of its own. None where it cannot leave them on disk."""
    from accelerate.hooks import remove_hook_from_module

    try:
        model = loading.load_model(path, dtype="float32", on_disk=modules_on_disk(empty, layers, ends=ends))
    except BadData as error:
        if "meta device" in str(error):
            return None
        raise
    entries = safetensors_io.entries(path)
    tensors: dict[int | str, list[Place]] = defaultdict(list)
    for module, own, name, what in _parameters(model, layers):
        stored = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if what is not None and stored is not None and module._parameters[own].is_meta:
            full = stored.dataset.index.get(name, {}).get("weight_name", name)
            tensors[what].append(Place(module, own, full, entries.get(full) or partial(stored.dataset.__getitem__, name)))
    if model.config.get_text_config().tie_word_embeddings and "head" in tensors:
        tensors["head"] = [replace(p, source=tensors["embedding"][0].source, full=tensors["embedding"][0].full) for p in tensors["head"]]
    remove_hook_from_module(model, recurse=True)
    del model.hf_device_map
    _hold_ends(tensors)
    model.places = Places(layers, list(model.get_submodule(layers)), dict(tensors))
    return model


def modules_on_disk(empty: Any, layers: str, *, ends: bool) -> dict[str, str]:
    """transformers' device_map of a model whose layers stay on disk, with its `ends`, embedding and output layer, or without: {module: "disk" or "cpu"}."""
    far = {empty.get_input_embeddings(), empty.get_output_embeddings()} if ends else set()
    every = (*empty.named_parameters(remove_duplicate=False), *empty.named_buffers())
    others = {name.rpartition(".")[0] for name, _ in every if not name.startswith(f"{layers}.")}
    count = len(empty.get_submodule(layers))
    return {f"{layers}.{i}": "disk" for i in range(count)} | {
        name: "disk" if empty.get_submodule(name) in far else "cpu" for name in others
    }


def bring_back(adapter: Path, model: Any) -> None:
    """Give an adapter on a base whose layers are on disk its A and B: peft has put them where its layers' weights are, which is nowhere."""
    stored = safetensors_io.entries(adapter, "adapter_model*.safetensors")
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and (key := name.replace(".default", "")) in stored:
            module, _, what = name.rpartition(".")
            tensor = safetensors_io.load_wide(stored[key])
            setattr(model.get_submodule(module), what, torch.nn.Parameter(tensor, requires_grad=False))
