"""out[i] = table[code[i]] for bytes: a table of 256 bytes in registers, whole vectors of codes at a time.

The look-ups are those of the instruction sets (`isa.py`), with a table that is read when the kernel runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.isa import Isa, isa_of
from kbitc.targets.target import Target

Expr = Any
Buffer = Any
Dim = Any
ENTRIES = 256
PART = 16
WIDE_PART = 64  # of vpermi2b
# Bytes of one parallel task.
TASK = 1 << 14


def make_byte_table(shape: Sequence[Dim], target: Target, name: str) -> Any:
    """The PrimFunc: codes u8 of the shape, table u8 [256], out u8 of the shape.

    Args:
        shape: of the codes.
        target: without a dot instruction it looks bytes up one by one.
        name: of the kernel.
    """
    return v.kernel(name, lambda: _emit(shape, target))


def _emit(shape: Sequence[Dim], machine: Target) -> None:
    isa = isa_of(machine) if machine.dot else None
    part = WIDE_PART if machine.has("avx512vbmi") else PART
    dims = v.DimVars()
    own = [dims(dim) for dim in shape]
    codes, table = v.argument("codes", own, "uint8"), v.argument("table", (ENTRIES,), "uint8")
    out = v.argument("out", own, "uint8")
    count = v.product(own)
    with v.root():
        source, target = v.view(codes, (count,), "uint8"), v.view(out, (count,), "uint8")
        size = 1 if isa is None else isa.bytes
        tasks = _divided(count, TASK)

        def run(first: Expr, length: Dim) -> None:
            """Whole vectors, then one byte after the other."""
            vectors = 0 if isa is None else _divided(length, size)
            parts = [] if isa is None else _parts(table, isa, part)

            def one(i: Expr) -> None:
                at = v.bind(first + i * size)
                found = None if isa is None else isa.look_up(parts, v.bind(v.load(source, [at], size)))
                v.store(target, [at], found, size)

            def byte(i: Expr) -> None:
                at = v.bind(first + vectors * size + i)
                v.store(target, [at], table[tirx.Cast("int64", source[at])], 1)

            v.loop(vectors, one)
            v.loop(length - vectors * size, byte)

        with builder.parallel(v.i64(0), v.i64(tasks)) as task:
            run(v.bind(task * TASK), TASK)
        run(v.i64(tasks * TASK), count - tasks * TASK)


def _divided(count: Dim, by: int) -> Dim:
    return count // by if isinstance(count, int) else v.bind(tirx.truncdiv(count, v.i64(by)))


def _parts(table: Buffer, isa: Isa, part: int) -> list[Expr]:
    """The table as `Isa.table` lays it out: parts of 16 bytes, each repeated over a register, or of 64."""
    loads = [v.bind(v.load(table, [first], part)) for first in range(0, ENTRIES, part)]
    if isa.bytes == part:
        return loads
    picks = [tirx.const(i, "int32") for i in range(isa.bytes)]
    return [v.bind(tirx.Shuffle([load] * (isa.bytes // part), picks)) for load in loads]
