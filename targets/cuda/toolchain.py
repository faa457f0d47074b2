"""CUDA C++ text to machine code (cubin) with nvcc or NVRTC; neither needs a GPU or a driver.

Two choices fix the meaning of the kernels: no fast math (divisions and square roots round correctly, denormals stay),
and no dependence on the header files of the CUDA toolkit unless a kernel uses half precision.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kbitc.errors import InternalError, ResourceError

INSTALL = "pip install kbitc[cuda] (or nvidia-cuda-nvcc nvidia-cuda-runtime), or install the CUDA toolkit 13"
RUNTIME = "libcudart.so.13"  # what the pinned TVM wheel links against
FILE_NAME = "kbitc_kernels.cu"
TIMEOUT_SECONDS = 1800
_ROOTS = ("CUDA_HOME", "CUDA_PATH", "CUDA_ROOT")
_NVRTC_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")

# The head that TVM writes pulls in host headers; these names are all that generated kernels use of it.
_TVM_HEAD = re.compile(r"#ifdef __CUDACC_RTC__\n.*?\n#else\n.*?\n#endif\n", re.DOTALL)
HEAD = """\
#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#else
#include <stdint.h>
#endif
#define CUDART_INF_F __int_as_float(0x7f800000)
#define CUDART_NAN_F __int_as_float(0x7fffffff)
#define CUDART_INF __longlong_as_double(0x7ff0000000000000LL)
#define CUDART_NAN __longlong_as_double(0xfff8000000000000LL)
"""
_CONSTANTS = "#include <math_constants.h>\n"

_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class KernelResources:
    """What ptxas says of one kernel: registers per thread; shared, stack and spill memory in bytes."""

    name: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


@dataclass(frozen=True)
class Toolchain:
    """A compiler for kernels: kind "nvcc" or "nvrtc", its path, and its version such as "13.0"."""

    kind: str
    path: str
    version: str

    def __str__(self) -> str:
        return f"{self.kind} {self.version} ({self.path})"


def missing() -> str | None:
    """Why kernels cannot be compiled here; None when they can."""
    try:
        find_toolchain()
    except ResourceError as error:
        return error.message
    return None


@functools.cache
def find_toolchain() -> Toolchain:
    """nvcc (it also needs a host compiler for preprocessing), otherwise NVRTC.

    Looked for in PATH, CUDA_HOME, /usr/local/cuda and the pip packages.

    Raises:
        ResourceError: neither is here; says how to install one.
    """
    found = _find_nvcc() or _find_nvrtc()
    if found is None:
        raise ResourceError("no CUDA compiler: neither nvcc with a host compiler nor NVRTC is here", remedy=INSTALL)
    return found


def _find_nvcc() -> Toolchain | None:
    if shutil.which("gcc") is None:
        return None
    on_path = shutil.which("nvcc")
    candidates = [Path(on_path)] if on_path else []
    candidates += [root / "bin" / "nvcc" for root in toolkit_roots()]
    for path in candidates:
        if not os.access(path, os.X_OK):
            continue
        said = subprocess.run([str(path), "--version"], capture_output=True, text=True, timeout=60, check=False)
        if match := re.search(r"release (\d+\.\d+)", said.stdout):
            return Toolchain("nvcc", str(path), match[1])
    return None


def _find_nvrtc() -> Toolchain | None:
    folders = [root / folder for root in toolkit_roots() for folder in ("lib64", "lib")]
    places = [str(folder / name) for folder in folders for name in _NVRTC_NAMES]
    for place in [path for path in places if os.path.exists(path)] + list(_NVRTC_NAMES):
        try:
            library = ctypes.CDLL(place)
        except OSError:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0:
            return Toolchain("nvrtc", place, f"{major.value}.{minor.value}")
    return None


def toolkit_roots() -> list[Path]:
    """Folders with bin/, lib/ and include/ of a CUDA toolkit, best first; they need not exist."""
    roots = [Path(os.environ[name]) for name in _ROOTS if os.environ.get(name)]
    roots.append(Path("/usr/local/cuda"))
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        # pip packages for CUDA 13 share one folder; those for CUDA 12 have one each.
        roots += [Path(folder) / name for name in ("cu13", "cuda_nvcc", "cuda_nvrtc", "cuda_runtime")]
    return roots


def find_runtime() -> str | None:
    """Name or path by which the CUDA runtime library can be loaded; None when it is not here."""
    folders = [root / folder for root in toolkit_roots() for folder in ("lib64", "lib")]
    for candidate in (RUNTIME, *(str(folder / RUNTIME) for folder in folders if (folder / RUNTIME).exists())):
        try:
            ctypes.CDLL(candidate, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return candidate
    return None


def prepare(source: str) -> str:
    """The text that is compiled: TVM's head of host headers replaced by `HEAD`."""
    return HEAD + _TVM_HEAD.sub("", source, count=1).replace(_CONSTANTS, "")


