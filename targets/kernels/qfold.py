"""What happens to the exact int32 sum of a block: zero points off, times its scales, onto the sum of its output.

The order of float operations is that of `qgemm.py`, whichever instructions made the exact sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kbitc.quant.packing import LANES
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.isa import Isa
from kbitc.targets.kernels.packed import WeightArguments
from kbitc.targets.kernels.tasks import clamp, store_channels

if TYPE_CHECKING:
    from kbitc.targets.kernels.qgemm import QgemmSpec

Expr = Any
Buffer = Any
# (tile from the first, register of the tile)
Place = tuple[int, int]


@dataclass
class Arguments:
    """The kernel's buffers, flattened to rows where several dimensions lead."""

    codes: Buffer
    act_scales: Buffer
    sums: Buffer
    weight: WeightArguments
    bias: Buffer | None
    out: Buffer
    accumulators: Buffer | None


@dataclass(frozen=True)
class Numbers:
    """Those of one block by place: scales (factors as int32 where the weight has them) and offsets, vectors."""

    first: Expr
    tap: Expr
    block: Expr
    scales: dict[Place, Expr]
    offsets: dict[Place, Expr] | None


class Fold:
    """Adds exact sums of blocks to the sums of outputs.

    Args:
        spec: of the kernel.
        isa: instruction set of the vectors.
        args: buffers.
        zero_shift: a stored zero point less what the exact sum counts it as.
    """

    def __init__(self, spec: QgemmSpec, isa: Isa, args: Arguments, zero_shift: int) -> None:
        self.spec = spec
        self.isa = isa
        self.args = args
        self.zero_shift = zero_shift

    def places(self, tiles: int) -> list[Place]:
        """All places of some tiles."""
        return [(i, p) for i in range(tiles) for p in range(self.isa.parts)]

    def load(self, buffer: Buffer, where: tuple[Expr, Expr, Expr], tiles: int) -> dict[Place, Expr]:
        """Scales or offsets at (first tile, tap, block) as float32 vectors, factors as int32 vectors."""
        first, tap, block = where
        lanes, found = self.isa.lanes, {}
        for i, p in self.places(tiles):
            stored = v.load(buffer, [first + i, tap, block, p * lanes], lanes)
            if str(buffer.dtype) == "uint8":
                found[i, p] = v.bind(v.cast(stored, "int32", lanes))
            else:
                found[i, p] = v.bind(self.isa.widen(stored) if str(buffer.dtype) == "float16" else stored)
        return found

    def numbers(self, first: Expr, tiles: int, tap: Expr, block: Expr) -> Numbers:
        """What the block of a tap needs, once for all rows."""
        weight = self.args.weight
        at, of = (tap, block) if self.spec.scale_per_block else (v.i64(0), v.i64(0))
        scales = self.load(weight.scales if weight.factors is None else weight.factors, (first, at, of), tiles)
        offsets = None if weight.offsets is None else self.load(weight.offsets, (first, at, of), tiles)
        return Numbers(first, tap, block, scales, offsets)

    def row(
        self, numbers: Numbers, exact: dict[Place, Expr], source: Expr, out_row: Expr, held: dict[Place, Buffer]
    ) -> None:
        """One row of activations.

        Args:
            numbers: of the block.
            exact: int32 sums of code times level.
            source, out_row: row in the activation and in the output.
            held: registers of what is added to: float32, with factors the int32 totals.
        """
        spec, args, lanes, block = self.spec, self.args, self.isa.lanes, numbers.block
        step = v.bind(args.act_scales[source, v.i64(0) if spec.row_scales else block])
        act_scale = v.bind(v.splat(step, lanes))
        if numbers.offsets is not None:
            summed = v.bind(v.splat(v.cast(args.sums[source, block], "float32", 1) * step, lanes))
        for (i, p), scale in numbers.scales.items():
            value = exact[i, p]
            if args.weight.zeros is not None:
                value = v.bind(value - self._zero_level(numbers, (i, p)) * v.splat(args.sums[source, block], lanes))
            if args.accumulators is not None:
                row = [out_row, numbers.tap * spec.blocks + block]
                store_channels(args.accumulators, row, numbers.first + i, p, value, spec.outputs, lanes)
            if spec.factors:
                v.put(held[i, p], v.get(held[i, p], lanes) + value * scale, lanes)
                continue
            total = v.get(held[i, p], lanes) + v.cast(value, "float32", lanes) * (act_scale * scale)
            if numbers.offsets is not None:
                total = v.bind(total) + summed * numbers.offsets[i, p]
            v.put(held[i, p], total, lanes)

    def _zero_level(self, numbers: Numbers, place: Place) -> Expr:
        """The zero point as it is counted: int32 vector."""
        lanes, (i, p) = self.isa.lanes, place
        at = (numbers.tap, numbers.block) if self.spec.scale_per_block else (v.i64(0), v.i64(0))
        stored = v.load(self.args.weight.zeros, [numbers.first + i, *at, p * lanes], lanes)
        return v.cast(stored, "int32", lanes) - v.full(self.zero_shift, "int32", lanes)

    def steps(self, first: Expr, tiles: int) -> dict[Place, Expr]:
        """The scales of the channels beside factors."""
        return self.load(self.args.weight.scales, (first, v.i64(0), v.i64(0)), tiles)

    def totals(
        self, steps: dict[Place, Expr], totals: dict[Place, Expr], source: Expr, held: dict[Place, Buffer]
    ) -> None:
        """The exact sums of a tap with its factors, scaled, to the float sums of a row."""
        lanes = self.isa.lanes
        act_scale = v.bind(v.splat(self.args.act_scales[source, v.i64(0)], lanes))
        for place, step in steps.items():
            value = v.cast(totals[place], "float32", lanes) * (act_scale * step)
            v.put(held[place], v.get(held[place], lanes) + value, lanes)

    def finish(self, first: Expr, rows: list[tuple[Expr, dict[Place, Buffer]]]) -> None:
        """Bias, clamp, store rows of (row of the output, sums); the last tile stores only its real channels."""
        lanes, args, values = self.isa.lanes, self.args, []
        for _, held in rows:
            for (i, p), buffer in held.items():
                value = v.get(buffer, lanes)
                if args.bias is not None:
                    value = value + v.load(args.bias, [(first + i) * LANES + p * lanes], lanes)
                values.append(v.bind(clamp(v.bind(value), self.spec.post, lanes)))
        each = iter(values)
        for row, held in rows:
            for i, p in held:
                store_channels(args.out, [row], first + i, p, next(each), self.spec.outputs, lanes)
