"""A quantization scheme and its exact text form, such as ``int4:b32``, ``fp4-e2m1:b64:dq8`` or ``int4:b32/i4``."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from kbitc import catalog
from kbitc.errors import UsageError
from kbitc.quant.format import Format

FORMATS = "kbitc.quant.formats"
BLOCK_STEP = 16
DEFAULT_BLOCK = 32
MAX_BLOCK = 1024
# A family name that ends in a digit is followed by a dash: log2-4.
_HEAD = re.compile(r"([a-z][a-z_]*?(?:\d(?=-\d))?)-?(\d+)(?:-([a-z][a-z0-9]*))?")
_BLOCK = re.compile(r"b(\d+)(?:/(i\d+))?")
# The smallest number of a block: what ggml, whose Q4_1 has such offsets, calls them.
OFFSET = "min"
EXAMPLES = "write it as int4:b32, uint4:b64:zp, uint4:b32:min, nf4:b64, fp4-e2m1:b32, int4:b32/i4, int8:c or int8:t"
# An integer level times the scale code of its block fits int8.
LARGEST_PRODUCT = 127
# With fewer different scale codes normal weights would lose more than 0.5 dB (measured: int5 with 7 loses 0.6).
FEWEST_SCALE_CODES = 8


class Granularity(Enum):
    """How many weights share one scale: all, those of one output channel, or a block along the reduction axis."""

    TENSOR = "t"
    CHANNEL = "c"
    BLOCK = "b"


class ScaleType(Enum):
    """How a scale is stored."""

    F16 = "f16"
    F32 = "f32"


class ScaleCode(Enum):
    """Whether scales are themselves quantized: scale = code * step, the code an unsigned integer of at least 1.

    PLAIN: no.
    DOUBLE: 8-bit codes, a step for every 256 scales in the order of [N, T, CB] (QLoRA, arXiv 2305.14314, section 3).
    INTEGER: 4-bit codes, a step for every output channel, such that level * code fits int8 (QServe, arXiv 2405.04532).
    """

    PLAIN = ""
    DOUBLE = "dq8"
    INTEGER = "i4"

    @property
    def bits(self) -> int:
        """Bits of one code; 0 for PLAIN."""
        return {"": 0, "dq8": 8, "i4": 4}[self.value]


@functools.cache
def _made(name: str, bits: int, variant: str) -> Format:
    module = catalog.find(FORMATS, name, "data type")
    made: Format = module.make(bits, variant) if variant else module.make(bits)
    return made


@functools.cache
def fixed_formats(bits: int) -> tuple[tuple[Format, str], ...]:
    """Every symmetric data type of so many bits whose levels are not learned, and its variant; int first."""
    found = []
    for name in sorted(catalog.names(FORMATS), key=lambda name: name != "int"):
        try:
            known = _variants(name, bits) or ("",)
            made = [(_made(name, bits, variant), variant) for variant in known]
        except UsageError:  # the family has no type of this width
            continue
        found += [item for item in made if not item[0].learned and not item[0].asymmetric]
    return tuple(found)


def _variants(name: str, bits: int) -> tuple[str, ...]:
    """The variants of a data type, its default first; empty where it has none."""
    module = catalog.find(FORMATS, name, "data type")
    known: tuple[str, ...] = module.variants(bits) if hasattr(module, "variants") else ()
    return known


def _variant(name: str, bits: int, variant: str) -> str:
    """The variant as it was asked for, the default for "".

    Raises:
        UsageError: the data type has no such variant.
    """
    known = _variants(name, bits)
    if not variant:
        return known[0] if known else ""
    if variant not in known:
        remedy = f"use {', '.join(known)}" if known else f"drop -{variant}"
        raise UsageError(f"{name} of {bits} bits has no such variant", got=repr(variant), remedy=remedy)
    return variant


@dataclass(frozen=True)
class QuantScheme:
    """What a weight becomes.

    Attributes:
        format: family name of the data type; `kbitc/quant/formats/<format>.py` defines it.
        bits: bits of one code, 1 to 8.
        granularity: what shares a scale.
        block: weights per scale along the reduction axis; 0 unless granularity is BLOCK.
        zero_point: whether each scale has a zero point code beside it.
        scale_type: storage type of the scales; with coded scales each code * step is exact in it.
        variant: which of a family of grids, such as e2m1; "" means the default and becomes it.
        scale_code: how scales are themselves quantized.
        offset: whether each scale has a number of its own type beside it that the lowest level stands for; then
            there is no zero point.
    """

    format: str
    bits: int
    granularity: Granularity
    block: int = 0
    zero_point: bool = False
    scale_type: ScaleType = ScaleType.F16
    variant: str = ""
    scale_code: ScaleCode = ScaleCode.PLAIN
    offset: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise UsageError("a scheme has 1 to 8 bits", got=self.bits, remedy=EXAMPLES)
        blocked = self.granularity is Granularity.BLOCK
        if blocked and (self.block % BLOCK_STEP or not 0 < self.block <= MAX_BLOCK):
            raise UsageError("a block is a multiple of 16 from 16 to 1024", got=self.block, remedy="use 32, 64 or 128")
        if not blocked and self.block:
            raise UsageError("only block granularity has a block size", got=self.block, remedy=EXAMPLES)
        object.__setattr__(self, "variant", _variant(self.format, self.bits, self.variant))
        self._check_zero()
        self._check_scale_code()

    def _check_zero(self) -> None:
        asymmetric = self.data_type().asymmetric
        if asymmetric and not self.zero_point and not self.offset:
            raise UsageError("this format needs a zero point", got=str(self), remedy=f"write {self}:zp or {self}:min")
        if (self.zero_point or self.offset) and not asymmetric:
            what = "zero point" if self.zero_point else "offset"
            raise UsageError(f"this format has no {what}", got=str(self), remedy=f"use uint{self.bits} for one")
        if self.zero_point and self.offset:
            raise UsageError("a scale has a zero point or an offset, not both", got=str(self), remedy="drop :zp")
        if self.offset and self.scale_code is not ScaleCode.PLAIN:
            code = self.scale_code.value
            raise UsageError("offsets stand beside float scales", got=str(self), remedy=f"drop {code}, or use :zp")

    def _check_scale_code(self) -> None:
        if self.scale_code is ScaleCode.DOUBLE and self.granularity is Granularity.TENSOR:
            raise UsageError("one scale a tensor is not worth quantizing", got=str(self), remedy="drop :dq8")
        if self.scale_code is not ScaleCode.INTEGER:
            return
        if self.granularity is not Granularity.BLOCK:
            raise UsageError("integer block scales need blocks", got=str(self), remedy="write int4:b32/i4")
        if self.largest_scale_code < FEWEST_SCALE_CODES:
            raise UsageError(
                f"levels up to {self.data_type().largest} leave integer block scales of 1 to {self.largest_scale_code}",
                got=str(self),
                remedy="use int or uint of at most 4 bits, fp4-e2m1, or float block scales",
            )

    @property
    def largest_scale_code(self) -> int:
        """The largest code of a coded scale; 0 when scales are not coded."""
        most: int = 2**self.scale_code.bits - 1
        if self.scale_code is ScaleCode.INTEGER:
            return min(most, LARGEST_PRODUCT // self.data_type().largest)
        return most

    def per_channel(self) -> QuantScheme:
        """The same with one scale an output channel; scales that are integers a block become plain."""
        code = ScaleCode.PLAIN if self.scale_code is ScaleCode.INTEGER else self.scale_code
        return replace(self, granularity=Granularity.CHANNEL, block=0, scale_code=code)

    def with_bits(self, bits: int) -> QuantScheme:
        """The same data type at another width, in its default variant.

        Integer block scales become plain ones where the levels leave them no room.

        Raises:
            UsageError: the data type has no such width.
        """
        if bits == self.bits:
            return self
        try:
            return replace(self, bits=bits, variant="")
        except UsageError:
            if self.scale_code is not ScaleCode.INTEGER:
                raise
            return replace(self, bits=bits, variant="", scale_code=ScaleCode.PLAIN)

    def data_type(self) -> Format:
        """The format with its levels; for a learned one (`kbitc.quant.learn`) with its first guess."""
        return _made(self.format, self.bits, self.variant)

    def __str__(self) -> str:
        dash = "-" if self.format[-1].isdigit() else ""
        integer, double = self.scale_code is ScaleCode.INTEGER, self.scale_code is ScaleCode.DOUBLE
        parts = [f"{self.format}{dash}{self.bits}" + (f"-{self.variant}" if self.variant else "")]
        parts.append(self.granularity.value + (str(self.block) if self.block else "") + ("/i4" if integer else ""))
        if self.zero_point:
            parts.append("zp")
        if self.offset:
            parts.append(OFFSET)
        if double:
            parts.append(self.scale_code.value)
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
        said: dict[str, Any] = {}
        for part in rest:
            read = _read_part(part, text)
            if said.keys() & read.keys():
                raise UsageError("a scheme says one thing twice", got=repr(text), remedy=f"drop :{part}")
            said.update(read)
        defaults: dict[str, Any] = {
            "granularity": Granularity.BLOCK,
            "block": DEFAULT_BLOCK,
            "zero_point": match[1] == "uint" and "offset" not in said,
        }
        return cls(match[1], int(match[2]), variant=match[3] or "", **(defaults | said))


def _read_part(part: str, text: str) -> dict[str, Any]:
    """What one part of a scheme's text says, by field."""
    block = _BLOCK.fullmatch(part)
    if block is not None and block[2] in (None, ScaleCode.INTEGER.value):
        code = {} if block[2] is None else {"scale_code": ScaleCode.INTEGER}
        return {"granularity": Granularity.BLOCK, "block": int(block[1]), **code}
    if part in ("t", "c"):
        return {"granularity": Granularity(part), "block": 0}
    if part == "zp":
        return {"zero_point": True}
    if part == OFFSET:
        return {"offset": True}
    if part == ScaleCode.DOUBLE.value:
        return {"scale_code": ScaleCode.DOUBLE}
    if part in (kind.value for kind in ScaleType):
        return {"scale_type": ScaleType(part)}
    raise UsageError("unknown part of a scheme", got=f"{part!r} in {text!r}", remedy=EXAMPLES)