def compile_source(
    source: str, arch: str, toolchain: Toolchain | None = None
) -> tuple[bytes, tuple[KernelResources, ...]]:
    """Compile CUDA C++ to a cubin for one architecture; equal text gives equal bytes.

    Args:
        source: CUDA C++ as TVM writes it.
        arch: real architecture, such as "sm_90".
        toolchain: None finds one.

    Returns:
        The cubin (an ELF image) and what each kernel needs.

    Raises:
        ResourceError: no compiler here.
        InternalError: the compiler refuses the text.
    """
    tool = toolchain or find_toolchain()
    run = _run_nvcc if tool.kind == "nvcc" else _run_nvrtc
    cubin, log = run(prepare(source), arch, tool)
    if cubin[:4] != b"\x7fELF":
        raise InternalError("the CUDA compiler gave no machine code", where=str(tool), got=cubin[:8])
    return cubin, parse_resources(log)


def _run_nvcc(text: str, arch: str, tool: Toolchain) -> tuple[bytes, str]:
    with tempfile.TemporaryDirectory(prefix="kbitc-cuda-") as folder:
        Path(folder, FILE_NAME).write_text(text, encoding="utf-8")
        command = [tool.path, "-cubin", f"-arch={arch}", "-std=c++17", "-O3", "-Xptxas", "-v"]
        command += ["-o", "kernels.cubin", FILE_NAME]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
        log = done.stdout + done.stderr
        if done.returncode:
            raise InternalError("nvcc refuses the generated kernels", where=arch, got=_first_error(log))
        return Path(folder, "kernels.cubin").read_bytes(), log


def _run_nvrtc(text: str, arch: str, tool: Toolchain) -> tuple[bytes, str]:
    """NVRTC by ctypes (NVRTC documentation, section 3): create, compile, read the log and the cubin."""
    for builtins in sorted(Path(tool.path).parent.glob("libnvrtc-builtins.so*")):
        # NVRTC opens it by name, which succeeds outside the linker's path only when it is loaded already.
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(tool.path)
    options = [f"--gpu-architecture={arch}", "--std=c++17", "--device-int128", "--ptxas-options=-v"]
    options += [f"-I{root / 'include'}" for root in toolkit_roots() if (root / "include").is_dir()]
    encoded = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    program = ctypes.c_void_p()
    status = library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), FILE_NAME.encode(), 0, None, None)
    if status:
        raise InternalError("NVRTC cannot start", where=str(tool), got=status)
    try:
        status = library.nvrtcCompileProgram(program, len(options), encoded)
        log = _nvrtc_bytes(library, program, "ProgramLog").decode("utf-8", "replace")
        if status:
            raise InternalError("NVRTC refuses the generated kernels", where=arch, got=_first_error(log))
        return _nvrtc_bytes(library, program, "CUBIN"), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc_bytes(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def _first_error(log: str) -> str:
    lines = [line for line in log.splitlines() if "error" in line]
    return lines[0] if lines else log[-300:]


def parse_resources(log: str) -> tuple[KernelResources, ...]:
    """Read the text that ``ptxas -v`` writes, one entry a kernel."""
    found: list[KernelResources] = []
    name, stack, spill = "", 0, 0
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            name, stack, spill = match[1], 0, 0
        elif match := _SPILLS.search(line):
            stack, spill = int(match[1]), int(match[2]) + int(match[3])
        elif name and (match := _USED.search(line)):
            shared = _SHARED.search(line)
            found.append(KernelResources(name, int(match[1]), int(shared[1]) if shared else 0, stack, spill))
            name = ""
    return tuple(found)
