"""Samples to calibrate with, verify on and run: read from files and checked against the model, or made up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.errors import CalibrationError
from kbitc.importer.arrays import read_arrays
from kbitc.importer.batches import Batches, Feeds, Spool
from kbitc.importer.made_up import index_bounds, made_up_feeds

__all__ = ["Input", "fit", "made_up_feeds", "model_inputs", "open_batches", "read_feeds", "sample_feeds"]

Array = npt.NDArray[Any]

#: Most batches that a model is compared on.
MAX_BATCHES = 64
#: Most batches that weights are solved on, and their bytes.
SOLVED_BATCHES, SOLVED_BYTES = 256, 1 << 28
#: Samples in a batch where the model leaves that open.
OPEN_BATCH = 8
#: Generated samples: the noise of few draws of few numbers says little of the next draw.
_MADE_UP = 8


class Input(Protocol):
    """An input of a model or bundle: name, numpy dtype name, dims (a number or a symbol)."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def dtype(self) -> str:
        """Its numpy dtype's name."""
        ...

    @property
    def shape(self) -> tuple[int | str, ...]:
        """Its dims."""
        ...


@dataclass(frozen=True)
class ModelInput:
    """An input of an ONNX model; `bound`: values must be below it (rows of an embedding), or None."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    bound: int | None = None


def model_inputs(model: ir.Model) -> list[ModelInput]:
    """The inputs of a model, with the bounds that its Gather nodes put on index inputs."""
    bounds = index_bounds(model)
    found = []
    for value in model.graph.inputs:
        dims = value.shape.dims if value.shape is not None else ()
        shape = tuple(dim if isinstance(dim, int) else (dim.value or "?") for dim in dims)
        dtype = value.dtype.numpy().name if value.dtype is not None else "float32"
        found.append(ModelInput(value.name or "", dtype, shape, bounds.get(value.name or "")))
    return found


def sample_feeds(model: ir.Model, calibration: Any = None) -> tuple[list[Feeds], str]:
    """At most MAX_BATCHES batches to run a model on, and a sentence that says where they come from.

    Args:
        model: the model.
        calibration: see `open_batches`, or None: then inputs are made up.

    Raises:
        CalibrationError: the data do not fit the model; names the array, the index and the remedy.
    """
    if calibration is None:
        return [made_up_feeds(model, seed=seed) for seed in range(_MADE_UP)], f"{_MADE_UP} generated inputs"
    return open_batches(model, calibration).first(MAX_BATCHES)


def open_batches(model: ir.Model, calibration: Any) -> Batches:
    """All batches of a data set, read one at a time and checked as they are read.

    Args:
        model: the model.
        calibration: path of a .npz or .npy file or of a folder of them, a finite iterable of feeds {name: array}, or
            what this function gave.

    Raises:
        CalibrationError: a folder without data; while reading, data that do not fit the model.
    """
    if isinstance(calibration, Batches):
        return calibration
    inputs = model_inputs(model)
    if isinstance(calibration, str | os.PathLike):
        return _from_path(inputs, Path(calibration))
    items = Spool(calibration) if isinstance(calibration, Iterator) else calibration
    return Batches(lambda lost: _from_iterable(inputs, items), "feeds from the caller")


def read_feeds(path: str | os.PathLike[str], inputs: Sequence[Input]) -> Feeds:
    """One set of feeds from a .npz file (arrays named as the inputs) or a .npy file (a model with one input).

    Raises:
        CalibrationError: see `sample_feeds`.
    """
    arrays = _named(read_arrays(Path(path)), inputs, str(path))
    return {item.name: fit(arrays[item.name], item, str(path)) for item in inputs}


def _from_iterable(inputs: Sequence[ModelInput], source: Iterable[Mapping[str, Any]]) -> Iterator[Feeds]:
    position = -1
    for position, item in enumerate(source):
        where = f"feeds {position}"
        if not isinstance(item, Mapping):
            raise CalibrationError(
                "calibration must give mappings of name to array", where=where, got=type(item).__name__
            )
        arrays = _named({str(name): np.asarray(array) for name, array in item.items()}, inputs, where)
        yield {entry.name: fit(arrays[entry.name], entry, where) for entry in inputs}
    if position < 0:
        raise CalibrationError("the calibration data hold no samples", remedy="give at least one")


def _from_path(inputs: Sequence[ModelInput], path: Path) -> Batches:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".npz", ".npy"))
        if not files:
            raise CalibrationError("the folder holds no .npz or .npy files", where=str(path))

    def read(lost: Callable[[int], None]) -> Iterator[Feeds]:
        for file in files:
            yield from _batches(_named(read_arrays(file), inputs, str(file)), inputs, str(file), lost)

    return Batches(read, f"batches from {path.name}")


def _named(arrays: dict[str, Array], inputs: Sequence[Input], where: str) -> dict[str, Array]:
    """The arrays by input name; a nameless array belongs to a model's only input."""
    names = [item.name for item in inputs]
    if list(arrays) == [""] and len(names) == 1:
        return {names[0]: arrays[""]}
    missing = [name for name in names if name not in arrays]
    extra = [name for name in arrays if name not in names]
    if missing or extra:
        wanted = "inputs are " + ", ".join(repr(name) for name in names[:20])
        problem = f"no array for {missing[0]!r}" if missing else f"array {extra[0]!r} is no input"
        given = ", ".join(repr(name) for name in list(arrays)[:20])
        raise CalibrationError(f"arrays and inputs do not match: {problem}", where=where, got=given, remedy=wanted)
    return arrays


