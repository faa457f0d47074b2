"""Which nodes of a graph can run on integers, by operator and operands; `static.py` decides which do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from kbitc.graph import edit, images, ops
from kbitc.graph.integer_nonlinear import NORM_CHANNELS
from kbitc.quant.scheme import Granularity, ScaleCode
from kbitc.quant.tensor import QTensor

CONTRACTION, PRODUCT, BIAS = "contraction", "product", "bias"
ADD, MUL, CONCAT, MOVE, PEAK = "add", "mul", "concat", "move", "peak"
MEAN, AVERAGE, TABLE, NONE = "mean", "average", "table", "none"
SOFTMAX, NORM = "softmax", "norm"
#: Families whose output has the codes of their first input.
KEEPS_CODES = frozenset((MOVE, PEAK))
#: Families that sum products or elements in int32.
ACCUMULATES = frozenset((CONTRACTION, PRODUCT, MUL, MEAN, AVERAGE))
#: Families that only an integer-only graph has: elsewhere their floats are more accurate and cost little.
_INTEGER_ONLY = frozenset((SOFTMAX, NORM))

_MOVES = frozenset("Reshape Transpose Slice Split Squeeze Unsqueeze Flatten Expand DepthToSpace SpaceToDepth".split())


@dataclass(frozen=True)
class Form:
    """How a node could run on integers.

    Attributes:
        family: one of the names above; "none" when there is no integer form.
        inputs: the values it would read as codes.
        output: the value it computes: behind the bias where one is added to a contraction.
        reason: why there is no integer form.
    """

    family: str
    inputs: tuple[ir.Value, ...] = ()
    output: ir.Value | None = None
    reason: str = ""


def survey(
    model: ir.Model, tensors: Mapping[str, QTensor], refused: Mapping[str, str], *, integer_only: bool = False
) -> dict[ir.Node, Form]:
    """The form of every node of the main graph.

    Args:
        model: canonical graph.
        tensors: quantized weights by initializer name.
        refused: weight name -> why it stays float.
        integer_only: no float node may be left, so forms with a loss are taken too.
    """
    found: dict[ir.Node, Form] = {}
    rooted = images.roots(model.graph)
    biases: dict[ir.Node, ir.Node] = {}
    for node in model.graph:
        if node in biases:
            found[node] = Form(BIAS, output=node.outputs[0])
            continue
        form = _form(node, tensors, refused, rooted)
        form = _integer_only(node, form) if integer_only else form
        if form.family in _INTEGER_ONLY and not integer_only:
            form = _none(f"{node.op_type} is more accurate on floats")
        bias = bias_node(node) if form.family == CONTRACTION else None
        if bias is not None:
            biases[bias] = node
            form = Form(form.family, form.inputs, bias.outputs[0])
        found[node] = form
    return found


def _form(
    node: ir.Node, tensors: Mapping[str, QTensor], refused: Mapping[str, str], rooted: Mapping[ir.Value, ir.Value]
) -> Form:
    if node.domain or not node.outputs:
        return _none(f"{node.op_type} has no integer form")
    if any(value.dtype != ir.DataType.FLOAT for value in node.outputs if value.name):
        return _none("it does not compute float32")
    if node.outputs[0] in rooted:
        return Form(TABLE, (rooted[node.outputs[0]],), node.outputs[0])
    if node.op_type in ("Conv", "MatMul"):
        return _contraction(node, tensors, refused)
    maker = _FAMILIES.get(node.op_type)
    if maker is not None:
        return maker(node)
    if node.op_type in _MOVES:
        return _first(node, MOVE)
    return _none(f"{node.op_type} has no integer form")


def _integer_only(node: ir.Node, form: Form) -> Form:
    """Forms that are taken when nothing may stay float: rows of a float table become codes."""
    table = node.inputs[0] if node.inputs else None
    if form.family == NONE and edit.is_op(node, "Gather") and table is not None and edit.constant(table) is not None:
        return Form(MOVE, (table,), node.outputs[0])
    return form


def _none(reason: str) -> Form:
    return Form(NONE, reason=reason)


def _first(node: ir.Node, family: str) -> Form:
    source = node.inputs[0]
    if source is None or edit.constant(source) is not None:
        return _none("its data are constant")
    return Form(family, (source,), node.outputs[0])


def _contraction(node: ir.Node, tensors: Mapping[str, QTensor], refused: Mapping[str, str]) -> Form:
    weight, _ = ops.weight_source(node)
    if weight is None:
        inputs = images.data_inputs(node)
        if node.op_type == "MatMul" and len(inputs) == 2:
            return Form(PRODUCT, tuple(inputs), node.outputs[0])
        return _none(ops.reason_not_quantizable(node) or "its weight is not a constant")
    tensor = tensors.get(weight.name or "")
    if tensor is None:
        return _none(refused.get(weight.name or "", "its weight stays float"))
    reason = weight_obstacle(tensor)
    if reason is not None:
        return _none(reason)
    if node.op_type == "Conv" and len(node.inputs) > 2 and node.inputs[2] is not None:
        if edit.constant(node.inputs[2]) is None:
            return _none("its bias is not a constant")
    return _first(node, CONTRACTION)


def weight_obstacle(tensor: QTensor) -> str | None:
    """Why the levels of a weight cannot be summed in one int32: they need one scale a channel and no zero point."""
    if tensor.zero_points is not None:
        return "its weight has zero points; use a symmetric scheme"
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
        return _none("it does not have two float operands")
    return Form(MUL if node.op_type == "Mul" else ADD, tuple(inputs), node.outputs[0])


def _concat(node: ir.Node) -> Form:
    return Form(CONCAT, tuple(value for value in node.inputs if value is not None), node.outputs[0])


def _pad(node: ir.Node) -> Form:
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    if node.attributes.get_string("mode", "constant") == "constant" and fill is not None and edit.scalar(fill) != 0.0:
        return _none("it pads with another number than 0")
    return _first(node, MOVE)


def _gather(node: ir.Node) -> Form:
    return _first(node, MOVE)


def _resize(node: ir.Node) -> Form:
    if node.attributes.get_string("mode", "nearest") != "nearest":
        return _none("it interpolates")
    return _first(node, MOVE)


def _peak(node: ir.Node) -> Form:
    if len(node.outputs) > 1:
        return _none("it gives indices")
    return _first(node, PEAK)


def _mean(node: ir.Node) -> Form:
    if reduced_count(node) is None:
        return _none("the number of elements it averages is not known")
    if edit.rank(node.outputs[0]) == 0:
        return _none("its result is a scalar")
    return _first(node, MEAN)


def reduced_axes(node: ir.Node) -> tuple[int, ...] | None:
    """The axes that a GlobalAveragePool, GlobalMaxPool, ReduceMean or ReduceMax reduces, from the front."""
    rank = edit.rank(node.inputs[0])
    if rank is None:
        return None
    if node.op_type.startswith("Global"):
        return tuple(range(2, rank))
    axes = edit.integers(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if axes is None:
        return None if len(node.inputs) > 1 and node.inputs[1] is not None else tuple(range(rank))
    return tuple(sorted(axis % rank for axis in axes))


def reduced_count(node: ir.Node) -> int | None:
    """How many elements one result of a mean is made of; None when that is not known."""
    source, axes = node.inputs[0], reduced_axes(node)
    if source is None or source.shape is None or not axes:
        return None
    dims = [source.shape[axis] for axis in axes]
    sizes = [dim for dim in dims if isinstance(dim, int)]
    return prod(sizes) if len(sizes) == len(dims) and 0 not in sizes else None


def _reduce_max(node: ir.Node) -> Form:
    return _first(node, PEAK) if reduced_axes(node) else _none("its axes are not constant")


def _average(node: ir.Node) -> Form:
    pads = node.attributes.get_ints("pads", ())
    padded = any(pads) or node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    if padded and not node.attributes.get_int("count_include_pad", 0):
        return _none("windows at the border average fewer elements")
    if node.attributes.get_int("ceil_mode", 0):
        return _none("ceil_mode averages fewer elements at the border")
    source = node.inputs[0]
    if source is None or source.shape is None or not isinstance(source.shape[1], int):
        return _none("the number of channels is not known")
    return _first(node, AVERAGE)


def _softmax(node: ir.Node) -> Form:
    return _first(node, SOFTMAX)


def _norm(node: ir.Node) -> Form:
    source, rank = node.inputs[0], edit.rank(node.inputs[0])
    if source is None or source.shape is None or rank is None:
        return _none("the rank of its input is not known")
    channels = source.shape[-1]
    if node.attributes.get_int("axis", -1) % rank != rank - 1 or not isinstance(channels, int):
        return _none("it normalizes more than the last axis")
    if channels > NORM_CHANNELS or any(edit.constant(value) is None for value in node.inputs[1:]):
        return _none(f"it has over {NORM_CHANNELS} channels, or its gain is not a constant")
    return _first(node, NORM)


_FAMILIES: dict[str, Callable[[ir.Node], Form]] = {
    "Add": _sum,
    "Sub": _sum,
    "Mul": _sum,
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
    "Softmax": _softmax,
    "LayerNormalization": _norm,
}
