"""Load models, adapters and tokenizers from folders, safely. Imports torch only inside functions."""

import concurrent.futures
import contextlib
import importlib
import json
import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from src import rounding, shards
from src.artifact import AGAIN, Artifact, read_json
from src.errors import BadData, MissingInput, MissingTool, UserError, WrongKind
from src.log import say

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
LFS = b"version https://git-lfs.github.com/spec/v1"


def locate(path: str, revision: str | None = None, *, download: bool = True, allow_pickle: bool = False) -> Path:
    """The local folder of a model named by a folder or by a hub id such as Qwen/Qwen2.5-0.5B-Instruct, which is downloaded once.

    download: False looks only at what was downloaded before. Raises MissingInput when it is neither, or the hub cannot be reached.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise MissingInput(
            "no such model folder", where=path, fix="give a folder that holds config.json, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [
        "*.json",
        "*.safetensors",
        "*.model",
        "*.txt",
        "*.jinja",
        "*.py",
        "*.cu",
        "*.cpp",
        "*.tiktoken",
        *(["*.bin"] if allow_pickle else []),
    ]
    if not download:
        say(f"looks for {path} among the models downloaded before, since a dry run downloads nothing")
    with _user_fault(
        (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError),
        f"no folder '{path}' here, and the hub did not give a model of that name",
        path,
    ):
        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted, local_files_only=not download))


@contextlib.contextmanager
def _user_fault(errors, what: str, where: str, fix: str = "check the name, the network and, for gated models, HF_TOKEN"):
    try:
        yield
    except errors as error:
        raise MissingInput(f"{what}: {str(error).strip().splitlines()[0]}", where=where, fix=fix) from error


def check_folder(path: Path, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> dict:
    """Look at a model folder without loading it and return its config.

    Raises MissingInput where files are missing or are Git LFS pointers, BadData where they are damaged, WrongKind for pickled weights or custom code that were not allowed.
    """
    config = read_json(path / "config.json")
    index = path / "model.safetensors.index.json"
    named = read_json(index).get("weight_map") if index.is_file() else {"": WEIGHTS[0]}
    if not isinstance(named, dict) or not named or not all(isinstance(n, str) and Path(n).name == n for n in named.values()):
        raise BadData("its weight_map does not name the files beside it", where=str(index), fix=AGAIN)
    files = sorted(set(named.values()))
    if not any((path / name).is_file() for name in WEIGHTS):
        if not any((path / name).is_file() for name in PICKLES):
            raise MissingInput(
                "the folder has a config.json but no weights",
                where=str(path),
                fix="it needs model.safetensors, or its shards with model.safetensors.index.json",
            )
        if not allow_pickle:
            raise WrongKind(
                "the weights are a pickle (pytorch_model.bin), which can run any code when loaded",
                where=str(path),
                fix=["use a safetensors version of the model", "model.allow_pickle=true if you trust its maker"],
            )
        files = []
    for shard in files:
        file = path / shard
        if not file.is_file():
            raise MissingInput(f"weight file '{shard}' is missing", where=str(path), fix="copy or download it again")
        with open(file, "rb") as stream:
            if stream.read(len(LFS)) == LFS:
                raise MissingInput(
                    f"'{shard}' is a Git LFS pointer, not the weights", where=str(path), fix="run `git lfs pull` in that repository"
                )
    if files:
        shards.entries(path)
    if config.get("auto_map") and not trust_remote_code:
        raise WrongKind(
            "the model brings Python code of its own",
            where=str(path / "config.json"),
            fix="model.trust_remote_code=true runs it, if you have read it and trust it",
        )
    return config


def check_tokenizer(path: Path) -> None:
    """Raises MissingInput where a folder holds no tokenizer file of any kind."""
    if not any(
        (path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "qwen.tiktoken", "tokenizer_config.json")
    ):
        raise MissingInput(
            "the folder has no tokenizer",
            where=str(path),
            fix=f"python -m src.aux_files source=BASE_MODEL target={path} copies it from the base model",
        )


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


def has_tokenizer(path: Path) -> bool:
    return (path / "tokenizer_config.json").is_file()


def trust_of(artifact: Artifact) -> bool:
    """Whether custom code was allowed when this artifact's model was trained."""
    return _allowed(artifact, "trust_remote_code")


def _allowed(artifact: Artifact, what: str) -> bool:
    """Whether a setting of the model group was true for this artifact or for one it was made from."""
    records = [artifact.manifest or {}, *(artifact.manifest or {}).get("ancestors", {}).values()]
    return any((r.get("settings", {}).get("model") or {}).get(what) for r in records)


