"""The integer epilogue of kernels: int32 accumulators to uint8 codes in vectors, by the one rounding rule.

    q = clip(((int64(acc) * multiplier + 2^(shift - 1)) >> shift) + zero, low, high)

Three ways that give the same numbers:

    single  one float32 multiply-add, acc * (multiplier / 2^shift) + (1.5 * 2^23 + zero), whose rounding is that of the
            result, since numbers next to 1.5 * 2^23 are whole; the code is its bits less those of 1.5 * 2^23. That
            is exact with a multiplier of 24 bits, as multiplier / 2^shift is a float32, that ends in 20 zeros at most
            (`code_factor`): a product is only in the middle of two integers when |acc| is a multiple of 2^(shift - 21),
            and then it is 2^9 codes and more. Where |acc| is 2^24 and more and so no float32, a shift of at most 46
            (or the bound of the accumulator) makes the code a limit.
    high    all shifts are 32..54: the zero point is added inside, as zero << shift, and only the upper half of the
            64-bit sum is needed: (high32(acc * multiplier + addend) >> (shift - 32)). |acc * multiplier| < 2^62 and
            the addend is below 2^62, so that nothing overflows.
    wide    any shift: all of it in 64 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from kbitc.graph.integer_functions import MOST_ZEROS
from kbitc.quant.packing import GROUP, LANES
from kbitc.targets.kernels import mathfn
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.byte_dot import ByteDot
from kbitc.targets.lower.contraction import Requantization

Expr = Any
Buffer = Any
Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]
HALF = 32
WHOLE = 255
MOST_SHIFT = 54  # zero << shift stays below 2^62
DTYPES = {"factor": "float32", "multiplier": "int32", "shift": "int32", "addend": "int64"}
# The single way.
EXACT_FLOAT = 1 << 24  # integers below are float32 numbers
MOST_SINGLE_SHIFT = 46  # 2^24 accumulators are 256 codes and more
LOST_BITS = 7  # a multiplier of 31 bits has 24 that count
MAGIC, MAGIC_BITS = 1.5 * 2**23, 0x4B400000
MOST_CODES = 3 << 22  # so many codes below zero the sum with MAGIC would be negative, and its bits no order
MOST_SUM = 1 << 31


class Way(StrEnum):
    """How codes are made, see above."""

    SINGLE = "single"
    HIGH = "high"
    WIDE = "wide"


@dataclass(frozen=True)
class Epilogue:
    """What is fixed in a kernel; the numbers of the channels are arguments (`arrays`).

    Attributes:
        way: see above.
        zero, low, high_code: as in `Requantization`.
        guarded: single way: accumulators may be so large that the sum has to be kept from being negative.
    """

    way: Way
    zero: int
    low: int
    high_code: int
    guarded: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the arguments."""
        return ("factor",) if self.way is Way.SINGLE else ("multiplier", "shift", "addend")


def epilogue_of(requantize: Requantization, dot: ByteDot, most: IntArray | int = MOST_SUM) -> Epilogue:
    """The cheapest way that fits the numbers and the instruction set.

    Args:
        requantize: the numbers.
        dot: the instruction set.
        most: the largest magnitude of an accumulator, of each channel or of all.
    """
    multiplier, shift = _normal(requantize)
    zero, low, high = requantize.zero, requantize.low, requantize.high
    most = np.asarray(most, np.int64)
    last = multiplier & -multiplier
    fits = (last >= 1 << LOST_BITS) & (last <= 1 << MOST_ZEROS)
    fits = fits & ((shift <= MOST_SINGLE_SHIFT) | (most < EXACT_FLOAT))
    if dot.fused and bool(np.all(fits | (multiplier == 0))):
        codes = most * np.ldexp(multiplier.astype(np.float64), -shift)
        return Epilogue(Way.SINGLE, zero, low, high, bool(np.any(codes >= MOST_CODES - WHOLE)))
    upper = bool(np.all((shift >= HALF) & (shift <= MOST_SHIFT)))
    return Epilogue(Way.HIGH if upper else Way.WIDE, zero, low, high)


def _normal(requantize: Requantization) -> tuple[Array, Array]:
    """(multiplier, shift) as int64; a multiplier of 0 gives 0 with any shift, so its shift is free."""
    multiplier = np.asarray(requantize.multiplier, np.int64).reshape(-1)
    shift = np.asarray(requantize.shift, np.int64).reshape(-1)
    multiplier, shift = (np.asarray(a) for a in np.broadcast_arrays(multiplier, shift))
    return multiplier, np.where(multiplier == 0, HALF, shift)


