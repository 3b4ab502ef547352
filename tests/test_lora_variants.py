"""Every way to train an adapter, from real steps to a merged folder: what was trained is what the merge makes, on the untouched base, and is what peft makes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, go, helps
from makers import widened_qwen2
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from src import merge
from src.core.errors import ConfigError, ProofFailed, WrongKind
from src.models import adapter_files, generation, lora
from src.models.loading import load_model, nf4_config
from src.models.vocabulary import grow_vocabulary
from src.settings.training import LoraTuner, QloraTuner
from src.training import rules

TINY = ROOT / "assets" / "tiny-chat"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
STEPS = 4

pytestmark = pytest.mark.usefixtures("proofs_in_this_process")


def settings(kind: str = "lora", **changes):
    default = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "tuner" / f"{kind}.yaml"))
    cls = {"lora": LoraTuner, "qlora": QloraTuner}[kind]
    return cls(**(default | {"rank": 8, "alpha": 16.0, "learning_rate": 3e-3, "dropout": 0.0} | changes))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """bases(name): a folder of tiny-chat's first two layers as they are or in bf16, or of all with a head of its own; or a Qwen2 one, which has biases,
    with the zeros it was widened by made small numbers."""
    here = tmp_path_factory.mktemp("bases")

    def base(name: str) -> Path:
        source = widened_qwen2() if name == "qwen2" else TINY
        if not (here / name).is_dir():
            model = load(source, **({"num_hidden_layers": 2} if name in ("tied", "bf16") else {}))
            if name == "qwen2":
                torch.manual_seed(1)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter += 0.01 * torch.randn_like(parameter) * (parameter == 0)
            if name == "untied":
                model.config.tie_word_embeddings = False
                model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.1)
            model.to(torch.bfloat16 if name == "bf16" else torch.float32).save_pretrained(here / name)
            for file in TOKENIZER:
                shutil.copy(source / file, here / name)
        return here / name

    return base


def load(folder: Path, **changes):
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **changes)


def train(model, tuner, steps: int = STEPS, seed: int = 0) -> list[float]:
    """Plain AdamW steps on what is trainable, each parameter at the rate `lora.rates` gives it; the losses."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rates = lora.rates(model, tuner, 256)
    groups = [
        {"params": [p], "lr": rate.peak, "weight_decay": 0.1 * rate.decays}
        for name, p in named.items()
        for rate in [rates.get(name, lora.ParameterRate(tuner.learning_rate, True))]
    ]
    optimizer, losses = torch.optim.AdamW(groups), []
    draw = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        ids = torch.randint(0, 256, (4, 24), generator=draw)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def made(base: Path, folder: Path, tuner, rows=(), steps: int = STEPS):
    """(the trained model in memory, its logits), its adapter saved as a finished run saves it."""
    torch.manual_seed(5)
    model = lora.attach(load(base), tuner, list(rows), deepspeed=False)
    train(model, tuner, steps)
    adapter_files.save(model, folder, state_dict=None, writes=True, finished=True)
    adapter_files.tidy(folder)
    adapter_files.check_saved(folder, moved=True, expected=adapter_files.saved_names(model))
    return model, torch.from_numpy(generation.logits(model))


def merged(base: Path, adapter: Path, tmp_path: Path) -> Path:
    assert go(merge, f"outputs={tmp_path}", "run=m", f"source={adapter}", f"base={base}", "rounding=nearest") == 0
    return tmp_path / "m" / "merge"


def weights(folder: Path) -> dict:
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


def by_peft(base: Path, adapter: Path) -> dict:
    return PeftModel.from_pretrained(load(base), adapter).merge_and_unload().state_dict()


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANTS = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "dora and rslora": {"dora": True, "rslora": True},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "pissa": {"init": "pissa"},
    "pissa and rslora": {"init": "pissa", "rslora": True},
    "olora": {"init": "olora"},
    "olora and rslora": {"init": "olora", "rslora": True},
    "lora+": {"lora_plus": 16.0},
    "a norm whole": {"modules_to_save": ["model.norm", "post_attention_layernorm"]},
    "a linear layer whole": {"modules_to_save": ["down_proj"]},
    "both tables whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "pissa with tables whole": {"init": "pissa", "modules_to_save": ["embed_tokens", "lm_head"]},
}
ON_TABLES = {
    "tables adapted": {"target_modules": [*LAYERS, "embed_tokens", "lm_head"]},
    "tables adapted, dora": {"target_modules": [*LAYERS, "embed_tokens", "lm_head"], "dora": True},
    "tables adapted, pissa": {"target_modules": [*LAYERS, "embed_tokens", "lm_head"], "init": "pissa"},
    "one table whole": {"modules_to_save": ["lm_head"]},
    "other table whole": {"modules_to_save": ["embed_tokens"]},
}
CASES = [(name, base) for name in VARIANTS for base in ("tied", "qwen2", "bf16")] + [(name, "untied") for name in ON_TABLES]


