"""Arguments that the integer matrix kernels share, in the order of the CPU kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from kbitc.targets.cuda.kernels import threads as t
from kbitc.targets.cuda.kernels.levels import zero_shift
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.packed import declare_bias, declare_weight
from kbitc.targets.kernels.qgemm import QgemmSpec
from kbitc.targets.kernels.rows import ConvRows, MatmulRows
from kbitc.targets.kernels.tasks import clamp

Expr = Any
Buffer = Any


@dataclass
class Arguments:
    """Buffers of a kernel, as matrices where several dimensions lead.

    Attributes:
        rows: where rows lie, in the kernel's own dimension variables.
        zero_offset: what is taken off a stored zero point to give the level as it is fed.
    """

    rows: MatmulRows | ConvRows
    codes: Buffer
    act_scales: Buffer
    sums: Buffer
    packed: Buffer
    scales: Buffer
    zeros: Buffer | None
    offsets: Buffer | None
    bias: Buffer | None
    out: Buffer
    accumulators: Buffer | None
    zero_offset: int

    def zero_level(self, where: list[Expr], lane: Expr) -> Expr:
        """The zero point of one scale as the codes are fed, int32."""
        assert self.zeros is not None
        return tirx.Cast("int32", self.zeros[(*where, lane)]) - tirx.const(self.zero_offset, "int32")


@contextmanager
def declared(spec: QgemmSpec) -> Iterator[Arguments]:
    """Declare the arguments of the open function; inside the context its body is written.

    In order: codes int8 [*rows, Cp], act_scales f32 [*rows, CB] or [*rows, 1], sums int32 [*rows, CB], packed uint8
    [Np/16, T, Cp/32, k, 64], scales [Np/16, T, CB, 16] or [Np/16, 1, 1, 16], zero points uint8 of that shape (if
    any), offsets like scales (if any), bias f32 [Np] (if any), out f32 [*out rows, N], accumulators int32
    [*out rows, T * CB, N] (if asked for).
    """
    dims = v.DimVars()
    rows = spec.rows.with_dims(dims)

    by_row = (
        ("codes", spec.padded_channels, "int8"),
        ("act_scales", spec.activation_blocks, "float32"),
        ("sums", spec.blocks, "int32"),
    )
    given = [v.argument(name, (*rows.source_shape, width), dtype) for name, width, dtype in by_row]
    weight, bias = declare_weight(spec), declare_bias(spec, spec.bias)
    out = v.argument("out", (*rows.out_shape, spec.outputs), "float32")
    accumulators = None
    if spec.accumulators:
        by_block = (*rows.out_shape, spec.taps * spec.blocks, spec.outputs)
        accumulators = v.argument("accumulators", by_block, "int32")
    # Views open a scope, so they come after the last argument.
    with v.root():
        codes, act_scales, sums = (
            t.view(buffer, (rows.source_rows, width), dtype)
            for buffer, (_, width, dtype) in zip(given, by_row, strict=True)
        )
        out = t.view(out, (rows.count, spec.outputs), "float32")
        if accumulators is not None:
            accumulators = t.view(accumulators, (rows.count, spec.taps * spec.blocks, spec.outputs), "int32")
        shift = zero_shift(spec.data_type)
        held = (weight.packed, weight.scales, weight.zeros, weight.offsets, bias)
        yield Arguments(rows, codes, act_scales, sums, *held, out, accumulators, shift)


def finish_value(args: Arguments, spec: QgemmSpec, value: Expr, channel: Expr) -> Expr:
    """Bias and clamp of one element."""
    if args.bias is not None:
        value = value + args.bias[channel]
    return v.bind(clamp(v.bind(value), spec.post, 1))
