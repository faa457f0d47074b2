"""Four-way dot products of uint8 activations by int8 levels, for integer graphs.

The instruction sets of `isa.py` feed levels unsigned and activations signed. Here it is the other way round: the
activations of a static graph are uint8 codes, the levels int8. x86 multiplies them as they are; NEON, whose sdot is
signed, flips the top bit of the codes, which is x - 128, and the bias makes up for it (`offset`). AVX2 sums in 16 bits
first where the constant levels prove that nothing overflows (`byte_dot_of`), and widens the bytes elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from kbitc.errors import InternalError
from kbitc.quant.packing import GROUP, LANES
from kbitc.targets.kernels import vector as v
from kbitc.targets.neon.intrin import sdot
from kbitc.targets.x86.intrin import fence, packs, vpdpbusd, vpmaddubsw, vpmaddwd

Expr = Any
# The largest code.
WHOLE = 255


class ByteDot:
    """Plain vector TIR, for any machine that LLVM knows; also the meaning of the others.

    Attributes:
        lanes: int32 lanes of a register.
        registers: vector registers.
        ahead: registers left to activations and to what LLVM loads ahead.
        held: registers that the prepared levels of one register of bytes take.
        offset: what is fed minus the activation code, 0 or -128.
        pairs: products of 64 bits are made of the even and of the odd lanes, as vpmuldq does, not of the halves.
        packs: there is `packed`.
        chain: how many results of `narrow` may be added in 16 bits; 0 where there is only `dot`.
        fused: a float32 multiply-add with one rounding is one instruction.
    """

    lanes = 4
    registers = 16
    ahead = 4
    held = 1
    offset = 0
    pairs = False
    packs = False
    chain = 0
    fused = False

    @property
    def bytes(self) -> int:
        """Bytes of a register."""
        return GROUP * self.lanes

    @property
    def parts(self) -> int:
        """Registers for 16 channels."""
        return LANES // self.lanes

    def levels(self, levels: Expr) -> tuple[Expr, ...]:
        """Prepare a uint8 vector of level bytes (two's complement): once for all rows."""
        return (v.reinterpret(levels, "int32", self.lanes),)

    def splat(self, word: Expr) -> tuple[Expr, ...]:
        """Prepare four codes (an int32 scalar) that all channels meet: once for all channels."""
        return self.codes(v.splat(word, self.lanes))

    def codes(self, words: Expr) -> tuple[Expr, ...]:
        """Prepare four codes a lane (an int32 vector)."""
        return (v.bind(words),)

    def packed(self, four: Sequence[Expr]) -> Expr:
        """Four int32 vectors -> one uint8 vector, saturated: byte 16 k + 4 q + i is number 4 k + i of vector q."""
        if not self.packs:
            raise InternalError("an instruction set without saturating packs")
        low, high = (v.bind(packs.words(four[i], four[i + 1], self.lanes)) for i in (0, 2))
        return v.bind(packs.unsigned_bytes(low, high, self.lanes))

    def dot(self, sums: Expr, codes: tuple[Expr, ...], levels: tuple[Expr, ...]) -> Expr:
        """sums[n] + sum over j of code[n, j] * level[n, j]: int32, wraps, never saturates."""
        for j in range(GROUP):
            code = tirx.shift_right(codes[0], v.full(8 * j, "int32", self.lanes)) & v.full(0xFF, "int32", self.lanes)
            up = tirx.shift_left(levels[0], v.full(24 - 8 * j, "int32", self.lanes))
            sums = sums + code * tirx.shift_right(up, v.full(24, "int32", self.lanes))
        return sums

    def narrow(self, sums: Expr | None, codes: tuple[Expr, ...], levels: tuple[Expr, ...]) -> Expr:
        """As `dot` with two int16 sums a channel: lane 2 n for j = 0 and 1, lane 2 n + 1 for j = 2 and 3; None is 0."""
        raise InternalError("an instruction set without sums of 16 bits", got=repr((sums, codes, levels)))

    def widened(self, pairs: Expr) -> Expr:
        """Sums of 16 bits as int32 [lanes]."""
        raise InternalError("an instruction set without sums of 16 bits", got=repr(pairs))


class Vnni(ByteDot):
    """vpdpbusd: one instruction, on registers of 16, 8 or 4 lanes."""

    registers = 32
    ahead = 8
    pairs = True
    packs = True
    fused = True

    def __init__(self, lanes: int = vpdpbusd.LANES) -> None:
        self.lanes = lanes

    def levels(self, levels: Expr) -> tuple[Expr, ...]:
        """See `ByteDot.levels`."""
        return (v.reinterpret(levels, "int8", self.bytes),)

    def codes(self, words: Expr) -> tuple[Expr, ...]:
        """See `ByteDot.codes`."""
        return (v.reinterpret(words, "uint8", self.bytes),)

    def dot(self, sums: Expr, codes: tuple[Expr, ...], levels: tuple[Expr, ...]) -> Expr:
        """See `ByteDot.dot`."""
        return vpdpbusd.emit(sums, codes[0], levels[0], self.lanes)


class YmmVnni(Vnni):
    """AVX-VNNI: the 16 registers of processors without AVX-512."""

    registers = 16
    ahead = 4

    def __init__(self, lanes: int = vpdpbusd.YMM_LANES) -> None:
        super().__init__(lanes)


class Maddwd(ByteDot):
    """AVX2: two vpmaddwd of the even and the odd bytes, which cannot saturate."""

    lanes = vpmaddwd.LANES
    registers = 16
    held = 2
    pairs = True
    packs = True
    fused = True

    def levels(self, levels: Expr) -> tuple[Expr, ...]:
        """See `ByteDot.levels`."""
        words = v.bind(v.reinterpret(levels, "int16", 2 * self.lanes))
        eight = v.full(8, "int16", 2 * self.lanes)
        even = v.bind(tirx.shift_right(tirx.shift_left(words, eight), eight))
        return even, v.bind(tirx.shift_right(words, eight))

    def codes(self, words: Expr) -> tuple[Expr, ...]:
        """See `ByteDot.codes`."""
        pairs = v.bind(v.reinterpret(words, "uint16", 2 * self.lanes))
        even = v.bind(v.reinterpret(pairs & v.full(0xFF, "uint16", 2 * self.lanes), "int16", 2 * self.lanes))
        odd = tirx.shift_right(pairs, v.full(8, "uint16", 2 * self.lanes))
        return even, v.bind(v.reinterpret(odd, "int16", 2 * self.lanes))

    def dot(self, sums: Expr, codes: tuple[Expr, ...], levels: tuple[Expr, ...]) -> Expr:
        """See `ByteDot.dot`."""
        for code, level in zip(codes, levels, strict=True):
            sums = sums + vpmaddwd.emit(code, level)
        return sums


class Maddubsw(ByteDot):
    """AVX2: vpmaddubsw, for levels of which some results fit 16 bits whatever the codes are.

    Args:
        chain: how many do (`vpmaddubsw.chain_of`), at least one.
    """

    lanes = vpmaddwd.LANES
    registers = 16
    pairs = True
    packs = True
    fused = True

    def __init__(self, chain: int) -> None:
        self.chain = chain

    def levels(self, levels: Expr) -> tuple[Expr, ...]:
        """See `ByteDot.levels`."""
        return (v.reinterpret(levels, "int8", self.bytes),)

    def codes(self, words: Expr) -> tuple[Expr, ...]:
        """See `ByteDot.codes`."""
        return (v.bind(v.reinterpret(words, "uint8", self.bytes)),)

    def narrow(self, sums: Expr | None, codes: tuple[Expr, ...], levels: tuple[Expr, ...]) -> Expr:
        """See `ByteDot.narrow`."""
        pairs = v.bind(vpmaddubsw.emit(codes[0], levels[0], (WHOLE, vpmaddubsw.HIGHEST // WHOLE // 2)))
        return pairs if sums is None else v.bind(fence.emit(sums + pairs, "int16", vpmaddubsw.LANES))

    def widened(self, pairs: Expr) -> Expr:
        """See `ByteDot.widened`."""
        return vpmaddwd.emit(pairs, v.full(1, "int16", vpmaddubsw.LANES))

    def dot(self, sums: Expr, codes: tuple[Expr, ...], levels: tuple[Expr, ...]) -> Expr:
        """See `ByteDot.dot`: a chain of one."""
        return sums + self.widened(self.narrow(None, codes, levels))


class Sdot(ByteDot):
    """NEON with dotprod: the codes lose 128, by their top bit."""

    lanes = sdot.LANES
    registers = 32
    ahead = 8
    offset = -128
    fused = True

    def levels(self, levels: Expr) -> tuple[Expr, ...]:
        """See `ByteDot.levels`."""
        return (v.reinterpret(levels, "int8", self.bytes),)

    def splat(self, word: Expr) -> tuple[Expr, ...]:
        """See `ByteDot.splat`; the scalar is flipped, which is cheaper than the vector."""
        flipped = v.bind(word ^ tirx.const(-0x7F7F7F80, "int32"))
        return (v.reinterpret(v.splat(flipped, self.lanes), "int8", self.bytes),)

    def codes(self, words: Expr) -> tuple[Expr, ...]:
        """See `ByteDot.codes`."""
        flipped = words ^ v.full(-0x7F7F7F80, "int32", self.lanes)
        return (v.bind(v.reinterpret(flipped, "int8", self.bytes)),)

    def dot(self, sums: Expr, codes: tuple[Expr, ...], levels: tuple[Expr, ...]) -> Expr:
        """See `ByteDot.dot`."""
        return sdot.emit(sums, codes[0], levels[0])


def narrower(dot: ByteDot, channels: int) -> ByteDot:
    """The same instruction on the smallest registers that hold so many bytes, where it has smaller ones."""
    if not isinstance(dot, Vnni):
        return dot
    return type(dot)(next(lanes for lanes in (4, 8, vpdpbusd.LANES) if lanes * GROUP >= min(channels, dot.bytes)))


def byte_dot(dot: str) -> ByteDot:
    """The dot product of a target by its dot instruction (`Target.dot`), for any levels."""
    sets: dict[str, type[ByteDot]] = {
        "vpdpbusd": Vnni,
        "vpdpbusd_ymm": YmmVnni,
        "vpmaddwd": Maddwd,
        "sdot": Sdot,
        "": ByteDot,
    }
    return sets[dot]()


def byte_dot_of(dot: str, levels: npt.NDArray[np.int8]) -> ByteDot:
    """The dot product of a target for constant levels int8 [N, T, C], as they lie in the kernel."""
    chain = vpmaddubsw.chain_of(levels, WHOLE) if dot == "vpmaddwd" else 0
    return Maddubsw(chain) if chain else byte_dot(dot)


def signed_word(word: int) -> int:
    """32 bits as the int32 that has them."""
    return word - 2**32 if word >= 2**31 else word
