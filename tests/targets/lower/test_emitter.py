"""What the emitter makes of whole graphs: symbolic dimensions, shapes, fusion, weights, refusals."""

from __future__ import annotations

import gc
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import tvm

from kbitc.errors import UnsupportedError
from kbitc.graph.legality import LOWERABLE
from kbitc.importer import load_model
from kbitc.passes.canonicalize import canonicalize
from kbitc.targets.lower.emitter import check_lowerable, lower
from kbitc.targets.lower.registry import standard_operators
from kbitc.targets.target import parse_target
from tests.support.lowered import model_of, run_of
from tests.support.onnx_text import assert_same, proto

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_one_build_serves_every_value_of_a_symbol() -> None:
    runnable = run_of(model_of("g (float[n, 4] x, float[n, 4] y) => (float[n, 4] z) { z = Add(x, y) }"))
    for rows in (1, 2, 7):
        x, y = noise(rows, 4), noise(rows, 4)
        assert np.array_equal(runnable({"x": x, "y": y})[0], x + y)


def test_different_symbols_that_must_agree_are_checked_when_the_module_runs() -> None:
    runnable = run_of(model_of("g (float[n] x, float[m] y) => (float[k] z) { z = Add(x, y) }"))
    x = noise(3)
    assert np.array_equal(runnable({"x": x, "y": x})[0], x + x)
    with pytest.raises(Exception, match="(?i)shape|match|check"):
        runnable({"x": x, "y": noise(5)})


SHAPE_GRAPH = """g (float[n, s, 12] x) => (float[n, a, b, 4] y)
<int64[1] zero = {0}, int64[1] two = {2}, int64[1] minus = {-1}, int64[1] four = {4}, int64 first = {0}> {
    shape = Shape(x)
    n0 = Gather(shape, first)
    n1 = Unsqueeze(n0, zero)
    target = Concat<axis = 0>(n1, minus, two, four)
    y = Reshape(x, target)
}"""


def test_a_shape_subgraph_leaves_no_kernel() -> None:
    runnable = run_of(model_of(SHAPE_GRAPH))
    for n, s in ((1, 2), (3, 4)):
        x = noise(n, s, 12)
        assert np.array_equal(runnable({"x": x})[0], x.reshape(n, -1, 2, 4))
    assert not [name for name in runnable.kernels() if "gather" in name or "concat" in name]


