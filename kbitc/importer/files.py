"""Opens model files without trusting them: `stat` first, then a bounded read, then a parse with one-line errors."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from kbitc.errors import ModelError, ResourceError, UsageError

#: protobuf cannot hold more than this in one message.
PROTOBUF_LIMIT = (1 << 31) - 1
#: Weights of more bytes than this are written beside the model.
_ONE_FILE = 1800 << 20

#: Bytes that tell other formats by their first bytes.
_HEAD = 32

_FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the model", "run `git lfs pull` to get the file itself"),
    (b"\x80\x02", "a Python pickle, not an ONNX model", "kbitc never unpickles; export the model to ONNX"),
    (b"\x80\x03", "a Python pickle, not an ONNX model", "kbitc never unpickles; export the model to ONNX"),
    (b"\x80\x04", "a Python pickle, not an ONNX model", "kbitc never unpickles; export the model to ONNX"),
    (b"\x80\x05", "a Python pickle, not an ONNX model", "kbitc never unpickles; export the model to ONNX"),
    (b"PK\x03\x04", "a zip archive (a torch checkpoint or a .npz), not an ONNX model", "export the model to ONNX"),
    (b"GGUF", "a GGUF file, not an ONNX model", "export the model to ONNX"),
    (b"\x89HDF", "an HDF5 file, not an ONNX model", "export the model to ONNX"),
    (b"\x93NUMPY", "a numpy array, not an ONNX model", None),
    (b"\x7fELF", "a compiled library, not an ONNX model", None),
    (b"\x1f\x8b", "a gzip file, not an ONNX model", "unpack it first"),
    (b"<!DOCTYPE", "an HTML page, not an ONNX model", "download the file itself"),
    (b"<html", "an HTML page, not an ONNX model", "download the file itself"),
)


def open_regular(path: Path, *, what: str, follow_links: bool) -> int:
    """A read-only descriptor of a regular file; never blocks on a FIFO or device.

    Args:
        path: the file.
        what: what the file is, for messages.
        follow_links: False refuses a symbolic link as last component.

    Raises:
        ModelError: when it is missing, not readable, or not a regular file.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)
    if not follow_links:
        flags |= os.O_NOFOLLOW
    try:
        if not stat.S_ISREG(os.stat(path, follow_symlinks=follow_links).st_mode):
            raise ModelError(f"{what} is not a regular file", where=str(path), got=_kind(path))
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        raise ModelError(f"{what} does not exist", where=str(path)) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{what} cannot be opened", where=str(path), got=str(error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelError(f"{what} is not a regular file", where=str(path))
    return descriptor


def _kind(path: Path) -> str:
    mode = os.stat(path, follow_symlinks=False).st_mode
    names = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((name for test, name in names if test(mode)), "something else")


def read_model_file(path: Path) -> bytes:
    """The bytes of an ONNX file.

    Raises:
        ModelError: when the file is missing, no regular file, empty, over 2 GB, or plainly some other format.
    """
    descriptor = open_regular(path, what="the model file", follow_links=True)
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size == 0:
            raise ModelError("the model file is empty", where=str(path))
        if size > PROTOBUF_LIMIT:
            raise ModelError(
                "the model file is larger than protobuf can hold",
                where=str(path),
                got=f"{size / 1e9:.1f} GB",
                remedy="save it with external data (onnx.save(..., save_as_external_data=True))",
            )
        head = file.read(_HEAD)
        for magic, name, remedy in _FOREIGN:
            if head.startswith(magic):
                raise ModelError(f"the file is {name}", where=str(path), remedy=remedy)
        if size < 8:
            raise ModelError("the model file is too small to be an ONNX model", where=str(path), got=f"{size} bytes")
        data = head + file.read(size - len(head))
    if len(data) != size:
        raise ModelError("the model file is shorter than it says", where=str(path), got=f"{len(data)} of {size} bytes")
    return data


def write_model(model: ir.Model, path: Path) -> int:
    """Write a model as one ONNX file, and its weights beside it as `PATH.data` when they do not fit one message.

    The files appear under their names only when they are complete.

    Returns:
        Bytes written.

    Raises:
        ResourceError: when the disk refuses.
    """
    weights = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
    )
    outside = f"{path.name}.data" if weights > _ONE_FILE else None
    try:
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            ir.save(model, Path(folder) / path.name, external_data=outside)
            written = sorted(Path(folder).iterdir(), reverse=True)
            size = sum(file.stat().st_size for file in written)
            for file in written:
                os.replace(file, path.parent / file.name)
    except OSError as error:
        raise ResourceError("the model cannot be written", where=str(path), got=str(error)) from error
    return size


def parse_model(data: bytes, where: str) -> onnx.ModelProto:
    """The protobuf message in `data`.

    Raises:
        ModelError: when it is no ONNX model, is cut short, or nests deeper than protobuf's limit of 100.
    """
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise ModelError(
            "the file is not an ONNX model, is cut short, or nests too deep",
            where=where,
            got=" ".join(str(error).split()),
            remedy="check the download or export it again",
        ) from error
    if not proto.HasField("graph"):
        raise ModelError("the file holds no graph", where=where, remedy="export the model again")
    return proto


def size_of(write: Callable[[Path], object], path: Path) -> int:
    """Bytes of all files that `write` makes under the name of `path`; nothing stays.

    Raises:
        KbitcError: as `write`.
    """
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        write(Path(folder) / path.name)
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def fresh_output(output: str | PathLike[str], force: bool) -> Path:
    """The output path; refused when it exists, unless forced.

    Raises:
        UsageError: it exists, or its folder does not.
    """
    path = Path(output)
    if (path.exists() or path.is_symlink()) and not force:
        raise UsageError("output already exists", where=str(path), remedy="use --force to replace it")
    if not path.absolute().parent.is_dir():
        raise UsageError("output folder does not exist", where=str(path.parent), remedy="create it first")
    return path
