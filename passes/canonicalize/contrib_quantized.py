"""What onnxruntime's quantized and fused operators compute, as bodies of functions in standard operators.

ContribOperators.md of onnxruntime. Its QOperator format computes y = Q(f(D(a), D(b))) with D and Q of the scales and
zero points that the node carries: that is written down as it is, with DequantizeLinear and QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from kbitc.graph import edit

#: A node -> the statements of a body over inputs i0, i1, ... and outputs o0, ...; None for a form that has none here.
Statements = Callable[[ir.Node], "str | None"]

_WINDOW = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_POOL = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")


def has(node: ir.Node, index: int) -> bool:
    """Whether an input is given."""
    return index < len(node.inputs) and node.inputs[index] is not None


def attributes(node: ir.Node, names: Sequence[str], **more: str) -> str:
    """Attributes of the node under their own names, as text in angle brackets."""
    found = dict(more)
    for name in names:
        if name in node.attributes:
            value = node.attributes[name].value
            found[name] = f'"{value}"' if isinstance(value, str) else str(list(value) if _listed(value) else value)
    return "<" + ", ".join(f"{name} = {value}" for name, value in found.items()) + ">" if found else ""


def _listed(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _dequantized(node: ir.Node, index: int, axis: int | None = None) -> str:
    """D of input `index`, whose scale and zero point follow it."""
    zero = f", i{index + 2}" if has(node, index + 2) else ""
    along = "" if axis is None else f"<axis = {axis}>"
    return f"DequantizeLinear{along}(i{index}, i{index + 1}{zero})"


def _quantized(node: ir.Node, index: int, value: str) -> str:
    """Q by the scale at input `index` and the zero point behind it."""
    if has(node, index + 1):
        return f"o0 = QuantizeLinear({value}, i{index}, i{index + 1})"
    data = node.inputs[0]
    kind = int(data.dtype) if data is not None and data.dtype is not None else int(ir.DataType.UINT8)
    return f"o0 = QuantizeLinear<output_dtype = {kind}>({value}, i{index})"


def _of_one(op_type: str, names: Sequence[str] = ()) -> Statements:
    """Q(op(D(x))): inputs x, its scale and zero point, those of y."""

    def body(node: ir.Node) -> str | None:
        if node.attributes.get_int("channels_last", 0):
            return None
        call = f"y = {op_type}{attributes(node, names)}(x)"
        return f"x = {_dequantized(node, 0)} {call} {_quantized(node, 3, 'y')}"

    return body


def _of_two(op_type: str) -> Statements:
    """Q(op(D(a), D(b))): inputs a and b with their scales and zero points, then those of y."""

    def body(node: ir.Node) -> str:
        parts = f"a = {_dequantized(node, 0)} b = {_dequantized(node, 3)}"
        return f"{parts} y = {op_type}(a, b) {_quantized(node, 6, 'y')}"

    return body


def _matmul(node: ir.Node) -> str | None:
    """QLinearMatMul: one scale, or one for each column of b."""
    if any((edit.rank(node.inputs[index]) or 0) > 1 for index in (1, 4)) or not has(node, 7):
        return None
    parts = f"a = {_dequantized(node, 0, -2)} b = {_dequantized(node, 3, -1)}"
    return f"{parts} y = MatMul(a, b) {_quantized(node, 6, 'y')}"


def _conv(node: ir.Node) -> str | None:
    """QLinearConv: the bias is int32 in steps of both scales."""
    if node.attributes.get_int("channels_last", 0):
        return None
    parts = f"x = {_dequantized(node, 0)} w = {_dequantized(node, 3, 0)}"
    bias = ", b" if has(node, 8) else ""
    if bias:
        parts += " step = Mul(i1, i4) wide = Cast<to = 1>(i8) b = Mul(wide, step)"
    return f"{parts} y = Conv{attributes(node, _WINDOW)}(x, w{bias}) {_quantized(node, 6, 'y')}"


def _gemm(node: ir.Node) -> str:
    """QGemm: alpha op(a) op(b) + c, c int32 in steps of alpha and both scales; float without a scale of y."""
    flip = node.attributes.get_int("transB", 0)
    alpha = node.attributes.get_float("alpha", 1.0)
    parts = f"a = {_dequantized(node, 0)} b = {_dequantized(node, 3, 0 if flip else 1)}"
    bias = ", c" if has(node, 6) else ""
    if bias:
        parts += f" alpha = Constant<value_float = {alpha!r}>() scale = Mul(i1, i4) step = Mul(scale, alpha)"
        parts += " wide = Cast<to = 1>(i6) c = Mul(wide, step)"
    call = f"Gemm{attributes(node, ('transA', 'transB'), alpha=repr(alpha))}(a, b{bias})"
    return f"{parts} y = {call} {_quantized(node, 7, 'y')}" if has(node, 7) else f"{parts} o0 = {call}"


def _softmax(node: ir.Node) -> str | None:
    """QLinearSoftmax; before opset 13 everything from the axis on is one row."""
    size = edit.rank(node.inputs[0])
    axis = node.attributes.get_int("axis", -1)
    if node.attributes.get_int("opset", 13) < 13 and (size is None or axis not in (-1, size - 1)):
        return None
    return f"x = {_dequantized(node, 0)} y = Softmax<axis = {axis}>(x) {_quantized(node, 3, 'y')}"


def _reduce_mean(node: ir.Node) -> str:
    axes = list(node.attributes.get_ints("axes", ()))
    given = f"axes = Constant<value_ints = {axes}>()" if axes else ""
    call = f"y = ReduceMean{attributes(node, ('keepdims',))}(x{', axes' if axes else ''})"
    return f"x = {_dequantized(node, 0)} {given} {call} {_quantized(node, 3, 'y')}"


def _concat(node: ir.Node) -> str:
    """Scale and zero point of y first, then triples."""
    count = (len(node.inputs) - 2) // 3
    parts = " ".join(f"x{k} = {_dequantized(node, 2 + 3 * k)}" for k in range(count))
    names = ", ".join(f"x{k}" for k in range(count))
    return f"{parts} y = Concat{attributes(node, ('axis',))}({names}) o0 = QuantizeLinear(y, i0, i1)"


def _where(node: ir.Node) -> str:
    return f"a = {_dequantized(node, 1)} b = {_dequantized(node, 4)} y = Where(i0, a, b) {_quantized(node, 7, 'y')}"


def _integer_product(node: ir.Node, a: str, a_zero: str, b_zero: str) -> str | None:
    """MatMulInteger of `a` and i1; a zero point that is left out is 0."""
    if not b_zero:
        return f"n = MatMulInteger({a}, i1{', ' + a_zero if a_zero else ''})"
    if a_zero:
        return f"n = MatMulInteger({a}, i1, {a_zero}, {b_zero})"
    kind = node.inputs[0].dtype if node.inputs[0] is not None else None
    if kind not in (ir.DataType.UINT8, ir.DataType.INT8):
        return None
    return f"z = Constant<value = {kind.name.lower()} {{0}}>() n = MatMulInteger({a}, i1, z, {b_zero})"


def _scaled(node: ir.Node, product: str | None, scales: tuple[str, str], bias: int) -> str | None:
    if product is None:
        return None
    parts = f"{product} wide = Cast<to = 1>(n) s = Mul({scales[0]}, {scales[1]})"
    return f"{parts} y = Mul(wide, s) o0 = Add(y, i{bias})" if has(node, bias) else f"{parts} o0 = Mul(wide, s)"


def _dynamic_matmul(node: ir.Node) -> str | None:
    """DynamicQuantizeMatMul: a float, b with scale and zero point, bias."""
    product = _integer_product(node, "q", "z", "i3" if has(node, 3) else "")
    scaled = _scaled(node, product, ("t", "i2"), 4)
    return None if scaled is None else f"q, t, z = DynamicQuantizeLinear(i0) {scaled}"


def _matmul_to_float(node: ir.Node) -> str | None:
    """MatMulIntegerToFloat: a, b, their scales, their zero points, bias."""
    zeros = ("i4" if has(node, 4) else "", "i5" if has(node, 5) else "")
    return _scaled(node, _integer_product(node, "i0", *zeros), ("i2", "i3"), 6)


def _dynamic_lstm(node: ir.Node) -> str:
    """DynamicQuantizeLSTM: W and R are transposed beside those of LSTM, with one scale a direction or a column.

    onnxruntime also rounds the activations to 8 bits while it runs, which is left to the plan.
    """
    parts = []
    for name, index, scale in (("w", 1, 8), ("r", 2, 10)):
        parts.append(
            f"{name}c = Cast<to = 1>(i{index}) {name}z0 = Cast<to = 1>(i{scale + 1}) "
            f"{name}z = Reshape({name}z0, shape) {name}s = Reshape(i{scale}, shape) {name}d = Sub({name}c, {name}z) "
            f"{name}f = Mul({name}d, {name}s) {name} = Transpose<perm = [0, 2, 1]>({name}f)"
        )
    directions = node.inputs[1].shape[0] if node.inputs[1] is not None and node.inputs[1].shape is not None else 1
    given = [f"i{index}" if has(node, index) else '""' for index in range(3, 8)]
    while given and given[-1] == '""':
        given.pop()
    names = ("activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size", "input_forget")
    outputs = ", ".join(f"o{index}" for index in range(len(node.outputs)))
    call = f"{outputs} = LSTM{attributes(node, names)}({', '.join(['i0', 'w', 'r', *given])})"
    return f"shape = Constant<value_ints = [{directions}, 1, -1]>() {' '.join(parts)} {call}"


_PARAMETERS = {"LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta"), "Clip": ("min", "max")}


def _activated(kind: str, value: str, parameters: Sequence[float]) -> str | None:
    """The statement of a fused activation."""
    if kind == "Clip" and len(parameters) == 2:
        low, high = (f"Constant<value_float = {number!r}>()" for number in parameters)
        return f"low = {low} high = {high} o0 = Clip({value}, low, high)"
    if kind not in ("Relu", "Tanh", "Sigmoid", "LeakyRelu", "HardSigmoid"):
        return None
    pairs = zip(_PARAMETERS.get(kind, ()), parameters, strict=False)
    given = ", ".join(f"{name} = {number!r}" for name, number in pairs)
    return f"o0 = {kind}{f'<{given}>' if given else ''}({value})"


def _fused_conv(node: ir.Node) -> str | None:
    """FusedConv: activation(Conv(x, w, b) + z)."""
    kind = node.attributes.get_string("activation", "")
    bias = ", i2" if has(node, 2) else ""
    call = f"c = Conv{attributes(node, _WINDOW)}(i0, i1{bias}) s = {'Add(c, i3)' if has(node, 3) else 'Identity(c)'}"
    end = _activated(kind, "s", node.attributes.get_floats("activation_params", ())) if kind else "o0 = Identity(s)"
    return None if end is None else f"{call} {end}"


def _fused_gemm(node: ir.Node) -> str | None:
    """FusedGemm: activation(Gemm(a, b, c))."""
    kind = node.attributes.get_string("activation", "")
    numbers = [node.attributes.get_float(f"activation_{name}") for name in ("alpha", "beta", "gamma")]
    end = _activated(kind, "s", [number for number in numbers if number is not None]) if kind else "o0 = Identity(s)"
    names = ", ".join(f"i{index}" for index in range(3) if has(node, index))
    call = f"s = Gemm{attributes(node, ('alpha', 'beta', 'transA', 'transB'))}({names})"
    return None if end is None else f"{call} {end}"


BODIES: dict[str, Statements] = {
    "QLinearAdd": _of_two("Add"),
    "QLinearMul": _of_two("Mul"),
    "QLinearMatMul": _matmul,
    "QLinearConv": _conv,
    "QGemm": _gemm,
    "QLinearSigmoid": _of_one("Sigmoid"),
    "QLinearLeakyRelu": _of_one("LeakyRelu", ("alpha",)),
    "QLinearGlobalAveragePool": _of_one("GlobalAveragePool"),
    "QLinearAveragePool": _of_one("AveragePool", _POOL),
    "QLinearReduceMean": _reduce_mean,
    "QLinearSoftmax": _softmax,
    "QLinearConcat": _concat,
    "QLinearWhere": _where,
    "DynamicQuantizeMatMul": _dynamic_matmul,
    "MatMulIntegerToFloat": _matmul_to_float,
    "DynamicQuantizeLSTM": _dynamic_lstm,
    "FusedConv": _fused_conv,
    "FusedGemm": _fused_gemm,
}
