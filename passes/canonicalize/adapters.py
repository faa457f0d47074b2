"""One adapter for each operator whose form changed between opset 9 and 21. See the change logs in ONNX's Operators.md.

An adapter turns a node of an earlier version into the form of opset 21, in place. `ADAPTERS` says, for each operator,
in which version a change happened; the adapters of one operator run from the oldest change to the newest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from kbitc.errors import UnsupportedError
from kbitc.graph import edit
from kbitc.graph.edit import add_initializer, describe, insert_before, root_graph, set_attribute, set_inputs

Adapter = Callable[[ir.Node], None]


def _int_input(node: ir.Node, label: str, items: Sequence[int]) -> ir.Value:
    base = f"{node.outputs[0].name}.{label}"
    return add_initializer(root_graph(node), base, np.asarray(list(items), np.int64))


def _float_input(node: ir.Node, label: str, number: float) -> ir.Value:
    """A scalar of the node's own float type."""
    source = node.inputs[0]
    kind = source.dtype if source is not None and source.dtype is not None else ir.DataType.FLOAT
    return add_initializer(root_graph(node), f"{node.outputs[0].name}.{label}", np.asarray(number, kind.numpy()))


def _attribute_to_input(name: str, index: int) -> Adapter:
    """The attribute `name` (ints) becomes input `index`."""

    def adapt(node: ir.Node) -> None:
        if name not in node.attributes:
            return
        items = node.attributes.get_ints(name, ())
        inputs: list[ir.Value | None] = list(node.inputs)
        inputs += [None] * (index + 1 - len(inputs))
        inputs[index] = _int_input(node, name, items)
        set_attribute(node, name, None)
        set_inputs(node, inputs)

    return adapt


def _slice(node: ir.Node) -> None:
    """Opset 10: starts, ends and axes became inputs."""
    starts, ends = node.attributes.get_ints("starts", ()), node.attributes.get_ints("ends", ())
    axes = node.attributes.get_ints("axes", tuple(range(len(starts))))
    inputs = [node.inputs[0], *(_int_input(node, name, items) for name, items in _named(starts, ends, axes))]
    for name in ("starts", "ends", "axes"):
        set_attribute(node, name, None)
    set_inputs(node, inputs)


def _named(starts: Sequence[int], ends: Sequence[int], axes: Sequence[int]) -> list[tuple[str, Sequence[int]]]:
    return [("starts", starts), ("ends", ends), ("axes", axes)]


def _clip(node: ir.Node) -> None:
    """Opset 11: min and max became inputs."""
    low, high = node.attributes.get_float("min"), node.attributes.get_float("max")
    inputs: list[ir.Value | None] = [node.inputs[0]]
    inputs.append(None if low is None else _float_input(node, "min", low))
    inputs.append(None if high is None else _float_input(node, "max", high))
    set_attribute(node, "min", None)
    set_attribute(node, "max", None)
    set_inputs(node, inputs)


def _pad(node: ir.Node) -> None:
    """Opset 11: pads and value became inputs."""
    pads = node.attributes.get_ints("pads", ())
    value = node.attributes.get_float("value", 0.0)
    mode = node.attributes.get_string("mode", "constant")
    inputs: list[ir.Value | None] = [node.inputs[0], _int_input(node, "pads", pads)]
    if mode == "constant" and value:
        inputs.append(_float_input(node, "value", value))
    set_attribute(node, "pads", None)
    set_attribute(node, "value", None)
    set_inputs(node, inputs)


