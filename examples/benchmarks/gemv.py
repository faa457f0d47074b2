"""Products of few or many rows with one weight at every k, against onnxruntime, OpenVINO and ggml, one thread.

    python examples/benchmarks/gemv.py [--shapes NxK ...] [--layers 1 8] [--rows 1 8 32 128 512] [--schemes int4:b32]

x [rows, K] times a weight of shape NxK, or one after another as many as --layers says (square ones only). One layer of
4096x4096 lies in a large third-level cache and shows the arithmetic; eight layers come from memory, as in a real
decoder, and show the bytes; 768x768 shows the cost of a call.
kbitc's time includes the quantization of the activations, as onnxruntime's with accuracy_level 4 does.
All engines work in the calling thread, so that its processor time is measured. The machine's limits are probed in the
same run. OpenVINO and ggml are there where they can be imported (`peers.py` says how to get them).
Writes results/gemv.json (one row of activations) and results/gemm.json (more); `plots.py` draws them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import peers
from onnx import TensorProto, helper, numpy_helper

import kbitc
from kbitc.targets.probe import probe
from kbitc.targets.target import parse_target

ROUNDS = 60
FEWER_ROUNDS = 15
MANY_ROWS = 128
FEWEST_ROUNDS = 5
# Weights of this many layers do not fit the caches at 4 bits and more: they come from memory.
MEMORY_LAYERS = 8
BLOCK = 32
# MatMulNBits of onnxruntime: bits, block, accuracy_level (4 is int8 arithmetic, 0 is float).
N_BITS = {
    "onnxruntime MatMulNBits 4 bits": (4, 32, 4),
    "onnxruntime MatMulNBits 4 bits, block 128": (4, 128, 4),
    "onnxruntime MatMulNBits 4 bits, level 0": (4, 32, 0),
    "onnxruntime MatMulNBits 4 bits, block 128, level 0": (4, 128, 0),
    "onnxruntime MatMulNBits 2 bits, block 128": (2, 128, 4),
    "onnxruntime MatMulNBits 8 bits": (8, 32, 4),
}
BASELINE = "onnxruntime fp32"
SCHEMES = (*(f"int{k}:b{BLOCK}" for k in range(1, 9)), f"nf4:b{BLOCK}", f"int4:b{BLOCK}/i4")
SHAPES = ("4096x4096", "768x768", "3072x768", "11008x4096")
FULL_SHAPE = "4096x4096"
# What is measured at the other shapes.
FEWER_SCHEMES = ("int2:b32", "int3:b32", "int4:b32", "int8:b32", "nf4:b32", "int4:b32/i4")
# With many rows the bits hardly matter, but the blocks do.
MANY_ROWS_SCHEMES = ("int4:b32", "int4:b32/i4", "int4:b128", "nf4:b32", "int8:c")
Floats = npt.NDArray[np.float32]


def model_of(
    nodes: list[onnx.NodeProto], arrays: dict[str, npt.NDArray[Any]], rows: int, weight: Floats
) -> onnx.ModelProto:
    """A model x [rows, K] -> y [rows, N], float32; weight [K, N]."""
    widths = zip(("x", "y"), weight.shape, strict=True)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, width]) for name, width in widths]
    graph = helper.make_graph(
        nodes, "gemv", value[:1], value[1:], [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def float_model(weights: list[Floats], rows: int) -> onnx.ModelProto:
    """One MatMul after another; weights [K, N]."""
    names = chain(len(weights))
    nodes = [
        helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], name=f"layer{i}") for i in range(len(weights))
    ]
    return model_of(nodes, {f"w{i}": w for i, w in enumerate(weights)}, rows, weights[0])


def n_bits_model(weights: list[Floats], rows: int, bits: int, block: int, level: int) -> onnx.ModelProto:
    """The same with com.microsoft MatMulNBits."""
    names, arrays, nodes = chain(len(weights)), {}, []
    inputs, outputs = weights[0].shape
    origin = 1 << (bits - 1)
    for i, weight in enumerate(weights):
        blocks = weight.T.reshape(outputs, inputs // block, block)
        scales = (np.abs(blocks).max(axis=2) / max(1, origin - 1)).astype(np.float32)
        codes = np.clip(np.rint(blocks / scales[..., None]) + origin, 0, 2 * origin - 1).astype(np.uint8)
        packed = np.zeros((outputs, inputs // block, block * bits // 8), np.uint8)
        for j in range(8 // bits):
            packed |= codes[..., j :: 8 // bits] << (bits * j)
        arrays[f"w{i}"], arrays[f"s{i}"] = packed, scales
        attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": block, "accuracy_level": level}
        given = [names[i], f"w{i}", f"s{i}"]
        nodes.append(helper.make_node("MatMulNBits", given, [names[i + 1]], domain="com.microsoft", **attributes))
    return model_of(nodes, arrays, rows, weights[0])


def dynamic_model(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """int8 weights by channel, activations by tensor at run time, of onnxruntime's tool."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    made = folder / "dynamic.onnx"
    quantize_dynamic(model, str(made), per_channel=True, weight_type=QuantType.QInt8)
    return onnx.load(made)


