"""README.md of what is made: a head that the hub's own library reads, a text that follows from settings, parents and figures alone."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import CHAT, FEW, ROOT, fake_adapter, fake_merge, worked

from src.core import artifact, card, descent
from src.core.artifact import Artifact

MADE = ("data", "finetune", "merge", "quantize", "deploy-llama2c")


def of(folder: Path):
    """The card of a folder as the hub's library reads it."""
    from huggingface_hub import DatasetCard, ModelCard

    kind = DatasetCard if (folder / "train.jsonl").is_file() else ModelCard
    return kind.load(folder / "README.md")


def test_each_artifact_has_a_card_that_the_hub_reads(finished):
    for name in MADE:
        folder = finished / "a" / name
        made = of(folder)
        assert "boardwalk" in made.data.tags and made.text.startswith("\n# "), name
        assert "README.md" in artifact.open_artifact(folder).files
        text = (folder / "README.md").read_text()
        assert str(finished) not in text and str(Path.home()) not in text and not re.search(r"\b20\d\d-\d\d-\d\d\b", text)
        assert f"key `{artifact.open_artifact(folder).key[:12]}`" in text
    assert not (finished / "a" / "evaluate-quantize" / "README.md").exists()


def test_what_the_heads_say(finished):
    data, *models = (of(finished / "a" / name).data for name in MADE)
    assert data.task_categories == ["text-generation"] and data.size_categories == ["n<1K"] and data.license is None
    assert [one["split"] for one in data.configs[0]["data_files"]] == ["train", "validation", "calibration"]
    assert [m.base_model for m in models] == ["base"] * 4, "the folder's name"
    assert [m.base_model_relation for m in models] == ["adapter", "finetune", "quantized", "finetune"]
    assert [m.library_name for m in models] == ["peft", "transformers", "transformers", None]
    assert {m.pipeline_tag for m in models} == {"text-generation"} and {m.license for m in models} == {None}
    assert "Not known here: the folder of `base` names none." in (finished / "a" / "merge" / "README.md").read_text()


def test_a_dataset_s_card_has_the_hub_s_library_read_each_split(finished, tmp_path):
    from datasets import load_dataset

    folder = finished / "a" / "data"
    read = load_dataset(str(folder), cache_dir=str(tmp_path))
    counts = artifact.open_artifact(folder).metrics
    assert {split: len(rows) for split, rows in read.items()} == {
        "train": counts["train_rows"],
        "validation": counts["val_rows"],
        "calibration": counts["calib_rows"],
    }


def test_equal_work_has_an_equal_card(finished, tmp_path):
    """Elsewhere, under another name, from inputs at another place."""
    inputs = shutil.copytree(finished / "inputs", tmp_path / "far" / "inputs")
    common = [f"outputs={tmp_path / 'other'}", "run=z"]
    worked("data", __import__("src.data", fromlist=["data"]).data, *common, *FEW, f"data.path={inputs / 'chats.json'}")
    worked("finetune", fake_adapter, *common, f"model.path={inputs / 'base'}", "launch.nproc_per_node=1")
    worked("merge", fake_merge, *common)
    for name in MADE[:3]:
        ours, theirs = tmp_path / "other" / "z" / name, finished / "a" / name
        assert artifact.open_artifact(ours).key == artifact.open_artifact(theirs).key
        assert (ours / "README.md").read_bytes() == (theirs / "README.md").read_bytes()


@pytest.fixture
def in_the_cache(tmp_path):
    """in_the_cache(kind, **files): a folder in the hub's cache, of people/thing, with embedded content and these files."""

    def make(kind: str, **files: str) -> Path:
        folder = tmp_path / "hub" / f"{kind}--people--thing" / "snapshots" / ("c" * 40)
        if kind == "models":
            shutil.copytree(CHAT, folder)
        else:
            folder.mkdir(parents=True)
            chats = json.loads((ROOT / "assets" / "conversations.json").read_text())[:40]
            (folder / "train.json").write_text(json.dumps(chats))
        for name, text in files.items():
            (folder / name.replace("_", ".")).write_text(text)
        return folder

    return make


OWN = "---\nlicense: other\nlicense_name: people-1\nlicense_link: LICENSE\nlanguage: [en, sv]\n---\n# The base\n"