def test_shape_arithmetic_reaches_slices_and_expand() -> None:
    text = """g (float[n, 6] x) => (float[m, 6] y, float[n, n] z)
    <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] none = {0}, int64 first = {0}> {
        rows = Shape<start = 0, end = 1>(x)
        half = Div(rows, two)
        y = Slice(x, half, rows, zero)
        square = Concat<axis = 0>(rows, rows)
        column = Slice(x, zero, one, one)
        z = Expand(column, square)
    }"""
    runnable = run_of(model_of(text))
    for n in (1, 4, 5):
        x = noise(n, 6)
        y, z = runnable({"x": x})
        assert np.array_equal(y, x[n // 2 :])
        assert np.array_equal(z, np.broadcast_to(x[:, :1], (n, n)))


def test_an_elementwise_chain_is_one_kernel() -> None:
    text = "g (float[n, 8] x) => (float[n, 8] y) { a = Neg(x)\n b = Abs(a)\n c = Floor(b)\n y = Add(c, x) }"
    runnable = run_of(model_of(text))
    assert len(runnable.kernels()) == 1
    x = noise(3, 8)
    assert np.array_equal(runnable({"x": x})[0], np.floor(np.abs(x)) + x)


def test_a_costly_value_with_two_readers_is_computed_once() -> None:
    text = "g (float[8] x) => (float[8] y, float[8] z) { e = Exp(x)\n y = Neg(e)\n z = Abs(e) }"
    assert len(run_of(model_of(text)).kernels()) == 3


def test_kernels_of_equal_structure_are_made_once() -> None:
    text = "g (float[4, 8] x) => (float[4, 8] y) { a = Softmax(x)\n b = Softmax(a)\n y = Softmax(b) }"
    assert len(run_of(model_of(text)).kernels()) == 1


def matmul_graph(tail: str) -> str:
    return (
        f"g (float[n, 3] x) => (float[n, 2] y) <float[3, 2] w = {{1, 2, 3, 4, 5, 6}}, float[2] b = {{1, -50}}> {tail}"
    )


def test_bias_and_relu_go_into_the_product() -> None:
    runnable = run_of(model_of(matmul_graph("{ p = MatMul(x, w)\n s = Add(p, b)\n y = Relu(s) }")))
    assert len(runnable.kernels()) == 1
    x = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    w = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
    assert np.array_equal(runnable({"x": x})[0], np.maximum(x @ w + np.array([1, -50], np.float32), 0))


def test_a_bias_is_not_fused_when_the_product_is_read_twice() -> None:
    text = matmul_graph("{ p = MatMul(x, w)\n s = Add(p, b)\n y = Mul(p, s) }")
    runnable = run_of(model_of(text))
    x = np.array([[1, 2, 3]], np.float32)
    product = x @ np.arange(1, 7, dtype=np.float32).reshape(3, 2)
    assert np.array_equal(runnable({"x": x})[0], product * (product + np.array([1, -50], np.float32)))


def test_weights_are_parameters_and_small_constants_are_not() -> None:
    text = (
        "g (float[n, 3] x) => (float[n, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> { p = MatMul(x, w)\n y = Add(p, p) }"
    )
    weights = run_of(model_of(text)).lowered.weights
    assert [array.shape for array in weights.values()] == [(2, 1, 3)]


def test_an_output_that_is_an_input_is_a_copy() -> None:
    runnable = run_of(model_of("g (float[n] x) => (float[n] y, float[n] z) { y = Identity(x)\n z = Neg(x) }"))
    x = noise(4)
    y, z = runnable({"x": x})
    assert np.array_equal(y, x) and np.array_equal(z, -x)


def test_integer_division_does_not_trap() -> None:
    runnable = run_of(model_of("g (int32[n] x, int32[n] y) => (int32[n] z) { z = Div(x, y) }"))
    x = np.array([7, -7, 5, -(2**31)], np.int32)
    y = np.array([2, 2, 0, -1], np.int32)
    assert runnable({"x": x, "y": y})[0].tolist() == [3, -3, 0, -(2**31)]


def test_nan_passes_relu_and_clip() -> None:
    text = "g (float[n] x) => (float[n] y, float[n] z) <float low = {0}, float high = {6}>"
    runnable = run_of(model_of(text + "{ a = Neg(x)\n y = Relu(a)\n z = Clip(a, low, high) }"))
    x = np.array([np.nan, 1, -2, -9], np.float32)
    for result, expected in zip(runnable({"x": x}), ([np.nan, 0, 2, 9], [np.nan, 0, 2, 6]), strict=True):
        assert np.array_equal(result, np.array(expected, np.float32), equal_nan=True)


def test_indices_outside_do_not_read_outside() -> None:
    runnable = run_of(model_of("g (float[3] x, int64[n] i) => (float[n] y) { y = Gather(x, i) }"))
    x = np.array([1, 2, 3], np.float32)
    assert runnable({"x": x, "i": np.array([-1, 0, 99, -99])})[0].tolist() == [3, 1, 3, 1]


def test_every_node_that_cannot_be_compiled_is_named_in_one_error() -> None:
    text = "g (float[n, n] x) => (float y, float[a, b] z) { y = Det(x)\n i = NonZero(x)\n z = Cast<to = 1>(i) }"
    model = model_of(text)
    with pytest.raises(UnsupportedError) as caught:
        check_lowerable(model, parse_target("reference"))
    assert "Det" in str(caught.value) and "NonZero" in str(caught.value)
    assert str(caught.value).startswith("2 nodes")


def test_lowering_does_not_change_the_model() -> None:
    model = model_of("g (float[1, 2, 5, 5] x) => (float[1, 1, 3, 3] y) <float[1, 2, 3, 3] w = {"
                     + ", ".join(["1"] * 18) + "}> { y = Conv(x, w) }")  # fmt: skip
    before = [(node.op_type, node.domain) for node in model.graph]
    lower(model, parse_target("reference"))
    assert [(node.op_type, node.domain) for node in model.graph] == before


def test_the_table_of_lowerable_operators_agrees_with_the_emitters() -> None:
    """What the legality check lets through has an emitter; what has none is refused there."""
    assert set(LOWERABLE) - standard_operators() == set()


@pytest.mark.parametrize("end", [10**9, 2**31 - 1, 2**63 - 1])
def test_a_slice_to_the_end_keeps_a_symbolic_dimension(end: int) -> None:
    """A bound such as min(2147483647, n) would make the memory plan reserve for 2147483647 rows."""
    text = "g (float[n, 4] x) => (float[m, 4] y) { z = Abs(x)\n y = Slice(z, zero, end, zero, one) }"
    body = f"<int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] end = {{{end}}}> {{"
    lowered = run_of(model_of(text.replace("{", body, 1))).lowered
    assert [signature.shape for signature in lowered.outputs] == [("n", 4)]


def test_top_k_of_a_whole_symbolic_axis_sorts_it() -> None:
    """As torch exports packed sequences: K is the size of the axis."""
    runnable = run_of(model_of("g (int64[n] x) => (int64[n] y, int64[n] at) { k = Shape(x)\n y, at = TopK(x, k) }"))
    for x in ([3], [2, 9, 2, 5], [7, 7, 7]):
        y, at = runnable({"x": np.array(x)})
        assert y.tolist() == sorted(x, reverse=True)
        assert at.tolist() == np.argsort(-np.array(x), kind="stable").tolist()


def test_a_constant_is_repeated_along_a_symbolic_axis() -> None:
    """As the class token of a vision transformer, or the zero state of an LSTM, of a batch of open size."""
    text = """g (float[n, 2] x) => (float[n, 3] y) <float[1, 3] token = {1, 2, 3}, int64[1] width = {3}> {
        rows = Shape<start = 0, end = 1>(x)
        shape = Concat<axis = 0>(rows, width)
        y = Expand(token, shape)
    }"""
    runnable = run_of(model_of(text))
    for rows in (1, 4):
        assert np.array_equal(runnable({"x": noise(rows, 2)})[0], [[1, 2, 3]] * rows)


def test_a_constant_table_is_cut_at_a_symbolic_size() -> None:
    """As the positions of an encoder, which are as many as it was trained with."""
    text = """g (float[s, 2] x) => (float[s, 2] y) <int64[1] zero = {0}> {
        size = Shape<start = 0, end = 1>(x)
        table = Constant<value = float[3, 2] {1, 2, 3, 4, 5, 6}>()
        positions = Slice(table, zero, size, zero)
        y = Add(x, positions)
    }"""
    runnable = run_of(model_of(text))
    for rows in (1, 3):
        x = noise(rows, 2)
        assert np.array_equal(runnable({"x": x})[0], x + np.arange(1, 7, dtype=np.float32).reshape(3, 2)[:rows])
    with pytest.raises(ValueError, match="View with shape"):
        runnable({"x": noise(5, 2)})


def test_sizes_that_would_define_themselves_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    """TVM's memory planning would never come to an end. TVM itself says nothing: the error is one line."""
    text = """g (float[s, 2] x, float[6, 2] table) => (float[s, 2] y) <int64[1] zero = {0}, int64[1] two = {2}> {
        size = Shape<start = 0, end = 1>(x)
        half = Div(size, two)
        even = Mul(half, two)
        part = Slice(table, zero, even, zero)
        tame = Softmax(part)
        y = Add(x, tame)
    }"""
    with pytest.raises(UnsupportedError, match="cannot be told to be equal"):
        run_of(model_of(text))
    gc.collect()
    assert capfd.readouterr().err == ""


def test_an_output_that_is_also_read_is_computed_once() -> None:
    text = """g (float[2, 3] x, float[2, 1] y) => (float[2, 4] held, float[2, 4] z) {
        held = Concat<axis = 1>(x, y)
        z = Softmax(held)
    }"""
    runnable = run_of(model_of(text))
    x, y = noise(2, 3), noise(2, 1)
    held, _ = runnable({"x": x, "y": y})
    assert np.array_equal(held, np.concatenate([x, y], axis=1))
    main = runnable.lowered.module["main"]
    readers = [call for call in calls_of(main) if any(arg.same_as(main.params[0]) for arg in call.args[1].fields)]
    assert len(readers) == 1


@pytest.mark.parametrize(("rows", "kernels"), [(1, 1), (9, 2)])
def test_few_rows_read_a_transposed_operand_where_it_lies(rows: int, kernels: int) -> None:
    text = f"""g (float[2, {rows}, 8] x, float[2, n, 8] y) => (float[2, {rows}, n] z) {{
        turned = Transpose<perm = [0, 2, 1]>(y)
        z = MatMul(x, turned)
    }}"""
    runnable = run_of(model_of(text))
    x, y = noise(2, rows, 8), noise(2, 5, 8)
    # Both sum eight products: their difference is below 16 units in the last place of sum |x y|.
    bound = 16 * np.finfo(np.float32).eps * np.abs(x) @ np.abs(y).swapaxes(1, 2)
    assert (np.abs(runnable({"x": x, "y": y})[0] - x @ y.swapaxes(1, 2)) <= bound).all()
    assert len(runnable.kernels()) == kernels


def calls_of(main: Any) -> list[Any]:
    """The calls of kernels in main."""
    bindings = [binding.value for block in main.body.blocks for binding in block.bindings]
    return [value for value in bindings if getattr(value, "op", None) == tvm.ir.Op.get("relax.call_tir")]


def test_integers_made_from_logarithms_compile() -> None:
    """Relative positions in buckets, as T5 has them."""
    text = """g (float[s, 2] x) => (int64[s, t] y)
    <int64 zero = {0}, int64 one = {1}, int64[1] first = {0}, int64[1] second = {1}, int64 small = {8},
     float eight = {8}, float four = {4}> {
        sizes = Shape<start = 0, end = 1>(x)
        size = Squeeze(sizes, first)
        places = Range(zero, size, one)
        row = Unsqueeze(places, first)
        column = Unsqueeze(places, second)
        apart = Sub(row, column)
        far = Abs(apart)
        wide = Cast<to = 1>(far)
        share = Div(wide, eight)
        log = Log(share)
        step = Mul(log, four)
        whole = Cast<to = 7>(step)
        large = Add(whole, small)
        near = Less(far, small)
        y = Where(near, far, large)
    }"""
    runnable = run_of(model_of(text), parse_target("host"))
    for size in (1, 16, 37):
        far = np.abs(np.arange(size)[None] - np.arange(size)[:, None])
        large = 8 + (np.log(np.maximum(far, 1) / np.float32(8)) * np.float32(4)).astype(np.int64)
        assert np.array_equal(runnable({"x": noise(size, 2)})[0], np.where(far < 8, far, large))


@pytest.mark.parametrize("target", ["reference", "x86:avx2"])
def test_scales_of_blocks_may_be_negative_or_zero(target: str) -> None:
    """As onnxruntime's symmetric 4-bit quantizer gives them."""
    rng = np.random.default_rng(3)
    codes = rng.integers(-8, 8, (64, 16)).astype(ml_dtypes.int4)
    scales = rng.standard_normal((2, 16)).astype(np.float32)
    scales[1, 5] = 0
    nodes = "w = DequantizeLinear<axis = 0, block_size = 32>(q, s) y = MatMul(x, w)"
    message = proto(f"g (float[n, 64] x) => (float[n, 16] y) {{ {nodes} }}", {"s": scales})
    raw = onnx.numpy_helper.from_array(codes, "q").raw_data
    message.graph.initializer.append(onnx.helper.make_tensor("q", onnx.TensorProto.INT4, codes.shape, raw, raw=True))
    x = rng.standard_normal((3, 64)).astype(np.float32)
    (found,) = run_of(canonicalize(load_model(message)), parse_target(target))({"x": x})
    weight = codes.astype(np.float32) * np.repeat(scales, 32, 0)
    assert_same({"y": x @ weight}, {"y": found}, terms=64 * 8)
