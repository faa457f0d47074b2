"""Inputs of a run: are they what the model takes, and do they lie as compiled code expects.

This stands in front of every run of every model, and some runs take microseconds: what is only needed to say what is
wrong is made when something is.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from kbitc import catalog
from kbitc.bundle.manifest import Described
from kbitc.bundle.weights import ALIGNMENT
from kbitc.errors import CalibrationError

Array = npt.NDArray[Any]
_dtype = functools.cache(np.dtype)


def check_feeds(inputs: Sequence[Described], feeds: Mapping[str, Array]) -> list[Array]:
    """The feeds in the order of the inputs.

    Raises:
        CalibrationError: for a missing or unknown name (says the nearest), another dtype, rank or dim, or two sizes
            for one symbolic dim.
    """
    sizes: dict[str, tuple[int, str]] = {}
    arrays = []
    for info in inputs:
        if info.name not in feeds:
            _refuse_unknown(inputs, feeds)
            raise CalibrationError("an input is missing", where=info.name, remedy=f"give {describe(info)}")
        array = np.asarray(feeds[info.name])
        if array.dtype != _dtype(info.dtype):
            _refuse_unknown(inputs, feeds)
            raise CalibrationError(
                "an input has the wrong dtype",
                where=info.name,
                got=str(array.dtype),
                remedy=f"give {describe(info)}, for example by .astype({info.dtype!r})",
            )
        if array.shape != info.shape:
            _check_dims(info, array.shape, sizes)
        arrays.append(array)
    if len(feeds) != len(arrays):
        _refuse_unknown(inputs, feeds)
    return arrays


def _refuse_unknown(inputs: Sequence[Described], feeds: Mapping[str, Array]) -> None:
    known = [info.name for info in inputs]
    for name in feeds:
        if name not in known:
            raise CalibrationError("the model has no such input", got=repr(name), remedy=catalog.nearest(name, known))


def _check_dims(info: Described, shape: tuple[int, ...], sizes: dict[str, tuple[int, str]]) -> None:
    if len(shape) != len(info.shape):
        raise CalibrationError(
            f"an input has {len(shape)} dims instead of {len(info.shape)}",
            where=info.name,
            got=_text(shape),
            remedy=f"give {describe(info)}",
        )
    for dim, size in zip(info.shape, shape, strict=True):
        expected, source = sizes.setdefault(dim, (size, info.name)) if isinstance(dim, str) else (dim, info.name)
        if size == expected:
            continue
        reason = f"dim {dim} is {expected} in {source}" if isinstance(dim, str) else f"give {describe(info)}"
        raise CalibrationError("an input has the wrong shape", where=info.name, got=_text(shape), remedy=reason)


def _text(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def describe(info: Described) -> str:
    """An input or output as text, such as ``float32[batch, 3, 48, 192]``."""
    return info.dtype + _text(info.shape)


def fits(array: Array) -> bool:
    """Whether compiled code takes it, but for where it starts: contiguous, writeable, not empty."""
    flags = array.flags
    return flags.c_contiguous and flags.writeable and bool(array.size)


def aligned(array: Array) -> Array:
    """The array itself when it is contiguous, writeable and starts on 64 bytes, as TVM's code assumes; else a copy."""
    if not array.size:
        # TVM asks for strides that are products of the dims behind, zeros too; numpy's own are all zero.
        strides = [prod(array.shape[axis + 1 :]) * array.itemsize for axis in range(array.ndim)]
        return as_strided(np.zeros(1, array.dtype), array.shape, strides)
    return array if fits(array) and array.ctypes.data % ALIGNMENT == 0 else aligned_copy(array)


def aligned_copy(array: Array) -> Array:
    """A copy, contiguous, that starts on 64 bytes."""
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
