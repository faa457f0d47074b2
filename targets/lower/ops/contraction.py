"""Matrix products and embeddings: each becomes a `Contraction` that the kernel rules of the target emit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from tvm import te, tirx

from kbitc.graph import edit
from kbitc.graph.quantized import read_activation, read_weight
from kbitc.quant.tensor import QTensor
from kbitc.targets.lower import attributes, dims, scalar
from kbitc.targets.lower.broadcast import elementwise, result_shape, stretch
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.contraction import Contraction, Dim
from kbitc.targets.lower.group import Group, TeTensor, compute
from kbitc.targets.lower.offer import find_tail, finish, offer, unique_name
from kbitc.targets.lower.ops.indexing import gather as gather_elements
from kbitc.targets.lower.ops.movement import transposed
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Constant, Index, Lazy, Tensor, Value

FloatArray = npt.NDArray[np.float32]
# So many rows of queries read each key only a few times.
FEW_ROWS = 4


def quantized_activation(node: ir.Node, index: int, axis: int, weight: QTensor) -> tuple[ir.Value, int] | None:
    """The float source and block of an activation that is quantized at run time.

    None unless its blocks are those of the weight, or whole rows (0).
    """
    found = read_activation(node.inputs[index])
    if found is None:
        return None
    source, quant = found
    channels = weight.shape[2]
    rank = len(source.shape) if source.shape is not None else None
    given = quant.axis if quant.axis >= 0 or rank is None else quant.axis + rank
    block = channels if quant.block == 0 else min(quant.block, channels)
    if given != axis or block not in (channels, weight.block):
        return None
    return source, 0 if block == channels else block


def matmul(ctx: Context, node: ir.Node) -> Value | None:
    """MatMul of any ranks."""
    weight = read_weight(node.inputs[1], "matmul")
    if weight is not None:
        source = node.inputs[0]
        rank = len(source.shape) if source is not None and source.shape is not None else 0
        found = quantized_activation(node, 0, rank - 1, weight)
        x = ctx.get(found[0]) if found is not None else attributes.value(ctx, node, 0)
        return matmul_by_weight(ctx, node, x, weight, None if found is None else found[1])
    a, b = attributes.value(ctx, node, 0), attributes.value(ctx, node, 1)
    _check_inner(node, a.shape, b.shape)
    if a.dtype == "float32" and isinstance(b, Constant) and len(b.shape) == 2 and len(a.shape) >= 2:
        view = np.ascontiguousarray(np.asarray(b.array, np.float32).T)[:, None, :]
        return matmul_by_weight(ctx, node, a, view, None)
    return product(ctx, node, a, b)


def _check_inner(node: ir.Node, a: Sequence[Dim], b: Sequence[Dim]) -> None:
    if not a or not b:
        raise refuse(node, "MatMul of a scalar", remedy="repair the model")
    inner = a[-1], b[-2] if len(b) > 1 else b[0]
    if dims.never_equal(*inner):
        raise refuse(
            node, "inner dimensions differ", got=f"{dims.text(a)} by {dims.text(b)}", remedy="repair the model"
        )


def matmul_by_weight(
    ctx: Context,
    node: ir.Node,
    x: Value,
    weight: QTensor | FloatArray,
    block: int | None,
    bias: FloatArray | None = None,
) -> Value:
    """x [..., C] by a constant weight [N, 1, C], with the bias and clamp that follow.

    Args:
        ctx: the lowering.
        node: the node whose first output this computes.
        x: float32 activations.
        weight: quantized or float32.
        block: channels an activation scale for int8 activations (0: all); None for float ones.
        bias: float32 [N] or None.
    """
    n, _, channels = weight.shape
    if len(x.shape) == 1:
        row = matmul_by_weight(ctx, node, ctx.reshape(x, (1, *x.shape)), weight, block, bias)
        return ctx.reshape(row, (n,))
    x = ctx.cast_shape(x, (*x.shape[:-1], channels))
    out_shape = (*x.shape[:-1], n)
    tail = find_tail(node, bias, n, len(out_shape) - 1, len(out_shape))
    contraction = Contraction(
        name=unique_name(ctx, node),
        kind="matmul",
        weight=weight,
        activation="float32" if block is None else "int8",
        x_shape=tuple(x.shape),
        out_shape=out_shape,
        activation_block=block or 0,
        bias=tail.bias,
        post=tail.post,
        accumulators_out=ctx.debug_accumulators and block is not None,
    )
    finish(ctx, tail)
    result = offer(ctx, node, contraction, [ctx.var(x)])
    ctx.bind(tail.output, result)
    return result


def product(ctx: Context, node: ir.Node, a: Value, b: Value) -> Value:
    """a @ b of two values that are both computed at run time (or are no float32 matrices)."""
    left = ctx.reshape(a, (1, *a.shape)) if len(a.shape) == 1 else a
    right = ctx.reshape(b, (*b.shape, 1)) if len(b.shape) == 1 else b
    right = ctx.cast_shape(right, (*right.shape[:-2], left.shape[-1], right.shape[-1]))
    lead = result_shape(node, [left.shape[:-2], right.shape[:-2]]) if len(left.shape) + len(right.shape) > 4 else ()
    shape = (*lead, left.shape[-2], right.shape[-1])
    if a.dtype == "float32":
        result: Value = _batch_matmul(ctx, node, left, right, shape)
    else:
        result = _plain_product(ctx, left, right, shape)
    kept = [*lead, *([] if len(a.shape) == 1 else [shape[-2]]), *([] if len(b.shape) == 1 else [shape[-1]])]
    return ctx.reshape(result, tuple(kept))


def _batch_matmul(ctx: Context, node: ir.Node, a: Value, b: Value, shape: tuple[Dim, ...]) -> Tensor:
    """Few rows read a second operand behind a Transpose where it lies; more rows are worth turning it."""
    turned = _unturned(ctx, node, b) if _few(shape[-2]) else None
    left, right = ctx.tensor(a, "operand"), ctx.tensor(b if turned is None else turned, "operand")
    contraction = Contraction(
        name=unique_name(ctx, node),
        kind="batch_matmul",
        weight=None,
        activation="float32",
        x_shape=left.shape,
        out_shape=shape,
        b_shape=right.shape,
        transpose_b=turned is not None,
    )
    return offer(ctx, node, contraction, [left.var, right.var])


def _few(rows: Dim) -> bool:
    return isinstance(rows, int) and rows <= FEW_ROWS


def _unturned(ctx: Context, node: ir.Node, b: Value) -> Value | None:
    """The source of the second operand when it is a Transpose that swaps the last two axes and no others."""
    source = node.inputs[1] if node.op_type == "MatMul" else None
    turn = None if source is None else edit.producer(source, "Transpose")
    if turn is None or len(b.shape) < 2:
        return None
    size = len(b.shape)
    perm = list(turn.attributes.get_ints("perm", list(range(size))[::-1]))
    if perm != [*range(size - 2), size - 1, size - 2]:
        return None
    given = attributes.value(ctx, turn, 0)
    return ctx.cast_shape(given, (*b.shape[:-2], b.shape[-1], b.shape[-2]))


def _plain_product(ctx: Context, a: Value, b: Value, shape: tuple[Dim, ...]) -> Tensor:
    """A product of another type than float32: 16-bit floats are summed in float32, integers in their own type."""
    dtype = a.dtype
    wide = "float32" if dtype in ("float16", "bfloat16") else dtype
    left = stretch(ctx, a, (*shape[:-2], *a.shape[-2:]))
    right = stretch(ctx, b, (*shape[:-2], *b.shape[-2:]))

    def build(group: Group) -> list[TeTensor]:
        k = te.reduce_axis((0, left.shape[-1]), "k")

        def element(indices: Sequence[Index]) -> Any:
            *lead, row, column = indices
            pair = left.element(group, [*lead, row, k.var]), right.element(group, [*lead, k.var, column])
            return te.sum(scalar.cast(pair[0], wide) * scalar.cast(pair[1], wide), axis=k)

        return [compute(shape, element, "product")]

    total = ctx.kernel("matmul", [(shape, wide)], build, kind="reduce")[0]
    if wide == dtype:
        return total
    return ctx.tensor(_converted(ctx, total, dtype))


def _converted(ctx: Context, value: Value, dtype: str) -> Lazy:
    source = ctx.lazy(value)
    return Lazy(lambda group, i: scalar.cast(source.element(group, i), dtype), source.shape, dtype, source.cost + 1)


def gemm(ctx: Context, node: ir.Node) -> Value | None:
    """Gemm: alpha * A' @ B' + beta * C."""
    a, b = attributes.value(ctx, node, 0), attributes.value(ctx, node, 1)
    alpha, beta = (attributes.float_attribute(node, name, 1.0) for name in ("alpha", "beta"))
    c = attributes.optional(ctx, node, 2)
    if node.attributes.get_int("transA", 0):
        a = transposed(ctx, a, [1, 0])
    swap = node.attributes.get_int("transB", 0) == 1
    weight = isinstance(b, Constant) and a.dtype == "float32"
    bias = _vector(c, b.shape[0 if swap else 1], beta) if weight else None
    if weight and (c is None or bias is not None):
        matrix = np.asarray(b.array if swap else b.array.T, np.float32) if isinstance(b, Constant) else np.zeros((0, 0))
        view = np.ascontiguousarray(matrix * np.float32(alpha))[:, None, :]
        return matmul_by_weight(ctx, node, a, np.asarray(view, np.float32), None, bias)
    b = transposed(ctx, b, [1, 0]) if swap else b
    _check_inner(node, a.shape, b.shape)
    result = product(ctx, node, a, b)
    return _scaled_sum(ctx, node, result, c, alpha, beta)


def _vector(c: Value | None, n: Dim, beta: float) -> FloatArray | None:
    """beta * C as one number a column; None when C is not such a constant."""
    if not isinstance(c, Constant) or c.dtype != "float32" or not dims.is_static(n):
        return None
    if c.array.size not in (1, n) or (c.array.size == n and c.shape[-1] != n):
        return None
    return np.asarray(np.broadcast_to(c.array.reshape(-1), (n,)) * np.float32(beta), np.float32)


def _scaled_sum(ctx: Context, node: ir.Node, result: Value, c: Value | None, alpha: float, beta: float) -> Value:
    def scale(x: Any, factor: float) -> Any:
        return (
            x if factor == 1.0 else scalar.cast(scalar.cast(x, "float32") * tirx.const(factor, "float32"), result.dtype)
        )

    if c is None:
        return elementwise(ctx, node, [result], lambda x: scale(x, alpha))
    return elementwise(ctx, node, [result, c], lambda x, y: scale(x, alpha) + scale(y, beta), cost=3)


def gather(ctx: Context, node: ir.Node) -> Value:
    """Gather: rows of a quantized embedding by a kernel rule, anything else element by element."""
    weight = read_weight(node.inputs[0], "embedding") if node.attributes.get_int("axis", 0) == 0 else None
    if weight is None:
        return gather_elements(ctx, node)
    where = attributes.value(ctx, node, 1)
    if where.dtype not in ("int32", "int64"):
        raise refuse(node, "indices must be int32 or int64", got=where.dtype, remedy="repair the model")
    contraction = Contraction(
        name=unique_name(ctx, node),
        kind="embedding",
        weight=weight,
        activation="float32",
        x_shape=tuple(where.shape),
        out_shape=(*where.shape, weight.shape[2]),
        index_dtype="int32" if where.dtype == "int32" else "int64",
    )
    return offer(ctx, node, contraction, [ctx.var(where)])


TABLE: dict[str, Callable[[Context, ir.Node], Any]] = {
    "MatMul": matmul,
    "Gemm": gemm,
    "Gather": gather,
}
