"""Contractions of codes by levels, and what they must give in int64 numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kbitc.graph import integer_functions
from kbitc.quant.levels import LevelTensor, of_levels
from kbitc.targets.lower.contraction import Contraction, ConvAttributes, Requantization
from kbitc.targets.target import Target
from tests.support.kernels import Case, compile_cases, gather_rows

Array = npt.NDArray[Any]


def levels(bits: int, kind: str, shape: tuple[int, int, int], block: int = 0, seed: int = 0) -> LevelTensor:
    """A random weight: consecutive levels, levels two apart, any levels, whole bytes, or levels times factors."""
    random = np.random.default_rng(seed)
    if bits == 8 or kind == "bytes":
        return of_levels(random.integers(-128, 128, shape).astype(np.int8))
    half = 2 ** (bits - 1)
    grids = {
        "affine": tuple(range(-half, half)),
        "double": tuple(range(-2 * half + 1, 2 * half, 2)),
        "table": tuple(sorted(int(level) for level in random.choice(np.arange(-128, 128), 2 * half, replace=False))),
    }
    codes = random.integers(0, 2 * half, shape).astype(np.uint8)
    if kind != "two":
        return LevelTensor(codes, bits, grids[kind])
    limit = 127 // half
    factors = random.integers(-limit, limit + 1, (*shape[:2], -(-shape[2] // block))).astype(np.int8)
    return LevelTensor(codes, bits, grids["affine"], factors, block)


def numbers(
    outputs: int, terms: int, *, per_channel: bool, shift: int, dead: bool, low: int, high: int
) -> Requantization:
    """Requantization that spreads accumulators of `terms` products over the codes, unless a shift is given."""
    random = np.random.default_rng(terms)
    count = outputs if per_channel else 1
    usual = 31 + int(np.log2(np.sqrt(terms) * 75))
    multiplier = random.integers(2**30, 2**31, count).astype(np.int32)
    shifts = np.full(count, shift or usual, np.int32) + (0 if shift else random.integers(0, 2, count).astype(np.int32))
    if dead:
        multiplier[::2], shifts[::2] = 0, 1
    return Requantization(multiplier, shifts, 117, low, high)


def matmul(
    name: str,
    weight: LevelTensor,
    lead: tuple[Any, ...],
    *,
    zero: int = 131,
    requantized: bool = True,
    per_channel: bool = True,
    shift: int = 0,
    dead: bool = False,
    low: int = 0,
    high: int = 255,
    conv: ConvAttributes | None = None,
    **more: Any,
) -> Contraction:
    """x [*lead, C] by the weight; with a geometry, the image [*lead, C * group]."""
    n, taps, channels = weight.shape
    bias = np.random.default_rng(n).integers(-20000, 20000, n).astype(np.int32)
    wanted = numbers(n, taps * channels, per_channel=per_channel, shift=shift, dead=dead, low=low, high=high)
    kind, shape, out = "matmul", (*lead, channels), (*lead, n)
    if conv is not None:
        kind, shape, out = "conv", (*lead, channels * conv.group), (lead[0], *_out(lead[1:], conv), n)
    return Contraction(
        name, kind, weight, "uint8", shape, out, conv=conv, bias=bias, x_zero=zero,  # type: ignore[arg-type]
        requantize=wanted if requantized else None, **more,
    )  # fmt: skip


def conv(name: str, weight: LevelTensor, image: tuple[Any, Any, Any], conv: ConvAttributes, **more: Any) -> Contraction:
    """A convolution of an image (B, H, W)."""
    return matmul(name, weight, image, conv=conv, **more)


def _out(image: Sequence[int], conv: ConvAttributes) -> list[int]:
    top, left, bottom, right = conv.pads
    return [
        (size + before + after - step * (kernel - 1) - 1) // stride + 1
        for size, before, after, kernel, step, stride in zip(
            image, (top, left), (bottom, right), conv.kernel, conv.dilations, conv.strides, strict=True
        )
    ]


def reset(rule: Any, contraction: Contraction, values: str = "random") -> Case:
    """The case of a contraction with codes of a kind: random, zero (the zero point), largest, smallest, outlier."""
    shape = contraction.x_shape
    x = np.random.default_rng(len(contraction.name)).integers(0, 256, shape).astype(np.uint8)
    if values == "outlier":
        x = np.full(shape, contraction.x_zero, np.uint8)
        x.reshape(-1)[x.size // 2] = 255 - contraction.x_zero
    elif values != "random":
        x = np.full(shape, {"zero": contraction.x_zero, "largest": 255, "smallest": 0}[values], np.uint8)
    return Case(contraction.name, rule, contraction, x)


def accumulators(case: Case) -> Array:
    """The int64 sums with the bias, in the shape of the output."""
    what = case.contraction
    if not isinstance(what.weight, LevelTensor):
        raise TypeError("a weight of levels is wanted")
    weight = what.weight.levels().astype(np.int64)
    x = case.x.astype(np.int64) - what.x_zero
    outputs, taps, channels = weight.shape
    if what.conv is None:
        total = x.reshape(-1, channels) @ weight[:, 0].T
    else:
        groups = what.conv.group
        rows = gather_rows(x, what.conv).reshape(-1, taps, groups, channels)
        own = np.split(weight, groups)
        total = np.concatenate([np.einsum("mtc,ntc->mn", rows[:, :, i], own[i]) for i in range(groups)], axis=1)
    total = total + (0 if what.bias is None else what.bias.astype(np.int64))
    assert np.abs(total).max() < 2**31, "the case itself overflows"
    return np.asarray(total.reshape(what.out_shape))


def expected(case: Case) -> Array:
    """The result that a kernel must give."""
    total, wanted = accumulators(case), case.contraction.requantize
    if wanted is None:
        return total.astype(np.int32)
    return integer_functions.requantize(
        total, wanted.multiplier, wanted.shift, wanted.zero, axis=total.ndim - 1, low=wanted.low, high=wanted.high
    )


def check(cases: Sequence[Case], target: Target) -> None:
    """Compile all cases as one module and compare every integer."""
    cases = [replace(case) for case in cases]
    found = compile_cases(cases, target).run()
    for case in cases:
        np.testing.assert_array_equal(found[case.name], expected(case), err_msg=case.name)
        if case.contraction.accumulators_out:
            np.testing.assert_array_equal(found[f"{case.name}.accumulators"], accumulators(case), err_msg=case.name)
