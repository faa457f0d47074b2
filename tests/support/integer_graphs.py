"""Small models that run on integers: a convolutional one and a transformer block, with made-up scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph import functions
from kbitc.graph.integer_nonlinear import powers
from kbitc.graph.shapes import infer_shapes
from kbitc.quant.packing import pack_dense

Array = npt.NDArray[Any]
OPSET = 21
TYPES = {
    **dict.fromkeys(("Requantize", "IntegerAdd", "IntegerPRelu", "Table", "IntegerSoftmax"), ir.DataType.UINT8),
    **dict.fromkeys(("IntegerMul", "Rescale", "IntegerLayerNorm", "IntegerRMSNorm"), ir.DataType.INT32),
    **dict.fromkeys(("IntegerExp", "IntegerSum", "IntegerQuotient"), ir.DataType.INT32),
    **dict.fromkeys(("IntegerReduceL2", "IntegerSqrt"), ir.DataType.INT32),
    **dict.fromkeys(("LevelsKBit", "BlockLevelsKBit"), ir.DataType.INT8),
}


@dataclass
class Graph:
    """Builds a graph node by node; every value is named after its node."""

    nodes: list[ir.Node] = field(default_factory=list)
    initializers: list[ir.Value] = field(default_factory=list)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    used: set[str] = field(default_factory=set)

    def constant(self, array: Array | int) -> ir.Value:
        """An initializer; an int is an int32 scalar."""
        array = np.array(array, np.int32) if isinstance(array, int) else array
        name = f"c{len(self.initializers)}"
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        self.initializers.append(value)
        return value

    def node(self, op_type: str, *inputs: ir.Value | Array | int, **attributes: Any) -> ir.Value:
        """One node and its output; arrays become initializers."""
        given = [item if isinstance(item, ir.Value) else self.constant(item) for item in inputs]
        own = op_type in TYPES
        name = f"n{len(self.nodes)}_{op_type}"
        node = ir.node(op_type, given, attributes=attributes, domain=functions.DOMAIN if own else "", name=name)
        node.outputs[0].name = name
        if own:
            self.used.add(op_type)
            node.outputs[0].type = ir.TensorType(TYPES[op_type])
        self.nodes.append(node)
        return node.outputs[0]

    def requantize(
        self, acc: ir.Value, terms: int, n: int = 1, axis: int = 1, zero: int = 128, **clip: int
    ) -> ir.Value:
        """Codes of accumulators of about `terms` products of 8-bit numbers; every other time by factors of 24 bits."""
        shift = np.full(n, 31 + int(np.log2(np.sqrt(terms) * 75)), np.int32)
        multiplier = self.random.integers(2**30, 2**31 - 1, n).astype(np.int32)
        if len(self.nodes) % 2:
            multiplier = multiplier & -256 | 128
        return self.node("Requantize", acc, multiplier, shift, zero, axis=axis, **{"low": 0, "high": 255, **clip})

    def levels(self, shape: tuple[int, int, int], bits: int, block: int = 0) -> ir.Value:
        """LevelsKBit of a random weight [N, T, C] in its ONNX layout for a 3x3 or 1x1 convolution, or a MatMul."""
        codes = self.random.integers(0, 2**bits, shape).astype(np.uint8)
        grid = np.sort(self.random.choice(np.arange(-16, 16), 2**bits, replace=False)).astype(np.int8)
        stream, sizes = pack_dense(codes, bits), np.array(shape, np.int64)
        if not block:
            return self.node("LevelsKBit", stream, grid, sizes, bits=bits)
        factors = self.random.integers(-7, 8, (*shape[:2], -(-shape[2] // block))).astype(np.int8)
        return self.node("BlockLevelsKBit", stream, grid, factors, sizes, bits=bits, block=block)

    def conv(self, x: ir.Value, weight: Array | ir.Value, n: int, terms: int, zero: int = 128, **more: Any) -> ir.Value:
        """ConvInteger with bias and requantization."""
        clip = {key: more.pop(key) for key in ("low", "high") if key in more}
        acc = self.node("ConvInteger", x, weight, np.array(zero, np.uint8), **more)
        bias = self.random.integers(-5000, 5000, (1, n, 1, 1)).astype(np.int32)
        return self.requantize(self.node("Add", acc, bias), terms, n, **clip)

    def matmul(self, x: ir.Value, weight: Array | ir.Value, n: int, terms: int, rank: int = 3) -> ir.Value:
        """MatMulInteger with bias and requantization."""
        acc = self.node("MatMulInteger", x, weight, np.array(128, np.uint8))
        bias = self.random.integers(-5000, 5000, n).astype(np.int32)
        return self.requantize(self.node("Add", acc, bias), terms, n, rank - 1)

    def weight(self, *shape: int) -> Array:
        """Random int8."""
        return self.random.integers(-128, 128, shape).astype(np.int8)

    def finish(self, x: ir.Value, outputs: Sequence[ir.Value]) -> ir.Model:
        """The model with its functions."""
        graph = ir.Graph(
            [x], list(outputs), nodes=self.nodes, initializers=self.initializers, opset_imports={"": OPSET, "kbitc": 1},
            name="g",
        )  # fmt: skip
        model = ir.Model(graph, ir_version=10)
        functions.add_functions(model, sorted(self.used), OPSET)
        infer_shapes(model)
        return model


def feed(shape: Sequence[int], seed: int = 0) -> Array:
    """Floats that quantize to all codes."""
    return np.random.default_rng(seed).normal(0, 1.2, shape).astype(np.float32)


def _input(*shape: int | str) -> ir.Value:
    return ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


def convolutional(batch: int | str = 1) -> ir.Model:
    """Every operator of a static CNN: strided, dilated, grouped, depthwise and k-bit convolutions, pools, sums."""
    g, x = Graph(), _input(batch, 3, 20, 18)
    scale = np.array(1 / 32, np.float32)
    q = g.node("QuantizeLinear", x, scale, np.array(128, np.uint8))
    first = g.conv(q, g.weight(20, 3, 3, 3), 20, 27, strides=[2, 2], pads=[1, 1, 1, 1], low=128)
    depth = g.conv(first, g.weight(20, 1, 3, 3), 20, 9, group=20, pads=[1, 1, 1, 1], high=200)
    point = g.node("Transpose", g.levels((20, 1, 20), 4), perm=[0, 2, 1])
    wide = g.conv(depth, g.node("Reshape", point, np.array([20, 20, 1, 1])), 20, 20)
    residual = g.node("IntegerAdd", wide, first, 128, 128, 1_500_000, -900_000, 21, 120, low=0, high=255)
    swished = g.node("Table", residual, g.random.integers(0, 256, 256).astype(np.uint8))
    slopes = np.linspace(-(1 << 21), 1 << 21, 20).astype(np.int32).reshape(20, 1, 1)
    bent = g.node("IntegerPRelu", swished, slopes, 131, 1_700_000, 21, 120, low=0, high=255)
    grouped = g.conv(bent, g.weight(8, 10, 3, 3), 8, 90, group=2, dilations=[1, 2], pads=[0, 2, 1, 2])
    pooled = g.node("MaxPool", grouped, kernel_shape=[2, 2], strides=[1, 1])
    both = g.node("Concat", pooled, pooled, axis=1)
    padded = g.node("Pad", both, np.array([0, 0, 1, 0, 0, 0, 0, 1]), np.array(128, np.uint8))
    shape = np.array([1, 1, 2, 2], np.float32)
    large = g.node("Resize", padded, g.constant(np.zeros(0, np.float32)), shape, mode="nearest")
    product = g.node("IntegerMul", large, large, 128, 100)
    product = g.requantize(product, 1, zero=3)
    mean = g.node("ReduceSum", g.node("Sub", g.node("Cast", product, to=6), 3), np.array([2, 3]), keepdims=1)
    gate = g.requantize(mean, 16)
    flat = g.node("Flatten", gate)
    head = g.node("MatMulInteger", flat, g.weight(16, 10), np.array(128, np.uint8))
    logits = g.node("Mul", g.node("Cast", head, to=1), np.array(1e-4, np.float32))
    back = g.node("DequantizeLinear", large, scale, np.array(128, np.uint8))
    return g.finish(x, [logits, back])


def image(batch: int | str = 1, height: int | str = 20, width: int | str = 18) -> ir.Model:
    """Convolutions whose borders lie in memory: dense and depthwise, with steps, of channels that fill no register."""
    g = Graph()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((batch, 3, height, width)))
    scale = np.array(1 / 32, np.float32)
    q = g.node("QuantizeLinear", x, scale, np.array(128, np.uint8))
    first = g.conv(q, g.weight(20, 3, 3, 3), 20, 27, strides=[2, 2], pads=[1, 1, 1, 1], low=128)
    depth = g.conv(first, g.weight(20, 1, 3, 3), 20, 9, group=20, pads=[1, 0, 2, 1], strides=[1, 2], high=200)
    dense = g.conv(depth, g.weight(32, 20, 3, 3), 32, 90, pads=[1, 1, 1, 1])
    return g.finish(x, [g.node("DequantizeLinear", dense, scale, np.array(128, np.uint8))])


def transformer(batch: int | str = 2, length: int | str = 13, width: int = 48, heads: int = 3) -> ir.Model:
    """Attention and a feed-forward layer; weights of 8, 4 and 3 bits, one in two levels."""
    g, x = Graph(), _input(batch, length, width)
    scale = np.array(1 / 32, np.float32)
    q = g.node("QuantizeLinear", x, scale, np.array(128, np.uint8))
    split = np.array([0, 0, heads, width // heads])
    parts = []
    for bits, block in ((8, 0), (4, 0), (3, 32)):
        weight: Array | ir.Value = g.weight(width, width)
        if bits < 8:
            rows = g.node("Reshape", g.levels((width, 1, width), bits, block), np.array([width, width]))
            weight = g.node("Transpose", rows, perm=[1, 0])
        parts.append(g.node("Reshape", g.matmul(q, weight, width, width), split))
    query = g.node("Transpose", parts[0], perm=[0, 2, 1, 3])
    key = g.node("Transpose", parts[1], perm=[0, 2, 3, 1])
    value = g.node("Transpose", parts[2], perm=[0, 2, 1, 3])
    zeros = np.array(128, np.uint8), np.array(120, np.uint8)
    scores = g.requantize(g.node("MatMulInteger", query, key, *zeros), width // heads, zero=0)
    weights = g.node("Table", scores, np.sort(g.random.integers(0, 256, 256)).astype(np.uint8))
    mixed = g.requantize(g.node("MatMulInteger", weights, value, np.array(0, np.uint8), zeros[1]), 13)
    merged = g.node("Reshape", g.node("Transpose", mixed, perm=[0, 2, 1, 3]), np.array([0, 0, width]))
    out = g.matmul(merged, g.weight(width, width), width, width)
    summed = g.node("IntegerAdd", out, q, 128, 128, 1_000_000, 700_000, 21, 128, low=0, high=255)
    inner = g.node(
        "Table", g.matmul(summed, g.weight(width, 70), 70, width), g.random.integers(0, 256, 256).astype(np.uint8)
    )
    outer = g.matmul(inner, g.weight(70, width), width, 70)
    tail = [g.node("DequantizeLinear", value, scale) for value in _statistics(g, outer, width)]
    return g.finish(x, [g.node("DequantizeLinear", outer, scale, np.array(128, np.uint8)), *tail])


def _statistics(g: Graph, codes: ir.Value, width: int) -> list[ir.Value]:
    """What an integer-only graph computes on int32 numbers beside normalizations: u8 [B, L, C] -> i32."""
    wide = [np.array(number, np.int64) for number in (1, 1 << 14, 1 << 29)]
    number = g.node("Sub", g.node("Cast", codes, to=6), 128)
    gain = g.random.integers(2**29, 2**30, width).astype(np.int32)
    rms = g.node("IntegerRMSNorm", number, gain, wide[0], 32)
    axes = np.array([1], np.int64)
    sizes = g.node("Gather", g.node("Shape", rms), axes)
    count = g.node("ReduceProd", sizes, keepdims=0)
    mean = g.node("IntegerSum", rms, axes, wide[1], count, wide[2], keepdims=0)
    length = g.node("IntegerReduceL2", rms, np.array([2], np.int64), np.array(4, np.int64), keepdims=1)
    unit = g.node("IntegerQuotient", rms, length, wide[1], wide[0], wide[2])
    power = g.node("IntegerExp", rms, 9000, 1_400_000_000, 32, powers())
    root = g.node("IntegerSqrt", power, np.array(1 << 20, np.int64))
    return [mean, unit, root]
