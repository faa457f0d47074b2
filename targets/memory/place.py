"""What a planned function computes where it starts, of symbolic sizes: how large its arena is and where values lie.

Symbolic sizes of storages are rounded up to a power of two: TVM keeps freed memory for requests of the same size, and
then there are few sizes. Pages that nobody touches take no memory on a CPU. From LARGEST_STEP on, sizes are rounded up
to its multiples.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kbitc.targets.memory.arena import ARENA, Layout, Room, Value
from kbitc.targets.memory.sizes import Sizes

LARGEST_STEP = 2**30
# TVMStructFieldKind of TVM: where a DLTensor's values lie.
DATA_FIELD = 1


@dataclass(frozen=True)
class _Placed:
    """What is computed: ints, and int64 variables of `steps`.

    Attributes:
        steps: statements.
        sizes: bytes by place.
        offsets: for each layout those of all values.
        extent: bytes of the arena in the layout that is taken.
        taken: which one.
    """

    steps: list[Any]
    sizes: list[Any]
    offsets: list[list[Any]]
    extent: Any
    taken: Any


def extent_function(layouts: Sequence[Layout], values: Sequence[Value], rooms: Sequence[Room], sizes: Sizes) -> Any:
    """Bytes of the arena's storage: an int, or the function (symbols...) -> int64."""
    from tvm import ir, tirx

    given = _given(sizes)
    placed = _placed(layouts, values, rooms, sizes.over(given))
    # TVM asks of a tensor that it fits in its storage, wherever it is moved.
    elsewhere = {values[i].size for layout in layouts for i, room in enumerate(layout.rooms) if room != ARENA}
    most = _largest([placed.extent, *(placed.sizes[size] for size in sorted(elsewhere))])
    extent = _bound(placed.steps, "most", most)
    if isinstance(extent, int):
        return rounded(extent).value
    function = tirx.PrimFunc(
        given, tirx.stmt_seq(*placed.steps, tirx.Return(rounded(extent))), ret_type=ir.PrimType("int64")
    )
    return function.with_attr({"tirx.is_host_func": True})


def place_function(layouts: Sequence[Layout], values: Sequence[Value], rooms: Sequence[Room], sizes: Sizes) -> Any:
    """The function (value_0, ..., room_0, ..., symbols...) that points each value to its place.

    All values point to the start of the arena before.
    """
    from tvm import tirx

    given = _given(sizes)
    placed = _placed(layouts, values, rooms, sizes.over(given))
    tensors = [tirx.Var(f"value_{index}", "handle") for index in range(len(values))]
    spaces = [tirx.Var(f"room_{index}", "handle") for index in range(len(rooms))]
    moves = [_moves(tensors, spaces, layout, offsets) for layout, offsets in zip(layouts, placed.offsets, strict=True)]
    body = moves[0]
    for index, other in enumerate(moves[1:], 1):
        body = tirx.IfThenElse(tirx.EQ(placed.taken, tirx.const(index, "int64")), other, body)
    function = tirx.PrimFunc([*tensors, *spaces, *given], tirx.stmt_seq(*placed.steps, body))
    return function.with_attr({"tirx.is_host_func": True})


def _moves(tensors: Sequence[Any], spaces: Sequence[Any], layout: Layout, offsets: Sequence[Any]) -> Any:
    from tvm import tirx

    steps = [tirx.Evaluate(0)]
    for tensor, room, offset in zip(tensors, layout.rooms, offsets, strict=True):
        if room == ARENA and isinstance(offset, int) and offset == 0:
            continue
        base = tirx.call_intrin(
            "handle", "tirx.tvm_struct_get", tensor if room == ARENA else spaces[room], 0, DATA_FIELD
        )
        moved = tirx.call_intrin("handle", "tirx.handle_add_byte_offset", base, _expression(offset))
        steps.append(tirx.Evaluate(tirx.call_intrin("int32", "tirx.tvm_struct_set", tensor, 0, DATA_FIELD, moved)))
    return tirx.stmt_seq(*steps)


