"""Packing is exact for every k, length and shape, and takes exactly the bytes it says."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc.quant import packing

BITS = range(1, 9)


def _codes(shape: tuple[int, ...], bits: int) -> packing.Bytes:
    return np.random.default_rng(bits).integers(0, 2**bits, shape).astype(np.uint8)


@pytest.mark.parametrize("bits", BITS)
def test_dense_streams_of_every_length(bits: int) -> None:
    for count in range(68):
        codes = _codes((count,), bits)
        stream = packing.pack_dense(codes, bits)
        assert stream.size == -(-count * bits // 8)
        np.testing.assert_array_equal(packing.unpack_dense(stream, bits, count), codes)


def test_dense_order_is_little_endian() -> None:
    assert packing.pack_dense(np.array([1, 2], np.uint8), 4).tolist() == [0x21]
    assert packing.pack_dense(np.array([5, 3, 7], np.uint8), 3).tolist() == [0b11011101, 0b1]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (15, 1, 31), (16, 1, 32), (17, 2, 33), (3, 9, 7), (48, 1, 100)])
def test_tiles_are_exact(bits: int, shape: tuple[int, int, int]) -> None:
    codes = _codes(shape, bits)
    packed = packing.pack_codes(codes, bits)
    assert packed.shape == packing.packed_shape(*shape, bits)
    np.testing.assert_array_equal(packing.unpack_codes(packed, bits, shape[0], shape[2]), codes)


@pytest.mark.parametrize("bits", BITS)
def test_a_full_tile_has_no_padding(bits: int) -> None:
    assert packing.pack_codes(_codes((32, 3, 64), bits), bits).size == 32 * 3 * 64 * bits // 8


@pytest.mark.parametrize("bits", BITS)
def test_every_code_lies_where_the_layout_says(bits: int) -> None:
    """Read the documented position of each code straight from the bytes."""
    codes = _codes((16, 1, 32), bits)
    unit = packing.pack_codes(codes, bits)[0, 0, 0]
    for n in range(16):
        for c in range(32):
            step, j = divmod(c, 4)
            value = shift = vector = 0
            for width in packing.PLANES[bits]:
                per_vector = 8 // width
                byte = int(unit[vector + step // per_vector, n * 4 + j])
                value |= ((byte >> (width * (step % per_vector))) & (2**width - 1)) << shift
                shift, vector = shift + width, vector + width
            assert value == codes[n, 0, c]


def test_per_channel_values_are_laid_out_by_tiles() -> None:
    values = np.arange(18 * 2 * 3, dtype=np.float16).reshape(18, 2, 3)
    packed = packing.pack_per_channel(values, 18)
    assert packed.shape == (2, 2, 3, 16)
    np.testing.assert_array_equal(packed[1, :, :, 1], values[17])
    assert not packed[1, :, :, 2:].any()


def test_a_tensor_scale_is_repeated_over_channels() -> None:
    packed = packing.pack_per_channel(np.full((1, 1, 1), 3, np.float32), 5)
    assert packed.shape == (1, 1, 1, 16)
    np.testing.assert_array_equal(packed.ravel(), [3.0] * 5 + [0.0] * 11)
