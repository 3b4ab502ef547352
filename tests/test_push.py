"""What is shared: every byte as it was sealed, on a stand-in hub, and what is refused before anything is sent."""

import json
import pickle
import shutil

import pytest
from conftest import FEW, fake_adapter, fake_merge, helps, refused, typed, ways, worked

from src import data as data_verb
from src import push
from src.core import artifact, private
from src.core.errors import ConfigError, MissingInput, NoAnswer, Tampered, Withheld, WrongKind


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in this process, with a token that it takes; its address is the client's."""
    from huggingface_hub import constants
    from stand_ins.hub_repos import TOKEN, serve

    address, held, server = serve()
    for name, value in {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(tmp_path / "none"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield held
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name, kind", [("data", "dataset"), ("finetune", "model"), ("merge", "model"), ("deploy-llama2c", "model")])
def test_every_byte_arrives(hub, call, road, name, kind, tmp_path):
    done = call("push", road / "a" / name, "id=people/thing")
    assert done.returncode == 0, done.stderr
    assert f"to the {kind} people/thing, which only you and who you let in see" in done.stderr and "/commit/" in done.stdout
    (repo,) = hub.repos.values()
    assert list(hub.repos) == [(kind, "people/thing")] and repo.private and len(repo.commits) == 1
    sealed = artifact.open_artifact(road / "a" / name)
    for file in sealed.files:
        assert repo.files[file] == (road / "a" / name / file).read_bytes(), file
    assert set(repo.files) == {*sealed.files, "manifest.json"}
    for file, content in repo.files.items():
        (tmp_path / "back" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / file).write_bytes(content)
    back = artifact.open_artifact(tmp_path / "back")
    assert not artifact.verify(back) and back.key == sealed.key, "sealed there as here"
    assert str(tmp_path) not in repo.files["manifest.json"].decode()
    assert call("lineage", tmp_path / "back", "--verify").returncode == 0


def test_the_same_again_sends_nothing_new_and_another_takes_the_place_of_the_first(hub, call, road):
    command = ["push", road / "a" / "finetune", "id=people/thing"]
    assert call(*command).returncode == 0
    (repo,) = hub.repos.values()
    before = dict(repo.files)
    again = call(*command)
    assert again.returncode == 0 and len(repo.commits) == 1 and repo.files == before
    repo.files["NOTES.md"] = b"written on the hub's page"
    done = call("push", road / "a" / "merge", "id=people/thing")
    assert (
        done.returncode == 0 and "removes there what an earlier push brought: adapter_config.json, adapter_model.safetensors" in done.stderr
    )
    assert {*artifact.open_artifact(road / "a" / "merge").files, "manifest.json", "NOTES.md"} == set(repo.files)


@helps("push.py", "run the same command again: what has arrived is not sent again")
def test_it_goes_on_where_it_was_cut_off(hub, call, road):
    command = ["push", road / "a" / "merge", "id=people/thing"]
    hub.breaks["POST /api/models/people/thing/commit"] = 500
    done = call(*command)
    refused(done, NoAnswer, "broke off", "run the same command again")
    sent = [line for line in hub.asked if line.startswith("PUT")]
    assert sent and not hub.repos["model", "people/thing"].commits
    hub.asked.clear()
    assert call(*command).returncode == 0
    assert not [line for line in hub.asked if line.startswith("PUT")], "large files had arrived"
    assert len(hub.repos["model", "people/thing"].commits) == 1


def test_a_dry_run_sends_nothing(hub, call, road):
    done = call("push", road / "a" / "merge", "id=people/thing", "dry_run=true")
    assert done.returncode == 0 and "would send" in done.stderr and "model.safetensors" in done.stdout
    assert not hub.asked and not hub.repos


@helps("push.py", "private=false shares it with everyone", "id=PEOPLE/OTHER_NAME")
def test_nothing_private_goes_where_everyone_sees_it(hub, call, road):
    command = ["push", road / "a" / "merge"]
    done = call(*command, "id=people/open", "private=false")
    assert done.returncode == 0 and "which EVERYONE sees" in done.stderr and not hub.repos["model", "people/open"].private
    refusal = call("push", road / "a" / "finetune", "id=people/open")
    refused(refusal, Withheld, "people/open is there already, and everyone sees it")
    assert len(hub.repos["model", "people/open"].commits) == 1
    assert call(*command, "id=people/open", *typed(ways(refusal)[0])).returncode == 0
    assert call(*command, "id=people/other").returncode == 0 and hub.repos["model", "people/other"].private
    kept = call(*command, "id=people/other", "private=false")
    assert kept.returncode == 0 and "it stays so" in kept.stderr and hub.repos["model", "people/other"].private


def test_the_card_of_a_base_on_the_hub_is_fetched_for_its_licence_and_an_adapter_names_that_base(hub, tmp_path):
    from stand_ins.hub_repos import Repo

    from src.core import card
    from src.models import adapter_files, folder

    hub.repos["model", "people/base"] = Repo(False, {"README.md": b"---\nlicense: mit\n---\nA base.\n"})
    base = tmp_path / "cache" / "models--people--base" / "snapshots" / ("c" * 40)
    base.mkdir(parents=True)
    folder._fetch_card("people/base", base)
    assert card.licence_of(base) == {"license": "mit"} and not list(base.iterdir())
    asked = len(hub.asked)
    folder._fetch_card("people/base", base)
    assert len(hub.asked) == asked, "once"
    other = tmp_path / "cache" / "models--people--none" / "snapshots" / ("c" * 40)
    folder._fetch_card("people/none", other)
    assert card.licence_of(other) == {}, "no such card is no fault"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    adapter_files.tidy(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "people/base"


# ---- private data


MARK = "make it from data that may be shared"


def walk(outputs, run: str, *more: str) -> None:
    """data, finetune and merge of a run, from the inputs of `road`."""
    common = [f"outputs={outputs}", f"run={run}"]
    worked("data", data_verb.data, *common, *FEW, f"data.path={outputs / 'inputs' / 'chats.json'}", *more)
    worked("finetune", fake_adapter, *common, f"model.path={outputs / 'inputs' / 'base'}", "launch.nproc_per_node=1")
    worked("merge", fake_merge, *common)


@helps(
    "push.py",
    "make it from data that may be shared",
    "where the mark is a mistake: data.private=false force=true, with the command that made the dataset",
)
def test_what_was_made_from_private_data_stays_here(hub, call, road, tmp_path):
    walk(road, "mine", "data.private=true")
    for name in ("data", "finetune", "merge"):
        done = call("push", road / "mine" / name, "id=people/thing")
        refused(done, Withheld, "marked private", f"data {road / 'mine' / 'data'}" if name == "data" else "data", MARK)
    copied = shutil.copytree(road / "mine" / "merge", tmp_path / "board" / "merge")
    refused(call("push", copied, "id=people/thing"), Withheld, "marked private", "data data, key")
    assert not hub.asked, "nothing was sent, not even a question"
    assert call("push", road / "a" / "merge", "id=people/thing").returncode == 0, "of the same data, not so marked"


def test_a_mark_makes_nothing_anew_and_reaches_what_was_made_before(hub, call, road):
    keys = {name: artifact.open_artifact(road / "a" / name).key for name in ("data", "merge")}
    shutil.copytree(road / "a", road / "linked")
    again = ["run=a", *FEW, f"data.path={road / 'inputs' / 'chats.json'}"]
    done = call("data", *again, "data.private=true", "dry_run=true")
    assert "would be marked private" in done.stderr and not private.marked(artifact.open_artifact(road / "a" / "data"))
    done = call("data", *again, "data.private=true")
    assert done.returncode == 0 and "up to date" in done.stderr and "marked private; nothing is made anew" in done.stderr
    assert {name: artifact.open_artifact(road / "a" / name).key for name in keys} == keys
    assert call("lineage", road / "a" / "merge", "--verify").returncode == 0
    for run in ("a", "linked"):
        refused(call("push", road / run / "merge", "id=people/thing"), Withheld, "marked private", f"{run}/data")
    assert "up to date" in call("merge", "run=a", "dry_run=true").stderr, "the road stands as it was"
    assert "stays marked private" in call("data", *again).stderr
    done = call("data", *again, "force=true")
    assert done.returncode == 0 and "stays marked private; data.private=false makes it without the mark" in done.stderr
    refused(call("push", road / "a" / "merge", "id=people/thing"), Withheld, "marked private", "a/data")
    done = call("data", *again, "data.private=false", "force=true")
    assert done.returncode == 0 and "is so no more (data.private=false)" in done.stderr
    assert call("push", road / "a" / "merge", "id=people/thing").returncode == 0, "no mark was carried on while there was one"


def test_a_file_taken_out_of_a_private_dataset_is_private_too(hub, call, road):
    walk(road, "mine", "data.private=true")
    assert call("data", "run=again", *FEW, f"data.path={road / 'mine' / 'data' / 'train.jsonl'}").returncode == 0
    refused(call("push", road / "again" / "data", "id=people/thing"), Withheld, "marked private")
    shutil.rmtree(road / "mine")
    refused(call("push", road / "again" / "data", "id=people/thing"), Withheld, "marked private")


def test_another_program_s_manifest_is_none_of_ours(hub, call, road):
    (road / "inputs" / "manifest.json").write_text('{"name": "a web page", "private": true}')
    walk(road, "mine")
    assert call("push", road / "mine" / "merge", "id=people/thing").returncode == 0


@pytest.mark.parametrize("argv", [["answer", "prompts.path=x"], ["distill", "teacher.model=m"], ["cpt", "text=x"], ["pretrain", "text=x"]])
def test_every_verb_that_reads_from_outside_can_mark(argv):
    import importlib

    from test_config import composed

    verb, given = argv
    module = importlib.import_module(f"src.{verb}" if verb != "distill" else "src.distill.__main__")
    setting = "private=true" if verb in ("cpt", "pretrain") else "prompts.private=true"
    name, asked = module.STAGE.private
    assert asked(composed(verb, given)) is None and asked(composed(verb, given, setting)) is True and name == setting.partition("=")[0]


# ---- what else is refused


def test_changed_bytes_and_strange_files(hub, call, road):
    weights = road / "a" / "merge" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(call("push", road / "a" / "merge", "id=people/thing"), Tampered, "model.safetensors: bytes differ")
    weights.write_bytes(whole)
    (road / "a" / "merge" / "notes.txt").write_text("mine")
    refused(call("push", road / "a" / "merge", "id=people/thing"), Tampered, "notes.txt: not in the manifest")
    assert not hub.asked


@pytest.mark.parametrize("write", [lambda file: file.write_bytes(pickle.dumps({"a": [1]})), "torch"])
def test_pickles(hub, call, road, write):
    import torch

    def adapter(cfg, inputs, out):
        file = out / "extra.bin"
        torch.save({"a": torch.ones(2)}, file) if write == "torch" else write(file)
        return fake_adapter(cfg, inputs, out)

    common = [f"outputs={road}", "run=b", f"source={road / 'a' / 'data'}", f"model.path={road / 'inputs' / 'base'}"]
    worked("finetune", adapter, *common, "launch.nproc_per_node=1")
    refused(call("push", road / "b" / "finetune", "id=people/thing"), WrongKind, "'extra.bin' is a pickle", way=False)
    assert not hub.asked


@helps("push.py", "take it out of what this was made from, and make it again")
@pytest.mark.parametrize("key", ["hf_" + "a1" * 17, "a secret of the environment"])
def test_a_key_in_the_data(hub, call, road, key, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "a secret of the environment")
    chats = json.loads((road / "inputs" / "chats.json").read_text())
    words = chats[0]["conversations"][0]["value"]
    for text, code in ((f"{words} {key}", Withheld.exit_code), (words, 0)):
        chats[0]["conversations"][0]["value"] = text
        (road / "inputs" / "chats.json").write_text(json.dumps(chats))
        assert call("data", "run=b", *FEW, f"data.path={road / 'inputs' / 'chats.json'}", "force=true").returncode == 0
        done = call("push", road / "b" / "data", "id=people/thing")
        assert done.returncode == code, done.stderr
        assert key not in done.stderr + done.stdout
        assert bool(hub.asked) == (code == 0)


@helps("push.py", "make it again with {} as a path below the project's folder, or without it")
def test_a_path_of_this_machine_in_the_manifest(hub, call, road, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")
    common = [
        f"outputs={road}",
        "run=b",
        f"source={road / 'a' / 'data'}",
        f"model.path={road / 'inputs' / 'base'}",
        "launch.nproc_per_node=1",
    ]
    worked("finetune", fake_adapter, *common, f"chat_template={template}")
    done = call("push", road / "b" / "finetune", "id=people/thing")
    refused(
        done,
        Withheld,
        f"its manifest names a folder of this machine: settings.chat_template = {template}",
        "make it again with chat_template",
    )
    assert not hub.asked
    worked("finetune", fake_adapter, *common, "force=true")
    assert call("push", road / "b" / "finetune", "id=people/thing").returncode == 0


@helps("push.py", "python -m src.push outputs/default/merge id=people/name", "give {}, which it is of", "id=PEOPLE/NAME")
def test_what_is_no_artifact_to_share(hub, call, road):
    refused(call("push", road / "inputs" / "base", "id=people/thing"), MissingInput, "not a finished artifact")
    done = call("push", road / "a" / "evaluate-quantize", "id=people/thing")
    refused(done, WrongKind, "not report")
    given = ways(done)[0].removeprefix("give ").removesuffix(", which it is of")
    assert call("push", given, "id=people/thing").returncode == 0
    refused(call("push", road / "a" / "merge", "id=thing"), ConfigError, "id=thing is no name on the hub")


# ---- the hub's own refusals


@helps("push.py", "hf auth login keeps one on this machine", "HF_TOKEN in the environment holds one")
def test_without_a_token(hub, call, road, monkeypatch, tmp_path):
    from huggingface_hub import constants

    token = push.os.environ["HF_TOKEN"]
    monkeypatch.delenv("HF_TOKEN")
    command = ["push", road / "a" / "merge", "id=people/thing"]
    refused(call(*command), MissingInput, "there is no token for the hub", "hf auth login")
    assert not hub.asked
    (tmp_path / "token").write_text(token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert call(*command).returncode == 0


@helps("push.py", "hf auth login, with a token that may write to that name", "id=YOUR_NAME/NAME")
def test_a_token_without_the_right(hub, call, road, monkeypatch):
    command = ["push", road / "a" / "merge"]
    refused(call(*command, "id=others/thing"), NoAnswer, "the hub refuses the token", "id=YOUR_NAME/NAME")
    assert call(*command, "id=people/thing").returncode == 0
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    done = call(*command, "id=people/thing")
    refused(done, NoAnswer, "the hub refuses the token", "hf auth login")
    assert "hf_wrongwrongwrong" not in done.stderr


@helps("push.py", "unset HF_HUB_OFFLINE", "HF_ENDPOINT names another hub")
def test_a_hub_that_is_not_reached(hub, call, cli, road, monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    address = constants.ENDPOINT
    command = ["push", road / "a" / "deploy-llama2c", "id=people/thing"]
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        close_session()
        refused(call(*command), NoAnswer, "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
    close_session()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        refused(call(*command), NoAnswer, "was not reached", "HF_ENDPOINT")
    assert not hub.asked
    done = cli(*command, env={"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"})
    assert done.returncode == 0 and ("model", "people/thing") in hub.repos, "by the environment alone"


def test_a_head_that_the_hub_does_not_take(hub, call, road):
    """The hub looks at the head before anything is sent; what it says is told."""
    hub.breaks["POST /api/validate-yaml"] = 400
    refused(call("push", road / "a" / "merge", "id=people/thing"), NoAnswer, "does not take it", "out of order", way=False)
    assert not any(line.startswith("PUT") for line in hub.asked)
