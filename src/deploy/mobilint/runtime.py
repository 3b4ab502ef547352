"""The folder that Mobilint's runtime loads: a Hugging Face folder whose weights are the embedding table alone, beside the compiled file.

Layout of the tutorial's prepare_model.py, as transformers-mblt 0.6.1 reads it; see docs/mobilint.md.
"""

import json
import zipfile
from pathlib import Path

from src.core.errors import ToolFailed, WrongKind
from src.core.files import read_json, write_json
from src.core.log import say
from src.deploy.mobilint import transformers4
from src.deploy.mobilint.plan import DEVICES, SCHEMES, CompilePlan
from src.deploy.vendor import COMPILED, whole
from src.models import complete, safetensors_io
from src.sizing.takes import MOBILINT

EMBEDDING = "model.embed_tokens.weight"
EMBEDDING_OF = {"exaone": "transformer.wte.weight"}
"""model type -> the table's name in the class that runs it, where that is not EMBEDDING. Under another name transformers would draw it at random"""
UNROTATED = "target.weight_type=w8 with qbcompiler 1.2 or older, which rotates nothing"
ROWS = 4096
"""embedding rows rotated at a time"""
ORTHOGONAL = {"float64": 1e-4, "float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
"""largest |R R^T - I| of a rotation stored in each dtype, with room for its rounding"""


PROXY = '''"""Where transformers finds this model's classes with trust_remote_code=True: in the package transformers-mblt."""

from transformers_mblt.models.{kind}.configuration_{kind} import {config}
from transformers_mblt.models.{kind}.modeling_{kind} import {model}

__all__ = ["{config}", "{model}"]
'''
IN_VLLM = ("llama", "qwen2", "qwen3", "exaone", "exaone4")
"""model types that vllm-mblt 0.8.0 registers (its __init__.py)"""


def proxy_of(plan: CompilePlan) -> str:
    """Module in the runtime folder that leads to the model's classes, by the name it has in Mobilint's own folders."""
    return f"proxy_{plan.config['model_type']}"


def write_tokenizer(model: Path, tokenizer, out: Path) -> None:
    """The tokenizer's files and generation_config.json.

    transformers 5 may rebuild a tokenizer by its class, whatever tokenizer.json says, and transformers 4 on the board does not; so tokenizer.json
    is what runs here, and write_config names the class that takes it as it is. Raises WrongKind where there is no such form of the tokenizer.
    """
    if not tokenizer.is_fast:
        raise WrongKind(
            f"{type(tokenizer).__name__} has no tokenizer.json, which Mobilint's runtime reads",
            where=str(model),
        )
    copied = complete.copy(model, out)
    runs, stored = json.loads(tokenizer.backend_tokenizer.to_str()), out / "tokenizer.json"
    made = []
    if not stored.exists() or read_json(stored) != runs:
        with whole(stored) as file:
            file.write_text(json.dumps(runs, ensure_ascii=False), encoding="utf-8")
        made.append("tokenizer.json as it runs here")
    if not (out / "special_tokens_map.json").exists():
        named = {name: token if isinstance(token, str) else [str(t) for t in token] for name, token in tokenizer.special_tokens_map.items()}
        write_json(out / "special_tokens_map.json", named)
        made.append("special_tokens_map.json, which the runtime wants")
    if copied or made:
        say(f"runtime folder: copied {', '.join(copied)}" + (f"; wrote {', '.join(made)}" if made else ""))


def write_config(plan: CompilePlan, out: Path) -> None:
    """config.json of Mobilint's model class, and the model's own kept apart in hf/config.json.

    The compile is for core 0 of cluster 0 (npu_core_ids), so core_mode is single. The model's own custom code is not carried over: the classes are
    those of transformers-mblt, to which proxy_<type>.py leads a reader that registers none, such as vLLM.
    """
    config = plan.config
    model_class = MOBILINT[config["model_type"]]
    config_class = model_class.replace("ForCausalLM", "Config")
    write_json(out / "hf" / "config.json", config)
    ours = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    ours |= {
        "model_type": f"mobilint-{config['model_type']}",
        "architectures": [model_class],
        "tie_word_embeddings": plan.shape.tied,
        "dtype": "float32",  # what the NPU takes as input
        "mxq_path": plan.mxq,
        "target_device": DEVICES[plan.chip],
        "dev_no": 0,
        "max_batch_size": 1,
        "core_mode": "single",
        "target_cores": ["0:0"],
        "auto_map": {"AutoConfig": f"{proxy_of(plan)}.{config_class}", "AutoModelForCausalLM": f"{proxy_of(plan)}.{model_class}"},
    }
    with whole(out / f"{proxy_of(plan)}.py") as file:
        file.write_text(PROXY.format(kind=config["model_type"], config=config_class, model=model_class), encoding="utf-8")
    transformers4.adapt(out, ours, tokenizer_class="PreTrainedTokenizerFast")


def write_embedding(plan: CompilePlan, table, work: Path, out: Path) -> None:
    """model.safetensors with the table (vocabulary, hidden) alone, rotated where the compiler rotated its input: fp32, or bf16 for 4-bit weights, as
    Mobilint's scripts have them (get_rotation_emb.py; for 8 bits compilation/vlm/prepare_model.py)."""
    rotation = find_rotation(work, plan.table.shape[1]) if plan.rotates else None
    name = EMBEDDING_OF.get(plan.config["model_type"], EMBEDDING)
    entry = safetensors_io.Entry(name, "BF16" if plan.bits == 4 else "F32", plan.table.shape, out / "model.safetensors")
    safetensors_io.write(out, [entry], lambda name: table if rotation is None else rotate(table, rotation, plan.bits), entry.size)
    say(f"model.safetensors: the embedding table in {entry.dtype}" + ("" if rotation is None else ", rotated by the compiler's R1"))


def rotate(table, rotation, bits: int):
    """(E @ R) in float64, as bf16 for 4-bit weights and fp32 for 8: table fp32 (vocabulary, hidden), rotation (hidden, hidden); some rows at a time."""
    import torch

    out = torch.empty(table.shape, dtype=torch.bfloat16 if bits == 4 else torch.float32)
    rotation = rotation.double()
    for start in range(0, len(table), ROWS):
        out[start : start + ROWS] = (table[start : start + ROWS].double() @ rotation).to(out.dtype)
    return out


def find_rotation(work: Path, hidden: int):
    """SpinQuant's global rotation R1 (Liu et al. 2024, arXiv:2405.16406), (hidden, hidden), that the compiler left in spinWeight/<name>/R1.

    Raises ToolFailed where there is none, more than one, or it is not an orthogonal matrix of that size.
    """
    import torch

    found = sorted(work.glob("spinWeight/*/R1/global_rotation.pth"))
    if len(found) != 1:
        raise ToolFailed(
            f"a compile with SpinR1 leaves one spinWeight/<name>/R1/global_rotation.pth; {len(found)} are there",
            where=str(work),
            fix=[
                anew(work),
                UNROTATED,
            ],
        )
    rotation = load_matrix(found[0])
    if rotation is None or tuple(rotation.shape) != (hidden, hidden) or not rotation.is_floating_point():
        shape = "no tensor" if rotation is None else f"{tuple(rotation.shape)} of {rotation.dtype}"
        raise ToolFailed(f"the rotation is not a ({hidden}, {hidden}) matrix but {shape}", where=str(found[0]), fix=[anew(work), UNROTATED])
    limit = ORTHOGONAL[str(rotation.dtype).removeprefix("torch.")]
    full = rotation.double()
    off = (full @ full.T - torch.eye(hidden, dtype=torch.float64)).abs().max().item()
    if not off < limit:
        raise ToolFailed(
            f"the rotation is not orthogonal: R R^T is {off:.2g} away from the identity (at most {limit:g})",
            where=str(found[0]),
            fix=[anew(work), UNROTATED],
        )
    say(f"rotation: {found[0].relative_to(work)}, R R^T within {off:.1e} of the identity")
    return rotation


def anew(work: Path) -> str:
    """The way out of a compile that ended well by its own words and left what cannot be used."""
    return f"remove {work / COMPILED}, then run the same command again: it compiles anew"


def load_matrix(path: Path):
    """The first parameter of a TorchScript module; None where it has none. Raises ToolFailed for any other file: nothing is unpickled.

    TorchScript runs no Python from the file; all the same, it is the work of the compiler that the user just ran with all rights, not of a stranger.
    """
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
        if not scripted:
            raise ToolFailed("the rotation is not the TorchScript module that the compiler saves", where=str(path), fix=UNROTATED)
        return next((parameter.detach() for parameter in torch.jit.load(str(path), map_location="cpu").parameters()), None)
    except (zipfile.BadZipFile, RuntimeError, OSError) as error:
        raise ToolFailed(f"the rotation cannot be read: {str(error).strip().splitlines()[0]}", where=str(path), fix=UNROTATED) from None


def board_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    """Token ids of rendered texts by the tokenizer files of a runtime folder alone; made to run in a fresh process."""
    from src.models.loading import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def readme(plan: CompilePlan, record: dict) -> str:
    kind = plan.config["model_type"]
    every = plan.compiler.api in ("1.2", "1.3") and SCHEMES[plan.chip] == "all"
    cores = "every core mode (config.json asks for single; multi, global4 and global8 are in the file too)" if every else "one core"
    vllm = f"""Or as a server that speaks OpenAI's API, in an environment of its own, since it pins vLLM 0.11.2:

    pip install vllm-mblt
    vllm serve . --trust-remote-code --max-model-len {plan.context}

`--trust-remote-code` runs `{proxy_of(plan)}.py`, which is in this folder and imports the model's class from transformers-mblt.
"""
    return f"""# A {kind} model for Mobilint {plan.chip.upper()}

{plan.weight_type} weights, context {plan.context} tokens, compiled for {cores} by {record["package"]} {record["version"]}.

| file | what it is |
|---|---|
| `{plan.mxq}` | the compiled layers and output layer |
| `model.safetensors` | the embedding table{", rotated as the compiled file needs it" if plan.rotates else ""}; the host looks tokens up in it |
| `config.json` | model type `mobilint-{kind}`, device `{DEVICES[plan.chip]}`, core mode, the compiled file's name |
| `{proxy_of(plan)}.py` | where `trust_remote_code` finds the model's class |
| `hf/config.json` | the model's own config, for reference; the runtime does not read it |
| `contract.json` | conversations and their token ids, as trained; a runtime that gives others is wrong |
| `calibration.json`, `compile.json`, `compile.log`, `compile_job.py` | what it was calibrated on and how it was compiled |

Copy this folder to the host of the NPU, with its driver and Python 3.10 to 3.12:

    pip install transformers-mblt

Then, in Python, in this folder:

    import transformers_mblt
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers_mblt.register()
    tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
    prompt = tokenizer.apply_chat_template([{{"role": "user", "content": "Hi"}}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))

{vllm if kind in IN_VLLM else "vllm-mblt 0.8.0 does not serve this family."}
Prompt and answer together are at most {plan.context} tokens. `No matching MXQ version` at loading means that the runtime is older than the compiler:
update mobilint-qb-runtime. `Model_MXQAndModelConfigNotMatch` means that core_mode or target_cores in config.json do not go with the compiled file.
"""
