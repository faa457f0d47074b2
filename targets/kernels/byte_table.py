"""out[i] = table[code[i]] for bytes: a table of 256 bytes in registers, whole vectors of codes at a time.

x86 looks the low four bits up in each sixteenth of the table by vpshufb and chooses by the high ones; NEON has tbl.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.isa import for_dot, select_tree
from kbitc.targets.x86.intrin import vpshufb

Expr = Any
Buffer = Any
Dim = Any
ENTRIES = 256
PART = 16
# Bytes of one parallel task.
TASK = 1 << 14


def make_byte_table(shape: Sequence[Dim], dot: str, name: str) -> Any:
    """The PrimFunc: codes u8 of the shape, table u8 [256], out u8 of the shape.

    Args:
        shape: of the codes.
        dot: the dot instruction of the target, which says what registers it has.
        name: of the kernel.
    """
    return v.kernel(name, lambda: _emit(shape, dot))


def _emit(shape: Sequence[Dim], dot: str) -> None:
    dims = v.DimVars()
    own = [dims(dim) for dim in shape]
    codes, table = v.argument("codes", own, "uint8"), v.argument("table", (ENTRIES,), "uint8")
    out = v.argument("out", own, "uint8")
    count = v.product(own)
    with v.root():
        source, target = v.view(codes, (count,), "uint8"), v.view(out, (count,), "uint8")
        size = for_dot(dot).bytes if dot else 1
        tasks = _divided(count, TASK)

        def run(first: Expr, length: Dim) -> None:
            """Whole vectors, then one byte after the other."""
            parts = _parts(table, dot, size)
            vectors = _divided(length, size)

            def one(i: Expr) -> None:
                at = v.bind(first + i * size)
                v.store(target, [at], _look_up(parts, v.bind(v.load(source, [at], size)), dot, size), size)

            def byte(i: Expr) -> None:
                at = v.bind(first + vectors * size + i)
                v.store(target, [at], table[tirx.Cast("int64", source[at])], 1)

            if dot:
                v.loop(vectors, one)
                v.loop(length - vectors * size, byte)
            else:
                v.loop(length, lambda i: v.store(target, [first + i], table[tirx.Cast("int64", source[first + i])], 1))

        with builder.parallel(v.i64(0), v.i64(tasks)) as task:
            run(v.bind(task * TASK), TASK)
        run(v.i64(tasks * TASK), count - tasks * TASK)


def _divided(count: Dim, by: int) -> Dim:
    return count // by if isinstance(count, int) else v.bind(tirx.truncdiv(count, v.i64(by)))


def _parts(table: Buffer, dot: str, size: int) -> list[Expr]:
    """The sixteenths of the table, each repeated over a register."""
    if not dot:
        return []
    picks = [tirx.const(i, "int32") for i in range(size)]
    loads = [v.bind(v.load(table, [first], PART)) for first in range(0, ENTRIES, PART)]
    return loads if size == PART else [v.bind(tirx.Shuffle([load] * (size // PART), picks)) for load in loads]


def _look_up(parts: list[Expr], codes: Expr, dot: str, size: int) -> Expr:
    if dot == "sdot":
        return for_dot(dot).look_up(parts, codes)
    low = v.bind(codes & v.full(PART - 1, "uint8", size))
    return select_tree([v.bind(vpshufb.emit(part, low, size)) for part in parts], codes, 4, size)
