"""The compile job: a Python file that calls Mobilint's `mxq_compile` with the keywords of one API generation.

Keywords and values are those of Mobilint's tutorial scripts at v0.11.0.1, v0.12.0.0, v1.0.0, v1.1.2 and v1.3.0, and for 1.2 those of 1.1 with the two
that its model zoo gives 1.2 (docs/mobilint.md). The job refuses to run under another version than it was written for, since the compiler ignores
keywords it does not know.
"""

import hashlib
from pathlib import Path

from src.deploy.mobilint.plan import DEVICES, SCHEMES, CompilePlan
from src.deploy.mobilint.toolchain import PACKAGES
from src.deploy.vendor import COMPILED, whole

JOB = "compile_job.py"
DONE = "Model compiled successfully."
CALIBRATION = "calibration"
OTHER_API = "version mismatch"
"""how the job begins its complaint where it is run under a compiler of another API"""
CORE_TOKENS = 128
"""tokens a core takes at once, in every script of Mobilint's from 1.0 on"""

HEAD = '''"""Compiles ./model with Mobilint's {package}, API {api}, into ./{mxq}. Run it in this folder: python {job}"""

import hashlib
import importlib
import importlib.metadata
import json
import os
import time
from pathlib import Path

PACKAGE = "{package}"
HERE = Path(__file__).resolve().parent
os.chdir(HERE)  # the compiler leaves spinWeight/ in the working directory
MODEL = str(HERE / "model")
CALIBRATION = str(HERE / "{calibration}")
MXQ = HERE / "{mxq}"
DEVICE = "{device}"
BITS = {bits}  # of every weight but the value projection's
VALUE_BITS = {value_bits}
CONTEXT = {context}  # tokens of prompt and answer together
CORE_TOKENS = {core_tokens}  # taken at once by a core
TRUST_REMOTE_CODE = {trust}
{gpu}
try:
    version = importlib.metadata.version(PACKAGE)
except importlib.metadata.PackageNotFoundError:
    version = str(getattr(importlib.import_module(PACKAGE), "__version__", "0.0"))
print(f"{{PACKAGE}} {{version}}, API {api}", flush=True)
{guard}
'''
GUARD = """if not version.startswith("{api}."):
    raise SystemExit(f"{other}: this job is for API {api}; {{PACKAGE}} {{version}} has another and would ignore its keywords without a word")
"""
SAYS = """
count = len(list(Path(CALIBRATION).glob("*.npy")))
print(f"compiling {MODEL} on {DEVICE}: {BITS}-bit weights, value projection {VALUE_BITS}, context {CONTEXT}, {count} calibration files", flush=True)
began = time.time()
"""
QUBEE = """
from qubee import mxq_compile
{says}
mxq_compile(
    model=MODEL,
    calib_data_path=CALIBRATION,
    save_path=str(MXQ),
    backend="torch",
    singlecore_compile=True,
    {output},
    hf_config={{
        "library": "transformers",
        "loader": "AutoModelForCausalLM",
        "tokenizer": "AutoTokenizer",
        "model_args": (),
        "model_kwargs": {{
            "torch_dtype": "auto",
            "device_map": "auto" if DEVICE == "gpu" else "cpu",
            "trust_remote_code": TRUST_REMOTE_CODE,
        }},
        "tokenizer_args": (),
        "tokenizer_kwargs": {{}},
    }},
    use_gpu_only_for_calibration=DEVICE == "gpu",
    weight_dtype="bfloat16",
    device=DEVICE,
)
"""
QBCOMPILER_10 = """
from qbcompiler import (
    BitConfig,
    CalibrationConfig,
    LlmConfig,
    get_advanced_quantization_config,
    get_equivalent_transformation_config,
    get_quantization_config,
    get_search_weight_scale_config,
    mxq_compile,
)
{says}
mxq_compile(
    model=MODEL,
    calib_data_path=CALIBRATION,
    save_path=str(MXQ),
    backend="torch",
    device=DEVICE,
    llm_config=LlmConfig.from_kwargs(
        llm_config_apply=True,
        max_data_length=CONTEXT,
        max_sequence_length=CONTEXT,
        max_cache_length=CONTEXT,
        max_core_data_length=CORE_TOKENS,
        use_full_seq_length=True,
        batch_size=1,
        npu_core_ids=[0],
    ),
    quantization_config=get_quantization_config(
        calibration=CalibrationConfig.from_kwargs(
            quantization_method=1, quantization_output=0, quantization_mode=1, percentile=0.9999, topk_ratio=0.01
        ),
        bit=BitConfig.from_kwargs(
            query_weight_bits=BITS,
            key_weight_bits=BITS,
            value_weight_bits=VALUE_BITS,
            output_weight_bits=BITS,
            ffn_weight_bits=BITS,
            head_weight_bits=BITS,
        ),
    ),
    advanced_quantization_config=get_advanced_quantization_config(
        {advanced}
    ),
    hf_config={{
        "library": "transformers",
        "loader": "AutoModelForCausalLM",
        "tokenizer": "AutoTokenizer",
        "model_args": (),
        "model_kwargs": {{"trust_remote_code": TRUST_REMOTE_CODE}},
        "tokenizer_args": (),
        "tokenizer_kwargs": {{"trust_remote_code": TRUST_REMOTE_CODE}},
    }},
)
"""
EIGHT_BIT_10 = """equivalent_transformation=get_equivalent_transformation_config(),
        search_weight_scale=get_search_weight_scale_config(apply=False),"""