def arrays(way: Epilogue, requantize: Requantization, places: IntArray, dot: ByteDot) -> dict[str, Array]:
    """The arguments of a kernel by name.

    Args:
        way: of the kernel.
        requantize: of N channels, or of all alike.
        places: int64 [tiles * 16], the channel that lies at each place; -1 is padding.
        dot: the instruction set.

    Returns:
        Single way: factor f32 [tiles * 16], multiplier / 2^shift.
        Others: multiplier and shift int32 [tiles * 16], and addend int64 [tiles * 16]. The addends of the even lanes
        of a register stand before those of its odd lanes where `dot.pairs`. Shifts are less 32 on the high way.
    """
    multiplier, shift = _normal(requantize)
    own = np.zeros_like(places) if multiplier.size == 1 else np.maximum(places, 0)
    multiplier, shift = multiplier[own], shift[own]
    if way.way is Way.SINGLE:
        return {"factor": np.ldexp(multiplier.astype(np.float32), -shift).astype(np.float32)}
    addend = np.int64(1) << (shift - 1)
    if way.way is Way.HIGH:
        addend = addend + (np.int64(way.zero) << shift)
        shift = shift - HALF
        if dot.pairs:
            addend = addend.reshape(-1, dot.lanes // 2, 2).transpose(0, 2, 1).reshape(-1)
    return {
        "multiplier": multiplier.astype(np.int32),
        "shift": shift.astype(np.int32),
        "addend": np.ascontiguousarray(addend, np.int64),
    }


def prepare(
    way: Epilogue, dot: ByteDot, buffers: dict[str, Buffer], place: Expr, *, limited: bool = True
) -> Callable[[Expr], Expr]:
    """Load the numbers of `dot.lanes` channels; what is returned makes codes of their accumulators.

    Args:
        way: of the kernel.
        dot: instruction set.
        buffers: the arguments of `arrays`.
        place: of the first channel.
        limited: clip the codes; else `packed_codes` does it.

    Returns:
        int32 vector -> int32 vector of codes, in low..high if they are limited.
    """
    lanes = dot.lanes
    if way.way is Way.SINGLE:
        factor = v.bind(v.load(buffers["factor"], [place], lanes))
        return lambda acc: _single(way, lanes, acc, factor, limited=limited)
    multiplier = v.bind(v.load(buffers["multiplier"], [place], lanes))
    shift = v.bind(v.load(buffers["shift"], [place], lanes))
    if way.way is Way.WIDE:
        addend = v.bind(v.load(buffers["addend"], [place], lanes))
        return lambda acc: _wide(way, lanes, acc, multiplier, shift, addend)
    half = lanes // 2
    addends = [v.bind(v.load(buffers["addend"], [place + side * half], half)) for side in range(2)]
    by_pairs = dot.pairs
    factors = _pairs(multiplier, lanes) if by_pairs else []

    def codes(acc: Expr) -> Expr:
        if by_pairs:
            upper = _joined_pairs(_pairs(acc, lanes), factors, addends, lanes)
        else:
            wide = v.cast(acc, "int64", lanes) * v.cast(multiplier, "int64", lanes)
            addend = v.load(buffers["addend"], [place], lanes)
            upper = v.cast(tirx.shift_right(wide + addend, v.full(HALF, "int64", lanes)), "int32", lanes)
        moved = tirx.shift_right(v.bind(upper), shift)
        return clip(moved, way.low, way.high_code, "int32", lanes) if limited else moved

    return codes


def packed_codes(way: Epilogue, dot: ByteDot, values: Sequence[Expr]) -> Expr:
    """Up to four int32 vectors of codes without limits as one uint8 vector in low..high, in the order of `dot.packed`.

    Saturation to 16 bits, then to 0..255, then to low..high is the same as low..high at once.
    """
    bytes_ = dot.packed([values[min(i, len(values) - 1)] for i in range(GROUP)])
    if way.low > 0:
        bytes_ = tirx.max(bytes_, v.full(way.low, "uint8", dot.bytes))
    if way.high_code < WHOLE:
        bytes_ = tirx.min(bytes_, v.full(way.high_code, "uint8", dot.bytes))
    return v.bind(bytes_)


def _single(way: Epilogue, lanes: int, acc: Expr, factor: Expr, *, limited: bool) -> Expr:
    """The single way. Behind 2^22 codes the bits still rise with the sum, as long as it is not negative."""
    sums = mathfn.fma(v.cast(acc, "float32", lanes), factor, v.full(MAGIC + way.zero, "float32", lanes))
    if way.guarded:
        sums = tirx.max(v.bind(sums), v.full(0.0, "float32", lanes))
    moved = v.reinterpret(v.bind(sums), "int32", lanes) - v.full(MAGIC_BITS, "int32", lanes)
    return clip(v.bind(moved), way.low, way.high_code, "int32", lanes) if limited else moved


def _pairs(values: Expr, lanes: int) -> list[Expr]:
    """The even and the odd lanes of an int32 vector, as int64."""
    pairs = v.bind(v.reinterpret(values, "int64", lanes // 2))
    half = v.full(HALF, "int64", lanes // 2)
    return [v.bind(tirx.shift_right(tirx.shift_left(pairs, half), half)), v.bind(tirx.shift_right(pairs, half))]


def _joined_pairs(acc: list[Expr], factors: list[Expr], addends: list[Expr], lanes: int) -> Expr:
    """The upper halves of acc * factor + addend, put back between each other: int32 vector."""
    even, odd = (v.bind(a * f + plus) for a, f, plus in zip(acc, factors, addends, strict=True))
    words = [v.bind(v.reinterpret(side, "int32", lanes)) for side in (even, odd)]
    picks = [1 + lane if lane % 2 == 0 else lanes + lane for lane in range(lanes)]
    return tirx.Shuffle(words, [tirx.const(pick, "int32") for pick in picks])


def _wide(way: Epilogue, lanes: int, acc: Expr, multiplier: Expr, shift: Expr, addend: Expr) -> Expr:
    product = v.cast(acc, "int64", lanes) * v.cast(multiplier, "int64", lanes)
    moved = tirx.shift_right(v.bind(product + addend), v.cast(shift, "int64", lanes))
    limited = clip(v.bind(moved), way.low - way.zero, way.high_code - way.zero, "int64", lanes)
    return v.cast(limited, "int32", lanes) + v.full(way.zero, "int32", lanes)


def clip(value: Expr, low: int, high: int, dtype: str, lanes: int) -> Expr:
    """min(max(value, low), high)."""
    return tirx.min(tirx.max(value, v.full(low, dtype, lanes)), v.full(high, dtype, lanes))


def arguments(way: Epilogue | None, places: int) -> dict[str, Buffer]:
    """Declare the arguments of an epilogue; none without one."""
    return {} if way is None else {part: v.argument(part, (places,), DTYPES[part]) for part in way.parts}


def channel_places(outputs: int, groups: int) -> npt.NDArray[np.int64]:
    """The channel at each place of tiles of 16, the tiles of every group by themselves; -1 is padding."""
    tiles = -(-outputs // LANES)
    places = np.full((groups, tiles * LANES), -1, np.int64)
    places[:, :outputs] = np.arange(groups * outputs).reshape(groups, outputs)
    return places.reshape(-1)


def store_codes(out: Buffer, outer: list[Expr], tile: Expr, part: int, codes: Expr, outputs: int, lanes: int) -> None:
    """Store part `part` of 16-channel tile `tile` into out [*outer, N]; only real channels of the last tile."""
    last = -(-outputs // LANES) - 1
    start = v.bind(tile * LANES + part * lanes)
    count = min(lanes, max(0, outputs - last * LANES - part * lanes))
    if count == lanes:
        v.store(out, [*outer, start], codes, lanes)
        return
    v.when(
        tile < v.i64(last),
        lambda: v.store(out, [*outer, start], codes, lanes),
        lambda: store_first(out, outer, start, codes, lanes, count),
    )


def store_first(out: Buffer, outer: list[Expr], start: Expr, codes: Expr, lanes: int, count: int) -> None:
    """Store the first `count` bytes in pieces of 8, 4, 2 and 1.

    Not by a mask: LLVM 22 turns a masked store of one byte that was narrowed from 32 bits into a store of 32 bits.
    """
    done, size = 0, lanes
    while done < count:
        size //= 2
        if size > count - done:
            continue
        picks = [tirx.const(done + lane, "int32") for lane in range(size)]
        v.store(out, [*outer, start + done], tirx.Shuffle([codes], picks), size)
        done += size
