"""Tile registers (AMX-TILE): their configuration, loads and stores.

Eight tiles of at most 16 rows of 64 bytes belong to a thread from `configure` to `release`. A process needs the
operating system's permission first (`kbitc.targets.machine.may_use_tiles`). LLVM names tiles by number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.targets.kernels import vector as v

Expr = Any
Buffer = Any
TILES = 8
ROWS = 16
ROW_BYTES = 64
CONFIG_WORDS = 8  # of 64 bits
PALETTE = 1
ROWS_WORD, FIRST_BYTES_WORD = 6, 2
READ_WRITE = 3


def number(tile: int) -> Expr:
    """A tile as an operand."""
    return tirx.const(tile, "int8")


def address(buffer: Buffer, offset: Expr) -> Expr:
    """Where an element lies in a buffer of one axis. TVM takes it that all of the buffer is read and written."""
    return buffer.access_ptr(READ_WRITE, offset=v.i64(offset))


def call(name: str, *operands: Expr) -> None:
    """Emit an instruction without a result."""
    builder.evaluate(tirx.call_llvm_intrin("void", f"llvm.x86.{name}", *operands))


def configure(rows: Sequence[Any], row_bytes: Sequence[int]) -> None:
    """Give the thread tiles of so many rows (numbers or expressions) of so many bytes (ldtilecfg); all are zero."""
    words = [0] * CONFIG_WORDS
    words[0] = PALETTE
    for tile, count in enumerate(row_bytes):
        words[FIRST_BYTES_WORD + tile // 4] |= count << (16 * (tile % 4))
    known = sum(count << (8 * tile) for tile, count in enumerate(rows) if isinstance(count, int))
    shape: Expr = v.i64(known)
    for tile, count in enumerate(rows):
        if not isinstance(count, int):
            shape = shape + v.i64(count) * v.i64(1 << (8 * tile))
    config = builder.alloc_buffer((CONFIG_WORDS,), "int64", scope="global")
    for place, word in enumerate(words):
        v.store(config, [place], shape if place == ROWS_WORD else v.i64(word), 1)
    # Not by `address`, which TVM refuses where the buffer shares its place with another of other elements.
    call("ldtilecfg", tirx.address_of(config[v.i64(0)]))


def release() -> None:
    """Give the tiles back (tilerelease)."""
    call("tilerelease")


def zero(tile: int) -> None:
    """All bytes of a tile 0."""
    call("tilezero", number(tile))


def load(tile: int, place: Expr, stride: int | Expr) -> None:
    """Rows from memory, `stride` bytes from one to the next (tileloadd)."""
    call("tileloadd64", number(tile), place, v.i64(stride))


def store(tile: int, place: Expr, stride: int | Expr) -> None:
    """Rows to memory, `stride` bytes from one to the next (tilestored)."""
    call("tilestored64", number(tile), place, v.i64(stride))


def meaning(memory: npt.NDArray[np.uint8], offset: int, stride: int, rows: int, count: int) -> npt.NDArray[np.uint8]:
    """What `load` takes from memory: uint8 [rows, count]."""
    return np.stack([memory[offset + row * stride : offset + row * stride + count] for row in range(rows)])
