"""Loads a bundle and runs it. Needs numpy, tvm_ffi and libtvm_runtime.so; tvm itself is never imported.

::

    model = load("model.kbit")
    outputs = model({"input": array})
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from kbitc import catalog
from kbitc.bundle.engine import Engine, set_threads
from kbitc.bundle.manifest import LIBRARY, WEIGHTS, Described, Parameter
from kbitc.bundle.reader import check_runtime, choose_variant, open_bundle
from kbitc.bundle.weights import ALIGNMENT, map_weights
from kbitc.errors import CalibrationError, InternalError, UsageError
from kbitc.targets import machine

Array = npt.NDArray[Any]
# Shapes whose buffers are kept for later runs. Planned memory comes in few sizes (see targets/memory): this bounds
# what loops allocate.
POOLED_SHAPES = 32


class Model:
    """A loaded model: call it with a dict of numpy arrays, get a dict of numpy arrays.

    Attributes:
        inputs: what it takes.
        outputs: what it gives.
        threads: threads that kernels use.
        target_name: the target of the variant that runs, such as ``x86:avx2``; "" when it was not loaded from a bundle.
    """

    target_name = ""

    def __init__(
        self,
        library: Path,
        weights: Mapping[str, Array],
        inputs: Sequence[Described],
        outputs: Sequence[Described],
        *,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.threads = machine.physical_cores() if threads is None else threads
        if self.threads < 1:
            raise UsageError("the number of threads must be at least 1", got=threads)
        self._engine = Engine(library, device)
        self._weights = [aligned(array) for array in weights.values()]
        self._parameters = [self._engine.put(array) for array in self._weights]
        extents = [_extent(array) for array in self._weights if array.nbytes]
        # One range around all weights; they are neighbours in the mapped file.
        self._weights_extent = (min(low for low, _ in extents), max(high for _, high in extents)) if extents else (0, 0)
        self._busy = threading.Lock()
        self._dynamic = any(isinstance(dim, str) for info in self.inputs for dim in info.shape)
        self._shapes: set[tuple[tuple[int, ...], ...]] = set()

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model.

        Args:
            feeds: input name -> array of exactly the input's dtype and a fitting shape.

        Returns:
            Output name -> array that nobody else holds.

        Raises:
            CalibrationError: when the feeds do not fit the inputs.
        """
        arrays = check_feeds(self.inputs, feeds)
        with self._busy:
            set_threads(self.threads)
            self._fit_pool(arrays)
            results = self._run(self.device_arguments(arrays))
            return self._host_outputs(arrays, results)

    @property
    def engine(self) -> Engine:
        """The virtual machine that runs it."""
        return self._engine

    @property
    def parameters(self) -> Sequence[Any]:
        """The weights as device tensors."""
        return tuple(self._parameters)

    def device_arguments(self, arrays: Sequence[Array]) -> list[Any]:
        """Checked inputs as the arguments of `run_raw`, on the model's device."""
        return [*(self._engine.put(aligned(array)) for array in arrays), *self._parameters]

    def run_raw(self, arguments: Sequence[Any]) -> list[Any]:
        """Run on device arguments and wait for the end; for timing, without checks and copies."""
        with self._busy:
            set_threads(self.threads)
            self._fit_pool(arguments)
            results = self._run(arguments)
            self._engine.synchronize()
            return results

    def _fit_pool(self, arguments: Sequence[Any]) -> None:
        """Keep the memory of runs of some shapes: TVM keeps freed buffers by size, and of ever new sizes they pile up.

        Giving memory back at each new shape would cost a tenth of a run of MiniLM.
        """
        if not self._dynamic:
            return
        shapes = tuple(tuple(argument.shape) for argument in arguments[: len(self.inputs)])
        if shapes in self._shapes:
            return
        if len(self._shapes) == POOLED_SHAPES:
            self._engine.release_pool()
            self._shapes.clear()
        self._shapes.add(shapes)

    def _run(self, arguments: Sequence[Any]) -> list[Any]:
        try:
            results = self._engine.run(arguments)
        except (RuntimeError, ValueError, TypeError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise InternalError("the compiled module refused its inputs", got=lines[-1][:300]) from error
        if len(results) != len(self.outputs):
            raise InternalError("the compiled module gives another number of outputs", got=len(results))
        return results

    def _host_outputs(self, arrays: Sequence[Array], results: Sequence[Any]) -> dict[str, Array]:
        """Outputs as numpy arrays; one that lies in an input, a weight or an earlier output is copied."""
        taken = [self._weights_extent, *(_extent(array) for array in arrays)]
        outputs: dict[str, Array] = {}
        for info, result in zip(self.outputs, results, strict=True):
            array = np.from_dlpack(self._engine.get(result))
            begin, end = _extent(array)
            if not array.flags.writeable or any(begin < high and low < end for low, high in taken):
                array = array.copy()
            taken.append((begin, end))
            outputs[info.name] = array
        return outputs


def _extent(array: Array) -> tuple[int, int]:
    start = array.ctypes.data
    return start, start + array.nbytes


def aligned(array: Array) -> Array:
    """The array itself when it is contiguous, writeable and starts on 64 bytes, as TVM's code assumes; else a copy."""
    if not array.size:
        # TVM asks for strides that are products of the dims behind, zeros too; numpy's own are all zero.
        strides = [prod(array.shape[axis + 1 :]) * array.itemsize for axis in range(array.ndim)]
        return as_strided(np.zeros(1, array.dtype), array.shape, strides)
    if array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % ALIGNMENT == 0:
        return array
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def check_feeds(inputs: Sequence[Described], feeds: Mapping[str, Array]) -> list[Array]:
    """The feeds in the order of the inputs.

    Raises:
        CalibrationError: for a missing or unknown name (says the nearest), another dtype, rank or dim, or two sizes
            for one symbolic dim.
    """
    known = [info.name for info in inputs]
    for name in feeds:
        if name not in known:
            raise CalibrationError("the model has no such input", got=repr(name), remedy=catalog.nearest(name, known))
    sizes: dict[str, tuple[int, str]] = {}
    arrays = []
    for info in inputs:
        if info.name not in feeds:
            raise CalibrationError("an input is missing", where=info.name, remedy=f"give {describe(info)}")
        array = np.asarray(feeds[info.name])
        if array.dtype != np.dtype(info.dtype):
            raise CalibrationError(
                "an input has the wrong dtype",
                where=info.name,
                got=str(array.dtype),
                remedy=f"give {describe(info)}, for example by .astype({info.dtype!r})",
            )
        _check_dims(info, array.shape, sizes)
        arrays.append(array)
    return arrays


def _check_dims(info: Described, shape: tuple[int, ...], sizes: dict[str, tuple[int, str]]) -> None:
    got = f"[{', '.join(map(str, shape))}]"
    if len(shape) != len(info.shape):
        raise CalibrationError(
            f"an input has {len(shape)} dims instead of {len(info.shape)}",
            where=info.name,
            got=got,
            remedy=f"give {describe(info)}",
        )
    for dim, size in zip(info.shape, shape, strict=True):
        expected, source = sizes.setdefault(dim, (size, info.name)) if isinstance(dim, str) else (dim, info.name)
        if size == expected:
            continue
        reason = f"dim {dim} is {expected} in {source}" if isinstance(dim, str) else f"give {describe(info)}"
        raise CalibrationError("an input has the wrong shape", where=info.name, got=got, remedy=reason)


def describe(info: Described) -> str:
    """An input or output as text, such as ``float32[batch, 3, 48, 192]``."""
    return f"{info.dtype}[{', '.join(map(str, info.shape))}]"


def load(
    path: str | os.PathLike[str], *, threads: int | None = None, verify: bool = True, variant: str | None = None
) -> Model:
    """Load a bundle: of its variants the best that this machine runs.

    Args:
        path: the folder NAME.kbit.
        threads: threads for kernels, at most one for each usable processor; None: one for each physical core.
        verify: compare the SHA-256 of every file before anything is mapped or loaded.
        variant: the only variant that will do, such as "avx2"; None: what KBITC_VARIANT says, else the best.

    Raises:
        BundleError: when the bundle is damaged or for another machine, or lacks the variant.
        UsageError: when `threads` is not positive.
    """
    bundle = open_bundle(path, verify=verify)
    manifest = bundle.manifest
    chosen = choose_variant(manifest, str(path), variant)
    check_runtime(manifest, str(path))
    model = load_parts(
        bundle.path(chosen.library),
        bundle.path(WEIGHTS),
        manifest.parameters_of(chosen),
        manifest.inputs,
        manifest.outputs,
        device=manifest.target.device,
        threads=threads,
    )
    model.target_name = chosen.target
    return model


def load_parts(
    library: Path,
    weights: Path,
    parameters: tuple[Parameter, ...],
    inputs: Sequence[Described],
    outputs: Sequence[Described],
    *,
    device: str = "cpu",
    threads: int | None = None,
) -> Model:
    """Load a compiled library and a weights file without any check of hashes, as for a bundle that is being written.

    Args:
        library: the module.so.
        weights: a file written by `kbitc.bundle.weights.write_weights`; it is mapped privately, not copied.
        parameters: what `write_weights` gave back.
        inputs: inputs of `main`.
        outputs: outputs of `main`.
        device: "cpu" or "cuda".
        threads: as for `load`.
    """
    views = map_weights(map_file(weights), parameters, str(weights))
    return Model(library, views, inputs, outputs, device=device, threads=threads)


def load_built(
    library: bytes,
    weights: Mapping[str, Array],
    inputs: Sequence[Described],
    outputs: Sequence[Described],
    *,
    device: str = "cpu",
    threads: int | None = None,
) -> Model:
    """Load what a build gave, before any bundle is written; arguments as for `load_parts`, weights in memory."""
    with tempfile.TemporaryDirectory(prefix="kbitc-") as folder:
        path = Path(folder) / LIBRARY
        path.write_bytes(library)
        return Model(path, weights, inputs, outputs, device=device, threads=threads)


def map_file(path: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a file, mapped privately: u8 [size]. Pages are read when they are touched."""
    if path.stat().st_size == 0:
        return np.zeros(0, np.uint8)
    return np.memmap(path, np.uint8, mode="c").view(np.ndarray)
