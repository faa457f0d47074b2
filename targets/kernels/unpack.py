"""Packed k-bit weights to the float32 layout of the float kernels: [tiles, T * C, 16].

    w[tile, t * C + c, lane] = f32(grid[code] - grid[zero_point]) * scale[n, t, block of c]      n = 16 * tile + lane

with offsets f32(code) * scale + offset:
the very float32 that ONNX DequantizeLinear gives. It runs once a call of the model, on weights that are small beside
the activations they meet. A weight with one scale a channel is packed with its taps side by side, as [N, 1, T * C],
because padding every tap to 32 channels would make a 3x3 depthwise weight 32 times as large as its codes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm.script.ir_builder import tirx as builder

from kbitc.quant.packing import GROUP, LANES, STEPS, UNIT
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.isa import Isa
from kbitc.targets.kernels.packed import WeightSpec, declare_weight
from kbitc.targets.kernels.wgemm import Decoder

Expr = Any
Buffer = Any


def merged(spec: WeightSpec) -> WeightSpec:
    """The specification with the taps as channels, where one scale serves them all; else unchanged."""
    if spec.scale_per_block:
        return spec
    channels = spec.taps * spec.channels
    return replace(spec, taps=1, channels=channels, block=channels)


def make_unpack(spec: WeightSpec, isa: Isa, name: str) -> Any:
    """The PrimFunc: packed codes, scales, zero points or offsets (if any) -> f32 [tiles, T * C, 16].

    Lanes beyond N are 0.

    Args:
        spec: the weight.
        isa: instruction set.
        name: name of the function.
    """
    return v.kernel(name, lambda: _emit(spec, isa))


def _emit(spec: WeightSpec, isa: Isa) -> None:
    args = declare_weight(spec)
    out = v.argument("out", (spec.output_tiles, spec.taps * spec.channels, LANES), "float32")
    decoder = Decoder(spec, isa, args)
    whole, rest = divmod(spec.channels, UNIT)
    with v.root(), builder.parallel(v.i64(0), v.i64(spec.output_tiles)) as tile:
        decoder.prepare()

        def tap(index: Expr) -> None:
            v.loop(whole, lambda unit: _unit(decoder, out, (tile, index, unit), UNIT))
            if rest:
                _unit(decoder, out, (tile, index, v.i64(whole)), rest)

        v.loop(spec.taps, tap)


def _unit(decoder: Decoder, out: Buffer, place: tuple[Expr, Expr, Expr], count: int) -> None:
    """The first `count` channels of one unit."""
    spec, isa = decoder.spec, decoder.isa
    tile, tap, unit = place
    half = UNIT // 2
    for part in range(isa.parts):
        codes = decoder.codes(tile, tap, unit, part)
        for step in range(min(STEPS, -(-count // GROUP))):
            if step % (half // GROUP) == 0:
                block = v.bind((unit * UNIT + step * GROUP) // spec.block)
                factors = decoder.factors(tile, tap, block, part)
            fed = decoder.fed(codes, step)
            for j in range(min(GROUP, count - step * GROUP)):
                at = tap * spec.channels + unit * UNIT + (step * GROUP + j)
                v.store(out, [tile, at, part * isa.lanes], decoder.weight(fed, j, factors), isa.lanes)
