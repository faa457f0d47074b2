"""Rotates the channels between two linear layers, so that no channel carries an outlier.

Before:
    v = x W1 + b,  u = linear steps that keep runs of D channels together,  y = u W2
After:
    v = x (W1 Q) + b Q,  y = u (Q^T W2),  Q = blocks of D x D Hadamard matrices / sqrt(D)
(QuaRot, Ashkboos et al., arXiv 2404.00456, section 4, stage 1d: values and output projection of attention.) D is the
largest power of two, at least 16, that divides every last dimension on the way. Steps: Reshape, Transpose that leaves
the last axis, MatMul from the left (attention weights), Add of a constant. All offline: no operator is added.
Keeps the graph when a nonlinearity, a scale per channel or another reader stands between, when a weight is shared, and
when there is no such D. Rotating a residual stream, which needs RMSNorm everywhere on it, is not done.
"""

from __future__ import annotations

from math import gcd

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph import edit
from kbitc.passes.equalize import Setting
from kbitc.passes.equalize._channels import Site, own_weight, set_array, sites, weight_array

FloatArray = npt.NDArray[np.float32]
#: Smallest rotation that is worth it.
SMALLEST = 16


def equalize(setting: Setting) -> int:
    """Apply it to the model of the setting, in place. Returns the number of pairs that were changed."""
    changed = 0
    for site in sites(setting.nodes()):
        way = _way(site) if site.last else None
        if way is None:
            continue
        first, bias, size = way
        rotate_columns(first, size)
        if bias is not None:
            array = np.asarray(edit.constant(bias[0].inputs[bias[1]]), np.float32)
            value = edit.add_initializer(edit.root_graph(first), f"{first.name}.bias", turn(array, size))
            bias[0].replace_input_with(bias[1], value)
        for node in site.readers:
            set_array(node.inputs[1], turn(weight_array(node).T, size).T)
        changed += 1
    return changed


def hadamard(size: int) -> npt.NDArray[np.float64]:
    """The orthogonal, symmetric Sylvester matrix of a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / np.sqrt(size), np.float64)


def turn(array: npt.NDArray[np.float32], size: int) -> FloatArray:
    """Rotate runs of `size` elements along the last axis."""
    runs = array.astype(np.float64).reshape(*array.shape[:-1], -1, size) @ hadamard(size)
    return np.asarray(runs.reshape(array.shape), np.float32)


def rotate_columns(node: ir.Node, size: int) -> None:
    """Rotate the output channels of a MatMul."""
    set_array(node.inputs[1], turn(weight_array(node), size))


def _way(site: Site) -> tuple[ir.Node, tuple[ir.Node, int] | None, int] | None:
    """The MatMul at the other end, its bias as (Add, index), and the size of the rotation; None without one."""
    value, common, bias = site.value, site.channels, None
    if not site.alone:
        return None
    while True:
        node = value.producer()
        last = value.shape[-1] if value.shape is not None and len(value.shape) else None
        if node is None or node.domain or not isinstance(last, int):
            return None
        common = gcd(common, last)
        if node.op_type == "MatMul" and own_weight(node) is not None:
            size = common & -common
            return (node, bias, size) if size >= SMALLEST else None
        step, bias = _step(node, bias)
        if step is None or edit.only_use(step) is None:
            return None
        value = step


def _step(node: ir.Node, bias: tuple[ir.Node, int] | None) -> tuple[ir.Value | None, tuple[ir.Node, int] | None]:
    """The value before a linear step, and the bias found so far; None as the value when it is no such step."""
    if edit.is_op(node, "Reshape"):
        return node.inputs[0], bias
    if edit.is_op(node, "Transpose"):
        order = list(node.attributes.get_ints("perm", ()))
        return (node.inputs[0] if order and order[-1] == len(order) - 1 else None), bias
    if edit.is_op(node, "MatMul"):
        return node.inputs[1], bias
    if edit.is_op(node, "Add") and bias is None:
        for index in (0, 1):
            array = edit.constant(node.inputs[index])
            if array is not None and array.dtype == np.float32 and array.ndim == 1 and array.size > 1:
                return node.inputs[1 - index], (node, index)
    return None, bias
