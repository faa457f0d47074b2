"""Gives back the mean that a layer's output loses when its weight is quantized.

Before:
    y = MatMul(x, W) [+ b],  y = Conv(x, W, b)
After:
    y = MatMul(x, W) + (b + (W - Wq) E[x]),  y = Conv(x, W, b + (W - Wq) E[x])
With Wq in the place of W the mean of y over the calibration data is what it was (Nagel et al., arXiv 1906.04721,
section 4.2, equation 17, with E[x] from data instead of batch normalization).
Keeps the graph when no data told E[x], when several nodes read the weight, and when the mean does not change.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph import edit, ops
from kbitc.quant.moments import InputMoments
from kbitc.quant.tensor import QTensor

FloatArray = npt.NDArray[np.float32]


def shift(weight: FloatArray, tensor: QTensor, inputs: InputMoments) -> FloatArray:
    """(W - Wq) E[x], what each output channel loses on average, f32 [N].

    Args:
        weight: f32 [N, T, C].
        tensor: its quantized form.
        inputs: moments of what it is multiplied with.
    """
    rows = weight.shape[0]
    lost = (weight.astype(np.float64) - tensor.dequantize()).reshape(inputs.groups, rows // inputs.groups, -1)
    return np.asarray((lost @ inputs.mean[:, :, None].astype(np.float64)).reshape(rows), np.float32)


def add_to_bias(node: ir.Node, amount: FloatArray) -> None:
    """Add f32 [N] to the output channels of a Conv or MatMul: to the bias it has, else to a new one."""
    graph = edit.root_graph(node)
    if node.op_type == "Conv":
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        array = edit.constant(bias)
        if bias is None or array is not None:
            total = _sum(amount, np.zeros_like(amount) if array is None else array)
            value = edit.add_initializer(graph, f"{node.name}.bias", total)
            edit.set_inputs(node, [node.inputs[0], node.inputs[1], value])
            return
        amount = amount.reshape(-1, *([1] * len(ops.kernel_shape(node))))
    found = _constant_add(node, amount.size)
    if found is not None:
        add, index, array = found
        add.replace_input_with(index, edit.add_initializer(graph, f"{node.name}.bias", _sum(amount, array)))
        return
    edit.append(node.outputs[0], "Add", [edit.add_initializer(graph, f"{node.name}.shift", amount)], f"{node.name}.add")


def _sum(amount: FloatArray, bias: npt.NDArray[Any]) -> FloatArray:
    return np.asarray(bias.astype(np.float64) + amount, np.float32)


def _constant_add(node: ir.Node, channels: int) -> tuple[ir.Node, int, npt.NDArray[Any]] | None:
    """The Add of a constant [N] behind a MatMul: node, index and value of the constant."""
    user = edit.only_use(node.outputs[0])
    if node.op_type != "MatMul" or user is None or not edit.is_op(user, "Add"):
        return None
    index = 1 if user.inputs[0] is node.outputs[0] else 0
    array = edit.constant(user.inputs[index])
    if array is None or array.dtype != np.float32 or array.shape != (channels,):
        return None
    return user, index, array
