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
    held = 8 // bits
    for n in range(16):
        for c in range(32):
            step, j = divmod(c, 4)
            column = [int(byte) for byte in unit[:, n * 4 + j]]
            # The bits above the whole codes, vector by vector and lowest first, are the codes of the last steps.
            rest = [byte >> bit & 1 for byte in column for bit in range(held * bits, 8)]
            made = sum(bit << i for i, bit in enumerate(rest))
            place = step - held * bits
            value = made >> (bits * place) if place >= 0 else column[step // held] >> (bits * (step % held))
            assert value & (2**bits - 1) == codes[n, 0, c]


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_of_a_unit_is_used_once(bits: int) -> None:
    filled = packing.per_vector(bits) * bits
    used = [(vector, bit) for vector in range(bits) for bit in range(filled)]
    for pieces in packing.spare(bits):
        used += [(p.vector, bit) for p in pieces for bit in range(p.source, p.source + p.width)]
        assert sorted(b for p in pieces for b in range(p.target, p.target + p.width)) == list(range(filled))
    assert sorted(used) == [(vector, bit) for vector in range(bits) for bit in range(8)]


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
