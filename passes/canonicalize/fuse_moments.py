"""Recognises LayerNormalization that an exporter took apart into the mean and the mean square."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from kbitc.graph import dims, edit
from kbitc.graph.edit import add_initializer, constant, is_op, producer, root_graph, scalar
from kbitc.passes.base import PassResult
from kbitc.passes.canonicalize.match import (
    close,
    fuse_each,
    other_input,
    reduction,
    scaled,
    shifted,
    sole_reader,
    square,
)


class Found(NamedTuple):
    """The normalised value, the one axis of the means, what is added to the variance, and the constant factor."""

    data: ir.Value
    axis: int
    epsilon: float
    gain: ir.Value | None


@dataclass(frozen=True)
class FuseMoments:
    """Before: (x - m) * (1 / sqrt(max(ReduceMean(x x) - m m, 0) + eps) * gamma) + beta with m = ReduceMean(x), as Flax
    writes it; a mean may be a ReduceSum times 1 / count, and a Reshape may put its dropped axis back.
    After: `LayerNormalization<axis, epsilon>(x, gamma, beta)`, between two Transpose when the axis is not the last.

    The variance is the same number: mean(x x) - m m = mean((x - m)^2), with less cancellation in the second form.

    Keeps the graph when the means run over different axes or over several, when eps is computed, and when gamma is
    computed or varies along other axes than the normalised one.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        return fuse_each(model, _fuse, "Mul")


def _fuse(node: ir.Node) -> bool:
    found = _match(node)
    if found is None or found.data.dtype != ir.DataType.FLOAT or found.data.shape is None:
        return False
    rank, channels = len(found.data.shape), found.data.shape[found.axis]
    gain = np.ones(1, np.float32) if found.gain is None else _vector(found.gain, found.axis, rank)
    if not isinstance(channels, int) or gain is None or gain.size not in (1, channels):
        return False
    reader = sole_reader(node.outputs[0], "Add")
    beta = None if reader is None else _vector(other_input(reader, node.outputs[0]), found.axis, rank)
    if reader is not None and beta is not None and beta.size == channels and reader.graph is node.graph:
        node = reader
    else:
        beta = None
    graph, base = root_graph(node), node.outputs[0].name
    inputs = [found.data, add_initializer(graph, f"{base}.gamma", np.broadcast_to(gain, (channels,)).copy())]
    if beta is not None:
        inputs.append(add_initializer(graph, f"{base}.beta", beta))
    if found.axis == rank - 1:
        edit.replace_with(node, "LayerNormalization", inputs, axis=-1, epsilon=found.epsilon)
        return True
    order = [*(axis for axis in range(rank) if axis != found.axis), found.axis]
    inputs[0] = edit.insert_before(node, "Transpose", [found.data], like=found.data, perm=order)
    inputs[0].shape = edit.permute(found.data.shape, order)
    made = edit.insert_before(node, "LayerNormalization", inputs, like=inputs[0], axis=-1, epsilon=found.epsilon)
    edit.replace_with(node, "Transpose", [made], perm=[order.index(axis) for axis in range(rank)])
    return True


def _match(node: ir.Node) -> Found | None:
    for first, second in (node.inputs, node.inputs[::-1]):
        difference = producer(first, "Sub")
        if difference is None or difference.inputs[0] is None or second is None:
            continue
        data = difference.inputs[0]
        axes = _mean_of(data, difference.inputs[1])
        spread = _inverse_spread(second)
        if axes is None or len(axes) != 1 or spread is None:
            continue
        variance, epsilon, gain = spread
        if _is_variance(variance, data, axes) and _keeps(data, axes, difference.inputs[1]):
            return Found(data, axes[0], epsilon, gain)
    return None


def _inverse_spread(value: ir.Value) -> tuple[ir.Value, float, ir.Value | None] | None:
    """(variance, epsilon, gain) of 1 / sqrt(variance + epsilon) * gain."""
    product, gain = producer(value, "Mul"), None
    if product is not None:
        constants = [item for item in product.inputs if constant(item) is not None]
        if len(constants) != 1 or constants[0] is None:
            return None
        gain = constants[0]
        value = other_input(product, gain) or value
    inverse = producer(value, "Reciprocal")
    quotient = producer(value, "Div")
    if inverse is None and (quotient is None or scalar(quotient.inputs[0]) != 1.0):
        return None
    below = inverse.inputs[0] if inverse is not None else quotient.inputs[1] if quotient is not None else None
    root = producer(below, "Sqrt")
    total = shifted(root.inputs[0]) if root is not None else None
    return None if total is None or total[1] <= 0 else (total[0], total[1], gain)


def _is_variance(value: ir.Value, data: ir.Value, axes: tuple[int, ...]) -> bool:
    """Whether a value is ReduceMean(x x) - m m, cut at 0 or not."""
    inner = _unshaped(value)
    limit = producer(inner, "Max")
    if limit is not None:
        items = [item for item in limit.inputs if scalar(item) != 0.0]
        if len(items) != 1 or items[0] is None:
            return False
        inner = items[0]
    difference = producer(_unshaped(inner), "Sub")
    if difference is None:
        return False
    squares, mean = _mean(difference.inputs[0]), square(difference.inputs[1])
    if squares is None or mean is None or square(squares[0]) is not data:
        return False
    return squares[1] == axes and _mean_of(data, mean) == axes


def _mean_of(data: ir.Value, value: ir.Value | None) -> tuple[int, ...] | None:
    found = _mean(value)
    return found[1] if found is not None and found[0] is data else None


def _mean(value: ir.Value | None) -> tuple[ir.Value, tuple[int, ...]] | None:
    """(x, axes) of a mean, its reduced axes kept, dropped or put back."""
    inner = _unshaped(value)
    found = reduction(inner, "ReduceMean")
    if found is not None:
        return found
    product = scaled(inner)
    found = reduction(product[0], "ReduceSum") if product is not None else None
    if product is None or found is None or found[0].shape is None:
        return None
    sizes = [found[0].shape[axis] for axis in found[1]]
    count = int(np.prod([size for size in sizes if isinstance(size, int)]))
    known = all(isinstance(size, int) for size in sizes)
    return found if known and close(product[1] * count, 1.0) else None


def _unshaped(value: ir.Value | None) -> ir.Value | None:
    """What a Reshape, Squeeze or Unsqueeze reads; other values as they are."""
    node = value.producer() if value is not None else None
    return node.inputs[0] if node is not None and is_op(node, "Reshape", "Squeeze", "Unsqueeze") else value


def _keeps(data: ir.Value, axes: tuple[int, ...], mean: ir.Value | None) -> bool:
    """Whether a mean lies beside its own numbers: it has the shape of x with 1 in place of the reduced axes."""
    before, found = dims.of(data), dims.of(mean)
    if before is None or found is None or len(found) != len(before):
        return False
    wanted = [1 if axis in axes else dim for axis, dim in enumerate(before)]
    return all(dims.same(left, right) for left, right in zip(wanted, found, strict=True))


def _vector(value: ir.Value | None, axis: int, rank: int) -> np.ndarray | None:
    """A constant that varies along one axis only, f32 [n]; None for another."""
    array = constant(value)
    if array is None or array.ndim > rank:
        return None
    shape = (1,) * (rank - array.ndim) + array.shape
    if any(size != 1 for place, size in enumerate(shape) if place != axis):
        return None
    return np.asarray(array.reshape(-1), np.float32)
