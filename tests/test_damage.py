"""Damaged input, generated and seeded: 200 each of model configurations, safetensors headers, tokenizer files, chat templates, adapters, manifests and
DeepSpeed files. Each ends in words with a code of its own: no traceback, nothing that waits for long, nothing published, nothing outside outputs/.
"""

import json
import os
import random
import shutil
import signal
import struct
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CHAT, FEW, ROOT, in_process

from src.core.artifact import is_finished

COUNT, LONGEST = 200, 20
"""damages of a kind, and seconds that one may take"""
ODD = [None, True, False, -1, 0, 1, 3, 2.5, -0.5, 1e300, 10**9, 10**30, "", "x", "7", "\ud800", [], [1], ["x"], {}, {"x": 1}, [[[]]]]
"""what a value becomes"""

pytestmark = pytest.mark.usefixtures("proofs_in_this_process")


@pytest.fixture(scope="module")
def road(tmp_path_factory) -> Path:
    """An outputs folder `o` with a run `r` of a dataset, an adapter and its merge, which the damaged copies are taken from."""
    here = tmp_path_factory.mktemp("road")
    chats = json.loads((ROOT / "assets" / "conversations.json").read_text())[:24]
    (here / "chats.json").write_text(json.dumps(chats))
    given = [f"outputs={here / 'o'}", "run=r"]
    short = ["train.max_steps=2", "train.samples=0", "tuner.rank=2", "tuner.learning_rate=1e-3", f"model.path={CHAT}"]
    for verb, *argv in (("data", f"data.path={here / 'chats.json'}", *FEW), ("finetune", *short), ("merge",)):
        done = in_process(verb, *given, *argv)
        assert done.returncode == 0, done.stderr
    return here


