"""External tensor data, resolved by own code: inside the model's folder, regular, unlinked, as long as it says."""

from __future__ import annotations

import hashlib
import mmap
import os
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import onnx

from kbitc.errors import ModelError
from kbitc.importer.files import open_regular

_KEYS = frozenset(("location", "offset", "length", "checksum", "basepath"))
_MAX_TEXT = 4096


class ExternalFiles:
    """Maps the external files of one model; each file is opened and mapped once.

    Args:
        folder: the folder of the model file; None when the model came as a message and has none.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._maps: dict[str, npt.NDArray[np.uint8]] = {}

    def read(self, tensor: onnx.TensorProto, nbytes: int) -> npt.NDArray[np.uint8]:
        """The bytes of an external tensor, mapped, not copied: u8 [nbytes].

        Args:
            tensor: a tensor whose data_location is EXTERNAL.
            nbytes: the size its dims and type demand.

        Raises:
            ModelError: for anything but a plain file inside the model's folder that holds the stated bytes.
        """
        name = tensor.name or "unnamed"
        entries = _entries(tensor, name)
        location = _safe_location(entries.get("location", ""), name)
        data = self._map(location, name)
        offset = _number(entries, "offset", name)
        length = _number(entries, "length", name) if "length" in entries else nbytes
        if length != nbytes:
            raise ModelError(
                "external data: the length is not what the tensor's dims demand",
                where=f"tensor {name}, file {location}",
                got=f"length {length}, dims need {nbytes}",
            )
        if offset > data.size or nbytes > data.size - offset:
            raise ModelError(
                "external data: offset and length do not lie inside the file",
                where=f"tensor {name}, file {location}",
                got=f"offset {offset}, length {nbytes}, file {data.size} bytes",
            )
        if "checksum" in entries:
            _check_sha1(data, entries["checksum"], name, location)
        return data[offset : offset + nbytes]

    def _map(self, location: str, name: str) -> npt.NDArray[np.uint8]:
        if location in self._maps:
            return self._maps[location]
        if self._folder is None:
            raise ModelError(
                "external data needs a folder, but the model was given as a message",
                where=f"tensor {name}",
                remedy="pass the path of the file",
            )
        path = self._folder / location
        _refuse_links(self._folder, location, name)
        try:
            descriptor = open_regular(path, what="external data: the file", follow_links=False)
        except ModelError as error:
            raise ModelError(error.message, where=f"tensor {name}, file {location}", got=error.got) from error
        try:
            facts = os.fstat(descriptor)
            if facts.st_nlink != 1:
                raise ModelError(
                    "external data: the file has more than one hard link",
                    where=f"tensor {name}, file {location}",
                    got=f"{facts.st_nlink} links",
                    remedy="copy the file",
                )
            if facts.st_size == 0:
                self._maps[location] = np.zeros(0, np.uint8)
            else:
                view = mmap.mmap(descriptor, facts.st_size, access=mmap.ACCESS_READ)
                self._maps[location] = np.frombuffer(view, np.uint8)
        finally:
            os.close(descriptor)
        return self._maps[location]


def _entries(tensor: onnx.TensorProto, name: str) -> dict[str, str]:
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key not in _KEYS:
            raise ModelError(
                "external data: unknown key", where=f"tensor {name}", got=repr(entry.key[:60]), remedy="remove the key"
            )
        if entry.key in entries:
            raise ModelError("external data: a key is given twice", where=f"tensor {name}", got=repr(entry.key))
        if len(entry.value) > _MAX_TEXT:
            raise ModelError("external data: a value is too long", where=f"tensor {name}", got=f"{entry.key}")
        entries[entry.key] = entry.value
    return entries


def _safe_location(location: str, name: str) -> str:
    where = f"tensor {name}"
    shown = repr(location[:120])
    if not location:
        raise ModelError("external data: the location is empty", where=where)
    if "\0" in location:
        raise ModelError("external data: the location holds a NUL byte", where=where, got=shown)
    if "\\" in location or (len(location) > 1 and location[1] == ":"):
        raise ModelError("external data: the location is not a plain relative path", where=where, got=shown)
    parts = location.split("/")
    if PurePosixPath(location).is_absolute() or ".." in parts:
        raise ModelError(
            "external data: the location leaves the model's folder (absolute or ../)", where=where, got=shown
        )
    return "/".join(part for part in parts if part not in ("", "."))


def _refuse_links(folder: Path, location: str, name: str) -> None:
    path = folder
    for part in location.split("/"):
        path = path / part
        if path.is_symlink():
            raise ModelError(
                "external data: the path holds a symbolic link",
                where=f"tensor {name}, file {location}",
                remedy="copy the file beside the model",
            )


def _number(entries: dict[str, str], key: str, name: str) -> int:
    text = entries.get(key, "0")
    if not text.isascii() or not text.isdigit() or len(text) > 20:
        raise ModelError(f"external data: {key} is not a number", where=f"tensor {name}", got=repr(text[:60]))
    return int(text)


def _check_sha1(data: npt.NDArray[np.uint8], checksum: str, name: str, location: str) -> None:
    found = hashlib.sha1(data.data, usedforsecurity=False).hexdigest()
    if found != checksum.lower():
        raise ModelError(
            "external data: the checksum does not match the file",
            where=f"tensor {name}, file {location}",
            got=f"{found}, checksum says {checksum[:40]}",
        )
