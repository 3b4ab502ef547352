"""Each gate is failed by a model that is worse in just that way; the report stays, and the same command gives the same verdict without measuring again."""

import json
from subprocess import CompletedProcess

import pytest
from conftest import CHAT, ROOT, go, helps, in_process, refused, rounded, ways
from stand_ins.openai_server import Server

from src import data
from src.core import artifact
from src.core.errors import ConfigError, GateFailed
from src.models import gates


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """An outputs folder with a run `d` whose validation split are sums, which tiny-chat knows."""
    here = tmp_path_factory.mktemp("gates")
    sums = [{"prompt": f"What is {a} plus {b}?", "completion": f"{a} plus {b} is {a + b}."} for a in range(1, 5) for b in range(1, 4)]
    (here / "val.json").write_text(json.dumps(sums))
    (here / "train.json").write_text(json.dumps([{"prompt": "Hi", "completion": "Hello!"}, {"prompt": "Bye", "completion": "Bye!"}]))
    others = json.loads((ROOT / "assets" / "conversations.json").read_text())[:10]
    (here / "general.json").write_text(json.dumps(others))
    assert go(data, f"outputs={here}", "run=d", f"data.path={here / 'train.json'}", f"data.val={here / 'val.json'}") == 0
    rounded(here / "damaged", 1)
    return here


@pytest.fixture(scope="module")
def judged(outputs):
    """judged(*gates) -> the finished process of an evaluation of a damaged tiny-chat against the sound one, measured at the first call alone."""

    def run(*argv: str) -> CompletedProcess:
        usual = [
            f"source={outputs / 'damaged'}",
            f"parent={CHAT}",
            f"dataset={outputs / 'd' / 'data'}",
            f"evaluation.general={outputs / 'general.json'}",
        ]
        done = in_process("evaluate", "run=g", f"outputs={outputs}", *usual, "evaluation.samples=12", "evaluation.max_new_tokens=12", *argv)
        return done

    assert run().returncode == 0
    return run


def report(outputs) -> dict:
    return json.loads((outputs / "g" / "evaluate-damaged" / "report.json").read_text())


@helps("models/gates.py", "gate.{}={} if you accept it")
@pytest.mark.parametrize(
    "gate, figure, worst",
    [
        ("gate.kl=0.01", "kl", "kl"),
        ("gate.top1=0.99", "agreement", "agreement"),
        ("gate.perplexity_ratio=1.01", "perplexity_ratio", "loss_difference"),
        ("gate.task_drop=0.05", "task_difference", None),
        ("gate.forgetting=0.01", "general_loss_difference", "general_loss_difference"),
    ],
)
def test_each_gate_refuses_a_model_that_fails_it(judged, outputs, gate, figure, worst):
    before = (outputs / "g" / "evaluate-damaged" / "manifest.json").stat()
    done = judged(gate)
    found = report(outputs)
    low, high = found["intervals"][figure]
    assert low <= found[figure] <= high
    named = [row["id"] for row in found["worst"][worst][:3]] if worst else [repr(prompt) for prompt in found["task_lost"][:3]]
    refused(done, GateFailed, "1 of 1 limits are not kept", gate, f"{found[figure]:.4f} [", *named)
    assert "up to date, skipped" in done.stderr and (outputs / "g" / "evaluate-damaged" / "manifest.json").stat() == before
    way = ways(done)[0].split()[0]
    again = judged(way)
    assert again.returncode == 0 and f"keeps {way}" in again.stderr


def test_a_report_that_fails_is_sealed_and_its_verdict_follows_from_it_alone(outputs, tmp_path):
    argv = [f"source={outputs / 'damaged'}", f"parent={CHAT}", f"dataset={outputs / 'd' / 'data'}", "evaluation.samples=0", "gate=strict"]
    first = in_process("evaluate", "run=s", f"outputs={tmp_path}", *argv)
    refused(first, GateFailed, "3 of 3 limits are not kept", "gate.kl=0.02", "gate.top1=0.95", "gate.perplexity_ratio=1.02")
    made = artifact.open_artifact(tmp_path / "s" / "evaluate-damaged")
    assert artifact.verify(made) == [] and "gate" not in made.settings
    second = in_process("evaluate", "run=s", f"outputs={tmp_path}", *argv)
    assert second.stderr.partition("gate failed")[2] == first.stderr.partition("gate failed")[2] and "evaluate: loss" not in second.stderr
    sound = [f"source={CHAT}", *argv[1:]]
    assert in_process("evaluate", "run=s", f"outputs={tmp_path}", *sound).returncode == 0, "equal to its parent"


