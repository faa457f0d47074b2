"""TVM's runtime without tvm: two small libraries, found in the installed packages and loaded once.

`import tvm_ffi` imports torch when torch is installed, which takes over a second and which nothing here needs, so
torch is hidden while it is imported.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

from kbitc.errors import BundleError, ResourceError

RUNTIME = "libtvm_runtime.so"
RUNTIME_CUDA = "libtvm_runtime_cuda.so"
DEVICE_TYPES = {"cpu": 1, "cuda": 2}  # DLDeviceType of DLPack
_POOLED_ALLOCATOR = 2  # tvm::runtime::memory::AllocatorType
# VMInstrumentReturnKind: what a watcher answers before a call.
RUN, SKIP = 0, 1
_SHARE_CORES = -3  # ThreadGroup::AffinityMode::kSpecifyThreadShareAllCore: threads are not pinned to single cores
#: How often a worker of TVM's pool looks for work before it sleeps: longer than kernels lie apart. TVM's own number is
#: 300,000, which exit() waits for too; each look gives the core away, so that a busy machine takes minutes for them.
_SPINS = ("TVM_THREAD_POOL_SPIN_COUNT", "2000")
_lock = threading.Lock()


class _HideTorch:
    """A finder that makes `import torch` fail in one thread; others are not affected."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Refuse torch, leave every other module to the next finder."""
        if name == "torch" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError("torch is hidden while tvm_ffi is imported", name=name)
        return None


@contextmanager
def torch_hidden() -> Iterator[None]:
    """While it lasts, `import torch` fails in this thread, unless torch is imported already."""
    finder = _HideTorch()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def runtime_folder() -> Path:
    """The folder of libtvm_runtime.so in the installed apache-tvm; tvm is not imported.

    Raises:
        ResourceError: when apache-tvm is not installed.
    """
    spec = importlib.util.find_spec("tvm")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "lib" / RUNTIME).is_file():
            return Path(place) / "lib"
    raise ResourceError(f"{RUNTIME} is not installed", remedy="pip install apache-tvm")


@functools.cache
def tvm_ffi() -> Any:
    """The module tvm_ffi with libtvm_runtime.so loaded behind it."""
    with _lock, torch_hidden():
        ffi = importlib.import_module("tvm_ffi")
    os.environ.setdefault(*_SPINS)  # read when the first worker starts
    _load(RUNTIME)
    return ffi


@functools.cache
def _load(name: str) -> ctypes.CDLL:
    path = runtime_folder() / name
    try:
        return ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ResourceError("a runtime library cannot be loaded", where=str(path), got=str(error)) from error


def _load_cuda() -> None:
    """TVM's CUDA runtime, and before it the CUDA runtime that it links against."""
    from kbitc.targets.runner.libraries import CUDART, find_cudart

    place = find_cudart()
    for candidate in (CUDART, str(place) if place else ""):
        try:
            ctypes.CDLL(candidate or CUDART, ctypes.RTLD_GLOBAL)
            break
        except OSError:
            continue
    else:
        raise ResourceError(
            f"{CUDART} is not here", remedy="pip install nvidia-cuda-runtime, or install the CUDA 13 runtime"
        )
    _load(RUNTIME_CUDA)


class _Library:
    """One loaded module.so."""

    def __init__(self, path: str) -> None:
        self.module = tvm_ffi().load_module(path)


_libraries: WeakValueDictionary[tuple[int, int], _Library] = WeakValueDictionary()
_inodes: dict[str, list[tuple[int, int]]] = {}


def load_library(path: Path) -> _Library:
    """Load a compiled library, once per file.

    dlopen answers with the library it already has when the *name* is the same, even if the file was replaced since,
    so each new file behind a name gets a spelling of its own (".../././module.so"). And a library has one context
    pointer, so two module objects on one file would share it: a file that is loaded is not loaded again.
    """
    real = os.path.realpath(path)
    status = os.stat(real)
    identity = (status.st_dev, status.st_ino)
    with _lock:
        library = _libraries.get(identity)
        if library is None:
            seen = _inodes.setdefault(real, [])
            if identity not in seen:
                seen.append(identity)
            folder, name = os.path.split(real)
            spelling = folder + "/." * seen.index(identity) + "/" + name
            library = _libraries[identity] = _load_module(spelling)
    return library


