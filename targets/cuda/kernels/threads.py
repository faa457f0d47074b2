"""Threads, warps and barriers for kernels written with the IR builder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.targets.kernels import vector as v

Expr = Any
Buffer = Any
WARP = 32
SHARED_BYTES = 48 * 1024  # static shared memory of a block that every GPU grants
GRID_Y_LIMIT = 65535
_ALL_LANES = 0xFFFFFFFF


@contextmanager
def launch(grid: tuple[Any, ...], block: int) -> Iterator[tuple[tuple[Expr, ...], Expr]]:
    """Bind a grid of up to three dimensions (x first) and a row of threads.

    Yields the block indices and the thread index, all int32 expressions. The first dimension may be up to 2^31 - 1,
    the others up to 65535.
    """
    with ExitStack() as stack:
        blocks = [
            stack.enter_context(builder.thread_binding(v.i64(0), v.i64(extent), thread=f"blockIdx.{axis}"))
            for axis, extent in zip("xyz", grid, strict=False)
        ]
        thread = stack.enter_context(builder.thread_binding(v.i64(0), v.i64(block), thread="threadIdx.x"))
        yield tuple(blocks), thread


def shuffle_xor(value: Expr, mask: int, dtype: str) -> Expr:
    """The value of the lane whose number differs in the bits of `mask`; every lane of the warp must take part.

    It is a call with effects, and bound at once: TVM moves pure expressions into branches that not all lanes take.
    """
    lanes = tirx.const(_ALL_LANES, "uint32")
    return v.bind(tirx.call_extern(dtype, "__shfl_xor_sync", lanes, value, tirx.const(mask, "int32")))


def sum_lanes(value: Expr, first: int, count: int, dtype: str) -> Expr:
    """Sum over the `count` lanes that differ in the bits first, 2 first, ...: a fixed tree; all get it."""
    mask = first
    while mask < first * count:
        value = v.bind(value + shuffle_xor(value, mask, dtype))
        mask *= 2
    return value


def max_lanes(value: Expr, count: int, dtype: str) -> Expr:
    """Largest value over `count` neighbouring lanes; all get it."""
    mask = 1
    while mask < count:
        value = v.bind(tirx.max(value, shuffle_xor(value, mask, dtype)))
        mask *= 2
    return value


def barrier() -> None:
    """Wait for the whole thread block; shared memory written before is seen after."""
    builder.evaluate(tirx.op.tvm_storage_sync("shared"))


def shared(shape: tuple[int, ...], dtype: str) -> Buffer:
    """Memory of the thread block; allocate it inside `launch`."""
    return builder.alloc_buffer(shape, dtype, scope="shared")


def local(count: int, dtype: str) -> Buffer:
    """Registers of a thread, addressed by constants; allocate them inside `launch`."""
    return builder.alloc_buffer((count,), dtype, scope="local")


def view(buffer: Buffer, shape: tuple[Any, ...], dtype: str) -> Buffer:
    """The same memory under another shape and element type."""
    return builder.decl_buffer([v.i64(d) for d in shape], dtype, data=buffer.data)


def read_if(condition: Expr, value: Expr, otherwise: Expr) -> Expr:
    """`value` where the condition holds; memory in it is not touched elsewhere."""
    return tirx.if_then_else(condition, value, otherwise)


def divide_round_up(value: Any, step: int) -> Any:
    """ceil(value / step) for ints and int64 expressions."""
    return -(-value // step) if isinstance(value, int) else (value + (step - 1)) // step


def at_most(value: Expr, limit: Any) -> Expr:
    """min(value, limit) as int64."""
    return tirx.min(value, v.i64(limit))
