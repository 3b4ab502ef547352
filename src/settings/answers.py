"""How answers are made: the settings that chat, serve and answer share."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from src.settings.base import Settings


class Decoding(Settings):
    temperature: NonNegativeFloat
    """0: the likeliest token each time, as evaluate takes it"""
    top_p: Annotated[float, Field(gt=0, le=1)]
    """draw from the likeliest tokens that together hold this probability"""
    max_tokens: Annotated[PositiveInt, Field(lt=1 << 31)]
    """tokens of an answer at most"""
    seed: NonNegativeInt
    """seed of the draws; the same conversation and seed bring the same answer"""
    stop: list[Annotated[str, Field(min_length=1)]]
    """texts that end an answer, themselves left out; the end of the turn always does"""
