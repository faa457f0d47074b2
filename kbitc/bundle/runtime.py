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
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kbitc.bundle.engine import Engine, set_threads
from kbitc.bundle.feeds import aligned, aligned_copy, check_feeds, fits
from kbitc.bundle.manifest import LIBRARY, WEIGHTS, Described, Parameter
from kbitc.bundle.reader import check_runtime, choose_variant, open_bundle
from kbitc.bundle.weights import ALIGNMENT, map_weights
from kbitc.errors import InternalError, UsageError
from kbitc.targets import machine

Array = npt.NDArray[Any]
# Shapes whose buffers are kept for later runs. Planned memory comes in few sizes (see targets/memory): this bounds
# what loops allocate.
POOLED_SHAPES = 32
# Inputs of at most so many bytes that must be copied are copied to where they were in the run before.
KEPT_BYTES = 1 << 20


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
        pairs = zip(self._parameters, self._weights, strict=True)
        extents = [_extent(tensor, array) for tensor, array in pairs if array.nbytes]
        # One range around all weights; they are neighbours in the mapped file.
        self._weights_extent = (min(low for low, _ in extents), max(high for _, high in extents)) if extents else (0, 0)
        self._busy = threading.Lock()
        self._dynamic = any(isinstance(dim, str) for info in self.inputs for dim in info.shape)
        self._shapes: set[tuple[tuple[int, ...], ...]] = set()
        self._rooms: dict[tuple[int, tuple[int, ...]], Array] = {}

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
            given = [self._place(index, array) for index, array in enumerate(arrays)]
            results = self._run([*(tensor for _, tensor in given), *self._parameters])
            return self._host_outputs(given, results)

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
            self._rooms.clear()
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

    def _place(self, index: int, array: Array) -> tuple[Array, Any]:
        """What input `index` is run from: an array that fits compiled code, maybe a copy, and its device tensor."""
        if fits(array):
            tensor = self._engine.put(array)
            if tensor.data_ptr() % ALIGNMENT == 0:
                return array, tensor
        if not 0 < array.nbytes <= KEPT_BYTES:
            room = aligned(array)
        elif (kept := self._rooms.get((index, array.shape))) is not None:
            room = kept
            room[...] = array
        else:
            room = self._rooms[index, array.shape] = aligned_copy(array)
        return room, self._engine.put(room)

    def _host_outputs(self, given: Sequence[tuple[Array, Any]], results: Sequence[Any]) -> dict[str, Array]:
        """Outputs as numpy arrays; one that lies in an input, a weight or an earlier output is copied."""
        taken = [self._weights_extent, *(_extent(tensor, array) for array, tensor in given)]
        outputs: dict[str, Array] = {}
        for info, result in zip(self.outputs, results, strict=True):
            tensor = self._engine.get(result)
            array = np.from_dlpack(tensor)
            begin, end = extent = _extent(tensor, array)
            for low, high in taken:
                if begin < high and low < end:
                    array = array.copy()
                    break
            else:
                array = array if array.flags.writeable else array.copy()
            taken.append(extent)
            outputs[info.name] = array
        return outputs


def _extent(tensor: Any, array: Array) -> tuple[int, int]:
    """First and last address of a tensor; asking numpy takes a microsecond."""
    start: int = tensor.data_ptr()
    return start, start + array.nbytes


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
