"""Run the compile job under watch and judge what it made; each known way to fail has its own message."""

import re
import shutil
import time
from pathlib import Path

from src.core.errors import MEMORY, NO_SPACE, BadData, NoRoom, ToolFailed, Unfinished, UserError
from src.core.files import read_json, sha256, write_json
from src.core.log import say, size
from src.deploy.mobilint import job, toolchain
from src.deploy.mobilint.plan import OWN_TEXT, CompilePlan
from src.deploy.vendor import COMPILED, Done, hand_back, image_id, run
from src.settings.targets import Mobilint

LOG = "compile.log"
OWN_LINE = re.compile(r"(qubee|qbcompiler) \S+, API [\d.]+|compiling .* calibration files")
PLAUSIBLE = 0.8
"""least share of the weights' own bytes that a compiled file has"""


def prepared(plan: CompilePlan, work: Path) -> Unfinished:
    """What to do where there is no compiler."""
    return Unfinished(
        f"all but the compile is made and kept; Mobilint's compiler is {plan.compiler}",
        where=str(work),
        fix=[
            *toolchain.install(plan.chip),
            f"run it where the compiler is: copy that folder there, `python {job.JOB}` in it, copy the folder back here",
            "then run the same command again: it goes on from here",
        ],
    )


def compiled_before(plan: CompilePlan, work: Path, digest: str) -> dict | None:
    """The record of a compile by just this job whose file is still there, made by an earlier run or by hand elsewhere; else None."""
    try:
        record = read_json(work / COMPILED) if (work / COMPILED).is_file() else {}
    except BadData:
        return None
    return record if record.get("job") == digest and (work / plan.mxq).is_file() else None


def compile_model(plan: CompilePlan, target: Mobilint, work: Path, digest: str, container: str) -> dict:
    """The record of a compile into work/<mxq>: {"package", "version", "seconds", "job"}, and "argv" and "image" where it ran here.

    digest: sha256 of the job. container: name of the container, where it runs in one. Raises Unfinished where there is no compiler, ToolFailed where the compile failed.
    """
    record = compiled_before(plan, work, digest)
    if record:
        say(f"compile: {plan.mxq} is there from an earlier run, by {record['package']} {record['version']}")
    else:
        if plan.compiler.missing:
            raise prepared(plan, work)
        record = _run(plan, target, work, digest, container)
    check_file(plan, work / plan.mxq)
    return record


def _run(plan: CompilePlan, target: Mobilint, work: Path, digest: str, container: str) -> dict:
    for stale in (work / plan.mxq, work / COMPILED):
        stale.unlink(missing_ok=True)
    if (work / "spinWeight").is_dir():
        shutil.rmtree(work / "spinWeight")  # an earlier compile's rotation would not fit this one's weights
    argv = toolchain.command_line(target, plan.device, work.resolve(), job.JOB, container)
    began = time.monotonic()
    try:
        done = run(
            argv,
            work / LOG,
            cwd=work,
            env={"PYTHONUNBUFFERED": "1"},
            watch=(job.DONE,),
            line=_progress(),
            container=container if target.image else None,
        )
    finally:
        if target.image:
            hand_back(target.image, work)
    record = compiled_before(plan, work, digest)
    if done.code or job.DONE not in done.seen or record is None:
        raise failure(plan, done, work / LOG)
    record |= {"argv": argv, "image": image_id(target.image) if target.image else None, "seconds": round(time.monotonic() - began, 1)}
    write_json(work / COMPILED, record)
    return record


def _progress():
    """Says what the job says of itself, each line once; the compiler's own lines go to the log."""
    said = set()

    def line(text: str) -> None:
        if OWN_LINE.fullmatch(text) and text not in said:
            said.add(text)
            say(f"  {text}")

    return line


def check_file(plan: CompilePlan, file: Path) -> None:
    """Raises ToolFailed where the compiled file is too small to hold the weights."""
    values = plan.values * plan.bits // 8
    got = file.stat().st_size
    if got < values * PLAUSIBLE:
        raise ToolFailed(
            f"{file.name} has {size(got)}; the model's weights alone are {size(values)} in {plan.bits} bits",
            where=str(file),
            fix=f"free space and remove {file}, then run the same command again: it compiles anew",
        )


