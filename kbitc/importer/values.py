"""Checks on constants that need to know what they are used for: infinities, quantization scales, variances, sizes."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir

from kbitc.errors import ModelError, ResourceError
from kbitc.graph.edit import all_nodes, constant, describe, static_shape

#: Operators whose constants hold infinities on purpose: masks and the neutral element of a maximum.
_MASK_READERS = frozenset(
    "Where Max Min Clip Expand Equal Less Greater LessOrEqual GreaterOrEqual Concat Slice Unsqueeze Reshape Gather Pad "
    "Cast CastLike Identity Trilu IsInf ScatterND ScatterElements If Loop".split()
)
_WEIGHT_READERS = frozenset(
    "Conv ConvTranspose MatMul Gemm BatchNormalization LayerNormalization InstanceNormalization GroupNormalization "
    "LSTM GRU RNN Einsum".split()
)
#: Elements looked at in one go: the flags stay small beside the weights.
_STEP = 1 << 20
#: Bytes that one value may take; more is refused before anything is allocated.
MAX_VALUE_BYTES = 64 << 30


def check_values(model: ir.Model) -> None:
    """Check the constants of a model against the nodes that read them.

    Raises:
        ModelError: an infinity in a weight, a scale that is not positive, a negative variance.
        ResourceError: a value that would not fit any machine.
    """
    for value in model.graph.initializers.values():
        _refuse_infinite(value)
    for node in all_nodes(model):
        if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            _check_scale(node)
        elif node.op_type == "BatchNormalization" and not node.domain:
            _check_variance(node)
        elif node.op_type in ("Conv", "ConvTranspose") and not node.domain:
            _check_channels(node)
        for output in node.outputs:
            _check_size(node, output)


def _refuse_infinite(value: ir.Value) -> None:
    tensor = value.const_value
    if tensor is None or not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 8:
        return
    array = tensor.numpy()
    flat = array.reshape(-1)
    if all(np.isfinite(flat[start : start + _STEP]).all() for start in range(0, flat.size, _STEP)):
        return
    readers = {node.op_type for node in value.consumers()}
    single, mask_like = array.size == 1, array.ndim != 1
    if readers <= _MASK_READERS or (mask_like and readers <= _MASK_READERS | {"Add", "Mul"}):
        return
    if single and not readers & _WEIGHT_READERS:
        return
    index = [int(item) for item in np.argwhere(np.isinf(array))[0]]
    raise ModelError(
        "a weight is infinite",
        where=f"tensor {value.name}",
        got=f"{float(array[tuple(index)])} at index {index}",
        remedy="repair the training run",
    )


def _check_scale(node: ir.Node) -> None:
    scale = constant(node.inputs[1])
    if scale is None:
        return
    numbers = scale.astype(np.float64)
    # Quantizers that use the lowest code of a symmetric block put the sign of its largest weight into the scale, and
    # 0 for a block of zeros.
    signed = node.op_type == "DequantizeLinear" and node.attributes.get_int("block_size", 0) > 0
    bad = ~(np.isfinite(numbers) & (signed | (numbers > 0)))
    if bad.any():
        value = node.inputs[1]
        raise ModelError(
            "a quantization scale is not a positive number",
            where=f"tensor {value.name if value is not None else ''} of {describe(node)}",
            got=float(numbers[bad][0]),
        )
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None or scale.ndim != 1 or scale.size == 1 or node.attributes.get_int("block_size", 0) > 0:
        return
    axis = node.attributes.get_int("axis", 1)
    size = shape[axis] if -len(shape) <= axis < len(shape) else None
    if isinstance(size, int) and size != scale.size:
        raise ModelError(
            "a quantization scale has the wrong length",
            where=f"tensor {node.inputs[1].name if node.inputs[1] is not None else ''} of {describe(node)}",
            got=f"{scale.size} scales for {size} channels",
        )


def _check_channels(node: ir.Node) -> None:
    """Channel and group counts of a convolution, which ONNX's checker does not compare."""
    data, weight = node.inputs[0], node.inputs[1]
    group = node.attributes.get_int("group", 1)
    if data is None or weight is None or data.shape is None or weight.shape is None:
        return
    if len(data.shape) < 3 or len(data.shape) != len(weight.shape):
        raise ModelError(
            "a convolution's input and weight differ in rank",
            where=describe(node),
            got=f"{data.shape} and {weight.shape}",
        )
    channels, outer, inner = data.shape[1], weight.shape[0], weight.shape[1]
    if not (isinstance(outer, int) and isinstance(inner, int)):
        return
    split = outer if node.op_type == "Conv" else inner
    wanted = inner * group if node.op_type == "Conv" else outer
    if group < 1 or (node.op_type == "Conv" and split % group):
        raise ModelError(
            "a convolution's group does not divide its output channels", where=describe(node), got=f"group {group}"
        )
    if isinstance(channels, int) and channels != wanted:
        raise ModelError(
            "a convolution's input has the wrong number of channels",
            where=describe(node),
            got=f"{channels}, the weight wants {wanted} (group {group})",
        )


def _check_variance(node: ir.Node) -> None:
    variance = constant(node.inputs[4])
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    if variance is None or not (variance.astype(np.float64) + epsilon <= 0).any():
        return
    value = node.inputs[4]
    raise ModelError(
        "a BatchNormalization variance is negative",
        where=f"tensor {value.name if value is not None else ''} of {describe(node)}",
        got=float(variance.min()),
        remedy="repair the training run",
    )


def _check_size(node: ir.Node, output: ir.Value) -> None:
    shape = static_shape(output)
    if shape is None or output.dtype is None:
        return
    nbytes = prod(shape) * output.dtype.bitwidth // 8
    if nbytes > MAX_VALUE_BYTES:
        raise ResourceError(
            "a value of the model would not fit in memory",
            where=describe(node),
            got=f"{nbytes / 1e9:.0f} GB for shape {list(shape)}",
            remedy="bind smaller shapes with --shape",
        )
