"""Load models, adapters and tokenizers from folders, safely. Imports torch only inside functions."""

import contextlib
import logging
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

from src.chat.template import bound_templates
from src.core.artifact import Artifact
from src.core.errors import AGAIN, BadData, MissingTool, using
from src.core.files import read_json
from src.core.log import warn
from src.core.processes import absent, import_quietly, silenced
from src.models import adapter_files, safetensors_io, tokenizer_file
from src.models.folder import _allowed, base_of, check_adapter_file, check_config, check_folder, check_tokenizer, has_tokenizer, trust_of
from src.models.vocabulary import grow_vocabulary, vocabulary_rows


def load_tokenizer(path: Path, *, trust_remote_code: bool = False):
    """The tokenizer of a folder, from local files only. Raises BadData where it makes other token ids than the folder's tokenizer.json."""
    check_tokenizer(path, trust_remote_code=trust_remote_code)
    check_config(path)
    from transformers import AutoTokenizer

    _quiet()
    bound_templates()
    with using("the tokenizer", path):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
        tokenizer_file.check(tokenizer, path)
    return tokenizer


def load_model(
    path: Path,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    quantization=None,
    device_map=None,
    on_disk: dict[str, str] | None = None,
):
    """A causal language model from a folder, whole or quantized, on the CPU unless device_map says otherwise.

    dtype: auto keeps the stored one; held is that of 16-bit weights and of GPTQ's matrices made fp16, else fp32 (see held). quantization: a transformers quantization config to apply while loading. on_disk: of `modules_on_disk`, what
    stays there, for ByLayer to read.
    Raises BadData where the folder's tensors are not those the model needs: transformers would draw what is missing at random.
    """
    _quiet()
    import_quietly("transformers.modeling_utils", "transformers.quantizers.auto")
    from transformers import AutoModelForCausalLM

    config = check_folder(path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    method = (config.get("quantization_config") or {}).get("quant_method")
    gptq = method in ("gptq", "awq")  # whose kernels gptqmodel brings
    if dtype == "held":
        from src.models import held, packed, skeleton

        if method in packed.METHODS and not trust_remote_code and (model := skeleton.widened(path)):
            check_special_ids(path, model)
            return model
        dtype = held.dtype_of(path)
    if gptq:
        prepare_gptq()
    if gptq and beyond_transformers(config["quantization_config"]):
        with using("the model", path), silenced():
            model = load_with_kernels(path, dtype, "cuda" if device_map else "cpu")
        check_special_ids(path, model)
        return model
    given = {"quantization_config": quantization, "device_map": device_map}
    if on_disk:
        scratch = tempfile.TemporaryDirectory()  # for weights that transformers stores otherwise than the folder does, as experts
        given |= {"device_map": on_disk, "offload_folder": scratch.name}
    try:
        with using("the model", path), silenced() if gptq else contextlib.nullcontext():
            found: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=None if allow_pickle else True,
                **{
                    key: value for key, value in given.items() if value is not None
                },  # given as None, either would undo what the folder says
            )
    except BadData as error:
        if "ignore_mismatched_sizes" not in str(error.__cause__):
            raise
        raise BadData("tensors have other shapes than config.json describes", where=str(path), fix=MISMATCH) from error
    model, loaded = found
    check_loaded(path, model, loaded)
    check_special_ids(path, model)
    keep_nf4_trainable(model)
    if on_disk:
        model.scratch = scratch  # removed with the model
    return model


def load_with_kernels(path: Path, dtype, device: str = "cpu"):
    """A quantized folder with its own kernels: by transformers, or by gptqmodel."""
    quantized = read_json(path / "config.json")["quantization_config"]
    if quantized["quant_method"] in ("gptq", "awq"):
        prepare_gptq()
    if not beyond_transformers(quantized):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, use_safetensors=True, device_map=device
        ).eval()
    import torch
    from gptqmodel import BACKEND, GPTQModel

    wide = dtype in (torch.float32, "float32")  # in which its layers compute, but do not load
    backend = BACKEND.TORCH if device == "cpu" else BACKEND.AUTO  # the one that is chosen for a CPU has 4 bits alone
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as tempfile.tempdir:  # it makes a folder there that it leaves behind in a forked process
        try:
            model = GPTQModel.load(str(path), device=device, dtype=torch.float16 if wide else dtype, backend=backend).model.eval()
            return model.float() if wide else model
        finally:
            tempfile.tempdir = before


