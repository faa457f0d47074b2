"""Which operators have a quantizable weight, where it sits, and how it is seen as [N, T, C].

N: output channels (rows of an embedding), T: kernel taps (row-major), C: channels of the reduction within a tap.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

FloatArray = npt.NDArray[np.float32]
#: In the names of the tables of a Fourier transform, which are no trained weights and stay float.
WAVES = "kbitc_waves"


@dataclass(frozen=True)
class WeightUse:
    """How one operator type uses its weight.

    Attributes:
        kind: how the lowering treats it: matmul, conv or embedding.
        weight_input: index of the weight among the node's inputs.
        activation_input: index of the input that may become int8, or None.
        ranks: ranks of the weight that are understood.
        channel_axis: axis of the ONNX tensor that is N.
        reduction_axis: axis of the ONNX tensor that is C.
    """

    kind: str
    weight_input: int
    activation_input: int | None
    ranks: tuple[int, ...]
    channel_axis: int
    reduction_axis: int


WEIGHT_USES: dict[str, WeightUse] = {
    "MatMul": WeightUse("matmul", 1, 0, (2,), channel_axis=1, reduction_axis=0),
    "Conv": WeightUse("conv", 1, 0, (3, 4), channel_axis=0, reduction_axis=1),
    "Gather": WeightUse("embedding", 0, None, (2,), channel_axis=0, reduction_axis=1),
}


def to_view(weight: npt.NDArray[np.generic], kind: str) -> npt.NDArray[np.generic]:
    """ONNX layout -> [N, T, C]. matmul: [K, N]; conv: [N, C, *kernel]; embedding: [rows, width]."""
    if kind == "matmul":
        return np.ascontiguousarray(weight.T)[:, None, :]
    if kind == "embedding":
        return weight[:, None, :]
    n, c = weight.shape[:2]
    return np.ascontiguousarray(weight.reshape(n, c, -1).transpose(0, 2, 1))


def from_view(view: npt.NDArray[np.generic], kind: str, shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    """The inverse of `to_view`; shape is that of the ONNX tensor."""
    if kind == "matmul":
        return np.ascontiguousarray(view[:, 0, :].T)
    if kind == "embedding":
        return np.ascontiguousarray(view[:, 0, :])
    return np.ascontiguousarray(view.transpose(0, 2, 1)).reshape(shape)


def view_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(N, T, C) of a weight of the given ONNX shape."""
    if kind == "matmul":
        return shape[1], 1, shape[0]
    if kind == "embedding":
        return shape[0], 1, shape[1]
    return shape[0], prod(shape[2:]), shape[1]


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer."""
    return value is not None and value.const_value is not None and value.producer() is None


def weight_source(node: ir.Node) -> tuple[ir.Value | None, str]:
    """The initializer behind the weight operand and the layout it has there.

    MatMul(x, Transpose(W)) reads W row by row, as an embedding does: that is how a tied output projection keeps one
    copy of the weight.

    Returns:
        (initializer or None when the operand is not a constant, kind).
    """
    use = WEIGHT_USES[node.op_type]
    weight = node.inputs[use.weight_input]
    kind = use.kind
    if use.kind == "matmul" and weight is not None:
        producer = weight.producer()
        turned = producer is not None and producer.op_type == "Transpose" and producer.domain == ""
        if turned and producer is not None and list(producer.attributes.get_ints("perm", ())) == [1, 0]:
            weight, kind = producer.inputs[0], "embedding"
    return (weight, kind) if is_constant(weight) else (None, kind)


def reason_not_quantizable(node: ir.Node) -> str | None:
    """Why the weight of a node of a type in WEIGHT_USES stays as it is; None when it can be quantized."""
    use = WEIGHT_USES[node.op_type]
    weight, _ = weight_source(node)
    if weight is None or weight.const_value is None:
        return "its second operand is not a constant" if use.kind == "matmul" else "its weight is not a constant"
    if weight.is_graph_input():
        return "its weight is a graph input"
    if weight.dtype != ir.DataType.FLOAT:
        return f"its weight is {weight.dtype}, not float32"
    shape = weight.const_value.shape.numpy()
    if len(shape) not in use.ranks:
        return f"its weight has rank {len(shape)}"
    if 0 in shape:
        return "its weight is empty"
    if use.kind == "embedding" and node.attributes.get_int("axis", 0) != 0:
        return "it gathers along another axis than 0"
    return None


def conv_group(node: ir.Node) -> int:
    """The group attribute of a convolution."""
    return node.attributes.get_int("group", 1)


def kernel_shape(node: ir.Node) -> tuple[int, ...]:
    """The spatial dims of a convolution's weight, which is a constant."""
    weight = node.inputs[WEIGHT_USES[node.op_type].weight_input]
    shape = weight.const_value.shape.numpy() if weight is not None and weight.const_value is not None else ()
    return tuple(int(dim) for dim in shape[2:])
