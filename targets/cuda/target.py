"""NVIDIA GPUs. The library holds machine code of one architecture, so it runs on GPUs of that major version."""

from __future__ import annotations

from kbitc.targets import machine
from kbitc.targets.target import Requirement, Target

VARIANTS = ("sm_80", "sm_90")
HOST_TRIPLE = "x86_64-linux-gnu"
WARP = 32


def bundled_features() -> tuple[tuple[str, ...], ...]:
    """The GPU at hand where there is one that a variant serves, otherwise ``sm_80``."""
    found = machine.cuda_capability()
    if isinstance(found, str):
        return (("sm_80",),)
    here = 10 * found[0] + found[1]
    fitting = [name for name in VARIANTS if int(name[3:]) // 10 == found[0] and int(name[3:]) <= here]
    return ((fitting[-1] if fitting else "sm_80",),)


def declare(features: tuple[str, ...]) -> Target:
    """The target of one architecture; with several names the newest counts."""
    arch = max(features)
    fields = (
        ("kind", "cuda"),
        ("arch", arch),
        ("max_threads_per_block", 1024),
        ("max_num_threads", 1024),
        ("max_shared_memory_per_block", 49152),
        ("thread_warp_size", WARP),
        # The host side only launches kernels: the baseline of x86-64 serves every host.
        ("host", (("kind", "llvm"), ("mtriple", HOST_TRIPLE), ("mcpu", "x86-64"))),
    )
    return Target(
        name=f"cuda:{arch}",
        kind="cuda",
        features=(arch,),
        machine="x86_64",
        triple=HOST_TRIPLE,
        device="cuda",
        cpu_features=(),
        tvm_fields=fields,
        vector_bytes=4 * WARP,
        lanes=WARP,
        dot="dp4a",
        registers=255,
        arch=arch,
    )


def requirements(target: Target) -> list[Requirement]:
    """A CUDA compiler, the CUDA runtime that TVM's library links against, and a linker for the host side."""
    # Imported here: the search for tools is not needed to declare a target.
    from kbitc.targets.cuda import toolchain

    compiler = toolchain.missing() is None
    runtime = toolchain.find_runtime() is not None
    linker = machine.tool("g++", "c++", "clang++") is not None or machine.has_module("ziglang")
    return [
        Requirement("nvcc (or NVRTC)", compiler, toolchain.INSTALL),
        Requirement(toolchain.RUNTIME, runtime, toolchain.INSTALL),
        Requirement("g++ (or zig)", linker, "apt-get install g++, or pip install ziglang"),
    ]
