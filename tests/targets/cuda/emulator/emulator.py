"""Run CUDA kernels without a GPU: the CUDA C++ that TVM writes is compiled for this processor, and TVM's own CUDA
runtime launches it through an emulated driver (driver.cc). What runs is the text that nvcc gets, with the launch
sizes and arguments that the host code computes; index and alignment errors are caught by the compiler's checks,
overruns of a buffer by guard pages, reads of unwritten memory show as NaN, races by running threads backwards.

Integers are exact. Floats may differ from a GPU in the last bit where nvcc fuses a multiplication with an addition.

The emulator replaces libcuda in the process, so it lives in a process of its own: `Emulator.run(function, ...)`.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

R = TypeVar("R")
HERE = Path(__file__).parent
IMAGE = "KBITC-EMULATED "
CHECKS = "bounds,alignment,shift,integer-divide-by-zero,null"
OPTIONS = ("-std=c++20", "-O1", "-fno-strict-aliasing", "-ffp-contract=off", "-fPIC", "-shared", "-w")
_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(([^)]*)\)\s*\{')
_MEETS = re.compile(r"__sync|__shfl|kbitc_mma")
_HEAD_END = "#define ushort unsigned short\n#endif\n"
_compiled = 0


def lacks() -> str | None:
    """Why the emulator cannot run here; None when it can."""
    if platform.machine() != "x86_64":
        return "the CUDA emulator switches fibers with x86-64 instructions"
    if shutil.which("g++") is None:
        return "the CUDA emulator needs g++"
    return None


class Emulator:
    """A process with the emulated device; it is started again after a crash."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kbitc-emulator-")
        build_driver(Path(self._folder.name))
        self._pool: ProcessPoolExecutor | None = None

    def run(self, function: Callable[..., R], *arguments: Any) -> R:
        """Call a module-level function in the emulator's process."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, context, _start, (self._folder.name,))
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            self.close()
            raise AssertionError("the emulated kernel crashed: see standard error") from None

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def build_driver(folder: Path) -> None:
    """Build the emulated libcudart.so.13 (with everything) and an empty libcuda.so.1 that leads to it."""
    script = folder / "versions"
    script.write_text("libcudart.so.13 { global: cuda*; };\n")
    runtime = folder / "libcudart.so.13"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", f"-I{HERE}"]
    _call(["g++", *flags, "-Wl,-soname,libcudart.so.13", f"-Wl,--version-script={script}",
           "-o", str(runtime), str(HERE / "driver.cc"), "-ldl"])  # fmt: skip
    _call(["g++", "-shared", "-fPIC", "-Wl,--no-as-needed", "-Wl,-soname,libcuda.so.1", "-o",
           str(folder / "libcuda.so.1"), str(runtime)])  # fmt: skip


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:6000]}")


def _start(folder: str) -> None:
    for name in ("libcudart.so.13", "libcuda.so.1"):
        ctypes.CDLL(str(Path(folder, name)), ctypes.RTLD_GLOBAL)
    import tvm
    import tvm_ffi

    library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    assert tvm.cuda(0).exist
    install(tvm_ffi, folder)


def install(tvm_ffi: Any, folder: str) -> None:
    """Make every CUDA build of this process an emulated one."""
    from kbitc.targets.cuda import compile as cuda_compile
    from kbitc.targets.cuda.toolchain import Toolchain

    def compile_source(source: str, arch: str, toolchain: object = None) -> tuple[bytes, tuple[()]]:
        return compile_kernels(str(source), Path(folder)), ()

    def compile_kernels_of(source: str) -> bytearray:
        return bytearray(compile_kernels(str(source), Path(folder)))

    cuda_compile.compile_source = compile_source  # type: ignore[assignment]
    cuda_compile.find_toolchain = lambda: Toolchain("emulator", "g++", "")  # type: ignore[assignment]
    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compile_kernels_of, override=True)


def translate(source: str) -> str:
    """Host C++ for a module of kernels: the same text, with an entry for each kernel that reads its arguments."""
    body = source.split(_HEAD_END)[-1].replace("__shared__ alignas(64)", "alignas(64) __shared__")
    parts = ['#include "device.h"\n', body]
    found = list(_KERNEL.finditer(body))
    for index, match in enumerate(found):
        end = found[index + 1].start() if index + 1 < len(found) else len(body)
        meets = "true" if _MEETS.search(body[match.end() : end]) else "false"
        types = [part.strip().rsplit(" ", 1)[0].replace("__restrict__", "") for part in match[2].split(",")]
        values = ", ".join(f"*({kind}*)arguments[{i}]" for i, kind in enumerate(types))
        parts.append(f'extern "C" void kb_call_{match[1]}(void** arguments) {{ {match[1]}({values}); }}\n')
        parts.append(f'extern "C" const bool kb_meets_{match[1]} = {meets};\n')
    parts.append('extern "C" char __start_kb_shared[] __attribute__((weak, visibility("hidden")));\n')
    parts.append('extern "C" char __stop_kb_shared[] __attribute__((weak, visibility("hidden")));\n')
    parts.append('extern "C" char* const kb_shared_range[2] = {__start_kb_shared, __stop_kb_shared};\n')
    return "".join(parts).replace('extern "C" const', 'extern "C" __attribute__((visibility("default"))) const')


def compile_kernels(source: str, folder: Path) -> bytes:
    """Compile a module of kernels for this processor; gives the image that the emulated driver loads."""
    global _compiled
    _compiled += 1
    text, library = folder / f"k{os.getpid()}_{_compiled}.cc", folder / f"k{os.getpid()}_{_compiled}.so"
    text.write_text(translate(source))
    checks = [f"-fsanitize={CHECKS}", "-fno-sanitize-recover"]
    _call(["g++", *OPTIONS, *checks, f"-I{HERE}", "-o", str(library), str(text)])
    return (IMAGE + str(library)).encode() + b"\0"


def launch(
    functions: dict[str, Any], calls: list[tuple[str, list[npt.NDArray[Any]]]], target: dict[str, Any]
) -> list[list[npt.NDArray[Any]]]:
    """In the emulator's process: build prim funcs, call them in order, return every argument as it is afterwards.

    Args:
        functions: name -> scheduled prim func.
        calls: function name and its arguments, inputs and outputs, as the prim func takes them.
        target: dict for `tvm.target.Target`.
    """
    import tvm

    tvm_target = tvm.target.Target(target)
    module = tvm.IRModule({name: function.with_attr("global_symbol", name) for name, function in functions.items()})
    with tvm_target:
        built = tvm.compile(module, target=tvm_target)
    results = []
    for name, arrays in calls:
        tensors = [tvm.runtime.tensor(np.array(array, order="C"), device=tvm.cuda(0)) for array in arrays]
        built[name](*tensors)
        results.append([tensor.numpy() for tensor in tensors])
    return results
