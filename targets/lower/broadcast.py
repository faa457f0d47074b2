"""Numpy broadcasting of lazy values, with symbolic dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
from tvm import tirx

from kbitc.targets.lower import dims
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.contraction import Dim
from kbitc.targets.lower.group import Group
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Constant, Expr, Index, Lazy, Value

# An operand that is repeated along a dimension is computed once, in memory, when one element costs more than this.
REPEATED_COST = 3


def is_one(dim: Dim) -> bool:
    """Whether a dimension is the number 1."""
    return dims.is_static(dim) and dim == 1


def result_shape(node: ir.Node, shapes: Sequence[Sequence[Dim]]) -> tuple[Dim, ...]:
    """The shape that all the shapes broadcast to.

    Two symbolic dimensions that cannot be proved equal are taken to be equal; `stretch` has the module check it.

    Raises:
        UnsupportedError: when two numbers differ and neither is 1.
    """
    rank = max(len(shape) for shape in shapes)
    result: list[Dim] = [1] * rank
    for shape in shapes:
        for axis, dim in enumerate(shape, start=rank - len(shape)):
            have = result[axis]
            if is_one(have):
                result[axis] = dim
            elif dims.is_static(dim) and dims.is_static(have) and dim not in (1, have):
                raise refuse(node, "shapes do not broadcast", got=" and ".join(map(dims.text, shapes)))
            elif dims.is_static(dim) and not is_one(dim):
                result[axis] = dim
    return tuple(result)


def stretch(ctx: Context, value: Value, shape: Sequence[Dim]) -> Lazy:
    """A value broadcast to a shape."""
    offset = len(shape) - len(value.shape)
    wanted = tuple(dim if is_one(dim) else shape[axis + offset] for axis, dim in enumerate(value.shape))
    if not isinstance(value, Constant):
        value = ctx.cast_shape(value, wanted)
    lazy = ctx.lazy(value)
    if lazy.cost > REPEATED_COST and _repeats(lazy.shape, shape):
        lazy = ctx.lazy(ctx.tensor(lazy))
    if dims.same_shape(lazy.shape, shape):
        return lazy
    zero = tirx.IntImm("int64", 0)
    fixed = [is_one(dim) for dim in lazy.shape]
    element = lazy.element

    def repeated(group: Group, indices: Sequence[Index]) -> Expr:
        own = indices[offset:]
        return element(group, [zero if one else index for one, index in zip(fixed, own, strict=True)])

    return Lazy(repeated, tuple(shape), lazy.dtype, lazy.cost, lazy.pointwise)


def _repeats(shape: Sequence[Dim], target: Sequence[Dim]) -> bool:
    offset = len(target) - len(shape)
    if any(not is_one(dim) for dim in target[:offset]):
        return True
    return any(is_one(dim) and not is_one(wide) for dim, wide in zip(shape, target[offset:], strict=True))


def elementwise(
    ctx: Context,
    node: ir.Node,
    operands: Sequence[Value],
    function: Callable[..., Expr],
    dtype: str | None = None,
    cost: int = 1,
) -> Lazy:
    """function applied to the elements of the broadcast operands.

    Args:
        ctx: the lowering.
        node: for messages.
        operands: at least one.
        function: scalar expressions -> scalar expression.
        dtype: type of the result; that of the first operand by default.
        cost: operations of the function.
    """
    shape = result_shape(node, [operand.shape for operand in operands])
    parts = [stretch(ctx, operand, shape) for operand in operands]

    def element(group: Group, indices: Sequence[Index]) -> Expr:
        return function(*(part.element(group, indices) for part in parts))

    total = cost + sum(part.cost for part in parts)
    return Lazy(element, shape, dtype or operands[0].dtype, total, all(part.pointwise for part in parts))
