"""Memory of compiled functions: results stay, sizes are near the least, outputs belong to the caller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

from kbitc.importer import load_model
from kbitc.passes.canonicalize import canonicalize
from kbitc.targets.lower.emitter import lower
from kbitc.targets.memory import plan_memory
from kbitc.targets.memory.place import rounded
from kbitc.targets.memory.sizes import ALIGNMENT
from kbitc.targets.target import parse_target
from tests.support.live import largest_live_set
from tests.support.lowered import model_of, run_of

# Scores [b, s, s] of a width of 16 and values [b, s, 64]: which is larger depends on s.
ATTENTION = """g (float[b, s, 64] x, float[64, 16] w, float[64, 64] v, float[64, 256] u, float[256, 64] d)
    => (float[b, s, 64] z) {
    q = MatMul(x, w)
    k = MatMul(x, w)
    kt = Transpose<perm=[0, 2, 1]>(k)
    scores = MatMul(q, kt)
    soft = Softmax<axis=-1>(scores)
    values = MatMul(x, v)
    mixed = MatMul(soft, values)
    first = Add(x, mixed)
    wide = MatMul(first, u)
    active = Relu(wide)
    narrow = MatMul(active, d)
    z = Add(first, narrow)
}"""


def feeds(b: int, s: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(b + s)
    shapes = {"x": (b, s, 64), "w": (64, 16), "v": (64, 64), "u": (64, 256), "d": (256, 64)}
    return {name: (random.standard_normal(shape) / 8).astype(np.float32) for name, shape in shapes.items()}


def expected(given: dict[str, np.ndarray]) -> np.ndarray:
    x, w, v, u, d = (given[name].astype(np.float64) for name in "xwvud")
    scores = (x @ w) @ (x @ w).transpose(0, 2, 1)
    soft = np.exp(scores - scores.max(axis=-1, keepdims=True))
    first = x + soft / soft.sum(axis=-1, keepdims=True) @ (x @ v)
    return np.asarray(first + np.maximum(first @ u, 0) @ d)


def test_one_plan_is_right_for_every_shape() -> None:
    """Wide and narrow scores, and none: a plan that lets two values overlap gives other numbers."""
    runnable = run_of(model_of(ATTENTION))
    kept = []
    for b, s in ((1, 5), (3, 64), (2, 300), (1, 1), (0, 4), (2, 300)):
        given = feeds(b, s)
        (z,) = runnable(given)
        kept.append((z, expected(given)))
    for z, wanted in kept:  # behind later runs: outputs are no memory of the plan
        np.testing.assert_allclose(z, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("b", "s"), [(8, 128), (1, 16), (1, 512), (4, 37)])
def test_memory_is_near_the_largest_live_set(monkeypatch: pytest.MonkeyPatch, b: int, s: int) -> None:
    module = lower(model_of(ATTENTION), parse_target("reference")).module
    planned = watch_plans(monkeypatch)
    compile_module(module)
    dims = {"b": b, "s": s}
    assert planned[0](dims) <= 1.2 * largest_live_set(module, dims)


# Wide values, then an output of 40 columns from one narrow one: as a recogniser of text ends.
OUTPUT = """g (float[n, 8] x, float[8, 40] w) => (float[n, 40] y) {
    a = Softmax<axis=-1>(x)
    wide = Concat<axis=-1>(a, x, a, x)
    b = Softmax<axis=-1>(wide)
    c = ReduceMean<axes=[1], keepdims=1>(b)
    d = Add(x, c)
    e = MatMul(d, w)
    y = Softmax<axis=-1>(e)
}"""


@pytest.mark.parametrize("n", [3, 8, 100, 5000])
def test_values_lie_in_an_output_before_it_is_made(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Apart they would take wide + b and the output: (64 + 40) / (40 + 40) = 1.3 times what lives at one time."""
    model = model_of(OUTPUT, opset=17)
    planned = watch_plans(monkeypatch)
    runnable = run_of(model)
    assert planned[0]({"n": n}) <= 1.2 * largest_live_set(runnable.lowered.module, {"n": n}) + 2 * ALIGNMENT
    random = np.random.default_rng(n)
    x, w = random.standard_normal((n, 8)).astype(np.float32), random.standard_normal((8, 40)).astype(np.float32)
    wanted = softmax(
        (x + softmax(np.concatenate([softmax(x), x, softmax(x), x], axis=1)).mean(axis=1, keepdims=True)) @ w
    )
    for _ in range(2):
        np.testing.assert_allclose(runnable({"x": x, "w": w})[0], wanted, rtol=1e-4, atol=1e-6)


def softmax(x: np.ndarray) -> np.ndarray:
    shares = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=-1, keepdims=True))


def watch_plans(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[Mapping[str, int]], int]]:
    """For each function that is planned from now on: dims -> bytes of its arena and its outputs."""
    planned: list[Callable[[Mapping[str, int]], int]] = []
    made = plan_memory.extent_function

    def watched(layouts: Any, values: Any, rooms: Any, sizes: Any) -> Any:
        def taken(dims: Mapping[str, int]) -> int:
            point = sizes.at_dims(dims)
            spaces = [point[room.size] for room in rooms]
            extents = [layout.extent([point[value.size] for value in values], spaces) for layout in layouts]
            return min(extent for extent in extents if extent is not None) + sum(spaces)

        planned.append(taken)
        return made(layouts, values, rooms, sizes)

    monkeypatch.setattr(plan_memory, "extent_function", watched)
    return planned


