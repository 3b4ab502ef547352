"""From a path, a run or an address to what answers: found and looked at in a second, then loaded."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from src.core.artifact import Artifact, outside
from src.core.errors import WrongKind
from src.core.room import Needs
from src.core.stage import Run
from src.models.folder import weights_of
from src.models.speaking import ModelSpeaker
from src.serving import bundles
from src.serving.client import Client
from src.serving.speakers import ServerSpeaker, Speaker
from src.settings.evaluations import Endpoint
from src.sizing import host
from src.sizing.config_reader import read_shape

KINDS = {"adapter", "model", "quantized", "bundle"}
"""kinds of artifact that can be talked to"""


def find(run: Run, source: str | None) -> Artifact:
    """What is to be talked to: the artifact, folder or GGUF file at `source`, or the run's merge, else its adapter, else its quantized model."""
    if source is not None and Path(source).is_file():
        return outside(Path(source), "bundle", run.cache)
    return run.source(source, "merge", "finetune", "quantize", kinds=KINDS)


def of_endpoint(settings: Endpoint) -> ServerSpeaker:
    assert settings.url
    return ServerSpeaker(Client(settings.url, timeout=settings.timeout), settings.model, settings.concurrency)


def check(found: Artifact) -> str:
    """What would be talked to, in a line. Raises WrongKind for a bundle that does not run here."""
    if found.kind == "bundle" and bundles.targets(found)["kind"] not in bundles.OPENERS:
        raise WrongKind(
            f"a bundle for {bundles.targets(found)['name']} runs on its board alone",
            where=str(found.path),
            fix=["serve it there, and give http://HOST:PORT as endpoint.url", "give the model that it was made from"],
        )
    return f"{found.path} ({found.kind})"


def needs(inputs: Sequence[Artifact], batch: int = 1) -> Needs:
    """What they take of this machine, all of them loaded; a bundle as much as its files."""
    models = host.answers([read_shape(weights_of(found)) for found in inputs if found.kind != "bundle"], batch)
    bundled = sum(file["size"] for found in inputs if found.kind == "bundle" for file in found.files.values())
    return replace(models, parts={**models.parts, "bundles": bundled})


def open_speaker(found: Artifact, base: str | None = None, environment: str | None = None) -> Speaker:
    """The speaker of what `check` has looked at. environment: of a bundle's runtime, where it is not its usual one."""
    name = name_of(found)
    if found.kind != "bundle":
        return ModelSpeaker(found, name, Path(base) if base else None)
    opener, usual = bundles.OPENERS[bundles.targets(found)["kind"]]
    return opener(found, name, *([environment or usual] if usual else []))


def name_of(found: Artifact) -> str:
    """mine/merge of outputs/mine/merge; the folder's own name for one made elsewhere."""
    path = found.path.resolve()
    return f"{path.parent.name}/{path.name}" if found.manifest else path.name
