"""Attention in one kernel: out = softmax(scale * q k^T + mask) v, head by head, float32.

    s[m, n] = sum over c in order of q[m, c] * k[n, c]                              fused
    t[m, n] = s[m, n] * scale + mask[m, n]   or   s[m, n] / scale + mask[m, n]
    p[m, n] = exp(t[m, n] - max over n) * (1 / sum over n of exp(...))
    out[m, d] = sum over n in order of p[m, n] * v[n, d]                            fused

Each step is the one that the kernels of its own take (`fbatch.py`, and the order of sums of
`targets/cpu/rules/partial_sums.py`), so the result has the bits that they give. Scores of a few rows of queries stay in
a buffer of the task; keys are laid out once a task as vectors of 16 keys. Queries, keys, values and the result are read
and written where they lie, whatever the order of their leading axes, so that heads need no Transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import lcm
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.quant.packing import LANES
from kbitc.targets.kernels import mathfn
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.batch import quotient
from kbitc.targets.kernels.ftile import Registers, Sums
from kbitc.targets.lower.contraction import Attention, Place

Expr = Any
Buffer = Any
Dim = Any
# Chains of a sum over a row, as in partial_sums.py.
CHAINS = 4
# Rows of queries whose scores are in the buffer at one time, about.
BLOCK_ROWS = 24
# Rows of queries of a task: each task lays the keys out.
TASK_ROWS = 240
# 16-key vectors of a register tile.
KEY_TILES = 4
# Rows of the register tiles where there are fewer than the tallest have.
FEW_ROWS = 4


def make_attention(spec: Attention, registers: Registers, name: str) -> Any:
    """The PrimFunc: q, k, v, the mask if there is one, out; all float32."""
    return v.kernel(name, lambda: AttentionKernel(spec, registers).emit())


class _Tensor:
    """A tensor of the kernel, flat, with the stride of each leading axis."""

    def __init__(self, name: str, place: Place, dims: v.DimVars, dtype: str) -> None:
        self.dtype = dtype
        self.shape = tuple(dims(dim) for dim in place.shape)
        self.argument = v.argument(name, self.shape, dtype)
        self.strides = [0 if axis is None else v.product(self.shape[axis + 1 :]) for axis in place.axes]
        self.buffer: Buffer = None

    def flatten(self) -> None:
        """To be called behind the last argument."""
        self.buffer = v.view(self.argument, (v.product(self.shape),), self.dtype)

    @property
    def row_stride(self) -> Dim:
        """Elements from one row to the next."""
        return self.strides[-1]

    def start(self, indices: Sequence[Expr]) -> Expr:
        """Where the matrix of these leading indices starts."""
        offset: Expr = v.i64(0)
        for index, stride in zip(indices, self.strides[:-1], strict=True):
            if not (isinstance(stride, int) and stride == 0):
                offset = offset + index * stride
        return v.held_index(offset)


class AttentionKernel:
    """Emits the statements of one kernel; what codes do otherwise is in `iattention.py`."""

    dtype = "float32"

    def __init__(self, spec: Attention, registers: Registers) -> None:
        self.spec = spec
        self.registers = registers
        self.lanes = registers.lanes
        self.value_tiles = -(-spec.columns // LANES)
        self.key_tile, self.value_tile = self._tile_shapes()
        step = lcm(self.key_tile[0], self.value_tile[0])
        #: Rows whose scores are in the buffer at one time.
        self.block = max(1, BLOCK_ROWS // step) * step

    def _tile_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(rows, 16-column tiles) of the register tiles of both products."""
        keys = self.spec.keys
        tiles = KEY_TILES if not isinstance(keys, int) else max(1, min(KEY_TILES, -(-keys // LANES)))
        return self.registers.shape(tiles), self.registers.shape(self.value_tiles)

    def emit(self) -> None:
        """Arguments, then a task for some rows of one head."""
        spec, dims = self.spec, v.DimVars()
        self.q, self.k, self.v = (
            _Tensor(name, place, dims, self.dtype) for name, place in (("q", spec.q), ("k", spec.k), ("v", spec.v))
        )
        self.mask = None if spec.mask is None else _Tensor("mask", spec.mask, dims, "float32")
        self._numbers()
        self.out = _Tensor("out", spec.out, dims, self.dtype)
        lead = tuple(dims(dim) for dim in spec.lead)
        self.rows, self.keys = dims(spec.rows), dims(spec.keys)
        self.key_vectors = quotient(self.keys + (LANES - 1), LANES)
        self.width = self.key_vectors * LANES
        chunks = quotient(self.rows, TASK_ROWS)
        chunks = max(1, chunks) if isinstance(chunks, int) else tirx.max(chunks, v.i64(1))
        with v.root():
            for tensor in (self.q, self.k, self.v, self.mask, self.out):
                if tensor is not None:
                    tensor.flatten()
            with builder.parallel(v.i64(0), v.i64(v.product(lead) * chunks)) as task:
                self._task(task, lead, chunks)

    def _numbers(self) -> None:
        """Arguments between the mask and the result: none."""

    def _task(self, task: Expr, lead: Sequence[Dim], chunks: Dim) -> None:
        head, chunk = v.held_index(tirx.truncdiv(task, v.i64(chunks))), v.held_index(tirx.truncmod(task, v.i64(chunks)))
        indices = _unravel(head, lead)
        self.q_start, self.k_start, self.v_start, self.out_start = (
            tensor.start(indices) for tensor in (self.q, self.k, self.v, self.out)
        )
        self.mask_start = None if self.mask is None else self.mask.start(indices)
        self.scores = scratch(self.width * self.block)
        self._lay_out_keys()
        self._lay_out_values()
        first = v.bind(chunk * TASK_ROWS)
        last = tirx.Select(chunk == v.i64(chunks) - 1, v.i64(self.rows), first + TASK_ROWS)
        self._all_rows(first, v.held_index(last))

    # Operands

    def _lay_out_keys(self) -> None:
        """packed[t, c, j] = k[16 t + j, c]; keys that do not exist repeat the last."""
        lanes, channels = self.lanes, self.spec.channels
        self.packed = scratch(self.width * channels)

        def tile(t: Expr) -> None:
            def part(p: Expr) -> None:
                key = v.bind(t * LANES + p * lanes)
                starts = [
                    v.bind(self.k_start + tirx.min(key + j, v.i64(self.keys - 1)) * self.k.row_stride)
                    for j in range(lanes)
                ]
                target = v.bind(t * (LANES * channels) + p * lanes)

                def square(i: Expr) -> None:
                    c = v.bind(i * lanes)
                    vectors = [v.bind(v.load(self.k.buffer, [start + c], lanes)) for start in starts]
                    for j, vector in enumerate(turned(vectors, lanes)):
                        v.store(self.packed, [target + (c + j) * LANES], vector, lanes)

                v.loop(channels // lanes, square)
                for c in range(channels // lanes * lanes, channels):
                    for j, start in enumerate(starts):
                        v.store(self.packed, [target + (c * LANES + j)], self.k.buffer[start + c], 1)

            v.loop(LANES // lanes, part)

        v.loop(self.key_vectors, tile)

    def _lay_out_values(self) -> None:
        """values[n, d] = v[n, d], rows filled up to whole vectors with zeros."""
        columns = self.spec.columns
        self.value_width = self.value_tiles * LANES
        stride = self.v.row_stride
        if isinstance(stride, int) and stride == self.value_width:
            self.values, self.values_start = self.v.buffer, self.v_start
            return
        self.values, self.values_start = scratch(self.keys * self.value_width), v.i64(0)

        def row(n: Expr) -> None:
            source, target = v.bind(self.v_start + n * stride), v.bind(n * self.value_width)
            for d in range(0, self.value_width, self.lanes):
                count = max(0, min(self.lanes, columns - d))
                value = v.full(0.0, "float32", self.lanes)
                if count:
                    value = v.load_first(self.v.buffer, [source + d], "float32", self.lanes, count)
                v.store(self.values, [target + d], value, self.lanes)

        v.loop(self.keys, row)

    # Rows

    def _all_rows(self, first: Expr, last: Expr) -> None:
        """By the tallest register tiles of which one is no taller than there are rows."""
        count = v.held_index(last - first)

        def tiled(sizes: Sequence[tuple[int, int]]) -> None:
            key_rows, value_rows = sizes[0]
            blocks = partial(self._blocks, first, last, count, key_rows, value_rows)
            step = lcm(key_rows, value_rows)
            if step == 1 or (isinstance(self.rows, int) and self.rows >= step):
                blocks()
            elif isinstance(self.rows, int):
                tiled(sizes[1:])
            else:
                v.when(count < v.i64(step), partial(tiled, sizes[1:]), blocks)

        sizes = [(self.key_tile[0], self.value_tile[0]), (FEW_ROWS, FEW_ROWS), (1, 1)]
        tiled(list(dict.fromkeys(sizes)))

    def _blocks(self, first: Expr, last: Expr, count: Expr, key_rows: int, value_rows: int) -> None:
        """Blocks of rows, each a multiple of the rows of both tiles; the last one starts early where it must."""
        step = lcm(key_rows, value_rows)
        # Without rows it is no number to divide by.
        most = tirx.max(tirx.truncdiv(count, v.i64(step)) * step, v.i64(1))
        most = v.held_index(tirx.min(v.i64(self.block // step * step), most))

        def body(i: Expr) -> None:
            left = v.held_index(count - i * most)
            rows = v.held_index(tirx.min(most, tirx.truncdiv(left + (step - 1), v.i64(step)) * step))
            row = v.held_index(tirx.min(first + i * most, last - rows))
            self._scores(row, rows, key_rows)
            v.loop(rows, self._softmax)
            self._mix(row, rows, value_rows)

        v.loop(tirx.truncdiv(count + (most - 1), most), body)

    def _scores(self, row: Expr, rows: Expr, tile_rows: int) -> None:
        """scores[r, n] = q[row + r] k[n], scaled and masked: groups of key vectors, then single ones."""
        group = self.key_tile[1] if tile_rows > 1 else self.registers.few_tiles
        full = quotient(self.keys, LANES)
        whole = quotient(full, group)
        rest = self.keys - full * LANES

        def cover(vector: Expr, tiles: int, real: Expr | None = None) -> None:
            v.loop(
                tirx.truncdiv(rows, v.i64(tile_rows)),
                lambda i: self._score_tile(row, v.bind(i * tile_rows), tile_rows, vector, tiles, real),
            )

        v.loop(whole, lambda j: cover(v.bind(j * group), group))
        v.loop(full - whole * group, lambda j: cover(v.bind(whole * group + j), 1))
        v.when(
            rest > 0 if isinstance(rest, int) else rest > v.i64(0),
            lambda: cover(v.bind(v.i64(full)), 1, v.i64(rest)),
        )

    def _score_tile(self, row: Expr, r: Expr, rows: int, vector: Expr, tiles: int, real: Expr | None) -> None:
        """One register tile; of a single key vector only `real` keys may exist: the others become -inf."""
        channels, lanes = self.spec.channels, self.lanes
        starts = [v.bind(self.q_start + (row + r + i) * self.q.row_stride) for i in range(rows)]
        at = v.bind(vector * (channels * LANES))
        sums = Sums(self.registers, rows, tiles)
        sums.add(
            channels,
            lambda i, c: self.q.buffer[starts[i] + c],
            lambda t, p, c: v.load(self.packed, [at + c * LANES + (t * channels * LANES + p * lanes)], lanes),
        )
        for i in range(rows):
            key = v.bind(vector * LANES)
            target = v.bind((r + i) * self.width + key)
            mask = None if self.mask is None else v.bind(self.mask_start + (row + r + i) * self.mask.row_stride + key)
            for t in range(tiles):
                for p in range(self.registers.parts):
                    place = t * LANES + p * lanes
                    value = self._masked(sums.value((i, t, p)), None if mask is None else mask + place, p, real)
                    v.store(self.scores, [target + place], value, lanes)

    def _masked(self, value: Expr, mask: Expr | None, part: int, real: Expr | None) -> Expr:
        """Scaled, plus the mask; a product that feeds the sum is one fma, as in an elementwise kernel."""
        lanes = self.lanes
        inside = None if real is None else lanes_below(real, part * lanes, lanes)
        scale = v.full(self.spec.scale, "float32", lanes)
        if self.spec.divide:
            value = value / scale
        if mask is not None and self.mask is not None:
            if inside is None:
                added = v.load(self.mask.buffer, [mask], lanes)
            else:
                kind = v.vector_type("float32", lanes)
                added = builder.masked_load(kind, self.mask.buffer, v.ramp(mask, lanes), inside)
                added = tirx.Select(inside, added, v.full(0.0, "float32", lanes))
            plain = self.spec.divide or self.spec.scale == 1.0
            value = value + added if plain else mathfn.fma(value, scale, added)
        elif not self.spec.divide and self.spec.scale != 1.0:
            value = value * scale
        if inside is None:
            return value
        return tirx.Select(inside, v.bind(value), v.full(float("-inf"), "float32", lanes))

    def _mix(self, row: Expr, rows: Expr, tile_rows: int) -> None:
        """out[row + r] = scores[r] values."""
        group = self.value_tile[1] if tile_rows > 1 else min(self.value_tiles, self.registers.few_tiles)

        def tile(i: Expr) -> None:
            r = v.bind(i * tile_rows)
            for first in range(0, self.value_tiles, group):
                self._value_tile(row, r, tile_rows, first, min(group, self.value_tiles - first))

        v.loop(tirx.truncdiv(rows, v.i64(tile_rows)), tile)

    def _value_tile(self, row: Expr, r: Expr, rows: int, first: int, tiles: int) -> None:
        lanes = self.lanes
        starts = [v.bind((r + i) * self.width) for i in range(rows)]
        sums = Sums(self.registers, rows, tiles)
        sums.add(
            self.keys,
            lambda i, n: self.scores[starts[i] + n],
            lambda t, p, n: v.load(
                self.values,
                [self.values_start + n * self.value_width + ((first + t) * LANES + p * lanes)],
                lanes,
            ),
        )
        for i in range(rows):
            at = v.bind(self.out_start + (row + r + i) * self.out.row_stride)
            for t in range(tiles):
                for p in range(self.registers.parts):
                    d = (first + t) * LANES + p * lanes
                    count = max(0, min(lanes, self.spec.columns - d))
                    if count:
                        v.store_first(self.out.buffer, [at + d], sums.value((i, t, p)), lanes, count)

    # Softmax

    def _softmax(self, r: Expr) -> None:
        """scores[r] becomes the share of each key; 16 lanes whatever the registers are."""
        start = v.bind(r * self.width)
        largest = v.register(LANES, "float32")
        v.put(largest, v.load(self.scores, [start], LANES), LANES)

        def compare(i: Expr) -> None:
            value = v.load(self.scores, [start + (i + 1) * LANES], LANES)
            v.put(largest, tirx.max(v.get(largest, LANES), value), LANES)

        v.loop(self.key_vectors - 1, compare)
        peak = _held(tree(v.get(largest, LANES), tirx.max))
        chains = CHAINS if not isinstance(self.keys, int) or self.keys >= CHAINS * LANES else 1
        total = self._exponentials(start, peak, chains)
        self._shares(r, start, v.bind(v.splat(_held(tirx.const(1.0, "float32") / total), LANES)))

    def _shares(self, r: Expr, start: Expr, inverse: Expr) -> None:
        """scores[r] times the inverse."""

        def share(i: Expr) -> None:
            at = v.bind(start + i * LANES)
            v.store(self.scores, [at], v.load(self.scores, [at], LANES) * inverse, LANES)

        v.loop(self.key_vectors, share)

    def _exponentials(self, start: Expr, peak: Expr, chains: int) -> Expr:
        """scores = exp(scores - peak); their sum in `chains` chains of 16 lanes."""
        sums = [v.register(LANES, "float32") for _ in range(chains)]
        for held in sums:
            v.put(held, v.full(0.0, "float32", LANES), LANES)
        largest = v.bind(v.splat(peak, LANES))

        def update(at: Expr, chain: int) -> None:
            value = v.bind(mathfn.exp_below(v.load(self.scores, [at], LANES) - largest))
            v.store(self.scores, [at], value, LANES)
            v.put(sums[chain], v.get(sums[chain], LANES) + value, LANES)

        def group(i: Expr) -> None:
            at = v.bind(start + i * (LANES * chains))
            for chain in range(chains):
                update(at + chain * LANES, chain)

        whole = quotient(self.keys, LANES * chains)
        v.loop(whole, group)
        self._behind(v.bind(start + whole * (LANES * chains)), self.key_vectors - whole * chains, chains, update)
        while len(sums) > 1:
            sums = [_joined(low, high) for low, high in zip(sums[0::2], sums[1::2], strict=True)]
        return _held(tree(v.get(sums[0], LANES), lambda a, b: a + b))

    def _behind(self, at: Expr, vectors: Dim, chains: int, update: Callable[[Expr, int], None]) -> None:
        """Vectors behind the last whole group: full ones to chains 0, 1, 2, one that is not full to the last chain."""
        full = quotient(self.keys, LANES)
        full = full - quotient(full, chains) * chains
        for chain in range(chains - 1):
            there = chain < full if isinstance(full, int) else full > v.i64(chain)
            v.when(there, partial(update, at + chain * LANES, chain))
        part = vectors > full if isinstance(full, int) else v.i64(vectors) > v.i64(full)
        v.when(part, lambda: update(at + full * LANES, chains - 1))


def _unravel(index: Expr, dims: Sequence[Dim]) -> list[Expr]:
    """The index along each of the dimensions."""
    found: list[Expr] = []
    for axis in range(len(dims) - 1, -1, -1):
        found.append(v.held_index(tirx.truncmod(index, v.i64(dims[axis]))) if axis else index)
        if axis:
            index = v.held_index(tirx.truncdiv(index, v.i64(dims[axis])))
    return found[::-1]


def scratch(size: Dim, dtype: str = "float32") -> Buffer:
    """Memory of the task."""
    return builder.alloc_buffer((v.i64(size),), dtype, scope="global")


def _held(value: Expr) -> Expr:
    """A scalar that is computed once."""
    place = v.register(1, "float32")
    v.store(place, [0], value, 1)
    return v.load(place, [0], 1)


def _joined(low: Buffer, high: Buffer) -> Buffer:
    made = v.register(LANES, "float32")
    v.put(made, v.get(low, LANES) + v.get(high, LANES), LANES)
    return made


def tree(value: Expr, join: Callable[[Expr, Expr], Expr]) -> Expr:
    """All lanes as one scalar: lane i with lane i + 8, then + 4, + 2, + 1."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        value = v.bind(value)
        value = join(*(_part(value, start, lanes) for start in (0, lanes)))
    return value


def _part(value: Expr, start: int, count: int) -> Expr:
    return v.bind(tirx.Shuffle([value], [tirx.const(start + i, "int32") for i in range(count)]))


def lanes_below(count: Expr, first: int, lanes: int) -> Expr:
    """Which of the lanes first, first + 1, ... are below count."""
    lane = tirx.Ramp(tirx.const(first, "int32"), tirx.const(1, "int32"), lanes)
    return lane < v.splat(tirx.Cast("int32", count), lanes)


def turned(vectors: list[Expr], lanes: int) -> list[Expr]:
    """The columns of a square of vectors: each round lays the first half between the second half."""
    half = lanes // 2
    low = [index for i in range(half) for index in (i, lanes + i)]
    high = [index + half for index in low]
    run = lanes
    while run > 1:
        run //= 2
        pairs = list(zip(vectors[:half], vectors[half:], strict=True))
        vectors = [v.bind(_mixed(x, y, order)) for x, y in pairs for order in (low, high)]
    return vectors


def _mixed(x: Expr, y: Expr, indices: list[int]) -> Expr:
    return tirx.Shuffle([x, y], [tirx.const(i, "int32") for i in indices])
