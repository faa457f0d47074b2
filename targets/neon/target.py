"""64-bit ARM with NEON and the dot product extension, optionally with int8 matrix multiplication (i8mm)."""

from __future__ import annotations

from kbitc.targets import machine
from kbitc.targets.target import Requirement, Target

VARIANTS = ("dotprod", "i8mm")
TRIPLE = "aarch64-linux-gnu"
# What LLVM may use for -mcpu=cortex-a76 (ARMv8.2-A), with the names of /proc/cpuinfo.
DOTPROD = ("asimd", "asimddp", "asimdhp", "asimdrdm", "atomics", "crc32", "fphp")


def bundled_features() -> tuple[tuple[str, ...], ...]:
    """Plain ``arm-neon`` is the variant of every 64-bit ARM core since 2018 (Cortex-A76, Neoverse N1)."""
    return (("dotprod",),)


def declare(features: tuple[str, ...]) -> Target:
    """The target of a set of features; i8mm includes dotprod."""
    matrix = "i8mm" in features
    named = ("dotprod", "i8mm") if matrix else ("dotprod",)
    attributes = ("+neon", "+dotprod", "+i8mm") if matrix else ("+neon", "+dotprod")
    return Target(
        name="arm-neon:" + ",".join(named),
        kind="arm-neon",
        features=named,
        machine="aarch64",
        triple=TRIPLE,
        device="cpu",
        cpu_features=(*DOTPROD, "i8mm") if matrix else DOTPROD,
        # cortex-a76 with +i8mm rather than neoverse-v1, which would bring SVE into plain loops.
        tvm_fields=(("kind", "llvm"), ("mtriple", TRIPLE), ("mcpu", "cortex-a76"), ("mattr", attributes)),
        vector_bytes=16,
        lanes=4,
        dot="sdot",
        registers=32,
    )


def requirements(target: Target) -> list[Requirement]:
    """A compiler that links for aarch64; qemu only for trying the result on another machine."""
    native = machine.architecture() == "aarch64"
    names = ("g++", "c++", "clang++") if native else ("aarch64-linux-gnu-g++",)
    package = "g++" if native else "g++-aarch64-linux-gnu"
    present = machine.tool(*names) is not None or machine.has_module("ziglang")
    needed = [Requirement(f"{names[0]} (or zig)", present, f"apt-get install {package}, or pip install ziglang")]
    if not native:
        emulator = machine.tool("qemu-aarch64", "qemu-aarch64-static") is not None
        needed.append(Requirement("qemu-aarch64", emulator, "apt-get install qemu-user", purpose="run"))
    return needed
