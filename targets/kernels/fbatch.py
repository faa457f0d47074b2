"""Float32 product of two activations, batch by batch.

    out[..., m, n] = sum over c in order of a[..., m, c] * b[..., c, n]                            float32, fused

Vectors are columns of b, which lie side by side, so that b is read where it is. All dimensions may be symbolic. Rows
and columns that do not fill a register tile are done by a tile that ends with the last one and repeats some: the same
sums are stored twice by the same thread. Fewer than 16 columns go by vectors whose first lanes only are read and
written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.quant.packing import LANES
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.batch import BatchSpec, quotient, source_batch
from kbitc.targets.kernels.ftile import Registers, Sums

Expr = Any
Buffer = Any
Dim = Any
# Row tiles of a parallel task.
TASK_ROW_TILES = 16
# 16-column tiles of a register tile when the number of columns is symbolic.
DYNAMIC_TILES = 2


def make_fbatch(spec: BatchSpec, registers: Registers, name: str) -> Any:
    """The PrimFunc: a f32 [*a lead, M, C], b f32 [*b lead, C, N], out f32 [*lead, M, N]."""
    return v.kernel(name, lambda: _Generator(spec, registers).emit())


class _Generator:
    """Emits the statements of one kernel."""

    def __init__(self, spec: BatchSpec, registers: Registers) -> None:
        self.spec = spec
        self.registers = registers
        self.lanes = registers.lanes

    def emit(self) -> None:
        """Arguments, then a task for some rows of one batch."""
        spec, dims = self.spec, v.DimVars()
        a_lead, b_lead, lead = spec.leads(dims)
        self.rows, self.channels, self.columns = (dims(d) for d in (spec.rows, spec.channels, spec.columns))
        a_shape, b_shape = (*a_lead, self.rows, self.channels), (*b_lead, self.channels, self.columns)
        shape = (*lead, self.rows, self.columns)
        a, b = v.argument("a", a_shape, "float32"), v.argument("b", b_shape, "float32")
        out = v.argument("out", shape, "float32")
        tile_rows, self.tiles = self._tile_shape()
        tasks = quotient(quotient(self.rows, tile_rows) + (TASK_ROW_TILES - 1), TASK_ROW_TILES)
        tasks = max(1, tasks) if isinstance(tasks, int) else tirx.max(tasks, v.i64(1))
        with v.root():
            self.a, self.b, self.out = (
                v.view(buffer, (v.product(size),), "float32")
                for buffer, size in ((a, a_shape), (b, b_shape), (out, shape))
            )
            with builder.parallel(v.i64(0), v.i64(v.product(lead) * tasks)) as task:
                batch, chunk = v.bind(tirx.truncdiv(task, v.i64(tasks))), v.bind(tirx.truncmod(task, v.i64(tasks)))
                self.a_start = v.bind(source_batch(batch, lead, a_lead) * (self.rows * self.channels))
                self.b_start = v.bind(source_batch(batch, lead, b_lead) * (self.channels * self.columns))
                self.out_start = v.bind(batch * (self.rows * self.columns))
                self._task(chunk, tile_rows)

    def _tile_shape(self) -> tuple[int, int]:
        """Rows and 16-column tiles of the register tile."""
        if isinstance(self.columns, int):
            rows, tiles = self.registers.shape(max(1, self.columns // LANES))
        else:
            tiles = min(DYNAMIC_TILES, self.registers.shape(DYNAMIC_TILES)[1])
            rows = self.registers.rows(tiles)
        return (min(rows, self.rows) if isinstance(self.rows, int) else rows), tiles

    def _task(self, chunk: Expr, tile_rows: int) -> None:
        """Some rows by all columns; rows left over belong to the last task."""
        if isinstance(self.rows, int):
            self._row_tiles(chunk, tile_rows)
            return
        v.when(
            self.rows < v.i64(tile_rows),
            lambda: self._all_columns(v.i64(0), v.i64(self.rows), 1),
            lambda: self._row_tiles(chunk, tile_rows),
        )

    def _row_tiles(self, chunk: Expr, tile_rows: int) -> None:
        """The row tiles of a task; there are at least `tile_rows` rows."""
        whole = v.bind(v.i64(quotient(self.rows, tile_rows)))
        first = v.bind(chunk * TASK_ROW_TILES)
        ordinary = tirx.min(whole - first, v.i64(TASK_ROW_TILES))
        uneven = tirx.all(first + TASK_ROW_TILES >= whole, whole * tile_rows < v.i64(self.rows))
        extra = tirx.Select(uneven, v.i64(1), v.i64(0))
        self._all_columns(first, v.bind(ordinary + extra), tile_rows)

    def _all_columns(self, first: Expr, count: Expr, tile_rows: int) -> None:
        """`count` row tiles from tile `first` by all columns."""
        columns, wide = self.columns, self.tiles * LANES

        def cover(column: Expr, tiles: int, real: Dim) -> None:
            def row_tile(i: Expr) -> None:
                row = v.bind(tirx.min((first + i) * tile_rows, v.i64(self.rows - tile_rows)))
                self._tile(row, tile_rows, column, tiles, real)

            v.loop(count, row_tile)

        def covered() -> None:
            whole = quotient(columns, wide)
            v.loop(whole, lambda j: cover(v.bind(j * wide), self.tiles, LANES))
            rest = columns - whole * wide
            last = v.i64(columns - LANES)
            v.loop(
                quotient(rest + (LANES - 1), LANES),
                lambda j: cover(v.bind(tirx.min(whole * wide + j * LANES, last)), 1, LANES),
            )

        few: Callable[[], None] = lambda: cover(v.i64(0), 1, columns)  # noqa: E731
        v.when(columns >= LANES if isinstance(columns, int) else columns >= v.i64(LANES), covered, few)

    def _tile(self, row: Expr, rows: int, column: Expr, tiles: int, real: Dim) -> None:
        """One register tile; of a single 16-column tile only `real` columns may exist."""
        sums = Sums(self.registers, rows, tiles)
        starts = [v.bind(self.a_start + (row + r) * self.channels) for r in range(rows)]
        b_start = v.bind(self.b_start + column)

        def b_at(i: int, p: int, c: Expr) -> Expr:
            at = b_start + c * self.columns + (i * LANES + p * self.lanes)
            return self._load(at, p, real)

        sums.add(self.channels, lambda r, c: self.a[starts[r] + c], b_at)
        for r in range(rows):
            at = v.bind(self.out_start + (row + r) * self.columns + column)
            for i in range(tiles):
                for p in range(self.registers.parts):
                    self._store(at + (i * LANES + p * self.lanes), p, sums.value((r, i, p)), real)

    def _load(self, at: Expr, part: int, real: Dim) -> Expr:
        """A vector of b, zero in the lanes of columns that do not exist."""
        if isinstance(real, int):
            count = min(self.lanes, max(0, real - part * self.lanes))
            if count == 0:
                return v.full(0.0, "float32", self.lanes)
            return v.load_first(self.b, [at], "float32", self.lanes, count)
        mask = self._mask(part, real)
        loaded = builder.masked_load(v.vector_type("float32", self.lanes), self.b, v.ramp(at, self.lanes), mask)
        return tirx.Select(mask, loaded, v.full(0.0, "float32", self.lanes))

    def _store(self, at: Expr, part: int, value: Expr, real: Dim) -> None:
        """Store the columns that exist."""
        if not isinstance(real, int):
            builder.evaluate(builder.masked_store(self.out, value, v.ramp(at, self.lanes), self._mask(part, real)))
            return
        count = min(self.lanes, max(0, real - part * self.lanes))
        if count:
            v.store_first(self.out, [at], value, self.lanes, count)

    def _mask(self, part: int, real: Expr) -> Expr:
        lane = tirx.Ramp(tirx.const(part * self.lanes, "int32"), tirx.const(1, "int32"), self.lanes)
        return lane < v.splat(tirx.Cast("int32", real), self.lanes)


def make_transposed(lead: Sequence[Dim], rows: Dim, columns: Dim, registers: Registers, name: str) -> Any:
    """The PrimFunc that swaps the last two axes: x f32 [*lead, rows, columns], out f32 [*lead, columns, rows]."""

    def emit() -> None:
        dims = v.DimVars()
        outer, height, width = tuple(dims(d) for d in lead), dims(rows), dims(columns)
        x = v.argument("x", (*outer, height, width), "float32")
        out = v.argument("out", (*outer, width, height), "float32")
        lanes = registers.lanes
        with v.root():
            source, target = (v.view(b, (v.product((*outer, height, width)),), "float32") for b in (x, out))
            with builder.parallel(v.i64(0), v.i64(v.product(outer) * width)) as task:
                batch, column = v.bind(tirx.truncdiv(task, v.i64(width))), v.bind(tirx.truncmod(task, v.i64(width)))
                start = v.bind(batch * (height * width) + column)

                def whole(i: Expr) -> None:
                    rows_of_column = tirx.Ramp(v.bind(start + i * lanes * width), v.i64(width), lanes)
                    v.store(target, [task * height + i * lanes], source[(rows_of_column,)], lanes)

                done = quotient(height, lanes)
                v.loop(done, whole)

                def single(i: Expr) -> None:
                    row = v.bind(done * lanes + i)
                    v.store(target, [task * height + row], source[(start + row * width,)], 1)

                v.loop(height - done * lanes, single)

    return v.kernel(name, emit)
