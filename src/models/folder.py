"""A model's folder: where it is, whether it is whole and safe to load, what it says of itself. Nothing is loaded."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from src.core import card
from src.core.artifact import Artifact
from src.core.errors import AGAIN, BadData, MissingInput, WrongKind
from src.core.files import read_json
from src.core.log import say
from src.models import safetensors_io
from src.sizing.config_reader import check_sizes

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
RANK = 4096
"""of an adapter that its tensors need not show"""
WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "*.cu", "*.cpp", "*.tiktoken")
"""what of a model on the hub is downloaded"""
LFS = b"version https://git-lfs.github.com/spec/v1"


def locate(path: str, revision: str | None = None, *, download: bool = True, allow_pickle: bool = False) -> Path:
    """The local folder of a model named by a folder or by a hub id such as Qwen/Qwen2.5-0.5B-Instruct, which is downloaded once.

    download: False looks only at what was downloaded before. Raises MissingInput when it is neither, or the hub cannot be reached.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder

    def get() -> str:
        from huggingface_hub import snapshot_download

        wanted = [*WANTED, *(["*.bin"] if allow_pickle else [])]
        folder = snapshot_download(path, revision=revision, allow_patterns=wanted, local_files_only=not download)
        if download:
            _fetch_card(path, Path(folder))
        return folder

    return Path(_from_hub(path, download, get))


def _fetch_card(id: str, folder: Path) -> None:
    """Download a model's card, which says its licence, beside its files; where it has none, or the hub is not reached, the licence stays unknown."""
    from huggingface_hub import hf_hub_download

    if not (folder / card.NAME).is_file() and not (kept := card.aside(folder)).is_file():
        with contextlib.suppress(OSError):
            hf_hub_download(id, card.NAME, revision=folder.name, local_dir=kept.parent)


def locate_config(path: str, revision: str | None = None, *, download: bool = True) -> Path:
    """The same of a model's config.json alone: a file, a folder that holds one, or of a hub id the file, downloaded once."""
    if Path(path).exists():
        return Path(path)

    def get() -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(path, "config.json", revision=revision, local_files_only=not download)

    return Path(_from_hub(path, download, get))


def _from_hub(path: str, download: bool, get: Callable[[], str]) -> str:
    """What `get` downloads of the hub's model `path`. Raises MissingInput for a name that cannot be a hub id, and where the hub does not give it."""
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise MissingInput(
            "no such model folder", where=path, fix="give a folder that holds config.json, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct"
        )
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if not download:
        say(f"looks for {path} among the models downloaded before, since a dry run downloads nothing")
    ways = [f"hf download {path} fetches it, or says why it cannot", "give the folder of a model on this machine"]
    try:
        return get()
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if not download:  # what the library says then is about its own arguments
            raise MissingInput(f"no folder '{path}' here, and no model of that name was downloaded before", where=path, fix=ways) from error
        said = str(error).strip().splitlines()[0]
        raise MissingInput(
            f"no folder '{path}' here, and the hub did not give a model of that name: {said}", where=path, fix=ways
        ) from error


