"""What every test file shares: verbs as a user calls them, tiny models with random weights, and one finished run to read, damage or build on."""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import gc
import importlib
import io
import itertools
import json
import multiprocessing
import os
import pty
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import warnings
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
CHAT = ROOT / "assets" / "tiny-chat"
VERBS = (
    *("pipeline", "data", "distill", "pretrain", "cpt", "finetune", "merge", "quantize", "evaluate", "deploy"),
    *("chat", "serve", "answer", "push", "plan", "report", "runs", "summary", "lineage", "aux_files", "doctor", "completion"),
)
FEW = ["data.val=0.2", "data.calib=0.2"]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # where a test has several threads, one that waits leaves the core to others
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Where it is set, each process that a test starts compiles src anew, a fifth of its start, and pytest every test file.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.pop("PYTHONUNBUFFERED", None)  # most people's output waits in a buffer
sys.dont_write_bytecode = False

LONGEST = (
    "test_finetune.py",
    "test_fidelity.py",
    "test_nothing_lost.py",
    "test_steps.py",
    "test_merge.py",
    "test_resume.py",
    "test_distill.py",
    "test_axera.py",
    "test_recipes.py",
    "test_mobilint.py",
    "test_endpoint.py",
    "test_teacher.py",
    "test_stops.py",
)


def pytest_collection_modifyitems(items):
    """The longest files first, so that no process is left with one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


LEFT_OUT: dict[str, int] = {}
"""tests that this run's -m leaves out, by marker"""


def pytest_deselected(items):
    for item in items:
        for mark in ("gpu", "slow", "board"):
            if item.get_closest_marker(mark):
                LEFT_OUT[mark] = LEFT_OUT.get(mark, 0) + 1


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes, each of which has collected everything
        session.config.workeroutput["left_out"] = LEFT_OUT


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    LEFT_OUT.update(getattr(node, "workeroutput", {}).get("left_out", {}))


NO_SHARED = "../shared/data is not here"


def pytest_terminal_summary(terminalreporter):
    lacking = sum(NO_SHARED in str(report.longrepr) for report in terminalreporter.getreports("skipped"))
    if lacking:
        terminalreporter.write_line(f"not run: {lacking} tests need ../shared (real tokenizers, templates, configs)")
    if LEFT_OUT:
        counts = ", ".join(f"{count} {mark}" for mark, count in sorted(LEFT_OUT.items()))
        terminalreporter.write_line(f"not run: {counts} (python -m pytest -m slow runs the slow ones, and so on)")


@pytest.fixture(autouse=True, scope="module")
def nothing_old_is_collected():
    """The code under test collects garbage to give back memory, a third of a second each time where torch's modules are looked at, too."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def each_program_is_compiled_once(tmp_path_factory):
    """The C compiler on PATH is tests/compiler/cc, whose programs all processes of this run of pytest share."""
    if not (real := shutil.which("cc")):
        yield
        return
    here = tmp_path_factory.getbasetemp()
    kept = (here.parent if "PYTEST_XDIST_WORKER" in os.environ else here) / "made-by-cc"
    kept.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REAL_CC", real)
        patch.setenv("MADE_BY_CC", str(kept))
        patch.setenv("PATH", str(ROOT / "tests" / "compiler"), prepend=os.pathsep)
        yield


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch):
    """Whatever launched pytest, the code under test sees one process and no GPU count of its own making."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "BOARDWALK_WORKER", "BOARDWALK_STATUS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(NO_SHARED)
    return SHARED


def each_kind(made, published, **more):
    """For a test with a `name`: run it for each of `made`, and for all `published` together as one case, which needs ../shared. more: other
    parameters with their values; all combinations are taken."""
    others = list(itertools.product(*more.values()))

    def decorate(test):
        @functools.wraps(test)
        def run(name, **given):
            if name == "published" and not SHARED.is_dir():
                pytest.skip(NO_SHARED)
            cases = itertools.product(published, others) if name == "published" else [(name, [given.pop(key) for key in more])]
            for one, values in cases:
                test(**given | dict(zip(more, values)), name=one)

        cases = [(name, *values) for name in made for values in others] + [("published", *[None] * len(more))]
        ids = ["-".join(map(str, case)) if case[0] != "published" else "published" for case in cases]
        return pytest.mark.parametrize(["name", *more], cases, ids=ids)(run)

    return decorate