def test_fused_attention_has_no_scores_in_memory() -> None:
    module = lower(model_of(ATTENTION), parse_target("x86:avx2")).module
    rows = 2048
    assert largest_live_set(module, {"b": 1, "s": rows}) < 4 * rows * rows


def compile_module(module: Any) -> None:
    from kbitc.targets.build import relax_pipeline

    with tvm.target.Target("llvm"):
        relax_pipeline()(module)


def test_sizes_that_could_be_negative_are_planned() -> None:
    """Strided convolutions of open sizes: (h - 1) // 2 by (w - 1) // 2."""
    runnable = run_of(
        model_of("""g (float[1, 2, h, w] x, float[3, 2, 3, 3] k, float[2, 3, 3, 3] l) => (float[1, 2, i, j] y) {
            a = Conv<strides = [2, 2]>(x, k)
            b = Relu(a)
            y = Conv<strides = [2, 2]>(b, l)
        }""")
    )
    for h, w in ((13, 10), (7, 31), (13, 10)):
        shapes = {"x": (1, 2, h, w), "k": (3, 2, 3, 3), "l": (2, 3, 3, 3)}
        (y,) = runnable({name: np.ones(shape, np.float32) for name, shape in shapes.items()})
        assert y.shape == (1, 2, ((h - 1) // 2 - 1) // 2, ((w - 1) // 2 - 1) // 2)
        np.testing.assert_array_equal(y, np.full(y.shape, 18.0 * 27.0))


def test_an_output_that_is_a_view_has_memory_of_its_own() -> None:
    runnable = run_of(
        model_of("""g (float[n, 4] x) => (float[m] y, float[n, 4] z) {
            a = Relu(x)
            minus = Constant<value=int64[1] {-1}>()
            y = Reshape(a, minus)
            b = Neg(a)
            c = Softmax<axis=-1>(b)
            z = Softmax<axis=-1>(c)
        }""")
    )
    x = np.arange(-8, 8, dtype=np.float32).reshape(4, 4)
    y, _ = runnable({"x": x})
    np.testing.assert_array_equal(y, np.maximum(x, 0).reshape(-1))


def test_of_a_symbolic_size_few_sizes_of_storage_are_asked_for() -> None:
    """TVM keeps freed memory by size: 200 shapes ask for a handful of sizes."""
    from tvm import sym, tirx

    n = tirx.Var("n", "int64")
    sizes = set()
    for number in range(1, 200):
        analyzer = sym.Analyzer()
        analyzer.bind(n, tirx.const(number, "int64"))
        size = int(analyzer.simplify(rounded(n * 4096)))
        assert number * 4096 <= size < 2 * number * 4096
        sizes.add(size)
    assert len(sizes) == 9


def test_values_of_sizes_that_parameters_do_not_tell_are_left_to_tvm() -> None:
    from tvm import relax, te, tirx

    from kbitc.targets.build import relax_pipeline

    size = tirx.Var("m", "int64")
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(dtype="float32", ndim=1))

    def more(a: Any) -> Any:
        return te.compute(a.shape, lambda i: a[i] + tirx.const(1.0, "float32"))

    with builder.function("main", [x]):
        value = builder.match_cast(x, relax.TensorType([size], "float32"))
        for _ in range(3):
            value = builder.emit_te(more, value)
        builder.emit_func_output(value)
    built = relax.build(builder.get(), tvm.target.Target("llvm"), relax_pipeline=relax_pipeline())
    machine = relax.VirtualMachine(built, tvm.cpu())
    for count in (3, 50, 3):
        given = np.arange(count, dtype=np.float32)
        np.testing.assert_array_equal(machine["main"](tvm.runtime.tensor(given)).numpy(), given + 3)


# Model -> sizes for its open dims in the order of their first use; the recogniser takes no other height.
NETWORKS = {
    "cls": [(1, 48, 192), (6, 48, 192), (1, 50, 201), (1, 20, 50), (1, 480, 640)],
    "rec": [(1, 48, 320), (6, 48, 320), (1, 48, 1280), (1, 48, 100)],
    "minilm": [(1, 16), (8, 128), (1, 512)],
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "cls" else pytest.mark.slow) for name in NETWORKS]
)
def test_networks_of_open_sizes_stay_near_their_largest_live_set(
    name: str, real_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar of issue 4 for activations alone, which is stricter than with the weights."""
    module = lower(canonicalize(load_model(real_models[name])), parse_target("x86:avx2")).module
    planned = watch_plans(monkeypatch)
    compile_module(module)
    symbols = list(dict.fromkeys(str(dim) for dim in module["main"].params[0].ty.shape.values if not is_number(dim)))
    for numbers in NETWORKS[name]:
        dims = dict(zip(symbols, numbers, strict=True))
        assert planned[-1](dims) <= 1.2 * largest_live_set(module, dims), dims


def is_number(dim: Any) -> bool:
    return isinstance(dim, int | tvm.tirx.IntImm)