def base_of(adapter: Artifact) -> Path:
    """The folder of the model an adapter was trained on: from its manifest, or from adapter_config.json for one made elsewhere."""
    if parent := adapter.parent("model"):
        path = adapter.path_of(parent)
    else:
        path = Path(read_json(adapter.path / "adapter_config.json").get("base_model_name_or_path") or "?")
    if not path.is_dir():
        raise MissingInput("the adapter's base model is not where it was", where=str(path), fix="base=FOLDER names its new place")
    return path


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


def prepare_gptq_workers() -> None:
    """gptqmodel asks for more CPU workers than a small machine has and fails, unless told otherwise before its import."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(min(os.cpu_count() or 1, 8)))


def prepare_gptq() -> None:
    try:
        import_quietly("gptqmodel")
    except ImportError as error:
        raise MissingTool("gptqmodel cannot be imported", where=str(error), fix="pip install -r requirements.txt") from error


def grow_vocabulary(model, rows: int) -> int:
    """Give the embedding and output layer at least `rows` rows; new ones start as the mean of the old, so every process gets the same.

    Returns how many rows were added.
    """
    import torch

    old = vocabulary_rows(model)
    if rows <= old:
        return 0
    model.resize_token_embeddings(rows, mean_resizing=False)
    layers = {
        id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None
    }
    for weight in layers.values():
        with torch.no_grad(), whole([weight]):
            weight[old:] = mean_row(weight[:old])
    return rows - old


def mean_row(weight):
    """Mean over rows of (rows, width), computed in fp32, in the dtype of the weight."""
    return weight.float().mean(0).to(weight.dtype)


def whole(parameters: list):
    """A context in which parameters that ZeRO-3 has partitioned are whole on every rank, and changes are kept."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def vocabulary_rows(model) -> int:
    """Rows of the embedding, also where peft wraps it or ZeRO-3 has taken its data away."""
    weight = model.get_input_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def stored_dtype(path: Path) -> str:
    """The dtype a folder's config names for its weights; float32 where it names none."""
    config = read_json(path / "config.json")
    return config.get("dtype") or config.get("torch_dtype") or "float32"


def cast_folder(path: Path, dtype: str, how: str) -> None:
    """Rewrite a saved model's shards in `dtype`, one shard in memory at a time, where they differ from it; its config says so too.

    how: see rounding.narrow.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    wanted = getattr(torch, dtype)
    for file in sorted(path.glob("model*.safetensors")):
        with safe_open(file, "pt") as weights:
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}
        if any(t.is_floating_point() and t.dtype != wanted for t in tensors.values()):
            tensors = {name: rounding.narrow(t, wanted, name, rounding=how) if t.is_floating_point() else t for name, t in tensors.items()}
            save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(0o644)  # DeepSpeed leaves 0600
    config = read_json(path / "config.json")
    config["dtype"] = dtype
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def fresh(function: Callable, *args):
    """The result of a module-level function run in a new process, offline, which shares nothing with this one but the disk."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                "the checking process was killed, most likely for lack of memory", fix="free memory and run the same command again"
            ) from None


def device() -> str:
    """cuda where there is a GPU, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _quiet() -> None:
    """Keep libraries' progress bars, banners and advice off the terminal; what matters is said by the stage."""
    import warnings

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    for library in ("transformers", "torch"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)


def import_quietly(*modules: str) -> None:
    """Import libraries that greet (peft brings gptqmodel, torchao and bitsandbytes) without their greetings."""
    prepare_gptq_workers()
    with silenced():
        for module in modules:
            importlib.import_module(module)


@contextlib.contextmanager
def silenced():
    """Nothing written to stdout or stderr, by Python or native code, shows; when the block raises, what was held back is printed first."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        saved = [os.dup(1), os.dup(2)]
        os.dup2(held.fileno(), 1)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            _restore(saved)
            held.seek(0)
            sys.stderr.write(held.read().decode(errors="replace"))
            raise
        else:
            _restore(saved)


def _restore(saved: list[int]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for number, copy in enumerate(saved, 1):
        os.dup2(copy, number)
        os.close(copy)


def give_back_memory() -> None:
    """Let go of what nobody holds any more, also of what torch keeps of a GPU's memory for itself."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_that_fits(parameters: int) -> str:
    """cuda where a GPU has room for a model of so many parameters in fp32, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() and 1.2 * 4 * parameters < torch.cuda.mem_get_info()[0] else "cpu"


def dtype_that_fits(parameters: int, device: str) -> str:
    """float32 where a model of so many parameters fits the device's free memory twice in it, as one that is loaded may; else auto, as it is stored."""
    import psutil
    import torch

    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    return "float32" if 2 * 4 * parameters < free else "auto"


def say_device(name: str) -> None:
    import torch

    say(f"device: {torch.cuda.get_device_name()}" if name == "cuda" else f"device: CPU, {torch.get_num_threads()} threads")
