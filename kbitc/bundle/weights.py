"""Weights on disk: a safetensors file whose tensors start on 64-byte boundaries, so that they can be used mapped.

Layout (safetensors, github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a JSON header
padded with spaces, then the tensors without gaps. A tensor whose bytes are not a multiple of 64 is stored flat with
zeros behind it; its true shape is in the bundle's manifest.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kbitc.bundle.manifest import FileEntry, Parameter
from kbitc.errors import BundleError, InternalError

ALIGNMENT = 64  # what TVM's generated code assumes of every buffer
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
DTYPE_NAMES = {
    "bool": "BOOL",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}
_CHUNK = 16 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: dtype name of safetensors, stored shape, first and last+1 byte in the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def padded_size(size: int) -> int:
    """Bytes that a tensor of `size` bytes takes in the file."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def write_weights(path: Path, weights: Mapping[str, npt.NDArray[Any]]) -> tuple[tuple[Parameter, ...], FileEntry]:
    """Write the weights in their order, hashing while writing.

    Args:
        path: file to create.
        weights: name -> array, of the dtypes in `DTYPE_NAMES`, any shape.

    Returns:
        The parameters for the manifest, in order, and the file's hash and size.

    Raises:
        OSError: when it cannot be written.
        InternalError: for a dtype that safetensors or numpy lacks.
    """
    parameters, header, offset = [], {}, 0
    for name, array in weights.items():
        dtype = array.dtype.name
        if dtype not in DTYPE_NAMES:
            raise InternalError("a weight has a dtype that a bundle cannot hold", where=name, got=dtype)
        parameters.append(Parameter(name, dtype, array.shape, name))
        end = offset + padded_size(array.nbytes)
        shape = list(array.shape) if end - offset == array.nbytes else [(end - offset) // array.itemsize]
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for piece in _pieces(struct.pack("<Q", len(text)) + text, weights):
            digest.update(piece)
            size += file.write(piece)
    return tuple(parameters), FileEntry(digest.hexdigest(), size)


def _pieces(head: bytes, weights: Mapping[str, npt.NDArray[Any]]) -> Iterator[bytes | memoryview]:
    yield head
    for array in weights.values():
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        flat = little.reshape(-1).view(np.uint8).data
        for start in range(0, len(flat), _CHUNK):
            yield flat[start : start + _CHUNK]
        yield bytes(padded_size(len(flat)) - len(flat))


def map_weights(
    data: npt.NDArray[np.uint8], parameters: tuple[Parameter, ...], where: str
) -> dict[str, npt.NDArray[Any]]:
    """Views of the parameters in a mapped weights file; nothing is copied.

    Args:
        data: u8 [file size], the whole file.
        parameters: what the manifest says of them.
        where: the file, for messages.

    Raises:
        BundleError: when the file is not what the manifest says.
    """
    tensors, start = read_header(data, where)
    views = {}
    for parameter in parameters:
        stored = tensors.get(parameter.tensor)
        size = math.prod(parameter.shape) * np.dtype(parameter.dtype).itemsize
        if stored is None:
            raise BundleError("the weights file lacks a tensor", where=where, got=parameter.tensor)
        if stored.dtype != DTYPE_NAMES[parameter.dtype] or stored.end - stored.begin != padded_size(size):
            raise BundleError(
                "a stored tensor is not what the manifest says",
                where=f"{where}: {parameter.tensor}",
                got=f"{stored.dtype} of {stored.end - stored.begin} bytes for {parameter.dtype}{list(parameter.shape)}",
            )
        begin = start + stored.begin
        views[parameter.name] = data[begin : begin + size].view(parameter.dtype).reshape(parameter.shape)
    return views


def read_header(data: npt.NDArray[np.uint8], where: str) -> tuple[dict[str, StoredTensor], int]:
    """The tensors of a safetensors file and the byte where its data section starts.

    Raises:
        BundleError: when the header is broken, or a tensor lies outside the file or off its alignment.
    """
    if data.size < 8:
        raise BundleError("the weights file is too short", where=where, got=f"{data.size} bytes")
    length = int.from_bytes(data[:8].tobytes(), "little")
    start = 8 + length
    if length > MAX_HEADER_BYTES or start > data.size or start % ALIGNMENT:
        raise BundleError("the weights file has a broken header", where=where, got=f"length {length}")
    try:
        raw = json.loads(data[8:start].tobytes().decode("utf-8"))
        tensors = {
            name: StoredTensor(str(entry["dtype"]), tuple(entry["shape"]), *map(int, entry["data_offsets"]))
            for name, entry in raw.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError("the weights file has a broken header", where=where, got=str(error)[:120]) from error
    for name, tensor in tensors.items():
        if not 0 <= tensor.begin <= tensor.end <= data.size - start or tensor.begin % ALIGNMENT:
            raise BundleError("a tensor lies outside the weights file", where=f"{where}: {name}")
    return tensors, start
