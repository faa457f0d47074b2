"""A quantization scheme and its exact text form, such as ``int4:b32`` or ``uint4:b64:zp:f32``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from kbitc import catalog
from kbitc.errors import UsageError
from kbitc.quant.format import Format

FORMATS = "kbitc.quant.formats"
BLOCK_STEP = 16
MAX_BLOCK = 1024
_HEAD = re.compile(r"([a-z][a-z_]*?)-?(\d+)")
EXAMPLES = "write it as int4:b32, uint4:b64:zp, nf4:b64, int8:c or int8:t"


class Granularity(Enum):
    """How many weights share one scale: all, those of one output channel, or a block along the reduction axis."""

    TENSOR = "t"
    CHANNEL = "c"
    BLOCK = "b"


class ScaleType(Enum):
    """How a scale is stored."""

    F16 = "f16"
    F32 = "f32"


@dataclass(frozen=True)
class QuantScheme:
    """What a weight becomes.

    Attributes:
        format: family name of the data type; `kbitc/quant/formats/<format>.py` defines it.
        bits: bits of one code, 1 to 8.
        granularity: what shares a scale.
        block: weights per scale along the reduction axis; 0 unless granularity is BLOCK.
        zero_point: whether each scale has a zero point code beside it.
        scale_type: storage type of the scales.
    """

    format: str
    bits: int
    granularity: Granularity
    block: int = 0
    zero_point: bool = False
    scale_type: ScaleType = ScaleType.F16

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise UsageError("a scheme has 1 to 8 bits", got=self.bits, remedy=EXAMPLES)
        blocked = self.granularity is Granularity.BLOCK
        if blocked and (self.block % BLOCK_STEP or not 0 < self.block <= MAX_BLOCK):
            raise UsageError(
                "a block is a multiple of 16 from 16 to 1024", got=self.block, remedy="use 32, 64 or 128"
            )
        if not blocked and self.block:
            raise UsageError("only block granularity has a block size", got=self.block, remedy=EXAMPLES)
        data_type = self.data_type()
        if data_type.asymmetric and not self.zero_point:
            raise UsageError("this format needs a zero point", got=str(self), remedy=f"write {self}:zp")
        if self.zero_point and not data_type.asymmetric:
            raise UsageError("this format has no zero point", got=str(self), remedy=f"use uint{self.bits} for one")

    def data_type(self) -> Format:
        """The format with its levels."""
        module = catalog.find(FORMATS, self.format, "data type")
        made: Format = module.make(self.bits)
        return made

    def __str__(self) -> str:
        parts = [f"{self.format}{self.bits}", self.granularity.value + (str(self.block) if self.block else "")]
        if self.zero_point:
            parts.append("zp")
        if self.scale_type is not ScaleType.F16:
            parts.append(self.scale_type.value)
        return ":".join(parts)

    @classmethod
    def parse(cls, text: str) -> QuantScheme:
        """Read the text form back; ``str(QuantScheme.parse(s))`` is the normal form of s.

        Raises:
            UsageError: when the text is not a scheme.
        """
        head, *rest = text.strip().split(":")
        match = _HEAD.fullmatch(head)
        if match is None:
            raise UsageError("not a quantization scheme", got=repr(text), remedy=EXAMPLES)
        granularity, block, zero_point, scale_type = Granularity.BLOCK, 32, False, ScaleType.F16
        for part in rest:
            if part in ("t", "c"):
                granularity, block = Granularity(part), 0
            elif re.fullmatch(r"b\d+", part):
                granularity, block = Granularity.BLOCK, int(part[1:])
            elif part == "zp":
                zero_point = True
            elif part in (kind.value for kind in ScaleType):
                scale_type = ScaleType(part)
            else:
                raise UsageError("unknown part of a scheme", got=f"{part!r} in {text!r}", remedy=EXAMPLES)
        zero_point = zero_point or match[1] == "uint"
        return cls(match[1], int(match[2]), granularity, block, zero_point, scale_type)
