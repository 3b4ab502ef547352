"""deploy target=ax650 and ax630c against a stand-in for Pulsar2 and docker: argv, files, judgement, every known failure, and going on after one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import conftest
import numpy as np
import pytest
from conftest import ROOT, SHARED, each_kind, hear_ctrl_c, helps, in_process, save, typed, ways, write_model
from makers import KINDS, tokenizer_folder
from safetensors.numpy import load_file

from src.core.errors import BadData, ConfigError, MissingInput, MissingTool, Moved, NoRoom, ProofFailed, ToolFailed, Unfinished, WrongKind
from src.deploy.axera import chat, compile, differences, runtime, tokenizer_txt, toolchain
from src.deploy.embedding import KEYS, bf16_truncated, find_embedding, write_bf16

STAND_IN = ROOT / "tests" / "stand_ins" / "pulsar2.py"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LENGTHS = ["target.context_len=512", "target.prompt_len=256", "target.prefill_chunk=64"]
LAYERS = 3
END = 336
"""id of <|im_end|>; <|im_start|> and <|endoftext|> are the two before it"""
SHA256SUM = shutil.which("sha256sum")


def write_tokenizer(
    folder: Path, template: str = CHATML, *, bos: bool = False, digits: bool = False, whole: bool = False, **special: str
) -> None:
    """A small byte-level BPE that cuts words as Qwen2 does, with ChatML's tokens. bos: it puts <s> before a text. digits: it cuts digits one by one
    and words as GPT-2 does, as SmolLM2's. whole: it takes a word that is a piece whole, and has one that its rules do not make."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from src.deploy.byte_level import SPLITS

    pattern = next(pattern for pattern, name in SPLITS.items() if name == "qwen2")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        if not digits
        else [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    corpus = [
        "What is the capital of Sweden? It's here.\n\n",
        "hello world, hello there 안녕하세요 오늘 날씨",
        "  indented\tcode = x_1 + 12345\n",
    ] * 4
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(corpus, trainer)
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    if whole:
        spec = json.loads(made.to_str())
        spec["model"] |= {"ignore_merges": True, "vocab": {**spec["model"]["vocab"], "xyzzy": 340}}
        made = Tokenizer.from_str(json.dumps(spec))
    if bos:
        made.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
        special["bos_token"] = "<s>"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>", **special)
    wrapped.chat_template = template
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    wrapped.save_pretrained(folder)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory) -> Path:
    """A Qwen2 model folder with random weights in bf16's neighbourhood, byte-level tokenizer and ChatML template."""
    folder = write_model(tmp_path_factory.mktemp("qwen") / "model", "qwen2", num_hidden_layers=LAYERS, vocab_size=512, eos_token_id=END)
    write_tokenizer(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, END - 2]}))
    return folder


@pytest.fixture
def model(qwen, tmp_path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(qwen, tmp_path / "model"))


@pytest.fixture(scope="session")
def gptq(qwen, tmp_path_factory) -> Path:
    """The same folder with the config of a symmetric GPTQ int4 model; the stand-in reads no weights."""
    folder = Path(shutil.copytree(qwen, tmp_path_factory.mktemp("gptq") / "model"))
    change(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False})
    return folder


def change(folder: Path, **values) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """tools("pulsar2", fault=..., version=...): a stand-in on PATH under that name and no other; returns what it was asked, argv by argv."""
    folder, state, log = tmp_path / "bin", tmp_path / "state", tmp_path / "asked.jsonl"
    folder.mkdir()
    state.mkdir()

    def put(*names: str, **settings):
        for name in ("pulsar2", "docker"):
            (folder / name).unlink(missing_ok=True)
        for name in names:
            (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} {name} "$@"\n')
            (folder / name).chmod(0o755)
        monkeypatch.setenv(
            "PATH", f"{folder}:/usr/sbin:/sbin:/usr/bin:/bin" if "docker" in names else str(folder) + ":" + lean_path(tmp_path)
        )
        monkeypatch.setenv("STAND_IN", json.dumps({"log": str(log), "state": str(state), **settings}))
        return lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []

    return put


def lean_path(tmp_path: Path) -> str:
    """A PATH with sh and git but without docker."""
    lean = tmp_path / "lean"
    lean.mkdir(exist_ok=True)
    for name in ("sh", "git"):
        if not (lean / name).exists():
            (lean / name).symlink_to(shutil.which(name))
    return str(lean)


@pytest.fixture
def deploy(tmp_path, monkeypatch):
    """deploy(model, *overrides): a deploy to ax650 in this process. The bundle is where(...)."""
    monkeypatch.chdir(ROOT)

    def run(source: Path, *overrides: str, target: str = "ax650"):
        return in_process("deploy", f"outputs={tmp_path / 'out'}", f"source={source}", f"target={target}", *LENGTHS, *overrides)

    return run


@pytest.fixture
def where(tmp_path):
    return lambda name="deploy-ax650": tmp_path / "out" / "default" / name


def refused(done: subprocess.CompletedProcess, error: type, *words: str, way: bool = True) -> None:
    """As conftest's, of what comes after the plan and the progress, which are long where a deploy fails late."""
    at = max(0, done.stderr.rfind(f"{error.title}:"))
    conftest.refused(subprocess.CompletedProcess(done.args, done.returncode, done.stdout, done.stderr[at:]), error, *words, way=way)


def compiles(asked: list[list[str]]) -> list[list[str]]:
    """The builds among what was asked, without the questions for help."""
    return [words for words in asked if any(w.startswith("llm_build") for w in words) and "-h" not in words]


# ---- complete bundles


@pytest.mark.parametrize("kind", ["qwen", "gptq"])
@pytest.mark.parametrize("target, chip", [("ax650", "AX650"), ("ax630c", "AX620E")])
@pytest.mark.parametrize("version", ["4.1", "7.0"])
def test_a_bundle_is_complete_and_verified(request, tools, deploy, where, call, tmp_path, kind, target, chip, version):
    asked = tools("pulsar2", version=version)
    source = request.getfixturevalue(kind)
    done = deploy(source, target=target)
    assert done.returncode == 0, done.stderr
    bundle = where(f"deploy-{target}" + ("-quantize" if kind == "gptq" else ""))
    names = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    layers = {f"qwen2_p64_l{i}_together.axmodel" for i in range(LAYERS)}
    ours = {"config.json", "post_config.json", "contract.json", "compile.json", "compile.log", "run.sh", "tokenizer_server.py", "README.md"}
    assert layers | ours | {"qwen2_post.axmodel", "qwen2_tokenizer.txt", runtime.EMBEDDING, "SHA256SUMS", "manifest.json"} <= names
    assert {"hf/config.json", "hf/tokenizer.json", "hf/tokenizer_config.json"} <= names and not any(".work" in name for name in names)

    config = json.loads((bundle / "config.json").read_text())
    assert config["template_filename_axmodel"] == "qwen2_p64_l%d_together.axmodel" and config["axmodel_num"] == LAYERS
    assert (config["tokens_embed_num"], config["tokens_embed_size"], config["tokenizer_type"]) == (512, 128, "Qwen2_5")
    assert (bundle / runtime.EMBEDDING).stat().st_size == 512 * 128 * 2
    assert all(
        (bundle / config[key]).is_file()
        for key in ("filename_post_axmodel", "filename_tokens_embed", "url_tokenizer_model", "post_config_path")
    )

    ((_, command, *words),) = compiles(asked())
    given = list(zip(words[::2], words[1::2]))
    assert command == ("llm_build" if version < "7" else "llm_build2") and ("--chip", chip) in given
    if command == "llm_build2":
        assert [v for o, v in given if o in ("--prefill_len", "--prefill_step_size", "--max_context")] == ["256", "64", "512"]
    else:
        assert [v for o, v in given if o in ("--prefill_len", "--kv_cache_len")] == ["64", "511"]
        assert [v for o, v in given if o == "--last_kv_cache_len"] == ["64", "128", "192", "256"]
    weight = [v for o, v in given if o == "--weight_type"]
    assert weight == {("qwen", "AX650"): ["s8"], ("qwen", "AX620E"): ["s8"], ("gptq", "AX650"): [], ("gptq", "AX620E"): ["s4"]}[kind, chip]

    board = Path(shutil.copytree(bundle, tmp_path / "board" / "anywhere"))
    verified = call("lineage", board, "--verify")
    assert verified.returncode == 0 and "verified" in verified.stdout, verified.stderr
    assert subprocess.run([SHA256SUM, "-c", "--quiet", "SHA256SUMS"], cwd=board).returncode == 0
    with open(board / runtime.EMBEDDING, "r+b") as file:
        file.write(b"\xff")
    assert call("lineage", board, "--verify").returncode == 9
    assert subprocess.run([SHA256SUM, "-c", "--quiet", "SHA256SUMS"], cwd=board, capture_output=True).returncode == 1


