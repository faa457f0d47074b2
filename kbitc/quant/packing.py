"""How codes lie in memory: dense bit streams (ONNX file) and the tiled bit planes that every kernel reads.

Tiled layout. C is padded to a multiple of 32 and N to a multiple of 16; padding codes are 0. A *unit* is 32
consecutive c of one tap for 16 consecutive n: 512 codes, exactly k vectors of 64 bytes. Byte b of a vector belongs
to n = b // 4 and j = b % 4; a unit has 8 *steps*, step s holds c = 32 * unit + 4 * s + j. The k bits of a code are
split into planes of power-of-two width, widest first; vector v of a plane of width w holds the steps
v * 8/w .. (v + 1) * 8/w - 1, step s at bit w * (s mod 8/w) of each byte. So once a step's bits are masked out,
a vector is 16 lanes (n) times 4 bytes (c): the operand of a four-way integer dot product on every target.

A convolution of float activations with one scale a channel is packed as [N, 1, T * C] on CPUs: its taps lie side by
side, so that nine taps of one channel fill one unit and not nine.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

PLANES: dict[int, tuple[int, ...]] = {
    1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,),
}  # fmt: skip
LANES = 16
UNIT = 32
STEPS = 8
GROUP = 4
VECTOR_BYTES = LANES * GROUP


def round_up(value: int, step: int) -> int:
    """The smallest multiple of step that is at least value."""
    return -(-value // step) * step


def packed_shape(n: int, taps: int, channels: int, bits: int) -> tuple[int, int, int, int, int]:
    """Shape of the packed codes of a weight [N, T, C]: [Np/16, T, Cp/32, bits, 64]."""
    return round_up(n, LANES) // LANES, taps, round_up(channels, UNIT) // UNIT, bits, VECTOR_BYTES


def pack_codes(codes: Bytes, bits: int) -> Bytes:
    """Pack codes uint8 [N, T, C] into tiled bit planes, uint8 [Np/16, T, Cp/32, bits, 64]."""
    n, taps, channels = codes.shape
    tiles, _, units, _, _ = packed_shape(n, taps, channels, bits)
    padded = np.zeros((tiles * LANES, taps, units * UNIT), np.uint8)
    padded[:n, :, :channels] = codes
    # [tile, lane, t, unit, step, j] -> [tile, t, unit, step, lane * 4 + j]
    split = padded.reshape(tiles, LANES, taps, units, STEPS, GROUP)
    steps = split.transpose(0, 2, 3, 4, 1, 5).reshape(tiles, taps, units, STEPS, VECTOR_BYTES)
    packed = np.empty((tiles, taps, units, bits, VECTOR_BYTES), np.uint8)
    shift = vector = 0
    for width in PLANES[bits]:
        per_vector = STEPS // width
        plane = (steps >> shift) & (2**width - 1)
        plane = plane.reshape(tiles, taps, units, width, per_vector, VECTOR_BYTES)
        positions = (width * np.arange(per_vector, dtype=np.uint8))[:, None]
        packed[:, :, :, vector : vector + width] = np.bitwise_or.reduce(plane << positions, axis=4)
        shift, vector = shift + width, vector + width
    return packed


def unpack_codes(packed: Bytes, bits: int, n: int, channels: int) -> Bytes:
    """The inverse of `pack_codes`: uint8 [n, T, channels]."""
    tiles, taps, units, _, _ = packed.shape
    steps = np.zeros((tiles, taps, units, STEPS, VECTOR_BYTES), np.uint8)
    shift = vector = 0
    for width in PLANES[bits]:
        per_vector = STEPS // width
        positions = (width * np.arange(per_vector, dtype=np.uint8))[:, None]
        plane = (packed[:, :, :, vector : vector + width, None, :] >> positions) & (2**width - 1)
        steps |= (plane << shift).reshape(steps.shape).astype(np.uint8)
        shift, vector = shift + width, vector + width
    split = steps.reshape(tiles, taps, units, STEPS, LANES, GROUP).transpose(0, 4, 1, 2, 3, 5)
    return np.ascontiguousarray(split.reshape(tiles * LANES, taps, units * UNIT)[:n, :, :channels])


def pack_per_channel(values: npt.NDArray[np.generic], n: int) -> npt.NDArray[np.generic]:
    """Lay out one value per scale for the kernels: [N or 1, T, CB] -> [Np/16, T, CB, 16], zero-padded.

    A per-tensor value [1, 1, 1] is repeated for all n channels.
    """
    values = np.broadcast_to(values, (n, *values.shape[1:]))
    tiles = round_up(n, LANES) // LANES
    padded = np.zeros((tiles * LANES, *values.shape[1:]), values.dtype)
    padded[:n] = values
    return np.ascontiguousarray(padded.reshape(tiles, LANES, *values.shape[1:]).transpose(0, 2, 3, 1))


def pack_dense(codes: Bytes, bits: int) -> Bytes:
    """A little-endian bit stream without padding between codes: uint8 [ceil(count * bits / 8)].

    Code i occupies bits i * bits .. (i + 1) * bits - 1; bit b of the stream is bit b % 8 of byte b // 8
    (the order of compressed-tensors' ``pack-quantized`` and of ONNX INT4).
    """
    flat = codes.reshape(-1)
    planes = (flat[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.reshape(-1), bitorder="little")


def unpack_dense(stream: Bytes, bits: int, count: int) -> Bytes:
    """The inverse of `pack_dense`: uint8 [count]."""
    planes = np.unpackbits(stream, count=count * bits, bitorder="little").reshape(count, bits)
    weights = (1 << np.arange(bits, dtype=np.uint8)).astype(np.uint8)
    return np.asarray((planes * weights).sum(axis=1), dtype=np.uint8)
