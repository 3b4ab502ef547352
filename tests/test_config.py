"""Settings: every YAML there is, every schema field, and what a person sees who mistypes one."""

import ast
import functools
import importlib
import inspect
import pkgutil
import shutil
import textwrap
import typing
from collections import Counter, defaultdict

import pytest
from conftest import ROOT, helps, refused

from src import settings
from src.core import compose
from src.core.errors import ConfigError
from src.settings import verbs

CONFIGS = ROOT / "configs"
ROOTS = sorted(p.stem for p in CONFIGS.glob("*.yaml") if p.stem != "base")
MODULES = [importlib.import_module(f"src.settings.{found.name}") for found in pkgutil.iter_modules(settings.__path__)]
SCHEMAS = sorted(
    {c for module in MODULES for c in vars(module).values() if inspect.isclass(c) and issubclass(c, verbs.Settings)},
    key=lambda c: c.__name__,
)


def schema_of(verb: str) -> type:
    return getattr(verbs, "".join(word.title() for word in verb.split("_")) + "Verb", verbs.Verb)


def composed(verb: str, *overrides: str):
    """Settings of a verb, with a value given to each required one."""
    options = tuple(o for o in overrides if o.partition("=")[0] in compose.groups_of(verb))
    missing = [key for key in required(verb, options) if not any(o.startswith(f"{key}=") for o in overrides)]
    return compose.compose(verb, [*(f"{key}=x" for key in missing), *overrides], schema_of(verb))


@functools.cache
def required(verb: str, options: tuple[str, ...]) -> list[str]:
    return [key for key, value in flat(compose._plain(compose._hydra(verb, list(options)))).items() if value == "???"]


def flat(tree: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def options() -> list[tuple[str, str, str]]:
    return [(verb, group, option) for verb in ROOTS for group, names in sorted(compose.groups_of(verb).items()) for option in sorted(names)]


def faults(verb: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose.compose(verb, list(overrides), schema_of(verb))
    return str(caught.value)


# ---- every YAML and every field


@pytest.mark.parametrize("verb", ROOTS)
def test_every_verb_composes(verb):
    cfg = composed(verb)
    assert cfg.run == "default" and cfg.outputs == "outputs"
    # What YAML holds is what the schema knows, to the last key.
    assert set(flat(cfg.model_dump())) <= set(flat(compose._plain(compose._hydra(verb, []))))


@pytest.mark.parametrize("verb, group, option", options())
def test_every_option_composes(verb, group, option):
    composed(verb, f"{group}={option}")


def test_no_yaml_is_out_of_reach():
    reached = (
        {CONFIGS / "base.yaml"}
        | {CONFIGS / f"{verb}.yaml" for verb in ROOTS}
        | {CONFIGS / group / f"{option}.yaml" for _, group, option in options()}
        | set((CONFIGS / "pipeline").glob("*.yaml"))  # recipes: tests/test_pipeline.py
    )
    assert reached == set(CONFIGS.rglob("*.y*ml"))


def test_every_yaml_is_of_a_verb_that_exists():
    for verb in ROOTS:
        assert (ROOT / "src" / f"{verb}.py").is_file() or (ROOT / "src" / verb / "__main__.py").is_file()
        assert (CONFIGS / f"{verb}.yaml").read_text().startswith(f"# python -m src.{verb}"), (
            "a config file opens with the command that runs it"
        )


@pytest.mark.parametrize("path", sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name != "pipeline"), ids=lambda p: str(p.relative_to(CONFIGS)))
def test_a_key_no_schema_knows_fails(path, tmp_path, monkeypatch):
    copy = tmp_path / "configs"
    shutil.copytree(CONFIGS, copy)
    monkeypatch.setattr(compose, "CONFIGS", copy)
    inside = path.relative_to(CONFIGS)
    text = path.read_text().replace("tracker: {}", "")
    (copy / inside).write_text(text + "\nno_such_key: 1\n")
    verb, chosen = (
        (inside.stem, [])
        if len(inside.parts) == 1
        else next((v, [f"{g}={o}"]) for v, g, o in options() if (g, o) == (inside.parts[0], inside.stem))
    )
    verb = "data" if verb == "base" else verb
    with pytest.raises(ConfigError, match="no_such_key'"):
        composed(verb, *chosen)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda c: c.__name__)