def beyond_transformers(block: dict) -> bool:
    """Whether a folder that GPTQ made has what transformers does not read: more than one width, or an output layer that is quantized too."""
    return bool(block.get("dynamic") or block.get("lm_head"))


MISMATCH = "take config.json and weights of one and the same model, with its names for the tensors"


def check_loaded(path: Path, model, loaded: dict) -> None:
    """Raises BadData where a folder lacks tensors of its model, or has layers that the model is not built to have.

    loaded: transformers' loading info. Tensors that belong to no part of the model, such as a further prediction head, are named in a warning.
    """
    wrong = {"missing": sorted(loaded["missing_keys"])}
    forms = {re.sub(r"\.\d+\.", ".N.", name) for name in model.state_dict()}
    unexpected = sorted(loaded["unexpected_keys"])
    wrong["beyond what config.json describes"] = [name for name in unexpected if re.sub(r"\.\d+\.", ".N.", name) in forms]
    if any(wrong.values()):
        raise BadData(
            "; ".join(f"{len(names)} tensors are {how}, such as {', '.join(names[:3])}" for how, names in wrong.items() if names),
            where=str(path),
            fix=MISMATCH,
        )
    if unexpected:
        warn(f"{path}: {len(unexpected)} tensors belong to no part of the model and are not used, such as {', '.join(unexpected[:3])}")


def check_special_ids(path: Path, model) -> None:
    """Raises BadData where generation_config.json, or config.json for it, names as a special token what is no id."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(model.generation_config, name, None)
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(one, bool) or not isinstance(one, int) or not -1 <= one < 1 << 31:
                raise BadData(f"{name}={str(value)[:100]} is no token id", where=str(path), fix=AGAIN)


def refuse_unknown_ids(model, where: Path) -> None:
    """From here on a token id that the embedding has no row for raises BadData, not what a library or a GPU makes of it."""
    rows = vocabulary_rows(model)

    def check(module, given) -> None:
        if given and (largest := int(given[0].max())) >= rows:
            raise BadData(
                f"the tokenizer gives token id {largest}, and the model has {rows} rows: they do not belong together",
                where=str(where),
                fix=[
                    "copy the model's own tokenizer files into it",
                    "python -m src.finetune gives a model without a chat template ChatML and its tokens",
                ],
            )

    model.get_input_embeddings().register_forward_pre_hook(check)


def load_any(artifact: Artifact, *, dtype: str = "auto", device: str = "cpu", base: Path | None = None, tokens: int = 0):
    """(model in eval mode, tokenizer) of an adapter, a model or a quantized artifact.

    dtype: as load_model has it; held computes in fp32. base: where the adapter's base is, if not where it
    was. tokens: ids it has to know; its vocabulary grows to as many.
    """
    trust, adapter = bool(trust_of(artifact)), artifact.path if artifact.kind == "adapter" else None
    if adapter:
        check_adapter_file(adapter)
    folder = (base or base_of(artifact)) if adapter else artifact.path
    own = adapter if adapter and has_tokenizer(adapter) else folder
    tokenizer = load_tokenizer(own, trust_remote_code=trust)
    nf4 = artifact.metrics.get("nf4") if adapter else None
    model = load_model(
        folder,
        dtype=dtype,
        trust_remote_code=trust,
        allow_pickle=bool(adapter) and _allowed(artifact, "allow_pickle"),
        quantization=nf4_config(**nf4) if nf4 else None,
    )
    if adapter:
        grow_for_adapter(model, adapter, len(tokenizer))
    grow_vocabulary(model, tokens)
    if dtype == "held":
        from src.models import held

        held.hold(model)
    if adapter:
        model = with_adapter(model, adapter)
    refuse_unknown_ids(model, artifact.path)
    return model.to(device).eval(), tokenizer


def grow_for_adapter(model, adapter: Path, tokens: int) -> None:
    """Give a base as many rows as it had in the adapter's training: those of the tables the adapter holds, into as many of which peft loads them, or
    those of its tokenizer's `tokens`."""
    if rows := adapter_files.table_rows(adapter):
        model.resize_token_embeddings(rows, mean_resizing=False)
    else:
        grow_vocabulary(model, tokens)