def _load_module(path: str) -> _Library:
    tvm_ffi()
    try:
        return _Library(path)
    except Exception as error:
        raise BundleError("the library cannot be loaded", where=path, got=_last_line(error)) from error


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


class Engine:
    """One relax virtual machine on one device.

    Args:
        library: the module.so.
        device: "cpu" or "cuda".
    """

    def __init__(self, library: Path, device: str) -> None:
        self._ffi = tvm_ffi()
        if device == "cuda":
            _load_cuda()
        self.device = device
        self._library = load_library(library)
        try:
            self._machine = self._library.module["vm_load_executable"]()
        except AttributeError as error:
            raise BundleError("the library holds no compiled model", where=str(library)) from error
        cpu = (DEVICE_TYPES["cpu"], 0, _POOLED_ALLOCATOR)
        devices = cpu if device == "cpu" else (DEVICE_TYPES[device], 0, _POOLED_ALLOCATOR, *cpu)
        self._machine["vm_initialization"](*devices)
        self._main = self._machine["main"]
        # Iteration over an Array of tvm_ffi takes four times as long.
        self._size, self._item = (self._ffi.get_global_func(name) for name in ("ffi.ArraySize", "ffi.ArrayGetItem"))

    def put(self, array: Any) -> Any:
        """A device tensor of a numpy array: the array itself on the CPU, a copy elsewhere."""
        tensor = self._ffi.from_dlpack(array)
        if self.device == "cpu":
            return tensor
        function = self._ffi.get_global_func
        place = self._ffi.device(self.device, 0)
        made = function("runtime.TVMTensorAllocWithScope")(self._ffi.Shape(array.shape), tensor.dtype, place, None)
        function("runtime.TVMTensorCopyFromTo")(tensor, made)
        return made

    def get(self, tensor: Any) -> Any:
        """A host tensor (with DLPack) of a device tensor: the tensor itself on the CPU, a copy elsewhere."""
        if self.device == "cpu":
            return tensor
        function = self._ffi.get_global_func
        place = self._ffi.device("cpu", 0)
        made = function("runtime.TVMTensorAllocWithScope")(self._ffi.Shape(tensor.shape), tensor.dtype, place, None)
        function("runtime.TVMTensorCopyFromTo")(tensor, made)
        return made

    def run(self, arguments: Sequence[Any]) -> list[Any]:
        """Call `main` with device tensors; gives its outputs as device tensors.

        Raises:
            RuntimeError: when the compiled code refuses its arguments.
        """
        result = self._main(*arguments)
        if isinstance(result, self._ffi.Tensor):
            return [result]
        return [self._item(result, place) for place in range(self._size(result))]

    @contextmanager
    def watched(self, watch: Callable[..., int]) -> Iterator[None]:
        """Ask before every call of the virtual machine, while it lasts.

        Args:
            watch: takes (function, symbol, before, result, *arguments); called before and after each call. When it
                answers `SKIP` to a call, the call is not made.
        """
        self._machine["set_instrument"](self._ffi.convert(watch))
        try:
            yield
        finally:
            self._machine["set_instrument"](None)

    def nothing(self) -> Callable[..., Any]:
        """A function of TVM that does nothing, to know what a call costs."""
        function: Callable[..., Any] = self._ffi.get_global_func("testing.nop")
        return function

    def release_pool(self) -> None:
        """Give memory that no tensor holds back: TVM keeps what a run has freed, by size, for the next run."""
        self._ffi.get_global_func("vm.builtin.memory_manager.clear")()

    def synchronize(self) -> None:
        """Wait until the device has finished."""
        if self.device != "cpu":
            place = self._ffi.device(self.device, 0)
            self._ffi.get_global_func("runtime.Device_StreamSync")(place, 0)


class _ThreadState(threading.local):
    threads = 0


_thread_state = _ThreadState()


def set_threads(count: int) -> None:
    """Let the calling thread's kernels run on `count` threads, at most one for each usable processor.

    TVM's pool belongs to the calling thread, has one worker for each processor named at first, and would pin threads
    to single cores (the caller's too) unless it is told to share them.
    """
    if _thread_state.threads == count:
        return
    processors = [str(cpu) for cpu in sorted(os.sched_getaffinity(0))]
    tvm_ffi().get_global_func("runtime.config_threadpool")(_SHARE_CORES, min(count, len(processors)), processors)
    _thread_state.threads = count
