"""Where a stage's figures go while it works and once it is finished: metrics.jsonl in the run, always, and the trackers that are asked for, each by its own library.

Every stage is a tracked run of its own in one group, the run's. Its id follows from where it is, so that what goes on after a kill goes on there too. A tracker
that fails says so once, and never stops a stage. Nothing is sent of a path, of a key or of an artifact's bytes.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from src import __version__
from src.core.artifact import Artifact
from src.core.errors import MissingTool
from src.core.log import say, warn
from src.settings.trackers import Mlflow, Tensorboard, Tracker, Trackio, Wandb

FOLDER, JOURNAL = "tracking", "metrics.jsonl"
PACKAGES = {Wandb: "wandb", Tensorboard: "tensorboard", Trackio: "trackio==0.43.0", Mlflow: "mlflow-skinny==3.17.2 sqlalchemy alembic"}
"""what pip installs for each; the first two are in requirements.txt"""


class Sink(Protocol):
    """One tracker's run."""

    def numbers(self, values: Mapping[str, float], step: int) -> None: ...
    def samples(self, rows: Sequence[tuple[str, str]], step: int) -> None: ...
    def artifact(self, made: Artifact, name: str) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class TrackedPlace:
    """Where a stage is tracked. folder: <outputs>/<run>/tracking. run, stage: names; of a stage that makes several artifacts, the artifact's."""

    folder: Path
    run: str
    stage: str

    @property
    def id(self) -> str:
        return hashlib.sha256(f"{self.folder.absolute()}/{self.stage}".encode()).hexdigest()[:16]


class Trackers:
    """Fan out to the journal and every tracker asked for; on ranks other than 0 create it with none and no journal."""

    def __init__(self, trackers: Mapping[str, Tracker], place: TrackedPlace, settings: Mapping[str, Any], *, journal: bool = True):
        self.sinks: dict[str, Sink] = {}
        settings = {"boardwalk": __version__} | {key: _without_place(value) for key, value in settings.items()}
        if journal:
            self.sinks[JOURNAL] = _MetricsFile(place)
        for key, tracker in trackers.items():
            self._try(key, partial(self._start, key, tracker, place, settings))

    def _start(self, key: str, tracker: Tracker, place: TrackedPlace, settings: Mapping[str, Any]) -> None:
        self.sinks[key] = SINKS[type(tracker)](tracker, place, settings)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Scalars at an optimizer step, by names such as train/loss."""
        self._each(lambda sink: sink.numbers(values, step))

    def samples(self, rows: Sequence[tuple[str, str]], step: int) -> None:
        """(prompt, answer) pairs at an optimizer step."""
        self._each(lambda sink: sink.samples(rows, step))

    def finished(self, made: Artifact) -> None:
        """What a stage made: its figures, and the artifact by its hashes, with those it was made from."""
        self._try("telling of the end", partial(self._tell, made))

    def _tell(self, made: Artifact) -> None:
        figures = dict(scalars(made.metrics, made.stage)) | {f"{made.stage}/seconds": (made.manifest or {})["seconds"]}
        self._each(lambda sink: sink.numbers(figures, made.metrics.get("steps", 0)))
        if rows := answers(made):
            self._each(lambda sink: sink.samples(rows, made.metrics.get("steps", 0)))
        self._each(lambda sink: sink.artifact(made, made.path.name))

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, call: Callable[[Sink], None]) -> None:
        for key, sink in list(self.sinks.items()):
            self._try(key, partial(call, sink))

    def _try(self, key: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever goes wrong in a dashboard, the work is worth more
            self.sinks.pop(key, None)
            warn(f"tracker {key} stopped, the work goes on: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def check(trackers: Mapping[str, Tracker]) -> None:
    """Raises MissingTool for a tracker whose library is not installed."""
    for key, tracker in trackers.items():
        packages = PACKAGES[type(tracker)]
        if importlib.util.find_spec(packages.partition("==")[0].partition("-")[0]) is None:
            raise MissingTool(f"tracker={key}: its library is not installed", fix=[f"pip install {packages}", "tracker=none"])


def finished(trackers: Mapping[str, Tracker], made: Artifact, run: str, settings: Mapping[str, Any]) -> None:
    """Tell the journal and the trackers of a finished artifact."""
    told = Trackers(trackers, TrackedPlace(made.path.parent / FOLDER, run, made.path.name), settings)
    told.finished(made)
    told.close()


def scalars(metrics: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    """(prefix/name, value) of every single number among a manifest's metrics; lists, such as curves, are left out, as they were logged while they came."""
    found: list[tuple[str, float]] = []
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            found += scalars(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}/{key}", float(value)))
    return found


