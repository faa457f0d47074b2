"""Recognises quantized weights and activations in a quantized ONNX graph, by structure alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph import functions, ops
from kbitc.quant.format import Format
from kbitc.quant.packing import unpack_dense
from kbitc.quant.scheme import BLOCK_STEP, MAX_BLOCK, Granularity, QuantScheme, ScaleType
from kbitc.quant.tensor import QTensor, scale_shape

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
        None when the value is not a quantized weight, or not in a form with one scale per block of the reduction
        axis, per output channel or per tensor.
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
    if node is None or node.domain != functions.DOMAIN or node.op_type != functions.DEQUANTIZE:
        return None
    stream, grid, scales, zeros, shape = node.inputs
    data, levels, sizes, read = _constant(stream), _constant(grid), _constant(shape), _scales(scales)
    if data is None or levels is None or sizes is None or read is None:
        return None
    bits = node.attributes.get_int("bits", 0)
    block = node.attributes.get_int("block", 1)
    n, t, c = (int(size) for size in sizes)
    codes = unpack_dense(np.asarray(data, np.uint8), bits, n * t * c).reshape(n, t, c)
    zero_points = _zero_codes(zeros, bits, read[0].shape)
    data_type = _format(tuple(int(level) for level in levels), bits, zero_points is not None)
    scheme = _scheme(data_type, read[0].shape, (n, t, c), block, zero_points is not None, read[1])
    if scheme is None:
        return None
    return QTensor(codes, read[0], zero_points, data_type, scheme)


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


def _format(levels: tuple[int, ...], bits: int, asymmetric: bool) -> Format:
    half = 2 ** (bits - 1)
    uniform = levels == tuple(range(-half, half)) and bits > 1
    name = "uint" if asymmetric else ("int" if uniform or bits == 1 else "grid")
    return Format(name, bits, levels, uniform, asymmetric)


def _scheme(
    data_type: Format,
    scales: tuple[int, ...],
    shape: tuple[int, int, int],
    block: int,
    zero_point: bool,
    scale_type: ScaleType,
) -> QuantScheme | None:
    """The scheme whose scale shape is the one found; None when there is none."""
    known = data_type.name if data_type.name != "grid" else "nf"
    candidates = [(Granularity.TENSOR, 0), (Granularity.CHANNEL, 0)]
    if block % BLOCK_STEP == 0 and BLOCK_STEP <= block <= MAX_BLOCK:
        candidates.insert(0, (Granularity.BLOCK, block))
    for granularity, size in candidates:
        scheme = QuantScheme(known, data_type.bits, granularity, size, zero_point, scale_type)
        if scale_shape(shape, scheme) == tuple(scales):
            return scheme
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
    data_type = _format(tuple(range(-half, half)), bits, zero_points is not None)
    view = ops.view_shape(kind, shape)
    scheme = _scheme(data_type, scales.shape, view, block, zero_points is not None, read[1])
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