def often(variant: str, kind: str) -> bool:
    """Whether the default run has it: each variant on two kinds of base, and each variant with rsLoRA, which only changes a factor, on one."""
    return kind == "qwen2" or (kind != "bf16" and "rslora" not in variant) or variant in ("plain", "dora", "pissa")


@pytest.mark.parametrize(
    "variant, kind", [pytest.param(v, k, marks=[] if often(v, k) else pytest.mark.slow, id=f"{v}-{k}") for v, k in CASES]
)
def test_what_was_trained_is_what_the_merge_makes(variant, kind, bases, tmp_path):
    base = bases(kind)
    _, trained = made(base, tmp_path / "adapter", settings(**(VARIANTS | ON_TABLES)[variant]))
    out = merged(base, tmp_path / "adapter", tmp_path)
    result = load(out)
    error = distance(torch.from_numpy(generation.logits(result)), trained)
    moved = distance(torch.from_numpy(generation.logits(load(base))), trained)
    theirs, ours = by_peft(base, tmp_path / "adapter"), weights(out)
    if result.config.tie_word_embeddings:
        theirs.pop("lm_head.weight")
    assert ours.keys() == theirs.keys()
    unequal = {n: distance(ours[n], theirs[n]) for n in ours if not same_bytes(ours[n], theirs[n])}
    print(
        f"{variant} on {kind}: logits {error:.1e} of a move of {moved:.1e}; {len(unequal)} of {len(ours)} tensors differ, by {max(unequal.values(), default=0):.1e}"
    )
    assert moved > 1e-3
    assert error <= (1e-5 if kind != "bf16" else 2e-2)
    assert not unequal


# ---- what the base and the start have to do with each other


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_is_taken_out_of_the_base_is_what_peft_takes(init, rslora, bases):
    from peft import LoraConfig, get_peft_model

    ours = lora.attach(load(bases("qwen2")), settings(init=init, rslora=rslora), [], deepspeed=False)
    theirs = get_peft_model(
        load(bases("qwen2")),
        LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, use_rslora=rslora, init_lora_weights=init, target_modules="all-linear"),
    )
    a, b, before = ours.state_dict(), theirs.state_dict(), load(bases("qwen2")).state_dict()
    assert a.keys() == b.keys()
    for name in [n for n in a if n.endswith(".base_layer.weight")]:
        layer = name.removesuffix(".base_layer.weight")
        assert torch.allclose(a[name], b[name], atol=2e-6)
        assert distance(a[name], before[name.removeprefix("base_model.model.").replace(".base_layer", "")]) > 0.05, "a part is gone"
        products = [s[f"{layer}.lora_B.default.weight"] @ s[f"{layer}.lora_A.default.weight"] for s in (a, b)]
        assert distance(*products) < 1e-5
    assert ours.initial.keys() == {n.replace(".default", "") for n in a if ".lora_A." in n or ".lora_B." in n}


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "olora"])
def test_training_starts_from_the_base_as_it_answers(init, bases):
    model = lora.attach(load(bases("untied")), settings(init=init), [], deepspeed=False).eval()
    assert distance(*(torch.from_numpy(generation.logits(m)) for m in (model, load(bases("untied"))))) < 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_checkpoint_goes_on_where_it_was_and_the_result_is_for_the_untouched_base(init, bases, tmp_path):
    """As transformers' Trainer resumes: the adapter is attached to the same base anew, and its checkpoint loaded into it."""
    base, tuner = bases("qwen2"), settings(init=init, rslora=True)
    first = lora.attach(load(base), tuner, [5], deepspeed=False)
    train(first, tuner)
    adapter_files.save(first, tmp_path / "checkpoint", state_dict=None, writes=True, finished=False)
    again = lora.attach(load(base), tuner, [5], deepspeed=False)
    again.load_adapter(str(tmp_path / "checkpoint"), "default", is_trainable=True)
    for one, other in zip(first.state_dict().values(), again.state_dict().values()):
        assert torch.equal(one, other)
    assert train(first, tuner, 2, seed=1) == train(again, tuner, 2, seed=1)

    adapter_files.save(again, tmp_path / "done", state_dict=None, writes=True, finished=True)
    before, after = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("checkpoint", "done"))
    assert (before["r"], after["r"]) == (8, 16) and after["init_lora_weights"] is True
    trained = torch.from_numpy(generation.logits(again.eval()))
    done = PeftModel.from_pretrained(load(base), tmp_path / "done").eval()
    assert distance(torch.from_numpy(generation.logits(done)), trained) < 1e-5
    wrong = PeftModel.from_pretrained(load(base), tmp_path / "checkpoint").eval()
    assert distance(torch.from_numpy(generation.logits(wrong)), trained) > 0.1, "the checkpoint is not for the untouched base"