def test_in_a_container_the_same(tools, deploy, where, qwen, tmp_path):
    asked = tools("docker", images=["pulsar2:5.2", "pulsar2:6.0-lite"], version="6.0-lite")
    done = deploy(qwen)
    assert done.returncode == 0, done.stderr
    (words,) = [words for words in compiles(asked()) if words[0] == "docker"]
    assert words[:4] == ["docker", "run", "--rm", "--name"] and "pulsar2:6.0-lite" in words and "-it" not in words and "-u" not in words
    assert [words[i + 1] for i, w in enumerate(words) if w in ("-w", "-e")] == ["/data", "FLOAT_MATMUL_USE_CONV_EU=1"]
    mounts = [words[i + 1] for i, w in enumerate(words) if w == "-v"]
    assert mounts == [f"{where('deploy-ax650.partial')}/.work:/data", f"{qwen.resolve()}:/data/model:ro"]
    assert words[words.index("--input_path") + 1] == "model" and words[words.index("--output_path") + 1] == "build"
    record = json.loads((where() / "compile.json").read_text())
    assert (record["image"], record["image_id"], record["pulsar2"]) == ("pulsar2:6.0-lite", "sha256:0000feed", "6.0-lite")
    assert (where() / "qwen2_p64_l2_together.axmodel").is_file()


def test_a_hub_cache_of_links_reaches_the_container_as_files(tools, deploy, where, model, tmp_path):
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in model.iterdir():
        (linked / file.name).symlink_to(file)
    asked = tools("docker")
    done = deploy(linked)
    assert done.returncode == 0, done.stderr
    (words,) = [words for words in compiles(asked()) if words[0] == "docker"]
    mounts = [words[i + 1] for i, w in enumerate(words) if w == "-v"]
    assert f"{model / 'model.safetensors'}:/data/model/model.safetensors:ro" in mounts and all(m.endswith(":ro") for m in mounts[1:])