def answers(made: Artifact, most: int = 20) -> list[tuple[str, str]]:
    """The model's own among the answers of a report; none of a stage that makes no report."""
    file = made.path / "answers.jsonl"
    if made.kind != "report" or not file.is_file():
        return []
    with open(file, encoding="utf-8") as lines:
        rows = (json.loads(line) for line in lines)
        return [(str(row["prompt"]), str(row.get("answer", ""))) for row in rows if row.get("by") != "parent"][:most]


def _without_place(value: Any) -> Any:
    """A setting without where on this machine it is: of an absolute path its last part."""
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _described(made: Artifact) -> dict[str, Any]:
    """An artifact by its hashes."""
    parents = [{key: parent[key] for key in ("role", "key", "kind", "stage")} for parent in (made.manifest or {})["parents"]]
    return {
        "key": made.key,
        "kind": made.kind,
        "stage": made.stage,
        "parents": parents,
        "files": {n: f["sha256"] for n, f in made.files.items()},
    }


# ---- each


class _MetricsFile:
    """<run>/metrics.jsonl: a line for each event, {time, stage, step, numbers | samples | artifact}. Of two lines of one stage and step the later counts:
    what a kill cut off is trained again. The other trackers hold nothing that is not here."""

    def __init__(self, place: TrackedPlace):
        self.file, self.stage = place.folder.parent / JOURNAL, place.stage

    def _write(self, **event: Any) -> None:
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), "stage": self.stage, **event}, ensure_ascii=False)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._write(step=step, numbers=dict(values))

    def samples(self, rows: Sequence[tuple[str, str]], step: int) -> None:
        self._write(step=step, samples=[list(row) for row in rows])

    def artifact(self, made: Artifact, name: str) -> None:
        self._write(artifact=_described(made))

    def close(self) -> None:
        pass


class _Wandb:
    """Online where WANDB_API_KEY is set or the settings say so. Its lineage graph is drawn online alone: offline, parents are in an artifact's metadata."""

    def __init__(self, tracker: Wandb, place: TrackedPlace, settings: Mapping[str, Any]):
        import wandb

        folder = place.folder / "wandb"
        mode = ("online" if os.environ.get("WANDB_API_KEY") else "offline") if tracker.mode == "auto" else tracker.mode
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
            os.environ.setdefault(name, str(folder.resolve()))  # else it writes to the home folder
        self.wandb, self.online = wandb, mode == "online"
        self.run = wandb.init(
            project=tracker.project,
            name=f"{place.run}/{place.stage}",
            group=place.run,
            job_type=place.stage.partition("-")[0],
            id=place.id,
            resume="allow" if self.online else None,
            dir=folder,
            config=dict(settings),
            mode=mode,
            settings=wandb.Settings(silent=True, init_timeout=30),
        )
        later = f"; `wandb sync {self.run.dir.removesuffix('/files')}` sends it later" if mode == "offline" else ""
        say(f"wandb: {mode}, in {folder}{later}")
        self.name = f"{place.run}-{place.stage}"

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def samples(self, rows: Sequence[tuple[str, str]], step: int) -> None:
        self.run.log({"samples": self.wandb.Table(columns=["prompt", "answer"], data=[list(row) for row in rows])}, step=step)

    def artifact(self, made: Artifact, name: str) -> None:
        described = _described(made)
        if self.online:
            for parent in (made.manifest or {})["parents"]:
                with contextlib.suppress(self.wandb.errors.CommError, ValueError):  # it was made before it was tracked
                    self.run.use_artifact(f"{self.name.removesuffix(name)}{Path(parent['path']).name}:latest")
        one = self.wandb.Artifact(self.name, type=made.kind, metadata={key: value for key, value in described.items() if key != "files"})
        with one.new_file("files.json") as file:
            json.dump(described["files"], file, indent=1)
        self.run.log_artifact(one)

    def close(self) -> None:
        self.run.finish()