def failure(plan: CompilePlan, done: Done, log: Path) -> UserError:
    """The error that a failed compile's log and exit code tell."""
    what, fix = _reason(plan, done)
    said = [line for line in done.tail.splitlines() if not line.startswith((" ", "Traceback"))]
    last = "\n".join(f"    {line}" for line in said[-3:])
    kind = NoRoom if "No space left on device" in done.tail else ToolFailed
    return kind(f"{what}\n  its last lines:\n{last}" if last else what, where=str(log), fix=fix)


def _reason(plan: CompilePlan, done: Done) -> tuple[str, list[str]]:
    """(what happened, ways out), most telling first."""
    tail, package, name = done.tail, plan.compiler.package, str(plan.compiler)
    if done.code == 137:
        return "the compiler was killed (exit code 137), most likely for lack of memory", [
            f"target.samples={max(1, plan.samples // 2)} target.max_tokens={max(plan.low, plan.high // 2)} calibrates on less",
            MEMORY,
        ]
    if "No space left on device" in tail:
        return "the disk is full", NO_SPACE
    if "zeropoint=" in tail and "out of range" in tail:
        return "a layer's values cannot be quantized: its activations on the calibration data are not finite, or all the same", [
            *["target.weight_type=w8"] * (plan.bits == 4),
            OWN_TEXT,
        ]
    if job.OTHER_API in tail:
        return f"version mismatch: the job was written for API {plan.compiler.api}, and another version runs it", [
            "run the same command again: it asks the compiler for its version anew",
            "target.python=ENV/bin/python names the compiler that was meant",
        ]
    if "CUDA out of memory" in tail or "OutOfMemoryError" in tail:
        return "the GPU's memory does not do", [
            "target.device=cpu",
            f"target.max_tokens={max(plan.low, plan.high // 2)} calibrates on shorter sequences",
        ]
    cuda = ("No CUDA GPUs", "not compiled with CUDA", "CUDA driver", "NVIDIA driver", "CUDA error", "could not select device driver")
    if any(text in tail for text in cuda) or ("CUDA" in tail and "not available" in tail):
        return "there is no CUDA where the compiler runs", ["target.device=cpu"]
    if missing := _between(tail, "No module named '", "'"):
        return f"the package '{missing}' is missing where the compiler runs", [
            f"pip install {missing.split('.')[0]} in that environment" if missing != package else toolchain.install(plan.chip)[0],
            "target.python=ENV/bin/python names another one",
        ]
    if any(text in tail for text in ("unexpected keyword argument", "missing 1 required", "cannot import name")) or (
        "has no attribute" in tail and "Error" in tail
    ):
        return f"{name} does not know what its API has by its version", [
            *(
                f"target.sdk={api}"
                for api in reversed(toolchain.PACKAGES)
                if api != plan.compiler.api and toolchain.PACKAGES[api] == package
            ),
        ]
    if "does not recognize this architecture" in tail:
        return f"the transformers beside the compiler is too old for '{plan.config['model_type']}'", [
            "pip install transformers==4.57.1 in that environment"
        ]
    if done.code == 0 or "but made no" in tail:
        return f"the compiler ended without an error, but made no {plan.mxq}", []
    return f"the compiler failed with exit code {done.code}", []


def _between(text: str, before: str, after: str) -> str:
    return text.rpartition(before)[2].partition(after)[0] if before in text else ""


def summary(plan: CompilePlan, record: dict, work: Path) -> dict:
    """compile.json: what ran, where it is of use to know, and what came of it."""
    return {
        **record,
        "api": plan.compiler.api,
        "weight_type": plan.weight_type,
        "device": plan.device,
        "context_len": plan.context,
        "mxq": {"file": plan.mxq, "size": (work / plan.mxq).stat().st_size, "sha256": sha256(work / plan.mxq)},
    }
