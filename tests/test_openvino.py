"""deploy target=openvino_cpu and openvino_npu: rules and messages with a stand-in for the exporter; marked slow, the exporter itself."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CHAT, ROOT, helps, in_process, refused, typed, ways, write_model

from src.core.errors import ConfigError, Moved, NoRoom, ProofFailed, ToolFailed, Unfinished, WrongKind
from src.deploy.openvino import exporter, proof, recipe
from src.sizing import takes
from src.sizing.config_reader import read_shape

sys.path.insert(0, str(ROOT / "tests" / "stand_ins"))
from openvino_python import DYING, TABLE, make

REAL = ROOT / ".venv-openvino"
real = [
    pytest.mark.slow,
    pytest.mark.skipif(not (REAL / "requirements.sha256").is_file(), reason="no .venv-openvino: bash scripts/openvino_env.sh makes it"),
]
SHORT = ("target.context_len=512", "target.prompt_len=256")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("environment") / "env")


@pytest.fixture
def deploy(call, environment, tmp_path, monkeypatch):
    """deploy(model, *argv, fault=None): the verb with the stand-in, short answers; `deploy.asked()` is what the stand-in was called with."""
    log = tmp_path / "asked.jsonl"
    monkeypatch.setattr(proof, "TOKENS", 8)

    def run(model, *argv, fault=None):
        monkeypatch.setenv("STAND_IN", json.dumps({"fault": fault, "log": str(log)}))
        target = [] if any(a.startswith("target=") for a in argv) else ["target=openvino_cpu"]
        return call("deploy", "run=o", f"source={model}", *target, *SHORT, f"target.environment={environment}", *argv)

    run.asked = lambda: [json.loads(line) for line in log.read_text().splitlines()]
    return run


def refused_at_length(done, *words) -> None:
    """As conftest's refused, for a ToolFailed that quotes what the tool said last."""
    assert done.returncode == ToolFailed.exit_code, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def target(**changes) -> SimpleNamespace:
    return SimpleNamespace(
        **{"device": "CPU", "weight_type": "int4", "group_size": "auto", "context_len": 512, "prompt_len": 256} | changes
    )


def shape(tmp_path, **sizes):
    (tmp_path / "config.json").write_text(json.dumps(json.loads((CHAT / "config.json").read_text()) | sizes))
    return read_shape(tmp_path)


# ---- rules


@pytest.mark.parametrize(
    ("sizes", "group", "words"),
    [
        ({}, 128, "below a billion"),
        ({"hidden_size": 64, "head_dim": 16, "intermediate_size": 172}, -1, "128 does not divide rows of 64, 172"),
        (
            {"hidden_size": 4096, "head_dim": 128, "num_attention_heads": 32, "intermediate_size": 11008, "num_hidden_layers": 8},
            -1,
            "or more",
        ),
    ],
)
def test_auto_group_is_128_where_it_divides_a_small_model(tmp_path, sizes, group, words):
    found = shape(tmp_path, **sizes)
    assert (found.params >= takes.BILLION) == ("or more" in words)
    chosen, why = takes.openvino_group(found, target())
    assert chosen == group and words in why


def test_a_group_that_does_not_divide_is_refused_with_one_that_does(tmp_path):
    found = shape(tmp_path, hidden_size=192, head_dim=48, intermediate_size=320)
    for device, group in (("CPU", 64), ("NPU", -1)):
        with pytest.raises(ConfigError, match=r"group_size=128 does not divide the model's rows of 192, 320") as error:
            takes.openvino(found, target(group_size=128, device=device), where="here")
        assert error.value.fix == [f"target.group_size={group}"]
    takes.openvino(found, target(group_size=64), where="here")
    takes.openvino(found, target(group_size=128, weight_type="int8"), where="here")