def test_fields_have_no_default_and_say_what_they_mean(schema):
    for name, field in schema.model_fields.items():
        assert field.is_required(), f"{schema.__name__}.{name} has a default; defaults live in configs/"
        assert field.description or name == "kind", f"{schema.__name__}.{name} has no docstring"
    assert schema.model_config["extra"] == "forbid" and schema.model_config["frozen"]


def test_every_field_is_read_somewhere():
    """By its name; a name that settings of several groups share, at a value that is known to be of the group's type."""
    read, typed = reads()
    names = Counter(name for schema in SCHEMAS for name in own(schema))
    unread = {f"{c.__name__}.{name}" for c in SCHEMAS for name in own(c) if name not in read}
    unread |= {f"{c.__name__}.{name}" for c in SCHEMAS for name in own(c) if names[name] > 1 and not any((f, name) in typed for f in family(c))}
    assert not unread, f"settings that no code reads: {sorted(unread)}"
    assert (verbs.Evaluation, "batch_size") in typed and (verbs.Calibration, "batch_size") not in typed, "groups are told apart"


def own(schema) -> list[str]:
    """The fields a schema adds to those it inherits, but for the name that tells options of a group apart, which pydantic reads."""
    return [name for name in schema.__annotations__ if name in schema.model_fields and name != "kind"]


def family(schema) -> list[type]:
    return [c for c in SCHEMAS if issubclass(c, schema) or issubclass(schema, c)]


def schemas_in(annotation) -> set[type]:
    """The schemas that a type names."""
    return {annotation} if annotation in SCHEMAS else set().union(*map(schemas_in, typing.get_args(annotation)))


def groups(schemas: set[type], name: str) -> set[type]:
    """What a field of these schemas holds: other schemas."""
    return set().union(*(schemas_in(c.model_fields[name].annotation) for c in schemas if name in c.model_fields))


@functools.cache
def reads() -> tuple[set[str], set[tuple[type, str]]]:
    """(every attribute that src reads, (schema, attribute) where the schema is known from annotations, isinstance, assignments, or the group's name)."""
    known = {name: found for module in MODULES for name, value in vars(module).items() if (found := schemas_in(value))}
    by_group = {name: groups(set(SCHEMAS), name) for c in SCHEMAS for name in c.model_fields}
    read, typed = set(), set()
    for path in (ROOT / "src").rglob("*.py"):
        tree, types = ast.parse(path.read_text()), defaultdict(set)
        nodes = list(ast.walk(tree))

        def of(node) -> set[type]:
            if isinstance(node, ast.Attribute):
                return groups(of(node.value), node.attr) | types[ast.unparse(node)] or by_group.get(node.attr, set())
            if isinstance(node, ast.Name):
                return types[node.id] or by_group.get(node.id, set())
            return set().union(*map(of, ast.iter_child_nodes(node))) if isinstance(node, ast.Tuple | ast.IfExp | ast.BoolOp | ast.Subscript | ast.Call) else set()

        def named(node) -> set[type]:
            return set().union(*(known.get(getattr(n, "id", getattr(n, "attr", "")), set()) for n in ast.walk(node)))

        for _ in range(3):  # a name may be given by one that is given further down
            for node in nodes:
                if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
                    types[node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)] |= named(node.annotation)
                elif isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                    types[ast.unparse(node.args[0])] |= named(node.args[1])
                elif isinstance(node, ast.Assign | ast.NamedExpr | ast.For | ast.comprehension):
                    value = node.iter if isinstance(node, ast.For | ast.comprehension) else node.value
                    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                        pairs = zip(target.elts, value.elts) if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) else [(target, value)]
                        for one, given in pairs:
                            for name in one.elts if isinstance(one, ast.Tuple) else [one]:
                                types[ast.unparse(name)] |= of(given)
        for node in nodes:
            value, name = (node.value, node.attr) if isinstance(node, ast.Attribute) else (None, None)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and isinstance(node.args[1], ast.Constant):
                value, name = node.args[0], node.args[1].value
            if value and path.name != "verbs.py":
                read.add(name)
                typed |= {(c, name) for c in of(value)}
    for schema in SCHEMAS:  # a schema's own methods, but for those that check what is given
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(schema)))):
            if isinstance(node, ast.FunctionDef) and "validator" not in "".join(map(ast.unparse, node.decorator_list)):
                typed |= {(schema, n.attr) for n in ast.walk(node) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "self"}
    return read, typed


