"""The road on a real chat model, SmolLM2-135M-Instruct: each station's loss within its limit of the one before. About fifteen minutes on two cores.

The model comes from the package registry (scripts/real_model.py); where that does not have it, everything here is skipped, and said.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from src.core import artifact

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
