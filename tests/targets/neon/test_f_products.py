"""Float products on NEON: under qemu they give the bits that x86 gives, with and without tails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kbitc.targets.cpu.rules.float import FloatBatchProduct, FloatDepthwise, FloatProduct
from kbitc.targets.lower.contraction import Contraction, ConvAttributes, PostFunction
from kbitc.targets.target import host_runs, parse_target
from tests.support.float_kernels import Compiled, convolution, uniform
from tests.support.qemu import need_runner

AROUND = (1, 1, 1, 1)
CASES: list[tuple[Any, Contraction, tuple[Any, ...]]] = [
    (
        FloatProduct(),
        Contraction("m", "matmul", uniform(1, 37, 1, 13), "float32", (9, 13), (9, 37), bias=uniform(2, 37)),
        (uniform(3, 9, 13),),
    ),
    (
        FloatProduct(),
        convolution(uniform(1, 20, 9, 3), (1, 7, 6), ConvAttributes((3, 3), (2, 2), AROUND)),
        (uniform(3, 1, 7, 6, 3),),
    ),
    (
        FloatDepthwise(),
        convolution(
            uniform(1, 22, 9, 1), (1, 6, 9), ConvAttributes((3, 3), (1, 1), AROUND, group=22), post=PostFunction(0.0)
        ),
        (uniform(3, 1, 6, 9, 22),),
    ),
    (
        FloatBatchProduct(),
        Contraction("b", "batch_matmul", None, "float32", (2, 7, 5), (2, 7, 19), b_shape=(2, 19, 5), transpose_b=True),
        (uniform(3, 2, 7, 5), uniform(4, 2, 19, 5)),
    ),
    (
        FloatBatchProduct(),
        Contraction("b", "batch_matmul", None, "float32", (2, 3, 5), (2, 3, 6), b_shape=(5, 6)),
        (uniform(3, 2, 3, 5), uniform(4, 5, 6)),
    ),
]


@pytest.mark.parametrize(("rule", "contraction", "inputs"), CASES)
def test_the_same_bits_as_on_x86(rule: Any, contraction: Contraction, inputs: tuple[Any, ...]) -> None:
    x86 = parse_target("x86:avx2")
    reason = host_runs(x86)
    if reason is not None:
        pytest.skip(reason)
    neon = need_runner("arm-neon:dotprod")
    got = Compiled(rule, contraction, neon)(*inputs)
    np.testing.assert_array_equal(got, Compiled(rule, contraction, x86)(*inputs))
