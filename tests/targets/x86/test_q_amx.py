"""Products on AMX tiles: the integers of numpy and the floats of dot products, bit for bit, for any number of rows.

Where the processor has no AMX, the machine code runs on the emulator (`tests/support/amx.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm

from kbitc.targets.kernels import itiled, qtiled
from kbitc.targets.kernels.isa import isa_of
from kbitc.targets.kernels.tiled import Reduction
from kbitc.targets.lower.contraction import RELU, ConvAttributes
from kbitc.targets.rules.product import product_spec
from kbitc.targets.target import parse_target
from tests.support import amx, kernels
from tests.support.kernels import Case
from tests.support.products import RULE, VBMI, check

RANDOM = np.random.default_rng(17)
BIAS = RANDOM.standard_normal(49).astype(np.float32)
ROWS = (1, 7, 8, 15, 16, 17, 33, 64)


def product(name: str, scheme: str, size: tuple[int, int, int], weight: Any = None, **more: Any) -> Case:
    """A product of size (M, N, K)."""
    m, n, k = size
    weight = kernels.random_weight(scheme, (n, 1, k)) if weight is None else weight
    x = RANDOM.standard_normal((m, k)).astype(np.float32)
    return Case(name, RULE, kernels.matmul(name, weight, (m,), **more), x)


def image(
    name: str, scheme: str, shape: tuple[int, int, int], size: tuple[int, int, int], geometry: ConvAttributes
) -> Case:
    """A convolution by a weight of shape (N, T, C) of an image of size (B, H, W)."""
    weight = kernels.random_weight(scheme, shape)
    x = RANDOM.standard_normal((*size, shape[2])).astype(np.float32)
    return Case(name, RULE, kernels.convolution(name, weight, size, geometry), x)


CASES = (
    *(product(f"int{k}", f"int{k}:b32", (8 + k, 33, 70)) for k in range(1, 9)),
    *(product(f"zero{k}", f"uint{k}:b16:zp", (33 - k, 16, 40)) for k in (1, 4, 8)),
    *(product(f"offset{k}", f"uint{k}:b32:min", (16, 17, 97)) for k in (3, 8)),
    product("offset_channel", "uint5:c:min", (17, 16, 131)),
    product("channel", "int8:c", (65, 49, 131), bias=BIAS),
    product("channel3", "int3:c", (16, 33, 33), post=RELU),
    product("tensor", "int4:t:f32", (9, 16, 64)),
    product("zero_channel", "uint8:c:zp", (15, 20, 95)),
    product("nf4", "nf4:b64", (17, 17, 95)),
    product("nf5", "nf5:b80", (16, 32, 170)),
    product("learned", "", (16, 17, 40), weight=kernels.learned_weight(8, (17, 1, 40))),
    product("odd_block", "int3:b48", (16, 16, 181)),
    product("long_block", "int5:b144", (33, 16, 500)),
    product("two_levels", "int4:b32/i4", (33, 49, 95), bias=BIAS),
    product("two_levels_zero", "uint4:b32/i4:zp", (17, 33, 70)),
    product("two_levels_odd", "int3:b48/i4", (16, 16, 181)),
    product("two_levels_table", "fp4:b16/i4", (10, 16, 40)),
    image("strided", "int4:b32", (17, 9, 40), (2, 7, 9), ConvAttributes((3, 3), (2, 1), (1, 1, 1, 1))),
    image("lines", "int8:c", (16, 9, 33), (1, 2, 28), ConvAttributes((3, 3), (1, 1), (1, 1, 1, 1))),
    image("pointwise", "uint4:b16:zp", (17, 1, 40), (1, 6, 5), ConvAttributes((1, 1))),
    image("two_levels_image", "int2:b16/i4", (20, 4, 40), (1, 6, 5), ConvAttributes((2, 2))),
)
# With the sums of every block: the integers themselves.
SUMS = ("int4", "zero8", "offset8", "channel", "nf4", "two_levels", "strided", "lines", "pointwise")


@cache
def results(target_name: str, sums: bool = False) -> dict[str, Any]:
    """Outputs of all cases, or of some with their sums."""
    target = parse_target(target_name)
    isa = isa_of(target)
    cases = [case for case in CASES if not sums or case.name in SUMS]
    if sums:
        cases = [replace(case, contraction=replace(case.contraction, accumulators_out=True)) for case in cases]
    for case in cases:
        spec = product_spec(case.contraction, case.contraction.weight, factors=True)
        assert qtiled.takes(spec, isa) == (target_name == amx.AMX), f"{case.name} is a case of dot products"
    return kernels.compile_cases(cases, target).run()


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    """No thread keeps its tiles."""
    emulator = amx.emulator()
    yield
    assert emulator is None or emulator.configured_threads() == 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_floats_are_those_of_dot_products_bit_for_bit(case: Case) -> None:
    np.testing.assert_array_equal(results(amx.AMX)[case.name], results(VBMI)[case.name])


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_numpys(name: str) -> None:
    check(next(case for case in CASES if case.name == name), results(amx.AMX, sums=True))


def test_every_number_of_rows_gives_the_same_bits_on_one_and_two_threads() -> None:
    """Symbolic rows: a call chooses tiles or dot products. A row has the same result whatever rows are around it."""
    schemes = {"block": "int4:b32", "folded": "int4:b32/i4", "channel": "int8:c"}
    m = tvm.tirx.Var("m", "int64")
    cases = [product(name, scheme, (max(ROWS), 40, 70)) for name, scheme in schemes.items()]
    open_rows = [
        replace(case, contraction=replace(case.contraction, x_shape=(m, 70), out_shape=(m, 40))) for case in cases
    ]
    built = kernels.compile_cases(open_rows, parse_target(amx.AMX))
    wanted = kernels.compile_cases(cases, parse_target(VBMI)).run()
    configure = tvm.get_global_func("runtime.config_threadpool")
    for threads in (1, 2):
        configure(1, threads)
        for rows in ROWS:
            emulator = amx.emulator()
            before = None if emulator is None else emulator.counts()
            found = built.run([case.x[:rows] for case in cases])
            if emulator is not None and before is not None:
                assert (emulator.counts().since(before).dot > 0) == (rows >= qtiled.LEAST_ROWS)
            for name in schemes:
                np.testing.assert_array_equal(found[name], wanted[name][:rows], err_msg=f"{name} {rows} rows")
    configure(1, 0)


def test_windows_cover_every_channel_once_and_stay_inside_rows() -> None:
    for channels in range(1, 300):
        for span in (channels, 16, 32, 48, 112, 128, 1072):
            for readable in {-(-channels // 32) * 32, -(-channels // 4) * 4}:
                made = Reduction(channels, readable, span)
                assert made.possible and made.width % 4 == 0 and 0 < made.width <= 64
                counted = made.whole * made.span
                assert counted == 0 or made.span % made.width == 0
                last = made.last
                if last is None:
                    assert counted == channels
                    continue
                end = counted + last.windows * made.width
                assert end == made.counted and end <= readable
                if last.tail < 0:
                    assert channels <= end < channels + made.width
                else:
                    assert 0 <= last.tail < end < channels <= last.tail + made.width <= readable or (
                        last.tail == end < channels <= end + made.width <= readable
                    )


def test_what_is_not_for_tiles() -> None:
    isa = isa_of(parse_target(amx.AMX))
    few = product("few", "int4:b32", (qtiled.LEAST_ROWS - 1, 16, 64))
    assert not qtiled.takes(product_spec(few.contraction, few.contraction.weight), isa)
    many = product("many", "int4:b32", (qtiled.LEAST_ROWS, 16, 64))
    spec = product_spec(many.contraction, many.contraction.weight)
    assert qtiled.takes(spec, isa) and not qtiled.takes(spec, isa_of(parse_target("x86:avx512vbmi")))
    assert itiled.LEAST_ROWS > 1


def test_factors_fold_where_the_format_proves_that_they_fit_a_byte() -> None:
    for scheme in ("int1:b32/i4", "int4:b32/i4", "uint2:b32/i4:zp", "uint4:b32/i4:zp", "fp4:b32/i4"):
        contraction = product("p", scheme, (16, 16, 64)).contraction
        spec = product_spec(contraction, contraction.weight, factors=True)
        assert qtiled.folds_factors(spec)
        assert not qtiled.folds_factors(replace(spec, accumulators=True))
        weight = contraction.weight
        largest = np.abs(weight.levels().astype(int)).max() * weight.scheme.largest_scale_code
        assert largest <= qtiled.largest_product(spec)


def test_the_inner_loop_is_loads_and_dot_products_only() -> None:
    """Two loads of rows, two of levels, four products, 16 times; nothing is decoded or spilled in between."""
    case = product("p", "int4:b32/i4", (64, 32, 1024))
    assembly = kernels.compile_cases([case], parse_target(amx.AMX)).assembly()
    hot = kernels.hot_blocks(assembly, "tdpbssd")
    names = [re.findall(r"^\t(\w+)", block, re.MULTILINE) for block in hot]
    assert sum(found == ["tileloadd"] * 4 + ["tdpbssd"] * 4 for found in names) >= 12
    assert all(not name.startswith("v") for found in names for name in found)