FOUR_BIT_10 = """equivalent_transformation=get_equivalent_transformation_config(
            norm_conv_apply=True,
            qk_apply=True,
            ud_apply=True,
            vo_apply=True,
            ff_multi_lut_apply=True,
            spin_r1_apply=True,
            spin_r2_apply=True,
            qk_rotation_apply=True,
            optimize_ffn_apply=True,
        ),
        search_weight_scale=get_search_weight_scale_config(apply=True, query=True, key=True, value=True, out=True, ffn=True),"""
QUANTIZED_11 = """calibration_config=CalibrationConfig(method=1, output=0, mode=1),
    bit_config=BitConfig(
        transformer=BitConfig.Transformer(weight=Weight(query=BITS, key=BITS, value=VALUE_BITS, output=BITS, ffn=BITS, head=BITS))
    ),"""
"""of 1.1 and later"""
QBCOMPILER_11 = """
from qbcompiler import BitConfig, CalibrationConfig, {more}LlmConfig{last}, mxq_compile
{says}
Weight, Attributes = BitConfig.Transformer.Weight, LlmConfig.Attributes
mxq_compile(
    model=MODEL,
    calib_data_path=CALIBRATION,
    save_path=str(MXQ),
    backend="torch",
    device=DEVICE,
    {quantized}
    llm_config=LlmConfig(
        apply=True,
        attributes=Attributes(
            max_data_length=CONTEXT,
            max_sequence_length=CONTEXT,
            max_cache_length=CONTEXT,
            max_core_data_length=CORE_TOKENS,
            calibration=Attributes.Calibration(use_full_seq_length=True),
            runtime=Attributes.Runtime(batch_size=1, npu_core_ids=[0]),
        ),
    ),
    hf_config={{
        "library": "transformers",
        "loader": "AutoModelForCausalLM",
        "tokenizer": "AutoTokenizer",
        "model_args": (),
        "model_kwargs": {{"trust_remote_code": TRUST_REMOTE_CODE}},
        "tokenizer_args": (),
        "tokenizer_kwargs": {{"trust_remote_code": TRUST_REMOTE_CODE}},
    }},{chip}{four_bit}
)
"""
CHIP_12 = """
    target_device="{device}",
    inference_scheme="{scheme}","""
QBCOMPILER_13 = """
from qbcompiler import BitConfig, CalibrationConfig, EquivalentTransformationConfig, LlmConfig{last}, mblt_compile, mxq_compile
from qbcompiler.model_dict.parser.backend.torch.input_capture import capture_forward_inputs
from transformers import AutoModelForCausalLM, AutoTokenizer
{says}
DEVICE_NAME = "{device}"
MBLT = str(HERE / "model.mblt")
model = AutoModelForCausalLM.from_pretrained(MODEL, trust_remote_code=TRUST_REMOTE_CODE).eval()
tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=TRUST_REMOTE_CODE)
with capture_forward_inputs(model) as feed:
    model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=1, do_sample=False)
feed["inputs_embeds"] = model.get_input_embeddings()(feed["input_ids"]).detach()
feed["input_ids"] = feed["attention_mask"] = None
mblt_compile(
    model=model,
    backend="torch",
    target_device=DEVICE_NAME,
    mblt_save_path=MBLT,
    feed_dict=dict(feed),
    dynamic_axes={{"inputs_embeds": [-2]}},
)
del model, feed
Weight, Attributes = BitConfig.Transformer.Weight, LlmConfig.Attributes
mxq_compile(
    model=MBLT,
    target_device=DEVICE_NAME,
    calib_data_path=CALIBRATION,
    save_path=str(MXQ),
    device=DEVICE,
    inference_scheme="{scheme}",
    {quantized}
    llm_config=LlmConfig(
        apply=True,
        attributes=Attributes(
            max_sequence_length=CONTEXT,
            max_cache_length=CONTEXT,
            max_core_data_length=CORE_TOKENS,
            calibration=Attributes.Calibration(use_full_seq_length=True),
            runtime=Attributes.Runtime(batch_size=1, npu_core_ids=[0]),
        ),
    ),{transformation}
)
"""
EIGHT_BIT_13 = """
    equivalent_transformation_config=EquivalentTransformationConfig(spin_r1=EquivalentTransformationConfig.SpinR1(apply=True)),"""
