"""The plan of a static integer graph: which values have codes, which nodes run on integers, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

#: int32 accumulators stay below this in magnitude.
ACCUMULATOR_LIMIT = 1 << 31
INTEGER = "integer"
FLOAT = "float"

#: Zero points of int8 codes as uint8 codes.
INT8_SHIFT = 128


@dataclass(frozen=True)
class Codes:
    """Affine codes of a value: x ~ scale (code - zero), code in 0 .. 2^bits - 1.

    Attributes:
        scale: representable in float32, positive, in units of x per code step.
        zero: the code of 0.0.
        bits: 1 .. 8.
    """

    scale: float
    zero: int
    bits: int = 8

    @property
    def high(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def code_of(self, number: float) -> int:
        """The nearest code, half to even, clipped."""
        return int(np.clip(np.rint(number / self.scale) + self.zero, 0, self.high))

    def rounded(self, numbers: FloatArray) -> FloatArray:
        """f32 numbers through their codes and back."""
        steps = np.rint(numbers / np.float32(self.scale))
        return np.asarray(np.clip(steps, -self.zero, self.high - self.zero) * np.float32(self.scale), np.float32)


def codes_for(low: float, high: float, bits: int) -> Codes:
    """Codes whose range covers [low, high] and zero (Jacob et al., arXiv 1712.05877, section 3).

    Args:
        low, high: finite; the range is widened to hold 0.
        bits: of a code.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    top = (1 << bits) - 1
    scale = np.float32((high - low) / top)
    if not scale >= np.finfo(np.float32).tiny:
        return Codes(1.0, 0, bits)
    return Codes(float(scale), int(np.clip(np.rint(-low / float(scale)), 0, top)), bits)


@dataclass(frozen=True)
class ValueEntry:
    """The codes of one value.

    Attributes:
        value: its name.
        codes: scale, zero point and bits.
        reason: where they come from, in words.
    """

    value: str
    codes: Codes
    reason: str

    def as_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        return {"value": self.value, **asdict(self.codes), "reason": self.reason}


@dataclass(frozen=True)
class Proof:
    """Why the int32 accumulators of a node cannot overflow.

    Attributes:
        terms: products summed in one accumulator.
        bound: the largest |accumulator| that codes and weights of these ranges can give, bias included.
        words: the same as a formula with numbers.
    """

    terms: int
    bound: int
    words: str

    @property
    def holds(self) -> bool:
        """Whether the bound fits int32."""
        return self.bound < ACCUMULATOR_LIMIT


@dataclass(frozen=True)
class NodeEntry:
    """How one node runs.

    Attributes:
        node: its name.
        op_type: its operator.
        form: "integer" or "float".
        reason: why, in words.
        proof: of its accumulators, where it has some.
    """

    node: str
    op_type: str
    form: str
    reason: str
    proof: Proof | None = None


@dataclass(frozen=True)
class StaticPlan:
    """All decisions about activations, in the order of the graph.

    Attributes:
        observer: name of the observer that gave the ranges.
        data: where the statistics come from.
        values: one entry for each value that has codes.
        wides: one entry for each value that is kept as finer int32 numbers, zero point 0.
        integer_only: no float node may be left.
        nodes: one entry a node.
        carried: value name -> the codes that the model itself rounds it to (`kbitc.passes.carried`).
    """

    observer: str
    data: str
    values: tuple[ValueEntry, ...] = ()
    nodes: tuple[NodeEntry, ...] = ()
    wides: tuple[ValueEntry, ...] = ()
    integer_only: bool = False
    carried: Mapping[str, Codes] = field(default_factory=dict)
    _codes: dict[str, Codes] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_codes", {entry.value: entry.codes for entry in self.values})

    def codes(self, value: str | None) -> Codes:
        """The codes of a value that has some."""
        return self._codes[value or ""]

    def wide_scale(self, value: str | None) -> float:
        """Units of x per step of a value that is kept as int32."""
        return next(entry.codes.scale for entry in self.wides if entry.value == value)

    def has_codes(self, value: str | None) -> bool:
        """Whether a value has codes."""
        return value in self._codes

    def as_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        return {
            "observer": self.observer,
            "data": self.data,
            "integer_only": self.integer_only,
            "values": [entry.as_json() for entry in self.values],
            "wides": [entry.as_json() for entry in self.wides],
            "nodes": [asdict(entry) for entry in self.nodes],
        }
