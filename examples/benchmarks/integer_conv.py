"""Convolutions of static integer graphs, one thread, against onnxruntime in float32 and in int8 (QDQ).

    python examples/benchmarks/integer_conv.py [--target x86:avx2] [--only 3x3] [--rounds 30] [--bits 4] [--save]

Every row is one convolution by itself: codes in, codes out, with a requantization for every channel. kbitc reads and
writes channels last, as inside a compiled model; onnxruntime gets channels first, as its users do. The int8 contestant
is DequantizeLinear, Conv, QuantizeLinear on uint8 codes and int8 weights by channel, which onnxruntime fuses into one
integer convolution.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import float_ops
import harness
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
ZERO_IN, ZERO_OUT = 121, 7
SCALE_IN = np.float32(1 / 50)


@dataclass(frozen=True)
class Case:
    """A convolution: (C in, C out, height and width, kernel, stride, groups), bordered by half the kernel."""

    name: str
    sizes: tuple[int, int, int, int, int, int]

    @property
    def products(self) -> int:
        """Multiply-adds."""
        c, n, size, taps, stride, group = self.sizes
        out = (size + 2 * (taps // 2) - taps) // stride + 1
        return out * out * n * taps * taps * c // group


CASES = (
    Case("3x3 64->64 56x56", (64, 64, 56, 3, 1, 1)),
    Case("1x1 256->1024 14x14", (256, 1024, 14, 1, 1, 1)),
    Case("depthwise 3x3 s2 96 112x112", (96, 96, 112, 3, 2, 96)),
    Case("7x7 s2 3->64 224x224", (3, 64, 224, 7, 2, 1)),
    Case("3x3 512->512 7x7", (512, 512, 7, 3, 1, 1)),
    Case("1x1 24->144 56x56", (24, 144, 56, 1, 1, 1)),
    Case("depthwise 3x3 s1 192 28x28", (192, 192, 28, 3, 1, 192)),
)


@dataclass(frozen=True)
class Numbers:
    """What a convolution computes: codes x [1, C, H, W], levels w [N, C/g, k, k], their scales, that of the result."""

    x: Array
    w: Array
    scales: Array
    scale_out: np.float32


def numbers(case: Case, bits: int) -> Numbers:
    """Random codes and levels, and scales that spread the result over all codes."""
    c, n, size, taps, _, group = case.sizes
    random = np.random.default_rng(0)
    half = 2 ** (bits - 1)
    w = random.integers(-half, half, (n, c // group, taps, taps)).astype(np.int8)
    scales = (random.random(n) * 0.5 + 0.75).astype(np.float32) / np.float32(half * 40)
    x = random.integers(0, 256, (1, c, size, size)).astype(np.uint8)
    spread = np.sqrt(taps * taps * c / group) * float(w.std()) * 74 * float(SCALE_IN) * float(scales.mean())
    return Numbers(x, w, scales, np.float32(spread / 40))


def ours(case: Case, made: Numbers, bits: int, target: Any) -> Callable[[], Any]:
    """The kernel of the target's first rule."""
    from kbitc.graph.integer_functions import code_factor
    from kbitc.quant.levels import LevelTensor, of_levels
    from kbitc.targets.lower.contraction import Contraction, ConvAttributes, Requantization

    c, n, size, taps, stride, group = case.sizes
    view = np.ascontiguousarray(made.w.reshape(n, c // group, taps * taps).transpose(0, 2, 1))
    half = 2 ** (bits - 1)
    packed = LevelTensor((view.astype(np.int16) + half).astype(np.uint8), bits, tuple(range(-half, half)))
    ratios = made.scales.astype(np.float64) * float(SCALE_IN) / float(made.scale_out)
    fixed = np.array([code_factor(float(ratio)) for ratio in ratios], np.int32)
    pad = taps // 2
    out = (size + 2 * pad - taps) // stride + 1
    what = Contraction(
        "case", "conv", of_levels(view) if bits == 8 else packed, "uint8", (1, size, size, c), (1, out, out, n),
        conv=ConvAttributes((taps, taps), (stride, stride), (pad,) * 4, (1, 1), group), x_zero=ZERO_IN,
        requantize=Requantization(fixed[:, 0], fixed[:, 1], ZERO_OUT, 0, 255),
    )  # fmt: skip
    return float_ops.kernel(what, [np.ascontiguousarray(made.x.transpose(0, 2, 3, 1))], target)


def quantized_session(case: Case, made: Numbers) -> Callable[[], Any]:
    """onnxruntime on codes: DequantizeLinear, Conv, QuantizeLinear."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    _, _, _, taps, stride, group = case.sizes
    weights = {
        "sx": SCALE_IN, "zx": np.uint8(ZERO_IN), "w": made.w, "sw": made.scales,
        "zw": np.zeros(made.w.shape[0], np.int8), "sy": made.scale_out, "zy": np.uint8(ZERO_OUT),
    }  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "sx", "zx"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["wf"], axis=0),
        helper.make_node("Conv", ["xf", "wf"], ["yf"], strides=[stride] * 2, pads=[taps // 2] * 4, group=group),
        helper.make_node("QuantizeLinear", ["yf", "sy", "zy"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "case",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, made.x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [None] * 4)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": made.x})[0]


def float_session(case: Case, made: Numbers) -> Callable[[], Any]:
    """onnxruntime on the floats that the codes stand for."""
    from onnx import helper

    _, _, _, taps, stride, group = case.sizes
    x = ((made.x.astype(np.float32) - ZERO_IN) * SCALE_IN).astype(np.float32)
    w = (made.w * made.scales[:, None, None, None]).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[stride] * 2, pads=[taps // 2] * 4, group=group)
    return float_ops.session(node, {"x": x}, {"w": w}, 4)


def check(made: Numbers, mine: Array, codes: Array, floats: Array) -> None:
    """The codes are those of the float result, to one step: the ways round differently at the middle."""
    wanted = np.clip(np.rint(floats / made.scale_out) + ZERO_OUT, 0, 255)
    for found in (mine, codes.astype(np.int32)):
        if np.abs(found - wanted).max() > 1:
            raise SystemExit("a contestant is wrong by more than one code")


def main() -> None:
    """Run the cases, print a table each, and save the results where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="host")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--bits", type=int, default=8, help="of kbitc's weights; the others have 8")
    parser.add_argument("--save", action="store_true", help="write results/integer_conv.json")
    given = parser.parse_args()
    harness.pin()
    from kbitc.targets.target import parse_target

    target = parse_target(given.target)
    rows = []
    for case in CASES:
        if given.only not in case.name:
            continue
        made = numbers(case, given.bits)
        run = ours(case, made, given.bits, target)
        codes, floats = quantized_session(case, made), float_session(case, made)
        check(made, run().numpy().transpose(0, 3, 1, 2).astype(np.int32), codes(), floats())
        contestants = {"kbitc": run, "onnxruntime int8": codes, "onnxruntime float32": floats}
        timing = harness.interleave(contestants, given.rounds, clock=time.thread_time)
        harness.print_table(case.name, timing, against="onnxruntime float32")
        facts = {"target": target.name, "bits": given.bits, "multiply_adds": case.products}
        rows.append(timing.as_json(case.name, against="onnxruntime float32", **facts))
    if given.save:
        harness.save("integer_conv", rows, threads=1)


if __name__ == "__main__":
    main()
