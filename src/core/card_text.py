"""The text of a card, in plain lines: what it is, how to use it, how it was made, what was measured, what it learnt from, where it comes from, its licence."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src.core.descent import Descent
from src.core.files import flatten

DONE = {"finetune": "fine-tuned", "cpt": "trained on more text", "merge": "merged", "quantize": "quantized"}
TRAIN = ("train.epochs", "train.max_steps", "train.global_batch_size", "train.max_length", "train.lr_scheduler", "train.seed")
LORA = ("tuner.kind", "tuner.rank", "tuner.alpha", "tuner.learning_rate", "deepspeed.stage")
MAIN: dict[str, tuple[str, ...]] = {
    "data": ("data",),
    "distill": ("recipe.name", "seed", "holdout"),
    "pretrain": ("size", "tuner.learning_rate", *TRAIN),
    "cpt": (*LORA, *TRAIN),
    "finetune": (*LORA, *TRAIN, "teacher.weight"),
    "merge": ("dtype", "rounding"),
    "quantize": ("quantizer", "calibration.rows", "calibration.max_length"),
    "deploy": ("target",),
}
"""stage -> settings that a card shows, with all under them; manifest.json has every one"""
COUNTS = {
    "rows_in": "records in",
    "rows_kept": "records kept",
    "train_rows": "records to train on",
    "val_rows": "records held out",
    "calib_rows": "records to calibrate quantization",
    "steps": "steps",
    "tokens_seen": "tokens trained on",
    "calibration_rows": "records of calibration",
}
LOSSES = {
    "val_loss_first": "loss on held-out rows before training",
    "val_loss": "loss on held-out rows after training",
    "loss_before": "loss on held-out rows of {}",
    "loss_after": "loss on held-out rows of these files, loaded alone",
    "kl": "KL divergence from {}",
}
"""figure of the metrics -> what it is, in nats a token; {}: see `against`"""
SHARES = {"agreement": "same likeliest token as {}", "turns_ended": "answers that end where they should"}

PIPELINE = """```python
from transformers import pipeline

model = pipeline("text-generation", model="PATH")
print(model({prompt}, max_new_tokens=100)[0]["generated_text"]{end})
```"""
ADAPTER = """```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline

model = AutoPeftModelForCausalLM.from_pretrained("PATH")  # with its base
model = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained("PATH"))
print(model({prompt}, max_new_tokens=100)[0]["generated_text"]{end})
```"""
LOCAL_BASE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "PATH")
model = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained("PATH"))
print(model({prompt}, max_new_tokens=100)[0]["generated_text"]{end})
```"""
DATASET = """```python
from datasets import load_dataset

data = load_dataset("PATH")
```"""


