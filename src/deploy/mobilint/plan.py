"""What a deploy for Mobilint will do, found out in milliseconds: the model, sizes, lengths, bits and compiler. Raises where something stands in the way."""

import math
from dataclasses import dataclass
from pathlib import Path

from src.core import stage
from src.core.artifact import Artifact
from src.core.errors import BadData, ConfigError, MissingInput
from src.core.files import read_json
from src.core.log import size
from src.deploy import preflight
from src.deploy.embedding import find_embedding
from src.deploy.mobilint import toolchain
from src.deploy.mobilint.toolchain import CHIPS, WEIGHTS, Compiler
from src.models import safetensors_io
from src.models.folder import trust_of
from src.settings.targets import Mobilint
from src.sizing import takes
from src.sizing.config_reader import read_shape
from src.sizing.shape import ModelShape

DEVICES = {"aries": "aries-rb", "regulus": "regulus-rb"}
"""chip -> its name in the compiler and in transformers-mblt; regulus-ra is not supported for language models"""
SCHEMES = {"aries": "all", "regulus": "single"}
"""chip -> which core modes the compiled file has, as Mobilint's scripts ask for them"""
TRIED = {"aries": 4096, "regulus": 1024}
"""chip -> max_sequence_length and max_cache_length of Mobilint's scripts"""
FLOAT = 4
"""bytes of an fp32 value"""

OWN_TEXT = "target.languages=[en] target.texts=FOLDER calibrates on text of yours"


@dataclass(frozen=True)
class CompilePlan:
    """Everything decided before the work begins.

    table: the embedding table in the model's shards. values: of all tensors but it.
    source: the folder of texts in `languages`, or where it names none the calib split; source_words: the same for a person.
    context: prompt and answer in tokens. low, high: tokens of a calibration sequence. device: gpu or cpu.
    guarded: the job refuses to run under a compiler of another API. trust: custom code of the model was allowed when it was trained.
    chip: a key of DEVICES.
    """

    model: Path
    config: dict
    shape: ModelShape
    table: safetensors_io.Entry
    values: int
    chip: str
    weight_type: str
    context: int
    low: int
    high: int
    samples: int
    languages: tuple[str, ...]
    source: Path
    source_words: str
    device: str
    compiler: Compiler
    guarded: bool
    trust: bool
    notes: tuple[str, ...]

    @property
    def bits(self) -> int:
        return 8 if self.weight_type == "w8" else 4

    @property
    def value_bits(self) -> int:
        return 4 if self.weight_type == "w4" else 8

    @property
    def rotates(self) -> bool:
        """Whether the compile is asked for SpinR1, which turns the model's input, so that the embedding table is turned the same way."""
        return self.bits == 4 or self.compiler.api == "1.3"

    @property
    def mxq(self) -> str:
        """Name of the compiled file."""
        return f"{self.config['model_type']}-{self.weight_type}.mxq"

    @property
    def table_bytes(self) -> int:
        """Bytes of the embedding table in fp32."""
        return math.prod(self.table.shape) * FLOAT

    @property
    def calibration_bytes(self) -> int:
        """Bytes of the calibration files at most."""
        return self.samples * self.high * self.table.shape[1] * FLOAT

    @property
    def mxq_bytes(self) -> int:
        """Bytes of the weights in the compiled file, the output layer's included."""
        return (self.values + (math.prod(self.table.shape) if self.shape.tied else 0)) * self.bits // 8

    @property
    def mblt_bytes(self) -> int:
        """Bytes on disk, estimated, of the parsed model that API 1.3 writes between its two steps: all weights in fp32."""
        return (self.values + math.prod(self.table.shape)) * FLOAT if self.compiler.api == "1.3" else 0

    def lines(self, job: Path, argv: str) -> list[str]:
        rows, hidden = self.table.shape
        return [
            f"compiler: {self.compiler}",
            f"job: {job}, {self.weight_type}, context {self.context}, on {self.device}: {argv}",
            f"embedding.pt: fp32 {rows} x {hidden}, {size(self.table_bytes)}" + ("; rotated for the bundle" if self.rotates else ""),
            f"calibration: {self.samples} sequences of {self.low} to {self.high} tokens from {self.source_words}, {size(self.calibration_bytes)} at most",
            f"{self.mxq}: about {size(self.mxq_bytes)}",
            *self.notes,
        ]


