"""Products of two operands batch by batch: what their kernels have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from kbitc.targets.kernels import vector as v

Expr = Any
Dim = Any


@dataclass(frozen=True)
class BatchSpec:
    """What a kernel computes.

    Attributes:
        a_lead, b_lead, lead: leading dimensions of a, b and out; those of a and b broadcast.
        rows, channels, columns: M, C, N.
    """

    a_lead: tuple[Dim, ...]
    b_lead: tuple[Dim, ...]
    lead: tuple[Dim, ...]
    rows: Dim
    channels: Dim
    columns: Dim

    def leads(self, dims: v.DimVars) -> tuple[tuple[Dim, ...], tuple[Dim, ...], tuple[Dim, ...]]:
        """The leading dimensions of a, b and out as variables of a kernel."""
        a, b, out = (tuple(dims(dim) for dim in given) for given in (self.a_lead, self.b_lead, self.lead))
        return a, b, out


def quotient(value: Dim, by: int) -> Dim:
    """value // by of a size."""
    return value // by if isinstance(value, int) else tirx.truncdiv(value, v.i64(by))


def source_batch(batch: Expr, lead: Sequence[Dim], own: Sequence[Dim]) -> Expr:
    """Which matrix of an operand belongs to matrix `batch` of the output.

    Args:
        batch: index of an output matrix.
        lead: leading dimensions of the output.
        own: leading dimensions of the operand; 1 repeats, missing ones too.
    """
    offset: Expr = v.i64(0)
    stride: Dim = 1
    for axis in range(len(lead) - 1, -1, -1):
        place = axis - (len(lead) - len(own))
        if place < 0:
            break
        index = tirx.truncmod(batch, v.i64(lead[axis])) if axis else batch
        if not (isinstance(own[place], int) and own[place] == 1):
            offset = offset + index * stride
            stride = stride * own[place]
        batch = tirx.truncdiv(batch, v.i64(lead[axis]))
    return offset
