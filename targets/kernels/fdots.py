"""Float32 product of few rows with a second activation that lies transposed, such as a query and its cached keys.

    out[..., m, n] = sum over c of a[..., m, c] * b[..., n, c]                                        float32

b is read once, where it lies. Sixteen sums run side by side, sum j over c = j, j + 16, ... in order by fma; they are
added in halves: j with j + 8, then + 4, + 2, + 1. So an output has the same bits on every instruction set.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.quant.packing import LANES
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.batch import BatchSpec, source_batch
from kbitc.targets.kernels.mathfn import fma

Expr = Any
Buffer = Any
Dim = Any
# With more rows the second operand is better turned once.
MOST_ROWS = 4
# Products of a row are written out, not looped over.
MOST_CHANNELS = 256


def takes(rows: Dim, channels: Dim) -> bool:
    """Whether there is a kernel for so many rows and channels."""
    if not isinstance(rows, int) or not isinstance(channels, int):
        return False
    return rows <= MOST_ROWS and channels % LANES == 0 and 0 < channels <= MOST_CHANNELS


def make_fdots(spec: BatchSpec, lanes: int, name: str) -> Any:
    """The PrimFunc: a f32 [*a lead, M, C], b f32 [*b lead, N, C], out f32 [*lead, M, N]; M and C as `takes` says."""
    return v.kernel(name, lambda: _Generator(spec, lanes).emit())


class _Generator:
    """Emits the statements of one kernel."""

    def __init__(self, spec: BatchSpec, lanes: int) -> None:
        self.spec = spec
        self.lanes = lanes

    def emit(self) -> None:
        """Arguments, then a task a batch."""
        spec, dims = self.spec, v.DimVars()
        a_lead, b_lead, lead = spec.leads(dims)
        self.columns = dims(spec.columns)
        shapes = (*a_lead, spec.rows, spec.channels), (*b_lead, self.columns, spec.channels)
        out_shape = (*lead, spec.rows, self.columns)
        given = [v.argument(name, shape, "float32") for name, shape in zip("ab", shapes, strict=True)]
        out = v.argument("out", out_shape, "float32")
        with v.root():
            self.a, self.b = (
                v.view(buffer, (v.product(shape),), "float32") for buffer, shape in zip(given, shapes, strict=True)
            )
            self.out = v.view(out, (v.product(out_shape),), "float32")
            with builder.parallel(v.i64(0), v.i64(v.product(lead))) as batch:
                self.a_start = v.bind(source_batch(batch, lead, a_lead) * (spec.rows * spec.channels))
                self.b_start = v.bind(source_batch(batch, lead, b_lead) * (self.columns * spec.channels))
                self.out_start = v.bind(batch * (spec.rows * self.columns))
                self._columns()

    def _columns(self) -> None:
        """Whole vectors of columns; then the columns left over, of which those that do not exist repeat the last."""
        lanes, columns = self.lanes, self.columns
        static = isinstance(columns, int)
        whole = columns // lanes if static else tirx.truncdiv(columns, v.i64(lanes))
        rest = columns - whole * lanes

        def tile(i: Expr) -> None:
            first = v.bind(i * lanes)
            self._tile(first, [first + j for j in range(lanes)], None)

        def last() -> None:
            first = v.bind(v.i64(whole * lanes))
            self._tile(first, [v.bind(tirx.min(first + j, v.i64(columns - 1))) for j in range(lanes)], rest)

        v.loop(whole, tile)
        v.when(rest > 0 if static else rest > v.i64(0), last)

    def _tile(self, first: Expr, places: list[Expr], real: Dim | None) -> None:
        """One vector of columns for every row; only `real` of them exist where that is given."""
        spec, lanes = self.spec, self.lanes
        for row in range(spec.rows):
            start = v.bind(self.a_start + row * spec.channels)
            factors = [v.bind(v.load(self.a, [start + c], lanes)) for c in range(0, spec.channels, lanes)]
            sums = self._across([self._products(v.bind(self.b_start + n * spec.channels), factors) for n in places])
            at = v.bind(self.out_start + row * self.columns + first)
            if real is None:
                v.store(self.out, [at], sums, lanes)
                continue
            lane = tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), lanes)
            mask = lane < v.splat(tirx.Cast("int32", v.i64(real)), lanes)
            builder.evaluate(builder.masked_store(self.out, sums, v.ramp(at, lanes), mask))

    def _products(self, start: Expr, factors: list[Expr]) -> Expr:
        """The sums of one column, added in halves down to one register."""
        lanes = self.lanes
        parts = LANES // lanes
        sums: list[Expr] = [v.full(0.0, "float32", lanes)] * parts
        for i, factor in enumerate(factors):
            sums[i % parts] = v.bind(fma(factor, v.load(self.b, [start + i * lanes], lanes), sums[i % parts]))
        while len(sums) > 1:
            half = len(sums) // 2
            sums = [v.bind(low + high) for low, high in zip(sums[:half], sums[half:], strict=True)]
        return sums[0]

    def _across(self, vectors: list[Expr]) -> Expr:
        """One vector of the sums of the lanes of each vector, in the order of the vectors.

        Of two neighbours the halves are added and laid side by side; after log2(lanes) rounds every lane holds the
        sum of one vector.
        """
        lanes = self.lanes
        run = lanes  # lanes that belong to one of the vectors given
        while len(vectors) > 1:
            run //= 2
            low = [start + i for start in range(0, 2 * lanes, 2 * run) for i in range(run)]
            high = [index + run for index in low]
            vectors = [
                v.bind(_pick(x, y, low) + _pick(x, y, high)) for x, y in zip(vectors[0::2], vectors[1::2], strict=True)
            ]
        return vectors[0]


def _pick(x: Expr, y: Expr, indices: list[int]) -> Expr:
    """Lanes of two vectors, those of y counted behind those of x."""
    return v.bind(tirx.Shuffle([x, y], [tirx.const(i, "int32") for i in indices]))