def argv(model: Path, environment: Path, *, weights: list[str]) -> str:
    words = [environment / "bin" / "python", "-I -m optimum.commands.optimum_cli export openvino --model", model]
    return " ".join(map(str, [*words, "--task text-generation-with-past", *weights, "export"]))


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        (["target=openvino_cpu"], ["--weight-format int8"]),
        (["target=openvino_npu"], ["--weight-format int4 --sym --ratio 1.0 --group-size 128"]),
        (["target=openvino_npu", "target.weight_type=int8"], ["--weight-format int8 --sym"]),
        (
            ["target=openvino_cpu", "target.weight_type=int4", "target.group_size=32"],
            ["--weight-format int4 --sym --ratio 1.0 --group-size 32"],
        ),
    ],
)
def test_the_plan_prints_the_argv_and_runs_nothing(deploy, tiny_model, environment, tmp_path, settings, weights):
    model = tiny_model()
    done = deploy(model, *settings, "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert argv(model, environment, weights=weights) in done.stderr
    assert "optimum_intel 2.2.0" in done.stderr and "disk, estimated" in done.stderr
    assert not (tmp_path / "asked.jsonl").exists() and not (tmp_path / "outputs" / "o").exists()


def test_settings_that_contradict_the_model_or_the_device_are_refused(deploy, tiny_model, tmp_path):
    model = tiny_model()
    refused(deploy(model, "target.context_len=2048"), ConfigError, "own limit of 512", "target.context_len=512 target.prompt_len=256")
    refused(deploy(model, "target=openvino_npu", "target.group_size=64"), ConfigError, "groups of 128 or whole rows")
    refused(deploy(model, "target.prompt_len=512"), ConfigError, "leaves no room for an answer")
    odd = write_model(tmp_path / "odd", intermediate_size=172, hidden_size=64)
    refused(
        deploy(odd, "target.weight_type=int4", "target.group_size=128"),
        ConfigError,
        "rows of 64, 172",
        "target.group_size=-1",
        tmp_path / "odd",
    )
    other = write_model(tmp_path / "other", model_type="persimmonx")
    refused(deploy(other), WrongKind, "persimmonx", way=False)


def test_a_quantized_model_is_refused(call, road):
    done = call("deploy", "run=a", f"source={road / 'a' / 'quantize'}", "target=openvino_cpu")
    refused(done, WrongKind, "takes model, not quantized", f"give {road / 'a' / 'merge'}, which it was made from")


# ---- without the exporter, and with a stand-in for it


@helps("deploy/openvino/__init__.py", "bash scripts/openvino_env.sh {}, two minutes and 1.4 GB; then the same command goes on from here")
@helps("deploy/openvino/__init__.py", "target.environment=FOLDER names one that has them")
def test_without_the_exporter_all_else_is_made_and_the_next_run_goes_on(call, deploy, tiny_model, tmp_path):
    model = tiny_model()
    bare = make(tmp_path / "bare", without="optimum_intel")
    for folder, words in ((tmp_path / "nowhere", "lacks openvino, "), (bare, "lacks optimum_intel")):
        done = deploy(model, f"target.environment={folder}")
        refused(done, Unfinished, words, "bash scripts/openvino_env.sh", "target.environment=FOLDER")
    partial = tmp_path / "outputs" / "o" / "deploy-openvino_cpu.partial"
    assert {"README.md", "run.py"} <= {file.name for file in partial.iterdir()}
    assert not (tmp_path / "outputs" / "o" / "deploy-openvino_cpu").exists()
    done = deploy(model, fault="killed")
    refused(done, ToolFailed, "lack of memory")
    assert "clearing" not in done.stderr  # the environment is no part of what a bundle is
    asked = deploy(model, f"target.environment={tmp_path / 'nowhere'}")
    assert f"bash scripts/openvino_env.sh {tmp_path / 'nowhere'}, two minutes" in asked.stderr
    make(tmp_path / "nowhere")  # what the script makes
    assert deploy(model, f"target.environment={tmp_path / 'nowhere'}").returncode == 0


@pytest.fixture(scope="module")
def bundle(environment, tmp_path_factory) -> SimpleNamespace:
    """A bundle that the stand-in made of a model with random weights; its stderr, and what the stand-in was asked."""
    place = tmp_path_factory.mktemp("bundle")
    model = write_model(place / "model")
    settings = json.dumps({"log": str(place / "asked.jsonl"), "fault": "tools"})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("STAND_IN", settings)
        patch.setattr(proof, "TOKENS", 8)
        argv = ["run=o", f"outputs={place / 'outputs'}", f"source={model}", "target=openvino_npu", *SHORT]
        done = in_process("deploy", *argv, f"target.environment={environment}")
    assert done.returncode == 0, done.stderr
    asked = [json.loads(line) for line in (place / "asked.jsonl").read_text().splitlines()]
    path = place / "outputs" / "o" / "deploy-openvino_npu"
    return SimpleNamespace(
        path=path, model=model, stderr=done.stderr, asked=asked, manifest=json.loads((path / "manifest.json").read_text())
    )


def test_a_bundle_is_whole_and_tells_what_was_measured(bundle):
    metrics = bundle.manifest["metrics"]
    assert metrics["prompts"] == metrics["prompts_equal"] == metrics["prompts_near"] == 10 and metrics["greedy_agreement"] == 1
    assert metrics["group_size"] == 128 and metrics["weights"] == {"int8_asym, per-channel": 13, "int4_sym, group size 128": 87}
    assert metrics["conversations"] == 9 and metrics["template_equal"] == 8  # the one with tools is rendered otherwise, and said
    assert "renders tools otherwise" in bundle.stderr
    assert "10/10 prompts" in metrics["summary"]
    files = {file.name for file in bundle.path.iterdir()}
    assert {"README.md", "run.py", "contract.json", "export.json", "export.log", *exporter.MODEL, *exporter.TOKENIZER} <= files
    assert ".work" not in files


def test_a_bundle_says_how_it_was_made_and_nothing_of_where(bundle):
    record = json.loads((bundle.path / "export.json").read_text())
    assert record["argv"][1:] == bundle.asked[0] and record["versions"]["optimum_intel"] == "2.2.0"
    assert json.loads((bundle.path / "openvino_config.json").read_text()) == {"quantization_config": {"bits": 4}}
    assert (bundle.path / "export.log").read_text().startswith("$ ")


def test_run_py_and_the_readme_give_the_npu_its_lengths(bundle):
    script = (bundle.path / "run.py").read_text()
    options = next(node for node in ast.walk(ast.parse(script)) if isinstance(node, ast.Dict) and node.keys)
    values = {ast.literal_eval(key): value for key, value in zip(options.keys, options.values)}
    assert (values["MAX_PROMPT_LEN"].value, values["MIN_RESPONSE_LEN"].value) == (256, 256)
    readme = (bundle.path / "README.md").read_text()
    assert 'LLMPipeline("THIS_FOLDER", "NPU", MAX_PROMPT_LEN=256, MIN_RESPONSE_LEN=256)' in readme and "512 with the answer" in readme


def test_a_copy_of_a_bundle_verifies_and_a_changed_byte_does_not(bundle, call, tmp_path):
    copy = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    (copy / ".cache").mkdir()
    (copy / ".cache" / "blob").write_text("what an NPU's first start leaves")
    assert call("lineage", copy, "--verify").returncode == 0
    (copy / "openvino_tokenizer.bin").write_text("y")
    assert call("lineage", copy, "--verify").returncode == 9


FAULTS = {
    "killed": (ToolFailed, ["lack of memory", "exit code 137"]),
    "torchvision": (ToolFailed, ["torchvision that does not go with its torch", "pip uninstall torchvision"]),
    "family": (ToolFailed, ["does not know the model family 'ministral9'"]),
    "group": (ToolFailed, ["rows of 64, 172", "target.group_size=-1"]),
    "disk": (NoRoom, ["out of disk", "free space"]),
    "broken": (ToolFailed, ["not whole", "bash scripts/openvino_env.sh NEW_FOLDER"]),
    "no_tokenizer": (ProofFailed, ["did not convert this model's tokenizer", "FunnyTokenizer"]),
    "ids": (ProofFailed, ["the board's tokenizer file", "token 5 of 'code'"]),
    "template": (ProofFailed, ["renders the model's chat template otherwise", "system"]),
    "garbage": (ProofFailed, ["agree with transformers on"]),
    "short": (ProofFailed, ["answer of 2 tokens does not end where"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_known_failure_has_its_message_and_publishes_nothing(deploy, tiny_model, tmp_path, fault):
    error, words = FAULTS[fault]
    refused(deploy(tiny_model(), fault=fault), error, *words, way=fault not in ("no_tokenizer", "ids", "template"))
    assert not (tmp_path / "outputs" / "o" / "deploy-openvino_cpu").exists()


@helps("deploy/openvino/exporter.py", "pip uninstall torchvision there: language models do not need it", "target.group_size=-1")
@helps("deploy/openvino/exporter.py", "bash scripts/openvino_env.sh NEW_FOLDER, then target.environment=NEW_FOLDER")
@helps("deploy/openvino/exporter.py", "a newer exporter in an environment of your own: target.environment=FOLDER")
@helps("deploy/openvino/proof.py", "put every token that ends a turn into eos_token_id of the model's generation_config.json")
@helps("deploy/openvino/proof.py", "target.weight_type=int8", "target.weight_type=int8 loses less")
@pytest.mark.parametrize(
    "fault", ["family", *(pytest.param(f, marks=pytest.mark.slow) for f in ("torchvision", "group", "short", "garbage"))]
)
def test_each_way_out_of_a_known_failure(deploy, tiny_model, environment, tmp_path, fault):
    """The stand-in without its fault is the tool where it was mended and, behind a link, another environment."""
    model, narrow = tiny_model(), ["target.weight_type=int4"] if fault == "garbage" else []
    told = deploy(model, *narrow, fault=fault)
    (tmp_path / "new").symlink_to(environment)
    for at, way in enumerate(ways(told)[-1:]):
        elsewhere = [f"target.environment={tmp_path / 'new'}"] if "target.environment" in way else []
        done = deploy(model, f"run=o{at}", *typed(way), *elsewhere)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("fault", "words"),
    [("other", "nobody has seen"), ("empty", "did not write openvino_model.bin"), ("crash", "src/core/src/model.cpp")],
)
@helps("deploy/openvino/exporter.py", "the log has all that it said; its first line is the command, which can be run by hand")
def test_an_unknown_failure_shows_the_tool_s_last_lines_and_where_its_log_is(deploy, tiny_model, fault, words):
    done = deploy(tiny_model(), fault=fault)
    refused_at_length(done, words, ".log", "its first line is the command")
    log = Path(re.search(r"where: (\S+\.log)", done.stderr)[1])
    command = log.read_text().splitlines()[0].removeprefix("$ ")
    scratch = {**os.environ, "TMPDIR": str(log.parent)}
    by_hand = subprocess.run(command, shell=True, cwd=log.parent, capture_output=True, text=True, env=scratch)
    assert fault != "other" or words in by_hand.stdout + by_hand.stderr


def test_an_export_that_ended_well_is_not_repeated(deploy, tiny_model):
    model = tiny_model()
    exports = lambda: sum("export" in asked for asked in deploy.asked())
    assert deploy(model, fault="ids").returncode == ProofFailed.exit_code and exports() == 1
    assert deploy(model, fault="garbage").returncode == ProofFailed.exit_code and exports() == 1
    refused(deploy(model, "target.weight_type=int4"), Moved, "weight_type int8 -> int4")


def test_every_word_of_a_dying_exporter_is_told_apart(tmp_path):
    told = set()
    for words, code in DYING.values():
        (tmp_path / "log").write_text(words)
        with pytest.raises((ToolFailed, NoRoom)) as error:
            exporter.judge(SimpleNamespace(code=code, tail=words), tmp_path, tmp_path / "log")
        told.add(error.value.what)
    assert len(told) == len(DYING)


def test_kinds_of_weights_are_read_from_the_exporter_s_table():
    assert exporter.compressed(f"before\n{TABLE}after") == {"int8_asym, per-channel": 13, "int4_sym, group size 128": 87}


# ---- pieces that no merge makes


def tokenizer(vocab: list[str], merges: list, *, byte_level: bool = True, **model):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocab)}, merges, **model))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else pre_tokenizers.Metaspace()
    made.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_pieces_that_no_merge_makes_are_found_in_byte_level_vocabularies_only():
    vocab, merges = ["a", "b", "Ã", "©", "ab", "Ã©", "abb", "<0x41>"], [("a", "b")]
    assert proof.unmade_pieces(tokenizer(vocab, merges)) == ["Ã©", "abb", "<0x41>"]
    assert proof.unmade_pieces(tokenizer(vocab, [*merges, ("Ã", "©"), ("ab", "b")])) == ["<0x41>"]
    assert proof.unmade_pieces(tokenizer(vocab, merges, ignore_merges=True)) == []
    assert proof.unmade_pieces(tokenizer(vocab, merges, byte_level=False)) == []


