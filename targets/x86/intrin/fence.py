"""llvm.arithmetic.fence: the same bits, behind which LLVM may not put additions into another order. No instruction.

LLVM turns a chain of integer additions into a tree and computes row after row of a register tile. Both are right and
slow: all unpacked levels then live at once, on the stack.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as builder

from kbitc.targets.kernels import vector as v

Expr = Any


def emit(value: Expr, dtype: str, lanes: int) -> Expr:
    """The vector itself: integers of 8, 16 or 32 bits, a multiple of 32 in all."""
    bits = int(dtype.removeprefix("u").removeprefix("int"))
    floats = lanes * bits // 32
    held = v.reinterpret(value, "float32", floats)
    fenced = tirx.op.call_llvm_pure_intrin(v.vector_type("float32", floats), "llvm.arithmetic.fence", held)
    return v.reinterpret(fenced, dtype, lanes)


def keep_order(doubt: Expr) -> None:
    """What comes before is computed before what comes after: LLVM schedules code between two branches at a time.

    Args:
        doubt: a condition that is never true, of which LLVM must not know; then the processor only pauses.
    """
    with builder.If(doubt), builder.Then():
        builder.evaluate(tirx.op.call_llvm_intrin("void", "llvm.x86.sse2.pause"))
