"""deploy target=mobilint_aries, with stand-ins for the vendor's compilers that refuse what the real ones would ignore."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import conftest
import numpy as np
import pytest
from conftest import CHAT, ROOT, helps, typed, ways, write_model
from makers import tokenizer_folder

from src.core import processes
from src.core.errors import BadData, ConfigError, MissingInput, MissingTool, NoRoom, ToolFailed, Unfinished, WrongKind
from src.deploy.embedding import find_embedding
from src.deploy.mobilint import calibration, job, runtime, transformers4
from src.deploy.vendor import COMPILED
from src.models.loading import load_tokenizer

STAND_INS = ROOT / "tests" / "stand_ins"
VERSIONS = {"0.11": "0.11.0.1", "0.12": "0.12.0.0", "1.0": "1.0.0", "1.1": "1.1.2", "1.2": "1.2.0", "1.3": "1.3.0"}
FILES = {
    "config.json", "hf/config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "generation_config.json", "contract.json", "proxy_llama.py", "calibration.json", "compile.json", "compile.log", "compile_job.py", "README.md",
}  # fmt: skip
SETTINGS = ["run=a", "target=mobilint_aries", "target.context_len=512", "target.samples=6", "target.device=cpu"]


@pytest.fixture(autouse=True)
def proof_in_this_process(monkeypatch):
    monkeypatch.setattr(processes, "fresh", lambda work, *args: work(*args))


def interpreter(folder: Path, version: str, fault: str = "") -> Path:
    """A Python that has a stand-in of this version: the package is chosen by it, and tells it by its metadata."""
    package = "qubee" if version.startswith("0.") else "qbcompiler"
    place = folder / f"{package}-{version}{fault and '-' + fault}"
    site = place / "site"
    (site / f"{package}-{version}.dist-info").mkdir(parents=True, exist_ok=True)
    (site / f"{package}-{version}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    shutil.copytree(STAND_INS / package, site / package, dirs_exist_ok=True)
    shutil.copy(STAND_INS / "mobilint_compiler.py", site)
    python = place / "python"
    python.write_text(f'#!/bin/sh\nexport PYTHONPATH="{site}" STAND_IN_FAULT={fault}\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


@pytest.fixture
def python(tmp_path):
    return lambda version, fault="": interpreter(tmp_path, version, fault)


@pytest.fixture
def no_compiler(tmp_path) -> str:
    """An interpreter without any compiler, whatever is on PATH."""
    return f"target.python={sys.executable}"


def refused(done: subprocess.CompletedProcess, error: type, *words: str, way: bool = True) -> None:
    """As conftest's, of what comes after the plan and the progress, which are long where a deploy fails late."""
    at = max(0, done.stderr.rfind(f"{error.title}:"))
    conftest.refused(subprocess.CompletedProcess(done.args, done.returncode, done.stdout, done.stderr[at:]), error, *words, way=way)


def bundle_of(road: Path) -> Path:
    return road / "a" / "deploy-mobilint_aries"


def work_of(road: Path) -> Path:
    return road / "a" / "deploy-mobilint_aries.partial" / ".work"


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def tensors(file: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(file)


# ---- whole deploys


@pytest.mark.parametrize(
    ("version", "weight_type", "chip"),
    [
        ("0.11.0.1", "w8", "aries"),
        pytest.param("0.12.0.0", "w8", "aries", marks=pytest.mark.slow),
        pytest.param("1.0.0", "w8", "aries", marks=pytest.mark.slow),
        ("1.0.0", "w4v8", "aries"),
        ("1.1.2", "w4", "aries"),
        pytest.param("1.2.0", "w8", "aries", marks=pytest.mark.slow),
        pytest.param("1.3.0", "w8", "aries", marks=pytest.mark.slow),
        ("1.3.0", "w4v8", "regulus"),
    ],
)
def test_each_generation_gives_a_whole_verified_bundle(version, weight_type, chip, road, python, call, tmp_path):
    import torch

    done = call("deploy", *SETTINGS, f"target=mobilint_{chip}", f"target.python={python(version)}", f"target.weight_type={weight_type}")
    assert done.returncode == 0, done.stderr
    bundle, mxq = road / "a" / f"deploy-mobilint_{chip}", f"llama-{weight_type}.mxq"
    assert files(bundle) == FILES | {mxq, "manifest.json"}
    config = json.loads((bundle / "config.json").read_text())
    wanted = {
        "model_type": "mobilint-llama", "architectures": ["MobilintLlamaForCausalLM"], "mxq_path": mxq, "core_mode": "single",
        "target_cores": ["0:0"], "tie_word_embeddings": True, "hidden_size": 128, "target_device": f"{chip}-rb",
    }  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted
    assert json.loads((bundle / "hf" / "config.json").read_text())["model_type"] == "llama"
    table = tensors(road / "a" / "merge" / "model.safetensors")[runtime.EMBEDDING]
    made = tensors(bundle / "model.safetensors")
    assert list(made) == [runtime.EMBEDDING]
    if weight_type != "w8" or version == "1.3.0":
        rotation = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(1)))[0]
        table = (table.double() @ rotation.double()).to(torch.bfloat16 if weight_type != "w8" else torch.float32)
    assert torch.equal(made[runtime.EMBEDDING], table)
    record = json.loads((bundle / "compile.json").read_text())
    assert record["version"] == version and record["argv"][1:] == ["compile_job.py"]
    assert record["mxq"]["sha256"] == hashlib.sha256((bundle / mxq).read_bytes()).hexdigest()
    assert f"{weight_type} by" in call("summary", "run=a").stdout
    elsewhere = shutil.copytree(bundle, tmp_path / "elsewhere" / "bundle")
    assert call("lineage", elsewhere, "--verify").returncode == 0
    (elsewhere / mxq).write_bytes(b"other")
    assert call("lineage", elsewhere, "--verify").returncode == 9


def test_a_second_run_skips(road, python, call):
    settings = [*SETTINGS, f"target.python={os.path.relpath(python('1.1.2'), ROOT)}"]  # from the user's folder, not from the job's
    assert call("deploy", *settings).returncode == 0
    again = call("deploy", *settings)
    assert again.returncode == 0 and "up to date" in again.stderr


# ---- the vendor's own runtime

LOAD = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers_mblt
from mblt_npu import MobilintNPUBackend
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

folder, trust = sys.argv[1], sys.argv[2] == "trust"
if not trust:  # what the README says; otherwise as vLLM loads it
    transformers_mblt.register()
