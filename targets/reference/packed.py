"""A packed weight in TE loops: how codes, scales, zero points and offsets are read back."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
from tvm import tirx

from kbitc.errors import InternalError
from kbitc.quant.packing import GROUP, LANES, UNIT, pack_codes, pack_per_channel, per_vector, spare
from kbitc.quant.scheme import Granularity, ScaleType
from kbitc.quant.tensor import QTensor
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.contraction import Contraction, RelaxExpr
from kbitc.targets.lower.group import Group
from kbitc.targets.lower.values import Constant, Expr


@dataclass(frozen=True)
class PackedWeight:
    """The parameters of a quantized weight, as every target stores them.

    Attributes:
        tensor: the weight.
        codes, scales, zeros, offsets, grid: relax variables; zeros and offsets are None where the scheme has none.
    """

    tensor: QTensor
    codes: RelaxExpr
    scales: RelaxExpr
    zeros: RelaxExpr | None
    offsets: RelaxExpr | None
    grid: RelaxExpr

    @property
    def blocks(self) -> int:
        """Blocks along C within one tap."""
        return ceil(self.tensor.shape[2] / self.block)

    @property
    def block(self) -> int:
        """Channels of one block."""
        return min(self.tensor.block, self.tensor.shape[2])

    def code(self, group: Group, n: Expr, t: Expr, c: Expr) -> Expr:
        """The code of a weight as int32: a field of a code vector, or of a spare one put together from its pieces."""
        bits = self.tensor.bits
        codes = per_vector(bits)
        tile, unit, step = n // LANES, c // UNIT, (c % UNIT) // GROUP
        byte = (n % LANES) * GROUP + c % GROUP

        def read(vector: Expr) -> Expr:
            return tirx.Cast("int32", group.read(self.codes, [tile, t, unit, vector, byte]))

        def low(value: Expr, width: int) -> Expr:
            return value & tirx.const(2**width - 1, "int32")

        vector = step // codes
        found = read(tirx.min(vector, bits - 1) if spare(bits) else vector)
        for i, pieces in enumerate(spare(bits)):
            made: Expr = tirx.const(0, "int32")
            for piece in pieces:
                field = low(read(tirx.IntImm("int64", piece.vector)) >> piece.source, piece.width)
                made = made + (field << piece.target)
            found = tirx.if_then_else(vector == bits + i, made, found)
        return low(found >> tirx.Cast("int32", (step % codes) * bits), bits)

    def _place(self, n: Expr, t: Expr, block: Expr) -> list[Expr]:
        """Index of a scale in its parameter."""
        if self.tensor.scheme.granularity is Granularity.BLOCK:
            return [n // LANES, t, block, n % LANES]
        zero = tirx.IntImm("int64", 0)
        return [n // LANES, zero, zero, n % LANES]

    def scale(self, group: Group, n: Expr, t: Expr, block: Expr) -> Expr:
        """The float32 scale of a block."""
        return tirx.Cast("float32", group.read(self.scales, self._place(n, t, block)))

    def offset(self, group: Group, n: Expr, t: Expr, block: Expr) -> Expr:
        """The float32 offset of a block; there must be some."""
        return tirx.Cast("float32", group.read(self.offsets, self._place(n, t, block)))

    def level(self, group: Group, n: Expr, t: Expr, c: Expr) -> Expr:
        """grid[code] - grid[zero point] as int32, with offsets the code."""
        if self.offsets is not None:
            return self.code(group, n, t, c)
        value = tirx.Cast("int32", group.read(self.grid, [tirx.Cast("int64", self.code(group, n, t, c))]))
        if self.zeros is None:
            return value
        zero = group.read(self.zeros, self._place(n, t, c // self.block))
        return value - tirx.Cast("int32", group.read(self.grid, [tirx.Cast("int64", zero)]))

    def value(self, group: Group, n: Expr, t: Expr, c: Expr) -> Expr:
        """The float32 number that a code stands for."""
        block = c // self.block
        value = tirx.Cast("float32", self.level(group, n, t, c)) * self.scale(group, n, t, block)
        return value if self.offsets is None else value + self.offset(group, n, t, block)


def packed_weight(ctx: Context, contraction: Contraction) -> PackedWeight:
    """Register the parameters of a quantized weight; once for contractions that share it."""
    weight = contraction.weight
    if not isinstance(weight, QTensor):
        raise InternalError("the weight is not quantized", where=contraction.name)
    key = ("reference weight", id(weight))
    if key not in ctx.memo:
        n = weight.shape[0]
        dtype = np.float16 if weight.scheme.scale_type is ScaleType.F16 else np.float32
        zeros = offsets = None
        if weight.zero_points is not None:
            zeros = ctx.weight(f"{contraction.name}.zero_points", pack_per_channel(weight.zero_points, n))
        if weight.offsets is not None:
            offsets = ctx.weight(f"{contraction.name}.offsets", pack_per_channel(weight.offsets.astype(dtype), n))
        ctx.memo[key] = PackedWeight(
            weight,
            ctx.weight(f"{contraction.name}.codes", pack_codes(weight.codes, weight.bits)),
            ctx.weight(f"{contraction.name}.scales", pack_per_channel(weight.scales.astype(dtype), n)),
            zeros,
            offsets,
            ctx.var(Constant(weight.format.grid, "int8")),
        )
    found: PackedWeight = ctx.memo[key]
    return found