def with_adapter(model, adapter: Path):
    """peft's model of an adapter on its base."""
    import_peft()
    from peft import PeftModel

    from src.models.token_rows import rows_beside_their_matrix

    rows_beside_their_matrix()
    with using("the adapter", adapter), warnings.catch_warnings():
        # Of layers that are on disk: ByLayer does what torch says was not done.
        warnings.filterwarnings("ignore", message="for .*: copying from a non-meta parameter")
        model = PeftModel.from_pretrained(model, adapter)
    check_adapter(adapter, model)
    return model


def check_adapter(path: Path, model) -> None:
    """Raises BadData where an adapter's file does not hold what its configuration makes trained layers of: peft would leave those as they begin."""
    from peft import get_peft_model_state_dict

    needed = {name: tuple(t.shape) for name, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    found = {name: entry.shape for name, entry in safetensors_io.entries(path, "adapter_model*.safetensors").items()}
    missing = sorted(name for name in needed if name not in found)
    unknown = sorted(name for name in found if name not in needed and not adapter_files.TABLE.search(name))
    if missing or unknown:
        told = [
            f"{len(names)} tensors are {how}, such as {names[0]}" for how, names in (("missing", missing), ("unknown", unknown)) if names
        ]
        raise BadData(
            "the adapter does not belong to this base: " + "; ".join(told),
            where=str(path),
            fix="give the base it was trained on, with all files of the adapter",
        )


def tokenizer_of(artifact: Artifact, base: Path | None = None):
    """The tokenizer that belongs to an adapter, a model or a quantized artifact, without loading the model. base: see load_any."""
    folder = (base or base_of(artifact)) if artifact.kind == "adapter" and not has_tokenizer(artifact.path) else artifact.path
    return load_tokenizer(folder, trust_remote_code=bool(trust_of(artifact)))


def nf4_config(double_quant: bool, compute_dtype: str = "float32"):
    """bitsandbytes' 4-bit NormalFloat quantization while loading (Dettmers et al. 2023, arXiv:2305.14314)."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
    )


def keep_nf4_trainable(model) -> None:
    """bitsandbytes 0.50 repacks 4-bit weights for inference at the first no_grad forward on AVX512-BF16 machines, after which gradients are
    wrong without a word; this forbids it."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def keep_gptq_trainable(model) -> None:
    """gptqmodel 7.6 turns a CPU layer for good into one without gradients at the first no_grad forward in eval mode; this forbids it."""
    for module in model.modules():
        if hasattr(module, "qweight") and hasattr(module, "linear_mode"):
            module.linear_mode = "train"


def import_peft() -> None:
    """Import peft without the quantization libraries that the process does without.

    peft compares each layer with the quantized ones of all libraries that are installed, and imports them for it, which takes longer than all else it
    does. Here it finds those that are imported already, as they are once a base with such layers is loaded: call this again then.
    """
    others = ("bitsandbytes", "gptqmodel", "torchao")
    import_quietly("peft", without=others)
    from peft import import_utils as checks

    with absent(others):
        for check in (checks.is_bnb_available, checks.is_bnb_4bit_available, checks.is_gptqmodel_available, checks.is_torchao_available):
            check.cache_clear()
            check()


def prepare_gptq() -> None:
    """Import gptqmodel, which brings the layers of a GPTQ model, without what it has for other formats and for calibration."""
    try:
        import_quietly("gptqmodel", without=["bitsandbytes", "datasets"])
    except ImportError as error:
        raise MissingTool("gptqmodel cannot be imported", where=str(error), fix="pip install -r requirements.txt") from error


def _quiet() -> None:
    """Keep libraries' progress bars, banners and advice off the terminal; what matters is said by the stage."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    # peft of adapters made elsewhere: what comes of it is proven.
    warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    for library in ("transformers", "torch"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