given = {"trust_remote_code": True} if trust else {}
config = AutoConfig.from_pretrained(folder, **given)
said = {"class": type(config).__name__, "device": config.npu_backend.target_device, "backend": type(config.npu_backend).__name__,
        "mxq": config.mxq_path, "mode": config.core_mode}
try:
    AutoModelForCausalLM.from_pretrained(folder, **given)
    said["stopped"] = "nowhere"
except Exception as error:
    import traceback
    said["stopped"] = f"{type(error).__name__}: {error}"
    said["in"] = traceback.extract_tb(error.__traceback__)[-1].line
MobilintNPUBackend.create = MobilintNPUBackend.launch = lambda self: None
model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **given)
torch.save(model.get_input_embeddings().weight.detach().clone(), sys.argv[3])
said |= {"missing": sorted(loading["missing_keys"]), "unexpected": sorted(loading["unexpected_keys"])}
tokenizer = AutoTokenizer.from_pretrained(folder)
talks = json.load(open(folder + "/contract.json"))["conversations"]
said["ids"] = [list(tokenizer.apply_chat_template(talk["messages"], tools=talk["tools"], add_generation_prompt=True, tokenize=True, return_dict=True)
               ["input_ids"]) == talk["ids"] for talk in talks]
print("SAID " + json.dumps(said))
"""


@pytest.fixture(scope="session")
def transformers_mblt(tmp_path_factory) -> Path:
    """The Python of an environment with transformers-mblt and Mobilint's runtime from the registry. torch and transformers are this project's, lent by a .pth file."""
    import sysconfig

    place = tmp_path_factory.mktemp("mblt") / "env"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python = place / "bin" / "python"
    packages = ["transformers-mblt==0.6.1", "mblt-npu-python==0.1.0", "mobilint-qb-runtime==1.5.0"]
    got = subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *packages], capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"no transformers-mblt from the registry: {got.stderr.strip().splitlines()[-1][:200]}")
    (site,) = (place / "lib").glob("python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, chip",
    [("llama", "aries"), ("qwen2", "regulus"), ("qwen3", "aries"), ("exaone", "aries"), ("exaone4", "aries"), ("cohere2", "aries")],
)
@pytest.mark.parametrize("way", ["registered", "trust"])
def test_the_runtime_folder_loads_in_transformers_mblt_up_to_the_driver(way, arch, chip, transformers_mblt, road, python, call, tmp_path):
    import torch

    model = mobilint_model(tmp_path / "m", arch)
    compiler = python("1.3.0" if arch in ("llama", "qwen2") else "1.1.2")  # that of 1.3 loads the model, which transformers must know
    done = call("deploy", *SETTINGS, f"target=mobilint_{chip}", f"source={model}", f"target.python={compiler}")
    assert done.returncode == 0, done.stderr
    bundle = road / "a" / f"deploy-mobilint_{chip}"
    argv = [transformers_mblt, "-c", LOAD, bundle, way, tmp_path / "table.pt"]
    ran = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"})
    assert "SAID " in ran.stdout, ran.stderr[-3000:]
    said = json.loads(ran.stdout.partition("SAID ")[2])
    assert said["device"] == f"{chip}-rb" and said["backend"] == f"Mobilint{chip.title()}Backend" and said["mode"] == "single"
    assert said["mxq"] == f"{arch}-w8.mxq" and said["class"].startswith("Mobilint")
    assert "Accelerator(" in said["in"], said  # qbruntime looked for the device, and there is none
    assert said["missing"] == said["unexpected"] == [] and all(said["ids"]) and said["ids"]
    (made,) = tensors(bundle / "model.safetensors").values()
    assert torch.equal(torch.load(tmp_path / "table.pt"), made)


def mobilint_model(folder: Path, arch: str) -> Path:
    """A tiny model of one of the runtime's families; of EXAONE 3, whose code is no part of transformers, the tensors' names and the config."""
    if arch in ("llama", "qwen2"):
        return write_model(folder, arch)
    if arch == "exaone":
        import re

        from safetensors.numpy import load_file

        made = load_file(write_model(folder) / "model.safetensors")
        renamed = {
            re.sub(r"model\.(?:embed_tokens|layers)", lambda m: "transformer." + ("h" if "layers" in m[0] else "wte"), name): t
            for name, t in made.items()
        }
        conftest.save(folder / "model.safetensors", renamed)
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "exaone", "architectures": ["ExaoneForCausalLM"], "num_layers": config.pop("num_hidden_layers")}
        (folder / "config.json").write_text(json.dumps(config))
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 1024, "max_position_embeddings": 512, "eos_token_id": 1023, "pad_token_id": 1021, "bos_token_id": None}
    config = AutoConfig.for_model(arch, head_dim=32, tie_word_embeddings=True, **sizes, **tokens)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(CHAT / name, folder)
    return folder


# ---- the job


@pytest.fixture(scope="module")
def prepared(finished, tmp_path_factory) -> Path:
    """A WORK folder for 8 bits, with all that a job reads."""
    outputs = shutil.copytree(finished, tmp_path_factory.mktemp("prepared") / "outputs")
    from conftest import in_process

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(processes, "fresh", lambda work, *args: work(*args))
        done = in_process("deploy", *SETTINGS, f"target.python={sys.executable}", f"outputs={outputs}")
    assert done.returncode == Unfinished.exit_code, done.stderr
    return work_of(outputs)


def job_of(api: str, *, guarded: bool = True) -> str:
    from types import SimpleNamespace as S

    package = job.PACKAGES[api]
    return job.text(
        S(
            chip="aries",
            compiler=S(api=api, package=package),
            guarded=guarded,
            bits=8,
            value_bits=8,
            mxq="m.mxq",
            device="cpu",
            context=512,
            trust=False,
        )
    )


def run_job(text: str, prepared: Path, folder: Path, python: Path) -> subprocess.CompletedProcess:
    shutil.copytree(prepared, folder)
    (folder / job.JOB).write_text(text)
    return subprocess.run([python, job.JOB], cwd=folder, capture_output=True, text=True)


PAIRS = [(a, b) for a in VERSIONS for b in VERSIONS if job.PACKAGES[a] == job.PACKAGES[b]]
PAIRS.remove(("1.3", "1.3"))  # which loads the model, for seconds; whole deploys do it above


@pytest.mark.parametrize("api, installed", PAIRS)
def test_a_job_passes_under_its_own_generation_alone(api, installed, prepared, python, tmp_path):
    """Without its guard, so that the stand-ins show that they tell every wrong keyword."""
    done = run_job(job_of(api, guarded=False), prepared, tmp_path / "work", python(VERSIONS[installed]))
    assert (done.returncode == 0) == (api == installed), done.stderr
    assert (job.DONE in done.stdout) == (api == installed)


@helps("deploy/mobilint/compile.py", "run the same command again: it asks the compiler for its version anew")
@helps("deploy/mobilint/compile.py", "target.python=ENV/bin/python names the compiler that was meant")
@pytest.mark.parametrize(
    "api, installed",
    [
        ("1.1", "1.0"),
        pytest.param("1.1", "1.2", marks=pytest.mark.slow),
        pytest.param("1.2", "1.3", marks=pytest.mark.slow),
        ("1.3", "1.2"),
        pytest.param("0.12", "0.11", marks=pytest.mark.slow),
    ],
)
def test_a_job_refuses_another_version_of_its_package(api, installed, prepared, python, tmp_path):
    done = run_job(job_of(api), prepared, tmp_path / "work", python(VERSIONS[installed]))
    assert done.returncode == 1 and done.stderr.startswith(job.OTHER_API)
    assert (
        run_job(job_of(installed), prepared, tmp_path / "anew", python(VERSIONS[installed])).returncode == 0
    )  # asked for its version anew
    assert run_job(job_of(api), prepared, tmp_path / "meant", python(VERSIONS[api])).returncode == 0


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("calibration_config=Cal", "calib_config=Cal", "unexpected keyword argument"),
        ("    save_path=str(MXQ),\n", "", "missing 1 required keyword-only argument: 'save_path'"),
        ("head=BITS", "head=8.0", "is 8.0, not int"),
        ('DEVICE = "cpu"', 'DEVICE = "cuda"', "not gpu or cpu"),
        ("npu_core_ids=[0]", "npu_core_ids=[0, 1]", "npu_core_ids"),
    ],
)
def test_a_wrong_keyword_or_value_is_caught(right, wrong, says, prepared, python, tmp_path):
    text = job_of("1.1")
    assert text.count(right) == 1
    done = run_job(text.replace(right, wrong), prepared, tmp_path / "work", python("1.1.2"))
    assert done.returncode == 1 and says in done.stderr


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "inputs_embeds_0.npy").unlink(),
        lambda folder: np.save(folder / "inputs_embeds_0.npy", np.zeros((1, 64, 128), "float16")),
        lambda folder: np.save(folder / "inputs_embeds_0.npy", np.zeros((64, 128), "float32")),
        lambda folder: np.save(folder / "inputs_embeds_0.npy", np.zeros((1, 513, 128), "float32")),
        lambda folder: (folder / "en").mkdir(),
    ],
)
def test_wrong_calibration_files_are_caught_by_the_stand_in(damage, prepared, python, tmp_path):
    damage(shutil.copytree(prepared, tmp_path / "damaged") / "calibration")
    done = run_job(job_of("1.1"), tmp_path / "damaged", tmp_path / "work", python("1.1.2"))
    assert done.returncode == 1 and "Error" in done.stderr


def test_what_a_job_says_and_leaves(prepared, python, tmp_path):
    work = tmp_path / "work"
    done = run_job(job_of("1.1"), prepared, work, python("1.1.2"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("qbcompiler 1.1.2, API 1.1\ncompiling ") and done.stdout.endswith(f"{job.DONE}\n")
    record = json.loads((work / COMPILED).read_text())
    assert record["job"] == hashlib.sha256((work / job.JOB).read_bytes()).hexdigest() and record["version"] == "1.1.2"


# ---- without the compiler, and going on


@helps(
    "deploy/mobilint/toolchain.py",
    "install the wheel of qbcompiler for {} from https://dl.mobilint.com (free login) into a Python of 3.10 to 3.12, and name it: "
    "target.python=ENV/bin/python",
)
@helps("deploy/mobilint/compile.py", "then run the same command again: it goes on from here")
def test_without_the_compiler_everything_else_is_made_and_gone_on_with(road, python, no_compiler, call):
    done = call("deploy", *SETTINGS, no_compiler)
    refused(done, Unfinished, "neither qbcompiler nor qubee", "dl.mobilint.com", "target.python=", "docker commit", work_of(road))
    work = work_of(road)
    assert files(work) >= {"embedding.pt", "compile_job.py", "model/config.json", "model/model.safetensors"}
    before = {file: file.stat().st_mtime_ns for file in (*work.glob("calibration/*.npy"), work / "embedding.pt")}
    assert len(before) == 7 and not bundle_of(road).exists()
    done = call("deploy", *SETTINGS, f"target.python={python('1.1.2', 'oom')}")
    assert done.returncode == ToolFailed.exit_code
    assert {file: file.stat().st_mtime_ns for file in before} == before, "whole files are kept"
    assert "6 were there from an earlier run" in done.stderr
    assert call("deploy", *SETTINGS, f"target.python={python('1.1.2')}").returncode == 0
    assert files(bundle_of(road)) >= FILES


@helps("deploy/mobilint/compile.py", "run it where the compiler is: copy that folder there, `python {}` in it, copy the folder back here")
def test_a_job_run_by_hand_elsewhere_is_taken(road, python, no_compiler, call):
    given = [*SETTINGS, no_compiler, "target.sdk=1.1"]
    assert call("deploy", *given).returncode == Unfinished.exit_code
    subprocess.run([python("1.1.2"), "compile_job.py"], cwd=work_of(road), check=True, capture_output=True)
    done = call("deploy", *given)
    assert done.returncode == 0 and "is there from an earlier run, by qbcompiler 1.1.2" in done.stderr
    assert "compile.log" not in files(bundle_of(road))


@helps("deploy/mobilint/calibration.py", "run the same command again")
def test_a_damaged_calibration_file_is_made_again(road, python, no_compiler, call):
    call("deploy", *SETTINGS, no_compiler)
    folder = work_of(road) / "calibration"
    whole = (folder / "inputs_embeds_3.npy").read_bytes()
    (folder / "inputs_embeds_3.npy").write_bytes(whole[:1000])
    (folder / "inputs_embeds_9.npy.partial").write_bytes(b"x")
    done = call("deploy", *SETTINGS, f"target.python={python('1.1.2', 'oom')}")
    assert "5 were there from an earlier run" in done.stderr
    assert (folder / "inputs_embeds_3.npy").read_bytes() == whole and len(list(folder.iterdir())) == 6


def interrupt_when(text: str, file: Path) -> threading.Thread:
    """Terminates this process, as a scheduler would, once `text` is in `file`."""

    def wait() -> None:
        until = time.monotonic() + 60
        while not (file.is_file() and text in file.read_text()) and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("where", ["interpreter", "container"])
def test_killed_in_the_middle_and_run_again(where, road, python, docker, call, monkeypatch):
    slow, good = python("1.1.2", "slow"), python("1.1.2")
    env, log = docker({"slow": slow, "good": good})
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    chosen = (lambda path, name: f"target.python={path}") if where == "interpreter" else (lambda path, name: f"target.image={name}")
    thread = interrupt_when("calibrating", work_of(road) / "compile.log")
    done = call("deploy", *SETTINGS, chosen(slow, "slow"))
    thread.join()
    assert done.returncode == 130, done.stderr
    assert (work_of(road) / "llama-w8.mxq").read_bytes() == b"half a file" and not bundle_of(road).exists()
    if where == "container":
        assert ["kill", job.container(work_of(road).parent)] in [json.loads(line) for line in log.read_text().splitlines()]
    done = call("deploy", *SETTINGS, chosen(good, "good"))
    assert done.returncode == 0, done.stderr
    assert "6 were there from an earlier run" in done.stderr and (bundle_of(road) / "llama-w8.mxq").stat().st_size > 100_000


@pytest.mark.slow
def test_killed_outright_and_run_again_in_processes_of_their_own(road, python, cli):
    argv = [sys.executable, "-m", "src.deploy", *SETTINGS, f"outputs={road}", f"target.python={python('1.1.2', 'slow')}"]
    tool = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.DEVNULL)
    watched, until = work_of(road) / "compile.log", time.monotonic() + 120
    while not (watched.is_file() and "calibrating" in watched.read_text()) and time.monotonic() < until and tool.poll() is None:
        time.sleep(0.05)
    tool.kill()
    tool.wait()
    assert not bundle_of(road).exists()
    done = cli("deploy", *SETTINGS, f"target.python={python('1.1.2')}")
    assert done.returncode == 0 and "6 were there from an earlier run" in done.stderr, done.stderr
    assert cli("lineage", bundle_of(road), "--verify").returncode == 0


# ---- failures


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("oom", ToolFailed, ["exit code 137", "memory", "target.samples=3"]),
        ("zeropoint", ToolFailed, ["cannot be quantized", "target.texts=FOLDER", "zeropoint=-2147483648"]),
        ("package", ToolFailed, ["'a_package_the_compiler_needs' is missing", "pip install a_package_the_compiler_needs"]),
        ("keyword", ToolFailed, ["does not know what its API has", "target.sdk=1.0"]),
        ("cuda", ToolFailed, ["no CUDA", "target.device=cpu"]),
        ("gpu_oom", ToolFailed, ["GPU's memory", "target.device=cpu"]),
        ("transformers", ToolFailed, ["transformers==4.57.1"]),
        ("disk", NoRoom, ["disk is full", "outputs="]),
        ("crash", ToolFailed, ["exit code 1", "something new"]),
        ("no_file", ToolFailed, ["made no llama-w8.mxq"]),
        ("small", ToolFailed, ["llama-w8.mxq has 1.0 kB", "weights alone are"]),
    ],
)
def test_each_failure_has_its_message(fault, error, words, road, python, call):
    done = call("deploy", *SETTINGS, f"target.python={python('1.1.2', fault)}")
    refused(done, error, *words, work_of(road), way=fault not in ("crash", "no_file"))
    assert not bundle_of(road).exists() and (work_of(road) / "embedding.pt").is_file()


@helps("deploy/mobilint/compile.py", "target.samples={} target.max_tokens={} calibrates on less", "target.weight_type=w8", "target.sdk={}")
@helps(
    "deploy/mobilint/compile.py",
    "target.max_tokens={} calibrates on shorter sequences",
    "target.device=cpu",
    "pip install {} in that environment",
)
@helps(
    "deploy/mobilint/compile.py", "target.python=ENV/bin/python names another one", "pip install transformers==4.57.1 in that environment"
)
@helps("deploy/mobilint/compile.py", "free space and remove {}, then run the same command again: it compiles anew")
@helps("deploy/mobilint/plan.py", "target.languages=[en] target.texts=FOLDER calibrates on text of yours")
@pytest.mark.parametrize(
    ("fault", "settings"),
    [
        ("oom", []),
        ("zeropoint", ["target.weight_type=w4"]),
        ("keyword", []),
        ("gpu_oom", []),
        ("package", []),
        ("transformers", []),
        ("small", []),
    ],
)
def test_each_way_out_of_a_failure(fault, settings, road, python, call, tmp_path):
    """A stand-in without the fault is the compiler where it was mended, and another one. Only what a way out names changes, up to the compile."""
    told = call("deploy", *SETTINGS, *settings, f"target.python={python('1.1.2', fault)}")
    given = {"target.texts=FOLDER": [f"target.texts={texts(tmp_path / 'texts', en=SENTENCE * 200)}"]}
    assert ways(told)
    for way in ways(told):
        more = [text for words, added in given.items() if words in way for text in added]
        keys = {text.partition("=")[0] for text in typed(way)}
        stays = [text for text in settings if text.partition("=")[0] not in keys]
        done = call("deploy", *SETTINGS, *stays, *typed(way), *more, f"target.python={python('1.1.2')}", "dry_run=true")
        assert done.returncode == 0, f"{way}: {done.stderr}"
    for file in work_of(road).glob("*.mxq"):
        file.unlink()
    done = call("deploy", *SETTINGS, *settings, f"target.python={python('1.1.2')}")
    assert done.returncode == 0, done.stderr


def rotation(work: Path, matrix, name: str = "model") -> None:
    """A matrix as the compiler leaves it: the only parameter of a TorchScript module."""
    import torch

    module = torch.nn.Module()
    module.rotation = torch.nn.Parameter(matrix)
    (work / "spinWeight" / name / "R1").mkdir(parents=True)
    torch.jit.script(module).save(str(work / "spinWeight" / name / "R1" / "global_rotation.pth"))


def test_a_rotation_is_taken_only_if_it_is_one(tmp_path):
    import torch

    right = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    skewed = right.clone()
    skewed[0] *= 1.01
    for name, matrix in {"right": right, "half": right.bfloat16(), "skewed": skewed, "wide": torch.eye(17)}.items():
        rotation(tmp_path / name, matrix)
    assert torch.equal(runtime.find_rotation(tmp_path / "right", 16), right)
    runtime.find_rotation(tmp_path / "half", 16)
    for name, words in {"skewed": "not orthogonal: R R", "wide": "not a .16, 16. matrix but .17, 17.", "none": "0 are there"}.items():
        with pytest.raises(ToolFailed, match=words):
            runtime.find_rotation(tmp_path / name, 16)
    rotation(tmp_path / "right", right, "other")
    with pytest.raises(ToolFailed, match="2 are there"):
        runtime.find_rotation(tmp_path / "right", 16)


def test_a_table_is_rotated_some_rows_at_a_time_as_it_would_be_at_once(monkeypatch):
    import torch

    table, matrix = torch.randn(100, 16), torch.linalg.qr(torch.randn(16, 16))[0]
    monkeypatch.setattr(runtime, "ROWS", 7)
    assert torch.equal(runtime.rotate(table, matrix, 4), (table.double() @ matrix.double()).bfloat16())


@helps("deploy/mobilint/runtime.py", "remove {}, then run the same command again: it compiles anew")
@helps("deploy/mobilint/runtime.py", "target.weight_type=w8 with qbcompiler 1.2 or older, which rotates nothing")
def test_a_rotation_that_is_none_stops_the_deploy(road, python, call):
    rotation_of_another_compile = work_of(road) / "spinWeight" / "old" / "R1" / "global_rotation.pth"
    call("deploy", *SETTINGS, "target.weight_type=w4", f"target.python={python('1.1.2', 'oom')}")
    rotation_of_another_compile.parent.mkdir(parents=True)
    rotation_of_another_compile.write_bytes(b"stale")
    done = call("deploy", *SETTINGS, "target.weight_type=w4", f"target.python={python('1.1.2', 'no_rotation')}")
    refused(done, ToolFailed, "0 are there", "target.weight_type=w8")
    assert not bundle_of(road).exists()
    again = [*SETTINGS, "target.weight_type=w4", f"target.python={python('1.1.2')}"]
    refused(call("deploy", *again), ToolFailed, "0 are there")  # what was compiled is kept
    Path(re.search("remove (.*), then run", ways(done)[0])[1]).unlink()
    assert call("deploy", *again).returncode == 0
    assert (
        call("deploy", *SETTINGS, *typed(ways(done)[1]), f"target.python={python('1.2.0')}", "dry_run=true", "force=true").returncode == 0
    )


def test_a_gpu_that_is_not_there(road, python, call):
    done = call("deploy", *SETTINGS[:-1], "target.device=gpu", f"target.python={python('1.1.2')}")
    refused(done, ToolFailed, "no CUDA", "target.device=cpu")


def test_a_rotation_file_that_would_run_code_is_not_unpickled(tmp_path):
    import pickle
    import zipfile

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    for name, data in (("plain.pth", pickle.dumps(Evil())), ("cut.pth", b"PK\x03\x04")):
        (tmp_path / name).write_bytes(data)
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
        archive.writestr("archive/version", "3\n")
    for name in ("plain.pth", "cut.pth", "zip.pth"):
        with pytest.raises(ToolFailed, match=r"cannot be read|not the TorchScript module"):
            runtime.load_matrix(tmp_path / name)
    assert not (tmp_path / "ran").exists()


# ---- the plan


def test_a_plan_says_everything_and_makes_nothing(road, python, call):
    compiler = python("1.1.2")
    done = call("deploy", *SETTINGS, f"target.python={compiler}", "dry_run=true")
    assert done.returncode == 0
    for words in (
        f"compiler: qbcompiler 1.1.2 in {compiler}, API 1.1",
        f"{work_of(road)}/compile_job.py, w8, context 512, on cpu: {compiler} compile_job.py",
        "embedding.pt: fp32 1024 x 128, 524 kB",
        "calibration: 6 sequences of 64 to 256 tokens",
        "llama-w8.mxq: about",
        "disk",
    ):
        assert words in done.stderr, words
    assert not work_of(road).exists()


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        (["target.context_len=1024"], ConfigError, ["the model's own limit of 512", "target.context_len=512"]),
        (["target.min_tokens=300"], ConfigError, ["min_tokens 300 is above max_tokens 256"]),
        (["target.max_tokens=600"], ConfigError, ["max_tokens 600 is above context_len 512"]),
        (["target.languages=[en]"], ConfigError, ["languages and texts go together"]),
        (["target.languages=[en,en]", "target.texts=x"], ConfigError, ["named twice"]),
        (["target.languages=[../en]", "target.texts=x"], ConfigError, ["target.languages.0=../en"]),
        (["target.languages=[en,ko]", "target.texts=x", "target.samples=1"], ConfigError, ["not one sequence to each"]),
        (["target.python=/no/such/python"], MissingTool, ["/no/such/python"]),
        (["target.weight_type=w2"], ConfigError, ["target.weight_type=w2"]),
    ],
)
@helps("deploy/mobilint/toolchain.py", "target.python=ENV/bin/python names the one that has Mobilint's compiler")  # as in the tests above
def test_wrong_settings_are_refused(settings, error, words, road, call):
    refused(call("deploy", *SETTINGS, *settings), error, *words)


@pytest.mark.parametrize(
    ("version", "settings", "words"),
    [
        ("0.12.0.0", ["target.weight_type=w4"], ["target.weight_type=w4 takes API 1.0 or 1.1 or 1.2, not 0.12", "target.weight_type=w8"]),
        ("0.9.1", [], ["qubee 0.9.1 has no API known here", "target.sdk=0.12"]),
        (
            "1.4.0",
            [],
            ["qbcompiler 1.4.0 is newer than any whose keywords are known here (1.3)", "qbcompiler 1.3 or older", "target.sdk=1.3"],
        ),
        ("2.0.1", ["dry_run=true"], ["newer than any whose keywords are known"]),
        ("1.3.0", ["target.weight_type=w4"], ["not 1.3", "target.weight_type=w4v8"]),
        ("1.2.0", ["target=mobilint_regulus"], ["language models for REGULUS take API 1.3, not 1.2", "the wheel for REGULUS"]),
        ("1.1.2", ["target.sdk=0.12"], ["API 0.12 is that of qubee, but qbcompiler 1.1.2 is installed"]),
    ],
)
@helps(
    "deploy/mobilint/toolchain.py",
    "install {} {} or older",
    "install a newer compiler",
    "target.sdk={} takes it for that one, unchecked",
    "target.sdk=auto",
)
@helps("deploy/mobilint/toolchain.py", "target.python=ENV/bin/python names the other compiler")
@helps("deploy/mobilint/plan.py", "install qbcompiler {}, the wheel for {}", "target=mobilint_aries", "target.weight_type={}")
def test_a_compiler_that_cannot_do_it_is_refused(version, settings, words, road, python, call):
    told = call("deploy", *SETTINGS, f"target.python={python(version)}", *settings)
    refused(told, ConfigError, *words)
    for way in ways(told):
        installed = re.search(r"qbcompiler (\d\.\d)|qubee", way) or "newer compiler" in way or "other compiler" in way
        other = {"0.12.0.0": "1.1.2", "0.9.1": "0.12.0.0", "1.1.2": "0.12.0.0"}.get(version, "1.3.0")
        keys = {text.partition("=")[0] for text in typed(way)}
        stays = [text for text in settings if text.partition("=")[0] not in keys | {"dry_run"}] if "target=" not in way else []
        done = call("deploy", *SETTINGS, f"target.python={python(other if installed else version)}", *stays, *typed(way), "dry_run=true")
        assert done.returncode == 0, f"{way}: {done.stderr}"


def test_another_api_than_the_version_has_can_be_asked_for(road, python, call):
    done = call("deploy", *SETTINGS, f"target.python={python('1.1.2')}", "target.sdk=1.0")
    assert "warning: target.sdk=1.0 was asked for, though 1.1.2 has another API" in done.stderr
    refused(done, ToolFailed, "does not know what its API has")


def test_a_newer_version_can_be_taken_for_the_newest_known_and_that_is_said(road, python, call):
    done = call("deploy", *SETTINGS, f"target.python={python('1.4.0')}", "target.sdk=1.3", "dry_run=true")
    assert done.returncode == 0 and "warning: target.sdk=1.3 was asked for, though 1.4.0 has another API" in done.stderr


def test_a_context_beyond_the_vendors_own_scripts_is_said(road, call, tmp_path, no_compiler):
    model = write_model(tmp_path / "m", max_position_embeddings=4096)
    long = ["target=mobilint_regulus", "target.context_len=2048", f"source={model}", "dry_run=true"]
    assert "more than the 1024 of Mobilint's own scripts for REGULUS" in call("deploy", *SETTINGS, *long, no_compiler).stderr


@pytest.mark.parametrize("name", ["gemma2", "phi3"])
def test_families_that_the_runtime_lacks_are_refused(name, road, call):
    config = road / "a" / "merge" / "config.json"
    model = shutil.copytree(road / "inputs" / "base", road / name)
    (model / "config.json").write_text(json.dumps(json.loads(config.read_text()) | {"model_type": name}))
    refused(call("deploy", *SETTINGS, f"source={model}"), WrongKind, f"no language model of type '{name}'", "llama, qwen2, qwen3, exaone")


def test_a_quantized_model_is_refused_with_the_way_out(road, call):
    refused(call("deploy", *SETTINGS, f"source={road / 'a' / 'quantize'}"), WrongKind, "not quantized", "merge")


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_other_families_deploy_too(arch, road, python, call, tmp_path):
    model = write_model(tmp_path / "m", arch, tie_word_embeddings=False, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    if arch == "qwen2":
        shutil.copytree(tokenizer_folder("made-qwen2"), model, dirs_exist_ok=True)
    done = call("deploy", *SETTINGS, f"source={model}", f"target.python={python('1.1.2')}")
    assert done.returncode == 0, done.stderr
    config = json.loads((bundle_of(road) / "config.json").read_text())
    assert config["model_type"] == f"mobilint-{arch}" and config["tie_word_embeddings"] is False


# ---- docker


@pytest.fixture
def docker(tmp_path):
    """docker({image: interpreter}) -> (environment with the stand-in first on PATH, its log)."""

    def make(images: dict) -> tuple[dict, Path]:
        (tmp_path / "bin").mkdir(exist_ok=True)
        program = tmp_path / "bin" / "docker"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_INS}/mobilint_docker.py" "$@"\n')
        program.chmod(0o755)
        log = tmp_path / "docker.log"
        images = {name: str(python) for name, python in images.items()}
        return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "STAND_IN_IMAGES": json.dumps(images), "STAND_IN_LOG": str(log)}, log

    return make


@helps(
    "deploy/mobilint/toolchain.py",
    "start a container of mobilint/qbcompiler:1.0-cuda12.8.1-ubuntu22.04 (or 1.0-cpu-ubuntu22.04), pip install the wheel in it, keep it with "
    "`docker commit`, and name the image: target.image=NAME",
)
def test_in_a_container(road, python, docker, call, monkeypatch):
    env, log = docker({"mine:1.1": python("1.1.2")})
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    done = call("deploy", *SETTINGS, "target.image=mine:1.1")
    assert done.returncode == 0, done.stderr
    work, lines = work_of(road), [json.loads(line) for line in log.read_text().splitlines()]
    name = job.container(work.parent)
    assert [
        "run",
        "--rm",
        "--name",
        name,
        "--ipc=host",
        "-v",
        f"{work}:/job",
        "-w",
        "/job",
        "mine:1.1",
        "python",
        "compile_job.py",
    ] in lines
    assert json.loads((bundle_of(road) / "compile.json").read_text())["image"] == "sha256:" + "0" * 64
    monkeypatch.setenv("STAND_IN_GPU", "1")
    done = call("deploy", *SETTINGS[:-1], "target.device=gpu", "target.image=mine:1.1", "force=true", "dry_run=true")
    assert "--ipc=host --gpus=all -v" in done.stderr


def test_an_image_that_is_not_here(road, docker, call, monkeypatch):
    for key, value in docker({})[0].items():
        monkeypatch.setenv(key, value)
    refused(call("deploy", *SETTINGS, "target.image=gone"), Unfinished, "No such image: gone", "docker commit")


# ---- the table


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_embedding_pt_is_a_plain_fp32_tensor(dtype, tmp_path):
    import torch
    from safetensors.torch import save_file

    table = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    save_file({"model.embed_tokens.weight": table, "model.norm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    calibration.write_table(find_embedding(tmp_path), tmp_path / "embedding.pt")
    made = torch.load(tmp_path / "embedding.pt", weights_only=True)
    assert type(made) is torch.Tensor and made.dtype == torch.float32 and not made.requires_grad
    assert torch.equal(made, table.float()) and files(tmp_path) == {"model.safetensors", "embedding.pt"}


# ---- calibration


def test_calibration_files_are_rows_of_the_table_for_the_trained_ids(prepared, finished):
    from src.chat import encoding

    tokenizer = load_tokenizer(CHAT)
    talks = {}
    for line in (finished / "a" / "data" / "calib.jsonl").read_text().splitlines():
        record = json.loads(line)
        talks[record["id"]] = encoding.encode(tokenizer, record["messages"], record["tools"]).input_ids
    table = np.array(tensors(finished / "a" / "merge" / "model.safetensors")[runtime.EMBEDDING])
    found, _ = calibration.from_conversations(finished / "a" / "data" / "calib.jsonl", tokenizer, 64, 256, 6)
    for k, sequence in enumerate(found):
        ids = [i for part in sequence.parts for i in talks[part]][:256]
        array = np.load(prepared / "calibration" / f"inputs_embeds_{k}.npy")
        assert array.dtype == np.float32 and array.shape == (1, len(ids), 128) and 64 <= len(ids) <= 256
        assert (array[0] == table[ids]).all()
    assert len(found) == len(list((prepared / "calibration").iterdir())) == 6


def conversations(path: Path, *texts: str) -> Path:
    rows = [
        {"id": str(k), "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}], "tools": None}
        for k, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_short_conversations_are_joined_and_long_ones_cut():
    rows = [("a", [1] * 3), ("b", [2] * 3), ("c", [3] * 20), ("d", [4] * 6), ("e", [5] * 2)]
    made = list(calibration.join(rows, 5, 8))
    assert made == [([1] * 3 + [2] * 3, ["a", "b"], False), ([3] * 8, ["c"], True), ([4] * 6, ["d"], False)]


def test_a_small_split_is_drawn_again_in_other_orders_and_that_is_said(tmp_path, capsys):
    path = conversations(tmp_path / "c.jsonl", *(f"What is {n} plus {n}?" for n in range(12)))
    found, counts = calibration.from_conversations(path, load_tokenizer(CHAT), 64, 128, 20)
    assert len({tuple(s.ids) for s in found}) == 20 and counts["drawings"] > 1
    assert all(64 <= len(s.ids) <= 128 and len(s.parts) > 1 for s in found)
    err = capsys.readouterr().err
    assert "joined anew in" in err and "It makes 20 different sequences of at least 64 tokens, 20 were asked for" in err
    again, _ = calibration.from_conversations(path, load_tokenizer(CHAT), 64, 128, 20)
    assert again == found, "the same sequences on every machine and at every run"


def test_no_sequence_comes_twice_where_nothing_can_be_joined(tmp_path, capsys):
    path = conversations(tmp_path / "c.jsonl", *("How many? " * 30 + str(n) for n in range(3)))
    found, _ = calibration.from_conversations(path, load_tokenizer(CHAT), 16, 512, 10)
    assert len(found) == 3 and "It makes 3 different sequences of at least 16 tokens, 10 were asked for" in capsys.readouterr().err


@helps(
    "deploy/mobilint/calibration.py",
    "run the command that made the dataset again with data.calib=0.2 force=true, or with more records",
    "target.min_tokens={}",
)
def test_a_split_too_small_for_one_sequence_is_refused(tmp_path):
    path = conversations(tmp_path / "c.jsonl", "Hi")
    with pytest.raises(BadData, match="makes no sequence of 512") as caught:
        calibration.from_conversations(path, load_tokenizer(CHAT), 512, 2048, 10)
    assert any("data.calib" in way for way in caught.value.fix) and any("target.languages" in way for way in caught.value.fix)
    low = int(caught.value.fix[1].removeprefix("target.min_tokens="))
    assert calibration.from_conversations(path, load_tokenizer(CHAT), low, 2048, 10)[0]
    more = conversations(tmp_path / "more.jsonl", *(f"Hi, it is {n} o'clock. " * 40 for n in range(10)))
    assert calibration.from_conversations(more, load_tokenizer(CHAT), 512, 2048, 1)[0]


def test_an_empty_calib_split_is_refused_early(road, call, tmp_path):
    dataset = road / "empty"
    assert call("data", "run=empty", "data.calib=0", "data.val=0.1").returncode == 0
    refused(call("deploy", *SETTINGS, f"dataset={dataset / 'data'}"), MissingInput, "calib split is empty", "data.calib=0.1 force=true")
    assert call("data", "run=empty", "data.calib=0.1", "data.val=0.1", "force=true").returncode == 0
    assert call("deploy", *SETTINGS, f"dataset={dataset / 'data'}", "dry_run=true").returncode == 0


def texts(folder: Path, **content: str) -> Path:
    folder.mkdir()
    for language, text in content.items():
        (folder / f"{language}.txt").write_text(text, encoding="utf-8")
    return folder


def test_calibration_on_texts_of_several_languages(road, python, call, tmp_path):
    folder = texts(
        tmp_path / "texts", en="The cat sat on the mat, and it was warm.\n\n" * 60, ko="안녕하세요, 오늘은 날씨가 좋네요.\n" * 60
    )
    given = ["target.languages=[en,ko]", f"target.texts={folder}", "target.samples=5"]
    done = call("deploy", *SETTINGS, f"dataset={tmp_path / 'none'}", *given, f"target.python={python('1.1.2')}")
    assert done.returncode == 0, done.stderr
    record = json.loads((bundle_of(road) / "calibration.json").read_text())
    languages = ["en"] * 3 + ["ko"] * 2
    assert [(f["file"], f["language"]) for f in record["files"]] == [
        (f"{name}_inputs_embeds_{k}.npy", name) for k, name in enumerate(languages)
    ]
    assert record["counts"] == {"cut": 0, "en": 3, "ko": 2} and all(64 <= f["tokens"] <= 256 for f in record["files"])
    (folder / "ko.txt").write_text("안녕")
    changed = call("deploy", *SETTINGS, *given, f"target.python={python('1.1.2')}")
    assert changed.returncode == 5 and "parent texts" in changed.stderr, "other text, other bundle"


def test_texts_are_taken_as_the_tokenizer_takes_them(tmp_path):
    text = "".join(f"Line {n} of a long story.\n" for n in range(200)) + "x" * 10_000
    folder = texts(tmp_path / "texts", en=text)
    tokenizer = load_tokenizer(CHAT)
    found, counts = calibration.from_texts(folder, ("en",), tokenizer, 50, 60, 4)
    assert "".join(tokenizer.decode(s.ids) for s in found) == text[: sum(len(tokenizer.decode(s.ids)) for s in found)] or counts["cut"]
    assert all(50 <= len(s.ids) <= 60 for s in found)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ({"en": "Too short."}, BadData, ["makes 0 sequences of at least 64 tokens", "more text"]),
        ({"ko": "x"}, MissingInput, ["no text to calibrate on for 'en'"]),
        ({"en": ""}, BadData, ["text is empty"]),
    ],
)
@helps(
    "deploy/mobilint/plan.py",
    "put UTF-8 text there, or {}.jsonl with a text a record, or leave '{}' out of target.languages",
    "put UTF-8 text into it",
)
@helps("deploy/mobilint/calibration.py", "more text")
def test_texts_that_will_not_do_are_refused(content, error, words, road, no_compiler, call, tmp_path):
    folder = texts(tmp_path / "texts", **content)
    given = ["target.languages=[en]", f"target.texts={folder}", no_compiler]
    told = call("deploy", *SETTINGS, *given)
    refused(told, error, *words)
    (folder / "en.txt").write_text(SENTENCE * 200)
    refused(call("deploy", *SETTINGS, *given), Unfinished, "neither qbcompiler nor qubee")


SENTENCE = "The cat sat on the mat, and it was warm there.\n"


def test_short_texts_are_left_out_and_none_is_joined(tmp_path, capsys):
    """Each text is marked by a letter of its own; a sequence has one letter alone, and those of the short texts nowhere."""
    stories = {letter: SENTENCE.replace("cat", letter * 3) * (30 if letter in "XYZ" else 1) for letter in "XaYbZ"}
    apart = texts(tmp_path / "txt", en="\n\n\n".join(stories.values()))
    records = texts(tmp_path / "jsonl")
    (records / "en.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in stories.values()))
    tokenizer = load_tokenizer(CHAT)
    for folder in (apart, records):
        found, counts = calibration.from_texts(folder, ("en",), tokenizer, 64, 128, 12)
        marks = [{letter for letter in stories if letter * 3 in tokenizer.decode(sequence.ids)} for sequence in found]
        assert all(len(mark) == 1 for mark in marks) and set().union(*marks) == set("XYZ")
        assert all(64 <= len(sequence.ids) <= 128 for sequence in found)
        assert counts == {"cut": 0, "en": 12, "en, too short": 2}
        assert "left out 2 texts of 'en' that are shorter than 64 tokens" in capsys.readouterr().err


def test_a_language_with_little_text_gives_its_even_share_in_shorter_sequences(tmp_path):
    folder = texts(tmp_path / "texts", en=SENTENCE * 400, de=SENTENCE * 40)
    found, counts = calibration.from_texts(folder, ("en", "de"), load_tokenizer(CHAT), 64, 512, 10)
    lengths = {name: [len(s.ids) for s in found if s.language == name] for name in ("en", "de")}
    assert counts["en"] == counts["de"] == 5 and min(lengths["en"]) > 400 and all(64 <= n <= 512 for n in lengths["de"])


@helps("deploy/mobilint/calibration.py", 'one record a line: {"text": "..."}')
@helps("deploy/mobilint/plan.py", "remove one of the two")
def test_a_records_file_that_is_none_is_refused(tmp_path):
    folder = texts(tmp_path / "texts")
    (folder / "en.jsonl").write_text('{"text": "a"}\n{"words": 1}\n')
    with pytest.raises(BadData, match="not a JSON object with a 'text'"):
        calibration.from_texts(folder, ("en",), load_tokenizer(CHAT), 16, 64, 2)
    (folder / "en.txt").write_text("x")
    with pytest.raises(BadData, match=r"two texts for 'en', en\.jsonl and en\.txt"):
        calibration.from_texts(folder, ("en",), load_tokenizer(CHAT), 16, 64, 2)
    (folder / "en.txt").unlink()
    (folder / "en.jsonl").write_text(json.dumps({"text": SENTENCE * 20}) + "\n")
    assert len(calibration.from_texts(folder, ("en",), load_tokenizer(CHAT), 16, 64, 2)[0]) == 2


@helps("deploy/mobilint/calibration.py", "save it as UTF-8")
def test_text_that_is_not_utf8(tmp_path):
    folder = texts(tmp_path / "texts")
    (folder / "en.txt").write_bytes(b"caf\xe9 " * 500)
    with pytest.raises(BadData, match="not UTF-8"):
        calibration.from_texts(folder, ("en",), load_tokenizer(CHAT), 16, 64, 2)
    (folder / "en.txt").write_text((folder / "en.txt").read_text("latin-1"), "utf-8")
    assert len(calibration.from_texts(folder, ("en",), load_tokenizer(CHAT), 16, 64, 2)[0]) == 2


@helps("deploy/mobilint/calibration.py", "target.samples={}", "target.min_tokens={}")
def test_fewer_or_shorter_sequences_of_a_text_that_is_too_short(tmp_path):
    tokenizer, folder = load_tokenizer(CHAT), texts(tmp_path / "texts", en=SENTENCE * 6)
    with pytest.raises(BadData, match="are wanted of 'en'") as told:
        calibration.from_texts(folder, ("en",), tokenizer, 64, 128, 4)
    samples, low = (int(way.partition("=")[2]) for way in told.value.fix[1:])
    assert len(calibration.from_texts(folder, ("en",), tokenizer, 64, 128, samples)[0]) == samples
    assert len(calibration.from_texts(folder, ("en",), tokenizer, low, 128, 4)[0]) == 4


# ---- for transformers 4


def test_what_transformers_5_writes_is_written_for_4_too():
    rope = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    made = transformers4.model_config({"rope_parameters": rope, "dtype": "bfloat16"})
    assert (
        made["rope_theta"] == 5e5 and made["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0} and made["torch_dtype"] == "bfloat16"
    )
    plain = {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    assert transformers4.model_config(plain) == plain
    made = transformers4.tokenizer_config({"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]})
    assert made == {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"]}


def test_a_hub_cache_of_links_reaches_the_job_as_files(tmp_path):
    blobs = tmp_path / "blobs"
    write_model(blobs)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    (tmp_path / "work").mkdir()
    transformers4.lend_model(snapshot, tmp_path / "work")
    lent = tmp_path / "work" / "model"
    assert files(lent) == files(blobs) and not any(file.is_symlink() for file in lent.iterdir())
    assert (lent / "model.safetensors").stat().st_ino == (blobs / "model.safetensors").stat().st_ino, "linked, not copied"
    assert (lent / "config.json").stat().st_ino != (blobs / "config.json").stat().st_ino