def test_licence_and_names_of_the_hub_are_inherited_down_the_road(in_the_cache, tmp_path):
    base, data = in_the_cache("models", README_md=OWN), in_the_cache("datasets", README_md="---\nlicense: cc-by-4.0\nlanguage: sv\n---\n")
    common = [f"outputs={tmp_path / 'o'}", "run=a"]
    worked("data", __import__("src.data", fromlist=["data"]).data, *common, *FEW, f"data.path={data}")
    worked("finetune", fake_adapter, *common, f"model.path={base}", "launch.nproc_per_node=1")
    worked("merge", fake_merge, *common)
    dataset, adapter, merged = (of(tmp_path / "o" / "a" / name) for name in MADE[:3])
    assert (dataset.data.license, dataset.data.language) == ("cc-by-4.0", ["sv"])
    for made in (adapter, merged):
        assert made.data.base_model == "people/thing" and made.data.datasets == ["people/thing"] and made.data.language == ["sv"]
        assert (made.data.license, made.data.license_name) == ("other", "people-1")
        assert made.data.license_link == "https://huggingface.co/people/thing/blob/main/LICENSE"
    assert "# The base" not in merged.text, "the base's card is not the merge's, though its files were copied"
    assert '"PATH")  # with its base' in adapter.text, "of a base that anyone can fetch"


def test_a_licence_is_known_by_its_text_or_not_at_all(tmp_path):
    assert card.licence_of(ROOT) == {"license": "apache-2.0"}
    (tmp_path / "LICENSE").write_text("You may look, and not touch.\n")
    assert card.licence_of(tmp_path) == {}
    for head in ("---\nlicense: [a, b\n---\n", "---\n- a\n---\n", "no head\n", "---\nlicense: 3\n---\n"):
        (tmp_path / "README.md").write_text(head)
        assert card.licence_of(tmp_path) == {}


def test_a_card_fetched_beside_a_model_of_the_hub_changes_no_key(in_the_cache):
    folder = in_the_cache("models")
    before = artifact.outside(folder, "model").key
    kept = card.aside(folder)
    kept.parent.mkdir(parents=True)
    kept.write_text("---\nlicense: mit\n---\n")
    assert card.licence_of(folder) == {"license": "mit"} and artifact.outside(folder, "model").key == before


def test_a_stage_s_own_text_stays_under_the_head_once(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n\nHow to run it.\n")
    model = Artifact(CHAT, "model", "k" * 64, None, {})
    settings = {"target": {"kind": "gguf", "name": "gguf", "weight_type": "q8_0"}}
    for _ in range(2):  # again over what it wrote, as after a kill before the seal
        card.write(tmp_path, "deploy", "bundle", "a" * 64, settings, {"model": model}, {"loss_after": 0.5, "kl": 0.01})
    made = of(tmp_path)
    assert made.text.lstrip().startswith("# Mine\n\nHow to run it.") and made.text.count("# Mine") == 1
    assert (made.data.library_name, made.data.base_model_relation) == ("gguf", "quantized")
    assert {one.metric_type: one.metric_value for one in made.data.eval_results} == {"loss": 0.5, "kl": 0.01}


def test_names_without_the_way_to_them():
    assert descent.name_of(Path("/home/me/.cache/hub/models--Qwen--Qwen2.5-0.5B/snapshots/abc")) == "Qwen/Qwen2.5-0.5B"
    assert descent.name_of(Path("/home/me/secret-customer/chats.json")) == "chats.json"
    assert descent.hub_id(Path("/x/models--gpt2/snapshots/abc")) == "gpt2"


@pytest.mark.slow
def test_the_python_in_a_card_runs(finished):
    """As it stands, with the folder's path in place of PATH; of an adapter, its base's in place of BASE."""
    for name in ("merge", "finetune"):
        code = re.search(r"```python\n(.*?)```", (finished / "a" / name / "README.md").read_text(), re.S)[1]
        code = code.replace("PATH", str(finished / "a" / name)).replace("BASE", str(finished / "inputs" / "base"))
        if name == "finetune":
            compile(code, name, "exec")  # the fixture's adapter is no whole one; peft's lines are those of its own documentation
            continue
        exec(code.replace("max_new_tokens=100", "max_new_tokens=3"), {})
