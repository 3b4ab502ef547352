"""Several roads that differ in what is swept over, by Hydra's own sweepers and launchers; what they share is made once.

    python -m src.pipeline --multirun run=ranks finetune.tuner.rank=4,8,16 [hydra/launcher=joblib] [hydra/sweeper=optuna]

Each is a run of its own, named by what it differs in. The stages before the first that is swept over are made in the run that is named, and linked into each.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.core import artifact, compose, stage
from src.core.errors import ConfigError
from src.core.files import read_json, write_json
from src.core.log import out, say, table
from src.pipeline import recipe, run
from src.settings.verbs import PipelineVerb
from src.sizing import chart

FLAGS = {"--multirun", "-m"}
FOLDER = "sweep"
"""inside the run that is named: what was asked, each run's result, the plot, and what Hydra writes"""


def sweep(overrides: Sequence[str], mine: Sequence[str]) -> int:
    """Exit code of the first run that failed, or 0. overrides: of the stages and Hydra's own; mine: the pipeline's."""
    cfg = compose.compose("pipeline", list(mine), PipelineVerb)
    hydras = [text for text in overrides if text.startswith(("hydra.", "hydra/"))]
    swept, fixed = compose.sweeps([text for text in overrides if text not in hydras])
    if not swept:
        raise ConfigError("--multirun, and nothing to sweep over", fix="give a setting several values, such as tuner.rank=4,8,16")
    steps, faults = recipe.assigned(recipe.read(cfg.recipe), fixed)
    check_each(steps, faults, swept)
    shared = shared_steps(steps, [key for key, _ in swept])
    ahead = run.plan(cfg, shared)
    if cfg.dry_run:
        run.show(ahead)
        say(f"pipeline: then a run for each of {', '.join(f'{key}={value}' for key, value in swept)}")
        return 0
    if code := run.walk(ahead):
        return code
    folder = Path(cfg.outputs).absolute() / cfg.run / FOLDER
    for old in folder.glob("results/*.json"):
        old.unlink()
    asked: dict[str, Any] = {
        "pipeline": cfg.model_dump(mode="json") | {"run": cfg.run, "outputs": cfg.outputs, "force": cfg.force, "room": cfg.room}
    }
    asked |= {"fixed": fixed, "keys": [key for key, _ in swept], "shared": [step.verb for step in shared]}
    write_json(folder / "asked.json", asked)
    by_hydra(folder, [f"+{name(i)}={value}" for i, (_, value) in enumerate(swept)], hydras)
    return finished(cfg, folder, [key for key, _ in swept])


def name(number: int) -> str:
    """What a swept setting is called in Hydra's configuration, which else would take its dots for groups of its own."""
    return f"s{number}"


def shared_steps(steps: Sequence[recipe.Step], keys: Sequence[str]) -> list[recipe.Step]:
    """The stages before the first that a swept setting belongs to."""
    probe, _ = recipe.assigned(steps, [f"{key}=x" for key in keys])
    return [step for i, step in enumerate(steps) if probe[: i + 1] == list(steps[: i + 1])]


def check_each(steps: Sequence[recipe.Step], faults: Sequence[str], swept: Sequence[tuple[str, str]]) -> None:
    """Raises ConfigError where a single value of what is swept over is none, before anything is run."""
    for key, value in swept:
        for one in compose.values(f"{key}={value}") or [value]:
            made, more = recipe.assigned(steps, [f"{key}={one}"] if compose.values(f"{key}={value}") else [])
            recipe.composed(made, ["run=x"], [*faults, *more])


def by_hydra(folder: Path, swept: Sequence[str], hydras: Sequence[str]) -> None:
    """Have Hydra call `job` for each combination."""
    import hydra

    quiet = {"hydra/job_logging": "none", "hydra/hydra_logging": "none", "hydra.output_subdir": "null", "hydra.job.chdir": "false"}
    places = {"hydra.sweep.dir": f"'{folder}'", "hydra.sweep.subdir": "jobs/${hydra.job.num}"}
    own = [f"{key}={value}" for key, value in {**quiet, **places}.items()]
    before, sys.argv = sys.argv, ["pipeline", "--multirun", *swept, *own, *hydras]
    try:
        hydra.main(version_base="1.3", config_path=None)(job)()
    finally:
        sys.argv = before


