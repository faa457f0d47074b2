"""Float matrix products and convolutions by a constant weight, against float64 within the bound of a sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm import tirx

from kbitc.targets.cpu.rules.float import FloatProduct
from kbitc.targets.kernels.fgemm import pack_bias, pack_float
from kbitc.targets.kernels.ftile import Registers, registers_of
from kbitc.targets.lower.contraction import RELU, Contraction, ConvAttributes, PostFunction
from kbitc.targets.target import Target, host_runs, parse_target
from tests.support.float_kernels import Compiled, check_sum, convolution, uniform
from tests.support.kernels import gather_rows, hot_blocks

TARGETS = ("x86:avx2", "x86:avx512vnni")
Array = Any


def target_here(name: str) -> Target:
    target = parse_target(name)
    reason = host_runs(target)
    if reason is not None:
        pytest.skip(reason)
    return target


def matmul(x_lead: tuple[Any, ...], weight: Array, **more: Any) -> Contraction:
    n, _, c = weight.shape
    return Contraction("node", "matmul", weight, "float32", (*x_lead, c), (*x_lead, n), **more)


def by_weight(x: Array, w: Array) -> Array:
    """x [..., C] by w [N, 1, C]."""
    return np.asarray(x @ w[:, 0].T)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("m", "c", "n"), [(1, 1, 1), (1, 37, 70), (2, 5, 16), (13, 7, 17), (25, 64, 100), (7, 3, 33)])
def test_matmul_of_odd_shapes(name: str, m: int, c: int, n: int) -> None:
    weight, bias, x = uniform(1, n, 1, c), uniform(2, n), uniform(3, m, c)
    got = Compiled(FloatProduct(), matmul((m,), weight, bias=bias), target_here(name))(x)
    check_sum(got, by_weight, x, weight, c, bias=bias)


@pytest.mark.parametrize("name", TARGETS)
def test_symbolic_rows_give_the_same_bits_for_every_number_of_rows(name: str) -> None:
    """A row is the same sequence of operations whatever tile computes it."""
    weight, x = uniform(1, 50, 1, 19), uniform(3, 40, 19)
    m = tirx.Var("m", "int64")
    run = Compiled(FloatProduct(), matmul((m,), weight, post=RELU), target_here(name))
    whole = run(x)
    check_sum(whole, by_weight, x, weight, 19, post=RELU)
    for rows in (0, 1, 2, 5, 11, 12, 13, 27):
        np.testing.assert_array_equal(run(x[:rows]), whole[:rows])


def test_avx2_and_avx512_give_the_same_bits() -> None:
    weight, x = uniform(1, 50, 1, 131), uniform(3, 9, 131)
    made = [Compiled(FloatProduct(), matmul((9,), weight), target_here(name))(x) for name in TARGETS]
    np.testing.assert_array_equal(made[0], made[1])


def test_infinite_and_nan_activations_stay_in_their_row() -> None:
    weight, x = uniform(1, 20, 1, 8), uniform(3, 9, 8)
    x[3, 2], x[5, 1] = np.inf, np.nan
    post = PostFunction(-1.0, 1.0)
    got = Compiled(FloatProduct(), matmul((9,), weight, post=post), target_here("x86:avx2"))(x)
    assert np.isnan(got[5]).all()
    np.testing.assert_array_equal(got[3], np.sign(weight[:, 0, 2]))
    rest = [0, 1, 2, 4, 6, 7, 8]
    check_sum(got[rest], by_weight, x[rest], weight, 8, post=post)


CONVOLUTIONS = [
    # image, C a group, N, geometry
    ((1, 9, 7), 3, 20, ConvAttributes((3, 3), (2, 2), (1, 1, 1, 1))),
    ((2, 6, 5), 8, 16, ConvAttributes((1, 1))),
    ((1, 8, 11), 5, 18, ConvAttributes((3, 2), (1, 3), (2, 0, 1, 1), (2, 2))),
    ((1, 1, 30), 4, 33, ConvAttributes((1, 5), (1, 2), (0, 2, 0, 2))),
    ((1, 5, 5), 2, 12, ConvAttributes((3, 3), (1, 1), (1, 1, 1, 1), group=3)),
    ((1, 4, 6), 3, 80, ConvAttributes((1, 1), (2, 1), group=2)),
    ((1, 4, 6), 1, 6, ConvAttributes((3, 3), (1, 1), (1, 1, 1, 1), group=3)),
]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("image", "c", "n", "geometry"), CONVOLUTIONS)
def test_convolutions(name: str, image: tuple[int, int, int], c: int, n: int, geometry: ConvAttributes) -> None:
    taps, group = geometry.kernel[0] * geometry.kernel[1], geometry.group
    weight, bias, x = uniform(1, n, taps, c), uniform(2, n), uniform(3, *image, c * group)
    what = convolution(weight, image, geometry, bias=bias)
    got = Compiled(FloatProduct(), what, target_here(name))(x)
    rows = gather_rows(x, geometry)

    def product(r: Array, w: Array) -> Array:
        split = np.einsum("mtgc,gntc->mgn", r.reshape(-1, taps, group, c), w.reshape(group, n // group, taps, c))
        return np.asarray(split.reshape(what.out_shape))

    check_sum(got, product, rows, weight, taps * c, bias=bias)


def test_convolution_with_symbolic_image() -> None:
    geometry = ConvAttributes((3, 3), (2, 2), (1, 1, 1, 1))
    weight = uniform(1, 8, 9, 3)
    b, h, w = (tirx.Var(name, "int64") for name in "bhw")
    out = (b, (h + 1) // 2, (w + 1) // 2, 8)
    what = Contraction("node", "conv", weight, "float32", (b, h, w, 3), out, conv=geometry)
    run = Compiled(FloatProduct(), what, target_here("x86:avx2"))
    for image in ((1, 8, 8), (2, 5, 3), (1, 1, 1)):
        x = uniform(3, *image, 3)
        got = run(x)
        check_sum(got.reshape(-1, 8), lambda r, k: np.einsum("mtc,ntc->mn", r, k), gather_rows(x, geometry), weight, 27)


def test_weights_are_packed_by_groups_of_16_outputs() -> None:
    weight = uniform(1, 34, 2, 3)
    packed, bias = pack_float(weight, groups=2), pack_bias(weight[:, 0, 0], groups=2)
    assert packed.shape == (4, 6, 16)
    for n in range(34):
        group, place = divmod(n, 17)
        tile, lane = group * 2 + place // 16, place % 16
        np.testing.assert_array_equal(packed[tile, :, lane], weight[n].reshape(-1))
        assert bias[tile * 16 + lane] == weight[n, 0, 0]
    assert np.count_nonzero(packed) == np.count_nonzero(weight)


@pytest.mark.parametrize("registers", [Registers(16, 32), Registers(8, 16), Registers(4, 32), Registers(4, 16)])
def test_register_tiles_fit_the_registers(registers: Registers) -> None:
    for output_tiles in range(1, 70):
        rows, tiles = registers.shape(output_tiles)
        assert 1 <= tiles <= output_tiles
        assert (rows == 1 and tiles == 1) or (rows * tiles + tiles) * registers.parts + 1 <= registers.count


@pytest.mark.parametrize(
    ("name", "instruction", "register"),
    [("x86:avx512vnni", "vfmadd", "zmm"), ("x86:avx2", "vfmadd", "ymm"), ("arm-neon:dotprod", "fmla", ".4s")],
)
def test_the_loop_is_fused_multiply_adds_in_registers(name: str, instruction: str, register: str) -> None:
    """Every accumulator of the tile has its own vector multiply-add, and none goes to memory inside the loop."""
    target = parse_target(name)
    text = Compiled(FloatProduct(), matmul((96,), uniform(1, 192, 1, 64)), target).assembly()
    rows, tiles = registers_of(target).shape(12)
    blocks = [block for block in hot_blocks(text, r"[\w.]+") if len(fused(block, instruction, register)) > 1]
    loop = max(blocks, key=lambda block: len(fused(block, instruction, register)))
    assert len(fused(loop, instruction, register)) >= rows * tiles * registers_of(target).parts
    inside = loop[: loop.rindex(instruction)]
    assert "%rsp" not in inside and "[sp" not in inside


def fused(block: str, instruction: str, register: str) -> list[str]:
    """Lines with vector multiply-adds."""
    return [line for line in block.splitlines() if instruction in line and register in line]


def test_declines_what_it_cannot_compute() -> None:
    target = parse_target("x86:avx2")
    other = Contraction("node", "batch_matmul", None, "float32", (2, 3), (2, 4), b_shape=(3, 4))
    assert "weight" in str(FloatProduct().match(other, target))
    integer = Contraction("node", "matmul", uniform(1, 4, 1, 3), "int8", (2, 3), (2, 4))
    assert "int8" in str(FloatProduct().match(integer, target))