def test_what_a_container_leaves_as_roots_is_handed_back(tools, deploy, qwen, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    asked = tools("docker")
    assert deploy(qwen).returncode == 0
    owners = [words[words.index("chown") + 2] for words in asked() if "chown" in words]
    assert owners == [f"1234:{os.getgid()}"] * 2  # before, for what an earlier run left, and after


@helps("deploy/axera/toolchain.py", "docker load -i ax_pulsar2_VERSION.tar.gz (AXERA-TECH/Pulsar2 on the hub has it)")
@helps("deploy/axera/__init__.py", "target.image=IMAGE for an image of another name; then run the same command again: it goes on from here")
def test_a_local_install_comes_first_and_can_be_passed_over(tools, deploy, qwen):
    asked = tools("pulsar2", "docker")
    assert deploy(qwen, "dry_run=true").returncode == 0 and {words[0] for words in asked()} == {"pulsar2"}
    assert "docker run --rm" in deploy(qwen, "dry_run=true", "target.toolchain=docker").stderr
    refused(deploy(qwen, "dry_run=true", "target.toolchain=docker", "target.image=pulsar2:9"), MissingTool, "pulsar2:9", "docker load")
    assert deploy(qwen, "dry_run=true", "target.toolchain=docker", "target.image=pulsar2:7.0").returncode == 0  # one that was loaded


def test_a_relative_entry_of_path_is_looked_for_where_the_command_was_given(tools, deploy, qwen, tmp_path, monkeypatch):
    tools("pulsar2")
    monkeypatch.setenv("PATH", f"{os.path.relpath(tmp_path / 'bin', ROOT)}:{lean_path(tmp_path)}")
    done = deploy(qwen)
    assert done.returncode == 0, done.stderr


# ---- what goes wrong


@pytest.mark.parametrize(
    "fault, error, words",
    [
        ("oom", ToolFailed, ["137", "memory", "target.parallel=1 takes less memory"]),
        ("missing_layer", ToolFailed, [f"of {LAYERS} layers, missing: {LAYERS - 1}"]),
        ("wrong_chunk", ToolFailed, ["chunks of 128", "target.prefill_chunk=64"]),
        ("empty_layer", ToolFailed, ["qwen2_p64_l1_together.axmodel is empty"]),
        ("short_layer", ToolFailed, ["qwen2_p64_l1_together.axmodel", "cut off"]),
        ("hollow_layers", ToolFailed, ["qwen2_p64_l0_together.axmodel has 317 B; the weights it holds are 147 kB in s8"]),
        ("hollow_post", ToolFailed, ["qwen2_post.axmodel has 511 B; the weights it holds are 65.5 kB in s8"]),
        ("not_onnx", ToolFailed, ["not an ONNX file by Pulsar2"]),
        ("other_producer", ToolFailed, ["'pytorch'"]),
        ("two_posts", ToolFailed, ["one post model is needed, 2 are there"]),
        ("silent", ToolFailed, ["never said 'build llm model done!'"]),
        ("ocm", ToolFailed, ["on-chip memory", "need 9437184", "target.prefill_chunk"]),
        ("unknown_option", ToolFailed, ["an option that its help lists", "--no_such_option"]),
    ],
)
@helps("deploy/axera/compile.py", "compile once more: here by the same command")
def test_each_failure_has_its_message_and_no_finished_bundle(tools, deploy, where, qwen, fault, error, words):
    tools("pulsar2", fault=fault)
    refused(deploy(qwen), error, *words)
    assert not where().exists() and where("deploy-ax650.partial").is_dir()
    tools("pulsar2")
    assert deploy(qwen).returncode == 0 and where().is_dir() and not where("deploy-ax650.partial").exists()


@helps(
    "deploy/axera/compile.py", "target.parallel=1 takes less memory", "a smaller target.prefill_chunk, such as 32", "target.weight_type=s4"
)
@helps("deploy/axera/compile.py", "target.image=IMAGE of another version of Pulsar2")
@pytest.mark.parametrize("fault, change", [("oom", "parallel"), ("ocm", "chunk"), ("ocm", "s4"), ("unknown_option", "image")])
def test_each_way_out_of_a_failure(tools, deploy, where, qwen, fault, change):
    """Where it is for the tool itself, the stand-in without the fault shows that the same bundle goes on with what is changed."""
    tools("pulsar2", fault=fault)
    told = deploy(qwen)
    more = {"chunk": ["target.prefill_chunk=32"], "image": ["target.toolchain=docker", "target.image=pulsar2:7.0"]}.get(change, [])
    way = next(way for way in ways(told) if change in way)
    asked = tools("pulsar2", "docker")
    done = deploy(qwen, *typed(way), *more)
    assert done.returncode == 0 and where().is_dir(), f"{way}: {done.stderr}"
    assert asked()


@helps("deploy/axera/compile.py", "target.model_type=llama, if it is a Llama in all but name")
def test_an_unsupported_family(tools, deploy, where, model):
    change(model, model_type="qwen2")
    tools("pulsar2")
    refused(
        deploy(model, "target.model_type=ministral3"),
        WrongKind,
        "does not know the model's family",
        "model_type error ministral3",
        "target.model_type=llama",
    )
    assert not where().exists()
    assert deploy(model, "target.model_type=llama").returncode == 0


def test_a_crash_of_the_check_after_success_is_a_warning(tools, deploy, where, gptq):
    tools("pulsar2", fault="check_crash")
    done = deploy(gptq)
    assert done.returncode == 0 and "warning: Pulsar2 ended with exit code 1 after it had built everything" in done.stderr
    assert where("deploy-ax650-quantize").is_dir()


@helps("deploy/axera/toolchain.py", "install Pulsar2 3.0 or newer, or one of the -lite images")
def test_a_version_without_either_command(tools, deploy, qwen):
    tools("pulsar2", commands=[])
    refused(deploy(qwen), ToolFailed, "neither llm_build2 nor llm_build")
    tools("pulsar2", version="3.0")
    assert deploy(qwen, "dry_run=true", "target.prompt_len=64").returncode == 0


@pytest.mark.parametrize(
    "version, overrides, words",
    [
        ("3.2", ["target.weight_type=fp8_e4m3"], ["target.weight_type=fp8_e4m3 is none of what it knows", "one chunk only"]),
        ("3.0", ["target.prompt_len=64"], []),
        ("3.0", ["target.prompt_len=64", "target.chip=AX620E"], ["no --chip"]),
        ("4.1", ["target.model_type=llama"], ["no --model_type", "target.model_type=llama cannot be had"]),
        ("7.0", ["target.chip=AX999"], ["target.chip=AX999 is none of what it knows: AX620E, AX650, LAMBERT"]),
    ],
)
def test_what_the_installed_version_lacks_is_told_before_anything_is_made(tools, deploy, where, qwen, version, overrides, words):
    tools("pulsar2", version=version)
    done = deploy(qwen, "dry_run=true", *overrides)
    if words:
        refused(done, ConfigError, version, *words)
    else:
        assert done.returncode == 0, done.stderr
    assert not where().exists() and not where("deploy-ax650.partial").exists()


# ---- going on


@helps("deploy/axera/toolchain.py", "install Pulsar2 so that `pulsar2` is on PATH")
def test_without_a_toolchain_all_else_is_made_and_kept(tools, deploy, where, qwen):
    tools()
    refused(deploy(qwen), Unfinished, "Pulsar2 is not on this machine", "docker load", "goes on from here")
    partial = where("deploy-ax650.partial")
    assert {runtime.EMBEDDING, "qwen2_tokenizer.txt", "contract.json"} <= {p.name for p in partial.iterdir()} and not where().exists()
    table = (partial / runtime.EMBEDDING).stat()
    tools("pulsar2")
    assert deploy(qwen).returncode == 0
    after = (where() / runtime.EMBEDDING).stat()
    assert (after.st_ino, after.st_mtime_ns) == (table.st_ino, table.st_mtime_ns)


def test_a_compile_that_ended_well_is_not_repeated(tools, deploy, where, qwen, monkeypatch):
    asked = tools("pulsar2")
    for broken in ("write_sums", "write_run_script"):
        with monkeypatch.context() as patch:
            patch.setattr(runtime, broken, lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device", "x")))
            refused(deploy(qwen), NoRoom, "No space left")
    refused(deploy(qwen, "target.prompt_len=128"), Moved, "target.prompt_len 256 -> 128", "force=true clears it")
    done = deploy(qwen)
    assert done.returncode == 0 and "not repeated" in done.stderr and len(compiles(asked())) == 1


def test_what_is_only_prepared_gives_way_to_other_settings(tools, deploy, where, qwen):
    tools()
    refused(deploy(qwen), Unfinished)
    tools("pulsar2")
    done = deploy(qwen, "target.prompt_len=128")
    assert done.returncode == 0 and "clearing an unfinished deploy-ax650.partial" in done.stderr


def start(tmp_path, qwen) -> subprocess.Popen:
    argv = [sys.executable, "-m", "src.deploy", f"outputs={tmp_path / 'out'}", f"source={qwen}", "target=ax650", *LENGTHS]
    return subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)


def until_building(process: subprocess.Popen) -> None:
    for line in process.stderr:
        if "llm decode layers 1/" in line:
            return
    raise AssertionError("it ended before it built anything")


def test_killed_in_the_middle_it_goes_on(tools, deploy, where, qwen, tmp_path):
    tools("docker", fault="slow")
    process = start(tmp_path, qwen)
    until_building(process)
    process.kill()
    process.wait()
    (container,) = (tmp_path / "state").iterdir()
    tools("docker")
    assert deploy(qwen).returncode == 0 and where().is_dir()
    # The container that went on without its client was stopped first.
    assert (tmp_path / "state" / "killed").read_text() == container.name


@pytest.mark.parametrize("number", [pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGTERM)])
def test_an_interrupt_stops_the_container_too(tools, where, qwen, tmp_path, number):
    tools("docker", fault="slow")
    process = start(tmp_path, qwen)
    until_building(process)
    process.send_signal(number)
    assert "interrupted; the same command goes on" in process.stderr.read()
    assert process.wait(20) == 130
    assert (tmp_path / "state" / "killed").is_file() and not where().exists()


# ---- preflight


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_hidden_layers": 4}, ["config.json says 4 layers; the weights lack 3"]),
        ({"num_hidden_layers": 2}, ["config.json says 2 layers; the weights also have 2"]),
        ({"hidden_size": 256, "head_dim": 64}, ["hidden_size 256", "is 128 wide"]),
        ({"tie_word_embeddings": False}, ["there is no output layer"]),
        ({"num_hidden_layers": 9, "hidden_size": 64, "head_dim": 16}, ["9 layers", "hidden_size 64"]),
    ],
)
@helps("deploy/preflight.py", "take config.json, tokenizer and weights of one and the same model")
def test_config_against_headers(tools, deploy, model, changes, words):
    tools("pulsar2")
    whole = (model / "config.json").read_text()
    refused(deploy(change(model, **changes), "dry_run=true"), BadData, *words)
    (model / "config.json").write_text(whole)
    assert deploy(model, "dry_run=true").returncode == 0


def test_a_table_smaller_than_the_tokenizer(tools, deploy, model):
    weights = load_file(model / "model.safetensors")
    save(model / "model.safetensors", {**weights, "model.embed_tokens.weight": weights["model.embed_tokens.weight"][:300]})
    tools("pulsar2")
    refused(deploy(model, "dry_run=true"), BadData, f"the tokenizer has id {END}, the embedding table 300 rows")