def job(given: Any) -> float:
    """One of the runs, in a process of its own as Hydra is busy in this one; returns the objective for the sweeper, nan where it failed. given: Hydra's configuration, {name(i): a value of the i-th setting}."""
    from hydra.core.hydra_config import HydraConfig

    folder = Path(HydraConfig.get().sweep.dir)
    asked = read_json(folder / "asked.json")
    chosen = {key: spelled(given[name(i)]) for i, key in enumerate(asked["keys"])}
    base = PipelineVerb.model_validate({**asked["pipeline"], "dry_run": False})
    cfg = base.model_copy(update={"run": run_name(base.run, chosen)})
    link_shared(base, cfg, asked["shared"])
    own = [*asked["fixed"], *(f"{key}={value}" for key, value in chosen.items())]
    code = run.start("pipeline", [*run.named(cfg), f"recipe={cfg.recipe}", f"room={cfg.room}", f"force={str(cfg.force).lower()}", *own])
    found = math.nan if code else objective(cfg)
    (folder / "results").mkdir(exist_ok=True)
    result = {"run": cfg.run, "settings": chosen, "code": code, "objective": None if math.isnan(found) else found, **figures(cfg)}
    write_json(folder / "results" / f"{cfg.run}.json", result)
    return found


def spelled(value: object) -> str:
    """A value as one types it."""
    from omegaconf import ListConfig, OmegaConf

    if isinstance(value, ListConfig):
        return json.dumps(OmegaConf.to_container(value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def run_name(base: str, chosen: dict[str, str]) -> str:
    """The name of a run by what it differs in: ranks-rank-16. A value that is no name is shortened, with its hash."""
    plain = "-".join([base, *(f"{key.rpartition('.')[2]}-{value}" for key, value in chosen.items())])
    short = re.sub(r"[^A-Za-z0-9._-]+", "_", plain)[:80]
    return short if short == plain else f"{short}-{hashlib.sha256(plain.encode()).hexdigest()[:6]}"


def link_shared(base: PipelineVerb, cfg: PipelineVerb, verbs: Sequence[str]) -> None:
    """Have what the base run holds of the shared stages in this run too."""
    here, there = (stage.Run(Path(one.outputs) / one.run) for one in (base, cfg))
    for path in sorted(path for verb in verbs for path in here.folder.glob(f"{verb}*") if artifact.is_finished(path)):
        if not there.has(path.name):
            artifact.link(artifact.open_artifact(path), there.folder / path.name)


def objective(cfg: PipelineVerb) -> float:
    """Of a run that is done. Raises ConfigError where it has no such figure."""
    where, _, figure = cfg.objective.partition(".")
    folder = Path(cfg.outputs) / cfg.run / where
    metrics = artifact.open_artifact(folder).metrics if artifact.is_finished(folder) else {}
    if not isinstance(metrics.get(figure), int | float):
        known = sorted(key for key, value in metrics.items() if isinstance(value, int | float))
        say(f"pipeline: objective={cfg.objective}: '{folder}' has no such figure" + (f"; it has {', '.join(known)}" if known else ""))
        return math.nan
    return float(metrics[figure])


MEASURED = ("evaluate-quantize", "evaluate-merge", "evaluate-finetune")
"""reports of a run, the one nearest to the board first"""


def figures(cfg: PipelineVerb) -> dict[str, Any]:
    """{what is told of each run beside its objective}"""
    folder = Path(cfg.outputs) / cfg.run
    report = next((folder / name for name in MEASURED if artifact.is_finished(folder / name)), None)
    metrics = artifact.open_artifact(report).metrics if report else {}
    seconds = sum(read_json(path)["seconds"] for path in folder.glob(f"*/{artifact.MANIFEST}"))
    return {"perplexity": metrics.get("perplexity"), "kl": metrics.get("kl"), "seconds": seconds}


HEADS = {"perplexity": "perplexity", "kl": "KL"}


def finished(cfg: PipelineVerb, folder: Path, keys: Sequence[str]) -> int:
    """Show all runs in a table, the best first, and draw them."""
    results = [read_json(path) for path in folder.glob("results/*.json")]
    results.sort(key=lambda r: (r["objective"] is None, r["objective"], r["run"]))
    told = [figure for figure in ("objective", "perplexity", "kl") if any(r[figure] is not None for r in results)]
    rows = [
        [
            r["run"],
            *(r["settings"][key] for key in keys),
            *("" if r[figure] is None else f"{r[figure]:.4f}" for figure in told),
            f"{r['seconds']:.1f}",
            f"failed ({r['code']})" if r["code"] else "",
        ]
        for r in results
    ]
    head = ["run", *keys, *(HEADS.get(figure, cfg.objective) for figure in told), "seconds", ""]
    out(table(head, rows, right=range(len(keys) + 1, len(head) - 1)))
    done = [r for r in results if r["objective"] is not None]
    if done:
        chart.draw_runs(
            [(", ".join(f"{k}={v}" for k, v in r["settings"].items()), r["objective"]) for r in done], cfg.objective, folder / "runs.png"
        )
        out(f"plot: {folder / 'runs.png'}")
    write_json(folder / "runs.json", {"objective": cfg.objective, "runs": results})
    return next((r["code"] for r in results if r["code"]), 0)
