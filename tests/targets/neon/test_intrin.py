"""Each NEON instruction equals its numpy meaning, under qemu on a Cortex-A76."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from kbitc.targets.neon.intrin import sdot, tbl
from kbitc.targets.neon.intrin.dotprod import Dotprod
from tests.support import instructions
from tests.support.instructions import Instruction
from tests.support.qemu import need_runner

RANDOM = np.random.default_rng(5)


def _random(dtype: Any, size: int) -> Any:
    limits = np.iinfo(dtype)
    return RANDOM.integers(limits.min, limits.max + 1, size).astype(dtype)


def _sdot(name: str, sums: Any, left: Any, right: Any) -> Instruction:
    return Instruction(name, (sums, left, right), sdot.emit, sdot.meaning(sums, left, right))


def _tbl(registers: int) -> Instruction:
    table, indices = _random(np.uint8, 16 * registers), _random(np.uint8, 16)
    parts = tuple(table.reshape(registers, 16))
    return Instruction(
        f"tbl{registers}",
        (*parts, indices),
        lambda *operands: tbl.emit(list(operands[:-1]), operands[-1]),
        tbl.meaning(table, indices),
    )


def _look_up(entries: int) -> Instruction:
    isa, table = Dotprod(), _random(np.uint8, entries)
    codes = RANDOM.integers(0, entries, isa.bytes).astype(np.uint8)
    held = tuple(int(x) for x in table)
    return Instruction(f"look_up{entries}", (codes,), lambda c: isa.look_up(isa.table(held), c), table[codes])


INSTRUCTIONS = (
    _sdot("random", _random(np.int32, 4), _random(np.int8, 16), _random(np.int8, 16)),
    _sdot("highest", np.zeros(4, np.int32), np.full(16, -128, np.int8), np.full(16, -128, np.int8)),
    _sdot("wraps", np.full(4, 2**31 - 1, np.int32), np.full(16, 127, np.int8), np.full(16, 127, np.int8)),
    *(_tbl(registers) for registers in (1, 2, 3, 4)),
    *(_look_up(entries) for entries in (4, 16, 32, 64, 128, 256)),
)


@cache
def results() -> dict[str, Any]:
    return instructions.run(INSTRUCTIONS, need_runner("arm-neon:dotprod"))


@pytest.mark.parametrize("instruction", INSTRUCTIONS, ids=lambda i: i.name)
def test_instruction(instruction: Instruction) -> None:
    np.testing.assert_array_equal(results()[instruction.name], instruction.wanted)
