"""Where a result came from: the chain as printed, and every way of touching it that --verify must notice."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from conftest import FEW, helps, refused, ways

from src.core import artifact
from src.core.errors import ConfigError, MissingInput, Tampered
from src.core.files import write_json

CHAIN = ("data", "finetune", "merge", "quantize", "deploy-llama2c", "evaluate-quantize")


def chain_of(done) -> list[str]:
    """Stages and outside inputs as printed, in order, each with its depth."""
    lines = [line for line in done.stdout.splitlines() if "->" in line or ": outside" in line]
    return [f"{(len(line) - len(line.lstrip())) // 4} {line.split()[0]}" for line in lines]


def edit(file: Path, change, *, reseal: bool = False) -> None:
    """Change a manifest, and if asked for its seal with it, as a determined hand would."""
    manifest = json.loads(file.read_text())
    change(manifest)
    if reseal:
        manifest["seal"] = artifact.seal_of(manifest)
    write_json(file, manifest)


def test_the_whole_chain_is_printed_and_holds(call, finished):
    done = call("lineage", finished / "a" / "deploy-llama2c", "--verify")
    assert done.returncode == 0, done.stderr
    assert chain_of(done) == ["0 deploy", "1 merge", "2 finetune", "3 data", "4 conversations:", "3 model:", "2 model:"]
    assert "verified" in done.stdout
    for words in ("target.kind = llama2c", "tuner.rank = 64", "data.val = 0.2", "chats.json", "inputs/base"):
        assert words in done.stdout
    assert "verified" not in call("lineage", finished / "a" / "deploy-llama2c").stdout


def test_what_was_shown_above_is_not_told_twice(call, finished):
    done = call("lineage", finished / "a" / "evaluate-quantize", "--verify")
    assert done.returncode == 0
    assert done.stdout.count("data.split_seed") == 1 and "(shown above)" in done.stdout


@pytest.mark.parametrize("name", CHAIN[:4])
def test_one_flipped_bit_in_any_file_is_found(call, road, name):
    """Every file of every artifact behind the bundle and the report, the manifest included: its first, middle and last byte."""
    result = "evaluate-quantize" if name == "quantize" else "deploy-llama2c"
    files = sorted(p for p in (road / "a" / name).iterdir() if p.stat().st_size)
    assert len(files) > 3
    for file in files:
        whole = file.read_bytes()
        for at in {0, len(whole) // 2, len(whole) - 1}:
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            done = call("lineage", road / "a" / result, "--verify")
            refused(done, Tampered, road / "a" / name, file.name if file.name != "manifest.json" else "manifest")
        file.write_bytes(whole)
    assert call("lineage", road / "a" / result, "--verify").returncode == 0


@helps("core/artifact.py", "copy it again from where it was made", "force=true, with the command that made it, makes it anew")
@pytest.mark.parametrize("name", ["train.jsonl", "manifest.json"])
def test_each_way_out_of_a_damaged_artifact(call, road, name):
    file = road / "a" / "data" / name
    whole = file.read_bytes()
    for mend in (
        lambda: file.write_bytes(whole),
        lambda: call("data", "run=a", *FEW, f"data.path={road / 'inputs' / 'chats.json'}", "force=true"),
    ):
        file.write_bytes(whole[:-9])
        for command in (
            ["lineage", road / "a" / "merge", "--verify"],
            ["finetune", "run=b", f"source={road / 'a' / 'data'}", "dry_run=true"],
        ):
            refused(
                call(*command), Tampered, "copy it again from where it was made", "force=true, with the command that made it, makes it anew"
            )
        mend()
        assert call("lineage", road / "a" / "merge", "--verify").returncode == 0


@pytest.mark.parametrize("bit", range(8))
def test_a_manifest_has_no_byte_to_spare(road, bit):
    """Not even one JSON would forgive, such as 1e-06 for 1E-06."""
    file = road / "a" / "merge" / "manifest.json"
    whole = file.read_bytes()
    assert b"e-06" in whole
    for at in {0, 1, whole.index(b"e-06"), whole.index(b'"settings"'), whole.index(b"\n"), len(whole) - 1}:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        with contextlib.suppress(Tampered):
            assert artifact.verify(artifact.open_artifact(file.parent)), f"byte {at}, bit {bit}"


def test_outside_inputs_are_verified_too(call, road):
    for file in (road / "inputs" / "chats.json", road / "inputs" / "base" / "model.safetensors"):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        refused(call("lineage", road / "a" / "merge", "--verify"), Tampered, file.name, "differs from what was used")
        file.write_bytes(whole)


def test_files_that_are_missing_or_too_many(call, road):
    bundle = road / "a" / "deploy-llama2c"
    (road / "a" / "merge" / "extra.safetensors").write_text("x")
    refused(call("lineage", bundle, "--verify"), Tampered, "extra.safetensors: not in the manifest")
    (road / "a" / "merge" / "extra.safetensors").unlink()
    (road / "a" / "merge" / "sub").mkdir()
    (road / "a" / "merge" / "sub" / "modeling.py").write_text("x")
    refused(call("lineage", bundle, "--verify"), Tampered, "sub/modeling.py: not in the manifest")
    shutil.rmtree(road / "a" / "merge" / "sub")
    (road / "a" / "finetune" / "adapter_config.json").unlink()
    refused(call("lineage", bundle, "--verify"), Tampered, "adapter_config.json")


def test_a_parent_whose_manifest_is_gone(call, road):
    (road / "a" / "finetune" / "manifest.json").unlink()
    refused(call("lineage", road / "a" / "deploy-llama2c", "--verify"), Tampered, f"{road / 'a' / 'finetune'}/manifest.json: missing")


def test_all_differences_are_told_at_once(call, road):
    for name in ("data/train.jsonl", "finetune/adapter_config.json", "merge/config.json"):
        whole = (road / "a" / name).read_bytes()
        (road / "a" / name).write_bytes(whole[:-1] + b"~")
    done = call("lineage", road / "a" / "deploy-llama2c", "--verify")
    refused(done, Tampered, "3 differences", "data/train.jsonl", "finetune/adapter_config.json", "merge/config.json")


EDITS = {
    "settings": lambda m: m["settings"].update(dtype="float16"),
    "metrics": lambda m: m["metrics"].update(logit_error=0.0),
    "packages": lambda m: m["packages"].update(numpy="0"),
    "kind": lambda m: m.update(kind="quantized"),
    "key": lambda m: m.update(key="0" * 64),
    "a file's hash": lambda m: m["files"]["config.json"].update(sha256="0" * 64),
    "a file's record": lambda m: m["files"].pop("config.json"),
    "a parent's key": lambda m: m["parents"][0].update(key="0" * 64),
    "an ancestor's settings": lambda m: next(a for a in m["ancestors"].values() if a["stage"] == "data")["settings"]["data"].update(
        val=0.3
    ),
    "an ancestor's kind": lambda m: next(a for a in m["ancestors"].values() if a["stage"] == "finetune").update(kind="model"),
    "a parent's kind": lambda m: m["parents"][0].update(kind="quantized"),
    "an ancestor's record": lambda m: m["ancestors"].pop(m["parents"][0]["key"]),
    "an outside input's hash": lambda m: m["parents"][1]["files"]["config.json"].update(sha256="0" * 64),
}


@pytest.mark.parametrize("what", EDITS)
@pytest.mark.parametrize("name", ["merge", "deploy-llama2c"])
def test_an_edited_manifest_is_noticed(call, road, what, name):
    edit(road / "a" / "merge" / "manifest.json", EDITS[what])
    refused(call("lineage", road / "a" / name), Tampered, road / "a" / "merge" / "manifest.json")


@pytest.mark.parametrize("what", [w for w in EDITS if w not in ("metrics", "packages")])
def test_a_manifest_edited_and_sealed_anew_contradicts_itself(call, road, what):
    """A seal anybody can write guards against accidents; keys follow from content, so lies about content still show."""
    edit(road / "a" / "merge" / "manifest.json", EDITS[what], reseal=True)
    refused(call("lineage", road / "a" / "merge", "--verify"), Tampered)


def test_another_kind_sealed_anew_opens_no_door(call, road):
    """The kind is under no key, but the stage and its settings are, and they say what it is."""
    edit(road / "a" / "finetune" / "manifest.json", lambda m: m.update(kind="model"), reseal=True)
    for argv in (["lineage", road / "a" / "finetune"], ["quantize", f"source={road / 'a' / 'finetune'}", "dry_run=true"]):
        refused(call(*argv), Tampered, "its kind is 'model', and 'finetune' by these settings makes 'adapter'")


@pytest.mark.parametrize("name", CHAIN)
def test_the_kind_of_what_is_made_follows_from_its_stage_and_settings(finished, name):
    manifest = json.loads((finished / "a" / name / "manifest.json").read_text())
    assert artifact.kind_made(manifest["stage"], manifest["settings"]) == manifest["kind"]


def test_every_stage_makes_the_kind_it_says():
    import importlib

    from conftest import VERBS

    stages = [
        m.STAGE
        for v in VERBS
        for m in [importlib.import_module(f"src.{v}.__main__" if v in ("distill", "deploy") else f"src.{v}")]
        if hasattr(m, "STAGE")
    ]
    told = {s.verb: s.kind for s in stages if isinstance(s.kind, str)}
    assert told == {stage: kind for stage, kind in artifact.MAKES.items() if stage in told} and len(stages) == len(artifact.MAKES) + 2, "finetune and cpt make a model or an adapter"
    assert (
        artifact.kind_made("finetune", {"tuner": {"kind": "full"}}) == "model"
        and artifact.kind_made("finetune", {"tuner": {"kind": "qlora"}}) == "adapter"
    )


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


def test_escape_codes_in_a_manifest_are_spelled_out(call, road, cli):
    """Settings, paths and stages of others' manifests, as lineage, an error and the table of a run show them."""
    for name in ("merge", "evaluate-quantize"):
        edit(
            road / "a" / name / "manifest.json",
            lambda m: (m["settings"].update({f"x{ESCAPES}": ESCAPES}), m["parents"][0].update(path=ESCAPES)),
            reseal=True,
        )
    commands = [["lineage", road / "a" / "merge"], ["lineage", road / "a" / "merge", "--verify"], ["summary", "run=a", f"outputs={road}"]]
    commands += [["merge", "run=a", f"outputs={road}", f"source={road / 'a' / 'finetune'}"]]
    said = ""
    for command in commands:
        done = call(*command)
        said += done.stdout + done.stderr
    assert not set("\x1b\x07\x9b\u202e") & set(said), said
    assert r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202e" in said


