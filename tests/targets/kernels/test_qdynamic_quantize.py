"""Run-time quantization of activations: codes, scales and sums are those of numpy's float32 bit for bit."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import tirx

from kbitc.targets.kernels.dynamic_quantize import QuantizeSpec, make_dynamic_quantize
from kbitc.targets.target import parse_target
from tests.support.kernels import quantized_rows
from tests.support.products import VNNI, need

RANDOM = np.random.default_rng(13)


def quantize(x: Any, spec: QuantizeSpec, out: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Codes [*out, Cp], scales [*out, CB] and sums [*out, CS] of the kernel; results start as garbage."""
    width = -(-spec.channels // 32) * 32
    results = (
        np.full((*out, width), 99, np.int8),
        np.full((*out, spec.blocks), 9, np.float32),
        np.full((*out, spec.sums), 9, np.int32),
    )
    module = tvm.IRModule({"quantize": make_dynamic_quantize(spec, "quantize").with_attr("global_symbol", "quantize")})
    built = tvm.compile(module, target=tvm.target.Target(parse_target(VNNI).tvm))
    held = [tvm.runtime.tensor(a) for a in (x, *results)]
    built["quantize"](*held)
    codes, scales, sums = (a.numpy() for a in held[1:])
    return codes, scales, sums


@pytest.mark.parametrize(
    ("channels", "block"), [(1, 16), (31, 32), (33, 16), (100, 48), (130, 130), (64, 64), (1040, 1024)]
)
def test_equals_numpy(channels: int, block: int) -> None:
    need(VNNI)
    x = RANDOM.standard_normal((3, channels)).astype(np.float32) * np.float32(10) ** RANDOM.integers(-30, 30, (3, 1))
    codes, scales, sums = quantize(x.astype(np.float32), QuantizeSpec((3,), channels, block), (3,))
    wanted, wanted_scales, wanted_sums = quantized_rows(x.astype(np.float32), min(block, channels))
    np.testing.assert_array_equal(codes[:, :channels], wanted.reshape(3, -1)[:, :channels])
    assert not codes[:, channels:].any()
    np.testing.assert_array_equal(scales, wanted_scales)
    np.testing.assert_array_equal(sums, wanted_sums)


@pytest.mark.parametrize(("channels", "sum_block"), [(40, 16), (64, 32), (100, 32), (181, 48), (640, 32), (300, 128)])
def test_one_scale_a_row_with_sums_of_blocks(channels: int, sum_block: int) -> None:
    need(VNNI)
    x = RANDOM.standard_normal((3, channels)).astype(np.float32)
    codes, scales, sums = quantize(x, QuantizeSpec((3,), channels, channels, sum_block=sum_block), (3,))
    wanted, wanted_scales, _ = quantized_rows(x, channels)
    np.testing.assert_array_equal(codes[:, :channels], wanted[:, 0])
    np.testing.assert_array_equal(scales, wanted_scales)
    starts = np.arange(0, channels, sum_block)
    np.testing.assert_array_equal(sums, np.add.reduceat(wanted[:, 0].astype(np.int32), starts, axis=1))


def test_halves_go_to_even() -> None:
    need(VNNI)
    x = np.zeros((1, 32), np.float32)
    x[0, :8] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]
    codes, _, _ = quantize(x, QuantizeSpec((1,), 32, 32), (1,))
    assert codes[0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


def test_zeros_and_the_smallest_numbers() -> None:
    need(VNNI)
    x = np.zeros((2, 32), np.float32)
    x[1, 3] = 1e-38
    codes, scales, sums = quantize(x, QuantizeSpec((2,), 32, 32), (2,))
    assert not codes.any() and not sums.any()
    assert (scales == np.float32(1e-30) / np.float32(127)).all()


def test_infinities_and_nans_give_codes_in_range() -> None:
    need(VNNI)
    x = np.ones((2, 32), np.float32)
    x[0, 3], x[1, 4] = np.inf, np.nan
    codes, _, sums = quantize(x, QuantizeSpec((2,), 32, 32), (2,))
    assert (codes >= -127).all()
    np.testing.assert_array_equal(sums[:, 0], codes.astype(np.int32).sum(axis=1))


def test_border_is_zero() -> None:
    need(VNNI)
    x = RANDOM.standard_normal((2, 3, 4, 40)).astype(np.float32)
    spec = QuantizeSpec((2, 3, 4), 40, 32, pads=(1, 2, 0, 1), padded=(4, 7))
    codes, scales, sums = quantize(x, spec, (2, 4, 7))
    wanted, wanted_scales, wanted_sums = quantized_rows(x.reshape(-1, 40), 32)
    inner = (slice(None), slice(1, 4), slice(2, 6))
    np.testing.assert_array_equal(codes[inner][..., :40], wanted.reshape(2, 3, 4, -1)[..., :40])
    np.testing.assert_array_equal(scales[inner], wanted_scales.reshape(2, 3, 4, -1))
    np.testing.assert_array_equal(sums[inner], wanted_sums.reshape(2, 3, 4, -1))
    for array in (codes, scales, sums):
        outside = array.copy()
        outside[inner] = 0
        assert not outside.any()


def test_open_sizes_leave_no_quotient_in_an_index() -> None:
    """TVM's simplifier would walk it once for every use of a code: minutes for one kernel of 256 channels."""
    lead, padded = [tuple(tirx.Var(name, "int64") for name in names) for names in ("bhw", "pq")]
    kernel = make_dynamic_quantize(QuantizeSpec(lead, 64, 32, (1, 1, 1, 1), padded), "main")
    named = dict(re.findall(r"(\w+): T\.let\[T\.int64\] = (.*)", str(kernel)))
    read = re.findall(r"buffer\[(.+?), T\.Ramp", str(kernel))
    assert read and not [name for name in read if "//" in named.get(name, "")]