def test_only_the_process_that_writes_converts(bases, tmp_path):
    model = lora.attach(load(bases("tied")), settings(init="pissa"), [], deepspeed=False)
    adapter_files.save(model, tmp_path / "none", state_dict=None, writes=False, finished=True)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("init", ["default", "orthogonal", "pissa", "olora"])
def test_an_adapter_that_did_not_move_is_refused_wherever_it_started(init, bases, tmp_path):
    with pytest.raises(ProofFailed, match="learnt nothing"):
        made(bases("tied"), tmp_path / "adapter", settings(init=init), steps=0)


@helps("models/lora.py", "tuner.rank={}")
def test_a_rank_above_what_a_layer_holds_is_refused(bases):
    with pytest.raises(ConfigError, match=r"tuner.rank=80 is above .*k_proj, \(64, 128\)") as told:
        lora.attach(load(bases("tied")), settings(init="pissa", rank=80), [], deepspeed=False)
    assert told.value.fix == ["tuner.rank=64"]
    lora.attach(load(bases("tied")), settings(init="pissa", rank=64), [], deepspeed=False)


@helps("models/lora.py", "tuner.dora=false")
def test_dora_on_weights_of_no_length_is_refused():
    with pytest.raises(ConfigError, match=r"layers\.0.* has outputs whose weights are all zero"):
        lora.attach(load(widened_qwen2()), settings(dora=True), [], deepspeed=False)
    lora.attach(load(widened_qwen2()), settings(dora=False), [], deepspeed=False)


# ---- rates


def test_lora_plus_is_pefts(bases):
    from peft.optimizers import create_loraplus_optimizer

    tuner = settings(lora_plus=16.0, target_modules=[*LAYERS, "embed_tokens"])
    model = lora.attach(load(bases("untied")), tuner, [], deepspeed=False)
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=tuner.learning_rate, loraplus_lr_ratio=16.0)
    named = {id(p): name for name, p in model.named_parameters()}
    raised = {named[id(p)] for group in theirs.param_groups if group["lr"] > tuner.learning_rate for p in group["params"]}
    ours = lora.rates(model, tuner, 1024)
    assert ours == {name: lora.ParameterRate(16 * tuner.learning_rate, True) for name in raised} and len(raised) == 28
    assert all(".lora_B." in name for name in raised), "an adapted embedding keeps the common rate"


def test_nothing_has_a_rate_of_its_own_without_a_reason(bases):
    for changes in ({}, {"rslora": True}, {"init": "orthogonal"}, {"modules_to_save": ["norm"]}):
        assert lora.rates(lora.attach(load(bases("tied")), settings(**changes), [], deepspeed=False), settings(**changes), 1024) == {}


