"""What is read, and how it is split."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, field_serializer, field_validator, model_validator

from src.settings.base import Fraction, Settings, Unkeyed


class Holdout(Settings):
    val: Fraction
    """share of records held out for evaluation"""
    calib: Fraction
    """share of records held out to calibrate quantization"""
    split_seed: int
    """seed of the hash that gives each record its split"""

    @model_validator(mode="after")
    def _leaves_train(self) -> Self:
        if self.val + self.calib >= 1:
            raise ValueError("val + calib must stay below 1, or nothing is left to train on")
        return self


Role = Literal["user", "assistant", "system", "tool", "tool_call"]


COLUMNS = (
    *("messages", "role", "content", "prompt", "response", "system", "tools", "input", "history", "reasoning", "weight", "id"),
    *("text", "chosen", "rejected", "label"),
)
"""what a column can be to us"""


class Data(Settings):
    path: Annotated[str | list[str], Field(exclude=True, min_length=1)]
    """conversations: a file, folder, glob or hub id; several as [a,b]. JSON, JSON Lines, CSV, TSV, Parquet, Arrow, text; gz, bz2, xz, zst, zip"""
    format: Literal["auto", "qwen", "sharegpt", "openai", "alpaca", "prompt_completion", "question_answer", "preference", "text"]
    """layout of the records; auto detects it and says which"""
    columns: dict[str, str | None]
    """what columns are called, as "data.columns={prompt:question,response:reply}"; null: a column that is not what its name says"""
    roles: dict[str, Role]
    """what roles are called beside the usual names, as "data.roles={agent:assistant,customer:user}" """
    weights: list[PositiveFloat] | None
    """for each path how often its records come into train: 2 twice, 0.5 a half of them, drawn by their hash; null: once"""
    dedupe: Annotated[Literal["none", "exact", "near"], Field(exclude_if=lambda kind: kind == "none")]
    """records that say again what an earlier one does: none counts them; exact drops them; near: also those of which 70 % of three words in a row are alike"""
    unseen: Annotated[list[str], Field(exclude=True)]
    """evaluation sets, each a file, folder or glob: records of data.path that share 13 words in a row with one are dropped; []: none"""
    private: Annotated[bool | None, Unkeyed]
    """true: push shares neither the dataset nor what is made from it; marks one that is finished, too, and makes nothing anew; false takes a mark away; null: as it is"""
    subset: Annotated[str | None, Unkeyed]
    """subset (config) of a data set on the hub, or of a folder laid out like one; null: its default"""
    hub_split: Annotated[str, Unkeyed]
    """split of a data set on the hub, or of a folder whose files are named by split"""
    revision: Annotated[str | None, Unkeyed]
    """commit, tag or branch on the hub; null: its default"""
    on_fault: Literal["error", "drop"]
    """malformed records: fail and list them by fault, or drop and count them, each named in dropped.jsonl"""
    val: Fraction | Annotated[str, Field(strict=True, pattern="[^0-9.eE+-]")]
    """share of records held out for evaluation; or a file, folder or glob of conversations held out"""
    calib: Fraction
    """share of records held out to calibrate quantization"""
    split: Literal["hash", "exact"]
    """hash: a record's split follows from its content alone; exact: the shares to the record, so adding records may move others"""
    split_seed: int
    """seed of the hash that gives each record its split"""

    @property
    def paths(self) -> list[str]:
        """What is read, in order."""
        return [self.path] if isinstance(self.path, str) else self.path

    @field_serializer("val")
    def _keyed(self, val: float | str) -> float | str:
        # A file of its own is a parent, known by its content and not by its name.
        return "file" if isinstance(val, str) else val

    @field_validator("columns")
    @classmethod
    def _known(cls, columns: dict[str, str | None]) -> dict[str, str | None]:
        for ours, theirs in columns.items():
            if ours not in COLUMNS:
                turned = f"; it is {{OURS:YOURS}}: {{{theirs}:{ours}}}" if theirs in COLUMNS else f"; there is {', '.join(COLUMNS)}"
                raise ValueError(f"no column is called '{ours}' here{turned}")
        if double := next((name for name in columns.values() if name and list(columns.values()).count(name) > 1), None):
            raise ValueError(f"'{double}' can be one column only")
        return columns

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if (0 if isinstance(self.val, str) else self.val) + self.calib >= 1:
            raise ValueError("val + calib must stay below 1, or nothing is left to train on")
        if self.weights is not None and len(self.weights) != len(self.paths):
            raise ValueError(
                f"data.weights has {len(self.weights)} numbers for {len(self.paths)} paths; it has one for each, in their order"
            )
        return self
