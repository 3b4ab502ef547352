"""Which of Mobilint's compilers is here: qbcompiler, or qubee as it was called up to 0.12; its version; and the API that version has.

The keywords of `mxq_compile` changed between versions, and the compiler takes unknown ones without a word, so the API is chosen by version.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from src.core.errors import ConfigError, MissingTool
from src.deploy.vendor import ask
from src.settings.targets import Mobilint

PACKAGES = {"0.11": "qubee", "0.12": "qubee", "1.0": "qbcompiler", "1.1": "qbcompiler", "1.2": "qbcompiler", "1.3": "qbcompiler"}
"""API generation, the first two numbers of a version, -> the package that has it"""
NEWEST = "1.3"
WEIGHTS = {
    **dict.fromkeys(("0.11", "0.12"), ("w8",)),
    **dict.fromkeys(("1.0", "1.1", "1.2"), ("w8", "w4v8", "w4")),
    "1.3": ("w8", "w4v8"),
}
"""API generation -> weight types that Mobilint's scripts compile with it; 0.11.0.1 says that it has no 4 bits"""
CHIPS = {"aries": tuple(PACKAGES), "regulus": ("1.3",)}
"""chip -> generations that compile language models for it (release 1.3 is the first that names regulus-rb for them)"""
PROBE = """
import importlib, importlib.metadata, importlib.util, json
found = []
for name in ("qbcompiler", "qubee"):
    if not found and importlib.util.find_spec(name):
        try:
            found = [name, importlib.metadata.version(name)]
        except importlib.metadata.PackageNotFoundError:
            found = [name, str(getattr(importlib.import_module(name), "__version__", ""))]
print(json.dumps(found))
"""


def install(chip: str) -> list[str]:
    """Ways to get the compiler; each chip has a wheel of its own."""
    return [
        f"install the wheel of qbcompiler for {chip.upper()} from https://dl.mobilint.com (free login) into a Python of 3.10 to 3.12, and name it: "
        "target.python=ENV/bin/python",
        "start a container of mobilint/qbcompiler:1.0-cuda12.8.1-ubuntu22.04 (or 1.0-cpu-ubuntu22.04), pip install the wheel in it, keep it with "
        "`docker commit`, and name the image: target.image=NAME",
    ]


@dataclass(frozen=True)
class Compiler:
    """A compiler, or what is assumed of one that is not here.

    where: the interpreter or image that has it. version: None where none was found. api: its generation, a key of PACKAGES.
    missing: why it cannot be run; empty where it can.
    """

    where: str
    package: str
    version: str | None
    api: str
    missing: str = ""

    def __str__(self) -> str:
        if self.missing:
            return f"not here ({self.missing}); the job is written for {self.package}, API {self.api}"
        return f"{self.package} {self.version or 'of unknown version'} in {self.where}, API {self.api}"


def find(target: Mobilint) -> Compiler:
    """The compiler in `target.image` or `target.python`, asked without importing it where its metadata tells the version.

    Raises MissingTool where the named interpreter does not run, ConfigError where the version has no API known here, newer ones among them, or not the
    one of `target.sdk`.
    """
    python, where = _python(target), target.image or target.python or "python3"
    done = ask([*python, "-c", PROBE])
    if done is None and target.python and not target.image:
        raise MissingTool(
            f"the Python interpreter '{target.python}' is not there or does not answer",
            where=f"target.python={target.python}",
            fix="target.python=ENV/bin/python names the one that has Mobilint's compiler",
        )
    found, why = _answer(done)
    if not found:
        api = NEWEST if target.sdk == "auto" else target.sdk
        return Compiler(where, PACKAGES[api], None, api, why or f"neither qbcompiler nor qubee is in {where}")
    package, version = found
    api = _api(package, version, target.sdk, where)
    return Compiler(where, package, version or None, api)


def _answer(done) -> tuple[list[str], str]:
    """([package, version] or [], why there was no answer)."""
    if done is None:
        return [], "the command to ask it was not found, or gave no answer in time"
    if done.returncode:
        return [], (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
    try:
        return json.loads(done.stdout.strip().splitlines()[-1]), ""
    except (ValueError, IndexError):
        return [], "its answer could not be read"


def _api(package: str, version: str, sdk: str, where: str) -> str:
    """The API generation of an installed compiler: that of its version, unless `sdk` names one."""
    api = _by_version(version) if sdk == "auto" else sdk
    if api not in PACKAGES:
        newer = (_number(version) or (0, 0)) > (_number(NEWEST) or (0, 0))
        raise ConfigError(
            f"{package} {version or 'does not say its version and'} "
            + (
                f"is newer than any whose keywords are known here ({NEWEST}), and it ignores those that it does not know"
                if newer
                else f"has no API known here ({', '.join(PACKAGES)})"
            ),
            where=where,
            fix=[
                f"install {package} {NEWEST} or older" if newer else "install a newer compiler",
                *(f"target.sdk={name} takes it for that one, unchecked" for name in reversed(PACKAGES) if PACKAGES[name] == package),
            ][: 2 if newer else None],
        )
    if PACKAGES[api] != package:
        raise ConfigError(
            f"API {api} is that of {PACKAGES[api]}, but {package} {version} is installed",
            where=where,
            fix=["target.sdk=auto", "target.python=ENV/bin/python names the other compiler"],
        )
    return api


def _number(version: str | None) -> tuple[int, int] | None:
    """(1, 2) of 1.2.0+aries; None of what begins otherwise."""
    known = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(known[1]), int(known[2])) if known else None


def _by_version(version: str | None) -> str:
    """A version's first two numbers, which are its generation's name where it is a known one."""
    return ".".join(map(str, _number(version) or ()))


def remarks(compiler: Compiler, sdk: str) -> list[str]:
    """What the user should look at before trusting the choice of API."""
    chosen = compiler.version and sdk != "auto" and _by_version(compiler.version) != sdk
    said = f"target.sdk={sdk} was asked for, though {compiler.version} has another API; wrong keywords are ignored without a word"
    return [said] if chosen else []


def has_gpu() -> bool:
    done = ask(["nvidia-smi", "-L"], timeout=20)
    return done is not None and done.returncode == 0 and "GPU" in done.stdout


def _python(target: Mobilint) -> list[str]:
    """The start of a command line that runs Python where the compiler is, for short questions."""
    if target.image:
        return ["docker", "run", "--rm", "--pull=never", target.image, "python"]
    return [target.python or "python3"]


def command_line(target: Mobilint, device: str, work: Path | str, job: str, name: str) -> list[str]:
    """The argv that runs `job` with the folder `work` as its working directory: as it is, or in a container called `name` with it as /job."""
    if target.image is None:
        return [*_python(target), job]
    gpus = ["--gpus=all"] if device == "gpu" else []
    return ["docker", "run", "--rm", "--name", name, "--ipc=host", *gpus, "-v", f"{work}:/job", "-w", "/job", target.image, "python", job]