@pytest.mark.parametrize("changes", [{"dora": True}, {"init": "pissa"}, {"init": "olora", "lora_plus": 4.0}], ids=str)
def test_decay_does_not_pull_the_base_to_zero(changes, bases):
    """A learning rate of zero with weight decay: only what is added to the base may shrink, so the model stays as it was."""
    tuner = settings(**changes)
    model = lora.attach(load(bases("tied")), tuner, [5, 1023], deepspeed=False)
    rates = lora.rates(model, tuner, 1024)
    rows = {n for n in rates if "trainable_tokens_delta" in n}
    assert len(rows) == 1 and not any(rates[n].decays for n in rows)
    before = torch.from_numpy(generation.logits(model.eval()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and rates.get(name, lora.ParameterRate(0, True)).decays:
                parameter *= 0.9
    assert distance(torch.from_numpy(generation.logits(model)), before) < 1e-5
    if "lora_plus" in changes:
        assert {rate.peak for n, rate in rates.items() if ".lora_B." in n} == {4 * tuner.learning_rate}


# ---- layers trained whole, and the tables


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_rows_are_trained_where_their_table_is_not(kind, names, bases, tmp_path):
    """On a tied base either name means the one matrix, which stays one."""
    base, rows = bases(kind), [2, 31]
    model, trained = made(base, tmp_path / "adapter", settings(modules_to_save=names), rows)
    whole = {
        n.split(".modules_to_save")[0].rsplit(".", 1)[-1]
        for n, p in model.named_parameters()
        if ".modules_to_save." in n and p.requires_grad
    }
    by_rows = {n.split(".token_adapter")[0].rsplit(".", 1)[-1] for n, _ in model.named_parameters() if "trainable_tokens_delta" in n}
    assert whole == ({"embed_tokens"} if kind == "tied" else set(names))
    assert by_rows == (set() if kind == "tied" else {"embed_tokens", "lm_head"} - set(names))
    out = merged(base, tmp_path / "adapter", tmp_path)
    result = load(out)
    assert result.config.tie_word_embeddings == (kind == "tied") and ("lm_head.weight" in weights(out)) == (kind == "untied")
    assert distance(torch.from_numpy(generation.logits(result)), trained) < 1e-5
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & weights(out).keys():
        changed = (weights(out)[name] != weights(base)[name]).any(1)
        if kind == "tied" or name.split(".")[-2] in names:
            assert changed.sum() > 1000
        else:
            assert changed.nonzero().flatten().tolist() == rows


def test_the_vocabulary_may_grow_under_a_table_trained_whole(bases, tmp_path):
    base = Path(shutil.copytree(TINY, tmp_path / "base"))
    model = load(base)
    model.resize_token_embeddings(1022)
    model.save_pretrained(base)
    model = load(base)
    grow_vocabulary(model, 1024)
    tuner = settings(modules_to_save=["embed_tokens"])
    model = lora.attach(model, tuner, [1022, 1023], deepspeed=False)
    train(model, tuner)
    adapter_files.save(model, tmp_path / "adapter", state_dict=None, writes=True, finished=True)
    for name in TOKENIZER:
        shutil.copy(TINY / name, tmp_path / "adapter")
    result = load(merged(base, tmp_path / "adapter", tmp_path))
    assert result.config.vocab_size == 1024
    assert distance(torch.from_numpy(generation.logits(result)), torch.from_numpy(generation.logits(model))) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [5, 1022]}},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True},
    ],
    ids=str,
)
def test_an_adapter_of_peft_on_one_end_of_a_tied_base_unties_it(changes, tmp_path):
    """peft's own merge writes into the shared matrix and so changes both ends; what was trained is the adapter on the base, which is what we make."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(load(TINY), LoraConfig(task_type="CAUSAL_LM", r=4, **({"target_modules": ["q_proj"]} | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.05
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    result = load(merged(TINY, tmp_path / "adapter", tmp_path))
    assert result.config.tie_word_embeddings is False
    assert distance(torch.from_numpy(generation.logits(result)), torch.from_numpy(generation.logits(model.eval()))) < 1e-5


def test_a_whole_layer_on_a_16_bit_base_is_trained_in_fp32(bases):
    model = lora.attach(load(bases("bf16")), settings(modules_to_save=["embed_tokens", "norm"]), [], deepspeed=False)
    held = {n: p for n, p in model.named_parameters() if ".modules_to_save." in n}
    assert len(held) == 2 and {p.dtype for p in held.values()} == {torch.float32}
    tied = [m for m in model.modules() if type(m).__name__ == "ModulesToSaveWrapper" and hasattr(m.original_module, "in_features")]
    assert tied[0].modules_to_save["default"].weight is held["base_model.model.model.embed_tokens.modules_to_save.default.weight"]
    before = torch.from_numpy(generation.logits(load(bases("bf16"))))
    assert distance(torch.from_numpy(generation.logits(model.eval())), before) < 2e-2, "outside autocast too"
    assert model(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes, rows, words",
    [
        ({"modules_to_save": ["lm_haed"]}, [], "no layer called lm_haed; did you mean 'lm_head'"),
        ({"modules_to_save": ["mlp"]}, [], "mlp is no single layer.*\n.*act_fn, down_proj, gate_proj, up_proj"),
        ({"modules_to_save": ["act_fn"]}, [], "act_fn is no single layer"),
        ({"target_modules": ["qproj"]}, [], "no layer called qproj; did you mean 'q_proj'"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, [], "embed_tokens shares its weight.*\n.*modules_to_save=.embed_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, [], "lm_head shares its weight"),
    ],
    ids=str,
)
@helps("models/lora.py", "name layers in it: {}", "tuner.modules_to_save=[{}]", "tuner.target_modules=all-linear")
@helps("models/lora.py", "tuner.modules_to_save=[{}] trains both ends as the one matrix they are")
def test_layers_that_cannot_be_trained_so_are_named(changes, rows, words, bases):
    with pytest.raises(ConfigError) as caught:
        lora.attach(load(bases("tied")), settings(**changes), rows, deepspeed=False)
    assert re.search(words, str(caught.value)), str(caught.value)
    taken = [way for way in caught.value.fix if way.startswith("tuner.")]
    assert taken
    for way in taken:
        key, _, value = way.split()[0].removeprefix("tuner.").partition("=")
        given = changes | {key: value.strip("[]").split(",") if value.strip("[]") and "-" not in value else value if "-" in value else []}
        targets = {"target_modules": ["q_proj"]} if key == "modules_to_save" and "target_modules" in changes else {}
        lora.attach(load(bases("tied")), settings(**given | targets), rows, deepspeed=False)
    for inside in [way.partition(": ")[2].split(", ") for way in caught.value.fix if way.startswith("name layers in it")]:
        lora.attach(
            load(bases("tied")), settings(modules_to_save=[name for name in inside if name.endswith("proj")][:1]), rows, deepspeed=False
        )


@helps("models/lora.py", "tuner.modules_to_save=[{}] in its place", "train_new_tokens=never")
def test_rows_and_an_adapter_on_one_table_are_refused(bases):
    with pytest.raises(ConfigError, match="lm_head would get an adapter and") as told:
        lora.attach(load(bases("untied")), settings(target_modules=["q_proj", "lm_head"]), [5], deepspeed=False)
    assert told.value.fix == ["tuner.modules_to_save=[lm_head] in its place", "train_new_tokens=never"]
    lora.attach(load(bases("untied")), settings(target_modules=["q_proj"], modules_to_save=["lm_head"]), [5], deepspeed=False)
    lora.attach(load(bases("untied")), settings(target_modules=["q_proj", "lm_head"]), [], deepspeed=False)  # never finds rows to train


@helps("models/lora.py", "tuner=lora")
def test_a_quantized_layer_is_not_trained_whole(bases):
    model = load_model(bases("tied"), quantization=nf4_config(double_quant=True))
    with pytest.raises(ConfigError, match="down_proj is quantized") as told:
        lora.attach(model, settings("qlora", double_quant=True, modules_to_save=["down_proj"]), [], deepspeed=False)
    assert told.value.fix == ["tuner.modules_to_save=[]", "tuner=lora"]
    lora.attach(model, settings("qlora", double_quant=True, modules_to_save=[]), [], deepspeed=False)
    lora.attach(load(bases("tied")), settings(modules_to_save=["down_proj"]), [], deepspeed=False)


# ---- settings that contradict each other


@pytest.mark.parametrize(
    "kind, changes, words",
    [
        ("lora", {"init": "pissa", "dora": True}, "init=pissa takes its part out of the base"),
        ("lora", {"init": "olora", "dora": True}, "init=olora takes"),
        ("lora", {"init": "pissa", "dropout": 0.05}, "dropout=0.05 would drop parts of the base's own weights"),
        ("lora", {"init": "orthogonal", "rank": 7}, "must be even, not 7"),
        ("lora", {"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]}, "both name q_proj"),
        ("qlora", {"init": "pissa"}, "here they are 4-bit"),
        ("qlora", {"init": "orthogonal"}, "here they are 4-bit"),
        ("lora", {"lora_plus": 0.0}, "greater than 0"),
    ],
    ids=str,
)
def test_contradictions_are_found_before_anything_is_read(kind, changes, words):
    with pytest.raises(ValueError, match=words):
        settings(kind, **changes)


def test_what_zero3_and_gptq_cannot_have():
    for changes in ({"dora": True}, {"init": "pissa"}, {"init": "olora"}):
        with pytest.raises(ConfigError, match="ZeRO-3 has partitioned"):
            rules.check(settings(**changes), zero_stage=3, quantization=None, where="")
        rules.check(settings(**changes), zero_stage=2, quantization=None, where="")
    rules.check(
        settings(rslora=True, init="orthogonal", lora_plus=4.0, modules_to_save=["norm"]), zero_stage=3, quantization=None, where=""
    )
    with pytest.raises(ConfigError, match="no DoRA for a GPTQ base"):
        rules.check(settings("qlora", dora=True), zero_stage=0, quantization="gptq", where="")
    rules.check(settings("qlora", dora=True), zero_stage=0, quantization=None, where="")


RESIZED = {
    "padded-both-apart": ("tied", ["embed_tokens", "lm_head"], {"pad_to_multiple_of": 64}),
    "padded-one": ("untied", ["embed_tokens"], {"pad_to_multiple_of": 64}),
    "grown-none": ("tied", None, {}),
    "fewer-both": ("roomy", ["embed_tokens", "lm_head"], {}),
    "fewer-none": ("roomy", None, {}),
}
"""an adapter made elsewhere on a vocabulary it resized: (base, modules_to_save, how it was resized); all but a row for each token is new or gone"""


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c.startswith("grown") else []) for c in RESIZED])
def test_an_adapter_of_a_resized_vocabulary_is_merged_as_peft_merges_it(case, bases, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    kind, whole, how = RESIZED[case]
    base = bases("untied" if kind == "roomy" else kind)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if kind == "roomy":
        roomy = load(base)
        roomy.resize_token_embeddings(len(tokenizer) + 90)
        roomy.save_pretrained(shutil.copytree(base, tmp_path / "base"))
        base = tmp_path / "base"
    tokenizer.add_special_tokens({"extra_special_tokens": [f"<|new_{i}|>" for i in range(5)]})
    torch.manual_seed(3)
    model = load(base)
    model.resize_token_embeddings(len(tokenizer), **how)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], modules_to_save=whole))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    out = merged(base, tmp_path / "adapter", tmp_path)
    ours, theirs = weights(out), model.merge_and_unload()
    rows = theirs.get_input_embeddings().weight.shape[0]
    assert (
        json.loads((out / "config.json").read_text())["vocab_size"] == rows and f"rows becomes one of {rows:,}" in capsys.readouterr().err
    )
    one = torch.equal(theirs.get_input_embeddings().weight, theirs.get_output_embeddings().weight)
    assert ("lm_head.weight" in ours) != (one and kind == "tied")
    for name, tensor in theirs.state_dict().items():
        assert same_bytes(ours.get(name, ours["model.embed_tokens.weight"]), tensor), name


@helps("models/merging.py", "copy the tokenizer that it was trained with into its folder")
def test_an_adapter_whose_tokenizer_has_more_tokens_than_its_table_is_refused(bases, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    base = bases("untied")
    tokenizer = AutoTokenizer.from_pretrained(base)
    get_peft_model(load(base), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])).save_pretrained(tmp_path / "a")
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(tmp_path / "a")
    assert go(merge, f"outputs={tmp_path}", f"source={tmp_path / 'a'}", f"base={base}", "dry_run=true") == WrongKind.exit_code
    assert "tokenizer has 1025 tokens, its embedding 1024 rows" in capsys.readouterr().err
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "a")
    assert go(merge, f"outputs={tmp_path}", f"source={tmp_path / 'a'}", f"base={base}", "dry_run=true") == 0
