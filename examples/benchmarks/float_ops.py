"""Float32 contractions of one thread against onnxruntime: matrix products, attention products, convolutions.

    python examples/benchmarks/float_ops.py [--target x86:avx2] [--only conv] [--rounds 30] [--save]

Every row is one operator by itself. kbitc reads and writes convolutions channels last, as inside a compiled model;
onnxruntime gets them channels first, as its users do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import operators

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """One operator. `sizes`: matmul (M, C, N); attention (heads, M, C, N); conv see `convolution`."""

    name: str
    kind: str
    sizes: tuple[int, ...]


CASES = (
    Case("matmul 128x384x384", "matmul", (128, 384, 384)),
    Case("matmul 128x384x1536", "matmul", (128, 384, 1536)),
    Case("matmul 128x1536x384", "matmul", (128, 1536, 384)),
    Case("matmul 1x4096x4096", "matmul", (1, 4096, 4096)),
    Case("attention scores 12x128x32x128", "batch_matmul", (12, 128, 32, 128)),
    Case("attention values 12x128x128x32", "batch_matmul", (12, 128, 128, 32)),
    Case("conv 3x3 64->64 56x56", "conv", (64, 64, 56, 3, 1, 1)),
    Case("conv 1x1 256->1024 14x14", "conv", (256, 1024, 14, 1, 1, 1)),
    Case("conv 7x7 s2 3->64 224x224", "conv", (3, 64, 224, 7, 2, 1)),
    Case("depthwise 3x3 s2 96 112x112", "conv", (96, 96, 112, 3, 2, 96)),
    Case("depthwise 3x3 s1 192 28x28", "conv", (192, 192, 28, 3, 1, 192)),
)


def random(seed: int, *shape: int) -> FloatArray:
    """Uniform numbers in [-1, 1)."""
    return np.asarray(np.random.default_rng(seed).random(shape, np.float32) * 2 - 1, np.float32)


def session(node: Any, inputs: dict[str, FloatArray], weights: dict[str, FloatArray], rank: int) -> Callable[[], Any]:
    """A call of onnxruntime with one thread on a model of one node."""
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [node],
        "case",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return operators.in_onnxruntime(model, inputs)


def kernel(contraction: Any, inputs: list[npt.NDArray[Any]], target: Any) -> Callable[[], Any]:
    """A call of the kernel that the first rule of the target emits for a contraction."""
    from tvm import relax

    from kbitc.targets.lower.context import Context

    ctx = Context(target)
    variables = [relax.Var(f"x{i}", relax.TensorType(array.shape, str(array.dtype))) for i, array in enumerate(inputs)]
    rule = next(r for r in target.contraction_rules() if r.match(contraction, target) is None)
    with ctx.builder.function("main"):
        with ctx.builder.dataflow():
            result = ctx.builder.emit_output(rule.emit(ctx, contraction, variables))
        ctx.builder.emit_func_output(result, params=[*variables, *ctx.weight_parameters()])
    return operators.in_kbitc(ctx.builder.get(), [*inputs, *ctx.weights.values()], target)


def matmul(sizes: tuple[int, ...], target: Any) -> operators.Made:
    """x [M, C] by a constant [C, N]."""
    from onnx import helper

    from kbitc.targets.lower.contraction import Contraction

    m, c, n = sizes
    x, weight = random(0, m, c), random(1, c, n)
    view = np.ascontiguousarray(weight.T)[:, None, :]
    ours = kernel(Contraction("case", "matmul", view, "float32", (m, c), (m, n)), [x], target)
    theirs = session(helper.make_node("MatMul", ["x", "w"], ["y"]), {"x": x}, {"w": weight}, 2)
    return operators.Made(ours, theirs, (ours().numpy(), theirs()))


def attention(sizes: tuple[int, ...], target: Any) -> operators.Made:
    """a [1, heads, M, C] by b [1, heads, C, N]."""
    from onnx import helper

    from kbitc.targets.lower.contraction import Contraction

    heads, m, c, n = sizes
    a, b = random(0, 1, heads, m, c), random(1, 1, heads, c, n)
    out = (1, heads, m, n)
    ours = kernel(Contraction("case", "batch_matmul", None, "float32", a.shape, out, b_shape=b.shape), [a, b], target)
    theirs = session(helper.make_node("MatMul", ["a", "b"], ["y"]), {"a": a, "b": b}, {}, 4)
    return operators.Made(ours, theirs, (ours().numpy(), theirs()))


def convolution(sizes: tuple[int, ...], target: Any) -> operators.Made:
    """Sizes (C in, C out, height and width, kernel, stride, groups); bordered by half the kernel."""
    from onnx import helper

    from kbitc.targets.lower.contraction import Contraction, ConvAttributes

    c, n, size, taps, stride, group = sizes
    pad = taps // 2
    x, weight = random(0, 1, c, size, size), random(1, n, c // group, taps, taps)
    out = (size + 2 * pad - taps) // stride + 1
    view = np.ascontiguousarray(weight.reshape(n, c // group, taps * taps).transpose(0, 2, 1))
    geometry = ConvAttributes((taps, taps), (stride, stride), (pad,) * 4, (1, 1), group)
    what = Contraction("case", "conv", view, "float32", (1, size, size, c), (1, out, out, n), conv=geometry)
    ours = kernel(what, [np.ascontiguousarray(x.transpose(0, 2, 3, 1))], target)
    attributes: dict[str, Any] = {"strides": [stride] * 2, "pads": [pad] * 4, "group": group}
    theirs = session(helper.make_node("Conv", ["x", "w"], ["y"], **attributes), {"x": x}, {"w": weight}, 4)
    return operators.Made(ours, theirs, (ours().numpy().transpose(0, 3, 1, 2), theirs()))


MAKERS: dict[str, Callable[[tuple[int, ...], Any], operators.Made]] = {
    "matmul": matmul,
    "batch_matmul": attention,
    "conv": convolution,
}


def made(case: Case, target: Any) -> operators.Made:
    """The contestants of a case."""
    return MAKERS[case.kind](case.sizes, target)


if __name__ == "__main__":
    operators.race("float_ops", str(__doc__), CASES, made, close=1e-3)
