"""Whole networks as exporters leave them, with random weights of realistic scale: for speed, not for accuracy.

    model = resnet50()        # image f32 [1, 3, 224, 224] -> scores f32 [1, 1000]
    model = mobilenet_v2()    # the same
    model = bert_base(128)    # token ids, types and mask i64 [1, 128] -> f32 [1, 128, 768]
    model = decoder_step(256) # token f32 [1, 1, 768], keys and values of 256 tokens -> f32 [1, 1, 768], 257 tokens

Convolutions stand before a BatchNormalization each, GELU and attention are spelled out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
WIDTH, HEADS, HEAD, LAYERS = 768, 12, 64, 12
VOCABULARY = 30522


@dataclass
class Graph:
    """Nodes and initializers as they come; every method gives the name of a new value."""

    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    arrays: dict[str, Array] = field(default_factory=dict)

    def constant(self, array: Any) -> str:
        """An initializer."""
        name = f"c{len(self.arrays)}"
        self.arrays[name] = np.asarray(array)
        return name

    def floats(self, *shape: int, scale: float, mean: float = 0.0) -> str:
        """An initializer of normal numbers."""
        return self.constant((mean + scale * self.random.standard_normal(shape)).astype(np.float32))

    def add(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """A node with one output."""
        name = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=f"n{len(self.nodes)}", **attributes))
        return name

    def conv(
        self, x: str, given: int, made: int, kernel: int, stride: int = 1, group: int = 1, gain: float = 1.0
    ) -> str:
        """Conv without bias, then BatchNormalization: [1, given, H, W] -> [1, made, H/stride, W/stride]."""
        fan = given // group * kernel * kernel
        w = self.floats(made, given // group, kernel, kernel, scale=float(np.sqrt(2 / fan)))
        attributes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4, "group": group}
        x = self.add("Conv", x, w, **attributes)
        spread = np.abs(1 + 0.1 * self.random.standard_normal(made)).astype(np.float32)
        numbers = [
            self.floats(made, scale=0.1 * gain, mean=gain),
            self.floats(made, scale=0.1),
            self.floats(made, scale=0.1),
        ]
        return self.add("BatchNormalization", x, *numbers, self.constant(spread), epsilon=1e-5)

    def linear(self, x: str, given: int, made: int) -> str:
        """MatMul and Add: [..., given] -> [..., made]."""
        w = self.floats(given, made, scale=float(1 / np.sqrt(given)))
        return self.add("Add", self.add("MatMul", x, w), self.floats(made, scale=0.02))

    def norm(self, x: str) -> str:
        """LayerNormalization over the last axis."""
        scale, bias = self.floats(WIDTH, scale=0.1, mean=1.0), self.floats(WIDTH, scale=0.1)
        return self.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-12)

    def gelu(self, x: str) -> str:
        """x * 0.5 * (1 + erf(x / sqrt 2))."""
        turned = self.add("Erf", self.add("Div", x, self.constant(np.float32(np.sqrt(2)))))
        product = self.add("Mul", x, self.add("Add", turned, self.constant(np.float32(1))))
        return self.add("Mul", product, self.constant(np.float32(0.5)))

    def heads(self, x: str, rows: int) -> str:
        """[1, rows, 768] -> [1, 12, rows, 64]."""
        split = self.add("Reshape", x, self.constant(np.array([1, rows, HEADS, HEAD], np.int64)))
        return self.add("Transpose", split, perm=[0, 2, 1, 3])

    def attend(self, q: str, keys: str, values: str, rows: int, mask: str = "") -> str:
        """Softmax of scaled q keys^T (and a mask), times the values: [1, rows, 768]."""
        scores = self.add("MatMul", q, self.add("Transpose", keys, perm=[0, 1, 3, 2]))
        scores = self.add("Div", scores, self.constant(np.float32(np.sqrt(HEAD))))
        if mask:
            scores = self.add("Add", scores, mask)
        mixed = self.add("MatMul", self.add("Softmax", scores, axis=-1), values)
        joined = self.add("Transpose", mixed, perm=[0, 2, 1, 3])
        return self.add("Reshape", joined, self.constant(np.array([1, rows, WIDTH], np.int64)))

    def classes(self, x: str, channels: int) -> None:
        """Mean over the image, then Gemm to 1000 scores named `scores`."""
        x = self.add("Flatten", self.add("GlobalAveragePool", x))
        w = self.floats(1000, channels, scale=float(1 / np.sqrt(channels)))
        self.add("Gemm", x, w, self.floats(1000, scale=0.02), transB=1, output="scores")

    def model(self, inputs: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]], ids: bool) -> Any:
        """The ModelProto; inputs are int64 where `ids`, else float32."""
        kind = TensorProto.INT64 if ids else TensorProto.FLOAT
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
            [numpy_helper.from_array(array, name) for name, array in self.arrays.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def resnet50() -> onnx.ModelProto:
    """He et al. 2015 (arXiv 1512.03385), stride in the 3x3 convolution as torchvision has it."""
    g = Graph()
    x = g.add("Relu", g.conv("image", 3, 64, 7, 2))
    x = g.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    given = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        narrow = 64 << stage
        for block in range(blocks):
            stride = 2 if block == 0 and stage else 1
            y = g.add("Relu", g.conv(x, given, narrow, 1))
            y = g.add("Relu", g.conv(y, narrow, narrow, 3, stride))
            y = g.conv(y, narrow, 4 * narrow, 1, gain=0.3)
            beside = x if block else g.conv(x, given, 4 * narrow, 1, stride)
            x, given = g.add("Relu", g.add("Add", y, beside)), 4 * narrow
    g.classes(x, given)
    return g.model({"image": (1, 3, 224, 224)}, {"scores": (1, 1000)}, ids=False)


def mobilenet_v2() -> onnx.ModelProto:
    """Sandler et al. 2018 (arXiv 1801.04381), table 2, width 1."""
    g = Graph()
    low, high = g.constant(np.float32(0)), g.constant(np.float32(6))
    x, given = g.add("Clip", g.conv("image", 3, 32, 3, 2), low, high), 32
    settings = (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    )  # fmt: skip
    for expand, made, blocks, first in settings:
        for block in range(blocks):
            wide, y = expand * given, x
            if expand > 1:
                y = g.add("Clip", g.conv(y, given, wide, 1), low, high)
            y = g.add("Clip", g.conv(y, wide, wide, 3, 1 if block else first, wide), low, high)
            y = g.conv(y, wide, made, 1)
            x, given = (g.add("Add", x, y) if block else y), made
    g.classes(g.add("Clip", g.conv(x, given, 1280, 1), low, high), 1280)
    return g.model({"image": (1, 3, 224, 224)}, {"scores": (1, 1000)}, ids=False)


def bert_base(rows: int = 128) -> onnx.ModelProto:
    """Devlin et al. 2018 (arXiv 1810.04805): the encoder with its embeddings, without a head."""
    g = Graph()
    x = g.add("Gather", g.floats(VOCABULARY, WIDTH, scale=0.04), "ids")
    x = g.add("Add", x, g.add("Gather", g.floats(2, WIDTH, scale=0.02), "types"))
    x = g.norm(g.add("Add", x, g.floats(1, rows, WIDTH, scale=0.02)))
    mask = g.add("Cast", g.add("Unsqueeze", "mask", g.constant(np.array([1, 2], np.int64))), to=TensorProto.FLOAT)
    mask = g.add("Mul", g.add("Sub", g.constant(np.float32(1)), mask), g.constant(np.float32(-10000)))
    for _ in range(LAYERS):
        q, keys, values = (g.heads(g.linear(x, WIDTH, WIDTH), rows) for _ in range(3))
        y = g.linear(g.attend(q, keys, values, rows, mask), WIDTH, WIDTH)
        x = g.norm(g.add("Add", x, y))
        y = g.linear(g.gelu(g.linear(x, WIDTH, 4 * WIDTH)), 4 * WIDTH, WIDTH)
        x = g.norm(g.add("Add", x, y))
    g.add("Identity", x, output="encoded")
    shape = (1, rows)
    return g.model({"ids": shape, "types": shape, "mask": shape}, {"encoded": (1, rows, WIDTH)}, ids=True)


def decoder_step(past: int = 256) -> onnx.ModelProto:
    """One token through the layers of GPT-2 (small) with keys and values of `past` tokens, which it hands on."""
    g = Graph()
    x = "token"
    inputs, outputs = {"token": (1, 1, WIDTH)}, {"next": (1, 1, WIDTH)}
    for layer in range(LAYERS):
        normed = g.norm(x)
        q, *new = (g.heads(g.linear(normed, WIDTH, WIDTH), 1) for _ in range(3))
        held = []
        for kind, value in zip(("keys", "values"), new, strict=True):
            inputs[f"past_{kind}_{layer}"] = (1, HEADS, past, HEAD)
            outputs[f"{kind}_{layer}"] = (1, HEADS, past + 1, HEAD)
            held.append(g.add("Concat", f"past_{kind}_{layer}", value, axis=2, output=f"{kind}_{layer}"))
        x = g.add("Add", x, g.linear(g.attend(q, held[0], held[1], 1), WIDTH, WIDTH))
        y = g.linear(g.gelu(g.linear(g.norm(x), WIDTH, 4 * WIDTH)), 4 * WIDTH, WIDTH)
        x = g.add("Add", x, y)
    g.add("Identity", g.norm(x), output="next")
    return g.model(inputs, outputs, ids=False)


def feeds(model: onnx.ModelProto, seed: int = 0) -> dict[str, Array]:
    """Inputs: floats of standard normal distribution; ids below the vocabulary, types 0, masks 1."""
    random = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for value in model.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            made[value.name] = random.standard_normal(shape).astype(np.float32)
        elif value.name in ("ids", "tokens"):
            made[value.name] = random.integers(0, VOCABULARY, shape)
        else:
            made[value.name] = np.full(shape, int(value.name == "mask"), np.int64)
    return made
