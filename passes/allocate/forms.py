"""Which nodes of a graph can run on integers, by operator and operands; `static.py` decides which do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import onnx_ir as ir

from kbitc.graph import edit, images, ops
from kbitc.passes.allocate import wide_forms
from kbitc.passes.allocate.families import (
    ADD,
    AVERAGE,
    BIAS,
    CONCAT,
    CONTRACTION,
    INTEGER_ONLY,
    MEAN,
    MOVE,
    MUL,
    PEAK,
    PRELU,
    PRODUCT,
    TABLE,
    Form,
    declined,
    first,
    reduced_axes,
)
from kbitc.quant.scheme import Granularity, ScaleCode
from kbitc.quant.tensor import QTensor

_MOVES = frozenset("Reshape Transpose Slice Split Squeeze Unsqueeze Flatten Expand DepthToSpace SpaceToDepth".split())


def survey(
    model: ir.Model, tensors: Mapping[str, QTensor], refused: Mapping[str, str], *, integer_only: bool = False,
    carried: Collection[str] = (),
) -> dict[ir.Node, Form]:  # fmt: skip
    """The form of every node of the main graph.

    Args:
        model: canonical graph.
        tensors: quantized weights by initializer name.
        refused: weight name -> why it stays float.
        integer_only: no float node may be left, so forms with a loss are taken too.
        carried: names of the values that the model itself rounds to codes.
    """
    found: dict[ir.Node, Form] = {}
    rooted = images.roots(model.graph, carried=carried)
    biases: dict[ir.Node, ir.Node] = {}
    made: dict[ir.Value, Form] = {}
    for node in model.graph:
        if node in biases:
            found[node] = Form(BIAS, output=node.outputs[0])
            continue
        form = _form(node, tensors, refused, rooted)
        form = wide_forms.wide_form(node, form, made) if integer_only else form
        if form.family in INTEGER_ONLY and not integer_only:
            form = declined(f"{node.op_type} is more accurate on floats")
        if form.family == CONTRACTION and not integer_only and not carried and _before_logarithm(node):
            form = declined("a logarithm reads its result, and tells the smallest numbers apart")
        bias = bias_node(node) if form.family == CONTRACTION else None
        if bias is not None:
            biases[bias] = node
            form = Form(form.family, form.inputs, bias.outputs[0])
        found[node] = form
        if form.output is not None:
            made[form.output] = form
    return found


def _before_logarithm(node: ir.Node) -> bool:
    """Whether every reader of the result is a logarithm, with limits or an addition of a constant in between."""
    value = node.outputs[0]
    while (reader := edit.only_use(value)) is not None:
        if edit.is_op(reader, "Log"):
            return True
        if not edit.is_op(reader, "Add", "Clip", "Max") or len(images.data_inputs(reader)) != 1:
            return False
        value = reader.outputs[0]
    return False


def _form(
    node: ir.Node, tensors: Mapping[str, QTensor], refused: Mapping[str, str], rooted: Mapping[ir.Value, ir.Value]
) -> Form:
    if node.domain or not node.outputs:
        return declined(f"{node.op_type} has no integer form")
    if any(value.dtype != ir.DataType.FLOAT for value in node.outputs if value.name):
        return declined("it does not compute float32")
    if node.outputs[0] in rooted:
        return Form(TABLE, (rooted[node.outputs[0]],), node.outputs[0])
    if node.op_type in ("Conv", "MatMul"):
        return _contraction(node, tensors, refused)
    maker = _FAMILIES.get(node.op_type)
    if maker is not None:
        return maker(node)
    if node.op_type in _MOVES:
        return first(node, MOVE)
    return declined(f"{node.op_type} has no integer form")


def _contraction(node: ir.Node, tensors: Mapping[str, QTensor], refused: Mapping[str, str]) -> Form:
    weight, _ = ops.weight_source(node)
    if weight is None:
        inputs = images.data_inputs(node)
        if node.op_type == "MatMul" and len(inputs) == 2:
            return Form(PRODUCT, tuple(inputs), node.outputs[0])
        return declined(ops.reason_not_quantizable(node) or "its weight is not a constant")
    tensor = tensors.get(weight.name or "")
    if tensor is None:
        return declined(refused.get(weight.name or "", "its weight stays float"))
    reason = weight_obstacle(tensor)
    if reason is not None:
        return declined(reason)
    if node.op_type == "Conv" and len(node.inputs) > 2 and node.inputs[2] is not None:
        if edit.constant(node.inputs[2]) is None:
            return declined("its bias is not a constant")
    return first(node, CONTRACTION)


def weight_obstacle(tensor: QTensor) -> str | None:
    """Why the levels of a weight cannot be summed in one int32: they need one scale a channel and no zero point."""
    if tensor.zero_points is not None:
        return "its weight has zero points; use a symmetric scheme"
    if tensor.offsets is not None:
        return f"its weight has offsets; use int{tensor.bits}:c"
    if tensor.scheme.granularity is Granularity.BLOCK and tensor.scheme.scale_code is not ScaleCode.INTEGER:
        name = f"{tensor.format.name}{tensor.bits}"
        return f"its weight has float scales inside a sum; use {name}:c or {name}:b32/i4"
    return None


def bias_node(node: ir.Node) -> ir.Node | None:
    """The Add of a constant per output channel that alone reads the result of a contraction, or None."""
    if node.op_type == "Conv" and len(node.inputs) > 2 and node.inputs[2] is not None:
        return None
    user = edit.only_use(node.outputs[0])
    if user is None or not edit.is_op(user, "Add"):
        return None
    other = user.inputs[1] if user.inputs[0] is node.outputs[0] else user.inputs[0]
    array = edit.constant(other)
    weight, kind = ops.weight_source(node)
    if array is None or weight is None or weight.const_value is None:
        return None
    shape = tuple(int(dim) for dim in weight.const_value.shape.numpy())
    channels = ops.view_shape(kind, shape)[0]
    behind = len(shape) - 2 if node.op_type == "Conv" else 0
    rank = edit.rank(node.outputs[0]) or 0
    wanted = (channels, *(1,) * behind)
    padded = (1,) * max(len(wanted) - array.ndim, 0) + array.shape
    # One channel: a scalar, which is a function of one value and not a bias.
    fits = channels > 1 and array.ndim <= rank and array.size == channels and padded[-len(wanted) :] == wanted
    return user if fits else None


def _sum(node: ir.Node) -> Form:
    inputs = [value for value in node.inputs if value is not None]
    if len(inputs) != 2 or any(value.dtype != ir.DataType.FLOAT for value in inputs):
        return declined("it does not have two float operands")
    return Form(MUL if node.op_type == "Mul" else ADD, tuple(inputs), node.outputs[0])


def _prelu(node: ir.Node) -> Form:
    return first(node, PRELU) if edit.constant(node.inputs[1]) is not None else declined("its slope is not a constant")


def _concat(node: ir.Node) -> Form:
    return Form(CONCAT, tuple(value for value in node.inputs if value is not None), node.outputs[0])


def _pad(node: ir.Node) -> Form:
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    if node.attributes.get_string("mode", "constant") == "constant" and fill is not None and edit.scalar(fill) != 0.0:
        return declined("it pads with another number than 0")
    return first(node, MOVE)


def _gather(node: ir.Node) -> Form:
    return first(node, MOVE)


def _resize(node: ir.Node) -> Form:
    if node.attributes.get_string("mode", "nearest") != "nearest":
        return declined("it interpolates")
    return first(node, MOVE)


def _peak(node: ir.Node) -> Form:
    if len(node.outputs) > 1:
        return declined("it gives indices")
    return first(node, PEAK)


def _mean(node: ir.Node) -> Form:
    if reduced_axes(node) is None:
        return declined("its axes are not constant")
    if edit.rank(node.outputs[0]) == 0:
        return declined("its result is a scalar")
    return first(node, MEAN)


def _reduce_max(node: ir.Node) -> Form:
    return first(node, PEAK) if reduced_axes(node) else declined("its axes are not constant")


def _average(node: ir.Node) -> Form:
    pads = node.attributes.get_ints("pads", ())
    padded = any(pads) or node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    if padded and not node.attributes.get_int("count_include_pad", 0):
        return declined("windows at the border average fewer elements")
    if node.attributes.get_int("ceil_mode", 0):
        return declined("ceil_mode averages fewer elements at the border")
    source = node.inputs[0]
    if source is None or source.shape is None or not isinstance(source.shape[1], int):
        return declined("the number of channels is not known")
    return first(node, AVERAGE)


_FAMILIES: dict[str, Callable[[ir.Node], Form]] = {
    "Add": _sum,
    "Sub": _sum,
    "Mul": _sum,
    "PRelu": _prelu,
    "Concat": _concat,
    "Pad": _pad,
    "Gather": _gather,
    "Resize": _resize,
    "MaxPool": _peak,
    "GlobalMaxPool": _reduce_max,
    "ReduceMax": _reduce_max,
    "GlobalAveragePool": _mean,
    "ReduceMean": _mean,
    "AveragePool": _average,
    "Softmax": wide_forms.softmax,
    "LayerNormalization": wide_forms.norm,
    "RMSNormalization": wide_forms.norm,
}