def test_a_table_larger_than_config_says_counts(tools, deploy, where, model):
    tools("pulsar2")
    done = deploy(change(model, vocab_size=END + 1))
    assert done.returncode == 0 and f"512 rows in the weights, {END + 1} in config.json; the weights count" in done.stderr
    assert json.loads((where() / "config.json").read_text())["tokens_embed_num"] == 512


@pytest.mark.parametrize(
    "block, words",
    [
        ({"quant_method": "awq", "bits": 4}, ["it is awq", "give the model that it was quantized from"]),
        ({"quant_method": "gptq", "bits": 4, "sym": False}, ["not symmetric"]),
        ({"quant_method": "gptq", "bits": 3, "sym": True}, ["3 bits"]),
        ({"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": True}, ["desc_act"]),
        ({"quant_method": "gptq", "bits": 4, "sym": True, "dynamic": {"+:.*q_proj": {"bits": 8}}}, ["more than one width"]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["bitsandbytes"]),
    ],
)
def test_other_quantizations_are_refused_with_the_way_out(tools, deploy, model, block, words):
    tools("pulsar2")
    refused(deploy(change(model, quantization_config=block), "dry_run=true"), WrongKind, *words, "quantizer=gptq_int4")


@helps("deploy/axera/__init__.py", "target.tokenizer_type=auto")
def test_settings_that_do_not_go_with_the_model_are_told_at_once(tools, deploy, gptq, model):
    tools("pulsar2")
    done = deploy(gptq, "target.context_len=1024", "target.weight_type=s8", "target.tokenizer_type=Qwen9", "dry_run=true")
    refused(done, ConfigError, "limit of 512", "target.context_len=512", "GPTQ int4 already", "Qwen9", "Qwen2_5")
    assert deploy(gptq, *typed(ways(done)[0]), "dry_run=true").returncode == 0, "all of them at once"
    refused(deploy(change(model, model_type="smollm3", no_rope_layers=[1] * LAYERS), target="ax630c"), ConfigError, "AX650 only")


@pytest.mark.parametrize(
    "override, words",
    [
        ("target.prompt_len=100", ["not a multiple of prefill_chunk 64", "target.prompt_len=64"]),
        ("target.last_kv_cache_len=[64,100,256]", ["ascending multiples of prefill_chunk 64"]),
        ("target.last_kv_cache_len=[256,64]", ["ascending multiples"]),
        ("target.last_kv_cache_len=[64,512]", ["prompt_len is 256", "target.prompt_len=512"]),
        ("target.check_prompt=Hi", ["target.check_level=2"]),
        ("target.context_len=256", ["leaves no room"]),
        ("target.prefill_chunk=100", ["prefill_chunk=100"]),
        ("target.weight_type=int8", ["target.weight_type=int8", "'s8'"]),
        ("target.prefil_chunk=64", ["did you mean 'target.prefill_chunk'"]),
    ],
)
def test_rules_among_the_settings(deploy, qwen, override, words):
    refused(deploy(qwen, override), ConfigError, *words)


def test_an_adapter_and_a_pointer_are_refused(tools, deploy, model, finished):
    tools("pulsar2")
    refused(deploy(finished / "a" / "finetune"), WrongKind, "not adapter", "merge")
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(deploy(model), MissingInput, "Git LFS pointer", "git lfs pull")


def test_no_room_on_the_disk(tools, deploy, qwen, monkeypatch):
    tools("pulsar2")
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(deploy(qwen, "dry_run=true"), NoRoom, "1.0 kB are free", "outputs=")


# ---- embedding table


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_the_table_is_cut_off_not_rounded(tmp_path, dtype):
    values = np.random.default_rng(0).normal(0, 1, (300, 8)).astype("<f4" if dtype == "F32" else "<f2")
    values[0, :4] = [0.0, -0.0, np.inf, -np.inf]
    save(tmp_path / "model.safetensors", {"model.embed_tokens.weight": values}, "float32" if dtype == "F32" else "float16")
    entry = find_embedding(tmp_path)
    assert write_bf16(entry, tmp_path / "table.bin") == values.size * 2
    bits = values.astype("<f4").view("<u4")
    assert np.array_equal(np.fromfile(tmp_path / "table.bin", "<u2").reshape(values.shape), (bits >> 16).astype("<u2"))
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    assert not np.array_equal(rounded, (bits >> 16).astype("<u2"))