FOUR_BIT_11 = """
    search_weight_scale_config=SearchWeightScaleConfig(
        apply=True,
        transformer=SearchWeightScaleConfig.Transformer(query=True, key=True, value=True, out=True, ffn=True),
    ),
    equivalent_transformation_config=EquivalentTransformationConfig(
        norm_conv=EquivalentTransformationConfig.NormConv(apply=True),
        qk=EquivalentTransformationConfig.Qk(apply=True),
        ud=EquivalentTransformationConfig.Ud(apply=True),
        vo=EquivalentTransformationConfig.Vo(apply=True),
        feed_forward_multi_lut=EquivalentTransformationConfig.FeedForwardMultiLut(apply=True),
        spin_r1=EquivalentTransformationConfig.SpinR1(apply=True),
        spin_r2=EquivalentTransformationConfig.SpinR2(apply=True),
        qk_rotation=EquivalentTransformationConfig.QkRotation(apply=True),
        optimize_ffn=EquivalentTransformationConfig.OptimizeFfn(apply=True),
    ),"""
TAIL = f'''
if not MXQ.is_file():
    raise SystemExit(f"mxq_compile returned without an error, but made no {{MXQ.name}}")
record = {{
    "package": PACKAGE,
    "version": version,
    "seconds": round(time.time() - began, 1),
    "job": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
}}
(HERE / "{COMPILED}.partial").write_text(json.dumps(record) + "\\n")
os.replace(HERE / "{COMPILED}.partial", HERE / "{COMPILED}")
print(f"{{MXQ.name}}: {{MXQ.stat().st_size:,}} bytes")
print("{DONE}")
'''


def text(plan: CompilePlan) -> str:
    """The job's Python source for a plan's API generation."""
    api, package = plan.compiler.api, plan.compiler.package
    guard = GUARD.format(api=api, other=OTHER_API) if plan.guarded else ""
    gpu = 'os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")\n' if plan.device == "gpu" and api in ("0.11", "0.12", "1.0") else ""
    head = HEAD.format(
        package=package,
        api=api,
        mxq=plan.mxq,
        job=JOB,
        calibration=CALIBRATION,
        device=plan.device,
        bits=plan.bits,
        value_bits=plan.value_bits,
        context=plan.context,
        core_tokens=min(CORE_TOKENS, plan.context),
        trust=plan.trust,
        gpu=gpu,
        guard=guard,
    )
    return head + _call(api, plan.chip, four_bit=plan.bits == 4) + TAIL


def _call(api: str, chip: str, *, four_bit: bool) -> str:
    if PACKAGES[api] == "qubee":
        return QUBEE.format(says=SAYS, output='quant_output="layer"' if api == "0.11" else "quantization_output=0")
    if api == "1.0":
        return QBCOMPILER_10.format(says=SAYS, advanced=FOUR_BIT_10 if four_bit else EIGHT_BIT_10)
    last, board = ", SearchWeightScaleConfig" if four_bit else "", {"device": DEVICES[chip], "scheme": SCHEMES[chip]}
    if api == "1.3":
        return QBCOMPILER_13.format(
            says=SAYS, quantized=QUANTIZED_11, last=last, transformation=FOUR_BIT_11 if four_bit else EIGHT_BIT_13, **board
        )
    more = "EquivalentTransformationConfig, " if four_bit else ""
    named = CHIP_12.format(**board) if api == "1.2" else ""
    return QBCOMPILER_11.format(
        says=SAYS, quantized=QUANTIZED_11, more=more, last=last, chip=named, four_bit=FOUR_BIT_11 if four_bit else ""
    )


def container(out: Path) -> str:
    """Name of the container that compiles for a bundle; one at a time does."""
    return f"boardwalk-mobilint-{hashlib.sha256(str(out.absolute()).encode()).hexdigest()[:12]}"


def write(plan: CompilePlan, work: Path) -> str:
    """Write the job into the folder it runs in; returns its sha256, by which its record is known again."""
    source = text(plan)
    with whole(work / JOB) as file:
        file.write_text(source, encoding="utf-8")
    return hashlib.sha256(source.encode()).hexdigest()
