"""Print the chain of an artifact from dataset to bundle; with --verify recompute every hash on the way.

usage: python -m src.lineage PATH [--verify]

PATH is an artifact's folder, wherever it was copied to. Exit code 9 where one byte differs from what was sealed.
"""

import os
import sys
from pathlib import Path

from src.core import artifact, stage
from src.core.artifact import Artifact
from src.core.errors import ConfigError, MissingInput, Tampered
from src.core.files import flatten, hash_files
from src.core.log import out, size


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        out(__doc__.strip())
        return 0
    flags = [a for a in argv if a.startswith("-")]
    paths = [Path(a) for a in argv if not a.startswith("-")]
    if len(paths) != 1 or set(flags) - {"--verify"}:
        raise ConfigError(
            f"expected one PATH and at most --verify, got: {' '.join(argv) or 'nothing'}",
            fix="python -m src.lineage outputs/default/merge --verify",
        )
    if not artifact.is_finished(paths[0]):
        here = [f"python -m src.lineage {p}" for p in sorted(paths[0].glob("*")) if artifact.is_finished(p)]
        raise MissingInput(
            "not a finished artifact: no manifest.json",
            where=str(paths[0]),
            fix=here or "give a folder that has one, such as outputs/default/merge",
        )
    verify = "--verify" in flags
    faults: list[str] = []
    show(artifact.open_artifact(paths[0]), "", set(), faults, verify)
    if faults:
        raise Tampered(
            f"{len(faults)} difference{'s' * (len(faults) > 1)} from what was sealed:\n" + "\n".join(f"  - {fault}" for fault in faults),
            fix=artifact.REMADE,
        )
    if verify:
        out("verified: every file of every artifact that is here has the hash its manifest says")
    return 0


def show(a: Artifact, indent: str, seen: set[str], faults: list[str], verify: bool) -> None:
    """One artifact and, under it, what it was made from."""
    again = a.key in seen
    seen.add(a.key)
    m = a.manifest
    assert m is not None  # what is shown was opened by its manifest
    bytes_ = size(sum(f["size"] for f in a.files.values()))
    out(
        f"{indent}{m['stage']} -> {a.kind}  {a.path}  {len(a.files)} files, {bytes_}, {m['seconds']:.0f} s  key {a.key[:12]}"
        + ("  (shown above)" if again else "")
    )
    if again:
        return
    for key, value in flatten(m["settings"]).items():
        out(f"{indent}  . {key} = {value}")
    if verify:
        faults += [f"{a.path}/{fault}" for fault in artifact.verify(a)]
    for parent in m["parents"]:
        follow(m["ancestors"], parent, a.path_of(parent), indent + "    ", seen, faults, verify)


def follow(ancestors: dict[str, dict], parent: dict, path: Path, indent: str, seen: set[str], faults: list[str], verify: bool) -> None:
    """A parent: opened where it still is, told from the ancestors in the child's manifest where it is not."""
    if "files" in parent:
        out(f"{indent}{parent['role']}: outside {parent['kind']}  {path}  {len(parent['files'])} files  key {parent['key'][:12]}")
        if verify and path.exists():
            now = hash_files(path)
            faults += [f"{path}: '{name}' differs from what was used" for name, entry in parent["files"].items() if now.get(name) != entry]
        elif verify:
            out(f"{indent}  not here, so not verified")
    elif artifact.is_finished(path) and (found := artifact.open_artifact(path)).key == parent["key"]:
        show(found, indent, seen, faults, verify)
    else:
        if verify and path.exists() and not artifact.is_finished(path):
            faults.append(f"{path}/manifest.json: missing")
        record = ancestors.get(parent["key"])
        if record is None:  # which `verify` reports
            return
        state = f"made anew since, in {path}" if artifact.is_finished(path) else f"not here (was {path})"
        out(
            f"{indent}{record['stage']} -> {record['kind']}  {state}  key {parent['key'][:12]}"
            + ("; told from the manifest" if not verify else "; its files cannot be verified")
        )
        for key, value in flatten(record["settings"]).items():
            out(f"{indent}  . {key} = {value}")
        for grand in record["parents"]:
            follow(ancestors, grand, Path(os.path.normpath(path.parent / grand["path"])), indent + "    ", seen, faults, verify)


if __name__ == "__main__":
    sys.exit(stage.guarded(lambda: main(sys.argv[1:])))
