"""The register tile of the float32 products: some rows of activations by some 16-channel tiles of weights.

Every accumulator is a register of its own, and the reduction runs innermost:

    sum[r, n] = fma(x[r, c], w[c, n], sum[r, n])        c = 0, 1, 2, ... in this order

so that an output is the same sequence of fused multiply-adds on every target, whatever the tile that computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kbitc.quant.packing import LANES
from kbitc.targets.kernels import vector as v
from kbitc.targets.target import Target
from kbitc.targets.tuning import Schedule

Expr = Any
Buffer = Any
Index = Any
# No tile has more rows than this: more pointers than general registers would follow.
MOST_ROWS = 12
# Multiply-adds that the body of the reduction loop writes out, about; more costs compile time and gains no speed.
BODY = 48
MOST_UNROLLED = 8


@dataclass(frozen=True)
class Registers:
    """The vector registers of a target.

    Attributes:
        lanes: float32 lanes of a register, 16 at most.
        count: registers.
        schedule: what was found by measuring; None leaves the choice to the methods here.
    """

    lanes: int
    count: int
    schedule: Schedule | None = None

    @property
    def parts(self) -> int:
        """Registers for the 16 channels of a tile."""
        return LANES // self.lanes

    def fits(self, tiles: int) -> bool:
        """Whether sums, one step of weights and an activation of one row and this many 16-channel tiles fit."""
        return 2 * tiles * self.parts + 1 <= self.count

    def rows(self, tiles: int) -> int:
        """Rows of a register tile of `tiles` 16-channel tiles: sums, one step of weights and an activation fit."""
        return max(1, min(MOST_ROWS, (self.count - 1 - tiles * self.parts) // (tiles * self.parts)))

    def shape(self, output_tiles: int) -> tuple[int, int]:
        """(rows, tiles) of the register tile of a product with this many 16-channel tiles.

        The tile that loads least a multiply-add wins; of those nearly as good, one that divides the tiles evenly.
        """
        if self.schedule is not None:
            return self.schedule.rows, min(self.schedule.tiles, output_tiles)
        most = max(1, min(output_tiles, 4))
        sizes = {tiles: (self.rows(tiles), tiles) for tiles in range(1, most + 1) if tiles == 1 or self.fits(tiles)}
        reads = {tiles: 1 / rows + 1 / (tiles * self.parts) for tiles, (rows, _) in sizes.items()}
        good = [tiles for tiles in sizes if reads[tiles] <= 1.15 * min(reads.values())]
        even = [tiles for tiles in good if output_tiles % tiles == 0]
        return sizes[min(even or good, key=lambda tiles: reads[tiles])]

    @property
    def few_tiles(self) -> int:
        """16-channel tiles of the product with one row: enough chains to hide the latency of a multiply-add."""
        return 4 if self.schedule is None else self.schedule.few_tiles


def registers_of(target: Target) -> Registers:
    """The registers that float kernels use on a target."""
    return Registers(min(target.lanes, LANES), target.registers, target.schedule)


class Sums:
    """The accumulators of one register tile, by (row, 16-channel tile, part)."""

    def __init__(self, registers: Registers, rows: int, tiles: int) -> None:
        self.registers = registers
        self.rows = rows
        self.tiles = tiles
        lanes = registers.lanes
        self.held = {key: v.register(lanes, "float32") for key in self.keys()}
        for held in self.held.values():
            v.put(held, v.full(0.0, "float32", lanes), lanes)

    def keys(self) -> list[tuple[int, int, int]]:
        """All (row, tile, part), tiles and parts innermost."""
        return [(r, i, p) for r in range(self.rows) for i in range(self.tiles) for p in range(self.registers.parts)]

    def value(self, key: tuple[int, int, int]) -> Expr:
        """The vector of an accumulator."""
        return v.get(self.held[key], self.registers.lanes)

    def add(self, length: Index, x_at: Callable[[int, Expr], Expr], w_at: Callable[[int, int, Expr], Expr]) -> None:
        """Add x[r, c] * w[c, ...] for c = 0 .. length - 1.

        Args:
            length: an int or an int64 expression.
            x_at: (row, c) -> float32 scalar.
            w_at: (tile, part, c) -> float32 vector.
        """
        if isinstance(length, int):
            schedule = self.registers.schedule
            steps = max(1, min(MOST_UNROLLED, BODY // len(self.held)))
            if schedule is not None and schedule.unroll:
                steps = schedule.unroll
            whole, rest = divmod(length, steps)
            v.loop(whole, lambda i: self._steps(steps, v.bind(i * steps), x_at, w_at))
            self._steps(rest, v.i64(whole * steps), x_at, w_at)
            return
        v.loop(length, lambda c: self._steps(1, c, x_at, w_at))

    def _steps(
        self, count: int, first: Expr, x_at: Callable[[int, Expr], Expr], w_at: Callable[[int, int, Expr], Expr]
    ) -> None:
        lanes = self.registers.lanes
        for step in range(count):
            c = first + step
            weights = {(i, p): v.bind(w_at(i, p, c)) for i in range(self.tiles) for p in range(self.registers.parts)}
            for r in range(self.rows):
                x = v.bind(v.splat(x_at(r, c), lanes))
                for (i, p), weight in weights.items():
                    held = self.held[r, i, p]
                    v.put(held, v.get(held, lanes) + x * weight, lanes)