def chain(layers: int) -> list[str]:
    """Names of the values between the layers."""
    return ["x", *(f"h{i}" for i in range(1, layers)), "y"]


def in_onnxruntime(model: onnx.ModelProto, x: Floats) -> Callable[[], Any]:
    """A call with one thread; input and output stay where they are."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    binding.bind_output("y", "cpu")
    return lambda: session.run_with_iobinding(binding)


def in_kbitc(model: onnx.ModelProto, scheme: str, x: Floats, folder: Path, target: str) -> Callable[[], Any]:
    """A call of the bundle for a target with one thread."""
    bundle = folder / (scheme.replace(":", "-").replace("/", "-") + ".kbit")
    kbitc.compile(model, bundle, scheme=scheme, target=target, solver="rtn")
    module = kbitc.load(bundle, threads=1)
    arguments = module.device_arguments([x])
    return lambda: module.run_raw(arguments)


def measure(schemes: list[str], shape: str, layers: int, rows: int, target: str = "host") -> dict[str, Any]:
    """One row of results: every scheme and every other engine take turns."""
    random = np.random.default_rng(0)
    outputs, inputs = (int(text) for text in shape.split("x"))
    weights = [(random.standard_normal((inputs, outputs)) / np.sqrt(inputs)).astype(np.float32) for _ in range(layers)]
    x = random.standard_normal((rows, inputs)).astype(np.float32)
    model = float_model(weights, rows)
    title = f"{rows} x {shape}, {layers} layer(s)"
    with tempfile.TemporaryDirectory() as folder:
        contestants = {BASELINE: in_onnxruntime(model, x)}
        contestants["onnxruntime int8 dynamic"] = in_onnxruntime(dynamic_model(model, Path(folder)), x)
        # Many layers of every engine would not fit memory together.
        for name, (bits, block, level) in list(N_BITS.items())[: len(N_BITS) if layers == 1 else 2]:
            contestants[name] = in_onnxruntime(n_bits_model(weights, rows, bits, block, level), x)
        if layers == 1:
            contestants |= peers.openvinos(weights, x) | peers.ggmls(weights, x)
        for scheme in schemes:
            contestants[f"kbitc {scheme}"] = in_kbitc(model, scheme, x, Path(folder), target)
        timing = harness.interleave(contestants, rounds_of(rows), clock=clock_of(contestants))
    harness.print_table(title, timing, BASELINE)
    row: dict[str, Any] = timing.as_json(title, BASELINE, rows=rows, layers=layers)
    return row


def rounds_of(rows: int) -> int:
    """The more work there is, the fewer rounds."""
    return ROUNDS if rows == 1 else FEWER_ROUNDS if rows < MANY_ROWS else FEWEST_ROUNDS


def clock_of(contestants: dict[str, Callable[[], Any]]) -> Callable[[], float]:
    """Processor time: of the calling thread, or of the process where OpenVINO works in a thread of its own."""
    return time.process_time if any(name.startswith("OpenVINO") for name in contestants) else time.thread_time


def vectors(shapes: list[str], layers: list[int], schemes: list[str] | None) -> list[dict[str, Any]]:
    """Results of one row of activations: every k at 4096x4096, some elsewhere; more than one layer where square."""
    cases = [(shape, n) for shape in shapes for n in layers if n == 1 or shape == FULL_SHAPE]
    return [
        measure(schemes or list(SCHEMES if shape == FULL_SHAPE else FEWER_SCHEMES), shape, n, 1) for shape, n in cases
    ]


def limits() -> dict[str, Any]:
    """What this machine reads from each level and multiplies, with one thread."""
    found = probe(parse_target("host"), clock=time.thread_time)
    return {} if found is None else found.as_json()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Matrix-vector products at every k against onnxruntime.")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="NxK", help="of the weight")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, MEMORY_LAYERS])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument("--schemes", nargs="+", help="of kbitc; by default every k for one row, some for more")
    chosen = parser.parse_args()
    harness.pin(1)
    if 1 in chosen.rows:
        rows = vectors(chosen.shapes, chosen.layers, chosen.schemes)
        print(harness.save("gemv", rows, threads=1, limits=limits()))
    if many := [count for count in chosen.rows if count > 1]:
        schemes = chosen.schemes or list(MANY_ROWS_SCHEMES)
        rows = [measure(schemes, FULL_SHAPE, 1, count) for count in many]
        print(harness.save("gemm", rows, threads=1, limits=limits()))


if __name__ == "__main__":
    main()