def _argv(argv, tmp_path: Path) -> list[str]:
    verb, *rest = map(str, argv)
    free = verb in ("lineage", "completion") or "--help" in rest or any(a.startswith("outputs=") for a in rest)
    return [verb, *rest, *([] if free else [f"outputs={tmp_path / 'outputs'}"])]


@pytest.fixture
def cli(tmp_path):
    """cli(verb, *argv, cwd=ROOT, env=None): `python -m src.<verb>` in a process of its own, with outputs=<tmp_path>/outputs unless given."""

    def run(*argv, cwd: Path = ROOT, env: dict | None = None, timeout: float = 300) -> CompletedProcess:
        verb, *rest = _argv(argv, tmp_path)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        return subprocess.run(
            [sys.executable, "-m", f"src.{verb}", *rest], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
        )

    return run


@pytest.fixture
def call(tmp_path, monkeypatch):
    """As cli, but in this process, so a third of a second faster; a bug in the code under test comes out as the exception it is."""
    monkeypatch.chdir(ROOT)
    return lambda *argv: in_process(*_argv(argv, tmp_path))


def in_process(verb: str, *argv: str) -> CompletedProcess:
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy remarks that the module was imported before
        sys.argv = [verb, *map(str, argv)]
        try:
            runpy.run_module(f"src.{verb}", run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as done:
            code = done.code or 0
        finally:
            sys.argv = before
    return CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def hear_ctrl_c() -> None:
    """For Popen's preexec_fn: a shell starts background jobs deaf to SIGINT, and what they start inherits it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def go(module, *argv) -> int:
    """The exit code of a verb's module, run in this process for good; what it says is pytest's to capture."""
    from src.core import stage

    return stage.guarded(lambda: stage._main(module.STAGE, [str(a) for a in argv]))


def in_terminal(argv: list, *, columns: int, to: int | None = None, **environment) -> tuple[str, str]:
    """What a command writes on a terminal so many columns wide, before and after it is made `to` wide once a bar of 30 is a third full."""
    terminal, end = pty.openpty()
    resize = lambda width: fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    resize(columns)
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    running = subprocess.Popen(
        [sys.executable, *map(str, argv)],
        cwd=ROOT,
        stdin=end,
        stdout=end,
        stderr=end,
        env={**kept, "TERM": "xterm-256color", **environment},
    )
    os.close(end)
    parts, resized = [b"", b""], False
    with contextlib.suppress(OSError):  # Linux: the other end is closed
        while some := os.read(terminal, 1 << 16):
            parts[resized] += some
            if to and not resized and re.search(r"1\d/30", parts[0].decode(errors="ignore")):
                resize(to)
                resized = True
    os.close(terminal)
    assert running.wait() == 0, b"".join(parts).decode()
    return parts[0].decode(), parts[1].decode()


@pytest.fixture(scope="module")
def proofs_in_this_process():
    """A fresh process per proof costs 3 s; test_merge, test_quantize and test_aux_files each have a test with the real thing."""
    from src.core import processes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "fresh", lambda work, *args, waits=True: work(*args))
        yield


def worked(verb: str, work, *argv) -> None:
    """Run a verb through its one door, with `work(cfg, inputs, out) -> metrics` in place of the costly part."""
    from src.core import stage

    module = importlib.import_module("src.deploy.__main__" if verb == "deploy" else f"src.{verb}")
    before, sys.argv = sys.argv, [verb, *map(str, argv)]
    try:
        with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as done:
            stage.main(dataclasses.replace(module.STAGE, run=work, around=None))
    finally:
        sys.argv = before
    assert done.value.code == 0, err.getvalue()


# ---- tiny models

LAYERS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """tiny_model(arch="llama"|"qwen2", **config): a complete model folder with random weights and assets/tiny-chat's tokenizer, about 1 MB.

    Keywords change config.json and the weights with it: hidden_size, num_hidden_layers, vocab_size, tie_word_embeddings, dtype (float32, float16), ...
    """
    return lambda arch="llama", **config: write_model(tmp_path_factory.mktemp(arch) / "model", arch, **config)


def write_model(folder: Path, arch: str = "llama", **changes) -> Path:
    config = {
        "architectures": [LAYERS[arch]],
        "model_type": arch,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 1023,
        "pad_token_id": 1021,
        "dtype": "float32",
        **changes,
    }
    width, middle, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.setdefault("head_dim", width // heads)
    kv = config["num_key_value_heads"] * head
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for name, rows in (("q", heads * head), ("k", kv), ("v", kv)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, width)
            if arch == "qwen2":
                shapes[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{at}self_attn.o_proj.weight"] = (width, heads * head)
        shapes |= {
            f"{at}mlp.gate_proj.weight": (middle, width),
            f"{at}mlp.up_proj.weight": (middle, width),
            f"{at}mlp.down_proj.weight": (width, middle),
        }
        shapes |= {f"{at}input_layernorm.weight": (width,), f"{at}post_attention_layernorm.weight": (width,)}
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    draw = np.random.default_rng(0)
    weights = {n: np.ones(s) if n.endswith("norm.weight") else draw.normal(0, 0.06, s) for n, s in shapes.items()}
    folder.mkdir(parents=True)
    save(folder / "model.safetensors", weights, config["dtype"])
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(CHAT / name, folder)
    return folder


def save(file: Path, weights: dict, dtype: str = "float32") -> None:
    """A safetensors file of numpy arrays, written without torch."""
    save_file({name: array.astype(dtype) for name, array in weights.items()}, file, {"format": "pt"})


START, END = 1022, 1023
"""ids of assets/tiny-chat's <|im_start|> and <|im_end|>"""


def make_base(folder: Path, *, tied=True, dtype="float32", blank=True, layers=4) -> Path:
    """tiny-chat, or its first layers, with its two ChatML rows as if never trained: zero, and where untied the mean in the embedding."""
    if not folder.is_dir():
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(CHAT, local_files_only=True, num_hidden_layers=layers)
        if not tied:
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        with torch.no_grad():
            if blank:
                embedding = model.get_input_embeddings().weight
                embedding[START:] = 0 if tied else embedding[:START].mean(0)
                model.get_output_embeddings().weight[START:] = 0
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(CHAT / name, folder)
    return folder


def rounded(folder: Path, levels: int) -> Path:
    """tiny-chat with its matrices rounded to so many levels on each side of zero, row by row: a fixed other model, worse the fewer they are."""
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save_tensors

    shutil.copytree(CHAT, folder)
    weights = load_file(CHAT / "model.safetensors")
    for name in (name for name in weights if "proj" in name):
        scale = weights[name].abs().amax(1, keepdim=True) / levels
        weights[name] = (weights[name] / scale).round() * scale
    save_tensors(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def eighty(tmp_path_factory) -> Path:
    """A dataset artifact of 80 embedded conversations, an eighth of them held out."""
    folder = tmp_path_factory.mktemp("eighty")
    rows = json.loads((ROOT / "assets" / "conversations.json").read_text())[:80]
    (folder / "chats.json").write_text(json.dumps(rows))
    splits = ["data.val=0.125", "data.calib=0.125"]
    done = in_process("data", f"outputs={folder}", "run=d", f"data.path={folder / 'chats.json'}", *splits)
    assert done.returncode == 0, done.stderr
    return folder / "d" / "data"


def ready_processes():
    """A multiprocessing context whose processes are their own, and begin with the libraries of training there, which takes seconds otherwise."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ready"])
    return context


def in_its_own_session(said: str, module: str, argv: list[str]) -> None:
    """What a process of `ready_processes` does as a verb: lead a process group, say all to the fifo `said`, and be torchrun for workers of its kind."""
    from torch.distributed.launcher import api

    os.setsid()
    os.dup2(os.open(said, os.O_WRONLY), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    launch = api.elastic_launch
    api.elastic_launch = lambda config, _: lambda _, name, *argv: launch(dataclasses.replace(config, start_method="fork"), verb)(name, argv)
    verb(module, argv)


def verb(module: str, argv: list[str]) -> None:
    """A verb to its end, whose proof is made by a process forked before anything was done."""
    from src.core import processes

    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        pool.submit(os.getpid).result()
        processes.fresh = lambda work, *args: pool.submit(work, *args).result()
        code = go(importlib.import_module(module), *argv)
    sys.exit(code)


@contextlib.contextmanager
def begun(argv: list, module: str = "src.finetune"):
    """(process, its stderr to read) of `python -m src.finetune`, or another module, but without the seconds of imports in it and in the workers it starts."""
    with tempfile.TemporaryDirectory() as place:
        os.mkfifo(fifo := f"{place}/said")
        child = ready_processes().Process(target=in_its_own_session, args=(fifo, module, [str(a) for a in argv]))
        child.start()
        with open(fifo) as heard:
            yield child, heard
        child.join()


def to_its_end(argv: list, module: str = "src.finetune") -> tuple[int, str]:
    """(exit code, what was said) of a process that `begun` starts."""
    with begun(argv, module) as (child, heard):
        said = heard.read()
    return child.exitcode, said


def process(*argv, **environment) -> subprocess.Popen:
    """`python -m src.finetune` with its stderr to read."""
    return subprocess.Popen(
        [sys.executable, "-m", "src.finetune", *map(str, argv)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


# ---- one finished run


def fake_adapter(cfg, inputs, out: Path) -> dict:
    width = json.loads((inputs["model"].path / "config.json").read_text())["hidden_size"]
    at = "base_model.model.model.layers.0.self_attn.q_proj"
    save(out / "adapter_model.safetensors", {f"{at}.lora_A.weight": np.ones((4, width)), f"{at}.lora_B.weight": np.ones((width, 4))})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "?",
    }
    (out / "adapter_config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHAT / name, out)
    return {"steps": 3, "train_loss_first": 2.0, "train_loss_last": 1.0, "turn_end": 1023}


def fake_merge(cfg, inputs, out: Path) -> dict:
    shutil.copytree(inputs["model"].path, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
    return {"logit_error": 1e-6}


def fake_quantized(cfg, inputs, out: Path) -> dict:
    fake_merge(cfg, inputs, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}))
    return {"logit_error": 0.05}


def fake_report(cfg, inputs, out: Path) -> dict:
    (out / "report.json").write_text("{}\n")
    return {"perplexity": 2.5}


def fake_bundle(cfg, inputs, out: Path) -> dict:
    (out / "model.bin").write_bytes(bytes(range(256)))
    return {"summary": "1,000 tokens/s here, 3/3 prompts as transformers"}


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """An outputs folder with one run, `a`, through every stage, and its outside inputs in `inputs/`. Read it only; `road` is a copy to damage."""
    outputs = tmp_path_factory.mktemp("finished") / "outputs"
    base = write_model(outputs / "inputs" / "base")
    chats = json.loads((ROOT / "assets" / "conversations.json").read_text())[:60]
    (outputs / "inputs" / "chats.json").write_text(json.dumps(chats))
    (outputs / "inputs" / "chats.txt").write_text("<|endoftext|>".join(turn["value"] for chat in chats for turn in chat["conversations"]))
    common = ["run=a", f"outputs={outputs}"]
    done = in_process("data", *common, *FEW, f"data.path={outputs / 'inputs' / 'chats.json'}")
    assert done.returncode == 0, done.stderr
    worked("finetune", fake_adapter, *common, f"model.path={base}", "launch.nproc_per_node=1")
    worked("merge", fake_merge, *common)
    worked("quantize", fake_quantized, *common)
    worked("evaluate", fake_report, *common)
    worked("deploy", fake_bundle, *common)
    return outputs


@pytest.fixture
def road(finished, tmp_path) -> Path:
    """A private copy of the finished run, where cli and call look for it."""
    return Path(shutil.copytree(finished, tmp_path / "outputs"))


def helps(file: str, *ways: str):
    """Marks a test that takes ways out as they are printed and shows that each helps. ways: as src/<file> writes them, {} for what is put in at run time.

    tests/test_ways_out.py holds these marks against src: no way out is without one, and none is of a way out that is gone.
    """
    return lambda test: test


def ways(done: CompletedProcess) -> list[str]:
    """The ways out that a refused command printed."""
    return re.findall(r"^  (?:fix:  |or:   ) (.*)$", done.stderr, re.MULTILINE)


def typed(way: str) -> list[str]:
    """The settings that a way out names with a value of its own."""
    return [
        setting
        for setting in re.findall(r"(?<![\w.])[a-z_]+(?:\.[a-z_]+)*=(?!=)[^\s,;:)]+", way)
        if not re.search("=[A-Z_]+(/|$)", setting)
    ]


def refused(done: CompletedProcess, error: type, *words: str, way: bool = True) -> None:
    """The command ended as a user's fault of this class: its exit code, one screen, no traceback, and every word that tells what, where and what to do.

    way: whether there is anything to do about it.
    """
    assert done.returncode == error.exit_code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 25
    assert error.title in done.stderr and ("fix:" in done.stderr or not way), done.stderr
    for word in words:
        assert str(word) in done.stderr, f"{word!r} not in:\n{done.stderr}"


@pytest.fixture(scope="module")
def one_thread():
    """Tiny matrices gain nothing from threads, and lose much where the machine is shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
