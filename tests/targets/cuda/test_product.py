"""Integer products on the emulated GPU: accumulators equal int64 numpy, floats stay within the rounding bound."""

from __future__ import annotations

import pytest

from tests.targets.cuda import cases
from tests.targets.cuda.cases import Product
from tests.targets.cuda.emulator.emulator import Emulator

# Every bit width, with and without zero points, tables, blocks of whole and half units, tails of N and C.
GEMV = [
    Product("int1:b32", 1, 16, 64), Product("int2:c", 2, 33, 900), Product("int3:b16", 4, 17, 50),
    Product("int4:b32", 3, 40, 1000), Product("uint5:b64:zp", 1, 33, 530), Product("int6:b48", 1, 20, 301),
    Product("int4:b32/i4", 2, 33, 150), Product("uint4:b48/i4:zp", 1, 20, 200),
    Product("int7:b256", 1, 20, 1100), Product("uint8:b128:zp", 1, 33, 400), Product("nf4:b32", 2, 40, 100),
    Product("uint4:b32:min", 3, 40, 100), Product("uint8:b48:min", 1, 33, 301), Product("uint3:c:min:f32", 2, 17, 900),
    Product("uint2:b256:min", 1, 20, 1100),
]  # fmt: skip
GEMM = [
    Product("int1:b16", 6, 33, 50), Product("uint2:b32:zp", 16, 16, 70), Product("int3:c", 33, 17, 50),
    Product("int4:b32", 17, 40, 100), Product("int5:t", 9, 31, 33), Product("uint6:b80:zp", 5, 20, 200),
    Product("int3:b32/i4", 9, 33, 70), Product("uint4:b16/i4:zp", 17, 20, 90),
    Product("int7:b64", 70, 100, 130), Product("int8:b1024", 20, 64, 1030), Product("nf4:b48", 65, 49, 100),
    Product("uint4:b32:min", 17, 40, 100), Product("uint8:b80:min", 5, 20, 200), Product("uint3:c:min:f32", 33, 17, 50),
]  # fmt: skip
CONV = [
    Product("int4:b32", 0, 24, 40, image=(1, 7, 9, 3, 1, 1, 1)),
    Product("uint3:b16:zp", 1, 17, 19, image=(2, 8, 5, 3, 2, 1, 1)),
    Product("uint4:b16/i4:zp", 0, 17, 35, image=(1, 6, 5, 3, 1, 1, 1)),
    Product("uint4:b16:min", 1, 17, 19, image=(2, 8, 5, 3, 2, 1, 1)),
    Product("nf4:c", 0, 16, 3, image=(1, 9, 11, 5, 2, 2, 1)),
    Product("int8:b32", 1, 20, 33, image=(1, 10, 10, 3, 1, 2, 2), symbolic=True),
]


VALUE_SCHEMES = ("int8:c", "uint8:b32:zp", "uint8:b32:min", "nf4:b16")
LEARNED = [Product(f"learned{k}:b32", m, 17, 50) for k, m in ((1, 2), (2, 6), (3, 2), (4, 6), (5, 2), (6, 6), (8, 2))]


def test_tables_of_any_levels_are_exact(emulator: Emulator) -> None:
    assert emulator.run(cases.check_products, LEARNED, "any") == []


def test_vector_kernel_is_exact(emulator: Emulator) -> None:
    assert emulator.run(cases.check_products, GEMV, "gemv") == []


def test_matrix_kernel_is_exact(emulator: Emulator) -> None:
    assert emulator.run(cases.check_products, GEMM, "gemm") == []


def test_convolution_is_exact(emulator: Emulator) -> None:
    assert emulator.run(cases.check_products, CONV, "gemm") == []


@pytest.mark.parametrize("values", ["zero", "extreme", "outlier"])
def test_values_that_break_kernels(emulator: Emulator, values: str) -> None:
    shapes = [Product(scheme, m, 20, 80, values) for scheme in VALUE_SCHEMES for m in (2, 9)]
    assert emulator.run(cases.check_products, shapes, "any") == []


@pytest.mark.parametrize("m", [1, 4, 5, 130])
def test_symbolic_rows_choose_the_kernel_at_run_time(emulator: Emulator, m: int) -> None:
    shapes = [Product("int4:b32", m, 33, 70, symbolic=True), Product("uint5:b16:zp", m, 16, 40, symbolic=True)]
    assert emulator.run(cases.check_products, shapes, "any") == []


@pytest.mark.slow
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_bit_width_block_and_size(emulator: Emulator, bits: int) -> None:
    schemes = [f"int{bits}:{g}" for g in ("c", "t", "b16", "b32", "b48", "b128", "b256", "b1024", "b32:f32")]
    schemes += [f"uint{bits}:{g}:{zero}" for g in ("c", "b32", "b80") for zero in ("zp", "min")]
    schemes += [f"nf{bits}:b32"] if 2 <= bits <= 7 else []
    sizes = [(1, 1, 1), (2, 17, 31), (5, 16, 32), (16, 15, 33), (31, 64, 97), (64, 65, 1100)]
    for scheme in schemes:
        shapes = [Product(scheme, m, n, c) for m, n, c in sizes]
        assert emulator.run(cases.check_products, shapes, "any") == []
