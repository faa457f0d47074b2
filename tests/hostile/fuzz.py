"""Random valid graphs, and random damage to valid files. Same seed, same bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[np.generic]
Rng = np.random.Generator

_UNARY = ["Relu", "Sigmoid", "Tanh", "Neg", "Abs", "Exp", "Erf", "Softplus", "HardSwish", "Identity", "Sqrt", "Floor"]
_BINARY = ["Add", "Sub", "Mul", "Max", "Min"]


class Builder:
    """Grows a graph value by value. Each value has a known static shape; a few dims of the input may be symbolic."""

    def __init__(self, rng: Rng, opset: int) -> None:
        self.rng, self.opset = rng, opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.count = 0

    def node(self, op_type: str, inputs: list[str], shape: tuple[int, ...], **attributes: object) -> str:
        name = f"v{self.count}"
        self.count += 1
        self.nodes.append(helper.make_node(op_type, inputs, [name], f"{op_type}_{name}", **attributes))
        self.shapes[name] = shape
        return name

    def weight(self, array: Array) -> str:
        name = f"w{self.count}"
        self.count += 1
        if self.rng.random() < 0.3:
            tensor = numpy_helper.from_array(np.asarray(array), name)
            self.nodes.append(helper.make_node("Constant", [], [name], f"Constant_{name}", value=tensor))
        else:
            self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        self.shapes[name] = np.shape(array)
        return name

    def floats(self, *shape: int) -> str:
        return self.weight(self.rng.standard_normal(shape).astype(np.float32))

    def ints(self, *items: int) -> str:
        return self.weight(np.asarray(items, np.int64))

    def pick(self, rank: int | None = None) -> str:
        names = [name for name, shape in self.shapes.items() if name[0] != "w" and rank in (None, len(shape))]
        return names[int(self.rng.integers(len(names)))] if names else "x"


def _unary(b: Builder) -> None:
    source = b.pick()
    op_type = str(b.rng.choice(_UNARY))
    if op_type == "HardSwish" and b.opset < 14:
        op_type = "Relu"
    if op_type in ("Exp", "Sqrt"):
        source = b.node("Sigmoid", [source], b.shapes[source])
    b.node(op_type, [source], b.shapes[source])


def _binary(b: Builder) -> None:
    source = b.pick()
    shape = b.shapes[source]
    narrow = tuple(1 if b.rng.random() < 0.4 else dim for dim in shape[int(b.rng.integers(len(shape) + 1)) :])
    inputs = [source, b.floats(*narrow)] if b.rng.random() < 0.6 else [source, source]
    b.node(str(b.rng.choice(_BINARY)), inputs, shape)


def _matmul(b: Builder) -> None:
    source = b.pick()
    shape = b.shapes[source]
    if len(shape) < 2:
        return
    width = int(b.rng.integers(1, 9))
    if len(shape) == 2 and b.rng.random() < 0.5:
        transposed = bool(b.rng.random() < 0.5)
        weight = b.floats(width, shape[-1]) if transposed else b.floats(shape[-1], width)
        b.node("Gemm", [source, weight, b.floats(width)], (shape[0], width), transB=int(transposed))
        return
    b.node("MatMul", [source, b.floats(shape[-1], width)], (*shape[:-1], width))


def _conv(b: Builder) -> None:
    source = b.pick(4)
    shape = b.shapes.get(source, ())
    if len(shape) != 4 or min(shape[2:]) < 3:
        return
    channels, group = shape[1], shape[1] if b.rng.random() < 0.3 else 1
    outputs = channels if group > 1 else int(b.rng.integers(1, 7))
    pad, stride = int(b.rng.integers(0, 2)), int(b.rng.integers(1, 3))
    size = tuple((dim + 2 * pad - 3) // stride + 1 for dim in shape[2:])
    inputs = [source, b.floats(outputs, channels // group, 3, 3)]
    if b.rng.random() < 0.5:
        inputs.append(b.floats(outputs))
    out = b.node("Conv", inputs, (shape[0], outputs, *size), group=group, pads=[pad] * 4, strides=[stride] * 2)
    if b.rng.random() < 0.5:
        parameters = [b.floats(outputs) for _ in range(3)]
        variance = b.weight(b.rng.uniform(0.5, 2, outputs).astype(np.float32))
        b.node("BatchNormalization", [out, *parameters, variance], b.shapes[out])


def _pool(b: Builder) -> None:
    source = b.pick(4)
    shape = b.shapes.get(source, ())
    if len(shape) != 4 or min(shape[2:]) < 2:
        return
    if b.rng.random() < 0.3:
        b.node("GlobalAveragePool", [source], (*shape[:2], 1, 1))
        return
    size = tuple((dim - 2) // 2 + 1 for dim in shape[2:])
    kind = str(b.rng.choice(["MaxPool", "AveragePool"]))
    b.node(kind, [source], (*shape[:2], *size), kernel_shape=[2, 2], strides=[2, 2])


def _transpose(b: Builder) -> None:
    source = b.pick()
    shape = b.shapes[source]
    perm = [int(axis) for axis in b.rng.permutation(len(shape))]
    b.node("Transpose", [source], tuple(shape[axis] for axis in perm), perm=perm)


def _reshape(b: Builder) -> None:
    source = b.pick()
    shape = b.shapes[source]
    if b.rng.random() < 0.5 and len(shape) > 1:
        dims = b.node("Shape", [source], (len(shape),))
        first = b.node("Gather", [dims, b.ints(0)], (1,))
        target = b.node("Concat", [first, b.ints(-1)], (2,), axis=0)
        for name in (dims, first, target):
            del b.shapes[name]
        b.node("Reshape", [source, target], (shape[0], int(np.prod(shape[1:]))))
        return
    b.node("Reshape", [source, b.ints(*shape[:1], -1)], (shape[0], int(np.prod(shape[1:]))))


def _reduce(b: Builder) -> None:
    source = b.pick()
    shape = b.shapes[source]
    axis, keep = int(b.rng.integers(len(shape))), int(b.rng.integers(2))
    if len(shape) < 2:
        return
    rest = tuple(1 if i == axis else dim for i, dim in enumerate(shape) if keep or i != axis)
    op_type = str(b.rng.choice(["ReduceMean", "ReduceMax", "ReduceSum"]))
    if b.opset >= 18 or (op_type == "ReduceSum" and b.opset >= 13):
        b.node(op_type, [source, b.ints(axis)], rest, keepdims=keep)
    else:
        b.node(op_type, [source], rest, keepdims=keep, axes=[axis])


def _softmax(b: Builder) -> None:
    source = b.pick()
    b.node("Softmax", [source], b.shapes[source], axis=int(b.rng.integers(len(b.shapes[source]))))


def _concat(b: Builder) -> None:
    source = b.pick()
    shape = b.shapes[source]
    axis = int(b.rng.integers(len(shape)))
    b.node("Concat", [source, source], tuple(2 * d if i == axis else d for i, d in enumerate(shape)), axis=axis)


def _hard_swish(b: Builder) -> None:
    source = b.pick()
    shape = b.shapes[source]
    shifted = b.node("Add", [source, b.weight(np.float32(3))], shape)
    if b.opset >= 11:
        limits = [b.weight(np.float32(0)), b.weight(np.float32(6))]
        gate = b.node("Clip", [shifted, *limits], shape)
    else:
        gate = b.node("Clip", [shifted], shape, min=0.0, max=6.0)
    product = b.node("Mul", [source, gate], shape)
    b.node("Div", [product, b.weight(np.float32(6))], shape)


def _layer_norm(b: Builder) -> None:
    source = b.pick()
    shape = b.shapes[source]
    if b.opset >= 18 or len(shape) < 2:
        return
    narrow = (*shape[:-1], 1)
    mean = b.node("ReduceMean", [source], narrow, axes=[len(shape) - 1])
    centred = b.node("Sub", [source, mean], shape)
    square = b.node("Pow", [centred, b.weight(np.float32(2))], shape)
    variance = b.node("ReduceMean", [square], narrow, axes=[len(shape) - 1])
    spread = b.node("Sqrt", [b.node("Add", [variance, b.weight(np.float32(1e-3))], narrow)], narrow)
    normal = b.node("Div", [centred, spread], shape)
    b.node("Mul", [normal, b.floats(shape[-1])], shape)


STEPS: list[Callable[[Builder], None]] = [
    _unary, _binary, _matmul, _conv, _conv, _pool, _transpose, _reshape, _reduce, _softmax, _concat, _hard_swish,
    _layer_norm,
]  # fmt: skip


def random_model(seed: int) -> onnx.ModelProto:
    """A valid model of 3 to 14 steps with one input, opset 9 to 21. It runs with its true batch, in the doc string."""
    rng = np.random.default_rng(seed)
    opset = int(rng.choice([9, 11, 12, 13, 15, 17, 18, 21]))
    shape = tuple(int(dim) for dim in rng.integers(1, 9, int(rng.integers(2, 5))))
    builder = Builder(rng, opset)
    builder.shapes["x"] = shape
    for _ in range(int(rng.integers(3, 15))):
        STEPS[int(rng.integers(len(STEPS)))](builder)
    if not builder.nodes or not any(name.startswith("v") for name in builder.shapes):
        builder.node("Relu", ["x"], shape)
    outputs = [name for name in builder.shapes if name.startswith("v")][-2:]
    dims: list[int | str] = list(shape)
    if rng.random() < 0.5:
        dims[0] = "N"
    graph = helper.make_graph(
        builder.nodes,
        f"fuzz{seed}",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(builder.shapes[name]))
            for name in outputs
        ],
        builder.weights,
    )
    graph.doc_string = str(shape[0])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)


def input_shape(model: onnx.ModelProto, batch: int) -> tuple[int, ...]:
    """The shape of x, with N = batch."""
    dims = model.graph.input[0].type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else batch for dim in dims)


def damaged(data: bytes, seed: int) -> bytes:
    """The bytes of a file after one to four random flips, cuts, insertions or copies."""
    rng = np.random.default_rng(seed)
    result = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        place = int(rng.integers(len(result)))
        kind = int(rng.integers(4))
        if kind == 0:
            result[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del result[place : place + int(rng.integers(1, 16))]
        elif kind == 2:
            result[place:place] = rng.bytes(int(rng.integers(1, 16)))
        else:
            source = int(rng.integers(len(result)))
            result[place : place + 8] = result[source : source + 8]
        if len(result) < 16:
            break
    return bytes(result)