class _Tensorboard:
    """TensorBoard's own event files. Its library's protocol buffers are written as torch's SummaryWriter does, without the seconds that torch takes."""

    def __init__(self, tracker: Tensorboard, place: TrackedPlace, settings: Mapping[str, Any]):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = place.folder / "tensorboard" / place.stage
        self.writer = EventFileWriter(str(folder))
        self._text("settings", f"```json\n{json.dumps(dict(settings), indent=1)}\n```", 0)
        say(f"tensorboard: tensorboard --logdir {folder.parent}")

    def _add(self, step: int, **value: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=[Summary.Value(**value)])))

    def _text(self, tag: str, text: str, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
        from tensorboard.util.tensor_util import make_tensor_proto

        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        self._add(step, tag=f"{tag}/text_summary", metadata=plugin, tensor=make_tensor_proto([text]))

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._add(step, tag=key, simple_value=value)
        self.writer.flush()

    def samples(self, rows: Sequence[tuple[str, str]], step: int) -> None:
        self._text("samples", "\n\n".join(f"**{prompt}**\n\n{answer}" for prompt, answer in rows), step)

    def artifact(self, made: Artifact, name: str) -> None:
        self._text("artifact", f"```json\n{json.dumps(_described(made), indent=1)}\n```", 0)

    def close(self) -> None:
        self.writer.close()


class _Trackio:
    """Its local database, in the run's folder. What it prints is left out: an address with a write token may be among it."""

    def __init__(self, tracker: Trackio, place: TrackedPlace, settings: Mapping[str, Any]):
        folder = place.folder / "trackio"
        os.environ.setdefault("TRACKIO_DIR", str(folder.resolve()))
        with self._quietly():
            import trackio

            self.trackio, self.name = trackio, f"{place.run}-{place.stage}"
            self.run = trackio.init(
                tracker.project,
                name=self.name,
                group=place.run,
                config=dict(settings),
                resume="allow",
                embed=False,
                auto_log_gpu=tracker.system,
                auto_log_cpu=tracker.system,
            )
        say(f"trackio: TRACKIO_DIR={os.environ['TRACKIO_DIR']} trackio show --project {tracker.project}")

    @staticmethod
    def _quietly() -> contextlib.AbstractContextManager[Any]:
        return contextlib.redirect_stdout(io.StringIO())

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self.trackio.log(dict(values), step=step)

    def samples(self, rows: Sequence[tuple[str, str]], step: int) -> None:
        import pandas

        self.trackio.log({"samples": self.trackio.Table(dataframe=pandas.DataFrame(rows, columns=["prompt", "answer"]))}, step=step)

    def artifact(self, made: Artifact, name: str) -> None:
        described = _described(made)
        with self._quietly():
            for parent in (made.manifest or {})["parents"]:
                with contextlib.suppress(Exception):  # it was made before it was tracked
                    self.trackio.use_artifact(f"{self.name.removesuffix(name)}{Path(parent['path']).name}")
            one = self.trackio.Artifact(
                self.name, type=made.kind, metadata={key: value for key, value in described.items() if key != "files"}
            )
            with tempfile.TemporaryDirectory() as folder:
                files = Path(folder) / "files.json"
                files.write_text(json.dumps(described["files"], indent=1), encoding="utf-8")
                one.add_file(str(files))
                self.trackio.log_artifact(one)

    def close(self) -> None:
        with self._quietly():
            self.trackio.finish()


@dataclass
class _Mlflow:
    """At MLFLOW_TRACKING_URI, or in a database of the run's folder."""

    tracker: Mlflow
    place: TrackedPlace
    settings: Mapping[str, Any]
    run: Any = field(init=False)

    def __post_init__(self) -> None:
        import mlflow

        self.mlflow = mlflow
        folder = self.place.folder / "mlflow"
        folder.mkdir(parents=True, exist_ok=True)
        own = f"sqlite:///{folder.resolve()}/mlflow.db"
        where = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(where or own)
        self.client = mlflow.MlflowClient()
        found = self.client.get_experiment_by_name(self.tracker.project)
        experiment = (
            found.experiment_id
            if found
            else self.client.create_experiment(self.tracker.project, None if where else (folder.resolve() / "files").as_uri())
        )
        same = self.client.search_runs([experiment], filter_string=f"tags.boardwalk = '{self.place.id}'", max_results=1)
        name, tags = f"{self.place.run}/{self.place.stage}", {"boardwalk": self.place.id, "group": self.place.run}
        self.run = same[0] if same else self.client.create_run(experiment, run_name=name, tags=tags)
        if not same:
            self.client.log_dict(self.run.info.run_id, dict(self.settings), "settings.json")
        say(f"mlflow: {'at MLFLOW_TRACKING_URI' if where else f'mlflow ui --backend-store-uri {own}'}")

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self.mlflow.entities.Metric(key, value, now, step) for key, value in values.items()]
        self.client.log_batch(self.run.info.run_id, metrics=metrics)

    def samples(self, rows: Sequence[tuple[str, str]], step: int) -> None:
        self.client.log_dict(
            self.run.info.run_id, {"columns": ["prompt", "answer"], "data": [list(row) for row in rows]}, f"samples-{step}.json"
        )

    def artifact(self, made: Artifact, name: str) -> None:
        self.client.log_dict(self.run.info.run_id, _described(made), "artifact.json")

    def close(self) -> None:
        self.client.set_terminated(self.run.info.run_id)


SINKS: dict[type, Callable[[Any, TrackedPlace, Mapping[str, Any]], Sink]] = {
    Wandb: _Wandb,
    Tensorboard: _Tensorboard,
    Trackio: _Trackio,
    Mlflow: _Mlflow,
}
