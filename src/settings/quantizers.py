"""How weights become fewer bits, and what a method looks at for it."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from src.settings.base import Settings, Unkeyed


class OneWidth(Settings):
    bits: Literal[3, 4, 8]
    """bits per weight"""

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of the weights, the fewest first."""
        return (self.bits,)


class Grouped(Settings):
    group_size: Literal[-1, 16, 32, 64, 128]
    """weights that share a scale; -1: a whole column"""


class GptqSettings(Grouped):
    act_order: bool
    """quantize columns by falling activation (desc_act); NPU compilers want false"""
    damp: Annotated[float, Field(gt=0, lt=1)]
    """share of the mean Hessian diagonal added for stability"""


class GptqQuantizer(OneWidth, GptqSettings):
    kind: Literal["gptq"]
    """Frantar et al. 2022, arXiv:2210.17323"""


class MixedQuantizer(GptqSettings):
    kind: Literal["mixed"]
    """GPTQ in 4 bits, and in 8 where the model would otherwise lose most, by the KL that each part alone costs on calibration rows"""
    bits_per_weight: Annotated[float, Field(gt=4, le=9)]
    """of the matrices inside layers and of the output layer, scales and zero points counted: 4.16 is int4 in groups of 128, 8.19 int8"""
    output_layer: bool
    """the output layer too, where it is not the embedding; false: it stays as it is stored"""

    @property
    def widths(self) -> tuple[int, ...]:
        return (4, 8)


class RtnQuantizer(OneWidth, Grouped):
    kind: Literal["rtn"]
    """each weight rounded to the nearest, whatever the conversations: what another method has to be better than"""


class BnbQuantizer(OneWidth):
    kind: Literal["bnb"]
    """bitsandbytes' layers, for GPUs, without calibration: NF4 in 4 bits (arXiv:2305.14314), LLM.int8() in 8 (arXiv:2208.07339)"""
    bits: Literal[4, 8]
    """bits per weight"""
    double_quant: bool
    """NF4's scales in 8 bits too, 0.4 bits a weight less"""


class AwqQuantizer(OneWidth, Grouped):
    kind: Literal["awq"]
    """Lin et al. 2023, arXiv:2306.00978"""
    bits: Literal[4]
    """bits per weight"""


AnyQuantizer = Annotated[GptqQuantizer | MixedQuantizer | RtnQuantizer | AwqQuantizer | BnbQuantizer, Field(discriminator="kind")]


class Calibration(Settings):
    rows: PositiveInt
    """conversations used at most, of all lengths alike"""
    max_length: PositiveInt
    """tokens per conversation; longer ones are cut, and counted"""
    seed: NonNegativeInt
    """which conversations are drawn where there are more"""
    text: Annotated[str | None, Unkeyed]
    """file of general text to calibrate on beside the conversations; null: none"""
    text_share: Literal["auto"] | Annotated[float, Field(gt=0, lt=1)]
    """of the calibration tokens, the part that text gives; auto: a quarter, where there is a text"""
