"""How each operator is rewritten on channels-last data: a rule returns the new outputs, or None to let the node be.

A rule may assume nothing about where its inputs come from: `layout.twin` makes or finds their channels-last form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.edit import add_initializer, constant, insert_before, integers, rank
from kbitc.graph.shape_rules import BROADCAST, UNARY
from kbitc.targets.lower.layout import CORE_DOMAIN, Layout, last_axis, last_from_first

Rule = Callable[[Layout, ir.Node], "list[ir.Value] | None"]

_RANKS = (3, 4)
#: UNARY operators whose axis or parameters say more than their name.
_NOT_PLAIN = frozenset(
    "BatchNormalization CumSum DequantizeLinear InstanceNormalization LayerNormalization LpNormalization "
    "QuantizeLinear RMSNormalization Trilu GroupNormalization Hardmax LogSoftmax Softmax PRelu Dropout".split()
)


def _spatial(op_type: str) -> Rule:
    """The operator itself on channels-last data; further inputs (weight, bias) as they are."""

    def rule(layout: Layout, node: ir.Node) -> list[ir.Value] | None:
        data = node.inputs[0]
        if data is None or rank(data) not in _RANKS or any(edit.static_shape(v) == () for v in node.outputs[1:]):
            return None
        if len(node.outputs) > 1 and any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
            return None
        return layout.emit(node, f"{op_type}NHWC", [layout.twin(data, node), *node.inputs[1:]], domain=CORE_DOMAIN)

    return rule


def _resize(layout: Layout, node: ir.Node) -> list[ir.Value] | None:
    """Resize: roi, scales and sizes have one entry an axis and are put into channels-last order."""
    data = node.inputs[0]
    size = rank(data)
    if data is None or size not in _RANKS or size is None or "axes" in node.attributes:
        return None
    order = last_from_first(size)
    inputs: list[ir.Value | None] = [layout.twin(data, node)]
    for index, value in enumerate(node.inputs[1:], start=1):
        picked = order if index > 1 else [*order, *[axis + size for axis in order]]
        inputs.append(_reordered(layout, node, value, picked))
    return layout.emit(node, "ResizeNHWC", inputs, domain=CORE_DOMAIN)


def _reordered(layout: Layout, node: ir.Node, value: ir.Value | None, order: Sequence[int]) -> ir.Value | None:
    """A 1-D tensor with its entries in another order; an empty or missing one as it is."""
    array = constant(value)
    if value is None or (array is not None and array.size == 0):
        return value
    if array is not None:
        return add_initializer(layout.graph, f"{value.name}.channels_last", array[list(order)])
    index = add_initializer(layout.graph, f"{value.name}.order", np.asarray(order, np.int64))
    return insert_before(node, "Gather", [value, index], like=value, axis=0)


def _enough_twins(layout: Layout, values: Sequence[ir.Value | None], size: int) -> bool:
    """Whether at least one, and at least half, of the large inputs have twins."""
    large = [value for value in values if value is not None and rank(value) == size and constant(value) is None]
    large = [value for value in large if not _is_narrow(value)] or large
    ready = [value for value in large if layout.has_twin(value)]
    return bool(ready) and 2 * len(ready) >= len(large)


def _is_narrow(value: ir.Value) -> bool:
    """A value such as [N, C, 1, 1]: its Transpose costs nothing."""
    return value.shape is not None and all(dim == 1 for dim in value.shape.dims[2:])


def _unary(layout: Layout, node: ir.Node) -> list[ir.Value] | None:
    data = node.inputs[0]
    if data is None or not layout.has_twin(data):
        return None
    return layout.emit(node, node.op_type, [layout.twin(data, node), *node.inputs[1:]], domain=node.domain)


def _broadcast(layout: Layout, node: ir.Node) -> list[ir.Value] | None:
    """Elementwise operators: inputs of lower rank are widened to the full rank first, so that axes line up."""
    size = rank(node.outputs[0])
    if size is None or size < 3 or not _enough_twins(layout, node.inputs, size):
        return None
    if any(_cannot_align(value, size) for value in node.inputs):
        return None
    inputs = [_aligned(layout, node, value, size) for value in node.inputs]
    return layout.emit(node, node.op_type, inputs)


def _cannot_align(value: ir.Value | None, size: int) -> bool:
    """A computed input of lower rank, unless it is a scalar, would need a Reshape: left alone."""
    return value is not None and constant(value) is None and rank(value) not in (0, size)


def _aligned(layout: Layout, node: ir.Node, value: ir.Value | None, size: int) -> ir.Value | None:
    array = constant(value)
    if value is None or rank(value) == 0 or (array is not None and array.size == 1):
        return value
    if array is None or array.ndim == size:
        return layout.twin(value, node)
    wide = array.reshape((1,) * (size - array.ndim) + array.shape)
    moved = np.ascontiguousarray(wide.transpose(last_from_first(size)))
    return add_initializer(layout.graph, f"{value.name}.channels_last", moved, value.dtype)


def _integer_pair(layout: Layout, node: ir.Node) -> list[ir.Value] | None:
    """kbitc::IntegerAdd, IntegerMul and IntegerPRelu: two tensors that broadcast, then numbers."""
    size = rank(node.outputs[0])
    pair = node.inputs[:2]
    if size is None or size < 3 or not _enough_twins(layout, pair, size):
        return None
    if any(_cannot_align(value, size) for value in pair):
        return None
    inputs = [_aligned(layout, node, value, size) for value in pair]
    return layout.emit(node, node.op_type, [*inputs, *node.inputs[2:]], domain=node.domain)


def _axis(default: int) -> Rule:
    """Operators with one `axis` attribute and one data input."""

    def rule(layout: Layout, node: ir.Node) -> list[ir.Value] | None:
        data = node.inputs[0]
        size = rank(data)
        if data is None or size is None or not layout.has_twin(data):
            return None
        axis = last_axis(node.attributes.get_int("axis", default), size)
        return layout.emit(
            node, node.op_type, [layout.twin(data, node), *node.inputs[1:]], domain=node.domain, axis=axis
        )

    return rule


def _dynamic_quantize(layout: Layout, node: ir.Node) -> list[ir.Value] | None:
    """kbitc::DynamicQuantize: its axis moves, and `after` with it. In front of a convolution it always moves."""
    data = node.inputs[0]
    size = rank(data)
    axis = node.attributes.get_int("axis", -1)
    if data is None or size not in _RANKS or size is None:
        return None
    spatial = any(user.op_type in ("Conv", "ConvTranspose") and not user.domain for user in node.outputs[0].consumers())
    if not spatial and not layout.has_twin(data):
        return None
    new = last_axis(axis, size)
    return layout.emit(node, node.op_type, [layout.twin(data, node)], domain=node.domain, axis=new, after=new + 1)


def _concat(layout: Layout, node: ir.Node) -> list[ir.Value] | None:
    size = rank(node.outputs[0])
    if size is None or size < 3 or not _enough_twins(layout, node.inputs, size):
        return None
    inputs = [layout.twin(value, node) for value in node.inputs if value is not None]
    return layout.emit(node, "Concat", inputs, axis=last_axis(node.attributes.get_int("axis", 0), size))


def _reduce(layout: Layout, node: ir.Node) -> list[ir.Value] | None:
    """Reductions over the spatial axes or the channels. Without keepdims the rest must still be channels-last."""
    data = node.inputs[0]
    size = rank(data)
    axes = integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if data is None or size is None or size < 3 or axes is None or not axes or not layout.has_twin(data):
        return None
    first = sorted(axis % size for axis in axes)
    drops = node.attributes.get_int("keepdims", 1) == 0
    if drops and 0 in first and 1 not in first and len(first) < size - 1:
        return None
    moved = np.asarray(sorted(last_axis(axis, size) for axis in first), np.int64)
    value = add_initializer(layout.graph, f"{node.outputs[0].name}.axes", moved)
    made = layout.emit(node, node.op_type, [layout.twin(data, node), value, *node.inputs[2:]])
    if drops and 1 in first:
        # Without its channels the result has the same order of axes in both layouts.
        made[0].type, made[0].shape = node.outputs[0].type, node.outputs[0].shape
        edit.replace(node, made[0])
        return None
    return made


def _pad(layout: Layout, node: ir.Node) -> list[ir.Value] | None:
    data = node.inputs[0]
    size = rank(data)
    pads = integers(node.inputs[1])
    if data is None or size is None or pads is None or not layout.has_twin(data):
        return None
    given = node.inputs[3] if len(node.inputs) > 3 else None
    axes = range(size) if given is None else integers(given)
    if axes is None:
        return None
    full = [0] * (2 * size)
    for position, axis in enumerate(axes):
        place = last_axis(axis, size)
        full[place], full[place + size] = pads[position], pads[position + len(axes)]
    value = add_initializer(layout.graph, f"{node.outputs[0].name}.pads", np.asarray(full, np.int64))
    return layout.emit(node, "Pad", [layout.twin(data, node), value, *node.inputs[2:3]])


def _slice(layout: Layout, node: ir.Node) -> list[ir.Value] | None:
    data = node.inputs[0]
    size = rank(data)
    starts = edit.static_shape(node.inputs[1])
    if data is None or size is None or not starts or not layout.has_twin(data):
        return None
    given = node.inputs[3] if len(node.inputs) > 3 else None
    axes = range(starts[0]) if given is None else integers(given)
    if axes is None:
        return None
    moved = np.asarray([last_axis(axis, size) for axis in axes], np.int64)
    value = add_initializer(layout.graph, f"{node.outputs[0].name}.axes", moved)
    return layout.emit(node, "Slice", [layout.twin(data, node), *node.inputs[1:3], value, *node.inputs[4:]])


def _squeeze(layout: Layout, node: ir.Node) -> list[ir.Value] | None:
    """Squeeze of spatial axes; what is left is channels-last of a lower rank."""
    data = node.inputs[0]
    size = rank(data)
    axes = integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if data is None or size is None or axes is None or not layout.has_twin(data):
        return None
    first = [axis % size for axis in axes]
    if any(axis < 2 for axis in first):
        return None
    value = add_initializer(
        layout.graph,
        f"{node.outputs[0].name}.axes",
        np.asarray(sorted(last_axis(axis, size) for axis in first), np.int64),
    )
    return layout.emit(node, "Squeeze", [layout.twin(data, node), value])


def _unsqueeze(layout: Layout, node: ir.Node) -> list[ir.Value] | None:
    """Unsqueeze that adds spatial axes."""
    data = node.inputs[0]
    size = rank(node.outputs[0])
    axes = integers(node.inputs[1])
    if data is None or size is None or axes is None or (rank(data) or 0) < 3 or not layout.has_twin(data):
        return None
    first = [axis % size for axis in axes]
    if any(axis < 2 for axis in first):
        return None
    value = add_initializer(
        layout.graph,
        f"{node.outputs[0].name}.axes",
        np.asarray(sorted(last_axis(axis, size) for axis in first), np.int64),
    )
    return layout.emit(node, "Unsqueeze", [layout.twin(data, node), value])


def _reshape(layout: Layout, node: ir.Node) -> list[ir.Value] | None:
    """Reshape of [N, C, H, W] to [N, C, H W], or of [N, C, 1, 1] to anything of rank 2 or less."""
    data, output = node.inputs[0], node.outputs[0]
    size, new = rank(data), rank(output)
    if data is None or size is None or new is None or data.shape is None or not layout.has_twin(data) or size < 3:
        return None
    target = integers(node.inputs[1]) if node.op_type == "Reshape" else ()
    if new <= 2 and _is_narrow(data) and target is not None and (node.op_type != "Reshape" or 0 not in target[2:]):
        return layout.emit(node, node.op_type, [layout.twin(data, node), *node.inputs[1:]])
    if node.op_type != "Reshape" or new != 3 or target is None or output.shape is None:
        return None
    channels = data.shape[1]
    if not isinstance(channels, int) or output.shape[1] != channels or output.shape[0] != data.shape[0]:
        return None
    value = add_initializer(
        layout.graph, f"{output.name}.shape", np.asarray([target[0], target[2], channels], np.int64)
    )
    return layout.emit(node, "Reshape", [layout.twin(data, node), value], allowzero=None)


def _split(layout: Layout, node: ir.Node) -> list[ir.Value] | None:
    return _axis(0)(layout, node)


def _scalar_quantize(layout: Layout, node: ir.Node) -> list[ir.Value] | None:
    """QuantizeLinear and DequantizeLinear of activations with one scale for the whole tensor."""
    scale = constant(node.inputs[1])
    return _unary(layout, node) if scale is not None and scale.size == 1 else None


def _prelu(layout: Layout, node: ir.Node) -> list[ir.Value] | None:
    return _broadcast(layout, node)


#: Rewritten wherever they stand.
SPATIAL_RULES: dict[str, Rule] = {
    "Conv": _spatial("Conv"),
    "ConvInteger": _spatial("ConvInteger"),
    "ConvTranspose": _spatial("ConvTranspose"),
    "MaxPool": _spatial("MaxPool"),
    "AveragePool": _spatial("AveragePool"),
    "GlobalAveragePool": _spatial("GlobalAveragePool"),
    "GlobalMaxPool": _spatial("GlobalMaxPool"),
    "Resize": _resize,
}

#: Rewritten when their input already is channels-last.
RULES: dict[str, Rule] = {
    **dict.fromkeys(UNARY - _NOT_PLAIN, _unary),
    **dict.fromkeys(BROADCAST, _broadcast),
    "kbitc::DynamicQuantize": _dynamic_quantize,
    "kbitc::Requantize": _axis(1),
    "kbitc::Rescale": _axis(1),
    "kbitc::IntegerSoftmax": _axis(-1),
    "kbitc::Table": _unary,
    "kbitc::IntegerAdd": _integer_pair,
    "kbitc::IntegerPRelu": _integer_pair,
    "kbitc::IntegerMul": _integer_pair,
    "Softmax": _axis(-1),
    "LogSoftmax": _axis(-1),
    "Hardmax": _axis(-1),
    "Split": _split,
    "Concat": _concat,
    "Pad": _pad,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Flatten": _reshape,
    "QuantizeLinear": _scalar_quantize,
    "DequantizeLinear": _scalar_quantize,
    "PRelu": _prelu,
    **{f"Reduce{kind}": _reduce for kind in "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split()},
}