def _split_equal(node: ir.Node) -> None:
    """Opset 18: an even split states how many parts."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        set_attribute(node, "num_outputs", len(node.outputs))


def _dropout(node: ir.Node) -> None:
    """Opset 12: ratio became an input. At inference the node passes its input on, so ratio does not matter."""
    set_attribute(node, "ratio", None)
    set_attribute(node, "is_test", None)
    set_inputs(node, [node.inputs[0]])


def _flattened(node: ir.Node) -> None:
    """Opset 13: Softmax, LogSoftmax and Hardmax work along one axis; before, they flattened to 2-D at `axis`."""
    data = node.inputs[0]
    axis = node.attributes.get_int("axis", 1)
    size = edit.rank(data)
    if data is None or size is None:
        raise UnsupportedError("the rank of this operator's input is not known", where=describe(node))
    axis = axis + size if axis < 0 else axis
    trailing = data.shape[axis + 1 :] if data.shape is not None else ()
    if axis == size - 1 or all(dim == 1 for dim in trailing):
        set_attribute(node, "axis", axis)
        return
    shape = insert_before(node, "Shape", [data])
    shape.type, shape.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([size])
    flat = insert_before(node, "Flatten", [data], axis=axis)
    flat.type = data.type
    node.replace_input_with(0, flat)
    set_attribute(node, "axis", -1)
    graph, output = root_graph(node), node.outputs[0]
    back = ir.Node("", "Reshape", [output, shape], name=f"{output.name}.unflatten")
    graph.insert_after(node, back)
    kind, dims = output.type, output.shape
    edit.redirect(output, back.outputs[0])
    back.outputs[0].type, back.outputs[0].shape = kind, dims
    back.replace_input_with(0, output)
    if back.outputs[0].name is None:
        back.outputs[0].name = edit.fresh_name(graph, f"{output.name}.unflattened")
    output.shape = None


def _upsample(node: ir.Node) -> None:
    """Upsample (removed in opset 10) is Resize with the older coordinates."""
    scales = node.attributes.get_floats("scales")
    value = node.inputs[1] if len(node.inputs) > 1 else None
    if scales is not None:
        name = f"{node.outputs[0].name}.scales"
        value = add_initializer(root_graph(node), name, np.asarray(list(scales), np.float32))
        set_attribute(node, "scales", None)
    node.op_type = "Resize"
    set_inputs(node, [node.inputs[0], value])
    _resize(node)


def _resize(node: ir.Node) -> None:
    """Opset 11: Resize got a roi, sizes, and coordinate modes; before, coordinates were asymmetric and rounded down."""
    set_inputs(node, [node.inputs[0], None, node.inputs[1]])
    set_attribute(node, "coordinate_transformation_mode", "asymmetric")
    if node.attributes.get_string("mode", "nearest") == "nearest":
        set_attribute(node, "nearest_mode", "floor")


def _batch_norm(node: ir.Node) -> None:
    """Opset 14: training mode is an attribute; before, further outputs meant training."""
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        raise UnsupportedError("BatchNormalization in training mode cannot be compiled", where=describe(node))
    if len(node.outputs) > 1:
        node.resize_outputs(1)


def _scatter(node: ir.Node) -> None:
    """Opset 11: Scatter is called ScatterElements."""
    node.op_type = "ScatterElements"


def _top_k(node: ir.Node) -> None:
    """Opset 10: k became an input."""
    count = node.attributes.get_int("k", 0)
    set_attribute(node, "k", None)
    set_inputs(node, [node.inputs[0], _int_input(node, "k", [count])])


def _roi_align(node: ir.Node) -> None:
    """Opset 16: the default coordinate mode changed."""
    set_attribute(node, "coordinate_transformation_mode", "output_half_pixel")


def _grid_sample(node: ir.Node) -> None:
    """Opset 20: interpolation modes got other names."""
    names = {"bilinear": "linear", "bicubic": "cubic"}
    mode = node.attributes.get_string("mode", "bilinear")
    set_attribute(node, "mode", names.get(mode, mode))


def _dft(node: ir.Node) -> None:
    """Opset 20: the axis became an input."""
    axis = add_initializer(
        root_graph(node), f"{node.outputs[0].name}.axis", np.asarray(node.attributes.get_int("axis", 1), np.int64)
    )
    set_attribute(node, "axis", None)
    length = node.inputs[1] if len(node.inputs) > 1 else None
    set_inputs(node, [node.inputs[0], length, axis])


_SOFTMAX = ((13, _flattened),)
_REDUCE_18 = tuple(
    f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)

#: Operator -> changes in order: (version of the change, adapter for nodes of earlier versions).
ADAPTERS: dict[str, tuple[tuple[int, Adapter], ...]] = {
    "Slice": ((10, _slice),),
    "TopK": ((10, _top_k),),
    "Upsample": ((10, _upsample),),
    "Clip": ((11, _clip),),
    "Pad": ((11, _pad),),
    "Resize": ((11, _resize),),
    "Scatter": ((11, _scatter),),
    "Dropout": ((12, _dropout),),
    "Squeeze": ((13, _attribute_to_input("axes", 1)),),
    "Unsqueeze": ((13, _attribute_to_input("axes", 1)),),
    "ReduceSum": ((13, _attribute_to_input("axes", 1)),),
    "Split": ((13, _attribute_to_input("split", 1)), (18, _split_equal)),
    "Softmax": _SOFTMAX,
    "LogSoftmax": _SOFTMAX,
    "Hardmax": _SOFTMAX,
    "BatchNormalization": ((14, _batch_norm),),
    "RoiAlign": ((16, _roi_align),),
    "DFT": ((20, _dft),),
    "GridSample": ((20, _grid_sample),),
    **{name: ((18, _attribute_to_input("axes", 1)),) for name in _REDUCE_18},
}