@pytest.mark.parametrize("path", sorted((CONFIGS / "target").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_target_is_named_as_its_file(path):
    assert composed("deploy", f"target={path.stem}").target.name == path.stem


def test_every_schema_is_used():
    text = "\n".join(p.read_text() for p in (ROOT / "src").rglob("*.py"))
    for schema in SCHEMAS:
        assert text.count(schema.__name__) > 1, f"{schema.__name__} is defined and never used"


def test_help_names_every_setting_with_its_meaning():
    for verb in ROOTS:
        text = compose.help_text(verb, "About it.", schema_of(verb))
        for key in flat(compose._plain(compose._hydra(verb, []))):
            assert f"  {key}=" in text, f"{verb} --help does not say {key}"
        for group, names in compose.groups_of(verb).items():
            assert f"{group}={'|'.join(sorted(names))}" in text


# ---- what a person mistypes


@helps("core/compose.py", "python -m src.{} --help lists every setting")
def test_all_faults_are_told_at_once():
    told = faults("finetune", "tuner.rnk=8", "train.epoch=3", "modl.path=x", "train.precision=fp8", "train.warmup=2")
    for words in (
        "5 faults",
        "'tuner.rnk'; did you mean 'tuner.rank'?",
        "'train.epoch'; did you mean 'train.epochs'?",
        "'modl.path'; did you mean 'model.path'?",
    ):
        assert words in told
    assert "train.precision=fp8" in told and "'bf16'" in told
    assert "train.warmup=2" in told and "less than 1" in told
    assert "python -m src.finetune --help lists every setting" in told
    listed = compose.help_text("finetune", "", verbs.FinetuneVerb)
    assert all(f"{key}=" in listed for key in ("tuner.rank", "train.epochs", "model.path", "train.precision", "train.warmup"))


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("tuner.r=8", "tuner.rank"),
        ("lora_alpha=16", "tuner.alpha"),
        ("train.lr=1e-4", "tuner.learning_rate"),
        ("learning_rate=1e-4", "tuner.learning_rate"),
        ("num_train_epochs=3", "train.epochs"),
        ("train.cutoff_len=512", "train.max_length"),
        ("per_device_train_batch_size=2", "train.micro_batch_size"),
        ("model_name_or_path=x", "model.path"),
        ("gradient_accumulation_steps=4", "train.global_batch_size"),
        ("output_dir=x", "run"),
        ("warmup_ratio=0.1", "train.warmup"),
    ],
)
def test_the_names_of_other_trainers_lead_to_ours(theirs, ours):
    assert f"did you mean '{ours}'?" in faults("finetune", theirs)


