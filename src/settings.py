"""What every settings class builds on. Imports pydantic alone, as all schemas do; see config.py."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Unkeyed = Field(exclude=True)
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """A group of settings: every key known, every value checked, none changed, no default."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, coerce_numbers_to_str=True, allow_inf_nan=False, protected_namespaces=()
    )