def make(inputs: dict[str, Artifact], target: Mobilint) -> CompilePlan:
    """The plan for a model. Raises ConfigError, WrongKind, MissingInput, BadData or MissingTool."""
    model = inputs["model"].path
    config = read_json(model / "config.json")
    shape = read_shape(model)
    takes.mobilint(config, shape, target, where=str(model / "config.json"))
    table = find_embedding(model)
    notes = preflight.check_headers(model, shape, table)
    if not any((model / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise MissingInput(
            "the model folder has no tokenizer", where=str(model), fix=f"python -m src.aux_files source=BASE_MODEL target={model}"
        )
    compiler = toolchain.find(target)
    if compiler.api not in CHIPS[target.chip]:
        raise ConfigError(
            f"language models for {target.chip.upper()} take API {' or '.join(CHIPS[target.chip])}, not {compiler.api}",
            where=str(compiler),
            fix=[f"install qbcompiler {CHIPS[target.chip][-1]}, the wheel for {target.chip.upper()}", "target=mobilint_aries"],
        )
    if target.weight_type not in WEIGHTS[compiler.api]:
        having = [api for api, types in WEIGHTS.items() if target.weight_type in types]
        raise ConfigError(
            f"target.weight_type={target.weight_type} takes API {' or '.join(having)}, not {compiler.api}",
            where=str(compiler),
            fix=[f"target.weight_type={type}" for type in WEIGHTS[compiler.api]],
        )
    notes += [
        f"warning: {remark}"
        for remark in (
            *toolchain.remarks(compiler, target.sdk),
            *(
                [
                    f"target.context_len={target.context_len} is more than the {TRIED[target.chip]} of Mobilint's own scripts for {target.chip.upper()}"
                ]
                if target.context_len > TRIED[target.chip]
                else []
            ),
        )
    ]
    low, high = target.lengths()
    source, source_words = _calibration_source(inputs, target)
    values = sum(math.prod(entry.shape) for entry in safetensors_io.entries(model).values()) - math.prod(table.shape)
    return CompilePlan(
        model=model,
        config=config,
        shape=shape,
        table=table,
        values=values,
        chip=target.chip,
        weight_type=target.weight_type,
        context=target.context_len,
        low=low,
        high=high,
        samples=target.samples,
        languages=tuple(target.languages or ()),
        source=source,
        source_words=source_words,
        device=("gpu" if toolchain.has_gpu() else "cpu") if target.device == "auto" else target.device,
        compiler=compiler,
        guarded=target.sdk == "auto",
        trust=trust_of(inputs["model"]),
        notes=tuple(notes),
    )


def _calibration_source(inputs: dict[str, Artifact], target: Mobilint) -> tuple[Path, str]:
    """Where the sequences come from, and the same in words. Raises MissingInput or BadData where there is nothing to make them of."""
    if target.languages is None or target.texts is None:
        dataset = inputs["dataset"]
        if not dataset.files["calib.jsonl"]["size"]:
            raise MissingInput(
                "the calib split is empty, and the compiler calibrates on it",
                where=str(dataset.path),
                fix=[stage.made_again(dataset, "data.calib=0.1"), OWN_TEXT],
            )
        return dataset.path / "calib.jsonl", f"the calib split of {dataset.path} through the training template"
    return Path(target.texts), f"{target.texts} ({', '.join(text_file(Path(target.texts), name).name for name in target.languages)})"


def text_file(folder: Path, language: str) -> Path:
    """<language>.jsonl or <language>.txt. Raises MissingInput where neither is there, BadData where both are, or it is empty."""
    both = [file for ending in ("jsonl", "txt") if (file := folder / f"{language}.{ending}").is_file()]
    if not both:
        raise MissingInput(
            f"there is no text to calibrate on for '{language}'",
            where=str(folder / f"{language}.txt"),
            fix=f"put UTF-8 text there, or {language}.jsonl with a text a record, or leave '{language}' out of target.languages",
        )
    if len(both) > 1:
        raise BadData(
            f"there are two texts for '{language}', {both[0].name} and {both[1].name}", where=str(folder), fix="remove one of the two"
        )
    if not both[0].stat().st_size:
        raise BadData("the calibration text is empty", where=str(both[0]), fix="put UTF-8 text into it")
    return both[0]
