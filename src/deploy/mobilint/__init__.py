"""deploy target=mobilint_aries and mobilint_regulus: a model folder becomes the folder that Mobilint's runtime loads, through the vendor's own compiler.

Around the compiler, which is closed and not in any package registry, everything is written here: the embedding table, calibration data from the
run's own conversations or from texts, the compile job for the installed version, the rotated table of 4-bit weights, the runtime folder.
"""

import shlex
import shutil
from pathlib import Path

from src.core import processes
from src.core.artifact import Artifact
from src.core.files import write_json
from src.deploy import contract, preflight
from src.deploy.mobilint import calibration, compile, job, plan, runtime, toolchain, transformers4
from src.deploy.vendor import WORK, finish, whole, work_folder
from src.models import exact_sum
from src.models.loading import load_tokenizer
from src.settings.targets import Mobilint

TAKES = {"model"}


def wants_dataset(target: Mobilint) -> bool:
    return target.languages is None


def check(inputs: dict[str, Artifact], target: Mobilint, out: Path) -> list[str]:
    """The plan in lines, from config.json, headers and a question to the compiler; see plan.make for what is refused. Raises NoRoom too."""
    made = plan.make(inputs, target)
    argv = toolchain.command_line(target, made.device, (out / WORK).absolute(), job.JOB, job.container(out))
    return [
        *made.lines(out / WORK / job.JOB, shlex.join(argv)),
        *preflight.check_fit(made.shape, target),
        *preflight.check_room(
            out,
            exact_sum.shape(made.shape, inputs),
            target,
            also=exact_sum.size_to_write(inputs, out / exact_sum.FOLDER) + made.mblt_bytes,
        ),
    ]


def build(inputs: dict[str, Artifact], out: Path, target: Mobilint) -> dict:
    """Prepare what the compiler needs, compile, and write the runtime folder into `out`; returns the metrics for the manifest.

    Raises Unfinished where the compiler is not here (all else is made and kept), ToolFailed where it fails, ProofFailed where the runtime
    folder's tokenizer differs from the trained one.
    """
    made = plan.make(inputs, target)
    work = work_folder(out)
    tokenizer = load_tokenizer(made.model, trust_remote_code=made.trust)
    runtime.write_tokenizer(made.model, tokenizer, out)
    runtime.write_config(made, out)
    ids = contract.prove(tokenizer, out, lambda texts: processes.fresh(runtime.board_ids, out, texts))

    calibration.write_table(made.table, work / "embedding.pt")
    table = calibration.open_table(work / "embedding.pt")
    found, counts = calibration.sequences(made, tokenizer)
    records = calibration.write(found, table, work / job.CALIBRATION)
    calibration.check(work / job.CALIBRATION, records, made.low, made.high, table.shape[1])

    # qubee casts the weights to bf16 itself (weight_dtype), to the nearest: it gets those that are on that grid already.
    transformers4.lend_model(inputs["stored"].path if made.compiler.package == "qubee" else made.model, work)
    digest = job.write(made, work)
    record = compile.compile_model(made, target, work, digest, job.container(out))

    runtime.write_embedding(made, table, work, out)
    write_json(out / "calibration.json", {"source": "texts" if made.languages else "calib split", "counts": counts, "files": records})
    write_json(out / "compile.json", compile.summary(made, record, work))
    with whole(out / "README.md") as file:
        file.write_text(runtime.readme(made, record), encoding="utf-8")
    for name in (job.JOB, compile.LOG):
        if (work / name).is_file():  # a job that was run by hand elsewhere leaves no log
            shutil.copyfile(work / name, out / name)
    (work / made.mxq).replace(out / made.mxq)
    finish(out)
    tokens = sum(entry["tokens"] for entry in records)
    return {
        "package": record["package"],
        "version": record["version"],
        "api": made.compiler.api,
        "device": made.device,
        "weight_type": made.weight_type,
        "mxq_bytes": (out / made.mxq).stat().st_size,
        "calibration_files": len(records),
        "calibration_tokens": tokens,
        "calibration": counts,
        "contract": ids,
        "compile_seconds": record["seconds"],
        "summary": f"{made.weight_type} by {record['package']} {record['version']}, calibrated on {tokens:,} tokens in {len(records)} files",
    }
