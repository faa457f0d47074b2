"""Fetches the weights of the next group of channels into the second-level cache while this group is multiplied.

The first row tile of a group finds its weights in memory, the others in the caches; without help it waits for them as
long as several row tiles compute. Every row tile asks for its share of what comes next, so that memory and arithmetic
overlap. Addresses behind the last weight may be asked for: a prefetch never faults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.targets.kernels import vector as v

Expr = Any
Buffer = Any
LINE = 64
# Weights of fewer bytes stay in the second-level cache (256 KiB to 2 MiB) between the row tiles.
FAR_BYTES = 256 * 1024
READ, SECOND_LEVEL, DATA = 0, 2, 1


@dataclass(frozen=True)
class Ahead:
    """What the kernel reads tile by tile of 16 channels.

    Attributes:
        buffers: arguments in one axis, with the elements that a tile takes.
        tiles: how many tiles there are.
    """

    buffers: Sequence[tuple[Buffer, int]]
    tiles: int

    @property
    def far(self) -> bool:
        """Whether the weights do not stay in the cache by themselves."""
        return self.tiles * sum(size * _bytes(buffer) for buffer, size in self.buffers) >= FAR_BYTES

    def fetch(self, index: Expr, count: Any, group: Expr, tiles: int) -> None:
        """The share of row tile `index` of `count` in what the group of `tiles` tiles after `group` reads."""
        for buffer, size in self.buffers:
            step = LINE // _bytes(buffer)
            lines = -(-tiles * size // step)
            share = -(-lines // count) if isinstance(count, int) else tirx.truncdiv(count + (lines - 1), count)
            start = v.bind((group + 1) * (tiles * size) + index * share * step)
            v.loop(share, partial(_fetch, buffer, start, step))


def _fetch(buffer: Buffer, start: Expr, step: int, line: Expr) -> None:
    numbers = [tirx.const(number, "int32") for number in (READ, SECOND_LEVEL, DATA)]
    place = tirx.address_of(buffer[start + line * step])
    builder.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", place, *numbers))


def _bytes(buffer: Buffer) -> int:
    return np.dtype(str(buffer.dtype)).itemsize


def ahead_of(arguments: Sequence[Buffer]) -> Ahead:
    """Of arguments whose first axis is the 16-channel tile; inside the kernel's root."""
    tiles = int(arguments[0].shape[0])
    sizes = [prod(int(dim) for dim in buffer.shape[1:]) for buffer in arguments]
    views = [v.view(buffer, (tiles * size,), str(buffer.dtype)) for buffer, size in zip(arguments, sizes, strict=True)]
    return Ahead(tuple(zip(views, sizes, strict=True)), tiles)
