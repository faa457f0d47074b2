"""Make TVM put machine code, not source text, into a library, on a host without GPU or driver.

TVM compiles kernels at build time only when its CUDA runtime library is loaded, and that library links against the
driver's libcuda.so.1. Where there is no driver a stub takes its place: every function of it answers "no device".
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbitc.errors import KbitcError, ResourceError
from kbitc.targets import machine
from kbitc.targets.cuda.toolchain import (
    INSTALL,
    RUNTIME,
    KernelResources,
    Toolchain,
    compile_source,
    find_runtime,
    find_toolchain,
)

if TYPE_CHECKING:
    from kbitc.targets.target import Target

NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE of the driver API
DRIVER = "libcuda.so.1"
CREATE = "ffi.Module.create.cuda"
CALLBACK = "tvm_callback_cuda_compile"
# What libtvm_runtime_cuda.so takes from the driver, and what machine.cuda_capability asks it.
STUB_SYMBOLS = (
    *("cuInit", "cuDeviceGet", "cuDeviceGetAttribute", "cuDeviceGetCount", "cuDriverGetVersion"),
    *("cuDeviceGetName", "cuFuncSetAttribute", "cuGetErrorName", "cuGetErrorString", "cuLaunchKernelEx"),
    *("cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload", "cuTensorMapEncodeTiled"),
)


@dataclass
class Compilation:
    """What was compiled inside `machine_code`, filled as TVM builds.

    Attributes:
        toolchain: the compiler used.
        arch: architecture of the machine code.
        kernels: registers and memory of every kernel.
        sources: CUDA text of every module, for the dump folder; it is not in the library.
    """

    toolchain: Toolchain
    arch: str
    kernels: list[KernelResources] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)


@contextmanager
def machine_code(arch: str, toolchain: Toolchain | None = None) -> Iterator[Compilation]:
    """Inside this context TVM builds for CUDA give libraries with machine code for `arch` and no source text.

    Args:
        arch: real architecture, such as "sm_90".
        toolchain: None finds one.

    Raises:
        ResourceError: a compiler or library is missing; says how to get it.
        InternalError: the CUDA compiler refuses a kernel.
    """
    compilation = Compilation(toolchain or find_toolchain(), arch)
    load_runtime()
    import tvm_ffi

    failure: list[KbitcError] = []

    def compile_kernels(source: str) -> bytearray:
        try:
            cubin, kernels = compile_source(str(source), arch, compilation.toolchain)
        except KbitcError as error:
            failure.append(error)
            raise
        compilation.kernels.extend(kernels)
        compilation.sources.append(str(source))
        return bytearray(cubin)

    before = tvm_ffi.get_global_func(CALLBACK, allow_missing=True)
    tvm_ffi.register_global_func(CALLBACK, compile_kernels, override=True)
    try:
        yield compilation
    except Exception:
        # TVM turns what the callback raises into its own error type with a long stack.
        if failure:
            raise failure[0] from None
        raise
    finally:
        if before is None:
            tvm_ffi.registry.remove_global_func(CALLBACK)
        else:
            tvm_ffi.register_global_func(CALLBACK, before, override=True)


def load_runtime() -> None:
    """Load TVM's CUDA runtime library, with a stub driver where there is no driver. Idempotent.

    Raises:
        ResourceError: libcudart or the C compiler for the stub is missing, or TVM was built without CUDA.
    """
    _load_cudart()
    _load_driver()
    import tvm
    import tvm_ffi

    if tvm_ffi.get_global_func(CREATE, allow_missing=True) is not None:
        return
    library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    try:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ResourceError("TVM's CUDA runtime cannot be loaded", where=str(library), got=error) from None
    if tvm_ffi.get_global_func(CREATE, allow_missing=True) is None:
        raise ResourceError("this TVM has no CUDA runtime", remedy="pip install apache-tvm==0.27.0.post1")


def _load_cudart() -> None:
    if find_runtime() is None:
        raise ResourceError(f"{RUNTIME} is not here", remedy=INSTALL)


def _load_driver() -> None:
    try:
        ctypes.CDLL(DRIVER, ctypes.RTLD_GLOBAL)
    except OSError:
        with tempfile.TemporaryDirectory(prefix="kbitc-stub-") as folder:
            # The file may go once it is mapped: the loader finds a loaded library by its SONAME.
            ctypes.CDLL(str(build_stub(Path(folder))), ctypes.RTLD_GLOBAL)


def build_stub(folder: Path) -> Path:
    """Build a libcuda.so.1 whose functions all return CUDA_ERROR_NO_DEVICE.

    Raises:
        ResourceError: no C compiler.
    """
    source, library = folder / "stub.c", folder / DRIVER
    source.write_text("".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in STUB_SYMBOLS))
    command = [*c_compiler(), "-shared", "-fPIC", f"-Wl,-soname,{DRIVER}", "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise ResourceError("the C compiler cannot build the stub of the driver", got=done.stderr[-300:])
    return library


def c_compiler() -> list[str]:
    """Command of the C compiler of this machine.

    Raises:
        ResourceError: there is none.
    """
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    if machine.has_module("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise ResourceError("no C compiler", remedy="apt-get install gcc, or pip install ziglang")


def build_library(
    module: Any, target: Target, output: Path, fcompile: Callable[..., None] | None = None
) -> Compilation:
    """Build scheduled kernels, with the relax functions that call them, into a shared library with machine code.

    Args:
        module: tvm IRModule; relax functions must have been through the relax passes already.
        target: of kind "cuda".
        output: path of the library, ending in .so.
        fcompile: linker for `export_library`, None for the host's.

    Raises:
        ResourceError, InternalError: see `machine_code`.
    """
    with machine_code(target.arch) as compilation:
        import tvm
        from tvm import relax

        tvm_target = tvm.target.Target(target.tvm)
        with tvm_target:
            if any(isinstance(function, relax.Function) for function in module.functions.values()):
                built = relax.build(module, tvm_target, relax_pipeline=None)
            else:
                built = tvm.compile(module, target=tvm_target)
        built.export_library(str(output), **({"fcompile": fcompile} if fcompile else {}))
    return compilation
