"""Integer products to try on every CPU target, and the check that their accumulators are numpy's int64 product."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from kbitc.targets.cpu.rules.quantized import INTEGER_PRODUCT
from kbitc.targets.lower.contraction import RELU, ConvAttributes, PostFunction
from kbitc.targets.target import host_runs, parse_target
from tests.support import kernels
from tests.support.kernels import Case, Compiled
from tests.support.qemu import need_runner

VBMI, VNNI, AVX2, NEON = "x86:avx512vbmi", "x86:avx512vnni", "x86:avx2", "arm-neon:dotprod"
RANDOM = np.random.default_rng(7)
RULE = INTEGER_PRODUCT


def product(name: str, scheme: str, size: tuple[int, int, int], x: Any = None, weight: Any = None, **more: Any) -> Case:
    """A matrix product of size (M, N, K) with its accumulators."""
    m, n, k = size
    weight = kernels.random_weight(scheme, (n, 1, k)) if weight is None else weight
    x = RANDOM.standard_normal((m, k)).astype(np.float32) if x is None else x
    return Case(name, RULE, kernels.matmul(name, weight, (m,), accumulators_out=True, **more), x)


def _extreme(name: str, scheme: str, channels: int, first: int = 0) -> Case:
    """Every code and activation at its end: the largest sums there are.

    In the last row every second pair of activations is negative: int16 sums of pairs then differ most.
    """
    weight = kernels.random_weight(scheme, (17, 1, channels))
    weight.codes[:9] = 0
    weight.codes[9:] = 2**weight.bits - 1
    if weight.zero_points is not None:
        weight.zero_points[:] = 2**weight.bits - 1
    x = np.full((5, channels), -1e30, np.float32)
    x[1] = 1e30
    x[4] = np.where(np.arange(channels) % 4 < 2, 1e30, -1e30)
    return product(name, scheme, (5 - first, 17, channels), x[first:], weight)


def _learned(bits: int, channels: int) -> Case:
    """A table of any levels."""
    weight = kernels.learned_weight(bits, (17, 1, channels))
    return product(f"learned{bits}", "", (2, 17, channels), weight=weight)


def _outlier() -> Case:
    x = RANDOM.standard_normal((2, 64)).astype(np.float32)
    x[1, 40] = 3e7
    return product("outlier", "int4:b32", (2, 16, 64), x)


BIAS = RANDOM.standard_normal(33).astype(np.float32)
CASES = (
    *(product(f"int{k}", f"int{k}:b32", (2, 16, 38)) for k in range(1, 9)),
    product("rows7", "int4:b32", (7, 17, 70)),
    product("table4", "nf4:b32", (5, 17, 95)),
    product("table6", "nf6:b32", (2, 16, 33)),
    _learned(3, 40),
    _learned(8, 40),
    product("zero4", "uint4:b16:zp", (3, 15, 48)),
    product("zero8", "uint8:b32:zp", (1, 31, 97)),
    *(product(f"offset{k}", f"uint{k}:b32:min", (1 + k % 3, 17, 70)) for k in range(1, 9)),
    product("offset_odd", "uint3:b48:min:f32", (7, 33, 181), bias=RANDOM.standard_normal(33).astype(np.float32)),
    product("offset_channel", "uint5:c:min", (5, 16, 131)),
    product("offset_vector", "uint4:b16:min", (1, 100, 65)),
    product("offset_zeros", "uint4:b32:min", (2, 16, 32), np.zeros((2, 32), np.float32)),
    product("channel", "int8:c", (5, 16, 131), bias=RANDOM.standard_normal(16).astype(np.float32)),
    product("tensor", "int4:t:f32", (2, 16, 64), post=PostFunction(-1.0, 2.0)),
    product("odd_block", "int3:b48", (2, 16, 181), bias=BIAS[:16], post=RELU),
    product("long_block", "int5:b144", (2, 16, 500)),
    product("one", "int2:b32", (1, 1, 1)),
    product("vector", "int4:b32", (1, 100, 65)),
    product("vector2", "int2:b32", (1, 40, 70)),
    product("vector3", "uint3:b48:zp", (1, 40, 100)),
    product("vector4", "uint4:b48:zp", (1, 40, 100)),
    product("vector_long", "int3:b144", (1, 20, 300)),
    product("two_levels", "int4:b32/i4", (5, 17, 95)),
    product("two_levels_zero", "uint4:b32/i4:zp", (3, 33, 70)),
    product("two_levels_vector", "int3:b48/i4", (1, 40, 181)),
    product("two_levels_table", "fp4:b16/i4", (6, 16, 40), bias=BIAS[:16], post=RELU),
    product("zeros", "int4:b32", (2, 16, 32), np.zeros((2, 32), np.float32)),
    _outlier(),
    *(_extreme(f"extreme{k}", f"int{k}:b32", 70) for k in range(1, 8)),
    *(
        _extreme(f"extreme_vector_{name}", f"{name}:b32", 70, first=4)
        for name in ("int2", "int4", "nf4", "fp4", "int7")
    ),
    _extreme("extreme8", "int8:c", 4099),
    _extreme("extreme_zero8", "uint8:b1024:zp", 1030),
    _extreme("extreme_two_levels", "int4:b32/i4", 4099),
    _extreme("extreme_offset8", "uint8:b1024:min", 1030),
)
MORE_CASES = (
    *(_learned(k, 70) for k in (1, 2, 4, 5, 6, 7)),
    product("table5", "nf5:b80", (6, 64, 170)),
    product("table7", "nf7:b32", (1, 16, 45)),
    product("table2", "nf2:b32", (3, 16, 45)),
    product("zero1", "uint1:c:zp", (3, 20, 95)),
    product("rows17", "uint6:b16:zp", (17, 33, 64)),
    product("largest_block", "int5:b1024", (1, 16, 1040)),
)


def _convolutions() -> list[Case]:
    cases = []
    for name, scheme, shape, image, geometry in (
        ("strided", "int4:b32", (16, 9, 40), (2, 7, 9), ConvAttributes((3, 3), (2, 1), (1, 1, 1, 1))),
        ("dilated", "int3:c", (16, 4, 8), (1, 6, 5), ConvAttributes((2, 2), (1, 1), (0, 1, 0, 0), (2, 1))),
        ("pointwise", "uint4:b16:zp", (17, 1, 40), (1, 6, 5), ConvAttributes((1, 1), (2, 2))),
        ("two_levels_image", "int2:b16/i4", (20, 9, 40), (1, 6, 5), ConvAttributes((3, 3), (1, 1), (1, 1, 1, 1))),
        ("offset_image", "uint4:b16:min", (17, 9, 40), (2, 5, 6), ConvAttributes((3, 3), (2, 1), (1, 1, 1, 1))),
        ("image", "int8:b32", (16, 9, 3), (1, 5, 5), ConvAttributes((3, 3), (1, 1), (1, 1, 1, 1))),
    ):
        weight = kernels.random_weight(scheme, shape)
        x = RANDOM.standard_normal((*image, shape[2])).astype(np.float32)
        more = {"bias": RANDOM.standard_normal(shape[0]).astype(np.float32), "accumulators_out": True}
        cases.append(Case(name, RULE, kernels.convolution(name, weight, image, geometry, **more), x))
    return cases


CONVOLUTIONS = tuple(_convolutions())


@cache
def compiled(target_name: str) -> Compiled:
    """All cases as one module of a target; built once a session."""
    most = target_name in (VNNI, VBMI)
    cases = (*CASES, *MORE_CASES, *CONVOLUTIONS) if most else (*CASES, *CONVOLUTIONS)
    return kernels.compile_cases(cases, parse_target(target_name))


@cache
def results(target_name: str) -> dict[str, Any]:
    """Outputs of all cases on a target; run once a session."""
    return compiled(target_name).run()


def check(case: Case, outputs: dict[str, Any]) -> None:
    """Codes and accumulators equal, floats within the bound of their rounding."""
    weight, geometry = case.contraction.weight, case.contraction.conv
    rows = case.x[:, None] if geometry is None else kernels.gather_rows(case.x, geometry)
    wanted = kernels.expected(rows, weight, case.contraction.bias)
    found = outputs[f"{case.name}.accumulators"].reshape(wanted.accumulators.shape)
    np.testing.assert_array_equal(found, wanted.accumulators)
    if geometry is None:
        codes = outputs[f"{case.name}.codes"]
        channels = weight.shape[2]
        np.testing.assert_array_equal(codes[:, :channels], wanted.codes.reshape(codes.shape[0], -1)[:, :channels])
        assert not codes[:, channels:].any()
    out = outputs[case.name].reshape(wanted.out.shape)
    bound = kernels.float_bound(rows, weight)
    if case.contraction.bias is not None:
        bound = bound + 2.0**-23 * np.abs(case.contraction.bias)
    reference = clamped(wanted.out, case.contraction.post)
    assert (np.abs(out.astype(np.float64) - reference) <= bound).all()


def clamped(values: Any, post: PostFunction | None) -> Any:
    if post is None:
        return values
    low = -np.inf if post.low is None else post.low
    return np.clip(values, low, np.inf if post.high is None else post.high)


def need(target_name: str) -> None:
    """Skip where neither this machine nor an emulator runs the target."""
    if target_name == NEON:
        need_runner(NEON)
    elif reason := host_runs(parse_target(target_name)):
        pytest.skip(reason)