def test_a_bf16_table_is_copied_byte_for_byte_from_its_shard(tmp_path):
    import torch
    from safetensors.torch import save_file

    table = torch.randn(1000, 64).bfloat16()
    save_file({"a": torch.zeros(3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(5, dtype=torch.int8), "model.embed_tokens.weight": table}, tmp_path / "model-00002-of-00002.safetensors")
    write_bf16(find_embedding(tmp_path), tmp_path / "table.bin")
    assert (tmp_path / "table.bin").read_bytes() == table.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("key", KEYS)
def test_every_known_name_of_the_table(tmp_path, key):
    save(tmp_path / "model.safetensors", {key: np.zeros((4, 2)), "lm_head.weight": np.zeros((4, 2))})
    assert find_embedding(tmp_path).name == key


def test_a_table_under_another_name_is_told(tmp_path):
    save(tmp_path / "model.safetensors", {"my.embedding": np.zeros((4, 2))})
    with pytest.raises(WrongKind, match=r"similar: my\.embedding"):
        find_embedding(tmp_path)


def test_truncation_is_the_vendors():
    """fp32_to_bf16 of ax-llm takes uint32 >> 16; a table of cases, among them a NaN whose payload lies below."""
    given = np.array([0x3F800000, 0x3F80FFFF, 0xBF80FFFF, 0x7F800001, 0x00000001], "<u4")
    assert bf16_truncated(given.tobytes(), "F32").tolist() == [0x3F80, 0x3F80, 0xBF80, 0x7F80, 0x0000]


# ---- tokenizer.txt and the board's template


def test_the_tokenizer_file_line_by_line(qwen, tmp_path):
    from src.models.loading import load_tokenizer

    tokenizer_txt.write(load_tokenizer(qwen), [END - 2, END], [], tmp_path / "t.txt")
    spec = json.loads((qwen / "tokenizer.json").read_text())
    lines = (tmp_path / "t.txt").read_text().split("\n")
    assert lines[:3] == ["430 3", "3 2 0", f"{END - 2} {END - 1} {END} {END - 2} {END} "]
    assert lines[3] == f"{END + 1} {len(spec['model']['merges'])} 2"
    assert lines[4 + END - 1] == "<|im_start|>" and lines[4 + END + 1] == " ".join(spec["model"]["merges"][0])
    assert len(lines) == 4 + END + 1 + len(spec["model"]["merges"]) + 1 and lines[-1] == ""


def test_the_reader_reads_as_transformers_does(qwen, tmp_path):
    from src.models.loading import load_tokenizer

    tokenizer = load_tokenizer(qwen)
    tokenizer_txt.write(tokenizer, [END], [], tmp_path / "t.txt")
    reader = tokenizer_txt.Reader(tmp_path / "t.txt")
    draw, alphabet = np.random.default_rng(1), list("aàbcéZ  \n\t'1239_-.!?안녕你🙂\u00a0") + ["<|im_end|>", "'s", "  ", "\r\n"]
    for _ in range(300):
        text = "".join(draw.choice(alphabet, draw.integers(0, 25)))
        assert reader.encode(text) == tokenizer(text, add_special_tokens=False).input_ids, repr(text)


@each_kind(["made-qwen2.5"], ["qwen2.5"])
def test_older_axllm_cuts_words_otherwise(name, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(name) if name in KINDS else SHARED / "tokenizers" / name)
    tokenizer_txt.write(tokenizer, [tokenizer.eos_token_id], [], tmp_path / "t.txt")
    reader = tokenizer_txt.Reader(tmp_path / "t.txt")
    for text, same in (("Hello there", True), ("x_1 = 2", False), ("It  is", False), ("Où est le café?", False)):
        ids = tokenizer(text).input_ids
        assert reader.encode(text) == ids and (reader.encode(text, knows_family=False) == ids) is same


def test_a_damaged_tokenizer_file_is_noticed(tools, deploy, where, qwen, monkeypatch):
    def broken(tokenizer, stops, prefix, path):
        written(tokenizer, stops, prefix, path)
        text = path.read_text().split("\n")
        h, e = (text.index(piece, 4) for piece in "he")
        text[h], text[e] = text[e], text[h]
        path.write_text("\n".join(text))

    written = tokenizer_txt.write
    monkeypatch.setattr(tokenizer_txt, "write", broken)
    tools("pulsar2")
    refused(deploy(qwen, "target.runtime=axllm"), ProofFailed, "the board's tokenizer file has")
    assert not where().exists()


@helps("deploy/axera/__init__.py", "target.runtime=auto makes a bundle for the older main, with the model's own tokenizer and template")
@helps(
    "deploy/axera/chat.py",
    "train with ChatML: remove chat_template from the base's tokenizer_config.json (and chat_template.jinja), then fine-tune again",
)
def test_a_template_the_board_does_not_have_is_refused(tools, deploy, where, model):
    write_tokenizer(
        model, CHATML.replace("<|im_start|>{{", "<|im_start|>### {{").replace("<|im_start|>assistant", "<|im_start|>### assistant")
    )
    tools("pulsar2")
    done = deploy(model, "target.runtime=axllm")
    refused(done, WrongKind, "axllm's chat template (type Qwen2_5) is not the model's", "target.tokenizer_type=", "target.runtime=auto")
    assert not where().exists()
    assert deploy(model, "target.runtime=auto").returncode == 0
    write_tokenizer(model)  # ChatML
    assert deploy(model, "target.runtime=axllm", "dry_run=true", "force=true").returncode == 0


def test_the_default_system_text_of_a_template_becomes_the_boards(tools, deploy, where, model):
    write_tokenizer(model, "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}" + CHATML)
    tools("pulsar2")
    assert deploy(model).returncode == 0
    assert json.loads((where() / "config.json").read_text())["system_prompt"] == "You are kind."


def test_bos_before_chatml_is_what_axllm_begins_with(tools, deploy, where, model):
    """A Llama 3 that was tuned with our ChatML: axllm puts the prefix before the text, so the template's BOS is its, not the text's."""
    write_tokenizer(model, "{{ bos_token }}" + CHATML, bos=True)
    tools("pulsar2")
    done = deploy(model, "target.runtime=axllm")
    assert done.returncode == 0, done.stderr
    reader = tokenizer_txt.Reader(where() / "qwen2_tokenizer.txt")
    assert reader.prefix == [reader.pieces.index("<s>")]
    for talk in json.loads((where() / "contract.json").read_text())["conversations"]:
        assert talk["ids"][0] == reader.prefix[0]
        if not talk["tools"]:
            assert reader.begin(chat.board_text(talk["messages"], None)) == talk["ids"]


def test_a_bos_that_is_chatmls_own_opening_is_not_put_before_it_again(tools, deploy, where, model):
    """SmolLM2's bos_token is <|im_start|>."""
    write_tokenizer(model, bos_token="<|im_start|>")
    tools("pulsar2")
    done = deploy(model, "target.runtime=axllm")
    assert done.returncode == 0, done.stderr
    reader = tokenizer_txt.Reader(where() / "qwen2_tokenizer.txt")
    talk = json.loads((where() / "contract.json").read_text())["conversations"][0]
    assert reader.prefix == [] and reader.begin(chat.board_text(talk["messages"], None)) == talk["ids"]


def test_no_bos_is_put_before_a_template_that_has_none(tools, deploy, where, model):
    """The tokenizer adds one to plain text; before this template's text it would be a token that no training row has."""
    write_tokenizer(model, bos=True)
    tools("pulsar2")
    assert deploy(model).returncode == 0
    reader = tokenizer_txt.Reader(where() / "qwen2_tokenizer.txt")
    talk = json.loads((where() / "contract.json").read_text())["conversations"][0]
    assert reader.prefix == [] and reader.begin(chat.board_text(talk["messages"], None)) == talk["ids"]


@pytest.mark.parametrize(
    "kind, why", [("digits", "the board's tokenizer file has"), ("pieces", "without byte-level pieces"), ("template", "is not the model's")]
)
def test_what_axllm_cannot_read_gets_a_bundle_for_the_older_main(kind, why, tools, deploy, where, model, tiny_model, call):
    tools("pulsar2")
    if kind == "digits":
        write_tokenizer(change(model, model_type="llama"), digits=True)
    elif kind == "template":
        write_tokenizer(model, CHATML.replace("<|im_start|>", "<|im_start|>### "))
    source = tiny_model("llama") if kind == "pieces" else model
    refused(deploy(source, "target.runtime=axllm"), ProofFailed if kind == "digits" else WrongKind, why, "target.runtime=auto")
    done = deploy(source)
    assert done.returncode == 0 and "warning: not for axllm: " in done.stderr and why in done.stderr
    bundle = where()
    names = {p.name for p in bundle.iterdir()}
    assert (
        not {"config.json", "qwen2_tokenizer.txt", "llama_tokenizer.txt"} & names
        and {"run.sh", "tokenizer_server.py", "post_config.json"} <= names
    )
    assert "Not for axllm: " in (text := (bundle / "README.md").read_text()) and "./run.sh main" in text and "./run.sh serve" not in text
    ran = subprocess.run(["sh", bundle / "run.sh", "serve"], capture_output=True, text=True)
    assert ran.returncode == 7 and "not for axllm" in ran.stderr
    assert "for the older main alone" in call("summary", f"outputs={bundle.parent.parent}", "run=default").stdout


def test_a_server_that_renders_otherwise_is_noticed(tools, deploy, where, qwen, monkeypatch):
    def with_other_words(out):
        server = written(out)
        rendered = server.Tokens.render
        monkeypatch.setattr(server.Tokens, "render", lambda self, messages: rendered(self, messages) + " ")
        return server

    written = runtime.write_server
    monkeypatch.setattr(runtime, "write_server", with_other_words)
    tools("pulsar2")
    refused(deploy(qwen, "target.runtime=main"), ProofFailed, "its tokenizer server renders 'plain' otherwise")
    assert not where().exists()
    done = deploy(qwen)
    assert done.returncode == 0 and "warning: `./run.sh main` will not do: its tokenizer server renders 'plain' otherwise" in done.stderr
    assert "`./run.sh main` will not do" in (where() / "README.md").read_text()


@helps(
    "deploy/axera/__init__.py",
    "fine-tune a base without chat template, which gives it ChatML: remove chat_template from tokenizer_config.json (and chat_template.jinja)",
)
def test_a_template_that_the_server_cannot_read_is_said(tools, deploy, where, model):
    """transformers knows a tag that Jinja2 alone does not."""
    write_tokenizer(model, CHATML.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}"))
    tools("pulsar2")
    refused(deploy(model, "target.runtime=main"), ProofFailed, "cannot use the model's template", "unknown tag 'generation'")
    assert deploy(model).returncode == 0 and "cannot use the model's template" in (where() / "README.md").read_text()
    write_tokenizer(model)  # ChatML, as a base without a template gets it
    assert deploy(model, "target.runtime=main", "force=true").returncode == 0


def test_pieces_that_are_taken_whole_are_counted(tools, deploy, where, model):
    write_tokenizer(change(model, model_type="llama"), whole=True)
    tools("pulsar2")
    done = deploy(model)
    assert done.returncode == 0 and "whole (ignore_merges), axllm by its merge rules: 1 of " in done.stderr and "'xyzzy'" in done.stderr
    assert "'xyzzy'" in (where() / "README.md").read_text().partition("## Where it differs")[2]


@each_kind(["made-qwen3"], ["qwen3"])
def test_what_differs_on_the_board_is_said(name, tmp_path):
    from transformers import AutoTokenizer

    from src.deploy import contract

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(name) if name in KINDS else SHARED / "tokenizers" / name)
    tokenizer_txt.write(tokenizer, [tokenizer.eos_token_id], [], tmp_path / "t.txt")
    reader = tokenizer_txt.Reader(tmp_path / "t.txt")
    contract.prove(tokenizer, tmp_path, lambda texts: [reader.encode(text) for text in texts])
    lines = differences.of_the_reader(tokenizer, reader, list(contract.entries(tmp_path)))
    assert any("form NFC" in line for line in lines)
    nfd = "\u1112\u1161\u11ab"
    assert reader.encode(nfd) != tokenizer(nfd, add_special_tokens=False).input_ids, "what is said is so"
    (older,) = [line for line in lines if "before 2026" in line]
    assert all(text in older for text in ("code", "accents", "def f(x)"))
    assert "thoughts" in differences.of_history(tokenizer, "Qwen3")[0] and not differences.of_history(tokenizer, "Gemma4")


