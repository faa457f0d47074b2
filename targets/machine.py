"""What this machine is: processor, features, GPU and tools. Nothing here imports tvm; every answer is cached."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import platform
import shutil
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
TOPOLOGY = Path("/sys/devices/system/cpu")
_CUDA_LIBRARIES = ("libcuda.so.1", "libcuda.so")
_COMPUTE_CAPABILITY_MAJOR = 75  # CUdevice_attribute of the CUDA driver API
_COMPUTE_CAPABILITY_MINOR = 76


def architecture(machine: str | None = None) -> str:
    """The normal name of a processor architecture: "x86_64", "aarch64", or what the system says.

    Args:
        machine: the system's name for it; None asks this machine.
    """
    text = (platform.machine() if machine is None else machine).lower()
    return {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}.get(text, text)


@functools.cache
def cpu_features() -> frozenset[str]:
    """Instruction-set features of this processor, with the names of /proc/cpuinfo; empty when it cannot be read."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    return parse_cpuinfo(text)


def parse_cpuinfo(text: str) -> frozenset[str]:
    """Features that every processor listed in a /proc/cpuinfo text has ("flags" on x86, "Features" on ARM)."""
    sets = [
        frozenset(line.partition(":")[2].split())
        for line in text.splitlines()
        if line.partition(":")[0].strip() in ("flags", "Features")
    ]
    return frozenset.intersection(*sets) if sets else frozenset()


@functools.cache
def physical_cores() -> int:
    """Cores that this process may use; the hardware threads of one core count once."""
    processors = os.sched_getaffinity(0)
    siblings = set()
    for processor in processors:
        try:
            siblings.add((TOPOLOGY / f"cpu{processor}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(processors)
    return max(1, len(siblings))


@functools.cache
def cuda_capability() -> tuple[int, int] | str:
    """Compute capability of the first GPU as the driver says it, or the reason why there is none.

    Asks libcuda by ctypes: cuInit, cuDeviceGet, cuDeviceGetAttribute (CUDA driver API reference, 6.5 and 6.6).
    """
    driver = _load_first(_CUDA_LIBRARIES)
    if driver is None:
        return "the NVIDIA driver (libcuda.so.1) is not installed"
    if status := driver.cuInit(0):
        return f"the NVIDIA driver finds no usable GPU (cuInit says {status})"
    device, value = ctypes.c_int(), ctypes.c_int()
    if status := driver.cuDeviceGet(ctypes.byref(device), 0):
        return f"the NVIDIA driver finds no GPU (cuDeviceGet says {status})"
    parts = []
    for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR):
        if status := driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return f"the NVIDIA driver does not tell the GPU's compute capability (it says {status})"
        parts.append(value.value)
    return parts[0], parts[1]


def _load_first(names: tuple[str, ...]) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def tool(*names: str) -> str | None:
    """Path of the first of these programs that is installed, or None."""
    return next((path for name in names if (path := shutil.which(name))), None)


def has_module(name: str) -> bool:
    """Whether a Python module can be imported; it is not imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