def of(out: Path, descent: Descent, flat: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The text of a card up to where it comes from. flat: its settings by dotted names."""
    stage, kind = descent.made["stage"], descent.made["kind"]
    names = ", ".join(f"`{name}`" for name in descent.data_names())
    title_ = f"Conversations of {', '.join(descent.data_names())}" if kind == "dataset" else title(descent)
    parts = [f"# {title_}", f"{_what(descent, flat)} Made by Boardwalk (`python -m src.{stage}`)."]
    parts += ["## How to use it", "`PATH` is this folder, or its name on the hub.", *_use(out, descent, flat)]
    if rows := list(_main(descent)):
        parts += ["## How it was made", _table("setting", rows)]
    if rows := list(_measured(stage, metrics)):
        parts += ["## What was measured", _table("figure", rows)]
    if kind != "dataset":
        parts += [
            "## What it learnt from",
            f"{names}{', on top of its base' * bool(descent.base())}." if names else "Nothing here: its weights are the base's.",
        ]
    return "\n\n".join(parts)


def ends(descent: Descent, licence: dict[str, str]) -> str:
    """Where it comes from, and its licence."""
    said = "The settings, parents and hash of every file are in `manifest.json`."
    parts = ["## What it was made from", "\n".join(descent.road()), said, "## Licence", _licence(descent, licence)]
    return "\n\n".join(parts[3:] if descent.made["stage"] == "distill" else parts)  # whose own text says it


def title(descent: Descent) -> str:
    """In a few words what a model is: its base, and what was done to it."""
    done = [DONE[record["stage"]] for record in descent.model_stages() if record["stage"] in DONE]
    target = [f"for {descent.made['settings']['target']['name']}"] if descent.made["stage"] == "deploy" else []
    return ", ".join([descent.base() or "A model from nothing", *done, *target])


def against(stage: str) -> str:
    """What a stage's proof holds its result against."""
    return {"merge": "the adapter on its base", "quantize": "the weights before", "deploy": "the weights before"}.get(
        stage, "the model in training"
    )


def _what(descent: Descent, flat: dict[str, Any]) -> str:
    stage, kind, base = descent.made["stage"], descent.made["kind"], descent.base()
    if kind == "dataset":
        return (
            "Conversations, a line of JSON each with `id`, `messages` and `tools`: to train on, to hold out, and to calibrate quantization."
        )
    if kind == "adapter":
        return f"A LoRA adapter of rank {flat['tuner.rank']} for `{base}`: what was learnt, without the base."
    if kind == "quantized":
        return f"{_method(flat)} of " + (f"a model that began as `{base}`." if base else "a model trained from nothing.")
    if kind == "bundle":
        return f"A folder that {flat['target.name']} runs."
    if stage == "pretrain":
        return "A language model trained from nothing on plain text, and its tokenizer."
    return f"`{base}` with what an adapter learnt in its weights." if stage == "merge" else f"`{base}`, of which every weight was trained."


def _method(flat: dict[str, Any]) -> str:
    kind, bits = flat["quantizer.kind"], flat.get("quantizer.bits", 4)
    name = {"bnb": "bitsandbytes", "rtn": "Rounding to the nearest"}.get(kind, kind.upper())
    return "GPTQ in 4 and 8 bits" if kind == "mixed" else f"{name} in {bits} bits"


def _use(out: Path, descent: Descent, flat: dict[str, Any]) -> Iterator[str]:
    kind, base = descent.made["kind"], descent.base() or ""
    config = out / "tokenizer_config.json"
    chats = (out / "chat_template.jinja").is_file() or (
        config.is_file() and '"chat_template"' in config.read_text("utf-8", errors="replace")
    )
    asked = {"prompt": '[{"role": "user", "content": "Hello!"}]', "end": '[-1]["content"]'} if chats else {"prompt": '"Once"', "end": ""}
    if kind == "dataset":
        yield DATASET
        yield "With Boardwalk, where `PATH` is a folder:"
        yield "    python -m src.finetune source=PATH"
        return
    if kind == "adapter" and "/" in base:
        yield ADAPTER.format(**asked)
    elif kind == "adapter":
        yield f"`BASE` is your folder of `{base}`, which was no model of the hub."
        yield LOCAL_BASE.format(**asked)
    elif kind == "quantized":
        method = flat["quantizer.kind"]
        if method == "mixed":
            yield 'It takes vLLM, or gptqmodel (`GPTQModel.load("PATH")`); transformers alone does not know two widths.'
        else:
            yield f"It takes `pip install {'bitsandbytes' if method == 'bnb' else 'gptqmodel'}`:"
            yield PIPELINE.format(**asked)
        yield "With vLLM:"
        yield "    vllm serve PATH"
    elif kind == "model":
        yield PIPELINE.format(**asked)
    if chats or kind == "bundle":
        yield "With Boardwalk, where `PATH` is a folder:"
        yield "    python -m src.chat PATH" + " base=BASE" * (kind == "adapter" and "/" not in base)


def _main(descent: Descent) -> Iterator[tuple[str, str]]:
    """The main settings of each stage that the result went through."""
    for record in [descent.made] if descent.made["kind"] == "dataset" else descent.model_stages():
        stage = record["stage"]
        for name, value in flatten(record["settings"]).items():
            shown = value not in (None, "{}", "[]") and any(name == one or name.startswith(f"{one}.") for one in MAIN.get(stage, ()))
            if shown:
                yield f"{stage}: {name}", f"`{value}`"


def _measured(stage: str, metrics: dict[str, Any]) -> Iterator[tuple[str, str]]:
    other = against(stage)
    for name, words in COUNTS.items():
        if metrics.get(name) is not None:
            yield words, f"{metrics[name]:,}"
    for reason, count in sorted((metrics.get("dropped") or {}).items()):
        yield f"dropped: {reason}", f"{count:,}"
    for name, words in LOSSES.items():
        if metrics.get(name) is not None:
            yield f"{words.format(other)}, nats a token", f"{metrics[name]:.4f}"
    for name, words in SHARES.items():
        if metrics.get(name) is not None:
            yield words.format(other), f"{metrics[name]:.1%}"


def _licence(descent: Descent, licence: dict[str, str]) -> str:
    named, base = licence.get("license_name") or licence.get("license"), descent.base()
    if descent.made["stage"] == "distill":
        return f"The teacher's is `{named}`." if named else "The teacher's is not given."
    if descent.made["kind"] == "dataset":
        return f"`{named}`, as its sources say." if named else "Its sources name none that is known here."
    if base is None:
        return "It began with no other model: its licence is for its maker to choose."
    if not named:
        return f"Not known here: the folder of `{base}` names none. Look it up before you share this."
    return f"`{named}`, inherited from `{base}`" + (f": {licence['license_link']}" if "license_link" in licence else ".")


def _table(what: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([f"| {what} | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows)])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