# ---- what is prepared, and compiled elsewhere


def test_a_partial_bundle_says_what_it_is_and_how_to_go_on(tools, deploy, where, qwen, call):
    tools()
    refused(deploy(qwen), Unfinished, "compile.sh", "beside it as `model`")
    partial = where("deploy-ax650.partial")
    names = {p.name for p in partial.iterdir()}
    assert {"README.md", "run.sh", "config.json", "post_config.json", "tokenizer_server.py", "contract.json"} <= names
    config = json.loads((partial / "config.json").read_text())
    assert config["template_filename_axmodel"] == "qwen2_p64_l%d_together.axmodel" and config["axmodel_num"] == LAYERS
    assert "**Not compiled yet**" in (partial / "README.md").read_text()
    ran = subprocess.run(["sh", partial / "run.sh", "serve"], capture_output=True, text=True)
    assert ran.returncode == 7 and "not compiled yet" in ran.stderr
    listed = call("summary", f"outputs={partial.parent.parent}", "run=default")
    assert listed.returncode == 0 and f"prepared: {partial}, not finished" in listed.stdout


@pytest.mark.parametrize("version", ["4.1", "7.0"])
@helps(
    "deploy/axera/__init__.py",
    "compile where Pulsar2 is: copy {} there, and {} beside it as `model`; ./{}; copy build/, compile.log and {} back to {}, and run the same "
    "command again",
)
def test_a_compile_on_another_machine_is_brought_back(version, tools, deploy, where, qwen, tmp_path):
    tools()
    refused(deploy(qwen), Unfinished)
    work, elsewhere = where("deploy-ax650.partial") / ".work", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(work / "compile.sh", elsewhere)
    asked = tools("pulsar2", version=version)
    env = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/bin:/bin"}
    assert subprocess.run(["sh", "compile.sh"], cwd=elsewhere, env=env, capture_output=True).returncode == 3, "without the model"
    shutil.copytree(qwen, elsewhere / "model")
    done = subprocess.run(["sh", "compile.sh"], cwd=elsewhere, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ((_, command, *words),) = compiles(asked())
    assert command == ("llm_build" if version < "7" else "llm_build2") and words[words.index("--chip") + 1] == "AX650"
    for name in ("build", "compile.log", "by_hand.txt"):
        shutil.move(elsewhere / name, work / name)
    tools()
    refused(deploy(qwen, "target.prompt_len=128"), Moved, "target.prompt_len 256 -> 128")
    done = deploy(qwen)
    assert done.returncode == 0 and "brought back from another machine" in done.stderr
    record = json.loads((where() / "compile.json").read_text())
    assert (record["pulsar2"], record["argv"]) == (version, ["compile.sh"]) and (where() / "qwen2_p64_l2_together.axmodel").is_file()
    assert f"compiled by Pulsar2 ({version})" in (where() / "README.md").read_text()


@helps("deploy/axera/__init__.py", "copy build/, compile.log and {} back together", "remove {} to have it compiled here")
@helps("deploy/axera/compile.py", "leave one in {}")
def test_what_is_brought_back_is_judged_too(tools, deploy, where, qwen):
    tools()
    refused(deploy(qwen), Unfinished)
    work = where("deploy-ax650.partial") / ".work"
    (work / "by_hand.txt").write_text("version: 7.0\n")
    told = deploy(qwen)
    refused(told, ToolFailed, "the compile by hand is not all here", "compile.log", "back together")
    (work / "compile.log").write_text("build llm model done!\n")
    (work / "build").mkdir()
    for index in range(LAYERS):
        (work / "build" / f"qwen2_p64_l{index}_together.axmodel").write_bytes(b"\x08\x0a\x12\x07Pulsar2" + bytes(300))
    (work / "build" / "qwen2_post.axmodel").write_bytes(b"\x08\x0a\x12\x07Pulsar2" + bytes(70_000))
    refused(deploy(qwen), ToolFailed, "qwen2_p64_l0_together.axmodel has 311 B; the weights it holds are 147 kB in s8")
    tools("pulsar2")
    refused(deploy(qwen), ToolFailed, "qwen2_p64_l0_together.axmodel has 311 B")  # what was brought back stays
    shutil.copy(work / "build" / "qwen2_p64_l0_together.axmodel", work / "build" / "qwen2_p128_l0_together.axmodel")
    refused(deploy(qwen), ToolFailed, "layers of more than one build lie together", "leave one in")
    (work / "build" / "qwen2_p128_l0_together.axmodel").unlink()
    refused(deploy(qwen), ToolFailed, "qwen2_p64_l0_together.axmodel has 311 B")
    Path(re.search(r"remove (\S+) to have it compiled here", told.stderr)[1]).unlink()
    assert deploy(qwen).returncode == 0


@pytest.mark.parametrize(
    "version, overrides, given",
    [
        ("4.1", ["target.last_kv_cache_len=[64,192,256]"], {"--last_kv_cache_len": ["64", "192", "256"], "--prefill_len": ["64"]}),
        ("7.0", ["target.decode_step_size=256"], {"--decode_step_size": ["256"]}),
        (
            "5.2",
            ["target.post_topk=8", "target.post_weight_type=bf16", "target.npu_mode=NPU3", "target.tensor_parallel_size=2"],
            {"--post_topk": ["8"], "--post_weight_type": ["bf16"], "--npu_mode": ["NPU3"], "--tensor_parallel_size": ["2"]},
        ),
        ("5.2", ["target.check_level=2", "target.check_prompt=Hi you"], {"--check_level": ["2"], "--prompt": ["Hi you"]}),
        ("5.2", [], {option: [] for option in ("--post_topk", "--npu_mode", "--check_level", "--prompt", "--post_weight_type")}),
    ],
)
def test_every_option_of_the_compiler_can_be_reached(version, overrides, given, tools, deploy, where, qwen):
    asked = tools("pulsar2", version=version)
    done = deploy(qwen, *overrides)
    assert done.returncode == 0, done.stderr
    ((_, _, *words),) = compiles(asked())
    pairs = list(zip(words[::2], words[1::2]))
    assert {option: [value for o, value in pairs if o == option] for option in given} == given
    if given.get("--post_topk"):
        assert "8 candidates instead of logits" in done.stderr and "--use_topk 1" in (where() / "run.sh").read_text()
        assert json.loads((where() / "config.json").read_text())["devices"] == [0, 1]


@helps("deploy/axera/toolchain.py", "leave these settings at their defaults", "target.image=IMAGE of a version that has them")
def test_groups_of_llm_build_are_built_by_it_where_both_commands_are(tools, deploy, qwen):
    asked = tools("pulsar2", version="7.0", commands=["llm_build2", "llm_build"])
    assert deploy(qwen, "target.last_kv_cache_len=[64,256]").returncode == 0
    assert [command for _, command, *_ in compiles(asked())] == ["llm_build"]
    tools("pulsar2", version="7.0")
    refused(
        deploy(qwen, "target.last_kv_cache_len=[64,256]", "force=true"), ConfigError, "target.last_kv_cache_len is an option of llm_build"
    )
    assert deploy(qwen, "force=true", "dry_run=true").returncode == 0, "at its default"
    tools("docker", version="4.1")
    assert deploy(qwen, "target.last_kv_cache_len=[64,256]", "target.image=pulsar2:7.0", "force=true", "dry_run=true").returncode == 0


def test_m5stacks_published_build_can_be_had(tools, deploy, tmp_path):
    """mode_qwen2.5-HA-0.5B-ctx-ax630c: chunks of 128, groups of 128, 512 and 1,024, a KV cache of 1,280 (Pulsar2 4.1)."""
    model = write_model(tmp_path / "m", "qwen2", num_hidden_layers=1, vocab_size=512, max_position_embeddings=2048, eos_token_id=END)
    write_tokenizer(model)
    asked = tools("pulsar2", version="4.1")
    lengths = ["target.prefill_chunk=128", "target.prompt_len=1024", "target.context_len=1281", "target.last_kv_cache_len=[128,512,1024]"]
    done = deploy(model, *lengths, target="ax630c")
    assert done.returncode == 0, done.stderr
    ((_, command, *words),) = compiles(asked())
    wanted = [
        "--prefill_len",
        "128",
        "--kv_cache_len",
        "1280",
        "--last_kv_cache_len",
        "128",
        "--last_kv_cache_len",
        "512",
        "--last_kv_cache_len",
        "1024",
    ]
    pairs = list(zip(words[::2], words[1::2]))
    assert command == "llm_build" and set(zip(wanted[::2], wanted[1::2])) <= set(pairs) and len([o for o, _ in pairs if "last" in o]) == 3


# ---- what runs on the board


@pytest.fixture
def bundle(tools, deploy, where, qwen) -> Path:
    tools("pulsar2")
    assert deploy(qwen).returncode == 0
    return where()


def test_the_run_script_starts_axllm_and_the_older_runtime(bundle, tmp_path, monkeypatch):
    monkeypatch.undo()
    board = tmp_path / "boardbin"
    board.mkdir()
    for name in ("axllm", "main_ax650"):
        (board / name).write_text(f'#!/bin/sh\nfor w in "$@"; do printf "%s\\n" "$w"; done > {tmp_path}/{name}.argv\n')
        (board / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{board}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PORT": "23871"}
    for words, argv in (
        (["run"], ["run", "."]),
        (["serve"], ["serve", ".", "--port", "8000"]),
        (["serve", "9000"], ["serve", ".", "--port", "9000"]),
    ):
        assert subprocess.run(["sh", bundle / "run.sh", *words], env=env).returncode == 0
        assert (tmp_path / "axllm.argv").read_text().split("\n")[:-1] == argv
    assert subprocess.run(["sh", bundle / "run.sh", "main", "Hi 'there' $x"], env=env, timeout=60).returncode == 0
    argv = (tmp_path / "main_ax650.argv").read_text().split("\n")[:-1]
    given = dict(zip(argv[::2], argv[1::2]))
    assert given["--template_filename_axmodel"] == "qwen2_p64_l%d_together.axmodel" and given["--prompt"] == "Hi 'there' $x"
    assert (given["--axmodel_num"], given["--tokens_embed_num"], given["--tokens_embed_size"]) == (str(LAYERS), "512", "128")
    assert given["--filename_tokenizer_model"] == "http://127.0.0.1:23871" and given["--tokenizer_type"] == "2"
    assert not {"--post_config_path", "--devices", "--use_topk"} & given.keys(), "its help lists none of them"
    wrong = subprocess.run(["sh", bundle / "run.sh"], env=env, capture_output=True, text=True)
    assert wrong.returncode == 2 and "./run.sh serve" in wrong.stderr


# What builds list at --help, and what each must be given: 2024's, 2025's of the chip, 2025's on PCIe (ax-llm src/main.cpp of those years).
OLD = "-p, --prompt prompt (string)\n--filename_tokenizer_model x\n--use_topk (bool)\n--live_print"
NEW = "--system_prompt x\n--url_tokenizer_model x\n--post_config_path x\n--live_print"
PCIE = "--system_prompt x\n--url_tokenizer_model x\n--devices x\n--live_print"


@pytest.mark.parametrize(
    "name, help, has, lacks",
    [
        (
            "main_prefill",
            OLD,
            ["--prompt", "--filename_tokenizer_model", "--use_topk"],
            ["--post_config_path", "--devices", "--system_prompt"],
        ),
        ("main_ax650", NEW, ["--post_config_path", "--url_tokenizer_model", "--system_prompt"], ["--prompt", "--devices", "--bos"]),
        ("main_axcl_aarch64", PCIE, ["--devices", "--url_tokenizer_model"], ["--post_config_path", "--prompt"]),
        ("main_axcl_x86", PCIE, ["--devices"], ["--post_config_path"]),
    ],
)
def test_each_build_of_main_gets_the_options_it_has(name, help, has, lacks, bundle, tmp_path, monkeypatch):
    monkeypatch.undo()
    board, port = tmp_path / "boardbin", 23880 + ["main_prefill", "main_ax650", "main_axcl_aarch64", "main_axcl_x86"].index(name)
    board.mkdir()
    (board / "help").write_text(help + "\n")
    (board / name).write_text(
        f'#!/bin/sh\nif [ "$1" = --help ]; then cat {board}/help; exit 1; fi\nfor w in "$@"; do printf "%s\\n" "$w"; done > {tmp_path}/argv\n'
        f'case "$*" in *--prompt*) ;; *) cat > {tmp_path}/asked ;; esac\n'
    )
    (board / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{board}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PORT": str(port)}
    assert subprocess.run(["sh", bundle / "run.sh", "main", "Hi 'there' $x"], env=env, timeout=60).returncode == 0
    argv = (tmp_path / "argv").read_text().split("\n")[:-1]
    assert set(has) <= set(argv) and not set(lacks) & set(argv), argv
    if "--prompt" not in argv:
        assert (tmp_path / "asked").read_text() == "Hi 'there' $x\nq\n"


@pytest.fixture
def server(bundle, monkeypatch):
    """ask(path, body=None) of a bundle's tokenizer server: (status, answer)."""
    monkeypatch.undo()
    process = subprocess.Popen([sys.executable, bundle / "tokenizer_server.py", "--port", "23872", "--system", "Be kind."])
    assert subprocess.run([sys.executable, bundle / "tokenizer_server.py", "--port", "23872", "--wait"], timeout=60).returncode == 0

    def ask(path: str, body: dict | None = None) -> tuple[int, dict]:
        request = urllib.request.Request(f"http://127.0.0.1:23872{path}", json.dumps(body).encode() if body is not None else None)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    yield ask
    process.kill()
    process.wait()


def test_the_tokenizer_server_keeps_a_conversation_as_the_main_of_2025_asks(server, qwen):
    """The client's own order (ax-llm, src/runner/Tokenizer/Tokenizer.cpp of 2025): get_uid, bos_id, eos_id, reset, then encode and decode."""
    from src.models.loading import load_tokenizer

    tokenizer = load_tokenizer(qwen)

    def ids(*turns: tuple[str, str], opened: bool = True) -> list[int]:
        messages = [{"role": role, "content": text} for role, text in turns]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=opened, tokenize=True, return_dict=True)["input_ids"])

    uid = server("/get_uid?tokenizer_type=2")[1]["uid"]
    assert server(f"/bos_id?uid={uid}") == (200, {"bos_id": -1}) and server(f"/eos_id?uid={uid}") == (200, {"eos_id": END})
    system = ("system", "Be terse.")
    assert server("/reset", {"uid": uid, "system_prompt": "Be terse."}) == (200, {"token_ids": ids(system, opened=False)})
    first = server("/encode", {"uid": uid, "text": "Hi", "img_prompt": False})[1]
    assert first["token_ids"] == ids(system, ("user", "Hi")) == ids(system, opened=False) + first["diff"]
    whole = [system, ("user", "Hi"), ("assistant", "Hello."), ("user", "And?")]
    second = server("/encode", {"uid": uid, "text": "And?", "last_reply": "Hello.", "img_prompt": False})[1]
    assert second["token_ids"] == ids(*whole) == ids(*whole[:3], opened=False) + second["diff"]
    assert second["text"] == tokenizer.decode(second["token_ids"])
    assert server("/decode", {"uid": uid, "token_ids": second["diff"]})[1]["text"] == tokenizer.decode(second["diff"])
    other = server("/get_uid")[1]["uid"]
    assert server("/encode", {"uid": other, "text": "Hi"})[1]["token_ids"] == ids(("system", "Be kind."), ("user", "Hi")), (
        "a talk of its own"
    )
    assert server(f"/reset?uid={uid}")[1]["success"] is True
    assert server("/encode", {"uid": uid, "text": "Hi"})[1]["token_ids"] == ids(("system", "Be kind."), ("user", "Hi"))
    for asked in (("/encode", {"uid": "gone", "text": "Hi"}), ("/reset", {"uid": "gone"}), ("/bos_id?uid=gone",), ("/reset?uid=gone",)):
        assert server(*asked) == (400, {"error": "Invalid uid"}), "which the client takes as a reason to ask for a new one"


def test_the_tokenizer_server_gives_the_contracts_ids(bundle, monkeypatch):
    monkeypatch.undo()
    server = subprocess.Popen([sys.executable, bundle / "tokenizer_server.py", "--port", "23872"])
    try:
        assert subprocess.run([sys.executable, bundle / "tokenizer_server.py", "--port", "23872", "--wait"], timeout=60).returncode == 0

        def ask(path: str, body: dict | None = None) -> dict:
            request = urllib.request.Request(f"http://127.0.0.1:23872{path}", json.dumps(body).encode() if body else None)
            return json.load(urllib.request.urlopen(request, timeout=5))

        assert ask("/eos_id") == {"eos_id": END} and ask("/bos_id") == {"bos_id": -1}
        asked = 0
        for talk in json.loads((bundle / "contract.json").read_text())["conversations"]:
            if len(talk["messages"]) == 1 and not talk["tools"]:
                assert ask("/encode", {"text": talk["messages"][0]["content"], "img_prompt": False})["token_ids"] == talk["ids"]
                assert ask("/decode", {"token_ids": talk["ids"]})["text"] == talk["text"]
                asked += 1
        assert asked >= 5
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask("/encode", {"no": "text"})
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize(
    "generation, enabled",
    [
        ({}, set()),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.8}, set()),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
            {"temperature", "top_p_sampling", "top_k_sampling", "repetition_penalty"},
        ),
    ],
)
def test_sampling_is_the_models_own(model, generation, enabled):
    (model / "generation_config.json").write_text(json.dumps(generation))
    config = runtime.post_config(model)
    assert {key.removeprefix("enable_") for key, value in config.items() if value is True} == enabled
    assert config.keys() == {
        *("enable_temperature", "temperature", "enable_repetition_penalty", "repetition_penalty", "penalty_window"),
        *("enable_top_p_sampling", "top_p", "enable_top_k_sampling", "top_k"),
    }
    said = differences.of_sampling(config, 0)
    assert [("only top_p acts" in line, "square root" in line) for line in said] == (
        [(True, False), (False, True)] if len(enabled) == 4 else []
    )


