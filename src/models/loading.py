"""Load models, adapters and tokenizers from folders, safely. Imports torch only inside functions."""

import contextlib
import logging
from pathlib import Path

from src.core.artifact import Artifact
from src.core.errors import MissingTool
from src.core.processes import import_quietly, silenced
from src.models.folder import _allowed, base_of, check_folder, check_tokenizer, has_tokenizer, trust_of
from src.models.vocabulary import grow_vocabulary


def load_tokenizer(path: Path, *, trust_remote_code: bool = False):
    """The tokenizer of a folder, from local files only."""
    check_tokenizer(path)
    from transformers import AutoTokenizer

    _quiet()
    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)


def load_model(
    path: Path, *, dtype: str = "auto", trust_remote_code: bool = False, allow_pickle: bool = False, quantization=None, device_map=None
):
    """A causal language model from a folder, whole or quantized, on the CPU unless device_map says otherwise.

    dtype: auto keeps the stored one. quantization: a transformers quantization config to apply while loading.
    """
    _quiet()
    import_quietly("transformers.modeling_utils", "transformers.quantizers.auto")
    from transformers import AutoModelForCausalLM

    config = check_folder(path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    gptq = (config.get("quantization_config") or {}).get("quant_method") == "gptq"
    if gptq:
        prepare_gptq()
    given = {"quantization_config": quantization, "device_map": device_map}
    with silenced() if gptq else contextlib.nullcontext():
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle else True,
            **{key: value for key, value in given.items() if value is not None},  # given as None, either would undo what the folder says
        )
    keep_nf4_trainable(model)
    return model


def load_any(artifact: Artifact, *, dtype: str = "auto", device: str = "cpu", base: Path | None = None):
    """(model in eval mode, tokenizer) of an adapter, a model or a quantized artifact. base: where the adapter's base is, if not where it was."""
    trust = bool(trust_of(artifact))
    if artifact.kind != "adapter":
        return load_model(artifact.path, dtype=dtype, trust_remote_code=trust).to(device).eval(), load_tokenizer(
            artifact.path, trust_remote_code=trust
        )
    import_quietly("peft", "gptqmodel")
    from peft import PeftModel

    base, quantization = base or base_of(artifact), None
    if nf4 := artifact.metrics.get("nf4"):
        quantization = nf4_config(**nf4)
    tokenizer = load_tokenizer(artifact.path if has_tokenizer(artifact.path) else base, trust_remote_code=trust)
    pickle = _allowed(artifact, "allow_pickle")
    model = load_model(base, dtype=dtype, trust_remote_code=trust, allow_pickle=pickle, quantization=quantization)
    grow_vocabulary(model, len(tokenizer))
    return PeftModel.from_pretrained(model, artifact.path).to(device).eval(), tokenizer


def tokenizer_of(artifact: Artifact):
    """The tokenizer that belongs to an adapter, a model or a quantized artifact, without loading the model."""
    folder = base_of(artifact) if artifact.kind == "adapter" and not has_tokenizer(artifact.path) else artifact.path
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


def prepare_gptq() -> None:
    try:
        import_quietly("gptqmodel")
    except ImportError as error:
        raise MissingTool("gptqmodel cannot be imported", where=str(error), fix="pip install -r requirements.txt") from error


def _quiet() -> None:
    """Keep libraries' progress bars, banners and advice off the terminal; what matters is said by the stage."""
    import warnings

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    for library in ("transformers", "torch"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