def check_folder(path: Path, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> dict:
    """Look at a model folder without loading it and return its config.

    Raises MissingInput where files are missing or are Git LFS pointers, BadData where they are damaged, WrongKind for pickled weights or custom code that were not allowed.
    """
    config = read_json(path / "config.json")
    index = path / "model.safetensors.index.json"
    named = read_json(index).get("weight_map") if index.is_file() else {"": WEIGHTS[0]}
    if not isinstance(named, dict) or not named or not all(map(_is_beside, named.values())):
        raise BadData("its weight_map names something else than the .safetensors files beside it", where=str(index), fix=AGAIN)
    files = sorted(set(named.values()))
    if not any((path / name).is_file() for name in WEIGHTS):
        if not any((path / name).is_file() for name in PICKLES):
            raise MissingInput(
                "the folder has a config.json but no weights",
                where=str(path),
                fix="copy model.safetensors into it, or its shards with model.safetensors.index.json",
            )
        if not allow_pickle:
            raise WrongKind(
                "the weights are a pickle (pytorch_model.bin), which can run any code when loaded",
                where=str(path),
                fix=[
                    "save it with transformers' save_pretrained, which writes safetensors",
                    "finetune takes it with model.allow_pickle=true",
                ],
            )
        files = []
    for shard in files:
        file = path / shard
        if not file.is_file():
            raise MissingInput(f"weight file '{shard}' is missing", where=str(path), fix=AGAIN)
        with open(file, "rb") as stream:
            if stream.read(len(LFS)) == LFS:
                raise MissingInput(f"'{shard}' is a Git LFS pointer, not the weights", where=str(path), fix="git lfs pull, in that folder")
    entries = safetensors_io.entries(path) if files else {}
    known = (len(entries), sum(entry.size for entry in entries.values() if entry.dtype in safetensors_io.ITEM)) if files else ()
    check_sizes(config, str(path / "config.json"), *known)
    if not trust_remote_code:
        refuse_code(config, "model", path / "config.json")
    return config


def refuse_code(config: dict, what: str, file: Path) -> None:
    """Raises WrongKind where a configuration names Python code of its folder to run."""
    if config.get("auto_map"):
        raise WrongKind(
            f"the {what} brings Python code of its own",
            where=str(file),
            fix="finetune runs it with model.trust_remote_code=true, if you have read it and trust it, and so does what follows in that run",
        )


def _is_beside(name: object) -> bool:
    """Whether a weight_map's entry is a safetensors file in its own folder; transformers would unpickle one of another ending."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def check_adapter_file(path: Path) -> None:
    """Raises WrongKind for an adapter that is a pickle, which peft would take, MissingInput for one without weights, BadData for a rank beyond them."""
    fix = "save it again with peft's save_pretrained, which writes adapter_model.safetensors"
    if not (path / "adapter_model.safetensors").is_file():
        if (path / "adapter_model.bin").is_file():
            raise WrongKind(
                "the adapter's weights are a pickle (adapter_model.bin), which can run any code when loaded", where=str(path), fix=fix
            )
        raise MissingInput("the adapter has no adapter_model.safetensors", where=str(path), fix=fix)
    config = read_json(path / "adapter_config.json")
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    largest = max((max(entry.shape, default=0) for entry in safetensors_io.entries(path, "adapter_model*.safetensors").values()), default=0)
    for rank in ranks:
        if isinstance(rank, int | float) and rank > max(largest, RANK):
            raise BadData(
                f"a rank of {rank:,}, and no tensor of the adapter is that large", where=str(path / "adapter_config.json"), fix=AGAIN
            )


def check_tokenizer(path: Path, *, trust_remote_code: bool = False) -> None:
    """Raises MissingInput where a folder holds no tokenizer file of any kind, WrongKind where its tokenizer is code that was not trusted."""
    if not any(
        (path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "qwen.tiktoken", "tokenizer_config.json")
    ):
        raise MissingInput(
            "the folder has no tokenizer",
            where=str(path),
            fix=f"python -m src.aux_files source=BASE_MODEL target={path} copies it from the base model",
        )
    file = path / "tokenizer_config.json"
    if file.is_file() and not trust_remote_code:
        refuse_code(read_json(file), "tokenizer", file)


def check_config(path: Path) -> None:
    """Raises BadData where a folder has a config.json, which transformers reads for the tokenizer too, and no model could be built by it."""
    if (path / "config.json").is_file():
        check_sizes(read_json(path / "config.json"), str(path / "config.json"))


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
        named = read_json(adapter.path / "adapter_config.json").get("base_model_name_or_path")
        path = Path(named if isinstance(named, str) and named and "\0" not in named else "?")
    if not path.is_dir():
        raise MissingInput("the adapter's base model is not where it was", where=str(path), fix="base=FOLDER names its new place")
    return path


def weights_of(found: Artifact) -> Path:
    """The folder of an adapter's base, or of the model itself."""
    return base_of(found) if found.kind == "adapter" else found.path


def stored_dtype(path: Path) -> str:
    """The dtype a folder's config names for its weights; float32 where it names none."""
    config = read_json(path / "config.json")
    return config.get("dtype") or config.get("torch_dtype") or "float32"
