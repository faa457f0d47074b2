"""Scan: a loop over the first axis of its inputs, as two relax functions.

`step` computes the body once. `steps` calls `step` for one element, else itself for the first half of its range and
then for the second: TVM's virtual machine calls functions on the machine's stack, so that its depth is the logarithm
of the number of elements. What the body reads from outside (weights too) are further parameters of both, and so are
the symbolic dimensions of the model: they cannot be told from shapes such as [(width - 1) // 8 + 1, 512].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from tvm import relax, tirx

from kbitc.graph import ops
from kbitc.targets.lower import attributes, dims
from kbitc.targets.lower.context import Context, node_name
from kbitc.targets.lower.contraction import Dim, RelaxExpr
from kbitc.targets.lower.group import Group, compute
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Constant, Expr, Index, Lazy, Tensor, Value


@dataclass(frozen=True)
class _Loop:
    """What a Scan works on.

    Attributes:
        body: the graph of one step.
        length: number of steps.
        states: carried from step to step; shapes stay.
        series: read along axis 0, one element a step.
        backward: for each of `series`, then for each output series: it runs from the last element to the first.
    """

    node: ir.Node
    body: ir.Graph
    length: Dim
    states: list[Tensor]
    series: list[Tensor]
    backward: list[bool]


def scan(ctx: Context, node: ir.Node) -> list[Value]:
    """Scan of opset 9 and later, along axis 0."""
    loop = _loop(ctx, node)
    for source in _captured(loop.body):
        # Kernel rules read codes behind a weight that waits; other operators make it, which must not happen inside.
        ctx.settle(source, deferred=any(use.node.op_type not in ops.WEIGHT_USES for use in source.uses()))
    if ctx.dry:
        return _dry(ctx, loop)
    name = f"{node_name(node)}_step"
    step, outside, types = _step_function(ctx, loop, name)
    count = len(loop.states)
    steps = _steps_function(ctx, loop, step, outside, types, f"{name}s")
    whole = relax.ShapeExpr([dims.expression(0), dims.expression(loop.length), *ctx.symbols()])
    arguments = [whole, *(state.var for state in loop.states), *outside]
    found = _items(ctx, ctx.emit(relax.Call(steps, arguments)), len(types))
    results: list[Value] = [
        Tensor(var, state.shape, state.dtype) for var, state in zip(found, loop.states, strict=False)
    ]
    for place, var in enumerate(found[count:], count):
        shape = (loop.length, *(dims.as_dim(dim) for dim in types[place].shape.values[1:]))
        value: Value = Tensor(var, shape, str(types[place].dtype))
        turned = loop.backward[len(loop.series) + place - count]
        results.append(_reversed(ctx, value, loop.length) if turned else value)
    return results


def _loop(ctx: Context, node: ir.Node) -> _Loop:
    series_count = node.attributes.get_int("num_scan_inputs", 0)
    if any(any(node.attributes.get_ints(f"scan_{side}_axes", ())) for side in ("input", "output")):
        raise refuse(node, "Scan along another axis than 0", remedy="transpose its inputs and outputs in the model")
    values = [ctx.tensor(attributes.value(ctx, node, index)) for index in range(len(node.inputs))]
    states, series = values[: len(values) - series_count], values[len(values) - series_count :]
    if not series or any(not item.shape for item in series):
        raise refuse(node, "Scan without an input to run over")
    output_count = len(node.outputs) - len(states)
    sides = (("input", series_count), ("output", output_count))
    backward = [
        bool(flag) for side, n in sides for flag in node.attributes.get_ints(f"scan_{side}_directions", (0,) * n)
    ]
    return _Loop(node, node.attributes["body"].as_graph(), series[0].shape[0], states, series, backward)


def _captured(body: ir.Graph) -> list[ir.Value]:
    """Values that the body reads and does not make."""
    own = {*body.inputs, *body.initializers.values(), *(value for child in body.all_nodes() for value in child.outputs)}
    read = [value for child in body.all_nodes() for value in child.inputs] + list(body.outputs)
    return list(dict.fromkeys(value for value in read if value is not None and value not in own))


def _emit_body(inner: Context, loop: _Loop, states: Sequence[Tensor], at: Expr) -> list[Value]:
    """The body's results for the element `at`: new states, and what goes into each output, with a first axis of 1."""
    from kbitc.targets.lower.emitter import emit_graph  # it knows all emitters, this one too

    for value, state in zip(loop.body.inputs, states, strict=False):
        inner.bind(value, state)
    for place, value in enumerate(loop.body.inputs[len(states) :]):
        inner.bind(value, _element(loop, place, at))
    emit_graph(inner, loop.body)
    found = [inner.get(value) for value in loop.body.outputs]
    kept = [inner.cast_shape(_computed(inner, new), old.shape) for new, old in zip(found, states, strict=False)]
    return kept + [inner.reshape(_computed(inner, new), (1, *new.shape)) for new in found[len(states) :]]


def _computed(inner: Context, value: Value) -> Value:
    """A constant as something that a function can return."""
    if not isinstance(value, Constant):
        return value
    lazy = inner.lazy(value)
    return Lazy(lazy.element, lazy.shape, lazy.dtype)


