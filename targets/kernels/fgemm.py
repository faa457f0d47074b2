"""Float32 matrix product and convolution by a constant weight.

    out[m, n] = sum over taps t, then channels c, in order, of x[row(m, t), c] * w[n, t, c]       float32, fused

then the bias is added and the result clamped. row(m, t) is m for a matrix product and the pixel under tap t for a
convolution, whose activation has its border of zeros in memory. The channels of neighbouring taps lie side by side
when there is one group and no horizontal dilation: such a line of taps is one run of the reduction.
The weight is packed to [tiles, T * C, 16], the outputs of every group padded with zeros to whole tiles of 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from kbitc.quant.packing import LANES, round_up
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.ftile import Registers, Sums
from kbitc.targets.kernels.rows import ConvRows, MatmulRows
from kbitc.targets.kernels.tasks import clamp, row_tasks
from kbitc.targets.lower.contraction import PostFunction

Expr = Any
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FgemmSpec:
    """What a kernel computes.

    Attributes:
        rows: where the rows of the activation lie and how many there are.
        channels, outputs, taps: C, N, T of the weight [N, T, C].
        groups: of the convolution; the activation has C * groups channels.
        bias: a float32 [tiles * 16] is added.
        post: clamp after the bias.
    """

    rows: MatmulRows | ConvRows
    channels: int
    outputs: int
    taps: int
    groups: int = 1
    bias: bool = False
    post: PostFunction | None = None

    @property
    def group_outputs(self) -> int:
        """Outputs of one group."""
        return self.outputs // self.groups

    @property
    def group_tiles(self) -> int:
        """16-channel tiles of one group."""
        return -(-self.group_outputs // LANES)

    @property
    def runs(self) -> tuple[int, int]:
        """(runs, channels of a run) of the reduction: what lies side by side in the activation is one run."""
        if isinstance(self.rows, ConvRows) and self.groups == 1 and self.rows.attributes.dilations[1] == 1:
            down, across = self.rows.attributes.kernel
            return down, across * self.channels
        return self.taps, self.channels


def pack_float(weight: FloatArray, groups: int = 1) -> FloatArray:
    """Weight [N, T, C] -> float32 [groups * tiles of a group, T * C, 16], zeros behind a group's last output."""
    n, taps, channels = weight.shape
    size = n // groups
    padded = np.zeros((groups, round_up(size, LANES), taps * channels), np.float32)
    padded[:, :size] = weight.reshape(groups, size, taps * channels)
    tiles = padded.reshape(-1, LANES, taps * channels)
    return np.ascontiguousarray(tiles.transpose(0, 2, 1))


def pack_bias(bias: FloatArray, groups: int = 1) -> FloatArray:
    """Bias [N] -> float32 [groups * tiles of a group * 16], padded as the weight is."""
    size = bias.size // groups
    padded = np.zeros((groups, round_up(size, LANES)), np.float32)
    padded[:, :size] = bias.reshape(groups, size)
    return padded.reshape(-1)


def make_fgemm(spec: FgemmSpec, registers: Registers, name: str) -> Any:
    """The PrimFunc.

    Arguments: x f32 [*rows, C * groups], packed f32 [tiles, T * C, 16], bias f32 [tiles * 16] (if any),
    out f32 [*out rows, N].
    """
    return v.kernel(name, lambda: _Generator(spec, registers).emit())


class _Generator:
    """Emits the statements of one kernel."""

    def __init__(self, spec: FgemmSpec, registers: Registers) -> None:
        self.spec = spec
        self.registers = registers

    def emit(self) -> None:
        """Arguments, then statements."""
        spec = self.spec
        self.rows = spec.rows.with_dims(v.DimVars())
        self.width = spec.channels * spec.groups
        tiles = spec.groups * spec.group_tiles
        x = v.argument("x", (*self.rows.source_shape, self.width), "float32")
        self.packed = v.argument("packed", (tiles, spec.taps * spec.channels, LANES), "float32")
        self.bias = v.argument("bias", (tiles * LANES,), "float32") if spec.bias else None
        out = v.argument("out", (*self.rows.out_shape, spec.outputs), "float32")
        shape, few = self.registers.shape(spec.group_tiles), self.registers.few_tiles
        if spec.groups > 1:
            # A register tile stays inside a group.
            channels = next(t for t in range(shape[1], 0, -1) if spec.group_tiles % t == 0)
            shape, few = (self.registers.rows(channels), channels), channels
        with v.root():
            self.x = v.view(x, (self.rows.source_rows * self.width,), "float32")
            self.out = v.view(out, (self.rows.count, spec.outputs), "float32")
            row_tasks(self.rows.count, shape, few, tiles, self._tile, self.rows.least)

    def _tile(self, row: Expr, rows: int, first: Expr, tiles: int) -> None:
        """One register tile from zero to its results in memory."""
        spec, lanes = self.spec, self.registers.lanes
        group = v.bind(tirx.truncdiv(first, v.i64(spec.group_tiles))) if spec.groups > 1 else v.i64(0)
        base = [v.held_index(self.rows.base(row + r) * self.width + group * spec.channels) for r in range(rows)]
        sums = Sums(self.registers, rows, tiles)
        runs, length = spec.runs

        def run(which: Expr) -> None:
            starts = [v.held_index(b + self._offset(which)) for b in base] if runs > 1 else base
            at = v.bind(which * length)
            sums.add(
                length,
                lambda r, c: self.x[starts[r] + c],
                lambda i, p, c: v.load(self.packed, [first + i, at + c, p * lanes], lanes),
            )

        v.loop(runs, run)
        self._finish(sums, row, first, group)

    def _offset(self, which: Expr) -> Expr:
        """Elements from the first run of the reduction to run `which`."""
        if not isinstance(self.rows, ConvRows):
            return v.i64(0)
        if self.spec.runs[0] == self.spec.taps:
            return self.rows.tap_offset(which) * self.width
        return which * (self.rows.attributes.dilations[0] * self.rows.padded_width * self.width)

    def _finish(self, sums: Sums, row: Expr, first: Expr, group: Expr) -> None:
        """Bias, clamp, store."""
        lanes = self.registers.lanes
        for r, i, p in sums.keys():
            value = sums.value((r, i, p))
            if self.bias is not None:
                value = value + v.load(self.bias, [(first + i) * LANES + p * lanes], lanes)
            value = v.bind(clamp(v.bind(value), self.spec.post, lanes))
            self._store(v.bind(row + r), first + i, p, group, value)

    def _store(self, row: Expr, tile: Expr, part: int, group: Expr, value: Expr) -> None:
        """Store part of a 16-channel tile; only real channels of a group's last tile."""
        spec, lanes = self.spec, self.registers.lanes
        local = tile - group * spec.group_tiles
        start = v.bind(group * spec.group_outputs + local * LANES + part * lanes)
        last = spec.group_tiles - 1
        count = min(lanes, max(0, spec.group_outputs - last * LANES - part * lanes))

        def whole() -> None:
            v.store(self.out, [row, start], value, lanes)

        def rest() -> None:
            if count:
                v.store_first(self.out, [row, start], value, lanes, count)

        if count == lanes:
            whole()
        elif last == 0:
            rest()
        else:
            v.when(local < v.i64(last), whole, rest)
