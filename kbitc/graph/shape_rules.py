"""Output dims of operators whose dims ONNX's shape inference loses when a dim is symbolic.

Each rule takes (node, values) and returns the dims of the first output, or None when it cannot tell more.
The formulas are those of the operators' pages in the ONNX specification (opset 21).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from kbitc.graph import dims as d
from kbitc.graph.dims import Dim
from kbitc.graph.edit import constant, integers
from kbitc.graph.shape_values import ShapeValues

Rule = Callable[[ir.Node, ShapeValues], "list[Dim] | None"]

UNARY = frozenset(
    "Abs Acos Acosh Asin Asinh Atan Atanh BatchNormalization Cast Ceil Celu Clip Cos Cosh CumSum DequantizeLinear Elu "
    "Erf Exp Floor Gelu HardSigmoid HardSwish Hardmax Identity InstanceNormalization IsInf IsNaN LayerNormalization "
    "LeakyRelu Log LogSoftmax LpNormalization Mish Neg Not PRelu QuantizeLinear RMSNormalization Reciprocal Relu "
    "Round Selu Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Trilu "
    "GroupNormalization Dropout Swish".split()
)
BROADCAST = frozenset(
    "Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul "
    "Or Pow Sub Sum Where Xor".split()
)


#: Functions of the kbitc domain whose result has the shape of their first input.
_KEEP_SHAPE = ("DynamicQuantize", "Requantize", "Table", "Rescale", "IntegerSoftmax", "IntegerLayerNorm")


def output_dims(node: ir.Node, values: ShapeValues) -> list[Dim] | None:
    """The dims of the first output of a node, each None where not known; None when even the rank is not."""
    if node.domain == "kbitc" and node.op_type in _KEEP_SHAPE:
        return d.of(node.inputs[0])
    if node.domain == "kbitc" and node.op_type in ("IntegerAdd", "IntegerMul", "IntegerPRelu"):
        pair = [d.of(value) for value in node.inputs[:2]]
        both = [shape for shape in pair if shape is not None]
        return d.broadcast(both) if len(both) == len(pair) else None
    if node.domain or not node.inputs:
        return None
    if node.op_type in UNARY:
        return d.of(node.inputs[0])
    if node.op_type in BROADCAST:
        shapes = [d.of(value) for value in node.inputs]
        known = [shape for shape in shapes if shape is not None]
        return d.broadcast(known) if len(known) == len(shapes) else None
    rule = _RULES.get(node.op_type)
    return None if rule is None else rule(node, values)


def _ints(node: ir.Node, name: str, default: Sequence[int]) -> list[int]:
    return list(node.attributes.get_ints(name, default))


def _window(node: ir.Node, size: list[Dim], kernel: Sequence[int]) -> list[Dim]:
    """Spatial dims after a sliding window: floor or ceil((size + pads - (dilation (kernel - 1) + 1)) / stride) + 1."""
    count = len(kernel)
    strides = _ints(node, "strides", [1] * count)
    dilations = _ints(node, "dilations", [1] * count)
    pads = _ints(node, "pads", [0] * 2 * count)
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    result: list[Dim] = []
    for i in range(count):
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            result.append(d.floor_divide(d.add(size[i], strides[i] - 1), strides[i]))
            continue
        padding = 0 if auto == "VALID" else pads[i] + pads[i + count]
        span = d.add(size[i], padding - (dilations[i] * (kernel[i] - 1) + 1))
        if node.attributes.get_int("ceil_mode", 0):
            result.append(None if not isinstance(span, int) else _ceil_windows(span, strides[i], size[i], pads[i]))
        else:
            result.append(d.add(d.floor_divide(span, strides[i]), 1))
    return result


def _ceil_windows(span: int, stride: int, size: Dim, begin: int) -> int:
    """ceil_mode: a last window that would start beyond the input and its left padding is dropped."""
    count = -(-span // stride) + 1
    if isinstance(size, int) and (count - 1) * stride >= size + begin:
        count -= 1
    return count


def _conv(node: ir.Node, values: ShapeValues) -> list[Dim] | None:
    data, weight = d.of(node.inputs[0]), d.of(node.inputs[1])
    if data is None or weight is None or not all(isinstance(dim, int) for dim in weight[2:]):
        return None
    kernel = [int(dim) for dim in weight[2:] if isinstance(dim, int)]
    return [data[0], weight[0], *_window(node, data[2:], kernel)]


def _pool(node: ir.Node, values: ShapeValues) -> list[Dim] | None:
    data = d.of(node.inputs[0])
    if data is None:
        return None
    return [*data[:2], *_window(node, data[2:], _ints(node, "kernel_shape", [1] * (len(data) - 2)))]


def _global_pool(node: ir.Node, values: ShapeValues) -> list[Dim] | None:
    data = d.of(node.inputs[0])
    return None if data is None else [*data[:2], *([1] * (len(data) - 2))]


def _conv_transpose(node: ir.Node, values: ShapeValues) -> list[Dim] | None:
    data, weight = d.of(node.inputs[0]), d.of(node.inputs[1])
    if data is None or weight is None or "output_shape" in node.attributes or not isinstance(weight[1], int):
        return None
    kernel = [dim for dim in weight[2:] if isinstance(dim, int)]
    count = len(data) - 2
    if len(kernel) != count or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return None
    strides = _ints(node, "strides", [1] * count)
    dilations = _ints(node, "dilations", [1] * count)
    pads = _ints(node, "pads", [0] * 2 * count)
    extra = _ints(node, "output_padding", [0] * count)
    spatial = [
        d.add(
            d.multiply(d.subtract(data[2 + i], 1), strides[i]),
            extra[i] + (kernel[i] - 1) * dilations[i] + 1 - pads[i] - pads[i + count],
        )
        for i in range(count)
    ]
    return [data[0], weight[1] * node.attributes.get_int("group", 1), *spatial]


def _matmul(node: ir.Node, values: ShapeValues) -> list[Dim] | None:
    left, right = d.of(node.inputs[0]), d.of(node.inputs[1])
    if not left or not right:
        return None
    batch = d.broadcast([left[:-2], right[:-2]])
    return [*batch, *(left[-2:-1]), *(right[-1:] if len(right) > 1 else [])]


def _reshape(node: ir.Node, values: ShapeValues) -> list[Dim] | None:
    data, target = d.of(node.inputs[0]), values.elements(node.inputs[1])
    if target is None:
        return None
    result: list[Dim] = []
    for position, dim in enumerate(target):
        if dim == 0 and node.attributes.get_int("allowzero", 0) == 0:
            result.append(data[position] if data is not None and position < len(data) else None)
        else:
            result.append(dim)
    holes = [position for position, dim in enumerate(result) if dim == -1]
    if len(holes) == 1:
        rest = [dim for dim in result if dim != -1]
        result[holes[0]] = _missing(data, rest)
    return result


def _missing(data: list[Dim] | None, rest: list[Dim]) -> Dim:
    """The dim that -1 stands for: common factors cancel first, so that unknown dims do no harm."""
    if data is None or any(dim is None for dim in rest):
        return None
    left = list(data)
    over: list[Dim] = []
    for dim in rest:
        match = next((i for i, other in enumerate(left) if d.same(other, dim)), None)
        if match is None:
            over.append(dim)
        else:
            del left[match]
    return d.exact_divide(d.product(left), d.product(over))


def _expand(node: ir.Node, values: ShapeValues) -> list[Dim] | None:
    data, target = d.of(node.inputs[0]), values.elements(node.inputs[1])
    return None if data is None or target is None else d.broadcast([data, target])


def _concat(node: ir.Node, values: ShapeValues) -> list[Dim] | None:
    shapes = [d.of(value) for value in node.inputs]
    known = [shape for shape in shapes if shape is not None]
    if not known:
        return None
    axis = node.attributes.get_int("axis", 0) % len(known[0])
    result: list[Dim] = []
    for position in range(len(known[0])):
        column = [shape[position] for shape in known]
        if position != axis:
            result.append(_agreed(column))
            continue
        total: Dim = 0 if len(known) == len(shapes) else None
        for dim in column:
            total = d.add(total, dim)
        result.append(total)
    return result


def _agreed(column: list[Dim]) -> Dim:
    """What several descriptions of one dim say together: a number if one has it, else an expression."""
    for dim in column:
        if isinstance(dim, int):
            return dim
    return next((dim for dim in column if dim is not None), None)


def _slice(node: ir.Node, values: ShapeValues) -> list[Dim] | None:
    data = d.of(node.inputs[0])
    starts, ends = values.elements(node.inputs[1]), values.elements(node.inputs[2])
    if data is None or starts is None or ends is None:
        return None
    axes = integers(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else range(len(starts))
    steps = values.elements(node.inputs[4]) if len(node.inputs) > 4 else [1] * len(starts)
    if axes is None or steps is None:
        return None
    result = list(data)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        result[axis] = _slice_dim(data[axis], start, end, step)
    return result


#: Exporters write "to the end" as 2^31 - 1, 2^63 - 1 or 10^9; no tensor has that many elements along one axis.
TO_THE_END = 10**9


def _slice_dim(size: Dim, start: Dim, end: Dim, step: Dim) -> Dim:
    if not isinstance(step, int) or step == 0:
        return None
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        return len(range(*slice(start, end if step > 0 or end >= -size else None, step).indices(size)))
    whole = step == 1 and start == 0 and isinstance(end, int) and end >= TO_THE_END
    return size if whole else None


def _transpose(node: ir.Node, values: ShapeValues) -> list[Dim] | None:
    data = d.of(node.inputs[0])
    if data is None:
        return None
    return [data[axis] for axis in _ints(node, "perm", list(range(len(data)))[::-1])]


def _axes(node: ir.Node, index: int) -> list[int] | None:
    if len(node.inputs) <= index or node.inputs[index] is None:
        return _ints(node, "axes", [])
    found = integers(node.inputs[index])
    return None if found is None else list(found)


def _squeeze(node: ir.Node, values: ShapeValues) -> list[Dim] | None:
    data, axes = d.of(node.inputs[0]), _axes(node, 1)
    if data is None or not axes:
        return None
    gone = {axis % len(data) for axis in axes}
    return [dim for position, dim in enumerate(data) if position not in gone]


def _unsqueeze(node: ir.Node, values: ShapeValues) -> list[Dim] | None:
    data, axes = d.of(node.inputs[0]), _axes(node, 1)
    if data is None or axes is None:
        return None
    rank = len(data) + len(axes)
    new = {axis % rank for axis in axes}
    rest = iter(data)
    return [1 if position in new else next(rest) for position in range(rank)]


def _reduce(node: ir.Node, values: ShapeValues) -> list[Dim] | None:
    data, axes = d.of(node.inputs[0]), _axes(node, 1)
    if data is None or axes is None:
        return None
    if not axes and node.attributes.get_int("noop_with_empty_axes", 0) == 1:
        return data
    gone = {axis % len(data) for axis in axes} if axes else set(range(len(data)))
    if node.attributes.get_int("keepdims", 1):
        return [1 if position in gone else dim for position, dim in enumerate(data)]
    return [dim for position, dim in enumerate(data) if position not in gone]


def _gather(node: ir.Node, values: ShapeValues) -> list[Dim] | None:
    data, index = d.of(node.inputs[0]), d.of(node.inputs[1])
    if data is None or index is None:
        return None
    axis = node.attributes.get_int("axis", 0) % len(data)
    return [*data[:axis], *index, *data[axis + 1 :]]


def _pad(node: ir.Node, values: ShapeValues) -> list[Dim] | None:
    data, pads = d.of(node.inputs[0]), values.elements(node.inputs[1])
    if data is None or pads is None:
        return None
    given = node.inputs[3] if len(node.inputs) > 3 else None
    axes = range(len(data)) if given is None else integers(given)
    if axes is None or len(pads) != 2 * len(axes):
        return None
    result = list(data)
    for position, axis in enumerate(axes):
        result[axis] = d.add(d.add(data[axis], pads[position]), pads[position + len(axes)])
    return result


def _resize(node: ir.Node, values: ShapeValues) -> list[Dim] | None:
    data = d.of(node.inputs[0])
    scales = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if data is None or "axes" in node.attributes:
        return None
    if scales is None or not scales.size:
        return values.elements(node.inputs[3]) if len(node.inputs) > 3 else None
    return [
        d.multiply(dim, int(scale))
        if float(scale).is_integer()
        else (int(dim * float(scale)) if isinstance(dim, int) else None)
        for dim, scale in zip(data, scales, strict=True)
    ]


def _constant_of_shape(node: ir.Node, values: ShapeValues) -> list[Dim] | None:
    return values.elements(node.inputs[0])


def _range(node: ir.Node, values: ShapeValues) -> list[Dim] | None:
    """Range(start, limit, 1) has limit - start elements; shape computations count upwards from 0."""
    start, limit, step = (values.elements(value) for value in node.inputs)
    if start != [0] or step != [1] or limit is None or len(limit) != 1:
        return [None]
    return list(limit)


def _flatten(node: ir.Node, values: ShapeValues) -> list[Dim] | None:
    data = d.of(node.inputs[0])
    if data is None:
        return None
    axis = node.attributes.get_int("axis", 1)
    axis = axis + len(data) if axis < 0 else axis
    return [d.product(data[:axis]), d.product(data[axis:])]


_REDUCE = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split()
_RULES: dict[str, Rule] = {
    "Conv": _conv,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "LpPool": _pool,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "ConvTranspose": _conv_transpose,
    "MatMul": _matmul,
    "Reshape": _reshape,
    "Expand": _expand,
    "Concat": _concat,
    "Slice": _slice,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Gather": _gather,
    "Pad": _pad,
    "Resize": _resize,
    "ConstantOfShape": _constant_of_shape,
    "Flatten": _flatten,
    "Range": _range,
    **{f"Reduce{kind}": _reduce for kind in _REDUCE},
}