def _element(loop: _Loop, place: int, at: Expr) -> Lazy:
    """Element `at` of a series, counted from its end when it runs backward."""
    item = loop.series[place]
    where = item.shape[0] - 1 - at if loop.backward[place] else at

    def element(group: Group, indices: Sequence[Index]) -> Expr:
        return group.read(item.var, [where, *indices])

    return Lazy(element, item.shape[1:], item.dtype)


def _dry(ctx: Context, loop: _Loop) -> list[Value]:
    found = _emit_body(ctx.inner(), loop, loop.states, tirx.IntImm("int64", 0))
    shapes = [value.shape for value in found]
    shapes[len(loop.states) :] = [(loop.length, *shape[1:]) for shape in shapes[len(loop.states) :]]
    return [ctx.placeholder(shape, value.dtype) for shape, value in zip(shapes, found, strict=True)]


def _step_function(ctx: Context, loop: _Loop, name: str) -> tuple[Any, list[RelaxExpr], list[Any]]:
    """The function of one step, the outer variables it takes behind the states, and the types of its results."""
    inner = ctx.inner()
    at = inner.fresh_symbol("at")
    states = [Tensor(relax.Var("state", old.var.ty), old.shape, old.dtype) for old in loop.states]
    parameters = [relax.Var("at", relax.ShapeType([at, *ctx.symbols()])), *(state.var for state in states)]

    def body() -> Any:
        variables = [inner.var(value) for value in _emit_body(inner, loop, states, at)]
        types.extend(variable.ty for variable in variables)
        return relax.Tuple(variables)

    types: list[Any] = []
    sequence = ctx.sequence(parameters, body)
    outside = list(relax.analysis.free_vars(relax.Function(parameters, sequence, relax.TupleType(types))))
    return ctx.function(name, [*parameters, *outside], sequence, relax.TupleType(types)), outside, types


def _steps_function(ctx: Context, loop: _Loop, step: Any, outside: list[RelaxExpr], types: list[Any], name: str) -> Any:
    """The function of a range of steps: begin and length, the states, and what else a step reads."""
    inner = ctx.inner()
    begin, length = inner.fresh_symbol("begin"), inner.fresh_symbol("length")
    symbols = ctx.symbols()
    states = [relax.Var("state", old.var.ty) for old in loop.states]
    further = [relax.Var("outer", var.ty) for var in outside]
    parameters = [relax.Var("range", relax.ShapeType([begin, length, *symbols])), *states, *further]
    count = len(states)
    outputs = [relax.TensorType((length, *kind.shape.values[1:]), kind.dtype) for kind in types[count:]]
    result = relax.TupleType([*types[:count], *outputs])
    this = ctx.declare(name, parameters, result)

    def one() -> Any:
        call = ctx.emit(relax.Call(step, [relax.ShapeExpr([begin, *symbols]), *states, *further]))
        found = _items(ctx, call, len(types))
        seen = [ctx.builder.match_cast(var, kind) for var, kind in zip(found[count:], outputs, strict=True)]
        return ctx.emit(relax.Tuple([*found[:count], *seen]))

    def many() -> Any:
        half = tirx.floordiv(length, tirx.IntImm("int64", 2))
        ranges = ((begin, half, *symbols), (begin + half, length - half, *symbols))
        first = _items(ctx, ctx.emit(relax.Call(this, [relax.ShapeExpr(ranges[0]), *states, *further])), len(types))
        rest = relax.Call(this, [relax.ShapeExpr(ranges[1]), *first[:count], *further])
        second = _items(ctx, ctx.emit(rest), len(types))
        triples = zip(first[count:], second[count:], outputs, strict=True)
        joined = [ctx.builder.match_cast(_joined(inner, a, b, half, length), kind) for a, b, kind in triples]
        return ctx.emit(relax.Tuple([*second[:count], *joined]))

    def body() -> Any:
        last = inner.kernel("is_one", [((), "bool")], lambda group: [compute((), lambda _: length <= 1, "is_one")])[0]
        return ctx.emit(relax.If(last.var, ctx.sequence([], one), ctx.sequence([], many)))

    return ctx.define(this, parameters, ctx.sequence(parameters, body), result)


def _joined(inner: Context, first: RelaxExpr, second: RelaxExpr, half: Expr, length: Expr) -> RelaxExpr:
    """[half, ...] and [length - half, ...] one behind the other."""
    shape = (length, *(dims.as_dim(dim) for dim in first.ty.shape.values[1:]))

    def element(group: Group, indices: Sequence[Index]) -> Expr:
        at, *others = indices
        return tirx.if_then_else(at < half, group.read(first, indices), group.read(second, [at - half, *others]))

    return inner.var(Lazy(element, shape, str(first.ty.dtype), pointwise=False), "join")


def _reversed(ctx: Context, value: Value, length: Dim) -> Lazy:
    lazy = ctx.lazy(value)
    return Lazy(
        lambda group, indices: lazy.element(group, [length - 1 - indices[0], *indices[1:]]),
        value.shape, value.dtype, lazy.cost, pointwise=False,
    )  # fmt: skip


def _items(ctx: Context, value: RelaxExpr, count: int) -> list[RelaxExpr]:
    return [ctx.emit(relax.TupleGetItem(value, index)) for index in range(count)]


TABLE: dict[str, Callable[[Context, ir.Node], Any]] = {"Scan": scan}
