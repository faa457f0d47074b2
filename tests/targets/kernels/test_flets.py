"""Names in expressions: hoisted, never out of a guard, and through memory where their trees are large."""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.script import ir_builder
from tvm.script.ir_builder import tirx as T

from kbitc.targets.kernels import mathfn
from kbitc.targets.kernels.lets import flatten_lets, lower_lets

ONE = tirx.const(1.0, "float32")


def named(value: Any) -> Any:
    """value + value with a name."""
    name = tirx.Var("t", value.ty.dtype)
    return tirx.Let(name, value, name + name)


def nested(value: Any) -> int:
    """Names bound anywhere but at the top."""
    while isinstance(value, tirx.Let):
        assert not _lets(value.value)
        value = value.body
    return _lets(value)


def _lets(value: Any) -> int:
    found: list[Any] = []
    tvm_ffi.structural_walk(value, ((tirx.Let, found.append),))
    return len(found)


def test_names_come_out_of_arithmetic() -> None:
    x = tirx.Var("x", "float32")
    value = tirx.Select(named(x) > ONE, tirx.max(named(named(x)), ONE), tirx.Cast("float32", named(x)))
    assert nested(value)
    flat = flatten_lets(value)
    assert nested(flat) == 0 and _lets(flat) == _lets(value)


def test_names_stay_inside_a_guard() -> None:
    buffer = tirx.decl_buffer((8,), "float32")
    i = tirx.Var("i", "int64")
    guarded = tirx.if_then_else(i < tirx.const(8, "int64"), named(buffer[i]), ONE)
    assert not isinstance(flatten_lets(guarded), tirx.Let)
    chosen = tirx.Select(i < tirx.const(8, "int64"), named(buffer[i]), ONE)
    assert not isinstance(flatten_lets(chosen), tirx.Let)


def build(function: Any, lanes: int) -> Any:
    with ir_builder.IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("main")
            source, out = (T.arg(name, T.buffer((160,), "float32")) for name in "xy")
            with T.serial(0, 160 // lanes) as row, T.vectorized(0, lanes) as lane:
                T.buffer_store(out, function(source[row * lanes + lane]), [row * lanes + lane])
    return builder.get()


def test_large_trees_go_through_buffers_in_front_of_the_vector_loop() -> None:
    function = lower_lets(build(lambda x: mathfn.exp(mathfn.exp(x)), 16))
    allocations: list[Any] = []
    tvm_ffi.structural_walk(function.body, ((tirx.AllocBuffer, allocations.append),))
    assert allocations and all([int(dim) for dim in a.buffer.ty.shape] == [16] for a in allocations)
    loops: list[Any] = []
    tvm_ffi.structural_walk(function.body, ((tirx.For, loops.append),))
    inner = next(loop for loop in loops if loop.kind == tirx.ForKind.VECTORIZED)
    inside: list[Any] = []
    tvm_ffi.structural_walk(inner.body, ((tirx.AllocBuffer, inside.append),))
    assert not inside


def test_small_expressions_are_left_alone() -> None:
    function = lower_lets(build(lambda x: named(x) + ONE, 16))
    allocations: list[Any] = []
    tvm_ffi.structural_walk(function.body, ((tirx.AllocBuffer, allocations.append),))
    assert not allocations
