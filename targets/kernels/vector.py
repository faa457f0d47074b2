"""Small helpers to write vector TIR with the IR builder: typed constants, loads, stores, bindings, loops.

Every index is int64, as in Relax, so that a kernel's buffers agree with the shapes of its callers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.script import ir_builder
from tvm.script.ir_builder import tirx as builder

Expr = Any
Buffer = Any
Index = Any


def i64(value: Index) -> Expr:
    """An int64 index; expressions pass through."""
    return tirx.const(value, "int64") if isinstance(value, int | np.integer) else value


def vector_type(dtype: str, lanes: int) -> str:
    """Name of a vector type, such as "int32x16"; one lane is the scalar type."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def full(value: float, dtype: str, lanes: int) -> Expr:
    """A vector whose lanes are all `value`."""
    return splat(tirx.const(value, dtype), lanes)


def splat(scalar: Expr, lanes: int) -> Expr:
    """A vector whose lanes are all the scalar."""
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def ramp(start: Index, lanes: int) -> Expr:
    """Consecutive indices start .. start + lanes - 1."""
    return i64(start) if lanes == 1 else tirx.Ramp(i64(start), i64(1), lanes)


def load(buffer: Buffer, indices: Sequence[Index], lanes: int) -> Expr:
    """`lanes` consecutive elements; the last index is that of the first element."""
    *outer, last = indices
    return buffer[(*[i64(i) for i in outer], ramp(last, lanes))]


def store(buffer: Buffer, indices: Sequence[Index], value: Expr, lanes: int) -> None:
    """Write `lanes` consecutive elements; the last index is that of the first element."""
    *outer, last = indices
    builder.buffer_store(buffer, value, [*[i64(i) for i in outer], ramp(last, lanes)])


def store_first(buffer: Buffer, indices: Sequence[Index], value: Expr, lanes: int, count: int) -> None:
    """Write only the first `count` of the lanes: nothing beyond them is touched."""
    if count == lanes:
        store(buffer, indices, value, lanes)
        return
    *outer, last = indices
    lane = tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), lanes)
    mask = lane < full(count, "int32", lanes)
    builder.evaluate(builder.masked_store(buffer, value, *[i64(i) for i in outer], ramp(last, lanes), mask))


def load_first(buffer: Buffer, indices: Sequence[Index], dtype: str, lanes: int, count: int) -> Expr:
    """Read the first `count` lanes, zero in the others; nothing beyond them is touched."""
    if count == lanes:
        return load(buffer, indices, lanes)
    *outer, last = indices
    lane = tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), lanes)
    mask = lane < full(count, "int32", lanes)
    loaded = builder.masked_load(vector_type(dtype, lanes), buffer, *[i64(i) for i in outer], ramp(last, lanes), mask)
    return tirx.Select(mask, loaded, full(0, dtype, lanes))


def bind(value: Expr) -> Expr:
    """Name a value so that it is computed once."""
    return builder.Bind(value)


def cast(value: Expr, dtype: str, lanes: int) -> Expr:
    """Convert every lane."""
    return tirx.Cast(vector_type(dtype, lanes), value)


def reinterpret(value: Expr, dtype: str, lanes: int) -> Expr:
    """The same bits as another vector type."""
    return tirx.op.reinterpret(vector_type(dtype, lanes), value)


def register(lanes: int, dtype: str) -> Buffer:
    """A buffer of one vector; LLVM keeps it in a register when it is only used whole.

    On the CPU TVM puts small buffers of scope "global" on the stack, those of scope "local" into its workspace.
    """
    return builder.alloc_buffer((lanes,), dtype, scope="global")


def get(buffer: Buffer, lanes: int) -> Expr:
    """The value of a `register`."""
    return load(buffer, [0], lanes)


def put(buffer: Buffer, value: Expr, lanes: int) -> None:
    """Assign a `register`."""
    store(buffer, [0], value, lanes)


def held_index(value: Expr) -> Expr:
    """An index that is computed once and kept in memory that LLVM turns into a register.

    Unlike `bind`, it is opaque to TVM's simplifier, whose work grows exponentially with chains of divisions.
    """
    place = register(1, "int64")
    store(place, [0], value, 1)
    return load(place, [0], 1)


def bytes_vector(values: npt.NDArray[np.uint8]) -> Expr:
    """A constant uint8 vector; a multiple of 16 bytes. Built of 64-bit words, which LLVM folds at once."""
    words = values.view(np.int64)
    made = tirx.Shuffle([i64(w) for w in words], [tirx.const(i, "int32") for i in range(words.size)])
    return reinterpret(made, "uint8", values.size)


def loop(extent: Index, body: Callable[[Expr], None]) -> None:
    """A serial loop of an int64 variable; an extent of 1 is no loop."""
    if isinstance(extent, int) and extent <= 0:
        return
    if isinstance(extent, int) and extent == 1:
        body(i64(0))
        return
    with builder.serial(i64(0), i64(extent)) as variable:
        body(variable)


def when(condition: Expr, body: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
    """Run the body if the condition holds; conditions known now leave no branch."""
    if isinstance(condition, bool):
        chosen = body if condition else otherwise
        if chosen is not None:
            chosen()
        return
    with builder.If(condition):
        with builder.Then():
            body()
        if otherwise is not None:
            with builder.Else():
                otherwise()


class DimVars:
    """Gives every symbolic dimension of a kernel's arguments a variable of the kernel.

    Relax hands over dimensions as ints or expressions of the graph's variables. A kernel needs variables of its own,
    the same one for the same expression; ints stay ints.
    """

    def __init__(self) -> None:
        self._known: dict[str, Expr] = {}

    def __call__(self, dim: Index) -> Index:
        """The dimension as the kernel sees it."""
        if isinstance(dim, int | np.integer):
            return int(dim)
        if isinstance(dim, tirx.IntImm):
            return int(dim.value)
        key = str(dim)
        if key not in self._known:
            self._known[key] = tirx.Var(f"d{len(self._known)}", "int64")
        return self._known[key]


def product(dims: Sequence[Index]) -> Index:
    """Product of dimensions: an int when all are ints."""
    total: Index = 1
    for dim in dims:
        total = dim if isinstance(total, int) and total == 1 else total * dim
    return total


def argument(name: str, shape: Sequence[Index], dtype: str) -> Buffer:
    """Declare the next argument of the kernel."""
    return builder.arg(name, builder.buffer([i64(d) for d in shape], dtype, buffer_name=name))


@contextmanager
def root() -> Iterator[None]:
    """The block that Relax wants around a kernel's statements; entered after the last `argument`."""
    with builder.sblock("root"):
        # Named, because TVM would take minutes to work out the regions that a large unrolled kernel touches.
        builder.reads()
        builder.writes()
        yield


def view(buffer: Buffer, shape: Sequence[Index], dtype: str) -> Buffer:
    """The same memory in another shape; only after the last `argument`."""
    return builder.decl_buffer([i64(d) for d in shape], dtype, data=buffer.data)


def kernel(name: str, body: Callable[[], None]) -> Any:
    """Build a PrimFunc whose arguments and statements `body` emits; it is scheduled as it stands."""
    with ir_builder.IRBuilder() as outer:
        with builder.prim_func(s_tir=True):
            builder.func_name(name)
            builder.func_attr({"tirx.noalias": True, "kbitc.scheduled": 1})
            body()
    return outer.get()
