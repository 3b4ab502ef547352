"""One table of a run: each finished artifact with its seconds, its size on disk and the figure that matters."""

from pathlib import Path

from src.core import artifact, stage
from src.core.errors import MissingInput
from src.core.headline import headline
from src.core.log import duration, out, size, table
from src.settings.verbs import Verb


def prepared(folder: Path) -> list[Path]:
    """Bundles that wait for something: their vendor's compiler, or the same command again."""
    begun = (artifact.unfinished(path.with_suffix("")) for path in sorted(folder.glob("deploy-*.partial")))
    return [found.path for found in begun if found]


def summary(cfg: Verb) -> int:
    folder = Path(cfg.outputs) / cfg.run
    if not folder.is_dir():
        raise MissingInput(
            f"there is no run '{cfg.run}'", where=str(folder), fix=f"python -m src.data {stage.Run(folder).overrides} starts one"
        )
    lines, bundles, total = [], [], 0.0
    for name, a in artifact.of_run(folder).items():
        old = "  (its source was made anew since)" if artifact.replaced_since(a) else ""
        seconds = a.manifest["seconds"] if a.manifest else 0.0
        lines.append((name, f"{seconds:.1f}", size(sum(f["size"] for f in a.files.values())), headline(a) + old))
        total += seconds
        bundles += [a.path] if a.kind == "bundle" else []
    print(table(("stage", "seconds", "on disk", "result"), lines, right=(1, 2)))
    out(f"{len(lines)} artifact{'s' * (len(lines) != 1)}, {duration(total)}")
    for bundle in bundles:
        out(f"bundle: {bundle}")
    for partial in prepared(folder):
        out(f"prepared: {partial}, not finished; the same deploy goes on from there")
    return 0


if __name__ == "__main__":
    stage.main_plain("summary", __doc__, Verb, summary)