def leaves(tree, path=()) -> list[tuple]:
    """Where every value of a JSON tree is, containers included."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in inside for found in [(*path, key), *leaves(value, (*path, key))]]


def changed(tree, draw: random.Random):
    """A JSON tree with one to three values exchanged, taken out or doubled, or something else altogether."""
    if draw.random() < 0.04:
        return draw.choice(ODD)
    tree = json.loads(json.dumps(tree))
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        places = leaves(tree)
        if not places:
            break
        *path, last = draw.choice(places)
        inside = tree
        for key in path:
            inside = inside[key]
        how = draw.random()
        if how < 0.7:
            value = inside[last]
            near = [-value, value * 2, value + 1, value // 2, float(value)] if isinstance(value, int) and not isinstance(value, bool) else []
            inside[last] = json.loads(json.dumps(draw.choice(near * 4 + ODD)))
        elif how < 0.9:
            del inside[last]
        elif isinstance(inside, dict):
            inside[draw.choice(["", "x", "\x1b[31m", str(last) * 2])] = json.loads(json.dumps(inside[last]))
    return tree


def torn(raw: bytes, draw: random.Random) -> bytes:
    """Bytes cut off, exchanged, filled in, or of another encoding."""
    at, length = draw.randrange(len(raw)), draw.randint(1, 40)
    return draw.choice(
        [
            lambda: raw[:at],
            lambda: raw[:at] + bytes(draw.randrange(256) for _ in range(length)) + raw[at + length :],
            lambda: raw[:at] + raw[at + length :],
            lambda: b"\0" * len(raw),
            lambda: raw.decode(errors="replace").encode("utf-16"),
            lambda: b"[" * 100_000,
            lambda: b"",
            lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        ]
    )()


def damaged_json(file: Path, draw: random.Random) -> None:
    raw = file.read_bytes()
    file.write_bytes(torn(raw, draw) if draw.random() < 0.15 else json.dumps(changed(json.loads(raw), draw)).encode())


def damaged_header(file: Path, draw: random.Random) -> None:
    """A safetensors file with another header of a matching length, or another length, or torn."""
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    if draw.random() < 0.2:
        wrong = draw.choice([0, 1, length - 1, length + 1, len(raw), 2**40, 2**64 - 1])
        file.write_bytes(struct.pack("<Q", wrong) + raw[8:] if draw.random() < 0.7 else torn(raw, draw))
        return
    header = json.loads(raw[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    one, other = draw.sample(names, 2)
    how = draw.choice(["overlap", "dtype", "shape", "order", "gone", "name", "metadata", "any"])
    if how == "overlap":
        header[one]["data_offsets"] = header[other]["data_offsets"]
    elif how == "dtype":
        header[one]["dtype"] = draw.choice(["F8_E4M3", "BOOL", "I64", "F64", "X9", "f32", 7, None])
    elif how == "shape":
        header[one]["shape"] = draw.choice([[], [-1], [2**62, 4], [0], ["x"], None, header[one]["shape"][::-1] + [1]])
    elif how == "order":
        header[one]["data_offsets"] = draw.choice([header[one]["data_offsets"][::-1], [0], [-4, 0], ["a", "b"], [0, 2**63]])
    elif how == "gone":
        del header[one]
    elif how == "name":
        header[draw.choice(["", "x", "../x", "module." + one])] = header.pop(one)
    elif how == "metadata":
        header["__metadata__"] = draw.choice([[], 7, {"format": 7}, {"format": "tf"}, {"format": None}, "x"])
        header.pop(draw.choice(names))
    else:
        header = changed(header, draw)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


TEMPLATES = [
    "{{ raise_exception('no \x1b[31m') }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for m in messages %}{{ m['nothing']['at all'] }}{% endfor %}",
    "{{ messages[99] }}",
    "{{ 1 / 0 }}",
    "{% for m in messages %}",
    "{{ messages | nofilter }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{{ 'x' * 10**9 }}",
    "{{ ''.__class__.__mro__ }}",
    "{% include 'x' %}",
    "{{ messages[0]['content'] ** 2 }}",
    "{% set ns = namespace(a=1) %}{{ ns.b.c }}",
    "{{ strftime_now('%') }}{{ bos_token + 1 }}",
    "{{ (messages | map(attribute='x') | list)[0].y }}",
    "",
]
"""besides torn ones"""


def damaged_template(file: Path, draw: random.Random) -> None:
    content = json.loads(file.read_text())
    text = content["chat_template"] if isinstance(content.get("chat_template"), str) else "{{ messages }}"
    if draw.random() < 0.5:
        text = draw.choice(TEMPLATES)
    else:
        at, tokens = draw.randrange(len(text)), ["{%", "%}", "}}", "{{", "endfor", "'", "{#", "message", "[", "not", "|trim", "\ud800", "\0"]
        text = text[:at] + draw.choice(tokens) + text[at + draw.randint(0, 12) :]
    content["chat_template"] = draw.choice([text] * 12 + [7, [text], {"default": text}, [{"name": "default", "template": 7}], None])
    file.write_text(json.dumps(content))


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to, copy_function=shutil.copyfile))


def with_model(damage: Callable, names: list[str], verbs: list[str]) -> Callable:
    """A case on a copy of a model folder: damage one of its files, then give it to one of the verbs."""

    def case(road: Path, place: Path, draw: random.Random) -> list[str]:
        model = copy_of(road / "o" / "r" / "merge", place / "model")
        (model / "manifest.json").unlink()
        damage(model / draw.choice(names), draw)
        dataset = road / "o" / "r" / "data"
        return {
            "plan": ["plan", f"model={model}", f"target={draw.choice(['ax650', 'llama2c', 'mobilint_aries'])}"],
            "evaluate": ["evaluate", f"source={model}", f"dataset={dataset}", "evaluation.samples=1", "evaluation.max_new_tokens=4"],
            "finetune": ["finetune", f"model.path={model}", f"source={dataset}", "train.max_steps=1", "train.samples=0", "tuner.rank=2"],
            "deploy": ["deploy", f"source={model}", "target=llama2c"],
            "aux_files": ["aux_files", f"source={model}", f"target={bare(road, place)}"],
            "quantize": ["quantize", f"source={model}", f"dataset={dataset}", "calibration.rows=2", "dry_run=true"],
            "ax650": ["deploy", f"source={model}", "target=ax650", "target.context_len=256", "target.prompt_len=128", "dry_run=true"],
        }[draw.choice(verbs)]

    return case


def bare(road: Path, place: Path) -> Path:
    """A model folder without a tokenizer."""
    folder = copy_of(road / "o" / "r" / "merge", place / "bare")
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    return folder


def adapter(road: Path, place: Path, draw: random.Random) -> list[str]:
    folder = copy_of(road / "o" / "r" / "finetune", place / "adapter")
    (folder / "manifest.json").unlink()
    if draw.random() < 0.5:
        damaged_json(folder / "adapter_config.json", draw)
    else:
        damaged_header(folder / "adapter_model.safetensors", draw)
    if draw.random() < 0.5:
        return ["merge", f"source={folder}", f"base={CHAT}"]
    return ["evaluate", f"source={folder}", f"dataset={road / 'o' / 'r' / 'data'}", "evaluation.samples=0"]


def manifest(road: Path, place: Path, draw: random.Random) -> list[str]:
    run = copy_of(road / "o" / "r", place / "run")
    name = draw.choice(["data", "finetune", "merge"])
    damaged_json(run / name / "manifest.json", draw)
    verbs = {"data": ["finetune"], "finetune": ["merge", "evaluate"], "merge": ["evaluate", "deploy"]}[name]
    verb = draw.choice([*verbs, "lineage", "summary"])
    if verb == "lineage":
        return ["lineage", str(run / name), "--verify"]
    if verb == "summary":
        return ["summary", f"outputs={place}", "run=run"]
    argv = [f"source={run / name}", *(["target=llama2c"] if verb == "deploy" else [])]
    argv += [f"model.path={CHAT}", "train.max_steps=1", "train.samples=0"] if verb == "finetune" else []
    return [verb, *argv, *([f"dataset={run / 'data'}"] if verb == "evaluate" else [])]


DEEPSPEED = {
    "zero_optimization": {"stage": 2, "overlap_comm": True, "allgather_bucket_size": 2e8, "offload_optimizer": {"device": "none"}},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
}


def deepspeed(road: Path, place: Path, draw: random.Random) -> list[str]:
    file = place / "ds.json"
    file.write_text(json.dumps(DEEPSPEED))
    damaged_json(file, draw)
    argv = ["finetune", f"model.path={CHAT}", f"source={road / 'o' / 'r' / 'data'}", "deepspeed=zero2", f"deepspeed.config={file}"]
    return [*argv, "launch.nproc_per_node=1", "dry_run=true"]


CASES: dict[str, Callable] = {
    "config": with_model(damaged_json, ["config.json"], ["plan", "plan", "evaluate", "finetune", "deploy", "quantize", "ax650"]),
    "header": with_model(damaged_header, ["model.safetensors"], ["evaluate", "finetune", "deploy", "quantize", "ax650"]),
    "tokenizer": with_model(
        damaged_json, ["tokenizer.json", "tokenizer_config.json", "generation_config.json"], ["evaluate", "finetune", "aux_files", "deploy", "ax650"]
    ),
    "template": with_model(damaged_template, ["tokenizer_config.json"], ["evaluate", "finetune", "aux_files", "deploy", "ax650"]),
    "adapter": adapter,
    "manifest": manifest,
    "deepspeed": deepspeed,
}


def everything_in(folder: Path) -> dict[str, tuple]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file() and "__pycache__" not in p.parts}


class TooLong(BaseException):
    """Seconds are over; no `except Exception` holds it up."""


def outcome(argv: list[str], outputs: Path) -> tuple[str, str]:
    """(what became of it, where or in which words)."""

    def end(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(LONGEST)
    try:
        done = in_process(*argv, *([] if argv[0] == "lineage" or any(a.startswith("outputs=") for a in argv) else [f"outputs={outputs}", "run=x"]))
    except TooLong:
        return "waits", "".join(traceback.format_exc()[-600:])
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {str(error)[:200]} | " + " < ".join(
            f"{Path(f.filename).name}:{f.lineno}" for f in reversed(traceback.extract_tb(error.__traceback__)[-6:])
        )
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if "Traceback" in done.stderr or "\x1b" in done.stderr + done.stdout:
        return "raw", done.stderr[-300:]
    if done.returncode == 1 or (done.returncode and not done.stderr.strip()):
        return "no words", f"{done.returncode} {done.stderr[-300:]}"
    return ("ok" if done.returncode == 0 else "refused"), str(done.returncode)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("part", [pytest.param(range(8), id="few"), pytest.param(range(8, COUNT), id="all", marks=pytest.mark.slow)])
def test_what_is_damaged_is_refused_in_words(kind, part, road, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    seen, wrong = Counter(), []
    before = everything_in(road), everything_in(ROOT / "src"), sorted(os.listdir(ROOT))
    for number in part:
        draw, place = random.Random(f"{kind} {number}"), tmp_path / str(number)
        place.mkdir()
        argv = CASES[kind](road, place, draw)
        what, where = outcome(argv, place / "outputs")
        seen[what] += 1
        if what not in ("ok", "refused"):
            wrong.append(f"{number} {argv[0]}: {what}: {where}")
        if what == "refused" and any(is_finished(p.parent) for p in (place / "outputs").rglob("manifest.json")):
            wrong.append(f"{number} {argv[0]}: refused, and published all the same")
        shutil.rmtree(place)
    print(f"{kind}: {dict(seen)}")
    assert not wrong, "\n".join(wrong)
    assert (everything_in(road), everything_in(ROOT / "src"), sorted(os.listdir(ROOT))) == before, "nothing is written elsewhere"
