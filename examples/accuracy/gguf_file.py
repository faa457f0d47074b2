"""Read a GGUF file (version 3): its metadata, and its tensors as float32.

The layout is that of ggml's docs/gguf.md; the block types are ggml's: 32 weights w = d * q + m with f16 d and m
(Q4_1: 4 bits, the low halves of the 16 bytes are weights 0 to 15, the high halves 16 to 31), or w = d * q (Q8_0: int8).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
STRING, ARRAY = 8, 9
NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
BLOCK = 32  # weights
F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8  # numbers of the tensor types
BLOCK_TYPES = {
    F32: np.dtype("<f4"),
    F16: np.dtype("<f2"),
    Q4_1: np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", BLOCK // 2)]),
    Q8_0: np.dtype([("d", "<f2"), ("q", "i1", BLOCK)]),
}


class GgufFile:
    """A GGUF file in memory. metadata: its values by key; shapes: of the tensors by name, outermost dimension first.

    Raises:
        ValueError: not a GGUF file of version 3.
    """

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        self._position = 0
        if self._data[:4] != MAGIC or struct.unpack_from("<I", self._data, 4) != (VERSION,):
            raise ValueError(f"{path}: not a GGUF file of version {VERSION}")
        self._position = 8
        tensors, entries = self._number("<Q"), self._number("<Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string()
            self.metadata[key] = self._value(self._number("<I"))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[int, int]] = {}
        for _ in range(tensors):
            name = self._string()
            self.shapes[name] = tuple(self._number("<Q") for _ in range(self._number("<I")))[::-1]
            self._places[name] = (self._number("<I"), self._number("<Q"))
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        self._tensors_begin = -(-self._position // alignment) * alignment

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._position)
        self._position += struct.calcsize(form)
        return value

    def _string(self) -> str:
        length = self._number("<Q")
        self._position += length
        return self._data[self._position - length : self._position].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            inner, length = self._number("<I"), self._number("<Q")
            return [self._value(inner) for _ in range(length)]
        return self._number(NUMBERS[kind])

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor, decoded: f32 of shapes[name].

        Raises:
            KeyError: no tensor has this name. ValueError: a type other than F32, F16, Q4_1 and Q8_0.
        """
        kind, offset = self._places[name]
        if kind not in BLOCK_TYPES:
            raise ValueError(f"{name}: tensor type {kind} is not one of {sorted(BLOCK_TYPES)} (F32, F16, Q4_1, Q8_0)")
        shape = self.shapes[name]
        count = int(np.prod(shape)) // (BLOCK if kind in (Q4_1, Q8_0) else 1)
        blocks = np.frombuffer(self._data, BLOCK_TYPES[kind], count, self._tensors_begin + offset)
        if kind in (F32, F16):
            return blocks.astype(np.float32).reshape(shape)
        codes = blocks["q"]
        if kind == Q4_1:
            codes = np.concatenate([codes & 15, codes >> 4], axis=1)
        weights = blocks["d"].astype(np.float32)[:, None] * codes.astype(np.float32)
        if kind == Q4_1:
            weights += blocks["m"].astype(np.float32)[:, None]
        return weights.reshape(shape)