def _given(sizes: Sizes) -> list[Any]:
    from tvm import tirx

    return [tirx.Var(symbol.name, "int64") for symbol in sizes.symbols]


def _placed(layouts: Sequence[Layout], values: Sequence[Value], rooms: Sequence[Room], found: Sequence[Any]) -> _Placed:
    from tvm import tirx

    steps: list[Any] = []
    bytes_of = [_bound(steps, f"size_{index}", size) for index, size in enumerate(found)]
    of_values = [bytes_of[value.size] for value in values]
    offsets: list[list[Any]] = []
    taken: Any = 0
    least: Any = 0
    for index, layout in enumerate(layouts):
        made: list[Any] = [0] * len(values)
        for i in layout.order:
            end = _largest(_sum(made[j], of_values[j]) for j in layout.below[i])
            made[i] = _bound(steps, f"offset_{index}_{i}", end)
        offsets.append(made)
        ends = {
            room: _largest(_sum(made[i], of_values[i]) for i in layout.tops(room)) for room in {ARENA, *layout.rooms}
        }
        extent = _bound(steps, f"extent_{index}", ends.pop(ARENA))
        if index == 0:
            least = extent
            continue
        better = _expression(extent) < _expression(least)
        for room, end in sorted(ends.items()):
            better = tirx.And(better, _expression(end) <= _expression(bytes_of[rooms[room].size]))
        better = _bound(steps, f"better_{index}", better)
        pairs = (("taken", index, taken), ("least", extent, least))
        taken, least = (
            _bound(steps, f"{name}_{index}", tirx.Select(better, _expression(new), _expression(old)))
            for name, new, old in pairs
        )
    return _Placed(steps, bytes_of, offsets, least, taken)


def _bound(steps: list[Any], name: str, value: Any) -> Any:
    """An int as it is; a variable of any other value.

    Behind llvm.expect, called as if it had effects, TVM does not see what a variable is. Else it puts expressions in
    the place of variables, which double from step to step: networks of many values took minutes.
    """
    from tvm import tirx

    if isinstance(value, int | tirx.IntImm | tirx.Var):
        return int(value.value) if isinstance(value, tirx.IntImm) else value
    var = tirx.Var(name, value.ty)
    if str(value.ty.dtype) == "int64":
        value = tirx.call_llvm_intrin("int64", "llvm.expect", value, tirx.const(0, "int64"))
    steps.append(tirx.Bind(var, value))
    return var


def _expression(number: Any) -> Any:
    from tvm import tirx

    return tirx.const(number, "int64") if isinstance(number, int) else number


def _sum(a: Any, b: Any) -> Any:
    return a + b if isinstance(a, int) or not isinstance(b, int) or b else a


def _largest(numbers: Iterable[Any]) -> Any:
    """The largest of ints and int64 expressions, each at least 0; 0 without any."""
    from tvm import tirx

    known, others = 0, []
    for number in numbers:
        if isinstance(number, int):
            known = max(known, number)
        else:
            others.append(number)
    if not others:
        return known
    largest = functools.reduce(tirx.max, others)
    return tirx.max(largest, tirx.const(known, "int64")) if known else largest


def rounded(size: Any) -> Any:
    """A number as it is; an expression rounded up to a power of two, or to a multiple of LARGEST_STEP."""
    from tvm import tirx

    if isinstance(size, int):
        return tirx.IntImm("int64", max(size, 1))
    bits = tirx.const(64, "int64") - tirx.Cast("int64", tirx.clz(tirx.max(size - 1, tirx.const(1, "int64"))))
    step = tirx.min(tirx.shift_left(tirx.const(1, "int64"), bits), tirx.const(LARGEST_STEP, "int64"))
    return tirx.floordiv(size + (step - 1), step) * step