@helps("models/gates.py", "parent=FOLDER names the model to compare with", "gate.{}=null")
def test_a_gate_without_a_parent(outputs, tmp_path):
    argv = [
        f"source={outputs / 'damaged'}",
        f"dataset={outputs / 'd' / 'data'}",
        "evaluation.samples=0",
        "evaluation.rows=2",
        f"outputs={tmp_path}",
        "run=p",
    ]
    done = in_process("evaluate", *argv, "gate=strict")
    refused(done, ConfigError, "gate.kl limits what is not measured here")
    assert in_process("evaluate", *argv, "gate.kl=9", ways(done)[0].split()[0].replace("FOLDER", str(CHAT))).returncode == 0
    assert in_process("evaluate", *argv, "gate.kl=9", ways(done)[1], "force=true").returncode == 0
    refused(in_process("evaluate", *argv, "gate.kl=9"), ConfigError, "gate.kl limits what is not measured here"), "of a finished report too"


@helps(
    "models/gates.py",
    "evaluation.general=FILE of another domain",
    "evaluation.check=number, choice, json or calls, of what the data can check",
)
def test_a_gate_on_what_is_not_asked_for(outputs, tmp_path):
    argv = [f"source={CHAT}", f"parent={CHAT}", f"dataset={outputs / 'd' / 'data'}", "evaluation.rows=2", f"outputs={tmp_path}", "run=p"]
    short = ["evaluation.samples=2", "evaluation.max_new_tokens=12"]
    done = in_process("evaluate", *argv, "evaluation.samples=0", "gate.forgetting=0")
    refused(done, ConfigError, "gate.forgetting limits what is not measured here")
    given = ways(done)[0].split()[0].replace("FILE", str(outputs / "general.json"))
    assert in_process("evaluate", *argv, "evaluation.samples=0", "gate.forgetting=0", given).returncode == 0
    done = in_process("evaluate", *argv, *short, "evaluation.check=none", "gate.task_drop=0", "force=true")
    refused(done, ConfigError, "gate.task_drop limits what is not measured here")
    assert in_process("evaluate", *argv, *short, ways(done)[0].split(",")[0], "gate.task_drop=0", "force=true").returncode == 0


@helps(
    "evaluate.py",
    "gate.kl=null; gate.top1 and gate.perplexity_ratio limit what it may give",
    "source=FOLDER without endpoint.url measures the model here",
)
def test_what_an_endpoint_does_not_give_is_not_limited(outputs, tmp_path):
    argv = [f"dataset={outputs / 'd' / 'data'}", "dry_run=true", f"outputs={tmp_path}"]
    served = [f"source={CHAT}", "endpoint.url=http://127.0.0.1:9", "gate=strict"]
    done = in_process("evaluate", *argv, *served)
    refused(done, ConfigError, "gate.kl limits what an endpoint does not give")
    assert in_process("evaluate", *argv, *served, ways(done)[0].split(";")[0]).returncode == 0
    here = ways(done)[1].split()[0].replace("FOLDER", str(CHAT))
    assert in_process("evaluate", *argv, here, f"parent={CHAT}", "gate=strict").returncode == 0
    refused(in_process("evaluate", *argv, *served[1:2], "gate.top1=0.9"), ConfigError, "gate.top1 limits what is not measured here")


def test_an_endpoint_is_held_to_gates_and_its_answers_are_checked(judged, outputs, tmp_path, monkeypatch):
    """The figures are those of the same model measured here; a server without log-probabilities can be held to its answers alone."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Server(outputs / "damaged")
    server.behaviour.echo = "ids"
    argv = [f"source={CHAT}", f"dataset={outputs / 'd' / 'data'}", f"outputs={tmp_path}", f"evaluation.general={outputs / 'general.json'}"]
    argv += [f"endpoint.url={server.url}", "evaluation.samples=12", "evaluation.max_new_tokens=12"]
    gated = ["gate.top1=0.99", "gate.perplexity_ratio=1.01", "gate.task_drop=0.05", "gate.forgetting=0.01"]
    try:
        assert in_process("evaluate", "run=e", *argv).returncode == 0
        done = in_process("evaluate", "run=e", *argv, *gated)
        refused(done, GateFailed, "4 of 4 limits are not kept", *gated)
        there = artifact.open_artifact(tmp_path / "e" / f"evaluate-127.0.0.1-{server.server_port}").metrics
        here = report(outputs)
        for name in ("agreement", "perplexity_ratio", "task", "parent_task", "general_loss_difference", "loss_difference"):
            assert there[name] == pytest.approx(here[name], abs=1e-4), name
            assert there["intervals"][name] == pytest.approx(here["intervals"][name], abs=1e-3), name
        assert "kl" not in there and there["worst"]["general_loss_difference"]
        server.behaviour.echo = "no"
        assert in_process("evaluate", "run=n", *argv).returncode == 0
        done = in_process("evaluate", "run=n", *argv, *gated[:1])
        refused(done, ConfigError, "gate.top1 limits what is not measured here"), "and the report is kept"
        done = in_process("evaluate", "run=n", *argv, gated[2])
        refused(done, GateFailed, "1 of 1 limits are not kept")
        assert "up to date, skipped" in done.stderr
    finally:
        server.shutdown()
        server.server_close()


def test_gates_are_those_of_the_settings():
    assert gates.FIGURES.keys() == gates.Gate.model_fields.keys()
