"""Recognises quantized weights and activations in a quantized ONNX graph, by structure alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph import functions, ops
from kbitc.quant.format import Format
from kbitc.quant.packing import unpack_dense
from kbitc.quant.scales import GROUP, short_scales, spread_steps, step_count
from kbitc.quant.scheme import (
    BLOCK_STEP,
    MAX_BLOCK,
    Granularity,
    QuantScheme,
    ScaleCode,
    ScaleType,
    fixed_formats,
)
from kbitc.quant.tensor import QTensor, scale_shape

FloatArray = npt.NDArray[np.float32]
ALL_BITS, LOWEST = 8, -128
# ONNX type -> (bits, signed)
STANDARD_TYPES = {
    ir.DataType.INT2: (2, True),
    ir.DataType.INT4: (4, True),
    ir.DataType.INT8: (8, True),
    ir.DataType.UINT2: (2, False),
    ir.DataType.UINT4: (4, False),
    ir.DataType.UINT8: (8, False),
}


@dataclass(frozen=True)
class DynamicQuant:
    """Run-time int8 quantization of an activation along `axis`, in blocks of `block` elements."""

    axis: int
    block: int


def read_activation(value: ir.Value | None) -> tuple[ir.Value, DynamicQuant] | None:
    """The float source of a run-time quantized activation, or None when the value is not one."""
    node = None if value is None else value.producer()
    if node is None or node.domain != functions.DOMAIN or node.op_type != functions.DYNAMIC_QUANTIZE:
        return None
    source = node.inputs[0]
    if source is None:
        return None
    return source, DynamicQuant(node.attributes.get_int("axis", 0), node.attributes.get_int("block", 1))


def read_weight(value: ir.Value | None, kind: str) -> QTensor | None:
    """The quantized weight behind a value, seen as [N, T, C].

    Args:
        value: the weight operand of a node.
        kind: matmul, conv or embedding: how the node uses it (`kbitc.graph.ops`).

    Returns:
        The weight, a table of 8 bits as the int8 that its levels are. None when the value is not a quantized weight,
        or not in a form with one scale per block of the reduction axis, per output channel or per tensor.
    """
    node = None if value is None else value.producer()
    if node is None or value is None:
        return None
    if kind == "matmul" and _is(node, "Transpose") and list(node.attributes.get_ints("perm", ())) == [1, 0]:
        return read_weight(node.inputs[0], "embedding")
    if _is(node, "DequantizeLinear"):
        return _read_standard(node, kind)
    return _read_function(_before_layout(node, kind))


def _is(node: ir.Node | None, op_type: str, domain: str = "") -> bool:
    return node is not None and node.op_type == op_type and node.domain == domain


def _constant(value: ir.Value | None) -> npt.NDArray[np.generic] | None:
    if value is None or not ops.is_constant(value) or value.const_value is None:
        return None
    return value.const_value.numpy()


def _scales(value: ir.Value | None) -> tuple[npt.NDArray[np.float32], ScaleType] | None:
    """Scales stored as f16 behind a Cast, or as f32."""
    node = None if value is None else value.producer()
    if node is not None and _is(node, "Cast"):
        stored = _constant(node.inputs[0])
        if stored is None or stored.dtype != np.float16:
            return None
        return stored.astype(np.float32), ScaleType.F16
    stored = _constant(value)
    if stored is None or stored.dtype != np.float32:
        return None
    return np.asarray(stored, np.float32), ScaleType.F32


def _view_scales(value: ir.Value | None) -> tuple[FloatArray, ScaleType, ScaleCode, FloatArray | None] | None:
    """Scales [N, T, CB], their type, how they are coded and their steps."""
    node = None if value is None else value.producer()
    sizes = None
    if node is not None and _is(node, "Reshape"):
        sizes = _constant(node.inputs[1])
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None or not _is(node, "DequantizeLinear"):
        plain = _scales(value)
        return None if plain is None else (*plain, ScaleCode.PLAIN, None)
    codes, steps = _constant(node.inputs[0]), _scales(node.inputs[1])
    if codes is None or steps is None or len(node.inputs) > 2:
        return None
    block = node.attributes.get_int("block_size", 0)
    if steps[0].ndim == 1 and (node.attributes.get_int("axis", 1) != 0 or block != (0 if sizes is None else GROUP)):
        return None
    scale_code = ScaleCode.INTEGER if sizes is None else ScaleCode.DOUBLE
    shape = tuple(int(size) for size in sizes) if sizes is not None else codes.shape
    if len(shape) != 3 or steps[0].size != step_count((shape[0], shape[1], shape[2]), scale_code):
        return None
    scales = codes.astype(np.float32).reshape(shape) * spread_steps(steps[0], shape, scale_code)
    exact = bool((scales.astype(np.float16) == scales).all())
    kept = steps[1] if scale_code is ScaleCode.INTEGER else (ScaleType.F16 if exact else ScaleType.F32)
    return np.asarray(scales, np.float32), kept, scale_code, steps[0].reshape(-1)


def _before_layout(node: ir.Node, kind: str) -> ir.Node | None:
    """Step back over the Reshape/Transpose that turn [N, T, C] into the ONNX layout."""
    chain = ("Reshape", "Transpose") if kind == "conv" else ("Reshape",)
    current: ir.Node | None = node
    for op_type in chain:
        if current is None or not _is(current, op_type) or current.inputs[0] is None:
            return None
        current = current.inputs[0].producer()
    return current


def _read_function(node: ir.Node | None) -> QTensor | None:
    if node is None or node.domain != functions.DOMAIN:
        return None
    if node.op_type not in (functions.DEQUANTIZE, functions.DEQUANTIZE_OFFSET):
        return None
    stream, grid, scales, zeros, shape = node.inputs[:5]
    data, levels, sizes, read = _constant(stream), _constant(grid), _constant(shape), _view_scales(scales)
    if data is None or levels is None or sizes is None or read is None:
        return None
    offsets = None
    if node.op_type == functions.DEQUANTIZE_OFFSET:
        stored = _scales(node.inputs[5])
        if stored is None or stored[0].shape != read[0].shape or stored[1] is not read[1]:
            return None
        if (short_scales(read[0]) != read[0]).any():
            return None
        offsets = stored[0]
    bits = node.attributes.get_int("bits", 0)
    block = node.attributes.get_int("block", 1)
    n, t, c = (int(size) for size in sizes)
    codes = unpack_dense(np.asarray(data, np.uint8), bits, n * t * c).reshape(n, t, c)
    zero_points = _zero_codes(zeros, bits, read[0].shape)
    integers = tuple(int(level) for level in levels)
    asymmetric = zero_points is not None or offsets is not None
    if bits == ALL_BITS and not asymmetric:
        # Levels of 8 bits are int8 codes themselves: no kernel needs a table of 256.
        codes = np.asarray(np.asarray(integers, np.int16)[codes] - LOWEST, np.uint8)
        integers = tuple(range(LOWEST, -LOWEST))
    data_type, variant = _format(integers, bits, asymmetric)
    kind = QuantScheme(
        data_type.name, bits, Granularity.TENSOR, 0, zero_points is not None, read[1], variant,
        offset=offsets is not None,
    )  # fmt: skip
    # The integer product of any table need not fit int8: its block scales are then read as plain ones.
    coded = not (data_type.name == "table" and read[2] is ScaleCode.INTEGER)
    scheme = _scheme(kind, read[0].shape, (n, t, c), block, read[2] if coded else ScaleCode.PLAIN)
    if scheme is None:
        return None
    return QTensor(codes, read[0], zero_points, data_type, scheme, read[3] if coded else None, offsets)


def _zero_codes(value: ir.Value | None, bits: int, shape: tuple[int, ...]) -> npt.NDArray[np.uint8] | None:
    """Zero point codes behind Gather(grid, UnpackKBit(stream, shape)); None when the zeros are a plain 0."""
    node = None if value is None else value.producer()
    if node is None or node.inputs[1] is None:
        return None
    unpack = node.inputs[1].producer()
    stream = None if unpack is None else _constant(unpack.inputs[0])
    if stream is None:
        return None
    count = int(np.prod(shape))
    return unpack_dense(np.asarray(stream, np.uint8), bits, count).reshape(shape)


def _format(levels: tuple[int, ...], bits: int, asymmetric: bool) -> tuple[Format, str]:
    """The data type that has these levels, and its variant; a plain table when there is none."""
    half = 2 ** (bits - 1)
    if asymmetric:
        return Format("uint", bits, levels, levels == tuple(range(-half, half)), asymmetric=True), ""
    for data_type, variant in fixed_formats(bits):
        if data_type.levels == levels:
            return data_type, variant
    return Format("table", bits, levels, uniform=False, learned=True), ""


def _scheme(
    kind: QuantScheme,
    scales: tuple[int, ...],
    shape: tuple[int, int, int],
    block: int,
    scale_code: ScaleCode = ScaleCode.PLAIN,
) -> QuantScheme | None:
    """The scheme of a kind whose scale shape is the one found; None when there is none."""
    candidates = [(Granularity.TENSOR, 0), (Granularity.CHANNEL, 0)]
    if block % BLOCK_STEP == 0 and BLOCK_STEP <= block <= MAX_BLOCK:
        candidates.insert(0, (Granularity.BLOCK, block))
    for granularity, size in candidates:
        scheme = replace(kind, granularity=granularity, block=size)
        if scale_shape(shape, scheme) == tuple(scales):
            return replace(scheme, scale_code=scale_code)
    return None


def _read_standard(node: ir.Node, kind: str) -> QTensor | None:
    """DequantizeLinear of a constant, per tensor, per output channel or blocked along the reduction axis."""
    stored = node.inputs[0]
    read = _scales(node.inputs[1])
    if stored is None or read is None or stored.const_value is None or not ops.is_constant(stored):
        return None
    kind_of = STANDARD_TYPES.get(stored.const_value.dtype)
    shape = tuple(stored.const_value.shape.numpy())
    use = next(use for use in ops.WEIGHT_USES.values() if use.kind == kind)
    if kind_of is None or len(shape) not in use.ranks:
        return None
    bits, signed = kind_of
    half = 2 ** (bits - 1)
    values = stored.const_value.numpy().astype(np.int16) + (half if signed else 0)
    scales, block = _spread_view(read[0], node, kind, shape)
    if scales is None:
        return None
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    zero_points = None
    if not signed or (zero is not None and np.any(_numbers(zero) != 0)):
        raw = _numbers(zero) if zero is not None else np.zeros(read[0].shape, np.int16)
        zero_view, _ = _spread_view((raw + (half if signed else 0)).astype(np.float32), node, kind, shape)
        zero_points = None if zero_view is None else zero_view.astype(np.uint8)
    data_type, _ = _format(tuple(range(-half, half)), bits, zero_points is not None)
    view = ops.view_shape(kind, shape)
    kind_of_weight = QuantScheme(data_type.name, bits, Granularity.TENSOR, 0, zero_points is not None, read[1])
    scheme = _scheme(kind_of_weight, scales.shape, view, block)
    if scheme is None:
        return None
    codes = ops.to_view(values.astype(np.uint8), kind)
    return QTensor(np.asarray(codes, np.uint8), scales, zero_points, data_type, scheme)


def _numbers(value: ir.Value) -> npt.NDArray[np.int16]:
    return np.zeros((), np.int16) if value.const_value is None else value.const_value.numpy().astype(np.int16)


def _spread_view(
    array: npt.NDArray[np.float32], node: ir.Node, kind: str, shape: tuple[int, ...]
) -> tuple[npt.NDArray[np.float32] | None, int]:
    """Scales (or zero points) of a DequantizeLinear in ONNX layout -> the [N, T, CB] view, and the block size."""
    use = next(use for use in ops.WEIGHT_USES.values() if use.kind == kind)
    axis = node.attributes.get_int("axis", 1) % len(shape)
    block = node.attributes.get_int("block_size", 0)
    if array.size == 1:
        return array.reshape(1, 1, 1), 0
    if array.ndim == 1 and axis == use.channel_axis and block == 0:
        return array.reshape(-1, 1, 1), 0
    if array.ndim == len(shape) and axis == use.reduction_axis:
        return np.asarray(ops.to_view(array, kind), np.float32), block
    return None, 0
