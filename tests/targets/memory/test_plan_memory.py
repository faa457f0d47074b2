"""Memory of compiled functions: results stay, sizes are near the least, outputs belong to the caller."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
import tvm

from kbitc.targets.lower.emitter import lower
from kbitc.targets.memory import plan_memory
from kbitc.targets.memory.arena import Arena
from kbitc.targets.memory.bounds import Quantities
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
    planned: list[Arena] = []
    made: list[Quantities] = []
    plan, init = plan_memory.plan, Quantities.__init__

    def watched_plan(values: Any, points: Any) -> Arena:
        planned.append(plan(values, points))
        return planned[-1]

    def watched_init(self: Quantities) -> None:
        made.append(self)
        init(self)

    monkeypatch.setattr(plan_memory, "plan", watched_plan)
    monkeypatch.setattr(Quantities, "__init__", watched_init)
    module = lower(model_of(ATTENTION), parse_target("reference")).module
    compile_module(module)
    numbers = [{"b": b, "s": s}[expression.name] for expression in made[0].expressions]
    size = max(bound.at(numbers) for bound in planned[0].size) + 4 * prod((b, s, 64))
    assert size <= 1.2 * largest_live_set(module, {"b": b, "s": s})


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
        size = int(analyzer.simplify(plan_memory.rounded(n * 4096)))
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
