"""Moving a factor per channel between the weights on both sides of an activation, and what that needs.

An activation value x with channels along one axis is read by MatMul and Conv nodes only through their weights, so
x / f with weights times f gives the same results. The division is taken into whatever makes x, where that is possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph import edit, ops

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
Change = Callable[[], None]


@dataclass(frozen=True)
class Site:
    """An activation and the contractions that read it.

    Attributes:
        value: the activation, f32 [..., C] or [batch, C, *spatial].
        readers: MatMul nodes, or Conv nodes, with a constant weight that nobody else reads.
        channels: C.
        alone: nobody else reads the value and it is no output of the model.
    """

    value: ir.Value
    readers: tuple[ir.Node, ...]
    channels: int
    alone: bool

    @property
    def last(self) -> bool:
        """Whether channels are the last axis."""
        return self.readers[0].op_type == "MatMul"


def sites(nodes: Iterable[ir.Node]) -> list[Site]:
    """The activations that these contractions read, in order; those with a shared weight or mixed readers left out."""
    by_value: dict[ir.Value, list[ir.Node]] = {}
    for node in nodes:
        value = node.inputs[0]
        if node.op_type in ("MatMul", "Conv") and value is not None and own_weight(node) is not None:
            by_value.setdefault(value, []).append(node)
    found = []
    for value, readers in by_value.items():
        counts = {_channels(node) for node in readers}
        if len({node.op_type for node in readers}) == len(counts) == 1:
            others = [user for user, _ in value.uses() if user not in readers]
            alone = not others and not value.is_graph_output() and value.producer() is not None
            found.append(Site(value, tuple(readers), counts.pop(), alone))
    return found


def input_peaks(node: ir.Node) -> FloatArray:
    """Largest |w| that each input channel of a contraction meets, f32 [C]."""
    weight = np.abs(weight_array(node))
    if node.op_type == "MatMul":
        return np.asarray(weight.max(axis=1), np.float32)
    group, (n, c) = ops.conv_group(node), weight.shape[:2]
    return np.asarray(weight.reshape(group, n // group, c, -1).max(axis=(1, 3)).reshape(-1), np.float32)


def multiply(node: ir.Node, factors: FloatArray) -> None:
    """Multiply the weight of a contraction by one factor for each of its input channels."""
    weight = weight_array(node)
    if node.op_type == "MatMul":
        set_array(node.inputs[1], weight * factors[:, None])
        return
    group, (n, c) = ops.conv_group(node), weight.shape[:2]
    per_output = np.repeat(factors.reshape(group, c), n // group, axis=0)
    set_array(node.inputs[1], weight * per_output.reshape(n, c, *[1] * (weight.ndim - 2)))


def division(site: Site, factors: FloatArray) -> list[Change] | None:
    """The changes upstream that divide the value of a site by its factors, or None when there is no way."""
    changes: list[Change] = []
    return changes if site.alone and _divide(site.value, factors, site.last, changes) else None


def insert_division(site: Site, factors: FloatArray, graph_order: Sequence[ir.Node]) -> None:
    """Put a multiplication by 1 / factors between the value and the readers of a site."""
    first = min(site.readers, key=list(graph_order).index)
    shape = (-1,) if site.last else (-1, *[1] * len(ops.kernel_shape(first)))
    constant = edit.add_initializer(edit.root_graph(first), f"{site.value.name}.inverse", (1 / factors).reshape(shape))
    scaled = edit.insert_before(first, "Mul", [site.value, constant], name=f"{site.value.name}.scaled", like=site.value)
    for node in site.readers:
        node.replace_input_with(0, scaled)


def maker(value: ir.Value) -> ir.Node | None:
    """The contraction at the head of the chain of biases and ReLUs that makes a value, where its weight is its own."""
    node = value.producer()
    while node is not None and edit.is_op(node, "Add", "Relu", "LeakyRelu"):
        computed = [item for item in node.inputs if edit.constant(item) is None]
        if len(computed) != 1 or computed[0] is None or edit.only_use(computed[0]) is None:
            return None
        node = computed[0].producer()
    if node is None or not edit.is_op(node, "MatMul", "Conv") or own_weight(node) is None:
        return None
    return node


def output_peaks(node: ir.Node) -> FloatArray:
    """Largest |w| of each output channel of a contraction, f32 [N]."""
    weight = np.abs(weight_array(node))
    axes = (0,) if node.op_type == "MatMul" else tuple(range(1, weight.ndim))
    return np.asarray(weight.max(axis=axes), np.float32)


def _divide(value: ir.Value, factors: FloatArray, last: bool, changes: list[Change]) -> bool:
    """Collect what divides `value`; False when something on the way is not linear or not constant."""
    node, inverse = value.producer(), np.asarray(1 / factors, np.float32)
    if node is None or node.domain:
        return False
    if edit.is_op(node, "Relu", "LeakyRelu"):
        return _follow(node.inputs[0], factors, last, changes)
    if edit.is_op(node, "LayerNormalization"):
        return last and all(_scaled(node, index, inverse, last, changes) for index in range(1, len(node.inputs)))
    if edit.is_op(node, "Mul", "Add"):
        index = next((i for i, item in enumerate(node.inputs) if edit.constant(item) is not None), None)
        if index is None or not _scaled(node, index, inverse, last, changes):
            return False
        return node.op_type == "Mul" or _follow(node.inputs[1 - index], factors, last, changes)
    if edit.is_op(node, "MatMul") and last and own_weight(node) is not None:
        changes.append(lambda: set_array(node.inputs[1], weight_array(node) / factors))
        return True
    if edit.is_op(node, "Conv") and not last and own_weight(node) is not None:
        shape = (-1, *[1] * (weight_array(node).ndim - 1))
        changes.append(lambda: set_array(node.inputs[1], weight_array(node) / factors.reshape(shape)))
        return len(node.inputs) < 3 or node.inputs[2] is None or _scaled(node, 2, inverse, True, changes)
    return False


def _follow(value: ir.Value | None, factors: FloatArray, last: bool, changes: list[Change]) -> bool:
    return value is not None and edit.only_use(value) is not None and _divide(value, factors, last, changes)


def _scaled(node: ir.Node, index: int, by: FloatArray, last: bool, changes: list[Change]) -> bool:
    """Multiply a constant with one number a channel by `by`; for Add and Mul it must line up with the channels."""
    array = edit.constant(node.inputs[index])
    if array is None or array.dtype != np.float32 or array.size != by.size:
        return False
    axis = array.ndim - 1 if last else _channel_axis(node, array)
    if axis is None or array.shape[axis : axis + 1] != by.shape:
        return False
    shape = [-1 if position == axis else 1 for position in range(array.ndim)]

    def change() -> None:
        name = f"{node.name}.scaled"
        value = edit.add_initializer(edit.root_graph(node), name, np.asarray(array * by.reshape(shape), np.float32))
        node.replace_input_with(index, value)

    changes.append(change)
    return True


def _channel_axis(node: ir.Node, array: Array) -> int | None:
    """The axis of a broadcast constant that meets axis 1 of the node's output."""
    rank = edit.rank(node.outputs[0])
    if rank is None or array.ndim > rank or array.ndim < rank - 1:
        return None
    return 1 - (rank - array.ndim)


def _channels(node: ir.Node) -> int:
    shape = weight_array(node).shape
    return int(shape[0] if node.op_type == "MatMul" else shape[1] * ops.conv_group(node))


def own_weight(node: ir.Node) -> ir.Value | None:
    """The constant float32 weight of a contraction, when no other node reads it."""
    value = node.inputs[1]
    if value is None or not ops.is_constant(value) or len(value.uses()) != 1 or value.is_graph_input():
        return None
    usable = value.dtype == ir.DataType.FLOAT and (node.op_type != "MatMul" or edit.rank(value) == 2)
    return value if usable else None


def weight_array(node: ir.Node) -> FloatArray:
    """The weight of a contraction as ONNX holds it."""
    return np.asarray(edit.constant(node.inputs[1]), np.float32)


def set_array(value: ir.Value | None, array: Array) -> None:
    """Give an initializer new elements under its old name."""
    if value is not None:
        value.const_value = ir.Tensor(np.ascontiguousarray(array, np.float32), name=value.name)
