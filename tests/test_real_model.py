"""The road on a real chat model, SmolLM2-135M-Instruct: each station's loss within its limit of the one before. About fifteen minutes on two cores.

The model comes from the package registry (scripts/real_model.py); where that does not have it, everything here is skipped, and said.
"""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from src.chat import encoding
from src.core import artifact
from src.models.generation import greedy
from src.models.loading import load_any, load_model, load_tokenizer

pytestmark = pytest.mark.slow
ADAPTED = ["train.max_steps=24", "train.eval_steps=100", "train.log_steps=8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """An outputs folder with the model as `model` and the project's own conversations as run `d`."""
    here = tmp_path_factory.mktemp("real")
    done = subprocess.run([sys.executable, ROOT / "scripts" / "real_model.py", here / "model"], capture_output=True, text=True)
    if done.returncode == 7:
        pytest.skip(f"NOT RUN: no real model here, since {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    verb(here, "d", "data", f"data.path={ROOT / 'assets' / 'conversations.json'}")
    return here


def verb(place: Path, run: str, name: str, *argv, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"src.{name}", f"run={run}", f"outputs={place}", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == code, done.stderr
    return done.stderr


def metrics(place: Path, run: str, name: str) -> dict:
    return artifact.open_artifact(place / run / name).metrics


def evaluated(place: Path, run: str, name: str) -> float:
    verb(place, run, "evaluate", f"source={place / run / name}", f"dataset={place / 'd' / 'data'}", "evaluation.samples=0")
    return metrics(place, run, f"evaluate-{name}")["loss"]


def within(m: dict, loss: float, kl: float) -> None:
    """A bundle's loss, either way, and KL stay below their limits in nats, the loss beside what other conversations would explain."""
    assert abs(m["loss_after"] - m["loss_before"]) - m["loss_waver"] < loss and m["kl"] < kl


@pytest.fixture(scope="module", params=["lora", "qlora", "full"])
def tuned(request, place) -> tuple[str, float]:
    """(run, loss by evaluate) of a fine-tune, whose last validation that is."""
    run = request.param
    given = [f"source={place / 'd' / 'data'}", f"model.path={place / 'model'}", f"tuner={run}", *ADAPTED]
    verb(place, run, "finetune", *given)
    found, m = evaluated(place, run, "finetune"), metrics(place, run, "finetune")
    print(f"{run}: base {m['loss_before']:.4f}; trained {m['val_loss_trained']:.4f}, saved {m['val_loss']:.4f}, evaluated {found:.4f}")
    assert abs(found - m["val_loss"]) < 1e-3 and abs(m["val_loss"] - m["val_loss_trained"]) < 0.005
    assert m["val_loss_first"] - m["val_loss"] > 0.5, "it has learnt something to lose"
    return run, found


@pytest.fixture(scope="module")
def merged(tuned, place) -> tuple[str, str, float]:
    """(run, verb that made the whole model, its loss)."""
    run, trained = tuned
    if run == "full":
        return run, "finetune", trained
    if run == "lora":  # a dequantized NF4 base is off bf16's grid, so there the nearest is no harm
        assert "what is saved is not what was trained" in verb(place, run, "merge", "rounding=nearest", code=8)
    verb(place, run, "merge")
    found = evaluated(place, run, "merge")
    print(f"{run}: merged {found:.4f} ({found - trained:+.4f})")
    assert abs(found - trained) < 0.002
    return run, "merge", found


def test_int4_starts_from_the_exact_weights(merged, tuned, place):
    run, name, before = merged
    verb(place, run, "quantize", f"source={place / run / name}", f"dataset={place / 'd' / 'data'}", "quantizer.group_size=64")
    found, m = evaluated(place, run, "quantize"), metrics(place, run, "quantize")
    print(f"{run}: int4 {found:.4f} ({found - before:+.4f}), KL {m['kl']:.4f}")
    assert abs(m["loss_before"] - (tuned[1] if run != "full" else before)) < 1e-3
    assert abs(found - m["loss_after"]) < 2e-3 and found - before < 0.2


@pytest.mark.parametrize("format, loss, kl", [("fp32_v0", 1e-3, 1e-6), ("int8_v2", 0.05, 0.005)])
def test_the_cpu_bundle_holds_the_exact_weights(merged, tuned, place, format, loss, kl):
    run, name, before = merged
    verb(place, run, "deploy", f"source={place / run / name}", "target=llama2c", f"target.format={format}", "force=true")
    m = metrics(place, run, "deploy-llama2c")
    print(f"{run}: {format} {m['loss_after']:.4f} ({m['loss_after'] - m['loss_before']:+.4f}), KL {m['kl']:.4f}")
    assert abs(m["loss_before"] - (tuned[1] if run != "full" else before)) < 1e-3
    within(m, loss, kl)


def test_the_openvino_bundle_answers_as_trained(merged, place):
    if not (ROOT / ".venv-openvino" / "bin" / "python").exists():
        pytest.skip("NOT RUN: OpenVINO's environment is not here; bash scripts/openvino_env.sh makes it")
    run, name, _ = merged
    verb(place, run, "deploy", f"source={place / run / name}", "target=openvino_cpu")
    m = metrics(place, run, "deploy-openvino_cpu")
    print(f"{run}: OpenVINO int8 {m['loss_after']:.4f} ({m['loss_after'] - m['loss_before']:+.4f}), KL {m['kl']:.4f}")
    within(m, 0.1, 0.03)


# ---- tools

CITIES = [
    "Oslo",
    "Bern",
    "Rome",
    "Lima",
    "Cairo",
    "Seoul",
    "Busan",
    "Kyoto",
    "Osaka",
    "Quito",
    "Paris",
    "Lyon",
    "Turin",
    "Milan",
    "Porto",
    "Lagos",
    "Accra",
    "Tunis",
    "Delhi",
    "Hanoi",
    "Perth",
    "Leeds",
    "Cork",
    "Graz",
]
LOOKS = {
    "get_weather": "How is the weather in {}?",
    "get_time": "What time is it in {}?",
    "find_hotel": "I need a bed for the night in {}.",
}


def tool_chat(function: str, city: str) -> dict:
    """A conversation that asks, calls, is told and answers."""
    tools = [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": question.format("a city"),
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
            },
        }
        for name, question in LOOKS.items()
    ]
    call = {"type": "function", "function": {"name": function, "arguments": {"city": city}}}
    return {
        "messages": [
            {"role": "user", "content": LOOKS[function].format(city)},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": json.dumps({"city": city, "found": "yes"})},
            {"role": "assistant", "content": f"I found it for {city}."},
        ],
        "tools": tools,
    }


def right_calls(model, tokenizer) -> tuple[int, int]:
    """(calls of the right function with the right city, questions), for cities that no training row names."""
    asked = [tool_chat(function, city) for function in LOOKS for city in ("Vienna", "Dublin", "Tokyo", "Havana")]
    prompts, tools = [row["messages"][:1] for row in asked], [row["tools"] for row in asked]
    answers = greedy(model, tokenizer, prompts, max_new_tokens=50, eos_id=encoding.turn_end(tokenizer), tools=tools)
    right = 0
    for row, (text, ended) in zip(asked, answers):
        found = re.search(r"<tool_call>\s*(\{.*\})\s*</tool_call>", text, re.DOTALL)
        with contextlib.suppress(ValueError):
            right += bool(found) and ended and json.loads(found[1]) == row["messages"][1]["tool_calls"][0]["function"]
    return right, len(asked)


def test_a_template_that_drops_calls_is_noticed_and_with_ours_the_model_learns_to_call(place):
    rows = [tool_chat(function, city) for function in LOOKS for city in CITIES]
    (place / "tools.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    verb(place, "tools", "data", f"data.path={place}/tools.jsonl")
    given = [
        f"model.path={place}/model",
        "train.max_steps=24",
        "train.eval_steps=100",
        "train.samples=0",
        "tuner.rank=16",
        "tuner.learning_rate=1e-3",
    ]
    said = verb(place, "tools", "finetune", *given, code=6)
    assert "the chat template does not print their tool calls" in said and "chat_template=chatml" in said
    verb(place, "tools", "finetune", *given, "chat_template=chatml")
    base, tokenizer = load_model(place / "model", dtype="float32").eval(), load_tokenizer(place / "model")
    encoding.set_up(tokenizer, text="chatml", keywords={}, reasoning="template", today="2026-01-01")
    before, count = right_calls(base, tokenizer)
    after, _ = right_calls(*load_any(artifact.open_artifact(place / "tools" / "finetune"), dtype="float32"))
    print(f"right calls: {before} of {count} before, {after} after")
    assert before < count / 2 and after > 0.8 * count