def _batches(
    arrays: dict[str, Array], inputs: Sequence[ModelInput], where: str, lost: Callable[[int], None]
) -> Iterator[Feeds]:
    """Cut arrays along axis 0 into batches of the size the model wants; `lost` hears how many samples fill none."""
    counts = {item.name: _count(arrays[item.name], item, where) for item in inputs}
    cut = {name: count for name, count in counts.items() if count is not None}
    if not cut:
        yield {item.name: fit(arrays[item.name], item, where) for item in inputs}
        return
    samples, size, fixed = _common(cut, inputs, arrays, where)
    left = samples % size if fixed else 0
    for start in range(0, samples - left, size):
        yield {
            item.name: fit(
                arrays[item.name][start : start + size] if item.name in cut else arrays[item.name], item, where, start
            )
            for item in inputs
        }
    lost(left)


def _count(array: Array, item: ModelInput, where: str) -> int | None:
    """How many samples an array holds; None when it is fed whole."""
    _check_rank(array, item, where)
    if not item.shape or (isinstance(item.shape[0], int) and array.shape[0] == item.shape[0]):
        return None
    if isinstance(item.shape[0], int) and item.shape[0] == 0:
        return None
    return int(array.shape[0])


def _common(
    cut: dict[str, int], inputs: Sequence[ModelInput], arrays: dict[str, Array], where: str
) -> tuple[int, int, bool]:
    """(samples, batch size, whether the model fixes that size) that all arrays that are cut agree on."""
    if len(set(cut.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in cut.items())
        raise CalibrationError("the arrays hold different numbers of samples", where=where, got=listed)
    samples = next(iter(cut.values()))
    fixed = {item.shape[0] for item in inputs if item.name in cut and isinstance(item.shape[0], int)}
    size = max((int(dim) for dim in fixed), default=min(samples, OPEN_BATCH))
    name = next(iter(cut))
    if samples == 0 or size == 0:
        raise CalibrationError(
            "the array holds no samples", where=f"{where}, array {name!r}", got=list(arrays[name].shape)
        )
    if samples < size:
        raise CalibrationError(
            "fewer samples than one batch of the model",
            where=f"{where}, array {name!r}",
            got=f"{samples}, the model's batch is {size}",
        )
    return samples, size, bool(fixed)


def _check_rank(array: Array, item: Input, where: str) -> None:
    if array.ndim != len(item.shape):
        raise CalibrationError(
            "the array has the wrong rank",
            where=f"{where}, array {item.name!r}",
            got=f"shape {list(array.shape)}",
            remedy=f"input {item.name!r} is {_shape_text(item)}",
        )


def _shape_text(item: Input) -> str:
    return f"{item.dtype}[{', '.join(str(dim) for dim in item.shape)}]"


def fit(array: Array, item: Input, where: str, first: int = 0) -> Array:
    """An array as an input wants it: dtype converted where no value changes meaning, shape and numbers checked.

    Args:
        array: the array.
        item: the input.
        where: file or caller, for messages.
        first: index of the array's first sample in the file, for messages.

    Raises:
        CalibrationError: a rank, dim or dtype that does not fit, NaN or infinity, or an index beyond an embedding.
    """
    label = f"{where}, array {item.name!r}"
    _check_rank(array, item, where)
    for axis, (dim, size) in enumerate(zip(item.shape, array.shape, strict=True)):
        if isinstance(dim, int) and dim != size:
            raise CalibrationError(
                "the array has the wrong shape",
                where=label,
                got=f"{size} along axis {axis}",
                remedy=f"input {item.name!r} is {_shape_text(item)}",
            )
        # Another dim may be 0: the cache of a first step is empty.
        if axis == 0 and size == 0 and not isinstance(dim, int):
            raise CalibrationError("the array holds no samples", where=label, got=list(array.shape))
    converted = _convert(array, np.dtype(item.dtype), label)
    _refuse_bad_numbers(converted, label, first)
    bound = getattr(item, "bound", None)
    if bound is not None and converted.size and (converted.max() >= bound or converted.min() < -bound):
        raise CalibrationError(
            "an index lies beyond the embedding it looks up",
            where=label,
            got=int(converted.max()),
            remedy=f"values must be below {bound}",
        )
    return np.ascontiguousarray(converted)


def _convert(array: Array, wanted: np.dtype[Any], label: str) -> Array:
    if array.dtype == wanted:
        return array
    floats = array.dtype.kind == "f" and wanted.kind in "fV"
    whole = array.dtype.kind in "iu" and wanted.kind in "iu"
    if not floats and not whole:
        raise CalibrationError(
            "the array has the wrong type",
            where=label,
            got=f"{array.dtype}, the model wants {wanted}",
            remedy="prepare the data as the model was trained on (scale images, tokenize text)",
        )
    if whole and array.size:
        limits = np.iinfo(wanted)
        if int(array.max()) > limits.max or int(array.min()) < limits.min:
            raise CalibrationError(
                "a value does not fit the input's type", where=label, got=f"{array.dtype} into {wanted}"
            )
    with np.errstate(over="ignore"):
        return array.astype(wanted)


def _refuse_bad_numbers(array: Array, label: str, first: int) -> None:
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        return
    bad = ~np.isfinite(array)
    if bad.any():
        index = [int(item) for item in np.argwhere(bad)[0]]
        number = float(array[tuple(index)])
        if index:
            index[0] += first
        raise CalibrationError(
            "the array holds a number that is not finite",
            where=label,
            got=f"{number} at index {index}",
            remedy="clean the data",
        )
