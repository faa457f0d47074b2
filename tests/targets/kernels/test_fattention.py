"""Fused attention against float64 within a derived bound, and against the separate kernels bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from tvm import tirx

from kbitc.targets.cpu.rules.float import FusedAttention
from kbitc.targets.lower.contraction import Attention, Contraction, Place
from kbitc.targets.target import parse_target
from tests.support.float_kernels import UNIT_ROUNDOFF, Compiled, uniform
from tests.support.qemu import need_runner
from tests.targets.kernels.test_fbatch import TARGETS, target_here

HEADS_INSIDE = (0, 2, 1)  # batch, head, row of a tensor [batch, rows, heads, channels]
HEADS_OUTSIDE = (0, 1, 2)


@dataclass(frozen=True)
class Sizes:
    """Of one attention: batch, heads, queries, keys, channels, columns."""

    batch: int
    heads: int
    rows: int
    keys: int
    channels: int
    columns: int


def contraction(sizes: Any, mask: Place | None, axes: tuple[int, ...], scale: float, divide: bool) -> Contraction:
    """Of Sizes; numbers or tvm variables."""

    def place(rows: Any, channels: int) -> Place:
        shape = [sizes.batch, 0, 0, channels]
        shape[axes[1]], shape[axes[2]] = sizes.heads, rows
        return Place(tuple(shape), axes)

    q, k, v = place(sizes.rows, sizes.channels), place(sizes.keys, sizes.channels), place(sizes.keys, sizes.columns)
    out = place(sizes.rows, sizes.columns)
    lead = (sizes.batch, sizes.heads)
    what = Attention(lead, sizes.rows, sizes.keys, sizes.channels, sizes.columns, q, k, v, out, mask, scale, divide)
    return Contraction("node", "attention", None, "float32", q.shape, out.shape, b_shape=k.shape, attention=what)


def operands(sizes: Sizes, inside: bool) -> list[Any]:
    """q, k, v as they lie."""
    given = []
    for seed, (rows, channels) in enumerate(
        ((sizes.rows, sizes.channels), (sizes.keys, sizes.channels), (sizes.keys, sizes.columns))
    ):
        shape = (sizes.batch, rows, sizes.heads, channels) if inside else (sizes.batch, sizes.heads, rows, channels)
        given.append(4 * uniform(seed, *shape))
    return given


def check(got: Any, arrays: list[Any], mask: Any, inside: bool, scale: float, divide: bool) -> None:
    """Compare with float64.

    A score is off by at most D = g(C + 3) (|scale| sum |q| |k| + |mask|), its difference to the largest by 2 D and one
    rounding of it, and exp by two: a share is off by the factor e^e, e = 2 D + u |difference| + (N + 8) u for the sum,
    its inverse and their product. The sum by the values adds N u. Shares below 2^-126 are 0.
    """
    q, k, v = (array.astype(np.float64) for array in arrays)
    if inside:
        q, k, v = (array.transpose(0, 2, 1, 3) for array in (q, k, v))
    factor = 1 / scale if divide else scale
    added = np.zeros(1) if mask is None else mask.astype(np.float64)
    scores = factor * (q @ k.swapaxes(-1, -2)) + added
    finite = np.isfinite(scores)
    size = abs(factor) * (np.abs(q) @ np.abs(k).swapaxes(-1, -2)) + np.where(np.isfinite(added), np.abs(added), 0)
    channels, keys = q.shape[-1], k.shape[-2]
    n = channels + 3
    off = np.where(finite, n * UNIT_ROUNDOFF / (1 - n * UNIT_ROUNDOFF) * size, 0).max(-1, keepdims=True)
    peak = scores.max(-1, keepdims=True)
    parts = np.exp(scores - peak)
    shares = parts / parts.sum(-1, keepdims=True)
    apart = np.where(finite, peak - scores, 0)
    # What is farther from the largest than that is nothing in either, but for less than 2^-126.
    exponent = 2 * off + UNIT_ROUNDOFF * (np.minimum(apart, 90) + 1.01 * (2 * keys + 12))
    bound = (np.expm1(exponent) * shares) @ np.abs(v) + keys * 2.0**-125 * np.abs(v).max()
    want = shares @ v
    seen = got.transpose(0, 2, 1, 3) if inside else got
    assert seen.shape == want.shape and got.dtype == np.float32
    assert (np.abs(seen - want) <= bound).all(), float((np.abs(seen - want) / bound).max())


CASES = [
    Sizes(1, 1, 1, 1, 1, 1),
    Sizes(1, 2, 5, 7, 32, 32),
    Sizes(3, 2, 13, 13, 20, 9),
    Sizes(1, 3, 50, 33, 64, 64),
    Sizes(3, 1, 26, 70, 80, 80),
    Sizes(2, 2, 12, 16, 32, 64),
    Sizes(1, 1, 490, 130, 16, 16),
    Sizes(1, 2, 31, 100, 7, 100),
]
KINDS = ("none", "keys", "causal", "vector")


def mask_of(kind: str, sizes: Sizes) -> tuple[Any, tuple[int | None, ...]]:
    """A mask and where its axes lie; some places are -inf, none in all of a row."""
    if kind == "keys":
        mask = np.where(np.random.default_rng(3).random((sizes.batch, 1, 1, sizes.keys)) < 0.4, -np.inf, 0)
        mask[..., 0] = -3
        return mask.astype(np.float32), (0, None, None)
    if kind == "causal":
        seen = np.tri(sizes.rows, sizes.keys, max(0, sizes.keys - sizes.rows))
        return np.where(seen[None, None] > 0, 0, -np.inf).astype(np.float32), (None, None, 2)
    return (None, ()) if kind == "none" else (uniform(9, sizes.keys), (None, None, None))


@pytest.mark.parametrize(
    ("name", "kind", "sizes"),
    [(TARGETS[(i + j) % 2], KINDS[(i + 2 * j) % 4], sizes) for i, sizes in enumerate(CASES) for j in range(2)],
)
def test_shapes_masks_and_scales(name: str, kind: str, sizes: Sizes) -> None:
    inside, divide = kind in ("keys", "none"), kind != "causal"
    scale = float(np.sqrt(sizes.channels)) if divide else 0.3
    mask, axes = mask_of(kind, sizes)
    place = None if mask is None else Place(mask.shape, axes)
    what = contraction(sizes, place, HEADS_INSIDE if inside else HEADS_OUTSIDE, scale, divide)
    arrays = operands(sizes, inside)
    got = Compiled(FusedAttention(), what, target_here(name))(*arrays, *([] if mask is None else [mask]))
    check(got, arrays, mask, inside, scale, divide)


@pytest.mark.parametrize("name", TARGETS)
def test_every_size_symbolic(name: str) -> None:
    open_sizes = Sizes(*(tirx.Var(letter, "int64") for letter in "bhmn"), 32, 48)
    mask = Place((open_sizes.batch, 1, 1, open_sizes.keys), (0, None, None))
    run = Compiled(FusedAttention(), contraction(open_sizes, mask, HEADS_INSIDE, 2.0, True), target_here(name))
    for numbers in ((1, 1, 1, 1), (3, 2, 3, 64), (1, 2, 4, 15), (2, 1, 11, 17), (1, 2, 25, 63), (1, 1, 500, 65)):
        sizes = Sizes(*numbers, 32, 48)
        arrays, (given, _) = operands(sizes, True), mask_of("keys", sizes)
        check(run(*arrays, given), arrays, given, True, 2.0, True)


def test_a_row_that_sees_nothing_is_nan_and_spoils_no_other() -> None:
    sizes = Sizes(1, 1, 14, 20, 16, 16)
    mask, axes = mask_of("causal", sizes)
    mask[0, 0, 3] = -np.inf
    what = contraction(sizes, Place(mask.shape, axes), HEADS_OUTSIDE, 1.0, False)
    got = Compiled(FusedAttention(), what, target_here("x86:avx2"))(*operands(sizes, False), mask)
    assert np.isnan(got[0, 0, 3]).all() and np.isfinite(np.delete(got[0, 0], 3, axis=0)).all()


def test_keys_and_values_of_one_head_serve_all() -> None:
    sizes = Sizes(2, 3, 12, 20, 16, 16)
    what = contraction(sizes, None, HEADS_OUTSIDE, 1.0, False)
    one = Place((2, 1, 20, 16), (0, None, 2))
    assert what.attention is not None
    shared = Contraction(**{**vars(what), "attention": Attention(**{**vars(what.attention), "k": one, "v": one}),
                            "b_shape": one.shape})  # fmt: skip
    q, k, v = operands(sizes, False)
    got = Compiled(FusedAttention(), shared, target_here("x86:avx2"))(q, k[:, :1], v[:, :1])
    check(got, [q, k[:, :1], v[:, :1]], None, False, 1.0, False)


def results(sizes: Sizes, names: tuple[str, ...], variables: bool) -> list[Any]:
    mask, _ = mask_of("keys", sizes)
    arrays = operands(sizes, True)
    found = []
    for name in names:
        seen: Any = sizes
        if variables:
            seen = Sizes(sizes.batch, sizes.heads, *(tirx.Var(c, "int64") for c in "mn"), sizes.channels, sizes.columns)
        place = Place((sizes.batch, 1, 1, seen.keys), (0, None, None))
        target = target_here(name) if name in TARGETS else need_runner(name)
        what = contraction(seen, place, HEADS_INSIDE, 3.0, True)
        found.append(Compiled(FusedAttention(), what, target)(*arrays, mask))
    return found


@pytest.mark.parametrize("sizes", [Sizes(2, 2, 67, 75, 32, 32), Sizes(1, 3, 6, 90, 80, 80)])
def test_bits_are_those_of_both_vector_widths_static_and_symbolic(sizes: Sizes) -> None:
    first, *others = [*results(sizes, TARGETS, False), *results(sizes, TARGETS, True)]
    for other in others:
        np.testing.assert_array_equal(other, first)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [Sizes(2, 2, 25, 41, 32, 32), Sizes(1, 1, 14, 70, 80, 20)])
def test_neon_gives_the_bits_of_x86(sizes: Sizes) -> None:
    here, there = results(sizes, ("x86:avx2", "arm-neon:dotprod"), False)
    np.testing.assert_array_equal(there, here)


@pytest.mark.parametrize(("name", "pattern"), [("x86:avx512vnni", "zmm"), ("arm-neon:dotprod", ".4s")])
def test_products_are_register_tiles(name: str, pattern: str) -> None:
    what = contraction(Sizes(1, 12, 128, 128, 32, 32), None, HEADS_INSIDE, 1.0, False)
    text = Compiled(FusedAttention(), what, parse_target(name)).assembly()
    assert len([x for x in text.splitlines() if ("vfmadd" in x or "fmla" in x) and pattern in x]) >= 24