# ---- the exporter itself


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["metrics"]


def inside(folder: Path, program: str, *argv: str) -> str:
    done = subprocess.run([str(REAL / "bin" / "python"), program, *argv], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """outputs with the embedded model, exported in int8 for a CPU and in int4 for an NPU."""
    outputs = tmp_path_factory.mktemp("exported") / "outputs"
    for name in ("openvino_cpu", "openvino_npu"):
        command = ["src.deploy", "run=real", f"outputs={outputs}", f"source={CHAT}", f"target={name}", *SHORT, f"target.environment={REAL}"]
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return outputs / "real"


class TestExporter:
    pytestmark = real

    def test_int8_answers_as_transformers_do(self, exported):
        metrics = metrics_of(exported / "deploy-openvino_cpu")
        print(metrics)
        assert metrics["weights"] == {"int8_asym, per-channel": 100}
        assert metrics["prompts"] == 10 and metrics["prompts_equal"] >= 9 and metrics["tokens_per_second"] > 0

    def test_int4_for_an_npu_is_symmetric_in_groups_of_128(self, exported):
        metrics = metrics_of(exported / "deploy-openvino_npu")
        print(metrics)
        assert metrics["weights"]["int4_sym, group size 128"] > 50 and metrics["greedy_agreement"] > 0.5
        assert metrics["model_bytes"] < metrics_of(exported / "deploy-openvino_cpu")["model_bytes"]

    def test_run_py_answers_in_a_copy_that_still_verifies(self, exported, call, tmp_path):
        from src.models.generation import greedy
        from src.models.loading import load_model, load_tokenizer

        copy = Path(shutil.copytree(exported / "deploy-openvino_cpu", tmp_path / "copy"))
        prompt = "What is the capital of Sweden?"
        tokenizer = load_tokenizer(CHAT)
        [(text, ended)] = greedy(
            load_model(CHAT, dtype="float32"), tokenizer, [[{"role": "user", "content": prompt}]], max_new_tokens=64, eos_id=1023
        )
        assert ended and inside(copy, "run.py", prompt).strip() == text.strip()
        assert call("lineage", copy, "--verify").returncode == 0

    def test_the_families_are_ones_the_exporter_registers(self, tmp_path):
        program = tmp_path / "families.py"
        program.write_text(
            "import json, optimum.exporters.openvino.model_configs\n"
            "from optimum.exporters.tasks import TasksManager\n"
            "known = TasksManager._SUPPORTED_MODEL_TYPE\n"
            f"print(json.dumps([k for k, v in known.items() if {recipe.TASK!r} in v.get('openvino', ())]))\n"
        )
        known = set(json.loads(inside(tmp_path, str(program)).splitlines()[-1]))
        assert known >= takes.OPENVINO
        print("registered, not taken:", sorted(known - takes.OPENVINO))

    def test_a_tokenizer_with_pieces_that_no_merge_makes_is_mended(self, shared, call, monkeypatch):
        model = shared / "models" / "stories260K-w256-qwen2-chatml-hf"
        argv = ["deploy", "run=o", f"source={model}", "target=openvino_cpu", *SHORT, f"target.environment={REAL}"]
        monkeypatch.setattr(proof, "unmade_pieces", lambda tokenizer: [])
        refused(call(*argv), ProofFailed, "the board's tokenizer file", "'accents'")
        monkeypatch.undo()
        done = call(*argv)
        assert done.returncode == 0, done.stderr
        assert "105 pieces that no merge makes" in done.stderr and "the export ended well in an earlier run" in done.stderr
        assert "10 but for near ties" in done.stderr, done.stderr

    def test_the_environment_is_up_to_date(self):
        done = subprocess.run(["bash", str(ROOT / "scripts" / "openvino_env.sh")], capture_output=True, text=True)
        assert done.returncode == 0 and "up to date" in done.stderr