@pytest.mark.parametrize(
    "override, words",
    [
        ("tuner=loraa", "did you mean 'lora'?; there is full, lora, qlora"),
        ("deepspeed=zero9", "there is none, zero2, zero2_offload, zero3, zero3_offload"),
        ("tracker=[wandb,comet]", "no such tracker"),
        ("tuner.rank=8,16", "sweep"),
        ("tuner=lora,full", "sweep"),
        ("tuner.rank=range(1,4)", "sweep"),
        ("+tuner.rank=8", "write tuner.rank=VALUE"),
        ("++tuner.rank=8", "write tuner.rank=VALUE"),
        ("~tuner.rank", "not added or removed"),
        ("+tuner=full", "write tuner=VALUE"),
        ("++tuner=full", "write tuner=VALUE"),
        ("~tracker", "not added or removed"),
        ("tuner@x=lora", "not added or removed"),
        ("tuner=null", "no such tuner"),
        ("tracker=[]", "tracker"),
        ("--force", "'--force': flags belong to the launchers"),
        ("force", "'force': not of the form key=value"),
        ("=3", "unknown setting ''"),
        ("model.path@x=3", "not added or removed"),
        ("tuner.rank=0", "tuner.rank=0: "),
        ("tuner.rank=", "tuner.rank"),
        ("tuner.rank=many", "tuner.rank=many: "),
        ("tuner.rank=1.5", "tuner.rank=1.5: "),
        ("train.max_grad_norm=-1", "train.max_grad_norm=-1: "),
        ("train.epochs=nan", "train.epochs"),
        ("train.epochs=inf", "train.epochs"),
        ("tuner.learning_rate=nan", "tuner.learning_rate"),
        ("tuner.learning_rate=inf", "tuner.learning_rate"),
        ("run=../elsewhere", "run=../elsewhere: "),
        ("run=''", "run"),
        ("model=null", "model"),
        ("model.path=null", "model.path"),
        ("tuner={}", "tuner"),
        ("hydra.run.dir=x", "unknown setting 'hydra.run.dir'"),
        ("model.path=${nope}", "nope"),
        ("launch.nnodes=2", "master_port"),
        ("launch.node_rank=1", "node_rank 1"),
    ],
)
def test_what_is_not_a_setting_is_refused(override, words):
    told = faults("finetune", override)
    assert words in told
    assert len(told.splitlines()) < 10


def test_a_key_of_another_option_says_whose_it_is():
    assert "it belongs to tuner=lora or qlora" in faults("finetune", "tuner=full", "tuner.rank=8")
    assert "it belongs to tuner=qlora" in faults("finetune", "tuner.double_quant=true")


def test_what_must_be_given_is_said():
    told = faults("aux_files")
    assert "source: must be given, as source=VALUE" in told and "target: must be given, as target=VALUE" in told


def test_no_record_left_to_train_on():
    assert "val + calib must stay below 1" in faults("data", "data.val=0.6", "data.calib=0.4")


@pytest.mark.parametrize("value", ["a b/c.json", "데이터/채팅.json", "x=y.json", "it's.json", "a,b.json", "(1).json", "$HOME"])
def test_any_path_can_be_given(value):
    quoted = "'" + value.replace("'", "\\'") + "'"
    assert composed("data", f"data.path={quoted}").data.path == value


@pytest.mark.parametrize("name", ["2024_01_05", "1e3", "007", "12", "v1.0", "true"])
def test_a_run_is_named_as_it_was_typed(name):
    try:
        assert composed("data", f"run={name}").run == name
    except ConfigError as error:
        assert f"run={name}" in str(error).replace("run=True", "run=true")


def test_a_fault_on_the_command_line_leaves_with_its_code(call, tmp_path):
    refused(call("data", "data.vall=0.1"), ConfigError, "data.val", "--help")
    assert not (tmp_path / "outputs").exists()


def test_the_last_of_two_values_wins():
    assert composed("finetune", "tuner.rank=4", "tuner.rank=5").tuner.rank == 5


def test_settings_never_change_in_validation():
    cfg = composed("finetune", "tuner.rank=5", "train.epochs=3", "tuner.target_modules=[q_proj]")
    assert (cfg.tuner.rank, cfg.train.epochs, cfg.tuner.target_modules) == (5, 3, ["q_proj"])
    with pytest.raises(ValueError, match="frozen"):
        cfg.tuner.rank = 6


