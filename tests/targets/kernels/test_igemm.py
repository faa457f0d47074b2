"""Products of codes by levels equal int64 numpy bit for bit, for every k, geometry and extreme value."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest

from kbitc.quant.levels import LevelTensor, of_levels
from kbitc.targets.cpu.rules.integer import CodeProduct
from kbitc.targets.lower.contraction import Contraction, ConvAttributes
from kbitc.targets.target import Target, parse_target
from tests.support.integer_products import check, conv, levels, matmul, reset
from tests.support.kernels import Case, compile_cases, hot_blocks

RULE = CodeProduct()
X86 = ("x86:avx512vnni", "x86:avx2")


@pytest.fixture(params=[*X86, pytest.param("arm-neon:dotprod", marks=pytest.mark.slow)])
def target(request: pytest.FixtureRequest) -> Target:
    return parse_target(request.param)


def cases_of(contractions: Sequence[Contraction], values: str = "random") -> list[Case]:
    return [reset(RULE, contraction, values) for contraction in contractions]


def test_every_k_and_grid(target: Target) -> None:
    """Affine grids of step one and two, tables, whole bytes, two levels; 33 channels are a unit and one code."""
    kinds = [(bits, "affine") for bits in range(1, 9)] + [(1, "double"), (3, "double"), (2, "table"), (5, "table")]
    weights = [levels(bits, kind, (17, 1, 33)) for bits, kind in kinds]
    weights += [levels(bits, "two", (17, 1, 70), block=block) for bits, block in ((4, 32), (3, 16))]
    check(cases_of([matmul(f"m{i}", weight, (2,)) for i, weight in enumerate(weights)]), target)


@pytest.mark.parametrize("values", ["zero", "largest", "smallest", "outlier"])
def test_extreme_values(values: str) -> None:
    """All codes 0 or 255 by all levels of one size fill the accumulators, those of 16 bits too, without saturation."""
    for name in X86:
        contractions = []
        for i, level in enumerate((-128, 127, -65, 65, -64, 64, -32, 32, -8, 8)):
            weight = of_levels(np.full((16, 1, 260), level, np.int8))
            contractions.append(matmul(f"m{i}", weight, (2,), zero=255 * (i % 2)))
        check(cases_of(contractions, values), parse_target(name))


def test_rows_and_channels_around_a_tile(target: Target) -> None:
    contractions = []
    for rows, outputs in ((1, 67), (4, 16), (5, 64), (6, 17), (11, 15), (2, 1)):
        weight = levels(8, "bytes", (outputs, 1, 31))
        contractions.append(matmul(f"m{rows}_{outputs}", weight, (rows,), per_channel=rows % 2 == 0))
    check(cases_of(contractions), target)


GEOMETRY = {
    "plain": ConvAttributes((3, 3)),
    "padded": ConvAttributes((3, 3), (1, 1), (1, 1, 1, 1)),
    "strided": ConvAttributes((3, 3), (2, 2), (1, 1, 1, 1)),
    "uneven": ConvAttributes((2, 5), (1, 2), (0, 3, 1, 0)),
    "dilated": ConvAttributes((3, 3), (1, 1), (2, 2, 2, 2), (2, 2)),
    "dilated down": ConvAttributes((3, 2), (1, 1), (1, 0, 2, 0), (2, 1)),
    "point": ConvAttributes((1, 1)),
    "line": ConvAttributes((1, 4), (1, 2), (0, 1, 0, 2)),
}


def test_convolutions(target: Target) -> None:
    contractions = []
    for i, geometry in enumerate(GEOMETRY.values()):
        channels, bits, kind = ((3, 8, "bytes"), (5, 4, "affine"))[i % 2]
        weight = levels(bits, kind, (9, geometry.kernel[0] * geometry.kernel[1], channels))
        contractions.append(conv(f"c{i}", weight, (2, 9, 8), geometry))
    check(cases_of(contractions), target)


def test_groups_and_factors(target: Target) -> None:
    three = ConvAttributes((3, 3), (1, 1), (1, 1, 1, 1))
    check(
        cases_of(
            [
                conv("two", levels(8, "bytes", (40, 9, 5)), (1, 6, 7), ConvAttributes((3, 3), group=2)),
                conv("four", levels(4, "affine", (68, 1, 6)), (1, 2, 7), ConvAttributes((1, 1), group=4)),
                conv("each", levels(8, "bytes", (18, 9, 1)), (1, 6, 7), ConvAttributes((3, 3), group=18)),
                conv("factors", levels(4, "two", (10, 9, 40), block=32), (1, 3, 2), three),
            ]
        ),
        target,
    )


def test_rounding_of_wide_and_high_shifts(target: Target) -> None:
    """Shifts below 32 and above 54 take the other way; a multiplier of 0 has any shift."""
    weight = levels(8, "bytes", (33, 1, 8))
    contractions = [matmul(f"s{shift}", weight, (3,), shift=shift) for shift in (1, 31, 32, 54, 55, 62)]
    contractions += [matmul("dead", weight, (3,), dead=True), matmul("clipped", weight, (3,), low=40, high=90)]
    contractions += [matmul("sums", weight, (3,), requantized=False)]
    check(cases_of(contractions), target)


def test_the_accumulators_are_the_sums() -> None:
    target = parse_target("x86:avx512vnni")
    case = reset(RULE, matmul("m", levels(4, "affine", (20, 1, 40)), (7,), accumulators_out=True))
    check([case], target)


def test_results_do_not_depend_on_threads() -> None:
    import tvm

    target = parse_target("x86:avx2")
    case = reset(RULE, conv("c", levels(8, "bytes", (20, 9, 20)), (1, 30, 31), GEOMETRY["padded"]))
    compiled = compile_cases([case], target)
    configure = tvm.get_global_func("runtime.config_threadpool")
    results = []
    for threads in (1, 2):
        configure(1, threads)
        results.append(compiled.run()["c"])
    configure(1, 0)
    np.testing.assert_array_equal(*results)


def test_the_inner_loop_is_dot_products_only() -> None:
    """No float, no widening and no spill of an accumulator between the dot products."""
    target = parse_target("x86:avx512vnni")
    weight = levels(8, "bytes", (64, 9, 64))
    compiled = compile_cases([reset(RULE, conv("c", weight, (1, 8, 8), GEOMETRY["padded"]))], target)
    blocks = hot_blocks(compiled.assembly(), "vpdpbusd")
    loop = max(blocks, key=lambda block: block.count("vpdpbusd"))
    names = set(re.findall(r"^\t(v\w+)", loop, re.MULTILINE))
    assert names <= {"vpdpbusd", "vpbroadcastd", "vmovdqa64", "vmovdqu64", "vmovups", "vmovaps"}, names


@pytest.mark.parametrize(("bits", "pairs", "wholes"), [(8, 0, 2), (7, 1, 1), (4, 1, 1 / 8)])
def test_avx2_multiplies_bytes_where_they_fit_16_bits(bits: int, pairs: float, wholes: float) -> None:
    """One vpmaddubsw a step and a vpmaddwd at the end of a chain; two vpmaddwd a step for whole bytes."""
    kind = "bytes" if bits == 8 else "affine"
    case = reset(RULE, matmul("m", levels(bits, kind, (64, 1, 256)), (64,)))
    blocks = hot_blocks(compile_cases([case], parse_target("x86:avx2")).assembly(), "vpmaddwd")
    loop = max(blocks, key=lambda block: block.count("vpmaddwd"))
    found = [loop.count(name) / max(loop.count("vpmaddubsw"), loop.count("vpmaddwd") / 2)
             for name in ("vpmaddubsw", "vpmaddwd")]  # fmt: skip
    assert found == [pairs, wholes]


def test_the_rule_declines_with_a_reason() -> None:
    target = parse_target("x86:avx2")
    weight = levels(8, "bytes", (4, 1, 4))
    assert "codes" in (RULE.match(Contraction("f", "matmul", weight, "float32", (1, 4), (1, 4)), target) or "")
    batch = Contraction("b", "batch_matmul", None, "uint8", (1, 4), (1, 4), b_shape=(4, 4))
    assert "constant" in (RULE.match(batch, target) or "")
    assert isinstance(weight, LevelTensor) and RULE.match(matmul("m", weight, (1,)), target) is None
