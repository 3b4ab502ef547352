"""deploy target=llama2c: the written files, the C program and its tokenizer against transformers, and hostile input."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import helps, write_model
from tokenizers.processors import TemplateProcessing

from src.core.artifact import Artifact
from src.core.compose import compose
from src.core.errors import BadData, MissingInput, MissingTool, ProofFailed, WrongKind
from src.deploy import llama2c
from src.deploy.byte_level import SPLITS
from src.deploy.llama2c import proof, runtime
from src.deploy.llama2c.chat import find_chat
from src.deploy.llama2c.runtime import write_runtime
from src.deploy.llama2c.tokenizer import canonical, read_tokenizer, write_tokenizer
from src.models import llama2c_file
from src.models.llama2c_file import Form, Shape, form_of, read_shape
from src.settings.verbs import DeployVerb
from src.sizing import takes

ROOT = Path(__file__).parents[1]
MODELS = ROOT / ".." / "shared" / "data" / "models"
pytestmark = [
    pytest.mark.skipif(not (shutil.which("cc") and shutil.which("make")), reason="no C compiler and make"),
    pytest.mark.usefixtures("one_thread"),
]
needs_stories = pytest.mark.skipif(not MODELS.is_dir(), reason="../shared/data is not here")

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set head = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set talk = messages[1:] %}"
    "{% else %}{% set head = '' %}{% set talk = messages %}{% endif %}"
    "{% for m in talk %}{% if m['role'] == 'user' %}<s>[INST] {{ (head if loop.first else '') + m['content'].strip() }} [/INST]"
    "{% else %} {{ m['content'].strip() }} </s>{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML.split("{% endif %}", 1)[1]
OUT = ROOT / "outputs"
CORPUS = [
    "Once upon a time there was a little girl.",
    "It's 12345 o'clock; they're here!",
    "안녕하세요 만나서 반갑습니다 오늘",
    "a  b   c\n\n\n  d",
] * 5


def given(model: Path) -> dict:
    made = Artifact(model, "model", "", None, {})
    return {"model": made, "stored": made}


def settings(format: str, group_size: int = 64) -> SimpleNamespace:
    return SimpleNamespace(format=format, group_size=group_size)


@pytest.fixture(autouse=True, scope="module")
def environment():
    """The program leaves its memory to the end of the process; compiling it with -O3 takes four times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASAN_OPTIONS", "detect_leaks=0")
        patch.setenv("CFLAGS", "-O1")
        yield


def wrap(tokenizer, template: str | None, **special: str):
    from transformers import PreTrainedTokenizerFast

    hf = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    hf.chat_template = template
    return hf