def test_a_bundle_alone_tells_its_chain(call, road, tmp_path):
    alone = Path(shutil.copytree(road / "a" / "deploy-llama2c", tmp_path / "board" / "bundle"))
    shutil.rmtree(road)
    for flags in ([], ["--verify"]):
        done = call("lineage", alone, *flags)
        assert done.returncode == 0, done.stderr
        assert [line.split()[1] for line in chain_of(done)] == ["deploy", "merge", "finetune", "data", "conversations:", "model:", "model:"]
        assert "tuner.rank = 64" in done.stdout and "not here" in done.stdout
    edit(
        alone / "manifest.json",
        lambda m: next(a for a in m["ancestors"].values() if a["stage"] == "finetune")["settings"]["tuner"].update(rank=1),
        reseal=True,
    )
    refused(call("lineage", alone, "--verify"), Tampered, "finetune")
    assert call("lineage", alone).returncode in (0, 9)


def test_a_moved_outputs_folder_still_verifies(call, road, tmp_path):
    road.rename(tmp_path / "elsewhere")
    done = call("lineage", tmp_path / "elsewhere" / "a" / "deploy-llama2c", "--verify")
    assert done.returncode == 0 and "not here" not in done.stdout


def test_a_parent_made_again_is_not_taken_for_the_old_one(call, road):
    assert call("data", "run=a", "data.val=0.3", f"data.path={road / 'inputs' / 'chats.json'}", "force=true").returncode == 0
    done = call("lineage", road / "a" / "finetune", "--verify")
    assert done.returncode == 0 and "data.val = 0.2" in done.stdout and "cannot be verified" in done.stdout


@helps("lineage.py", "python -m src.lineage outputs/default/merge --verify")  # which is how every test here calls it
@pytest.mark.parametrize("argv", [[], ["one", "two"], ["a", "--verbose"], ["--verify"], ["run=a"]])
def test_what_lineage_does_not_take(call, argv):
    refused(
        call("lineage", *argv),
        MissingInput if argv == ["run=a"] else ConfigError,
        "python -m src.lineage" if argv != ["run=a"] else "run=a",
    )


@helps("lineage.py", "give a folder that has one, such as outputs/default/merge", "python -m src.lineage {}")
def test_a_folder_that_is_no_artifact(call, finished, tmp_path):
    refused(call("lineage", tmp_path / "nowhere"), MissingInput, "no manifest.json", "give a folder that has one, such as")
    told = call("lineage", finished / "a")
    refused(told, MissingInput, f"python -m src.lineage {finished / 'a' / 'merge'}")
    assert all(call("lineage", way.split()[-1]).returncode == 0 for way in ways(told))
    refused(call("lineage", finished / "inputs" / "base"), MissingInput, "no manifest.json")