def test_sampling_that_axllm_does_otherwise_is_said(tools, deploy, where, model):
    asked = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "eos_token_id": END}
    (model / "generation_config.json").write_text(json.dumps(asked))
    tools("pulsar2")
    done = deploy(model)
    words = "top_p 0.8 and top_k 20 together; in axllm only top_p acts"
    assert done.returncode == 0 and words in done.stderr and words in (where() / "README.md").read_text()


# ---- small parts


def test_progress_lines(capsys):
    progress = compile.CompileProgress()
    for line in (
        "building llm decode layers   ━━━━━━━━ 3/28 0:01:02",
        "building llm decode layers   ━━━━━━━━ 3/28 0:01:03",
        "building llm post layer   ━━ 1/1 0:00:01",
    ):
        progress(line)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in said] == ["Pulsar2: llm decode layers 3/28", "Pulsar2: llm post layer 1/1"]


def test_the_help_is_read_whoever_prints_it():
    tool = toolchain.Toolchain(
        ("pulsar2",), "x", {"llm_build": "--chip [AX650|AX620E]  the chip\n  -w {s8, s4}, --weight_type {s8, s4}\n --last_kv_cache_len N"}
    )
    assert tool.choices("--chip") == ["AX650", "AX620E"] and tool.choices("--weight_type") == ["s8", "s4"]
    assert tool.offers("--last_kv_cache_len") and not tool.offers("--kv_cache_len") and tool.command == "llm_build"


def test_onnx_producer(tmp_path):
    for content, producer in (
        (b"\x08\x0a\x12\x07Pulsar2\x1a\x01x", "Pulsar2"),
        (b"\x08\x0a\x1a\x01x\x12\x03abc", "abc"),
        (b"", None),
        (b"\x12\x07Pulsar2", None),
        (b"\x08\x0a", None),
    ):
        (tmp_path / "f").write_bytes(content)
        assert compile.onnx_producer(tmp_path / "f") == producer
