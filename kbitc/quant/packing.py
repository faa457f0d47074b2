"""How codes lie in memory: dense bit streams (ONNX file) and the tiled vectors that every kernel reads.

Tiled layout. C is padded to a multiple of 32 and N to a multiple of 16; padding codes are 0. A *unit* is 32
consecutive c of one tap for 16 consecutive n: 512 codes, exactly k vectors of 64 bytes. Byte b of a vector belongs
to n = b // 4 and j = b % 4; a unit has 8 *steps*, step s holds c = 32 * unit + 4 * s + j.

Every byte of a vector holds p = 8 // k whole codes, step p * v + i at bit k * i of vector v. Where k does not divide
8, the 8 - k * p bits left at the top of the bytes of the k vectors are together as many whole codes again: `spare`
says how they make up the 8 / p - k *spare vectors* k, k + 1, ..., which hold the last steps just as the others do.
So once a step's bits are shifted down and masked, a vector is 16 lanes (n) times 4 bytes (c): the operand of a
four-way integer dot product on every target.

A convolution of float activations with one scale a channel is packed as [N, 1, T * C] on CPUs: its taps lie side by
side, so that nine taps of one channel fill one unit and not nine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

LANES = 16
UNIT = 32
STEPS = 8
GROUP = 4
VECTOR_BYTES = LANES * GROUP


@dataclass(frozen=True)
class Piece:
    """Bits source .. source + width - 1 of every byte of vector `vector`: bits `target` and up of a spare vector."""

    vector: int
    source: int
    target: int
    width: int


def per_vector(bits: int) -> int:
    """Steps that one vector holds whole."""
    return STEPS // bits


def spare(bits: int) -> tuple[tuple[Piece, ...], ...]:
    """The pieces of every spare vector, ascending by target.

    The bits left are taken in order: vector by vector, lowest first.
    """
    filled = bits * per_vector(bits)
    bits_left = [(vector, bit) for vector in range(bits) for bit in range(filled, STEPS)]
    made = []
    for first in range(0, len(bits_left), filled):
        pieces: list[Piece] = []
        for target, (vector, source) in enumerate(bits_left[first : first + filled]):
            last = pieces[-1] if pieces else None
            if last is not None and last.vector == vector:
                pieces[-1] = Piece(vector, last.source, last.target, last.width + 1)
            else:
                pieces.append(Piece(vector, source, target, 1))
        made.append(tuple(pieces))
    return tuple(made)


def round_up(value: int, step: int) -> int:
    """The smallest multiple of step that is at least value."""
    return -(-value // step) * step


def packed_shape(n: int, taps: int, channels: int, bits: int) -> tuple[int, int, int, int, int]:
    """Shape of the packed codes of a weight [N, T, C]: [Np/16, T, Cp/32, bits, 64]."""
    return round_up(n, LANES) // LANES, taps, round_up(channels, UNIT) // UNIT, bits, VECTOR_BYTES


def pack_codes(codes: Bytes, bits: int) -> Bytes:
    """Pack codes uint8 [N, T, C] into tiled vectors, uint8 [Np/16, T, Cp/32, bits, 64]."""
    n, taps, channels = codes.shape
    tiles, _, units, _, _ = packed_shape(n, taps, channels, bits)
    padded = np.zeros((tiles * LANES, taps, units * UNIT), np.uint8)
    padded[:n, :, :channels] = codes
    # [tile, lane, t, unit, step, j] -> [tile, t, unit, step, lane * 4 + j]
    split = padded.reshape(tiles, LANES, taps, units, STEPS, GROUP)
    steps = split.transpose(0, 2, 3, 4, 1, 5).reshape(tiles, taps, units, STEPS, VECTOR_BYTES)
    held = per_vector(bits)
    vectors = np.zeros((tiles, taps, units, STEPS // held, VECTOR_BYTES), np.uint8)
    for i in range(held):
        vectors |= steps[:, :, :, i::held] << (bits * i)
    packed = np.ascontiguousarray(vectors[:, :, :, :bits])
    for made, pieces in zip(np.moveaxis(vectors[:, :, :, bits:], 3, 0), spare(bits), strict=True):
        for piece in pieces:
            field = (made >> piece.target) & np.uint8(2**piece.width - 1)
            packed[:, :, :, piece.vector] |= field << piece.source
    return packed


def unpack_codes(packed: Bytes, bits: int, n: int, channels: int) -> Bytes:
    """The inverse of `pack_codes`: uint8 [n, T, channels]."""
    tiles, taps, units, _, _ = packed.shape
    vectors = [packed[:, :, :, v] for v in range(bits)]
    for pieces in spare(bits):
        moved = [((vectors[p.vector] >> p.source) & (2**p.width - 1)).astype(np.uint8) << p.target for p in pieces]
        vectors.append(np.bitwise_or.reduce(moved))
    held = per_vector(bits)
    steps = np.stack([(vectors[s // held] >> (bits * (s % held))) & (2**bits - 1) for s in range(STEPS)], axis=3)
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
