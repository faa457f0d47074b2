"""Reads .npy and .npz files without trusting them: no pickle, sizes checked before anything is allocated."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.lib.format
import numpy.typing as npt

from kbitc.errors import CalibrationError, ModelError
from kbitc.importer.files import open_regular

Array = npt.NDArray[Any]

#: Bytes that one array of a data file may take.
MAX_ARRAY_BYTES = 16 << 30
_MAX_HEADER = 1 << 16
_MAX_MEMBERS = 10_000
_KINDS = "biuf"


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays in a .npz file by name, or the one array of a .npy file under the name "".

    Raises:
        CalibrationError: missing, not a regular file, damaged, pickled, or larger than it can be.
    """
    try:
        descriptor = open_regular(path, what="the data file", follow_links=True)
    except ModelError as error:
        raise CalibrationError(error.message, where=error.where, got=error.got) from error
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        head = file.read(6)
        file.seek(0)
        if head.startswith(b"\x93NUMPY"):
            return {"": _read_npy(file, size, str(path))}
        if head.startswith(b"PK"):
            return _read_npz(file, str(path))
    raise CalibrationError(
        "the data file is neither .npy nor .npz",
        where=str(path),
        got="an empty file" if size == 0 else f"{size} bytes of something else",
        remedy="save it with numpy.save or numpy.savez",
    )


def _read_npz(file: BinaryIO, where: str) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) > _MAX_MEMBERS:
                raise CalibrationError("the data file holds too many arrays", where=where, got=len(members))
            for member in members:
                name = member.filename.removesuffix(".npy")
                label = f"{where}, array {name!r}"
                if name in arrays:
                    raise CalibrationError("an array is given twice", where=label)
                if member.file_size > MAX_ARRAY_BYTES:
                    raise CalibrationError("the array is too large", where=label, got=f"{member.file_size} bytes")
                with archive.open(member) as stream:
                    arrays[name] = _read_npy(io.BufferedReader(stream), member.file_size, label)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:
        words = " ".join(str(error).split())
        raise CalibrationError("the data file is damaged", where=where, got=words, remedy="write it again") from error
    if not arrays:
        raise CalibrationError("the data file holds no arrays", where=where)
    return arrays


def _read_npy(file: Any, size: int, where: str) -> Array:
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=_MAX_HEADER)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file, max_header_size=_MAX_HEADER)
        else:
            raise ValueError(f"npy version {version}")
    except CalibrationError:
        raise
    except Exception as error:
        words = " ".join(str(error).split())[:200]
        raise CalibrationError("the array's header is damaged", where=where, got=words) from error
    if dtype.hasobject or dtype.kind not in _KINDS:
        raise CalibrationError(
            "the array does not hold plain numbers", where=where, got=f"dtype {dtype}", remedy="kbitc never unpickles"
        )
    nbytes = prod(shape) * dtype.itemsize
    if nbytes > min(MAX_ARRAY_BYTES, size):
        raise CalibrationError(
            "the array's header promises more than the file holds",
            where=where,
            got=f"shape {list(shape)} of {dtype} needs {nbytes} bytes, the file has {size}",
        )
    data = file.read(nbytes)
    if len(data) != nbytes:
        raise CalibrationError("the array is cut short", where=where, got=f"{len(data)} of {nbytes} bytes")
    array = np.frombuffer(data, dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
