"""What a kernel needs to know of a vector instruction set, and the one description that generates all k-bit kernels.

A *vector* of codes holds `lanes` output channels times 4 reduction channels, one byte each (see
kbitc/quant/packing.py). An instruction set turns such bytes into what its integer dot product reads, and says how
levels are fed: unsigned (x86) or signed (NEON).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from kbitc.errors import InternalError
from kbitc.quant.format import Format
from kbitc.quant.packing import GROUP, LANES
from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.codes import UnitCodes
from kbitc.targets.target import Target

Expr = Any


@dataclass(frozen=True)
class Feed:
    """How the codes of a format become the bytes that the dot product multiplies.

    fed byte = level + bias, always. Without a table the fed byte is ``(code << shift) ^ flip``.

    Attributes:
        bias: what is fed minus the level.
        shift: left shift of a code, 1 for levels two apart.
        flip: bits inverted, 0x80 to make an unsigned byte signed.
        table: uint8 [2^k] fed bytes (two's complement) by code, or None when shift and flip are enough.
        ends: the lowest and the highest number fed.
    """

    bias: int
    shift: int = 0
    flip: int = 0
    table: tuple[int, ...] | None = None
    ends: tuple[int, int] = (-128, 255)

    @property
    def largest(self) -> int:
        """The size of the largest number fed."""
        return max(map(abs, self.ends))


def stored_bias(data_type: Format) -> int:
    """What is stored as a zero point minus its level: zero points lie in memory as unsigned bytes.

    They are ``grid[zero_point] + stored_bias``, which for a uniform format is the zero point code itself.
    """
    return -data_type.levels[0] if data_type.uniform else 128


def feed_of(data_type: Format, *, signed: bool, lowest: int | None = None) -> Feed:
    """How the levels of a format become signed or unsigned bytes.

    Args:
        data_type: the format.
        signed: whether bytes are fed as -128 .. 127 or as 0 .. 255.
        lowest: what the lowest level of a table is fed as; None leaves signed levels as they are, and adds 128 to
            unsigned ones.
    """
    levels = data_type.levels
    low, high, step = min(levels), max(levels), levels[1] - levels[0]
    affine = levels == tuple(levels[0] + step * i for i in range(len(levels)))
    if affine and step in (1, 2):
        if not signed or high - low < 128:
            return Feed(bias=-low, shift=step - 1, ends=(0, high - low))
        return Feed(bias=-low - 128, shift=step - 1, flip=0x80, ends=(-128, high - low - 128))
    usual = 0 if signed else 128
    bias = usual if lowest is None else lowest - low
    return Feed(bias, table=tuple((level + bias) % 256 for level in levels), ends=(low + bias, high + bias))


def signed_levels(levels: Sequence[int], origin: int = 0) -> tuple[Feed, int]:
    """How codes become bytes of level - origin, and what is added to each byte after that (0: nothing)."""
    step = levels[1] - levels[0]
    if step in (1, 2) and tuple(levels) == tuple(levels[0] + step * i for i in range(len(levels))):
        return Feed(bias=0, shift=step - 1), levels[0] - origin
    return Feed(bias=0, table=tuple((level - origin) % 256 for level in levels)), 0


class Isa(ABC):
    """A vector instruction set.

    Attributes:
        name: for messages and kernel names.
        lanes: int32 lanes of a register.
        registers: vector registers.
        signed: the dot product reads signed levels.
        rows, tiles: register tile of the matrix product, in rows of activations and 16-channel tiles.
        vector_tiles: 16-channel tiles of the matrix-vector product, at most.
        look_up_tiles: the same for grids of 16 levels that are looked up; None for no other number.
        ignores_high_bits: `look_up` needs no codes in range: bits above those that count are ignored.
        tile_registers: products of many rows may use AMX tiles (`tiled.py`).
        raised_bits: widths whose every second code is multiplied where it lies in its byte, in a matrix-vector product
            (`qgemm.py`): measured 4 to 9 % of it on Zen 4, nothing at 1 bit.
    """

    name: str
    lanes: int
    registers: int
    signed: bool
    rows: int
    tiles: int
    vector_tiles: int
    look_up_tiles: int | None = None
    ignores_high_bits: bool = False
    tile_registers: bool = False
    raised_bits: tuple[int, ...] = (2, 3)

    @property
    def parts(self) -> int:
        """Registers for the 16 channels of a tile."""
        return LANES // self.lanes

    @property
    def bytes(self) -> int:
        """Bytes of a register."""
        return GROUP * self.lanes

    def few_tiles(self, feed: Feed) -> int:
        """16-channel tiles of the matrix-vector product of codes that are fed in this way, at most."""
        looked_up = feed.table is not None and len(feed.table) == LANES
        return self.look_up_tiles if looked_up and self.look_up_tiles is not None else self.vector_tiles

    def feed(self, data_type: Format) -> Feed:
        """How the dot product of this instruction set reads the levels of a format."""
        return feed_of(data_type, signed=self.signed)

    @abstractmethod
    def table(self, entries: tuple[int, ...]) -> list[Expr]:
        """Registers that `look_up` reads: made once for a kernel. 2 to 256 bytes."""

    @abstractmethod
    def look_up(self, table: list[Expr], codes: Expr) -> Expr:
        """entries[code] for every byte: uint8 vector of `bytes` lanes in, the same type out."""

    def split(self, levels: Expr, feed: Feed) -> tuple[Expr, ...]:
        """Prepare fed bytes (uint8 vector) for `dot`; done once per vector of codes."""
        return (levels,)

    @abstractmethod
    def broadcast(self, word: Expr) -> tuple[Expr, ...]:
        """Prepare four int8 activations (one int32 scalar) for `dot`; done once per row."""

    @abstractmethod
    def dot(self, sums: Expr, levels: tuple[Expr, ...], activations: tuple[Expr, ...]) -> Expr:
        """sums[n] + sum over j of levels[4 n + j] * activations[j]: int32, wraps, never saturates."""

    def chain(self, feed: Feed) -> int:
        """How many results of `narrow` may be added in 16 bits; 0 where there is only `dot`.

        It holds for any levels of the feed and any activations in -127 .. 127.
        """
        return 0

    def narrow(self, sums: Expr | None, levels: tuple[Expr, ...], activations: tuple[Expr, ...], feed: Feed) -> Expr:
        """As `dot` with two int16 sums a channel: lane 2 n for j = 0 and 1, lane 2 n + 1 for j = 2 and 3; None is 0."""
        raise InternalError(f"{self.name} has no sums of 16 bits", got=repr((sums, levels, activations, feed)))

    def keep_order(self, doubt: Expr) -> None:  # noqa: B027
        """Emitted between the steps of a tile of several rows, where LLVM would compute row after row otherwise.

        Args:
            doubt: a condition that is never true.
        """

    def widened(self, pairs: Expr, factors: Expr) -> Expr:
        """pairs[2 n] * factors[2 n] + pairs[2 n + 1] * factors[2 n + 1] of int16 vectors as int32 [lanes]."""
        raise InternalError(f"{self.name} has no sums of 16 bits", got=repr((pairs, factors)))

    def widen(self, halves: Expr) -> Expr:
        """f16 vector of `lanes` to f32."""
        return v.cast(halves, "float32", self.lanes)


def unit_codes(isa: Isa, bits: int, packed: Any, place: list[Expr], part: int) -> UnitCodes:
    """The codes of a unit for one register of output channels.

    Args:
        packed: uint8 [Np/16, T, Cp/32, k, 64].
        place: tile, tap and unit.
        part: which register of the tile.
    """

    def read(vector: int) -> Expr:
        loaded = v.load(packed, [*place, vector, part * isa.bytes], isa.bytes)
        return v.reinterpret(loaded, "uint32", isa.lanes)

    return UnitCodes(bits, read, isa.lanes)


def level_bytes(isa: Isa, feed: Feed, table: list[Expr] | None, codes: UnitCodes, step: int) -> Expr:
    """The fed bytes of one step of a unit.

    Args:
        isa: the instruction set.
        feed: from `isa.feed`.
        table: from `isa.table` when the feed has one.
        codes: the unit, in words of `isa.lanes`.
        step: 0..7.

    Returns:
        uint8 vector of `isa.bytes` lanes.
    """
    found = codes.step(step, feed.shift, masked=table is None or not isa.ignores_high_bits)
    if feed.flip:
        found = found ^ codes.full(feed.flip)
    fed = v.reinterpret(found, "uint8", isa.bytes)
    return fed if table is None else isa.look_up(table, v.bind(fed))


def select_tree(chunks: list[Expr], codes: Expr, bit: int, lanes: int) -> Expr:
    """Choose among look-ups of 16 entries each by the high bits of the codes, bit `bit` first."""
    if len(chunks) == 1:
        return chunks[0]
    mask = v.full(1 << bit, "uint8", lanes)
    chosen = (codes & mask) == mask
    pairs = [v.bind(tirx.Select(chosen, high, low)) for low, high in zip(chunks[0::2], chunks[1::2], strict=True)]
    return select_tree(pairs, codes, bit + 1, lanes)


class Portable(Isa):
    """Plain vector TIR, for any machine that LLVM knows; also the meaning of `dot` in four products."""

    name = "portable"
    lanes = 4
    registers = 16
    signed = True
    rows = 4
    tiles = 1
    vector_tiles = 1

    def table(self, entries: tuple[int, ...]) -> list[Expr]:
        """See `Isa.table`."""
        return [v.full(fed, "uint8", self.bytes) for fed in entries]

    def look_up(self, table: list[Expr], codes: Expr) -> Expr:
        """See `Isa.look_up`."""
        found = table[0]
        for code, fed in enumerate(table):
            same = codes == v.full(code, "uint8", self.bytes)
            found = v.bind(tirx.Select(same, fed, found))
        return found

    def split(self, levels: Expr, feed: Feed) -> tuple[Expr, ...]:
        """See `Isa.split`."""
        return (v.reinterpret(levels, "int32", self.lanes),)

    def broadcast(self, word: Expr) -> tuple[Expr, ...]:
        """See `Isa.broadcast`."""
        return tuple(v.splat(_signed_byte(word, j, 1), self.lanes) for j in range(GROUP))

    def dot(self, sums: Expr, levels: tuple[Expr, ...], activations: tuple[Expr, ...]) -> Expr:
        """See `Isa.dot`."""
        for j in range(GROUP):
            sums = sums + _signed_byte(levels[0], j, self.lanes) * activations[j]
        return sums


def _signed_byte(word: Expr, j: int, lanes: int) -> Expr:
    """Byte j of every int32 lane, sign-extended."""
    up = tirx.shift_left(word, v.full(24 - 8 * j, "int32", lanes))
    return tirx.shift_right(up, v.full(24, "int32", lanes))


def isa_of(target: Target) -> Isa:
    """The instruction set of a target, with its schedule; the portable one where it has no dot product."""
    isa = _isa_of(target)
    if target.schedule is not None:
        isa.rows, isa.tiles = target.schedule.rows, target.schedule.tiles
        isa.vector_tiles, isa.look_up_tiles = target.schedule.few_tiles, None
    return isa


def _isa_of(target: Target) -> Isa:
    # Imported here: the intrinsic folders import this module.
    from kbitc.targets.neon.intrin.dotprod import Dotprod
    from kbitc.targets.x86.intrin.amx import Amx
    from kbitc.targets.x86.intrin.avx2 import Avx2
    from kbitc.targets.x86.intrin.avx512vbmi import Avx512Vbmi
    from kbitc.targets.x86.intrin.avx512vnni import Avx512Vnni
    from kbitc.targets.x86.intrin.avxvnni import AvxVnni

    if target.has("avx512vbmi"):
        return Amx() if target.has("amx") else Avx512Vbmi()
    sets: dict[str, type[Isa]] = {
        "vpdpbusd": Avx512Vnni,
        "vpdpbusd_ymm": AvxVnni,
        "vpmaddwd": Avx2,
        "sdot": Dotprod,
        "": Portable,
    }
    return sets[target.dot]()


def stored_zero_points(zero_points: npt.NDArray[np.uint8], data_type: Format) -> npt.NDArray[np.uint8]:
    """Zero points as they lie in memory: grid[zero_point] + stored_bias, uint8 of the same shape."""
    return np.asarray(data_type.grid.astype(np.int16)[zero_points] + stored_bias(data_type), dtype=np.uint8)
