"""List the runs there are, the newest first, with size, age and the figure that matters; remove=NAME removes one.

A run that others were made from is kept, unless force=true; so is one that a process is at, whatever is given.
"""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from src.core import artifact, stage
from src.core.errors import MissingInput, Moved, Tampered
from src.core.files import remove
from src.core.headline import headline
from src.core.log import duration, out, say, size, table
from src.settings.verbs import RunsVerb

DAY = 24 * 3600
REMOVED = ".removed"
"""what a run's folder is called while it goes, so that one half gone is not taken for a run"""


def runs(cfg: RunsVerb) -> int:
    outputs = Path(cfg.outputs)
    if cfg.remove is not None:
        return take_away(outputs, cfg.remove, force=cfg.force, dry=cfg.dry_run)
    rows = sorted((row for folder in _folders(outputs) if (row := told(folder))), key=lambda row: -row[0])
    out(table(["run", "artifacts", "on disk", "changed", ""], [row[1] for row in rows], right=(1, 2)))
    out(f"{len(rows)} run{'s' * (len(rows) != 1)} in {outputs}, {size(shutil.disk_usage(outputs).free) if outputs.is_dir() else 0} free")
    return 0


def _folders(outputs: Path) -> list[Path]:
    return sorted(path for path in outputs.glob("*") if path.is_dir() and not path.name.startswith(".") and not path.is_symlink())


def told(folder: Path) -> tuple[float, list[str]] | None:
    """(when it changed last, its line); None for a folder that is no run. The figure is of what lies furthest down the road."""
    begun = sorted(folder.glob("*.partial"))
    finished = [path for path in folder.iterdir() if artifact.is_finished(path)]
    if not finished and not begun:
        return None
    changed = max(*(path.stat().st_mtime for path in (*begun, *(path / artifact.MANIFEST for path in finished))), 0)
    try:
        words = [f"{name}: {headline(a)}" for name, a in artifact.of_run(folder).items()][-1:]
    except Tampered as error:
        words = [f"damaged: {error.where}"]
    words += [f"unfinished: {', '.join(path.name for path in begun)}"] * bool(begun)
    return changed, [folder.name, str(len(finished)), size(sum(_sizes(folder))), ago(time.time() - changed), "; ".join(words)]


def ago(seconds: float) -> str:
    return f"{seconds / DAY:.0f} days ago" if seconds > 2 * DAY else f"{duration(max(seconds, 0))} ago"


def _sizes(folder: Path) -> Iterator[float]:
    """Bytes of each file that is this run's alone; what is linked from several counts in parts."""
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            found = file.stat()
            yield found.st_size / found.st_nlink


def take_away(outputs: Path, name: str, *, force: bool, dry: bool) -> int:
    """Remove a run, by a rename first."""
    folder = outputs / name
    for left in outputs.glob(f".*{REMOVED}"):
        remove(left)  # of a removal that was killed
    if folder not in _folders(outputs):
        there = [path.name for path in _folders(outputs)]
        raise MissingInput(f"there is no run '{name}'", where=str(folder), fix=[f"remove={other}" for other in there[:3]])
    if (users := sorted(str(path) for path in used_by(outputs, folder))) and not force:
        raise Moved(
            f"'{folder}' is what others were made from: {', '.join(users[:4])}",
            fix=["remove those first", "force=true removes it; what was made from it stays, and cannot be traced back"],
        )
    foreign = [path for path in sorted(folder.iterdir()) if not ours(path)]
    if foreign and not force:
        raise Moved(f"'{foreign[0]}' is nothing that Boardwalk made: {artifact.described(foreign[0])}", fix=artifact.NOT_OURS)
    with contextlib.ExitStack() as locks:
        for lock in folder.glob(".*.lock"):
            locks.enter_context(artifact.held(lock, folder))
        if dry:
            say(f"runs: would remove {folder}, {artifact.described(folder)}")
            return 0
        what = artifact.described(folder)
        gone = outputs / f".{name}{REMOVED}"
        folder.rename(gone)
        remove(gone)
    say(f"runs: removed {folder}, {what}")
    return 0


OWN = {"tracking", "metrics.jsonl", "sweep", "report.html"}


def ours(path: Path) -> bool:
    """Whether what lies in a run's folder was finished or begun by this program."""
    if path.name in OWN or (path.name.startswith("report-") and path.suffix == ".html") or path.name.startswith("."):
        return True
    return artifact.is_finished(path) or (path.suffix == ".partial" and artifact.unfinished(path.with_suffix("")) is not None)


def used_by(outputs: Path, folder: Path) -> Iterator[Path]:
    """Artifacts of other runs that name one of this run's as a parent."""
    for path in outputs.glob("*/*"):
        if path.parent != folder and artifact.is_finished(path):
            found = artifact.open_artifact(path)
            if any(found.path_of(parent).resolve().is_relative_to(folder.resolve()) for parent in (found.manifest or {})["parents"]):
                yield path


if __name__ == "__main__":
    stage.main_plain("runs", __doc__, RunsVerb, runs)
