"""Each x86 instruction equals its numpy meaning, on random operands and at the ends of their ranges."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import pytest

from kbitc.errors import InternalError
from kbitc.targets.target import host_runs, parse_target
from kbitc.targets.x86.intrin import packs, vpdpbusd, vpermb, vpmaddubsw, vpmaddwd, vpshufb, vpsignb
from kbitc.targets.x86.intrin.avx2 import Avx2
from kbitc.targets.x86.intrin.avx512vbmi import Avx512Vbmi
from kbitc.targets.x86.intrin.avx512vnni import Avx512Vnni
from tests.support import instructions
from tests.support.instructions import Instruction

RANDOM = np.random.default_rng(3)


def _random(dtype: Any, size: int) -> Any:
    limits = np.iinfo(dtype)
    return RANDOM.integers(limits.min, limits.max + 1, size).astype(dtype)


def _vpdpbusd(name: str, sums: Any, unsigned: Any, signed: Any) -> Instruction:
    return Instruction(name, (sums, unsigned, signed), vpdpbusd.emit, vpdpbusd.meaning(sums, unsigned, signed))


def _vpmaddwd(name: str, left: Any, right: Any) -> Instruction:
    return Instruction(name, (left, right), vpmaddwd.emit, vpmaddwd.meaning(left, right))


def _vpmaddubsw(name: str, unsigned: Any, signed: Any) -> Instruction:
    largest = int(unsigned.max()), int(np.abs(signed.astype(int)).max())
    emit = partial(vpmaddubsw.emit, largest=largest)
    return Instruction(name, (unsigned, signed), emit, vpmaddubsw.meaning(unsigned, signed))


def _vpsignb() -> Instruction:
    values = np.array([-128, -127, 0, 127] * 8, np.int8)
    signs = np.repeat(np.array([-128, -1, 0, 1, 127, -7, 7, -127], np.int8), 4)
    return Instruction("vpsignb", (values, signs), vpsignb.emit, vpsignb.meaning(values, signs))


def _vpshufb(width: int) -> Instruction:
    table, indices = _random(np.uint8, width), _random(np.uint8, width)
    return Instruction(
        f"vpshufb{width}", (table, indices), partial(vpshufb.emit, width=width), vpshufb.meaning(table, indices)
    )


def _vpermb() -> Instruction:
    table, indices = _random(np.uint8, 64), _random(np.uint8, 64)
    return Instruction("vpermb", (table, indices), vpermb.emit, vpermb.meaning(table, indices))


def _vpermi2b() -> Instruction:
    table, indices = _random(np.uint8, 128), _random(np.uint8, 64)
    wanted = vpermb.meaning(table, indices)
    return Instruction("vpermi2b", (table[:64], table[64:], indices), vpermb.emit_two, wanted)


def _packs(lanes: int) -> tuple[Instruction, Instruction]:
    """Both instructions on random numbers and on the ends of the ranges that they saturate to."""
    edges = np.array([-(2**31), -32769, -32768, 32767, 32768, 2**31 - 1, 0, 255], np.int32)
    low, high = (np.resize(_mixed(np.int32, edges), lanes) for _ in range(2))
    small = np.array([-32768, -1, 0, 254, 255, 256, 32767, 7], np.int16)
    left, right = (np.resize(_mixed(np.int16, small), 2 * lanes) for _ in range(2))
    words, bytes_ = packs.meaning(low, high, np.int16), packs.meaning(left, right, np.uint8)
    return (
        Instruction(f"vpackssdw{lanes}", (low, high), partial(packs.words, lanes=lanes), words),
        Instruction(f"vpackuswb{lanes}", (left, right), partial(packs.unsigned_bytes, lanes=lanes), bytes_),
    )


def _mixed(dtype: Any, edges: Any) -> Any:
    found = np.concatenate([edges, _random(dtype, 8)])
    return RANDOM.permutation(found)


def _look_up_any(entries: int) -> Instruction:
    """Codes below the number of entries after whatever bits lie above them."""
    isa, table, codes = Avx512Vbmi(), _random(np.uint8, entries), _random(np.uint8, 64)
    held, wanted = tuple(int(x) for x in table), table[codes.astype(int) % entries]
    return Instruction(f"any{entries}", (codes,), lambda c: isa.look_up(isa.table(held), c), wanted)


def _look_up(isa: Avx2 | Avx512Vnni, entries: int) -> Instruction:
    table = _random(np.uint8, entries)
    codes = RANDOM.integers(0, entries, isa.bytes).astype(np.uint8)
    held = tuple(int(x) for x in table)
    return Instruction(
        f"look_up{entries}_{isa.name}", (codes,), lambda c: isa.look_up(isa.table(held), c), table[codes]
    )


WIDE = (
    _vpdpbusd("random", _random(np.int32, 16), _random(np.uint8, 64), _random(np.int8, 64)),
    # 4 * 255 * 127 does not fit 16 bits: an instruction that saturates on the way would show.
    _vpdpbusd("highest", np.zeros(16, np.int32), np.full(64, 255, np.uint8), np.full(64, 127, np.int8)),
    _vpdpbusd("lowest", np.zeros(16, np.int32), np.full(64, 255, np.uint8), np.full(64, -128, np.int8)),
    _vpdpbusd("wraps", np.full(16, 2**31 - 1, np.int32), np.full(64, 255, np.uint8), np.full(64, 127, np.int8)),
    _vpshufb(64),
    *_packs(16),
    *_packs(4),
    *(_look_up(Avx512Vnni(), entries) for entries in (2, 16, 32, 64, 128, 256)),
)
VBMI = (_vpermb(), _vpermi2b(), *(_look_up_any(entries) for entries in (2, 4, 8, 16, 32, 64, 128, 256)))
NARROW = (
    _vpmaddwd("random", _random(np.int16, 16), _random(np.int16, 16)),
    _vpmaddwd("levels", np.full(16, 255, np.int16), np.full(16, -128, np.int16)),
    _vpmaddubsw("seven bits", _random(np.uint8, 32) >> 1, np.maximum(_random(np.int8, 32), -127)),
    # 2 * 127 * 127 = 32258 and 2 * 128 * 127 = 32512 are the largest sums that kernels make.
    _vpmaddubsw("largest levels", np.full(32, 127, np.uint8), np.full(32, -127, np.int8)),
    _vpmaddubsw("largest sizes", np.full(32, 128, np.uint8), np.tile(np.array([127, 127, -127, -127], np.int8), 8)),
    _vpsignb(),
    _vpshufb(32),
    *_packs(8),
    *(_look_up(Avx2(), entries) for entries in (2, 16, 32, 64, 128, 256)),
)


@cache
def results(target_name: str) -> dict[str, Any]:
    target = parse_target(target_name)
    if reason := host_runs(target):
        pytest.skip(reason)
    chosen = {"x86:avx512vbmi": VBMI, "x86:avx512vnni": WIDE, "x86:avx2": NARROW}[target_name]
    return instructions.run(chosen, target)


@pytest.mark.parametrize("instruction", WIDE, ids=lambda i: i.name)
def test_avx512_instruction(instruction: Instruction) -> None:
    np.testing.assert_array_equal(results("x86:avx512vnni")[instruction.name], instruction.wanted)


@pytest.mark.parametrize("instruction", VBMI, ids=lambda i: i.name)
def test_vbmi_instruction(instruction: Instruction) -> None:
    np.testing.assert_array_equal(results("x86:avx512vbmi")[instruction.name], instruction.wanted)


@pytest.mark.parametrize("instruction", NARROW, ids=lambda i: i.name)
def test_avx2_instruction(instruction: Instruction) -> None:
    np.testing.assert_array_equal(results("x86:avx2")[instruction.name], instruction.wanted)


def test_vpmaddubsw_is_refused_where_it_could_saturate() -> None:
    operands = np.full(32, 255, np.uint8), np.full(32, 127, np.int8)
    assert vpmaddubsw.meaning(*operands).max() == vpmaddubsw.HIGHEST < 2 * 255 * 127
    with pytest.raises(InternalError, match="could saturate .*255 by 127"):
        vpmaddubsw.emit(None, None, (255, 127))
    assert [vpmaddubsw.sums(2**bits - 1, 127) for bits in range(1, 9)] == [129, 43, 18, 8, 4, 2, 1, 0]


@pytest.mark.parametrize("level", [1, 8, 9, 16, 17, 32, 33, 64, 65, 127])
def test_a_chain_of_constants_is_the_longest_that_cannot_overflow(level: int) -> None:
    """All of one level is the worst; one sign more than it takes is a chain less."""
    for sign in (1, -1):
        chain = vpmaddubsw.chain_of(np.full((3, 2, 37), sign * level, np.int8), 255)
        longer = next((length for length in reversed(vpmaddubsw.CHAINS) if length > chain), 0)
        assert 2 * chain * level * 255 <= 32767 and (not longer or 2 * longer * level * 255 > 32767)


def test_a_chain_of_constants_counts_lanes_and_signs_by_themselves() -> None:
    levels = np.zeros((2, 1, 64), np.int8)
    levels[1, 0, 32:36] = 127, 1, 1, 127
    assert vpmaddubsw.chain_of(levels, 255) == 8
    levels[1, 0, 36:38] = -64, -64
    assert vpmaddubsw.chain_of(levels, 255) == 8
    levels[1, 0, 40] = 1
    assert vpmaddubsw.chain_of(levels, 255) == 2
    levels[1, 0, 33] = 2
    assert vpmaddubsw.chain_of(levels, 255) == 0
    assert vpmaddubsw.chain_of(levels, 127) == 8