# fmt: off
OUTSIDE_THE_KEY = [
    "AnswerVerb.base", "AnswerVerb.endpoint", "AnswerVerb.environment", "AuxFilesVerb.source", "AuxFilesVerb.target",
    "AuxFilesVerb.tokenizer", "Axera.board", "Axera.check_level", "Axera.check_prompt", "Axera.image",
    "Axera.parallel", "Axera.toolchain", "Calibration.text", "Data.dedupe", "Data.hub_split",
    "Data.path", "Data.private", "Data.revision", "Data.subset", "Data.unseen",
    "DataVerb.preview", "Deepspeed.config", "DeployVerb.dataset", "DeployVerb.gate", "DeployVerb.preview",
    "DistillVerb.budget", "DistillVerb.estimate", "DistillVerb.retry_set_aside", "Endpoint.timeout", "EndpointTeacher.batch",
    "EndpointTeacher.batch_size", "EndpointTeacher.key_env", "EndpointTeacher.limits", "EndpointTeacher.url", "EvaluateVerb.dataset",
    "EvaluateVerb.endpoint", "EvaluateVerb.gate", "EvaluateVerb.numerics", "EvaluateVerb.parent", "EvaluateVerb.target",
    "Evaluation.general", "Evaluation.json_schema", "Evaluation.tasks", "FinetuneVerb.teacher", "LlamaCpp.environment",
    "LlamaCpp.kv_cache", "LocalTeacher.path", "MergeVerb.base", "MergeVerb.max_loss_change", "Mobilint.board",
    "Mobilint.device", "Mobilint.image", "Mobilint.python", "Mobilint.sdk", "Mobilint.texts",
    "Model.path", "Model.revision", "Openvino.board", "Openvino.environment", "Overlap.sets",
    "PretrainVerb.tokenizer", "Prompts.path", "Prompts.private", "QuantizeVerb.dataset", "QuantizeVerb.max_kl",
    "QuantizeVerb.min_agreement", "RunCode.at_once", "RunCode.isolation", "SourcedVerb.source", "Teacher.path",
    "TextVerb.private", "TextVerb.text", "TrackedVerb.tracker", "TrainLoop.attention", "TrainLoop.checkpoint_minutes",
    "TrainLoop.checkpoint_steps", "TrainLoop.chunked_loss", "TrainLoop.compile", "TrainLoop.eval_rows", "TrainLoop.eval_steps",
    "TrainLoop.gradient_checkpointing", "TrainLoop.kernels", "TrainLoop.log_steps", "TrainLoop.micro_batch_size", "TrainLoop.packing",
    "TrainLoop.samples", "TrainingVerb.launch", "TrainingVerb.max_loss_change", "Verb.dry_run", "Verb.force",
    "Verb.outputs", "Verb.room", "Verb.run",
]
# fmt: on
"""settings that take no part in an artifact's key: they change where or how fast, or name an input whose content is a parent"""


def test_which_settings_are_outside_the_key():
    """One more is a decision: a setting that changes what is made, and is not in the key, leaves an old result standing for a new one."""
    found = {
        f"{schema.__name__}.{name}"
        for schema in SCHEMAS
        for name in schema.__annotations__
        if name in schema.model_fields and (schema.model_fields[name].exclude or schema.model_fields[name].exclude_if)
    }
    assert sorted(found) == OUTSIDE_THE_KEY


@pytest.mark.parametrize(
    "typed, path",
    [
        ("질문.csv", "질문.csv"),
        ("/home/나/내 대화.json", "/home/나/내 대화.json"),
        ("한국어/파일=1.json", "한국어/파일=1.json"),
        ("[质问.csv,b é.csv]", ["质问.csv", "b é.csv"]),
        ("'질문, 답.csv'", "질문, 답.csv"),
    ],
)
def test_letters_of_any_script_need_no_quotes(typed, path):
    """Hydra's grammar knows those of ASCII alone."""
    assert composed("data", f"data.path={typed}").data.path == path


def test_names_of_columns_in_any_script():
    assert composed("data", "data.columns={prompt:질문,response:답변}").data.columns == {"prompt": "질문", "response": "답변"}
    with pytest.raises(ConfigError, match="질문"):
        composed("data", "data.path={질문")
