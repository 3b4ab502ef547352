"""Show a run, or compare several, on one page: a single HTML file that needs no network.

    python -m src.report mine            makes outputs/mine/report.html
    python -m src.report mine other      what differs between them, and whether it is more than noise: outputs/mine/report-other.html

The road with every artifact, the data, curves, every evaluation side by side, what got better and worse, answers, and the commands that make it all again.
"""

from pathlib import Path

from src.core import compose, stage
from src.core.errors import ConfigError, MissingInput
from src.core.files import write_text
from src.core.log import out
from src.settings.verbs import ReportVerb


def report(words: list[str]) -> int:
    """words: names of runs, and settings."""
    names = [word for word in words if "=" not in word and not word.startswith("-")]
    cfg = compose.compose("report", [word for word in words if word not in names], ReportVerb)
    if any(Path(name).name != name for name in names):
        raise ConfigError(
            "a run is named as it is in the outputs folder, without a path", fix="outputs=FOLDER names the folder that holds it"
        )
    return write(cfg, list(dict.fromkeys(names or [cfg.run])))


def write(cfg: ReportVerb, names: list[str]) -> int:
    """Writes the page into the first run."""
    runs = [Path(cfg.outputs) / name for name in names]
    for folder in runs:
        if not folder.is_dir():
            there = sorted(path.name for path in Path(cfg.outputs).glob("*") if path.is_dir() and not path.name.startswith("."))
            raise MissingInput(
                f"there is no run '{folder.name}'{compose.nearest(folder.name, there)}",
                where=str(folder),
                fix=[f"python -m src.report {name}" for name in there[:3]] or "python -m src.data starts one",
            )
    page = runs[0] / ("report.html" if len(runs) == 1 else f"report-{'-'.join(folder.name for folder in runs[1:])}.html")
    if cfg.dry_run:
        out(f"would write {page}")
        return 0
    from src.report import page as pages

    write_text(page, pages.of(runs, cfg.rows))
    out(f"report: {page}")
    return 0


if __name__ == "__main__":
    stage.main_uncomposed("report", __doc__, ReportVerb, report)
