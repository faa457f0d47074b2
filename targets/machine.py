"""What this machine is: processor, features, GPU and tools. Nothing here imports tvm; every answer is cached."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
TOPOLOGY = Path("/sys/devices/system/cpu")
_CUDA_LIBRARIES = ("libcuda.so.1", "libcuda.so")
# Registers that the operating system has to save (XCR0) -> the feature that needs them first, as (leaf, register, bit)
# of `__x86_get_cpuid_feature_leaf` (glibc manual, "X86"), and the names of all features that do.
_SAVED = (
    ((0, 2, 28), re.compile(r"avx.*|fma|f16c|vaes|vpclmulqdq")),
    ((1, 1, 16), re.compile(r"avx512.*")),
    ((1, 3, 24), re.compile(r"amx.*")),
)
# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA) of x86-64 Linux.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18
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
    """Instruction-set features that programs may use here, with the names of /proc/cpuinfo; empty without that file.

    A feature of the processor whose registers the operating system does not save is left out.
    """
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    return usable(parse_cpuinfo(text), active_leaf)


def usable(features: frozenset[str], leaf: Callable[[int], tuple[int, ...] | None]) -> frozenset[str]:
    """The features without those whose registers are not saved.

    Args:
        features: names of /proc/cpuinfo.
        leaf: as `active_leaf`.
    """
    for (number, register, bit), names in _SAVED:
        bits = leaf(number)
        if bits is not None and not bits[register] >> bit & 1:
            features = frozenset(name for name in features if not names.fullmatch(name))
    return features


def active_leaf(number: int) -> tuple[int, ...] | None:
    """EAX, EBX, ECX, EDX of a CPUID leaf (0: leaf 1, 1: leaf 7) with only the features that XCR0 lets programs use.

    None where the C library does not tell (glibc before 2.33, other libraries, other processors).
    """
    ask = getattr(ctypes.CDLL(None), "__x86_get_cpuid_feature_leaf", None)
    if ask is None:
        return None
    ask.restype = ctypes.POINTER(ctypes.c_uint32 * 8)  # struct cpuid_feature: cpuid_array[4], active_array[4]
    return tuple(ask(number).contents[4:])


def parse_cpuinfo(text: str) -> frozenset[str]:
    """Features that every processor listed in a /proc/cpuinfo text has ("flags" on x86, "Features" on ARM)."""
    sets = [
        frozenset(line.partition(":")[2].split())
        for line in text.splitlines()
        if line.partition(":")[0].strip() in ("flags", "Features")
    ]
    return frozenset.intersection(*sets) if sets else frozenset()


@functools.cache
def processor() -> str:
    """Vendor, family and model of the processor, as "AuthenticAMD 25 17"; empty where /proc/cpuinfo has none."""
    try:
        return parse_processor(CPUINFO.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""


def parse_processor(text: str) -> str:
    """As `processor`, of the first processor of a /proc/cpuinfo text (of ARM implementer, variant and part)."""
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    found = {name.strip(): value.strip() for name, _, value in lines}
    for names in (("vendor_id", "cpu family", "model"), ("CPU implementer", "CPU variant", "CPU part")):
        if all(found.get(name) for name in names):
            return " ".join(found[name] for name in names)
    return ""


@functools.cache
def may_use_tiles() -> bool:
    """Whether programs may use AMX tiles here; asks for this process, once. Only where the processor has them.

    Linux saves the tiles of a thread only for processes that ask (Documentation/arch/x86/xstate.rst).
    """
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


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
