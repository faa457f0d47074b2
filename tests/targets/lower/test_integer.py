"""Static integer graphs: the module gives exactly the integers of the ONNX model, and they hash alike everywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tvm_ffi
from tvm import tirx

from kbitc.graph.evaluate import evaluate
from kbitc.targets.build import build
from kbitc.targets.lower.emitter import lower
from kbitc.targets.lower.layout import to_channels_last
from kbitc.targets.lower.layout_reference import expand_core
from kbitc.targets.rules.base import schedule
from kbitc.targets.target import parse_target
from tests.passes.rewrite.test_integer_only import encoder, own_cache
from tests.support.integer_graphs import Graph, convolutional, feed, image, transformer
from tests.support.lowered import run_of
from tests.support.onnx_text import operators

__all__ = ["own_cache"]
Make = Callable[[], ir.Model]
Feeds = dict[str, np.ndarray]


@cache
def integer_encoder() -> tuple[bytes, Feeds]:
    """An encoder that holds integers only, as the passes write it, and a batch of its samples."""
    _, model, _, feeds = encoder()
    return ir.to_proto(model).SerializeToString(), feeds[1]


def read_encoder() -> ir.Model:
    return ir.from_proto(onnx.load_from_string(integer_encoder()[0]))


MODELS: dict[str, tuple[Make, Callable[[], Feeds]]] = {
    "convolutional": (convolutional, lambda: {"x": feed((1, 3, 20, 18))}),
    "transformer": (transformer, lambda: {"x": feed((2, 13, 48))}),
    "encoder": (read_encoder, lambda: integer_encoder()[1]),
}


@pytest.fixture(params=list(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@cache
def tensors(name: str, target: str) -> dict[str, np.ndarray]:
    """Every output and every integer tensor of a model on a target of this machine."""
    make, feeds = MODELS[name]
    runnable = run_of(make(), parse_target(target), debug_accumulators=True)
    found = runnable(feeds())
    return {info.name: array for info, array in zip(runnable.lowered.outputs, found, strict=True)}


def digest(values: dict[str, np.ndarray]) -> str:
    """SHA-256 over the integer tensors in the order of their names."""
    total = hashlib.sha256()
    for key in sorted(values):
        if values[key].dtype in (np.uint8, np.int32):
            total.update(f"{key} {values[key].dtype} {values[key].shape}".encode() + values[key].tobytes())
    return total.hexdigest()


def test_the_models_pass_the_full_checker(name: str) -> None:
    onnx.checker.check_model(ir.to_proto(MODELS[name][0]()), full_check=True)


def test_equal_to_onnxruntime(name: str) -> None:
    make, feeds = MODELS[name]
    wanted = evaluate(make(), feeds())
    found = tensors(name, "x86:avx512vnni")
    for key, array in wanted.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)


def test_every_integer_tensor_is_the_same_on_every_instruction_set(name: str) -> None:
    reference = tensors(name, "reference")
    integers = [key for key, array in reference.items() if array.dtype in (np.uint8, np.int32)]
    assert len(integers) > 15 and any(key.endswith(".accumulators") for key in integers)
    assert digest(tensors(name, "x86:avx512vnni")) == digest(reference)
    assert digest(tensors(name, "x86:avx2")) == digest(reference)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["arm-neon:dotprod"])
def test_the_same_integers_under_qemu(name: str, target: str) -> None:
    from tests.support.qemu import need_runner, run_on

    need_runner(target)
    make, feeds = MODELS[name]
    machine = parse_target(target)
    built = build(make(), machine, debug_accumulators=True)
    found = run_on(machine, built.library, built.weights, built.inputs, built.outputs, feeds())
    assert digest(found.outputs) == digest(tensors(name, "reference"))


def test_integer_kernels_hold_no_float(name: str) -> None:
    """Only the kernels that read or write float tensors know floats, and the one that quantizes an integer mask."""
    target = parse_target("x86:avx512vnni")
    lowered = lower(MODELS[name][0](), target)
    module, _ = schedule(lowered.module, target, target.schedule_rules())
    checked, floats = 0, []
    for var, function in module.functions.items():
        if not isinstance(function, tirx.PrimFunc) or _touches_float(function):
            continue
        checked += 1
        floats += [str(var.name_hint)] if _float_types(function) else []
    assert checked > 8 and len(floats) == (1 if name == "encoder" else 0)


def _touches_float(function: tirx.PrimFunc) -> bool:
    return any("float" in str(getattr(param.ty, "dtype", "")) for param in function.params)


def _float_types(function: tirx.PrimFunc) -> set[str]:
    found: set[str] = set()

    def visit(node: object) -> None:
        kind = str(getattr(getattr(node, "ty", None), "dtype", ""))
        if "float" in kind:
            found.add(kind)

    tvm_ffi.structural_walk(function.body, (tvm_ffi.Object, visit))
    return found


def test_codes_stay_channels_last() -> None:
    """One Transpose behind the input and one in front of the image output; none between the operators."""
    model = convolutional()
    before = evaluate(model, {"x": feed((1, 3, 20, 18))})
    moved = to_channels_last(model.clone())
    data = [node for node in moved.graph if node.op_type == "Transpose" and node.inputs[0].dtype != ir.DataType.INT8]
    assert len(data) == 2, [node.name for node in data]
    after = evaluate(expand_core(moved.clone()), {"x": feed((1, 3, 20, 18))})
    for key, array in before.items():
        np.testing.assert_array_equal(after[key], array)
    # The first, the depthwise, the k-bit and the grouped one.
    assert operators(moved)["kbitc.core::ConvIntegerNHWC"] == 4


def test_symbolic_dimensions() -> None:
    for make, shapes in (
        (lambda: convolutional("batch"), [(1, 3, 20, 18), (3, 3, 20, 18)]),
        (lambda: transformer("batch", "length"), [(1, 1, 48), (2, 13, 48), (1, 18, 48)]),
        (lambda: image("n", "height", "width"), [(1, 3, 20, 18), (2, 3, 9, 33), (1, 3, 4, 5)]),
    ):
        run = run_of(make(), parse_target("x86:avx512vnni"))
        for shape in shapes:
            wanted = evaluate(make(), {"x": feed(shape)})
            for info, array in zip(run.lowered.outputs, run({"x": feed(shape)}), strict=True):
                np.testing.assert_array_equal(array, wanted[info.name], err_msg=f"{info.name} {shape}")


def test_bias_and_requantization_are_one_kernel(name: str) -> None:
    """No accumulator of a product with constant levels is written to memory."""
    lowered = lower(MODELS[name][0](), parse_target("x86:avx512vnni"))
    text = lowered.module.script(show_meta=False)
    products = [layer for layer in lowered.layers if layer["kind"] != "batch_matmul"]
    assert {layer["rule"] for layer in products} <= {"code_product", "code_depthwise"}
    assert text.count("requantize") == 0 and len(products) >= 5


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_quantize_rounds_half_to_even_and_saturates(kind: type) -> None:
    """Every half between codes, numbers beside them, and numbers far outside."""
    halves = np.arange(-300, 300, 0.5, dtype=np.float32)
    beside = np.concatenate([np.nextafter(halves, np.float32(side)) for side in (-np.inf, np.inf)])
    far = np.array([1e30, -1e30, np.inf, -np.inf, 2.0**31, -(2.0**31), 2.0**22, 0.0, -0.0], np.float32)
    values = np.concatenate([halves, beside, far])[None]
    graph = Graph()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(values.shape))
    made = [graph.node("QuantizeLinear", x, np.array(1, np.float32), np.array(zero, kind)) for zero in (0, 7, 100)]
    model = graph.finish(x, made)
    wanted = evaluate(model, {"x": values})
    for array, found in zip(wanted.values(), run_of(model, parse_target("x86:avx2"))({"x": values}), strict=True):
        np.testing.assert_array_equal(found, array)
