"""Products of two activations of codes equal int64 numpy bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tvm
from tvm import relax

from kbitc.graph import integer_functions
from kbitc.targets.cpu.rules.integer import CodeBatchProduct
from kbitc.targets.lower.contraction import Contraction, Requantization
from kbitc.targets.target import parse_target
from tests.support.integer_products import levels
from tests.support.kernels import BenchContext

Array = npt.NDArray[Any]
RULE = CodeBatchProduct()


def product(
    a_lead: tuple[int, ...], b_lead: tuple[int, ...], sizes: tuple[int, int, int], zeros: tuple[int, int], *,
    swapped: bool = False, requantized: bool = True, accumulators_out: bool = False,
) -> Contraction:  # fmt: skip
    """[*a lead, M, C] by [*b lead, C, N], or [*b lead, N, C]."""
    rows, channels, columns = sizes
    shift = 31 + int(np.log2(np.sqrt(channels) * 75))
    numbers = Requantization(np.array([1_500_000_001], np.int32), np.array([shift], np.int32), 99, 3, 250)
    return Contraction(
        "b", "batch_matmul", None, "uint8", (*a_lead, rows, channels),
        (*np.broadcast_shapes(a_lead, b_lead), rows, columns), transpose_b=swapped,
        b_shape=(*b_lead, columns, channels) if swapped else (*b_lead, channels, columns),
        x_zero=zeros[0], b_zero=zeros[1], requantize=numbers if requantized else None,
        accumulators_out=accumulators_out,
    )  # fmt: skip


def run(contraction: Contraction, target_name: str, a: Array, b: Array) -> list[Array]:
    """The result and the debug outputs."""
    target = parse_target(target_name)
    builder = relax.BlockBuilder()
    ctx = BenchContext(target, builder)
    inputs = [relax.Var(name, relax.TensorType(array.shape, "uint8")) for name, array in (("a", a), ("b", b))]
    assert RULE.match(contraction, target) is None
    with builder.function("main"):
        with builder.dataflow():
            made = RULE.emit(ctx, contraction, inputs)
            result = builder.emit_output(relax.Tuple([made, *ctx.debug.values()]))
        builder.emit_func_output(result, params=[*inputs, *ctx.parameters])
    executable = relax.build(builder.get(), tvm.target.Target(target.tvm))
    arguments = [tvm.runtime.tensor(array) for array in (a, b, *ctx.arrays.values())]
    return [value.numpy() for value in relax.VirtualMachine(executable, tvm.cpu())["main"](*arguments)]


def check(contraction: Contraction, target: str, a: Array, b: Array) -> None:
    found = run(contraction, target, a, b)
    second = np.swapaxes(b, -1, -2) if contraction.transpose_b else b
    total = (a.astype(np.int64) - contraction.x_zero) @ (second.astype(np.int64) - contraction.b_zero)
    wanted, numbers = total, contraction.requantize
    if numbers is not None:
        wanted = integer_functions.requantize(
            total, numbers.multiplier, numbers.shift, numbers.zero, axis=0, low=numbers.low, high=numbers.high
        )
    np.testing.assert_array_equal(found[0], wanted)
    if contraction.accumulators_out:
        np.testing.assert_array_equal(found[1], total)


def random(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


CASES = {
    "attention scores": product((2, 3), (2, 3), (13, 16, 13), (128, 120), swapped=True),
    "attention values": product((2, 3), (2, 3), (13, 13, 16), (0, 128)),
    "broadcast": product((2, 3), (3,), (7, 13, 37), (3, 128)),
    "sums of one": product((), (), (1, 1, 1), (7, 9), requantized=False),
    "uneven": product((1,), (2,), (9, 70, 67), (255, 0), accumulators_out=True),
    "uneven swapped": product((2,), (1,), (5, 7, 17), (0, 255), swapped=True, requantized=False),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_numpy(name: str) -> None:
    contraction = CASES[name]
    shape = contraction.b_shape
    assert shape is not None
    check(contraction, "x86:avx512vnni", random(contraction.x_shape, 0), random(shape, 1))


@pytest.mark.parametrize("name", ["attention scores", "uneven"])
def test_equal_to_numpy_without_avx512(name: str) -> None:
    contraction = CASES[name]
    shape = contraction.b_shape
    assert shape is not None
    check(contraction, "x86:avx2", random(contraction.x_shape, 2), random(shape, 3))


@pytest.mark.parametrize("zeros", [(0, 0), (255, 255), (0, 255)])
def test_extreme_values(zeros: tuple[int, int]) -> None:
    contraction = product((), (), (5, 131, 18), zeros, requantized=False)
    for value in (0, 255):
        a, b = np.full((5, 131), value, np.uint8), np.full((131, 18), 255 - value, np.uint8)
        check(contraction, "x86:avx512vnni", a, b)


def test_the_rule_declines_with_a_reason() -> None:
    target = parse_target("x86:avx2")
    many = product((), (), (2, 2, 2), (0, 0))
    numbers = Requantization(np.full(2, 2**30, np.int32), np.full(2, 40, np.int32), 0, 0, 255)
    biased = Contraction("m", "batch_matmul", None, "uint8", (2, 2), (2, 2), b_shape=(2, 2), requantize=numbers)
    assert RULE.match(many, target) is None and "own" in (RULE.match(biased, target) or "")
    weighted = Contraction("m", "matmul", levels(8, "bytes", (2, 1, 2)), "uint8", (2, 2), (2, 2))
    assert "two operands" in (RULE.match(weighted, target) or "")