def sentencepiece_like(template: str | None, prepend: str = "normalizer"):
    """A BPE with byte fallback and ▁, as converted from sentencepiece, trained on CORPUS; ChatML tokens added."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *sorted(learned["vocab"], key=learned["vocab"].get)]
    model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)},
        [tuple(m) for m in learned["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    if prepend == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme, split = prepend.split("-")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split == "split")
    strip = [] if prepend.startswith("never") else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrap(tokenizer, template, unk_token="<unk>", bos_token="<s>", eos_token="<|im_end|>")


def byte_level(split: str, nfc: bool = False):
    """A byte-level BPE trained on CORPUS that cuts words by one of run.c's rules."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from tokenizers import decoders as d

    regex = {name: pattern for pattern, name in SPLITS.items()}
    steps = {
        "gpt2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "digits_gpt2": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    }
    for name in ("llama3", "qwen2"):
        steps[name] = [
            pre_tokenizers.Split(Regex(regex[name]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    tokenizer = Tokenizer(models.BPE(ignore_merges=split == "llama3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps[split])
    tokenizer.decoder = d.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>")])
    return wrap(tokenizer, CHATML, eos_token="<|im_end|>")


def save_llama(folder: Path, hf, family: str = "Llama", **changes) -> Path:
    """A random model for this tokenizer: untied, 4 heads on 2 KV heads, and unwilling to say bytes and special tokens."""
    import torch
    import transformers

    torch.manual_seed(1)
    config = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"},
        "vocab_size": len(hf) + 5, "tie_word_embeddings": False, "initializer_range": 0.2,
        "bos_token_id": hf.bos_token_id, "eos_token_id": hf.eos_token_id,
    } | changes  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                weight.normal_(0, 0.5)
        if not config["tie_word_embeddings"]:
            model.lm_head.weight[len(hf) :] = 0
            model.lm_head.weight[[i for p, i in hf.get_vocab().items() if p.startswith("<") and len(p) > 4]] = 0
    model.save_pretrained(folder)
    hf.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), sentencepiece_like(CHATML))


def build(model: Path, out: Path, format: str, group_size: int = 64) -> dict:
    out.mkdir(exist_ok=True)
    llama2c.check(given(model), settings(format, group_size), OUT)
    return llama2c.build(given(model), out, settings(format, group_size))


@pytest.fixture(scope="module")
def bundle(llama, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bundle")
    build(llama, out, "fp32_v1")
    subprocess.run(["make", "-C", str(out), "debug"], check=True, capture_output=True)
    return out


def run(out: Path, *options: str, stdin: str = "", program: str = "run", code: int = 0) -> str:
    done = subprocess.run([str(out / program), str(out / "model.bin"), *options], input=stdin.encode(), capture_output=True)
    assert done.returncode == code, done.stderr.decode(errors="replace")[-2000:]
    if code:
        assert done.stdout == b"" and done.stderr.startswith(b"run: ") and done.stderr.count(b"\n") == 1, done.stderr
        return done.stderr.decode(errors="replace")
    return done.stdout.decode(errors="replace")


def transformers_ids(folder: Path, ids: list[int], new: int) -> list[int]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensor = torch.tensor([ids])
    made = model.generate(
        tensor, attention_mask=torch.ones_like(tensor), do_sample=False, max_length=None, max_new_tokens=new, pad_token_id=0
    )
    return made[0, len(ids) :].tolist()


# the real model


@needs_stories
def test_stories_v0_is_the_original_byte_for_byte(tmp_path):
    metrics = build(MODELS / "stories260K-hf", tmp_path, "fp32_v0")
    ours, original = (tmp_path / "model.bin").read_bytes(), (MODELS / "original" / "stories260K.bin").read_bytes()
    rope = 512 * 8 * 4
    assert ours[:-rope] == original[:-rope] and len(ours) == len(original)
    assert (tmp_path / "tokenizer.bin").read_bytes() == (MODELS / "original" / "tok512.bin").read_bytes()
    assert metrics["prompts_equal"] == metrics["prompts"] == 4 and metrics["greedy_agreement"] == 1.0 and not metrics["chat"]

    text = run(tmp_path, "-t", "0", "-n", "100")
    assert text.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside in the park.")
    (tmp_path / "runtime.cfg").unlink()
    assert run(tmp_path, "-t", "0", "-n", "100") == text, "without runtime.cfg the program keeps to llama2.c's conventions"
    assert "no chat" not in run(tmp_path, "-m", "chat", "-i", "Hi", "-n", "5", "-t", "0")


@needs_stories
@pytest.mark.parametrize("format", ["fp32_v1", "int8_v2"])
def test_stories_text_equals_transformers(tmp_path, format):
    from transformers import AutoTokenizer

    folder = MODELS / "stories260K-hf"
    metrics = build(folder, tmp_path, format)
    hf = AutoTokenizer.from_pretrained(folder)
    ids = hf("Lily and Tom")["input_ids"]
    theirs = transformers_ids(folder, ids, 100)
    ours = [int(i) for i in run(tmp_path, "-t", "0", "-n", str(len(ids) + 99), "-i", "Lily and Tom", "--answer-ids").split()]
    if format == "fp32_v1":
        assert ours == theirs
        assert (
            run(tmp_path, "-t", "0", "-n", str(len(ids) + 99), "-i", "Lily and Tom")
            == hf.decode(ids + theirs, skip_special_tokens=True) + "\n"
        )
    else:
        assert metrics["group_size"] == 4, "64 halved until it divides rows of 172"
        assert metrics["greedy_agreement"] > 0.95


# random models


@pytest.mark.parametrize("format", ["fp32_v0", "fp32_v1"])
@helps("deploy/llama2c/proof.py", "target.format=fp32_v{} loses nothing")
def test_random_gqa_model_gives_transformers_text(llama, tmp_path, format):
    metrics = build(llama, tmp_path, format)
    assert metrics["prompts_equal"] + metrics["ties"] >= metrics["prompts"] == 4 and metrics["conversations"] == 4
    ids = proof.ids_of(proof.run(tmp_path, "--ids", "-i", "a little girl"))
    ours = run(tmp_path, "-t", "0", "-n", str(len(ids) + 99), "-i", "a little girl", "--answer-ids")
    assert [int(i) for i in ours.split()] == transformers_ids(llama, ids, 100)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = "a little girl and " * 20
BEYOND = {
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "qwen2": ("Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True}),
    "biases": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "mistral": ("Mistral", {"head_dim": 8, "sliding_window": None}),
}
"""what versions 0 to 2 cannot hold: {name: (architecture, its configuration)}"""


def save_beyond(folder: Path, name: str) -> Path:
    family, config = BEYOND[name]
    return save_llama(folder, byte_level("qwen2", nfc=True), family, **config)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> Path:
    return save_beyond(tmp_path_factory.mktemp("qwen3"), "qwen3")


@helps("sizing/takes.py", "target.format={}_v3")
@pytest.mark.parametrize("name", BEYOND)
def test_version_3_holds_what_llama2_c_s_formats_cannot(name, tmp_path):
    beyond = save_beyond(tmp_path / "model", name)
    with pytest.raises(WrongKind, match="own formats cannot hold") as told:
        llama2c.check(given(beyond), settings("fp32_v1"), OUT)
    assert told.value.fix[0] == "target.format=fp32_v3"
    metrics = build(beyond, tmp_path / "out", "fp32_v3")
    assert metrics["prompts_equal"] + metrics["ties"] >= metrics["prompts"] == 3 and metrics["conversations"] == 4
    ids = proof.ids_of(proof.run(tmp_path / "out", "--ids", "-i", LONG))
    assert len(ids) > 40, "more than one batch of the prompt"
    ours = run(tmp_path / "out", "-t", "0", "-n", str(len(ids) + 99), "-i", LONG, "--answer-ids")
    assert [int(i) for i in ours.split()] == transformers_ids(beyond, ids, 100)


@helps("deploy/llama2c/proof.py", "target.format=int8_v{} loses less")
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (8, 32), (8, 16), (4, 64), (4, 32)])
def test_integers_are_the_same_by_vector_instructions_and_by_plain_c(qwen3, tmp_path, bits, group):
    metrics = build(qwen3, tmp_path, f"int{bits}_v3", group)
    assert metrics["group_size"] == group and metrics["greedy_agreement"] > (0.85 if bits == 8 else 0.3)
    ids = []
    for flags in ([], ["NATIVE="]):
        subprocess.run(["make", "-B", "-C", str(tmp_path), "CFLAGS=-O2", *flags], check=True, capture_output=True)
        ids.append(proof.ids_of(proof.run(tmp_path, "-t", "0", "-n", "100", "--answer-ids", "-i", "a little girl")))
    assert ids[0][:30] == ids[1][:30] and len(ids[0]) > 50, "fp32 sums in another order round an input otherwise, now and then"


@helps("models/llama2c_file.py", "quantize that one with quantizer.group_size=64")
@helps("sizing/takes.py", "target.format=int{}_v3")
def test_a_gptq_model_keeps_its_integers(qwen3, tmp_path):
    from safetensors.torch import load_file, save_file

    from src.models import gptq

    stored = load_file(qwen3 / "model.safetensors")
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        parts = gptq.nearest(stored.pop(name), gptq.Nearest(4, 32)).tensors
        stored |= {name.replace("weight", suffix): tensor for suffix, tensor in parts.items()}
    folder = Path(shutil.copytree(qwen3, tmp_path / "gptq"))
    save_file(stored, folder / "model.safetensors")
    config, block = json.loads((folder / "config.json").read_text()), {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False}

    def grouped(size: int) -> dict:
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": block | {"group_size": size}}))
        return given(folder)

    with pytest.raises(WrongKind, match="GPTQ int4 already") as told:
        llama2c.check(grouped(32), settings("int8_v3"), OUT)
    assert told.value.fix[0] == "target.format=int4_v3"
    with pytest.raises(WrongKind, match="a scale for each row") as told:
        llama2c.check(grouped(-1), settings("int4_v3"), OUT)
    assert told.value.fix[1] == "quantize that one with quantizer.group_size=64"
    llama2c.check(grouped(32), settings("int4_v3"), OUT)
    shape = read_shape(folder, "int4_v3")
    form = form_of(shape, "int4_v3", 64)
    llama2c_file.write_model(folder, shape, form, tmp_path / "model.bin")
    written, whole = llama2c_file.reader_of(tmp_path / "model.bin", shape, form), gptq.matrices(llama2c_file.entries(folder))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        assert form.group == 32 and torch.equal(written(name), whole[name]())


def test_int8_agrees_with_fp32(llama, tmp_path):
    metrics = build(llama, tmp_path, "int8_v2")
    assert metrics["group_size"] == 64 and metrics["greedy_agreement"] > 0.85
    assert metrics["model_bytes"] < 0.3 * sum(f.stat().st_size for f in llama.glob("*.safetensors"))


def test_tied_model_with_other_head_counts_and_old_rope_key(tmp_path):
    model = save_llama(tmp_path / "m", sentencepiece_like(None, "first-whole"), tie_word_embeddings=True, num_key_value_heads=4)
    config = json.loads((model / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    (model / "config.json").write_text(json.dumps(config))
    assert read_shape(model, "fp32_v1").theta == 50000.0
    metrics = build(model, tmp_path / "out", "fp32_v1")
    assert metrics["chat"] is False and metrics["greedy_agreement"] == 1.0
    assert "no chat mode: its tokenizer has no chat template" in run(tmp_path / "out", "-m", "chat", "-i", "Hi", code=1)


# the tokenizer

NASTY = [
    *"  \n\t\r'’'sStTdDmMreveLL", "ſ", "é", "한", "글", "中", "🙂", "👩‍👧", "\u3000", "\u00a0", "\u2581", "½", "٣", "Ⅷ", "1", "23", "456", "it", "they",
    " there", " a", "upon", "!", "..", "_", "-", "e\u0301", "\u200b", "<s>", "<|im_end|>", "<|im_", "안녕", "<0x0A>", "\x01", "\x7f", "\U000e0041",
]  # fmt: skip


def same_on_nasty_texts(hf, bundle: Path, out: Path, count: int = 80) -> None:
    for name in ("model.bin", "run", "run-debug"):
        (out / name).symlink_to(bundle / name)
    tokenizer = read_tokenizer(json.loads(hf.backend_tokenizer.to_str()), "here")
    shape = json.loads((out / "shape.json").read_text())
    pieces, why = find_chat(hf)
    write_tokenizer(tokenizer, shape["vocab"], hf.bos_token_id, hf.eos_token_id, out / "tokenizer.bin")
    write_runtime(Shape(**shape), Form(1, 32), tokenizer, hf, [2], pieces, why, out / "runtime.cfg")
    assert proof.prove_ids(out, hf, pieces)["conversations"] == (4 if pieces else 0)
    dice = random.Random(7)
    for i in range(count):
        text = "".join(dice.choices(NASTY, k=dice.randint(1, 30)))
        ours = run(out, "--ids", "-i", text, program="run-debug" if i % 6 == 0 else "run")
        assert [int(id) for id in ours.split()] == hf(text)["input_ids"], repr(text)


@pytest.fixture
def ids_folder(bundle, llama, tmp_path) -> Path:
    (tmp_path / "shape.json").write_text(json.dumps(vars(read_shape(llama, "fp32_v1"))))
    return tmp_path


@pytest.mark.parametrize("prepend", ["normalizer", "first-whole", "always-split", "never-whole"])
def test_sentencepiece_ids(prepend, bundle, ids_folder):
    same_on_nasty_texts(sentencepiece_like(LLAMA2, prepend), bundle, ids_folder)


@pytest.mark.parametrize("split", ["gpt2", "digits_gpt2", "llama3", "qwen2"])
def test_byte_level_ids(split, bundle, ids_folder):
    same_on_nasty_texts(byte_level(split), bundle, ids_folder)


def test_normalized_ids(bundle, ids_folder):
    """NFC as `tokenizers` has it, on every character that has another form and on marks in any order."""
    from tokenizers.normalizers import NFC

    hf = byte_level("qwen2", nfc=True)
    same_on_nasty_texts(hf, bundle, ids_folder, 20)
    equal, marks = ([entry.partition("=")[0] for entry in table.split()] for table in canonical())
    chars = [chr(int(code, 16)) for code in equal] + [chr(int(code, 16)) for mark in marks for code in mark.split("-")]
    dice, jamo = random.Random(3), [chr(c) for c in (0x1100, 0x1112, 0x1161, 0x1175, 0x11A8, 0x11C2, 0xAC00, 0xD55C, 0xD7A3, 0x11A7)]
    words = [*chars, *("".join(dice.choices([*chars, *jamo, *"aeKs"], k=dice.randint(2, 6))) for _ in range(4000))]
    for program, some in (("run", words), ("run-debug", words[::20])):
        for begin in range(0, len(some), 2000):
            text = "\n".join(some[begin : begin + 2000])
            assert NFC().normalize_str(text) != text
            assert [int(id) for id in run(ids_folder, "--ids", "-i", text, program=program).split()] == hf(text)["input_ids"]


def test_byte_level_model_end_to_end(tmp_path):
    model = save_llama(tmp_path / "m", byte_level("llama3"))
    metrics = build(model, tmp_path / "out", "fp32_v1")
    assert metrics["chat"] and metrics["prompts"] == 3, "there is no BOS, so the empty prompt is left out"
    assert "no BOS" in run(tmp_path / "out", code=1)


# chat


def test_two_turns_equal_transformers_and_print_answers_only(llama, bundle):
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(llama)
    messages = [{"role": "system", "content": "Be brief."}]
    answers = []
    for user in ("Once upon", "a little girl"):
        messages.append({"role": "user", "content": user})
        ids = hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        answers.append(hf.decode(transformers_ids(llama, ids, 12), skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    options = ("-m", "chat", "-t", "0", "-n", "12", "-y", "Be brief.", "-i", "Once upon")
    for program in ("run", "run-debug"):
        assert run(bundle, *options, stdin="a little girl\n", program=program) == "".join(f"{a}\n" for a in answers)
    assert run(bundle, *options) == answers[0] + "\n"


def test_context_end_is_said(bundle):
    done = subprocess.run(
        [bundle / "run-debug", bundle / "model.bin", "-m", "chat", "-n", "0", "-t", "0", "-i", "Hi"], input=b"more\n", capture_output=True
    )
    assert done.returncode == 0 and b"the context is full: 256 tokens" in done.stderr
    assert "the model takes 256" in run(bundle, "-i", "x " * 400, code=1)


@pytest.mark.parametrize(
    ("template", "system", "trim"),
    [(CHATML, True, set()), (LLAMA2, True, {"user", "assistant"}), (NO_SYSTEM, False, set())],
)
def test_chat_pieces(template, system, trim):
    pieces, why = find_chat(sentencepiece_like(template))
    assert pieces and not why
    assert (pieces.system_open is not None) == system and pieces.trim == trim


@pytest.mark.parametrize("template", ["{{ messages | length }}", "{{ messages[-1]['content'] }}", "{{ messages[0]['content'] | upper }}"])
def test_template_that_is_not_fixed_pieces_gives_no_chat(template):
    pieces, why = find_chat(sentencepiece_like(template))
    assert pieces is None and why


def test_sampling_repeats_by_seed(bundle):
    options = ("-i", "girl", "-n", "40", "-t", "1.5")
    one = run(bundle, *options, "-s", "3", program="run-debug")
    assert one == run(bundle, *options, "-s", "3") and one != run(bundle, *options, "-s", "4")
    assert run(bundle, *options, "-s", "3", "-p", "1", program="run-debug")


# hostile input, under the sanitizers


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    for name in ("model.bin", "tokenizer.bin", "runtime.cfg"):
        shutil.copyfile(bundle / name, tmp_path / name)
    (tmp_path / "run-debug").symlink_to(bundle / "run-debug")
    return tmp_path


@pytest.mark.parametrize("name", ["model.bin", "tokenizer.bin", "runtime.cfg"])
def test_cut_and_padded_files_are_refused(copy, name):
    whole = (copy / name).read_bytes()
    for size in (0, 1, 7, 30, 100, 255, 257, len(whole) // 2, len(whole) - 1):
        (copy / name).write_bytes(whole[:size])
        assert name in run(copy, "-i", "Hi", program="run-debug", code=1)
    (copy / name).write_bytes(whole + b"x")
    assert name in run(copy, "-i", "Hi", program="run-debug", code=1)
    (copy / name).write_bytes(bytes(random.Random(1).randbytes(len(whole))))
    assert name in run(copy, "-i", "Hi", program="run-debug", code=1)


def test_a_damaged_count_of_merges_asks_for_no_more_than_its_file_holds(copy):
    """16 million of them would be half a gigabyte on a board, for a file of some kilobytes."""
    text = (copy / "runtime.cfg").read_text()
    line = text[: text.index("\nmerges ") + 1].count("\n") + 1
    (copy / "runtime.cfg").write_text(re.sub(r"^merges \d+$", "merges 16777216", text, flags=re.MULTILINE))
    assert f"runtime.cfg is damaged at line {line}" in run(copy, "-i", "Hi", program="run-debug", code=1)


@pytest.mark.parametrize("name", ["model.bin", "tokenizer.bin", "runtime.cfg"])
def test_flipped_bytes_never_crash(copy, name):
    whole = (copy / name).read_bytes()
    dice = random.Random(2)
    for _ in range(25):
        damaged = bytearray(whole)
        damaged[dice.randrange(min(len(whole), 300 if name == "model.bin" else 4000))] = dice.randrange(256)
        (copy / name).write_bytes(damaged)
        argv = [copy / "run-debug", copy / "model.bin", "-i", "Once upon 한", "-n", "12"]
        done = subprocess.run(argv, capture_output=True)
        assert done.returncode in (0, 1) and b"Sanitizer" not in done.stderr and b"runtime error" not in done.stderr, done.stderr[-2000:]


def fuzz_bundles(place: Path) -> list[Path]:
    """A bundle of each version and kind of weights, with tables cut short that would take most of the time to read."""
    made = []
    small = {"num_hidden_layers": 1, "intermediate_size": 64}
    for form in (Form(1, 32), Form(2, 8, 32), Form(2, 8, 4), Form(3, 32), Form(3, 8, 64), Form(3, 8, 16), Form(3, 4, 64), Form(3, 4, 32)):
        out = place / f"v{form.version}-{form.bits}-{form.group}"
        hf = byte_level("llama3" if form.bits == 8 else "qwen2", nfc=True) if form.version == 3 else sentencepiece_like(LLAMA2)
        family = {"family": "Qwen3", "attention_bias": True, "head_dim": 32} if form.version == 3 else {}
        shape = read_shape(save_llama(out, hf, **family, **small), "fp32_v3")
        tokenizer, (pieces, why) = read_tokenizer(json.loads(hf.backend_tokenizer.to_str()), "here"), find_chat(hf)
        llama2c_file.write_model(out, shape, form, out / "model.bin")
        write_tokenizer(tokenizer, shape.vocab, hf.bos_token_id, hf.eos_token_id, out / "tokenizer.bin")
        write_runtime(shape, form, tokenizer, hf, [2], pieces, why, out / "runtime.cfg")
        lines = (out / "runtime.cfg").read_text().split("\n")
        tables = ("letters", "numbers", "canonical", "marks")
        lines = [" ".join(line.split(" ")[:40]) if line.partition(" ")[0] in tables else line for line in lines]
        (out / "runtime.cfg").write_text("\n".join(lines))
        made.append(out)
    return made


def test_no_damaged_file_and_no_prompt_crashes(tmp_path):
    """A few of the inputs of docs/llama2c.md; tests/fuzz_llama2c.c says how more are tried."""
    tried = fuzz(tmp_path, 400, 1)
    assert "400 inputs" in tried and " 0 faults" in tried, tried


def fuzz(place: Path, count: int, seed: int) -> str:
    flags = [
        "-std=c99",
        "-O1",
        "-g",
        "-w",
        "-Wno-psabi",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-I",
        ROOT / "assets" / "llama2c",
    ]
    program = place / "fuzz"
    subprocess.run(["cc", *flags, ROOT / "tests" / "fuzz_llama2c.c", "-o", program, "-lm"], check=True)
    done = subprocess.run([program, str(count), str(seed), *fuzz_bundles(place)], capture_output=True, text=True)
    return done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--what",), "unknown option --what"), (("-q", "1"), "unknown option -q"), (("-n",), "-n takes a value"), (("-n", "many"), "takes a number"),
        (("-t", "-1"), "takes a number"), (("-t", "nan"), "takes a number"), (("-m", "sing"), "generate or chat"), (("-y", "x"), "-m chat"),
        (("-z", "/nowhere/t.bin"), "cannot open /nowhere/t.bin"), (("other.bin",), "more than one model"), (("-z", "/tmp"), "is not a file"),
    ],
)  # fmt: skip
def test_wrong_options(bundle, options, says):
    assert says in run(bundle, *options, program="run-debug", code=1)


def test_prompt_that_is_not_utf8(bundle):
    done = subprocess.run([bundle / "run-debug", bundle / "model.bin", "--ids", "-i", b"a\xff\xe4\xb8 \xf0\x9f"], capture_output=True)
    assert done.returncode == 0 and 3 + 0xFF in map(int, done.stdout.split())


# check


def edited(llama: Path, out: Path, **changes) -> Path:
    shutil.copytree(llama, out)
    config = json.loads((out / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "gemma"}, "this one is 'gemma'"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "it is awq"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": 64, "sym": True}}, "GPTQ int8 already"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}}, "rope scaling 'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "turns 0.5 of each head"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_key_value_heads": 3}, "3 KV heads"),
        ({"head_dim": 33}, "heads of 33"),
    ],
)
def test_check_refuses_other_architectures(llama, tmp_path, changes, says):
    with pytest.raises(WrongKind, match=says) as caught:
        llama2c.check(given(edited(llama, tmp_path / "m", **changes)), settings("fp32_v3"), OUT)
    assert caught.value.fix


def test_check_refuses_biases_and_shapes(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    model = edited(llama, tmp_path / "m")
    weights = load_file(model / "model.safetensors")
    bias = {"model.layers.0.self_attn.q_proj.bias": weights["model.norm.weight"].clone()}
    save_file(weights | bias, model / "model.safetensors")
    with pytest.raises(WrongKind, match="biases") as told:
        llama2c.check(given(model), settings("fp32_v1"), OUT)
    assert told.value.fix == ["target=openvino_cpu"]
    save_file({k: v for k, v in weights.items() if "layers.1.mlp.up" not in k}, model / "model.safetensors")
    with pytest.raises(BadData, match=r"no tensor model.layers.1.mlp.up_proj.weight"):
        llama2c.check(given(model), settings("fp32_v1"), OUT)
    whole = (llama / "model.safetensors").read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        (model / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(BadData):
            llama2c.check(given(model), settings("fp32_v1"), OUT)
    (model / "model.safetensors").unlink()
    with pytest.raises(MissingInput):
        llama2c.check(given(model), settings("fp32_v1"), OUT)


@pytest.mark.parametrize(("lacking", "env"), [("make", {"PATH": ""}), ("cc", {"PATH": ""}), ("no-such-gcc", {"CC": "no-such-gcc -m32"})])
def test_check_asks_for_the_tools_before_it_reads_anything(tmp_path, monkeypatch, lacking, env):
    monkeypatch.delenv("CC", raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(MissingTool, match=lacking):
        llama2c.check(given(tmp_path / "nothing here"), settings("fp32_v1"), OUT)


@helps("deploy/llama2c/__init__.py", "apt-get install build-essential")
def test_check_takes_the_compiler_that_the_makefile_takes(llama, tmp_path, monkeypatch):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, tool in (("make", "make"), ("my-cc", "cc")):
        (tools / name).symlink_to(shutil.which(tool))
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(MissingTool, match="not found: cc"):
        llama2c.check(given(llama), settings("fp32_v1"), OUT)
    (tools / "cc").symlink_to((tools / "my-cc").resolve())  # what installing one makes
    llama2c.check(given(llama), settings("fp32_v1"), OUT)
    (tools / "cc").unlink()
    monkeypatch.setenv("CC", "my-cc -O1")
    llama2c.check(given(llama), settings("fp32_v1"), OUT)


def test_check_needs_no_torch(llama):
    code = (
        "import sys; from pathlib import Path; from types import SimpleNamespace as S; from src.deploy import llama2c;"
        "llama2c.check({'model': S(path=Path(sys.argv[1]))}, S(format='int8_v2', group_size=64), None); print({'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code, llama], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("normalizer", {"type": "NFKC"}, "NFKC"),
        ("pre_tokenizer", {"type": "Whitespace"}, "Whitespace"),
        ("model", {"type": "Unigram"}, "Unigram"),
    ],
)
def test_check_names_the_unknown_tokenizer_part(llama, tmp_path, part, value, says):
    model = edited(llama, tmp_path / "m")
    spec = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(spec | {part: value}))
    with pytest.raises(WrongKind, match=says) as told:
        llama2c.check(given(model), settings("fp32_v1"), OUT)
    assert told.value.fix == ["target=openvino_cpu"]


@helps("deploy/llama2c/runtime.py", "set add_eos_token to false in tokenizer_config.json")
def test_a_tokenizer_that_adds_a_token_after_the_text(llama, tmp_path):
    from transformers import AutoTokenizer

    adds = AutoTokenizer.from_pretrained(llama)
    adds._tokenizer.post_processor = TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", 1023)])
    with pytest.raises(WrongKind, match="adds tokens after the text"):
        runtime._begin_ids(adds)
    runtime._begin_ids(AutoTokenizer.from_pretrained(llama))


def test_group_size_backs_off(llama):
    shape = read_shape(llama, "int8_v2")
    assert form_of(shape, "int8_v2", 64) == form_of(shape, "int8_v2", 256) == Form(2, 8, 64) and form_of(shape, "int4_v3", 32) == Form(
        3, 4, 32
    )
    shape.hidden = 96
    with pytest.raises(WrongKind, match="blocks of 64") as told:
        form_of(shape, "int4_v3", 64)
    assert told.value.fix == ["target.format=int8_v3", "target.format=fp32_v3"]
    shape.hidden = 130
    with pytest.raises(WrongKind, match="no group size") as told:
        form_of(shape, "int8_v2", 64)
    assert told.value.fix == ["target.format=fp32_v1"]


@helps("models/llama2c_file.py", "target.format=fp32_v{}", "target.format=int8_v{}", "target=openvino_cpu")
@helps("deploy/llama2c/tokenizer.py", "target=openvino_cpu")
def test_each_way_out_of_what_llama2c_does_not_take(llama, tmp_path):
    """int8's groups are no matter of fp32's; what else it lacks OpenVINO's exporter takes by the family alone."""
    odd = write_model(tmp_path / "odd", intermediate_size=130)
    with pytest.raises(WrongKind, match="no group size"):
        llama2c.check(given(odd), settings("int8_v2"), OUT)
    llama2c.check(given(odd), settings("fp32_v1"), OUT)
    narrow = write_model(tmp_path / "narrow", intermediate_size=96)
    with pytest.raises(WrongKind, match="blocks of 64"):
        llama2c.check(given(narrow), settings("int4_v3"), OUT)
    llama2c.check(given(narrow), settings("int8_v3"), OUT)
    board = compose("deploy", ["target=openvino_cpu", "target.context_len=128", "target.prompt_len=64"], DeployVerb).target
    takes.check(json.loads((llama / "config.json").read_text()), board, where="here")


def test_a_wrong_bundle_is_not_published(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(llama2c_file, "interleave", lambda weight, heads: weight)
    with pytest.raises(ProofFailed, match="greedy text"):
        build(llama, tmp_path, "fp32_v1")
