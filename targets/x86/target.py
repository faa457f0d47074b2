"""x86-64 with AVX2, with AVX-VNNI, with AVX-512 and VNNI, with VBMI too, or with AMX tiles of int8 beside these.

All integer paths give exact int32 sums: `vpmaddubsw` is used only where it cannot saturate.
"""

from __future__ import annotations

from kbitc.targets import machine
from kbitc.targets.target import Requirement, Target

VARIANTS = ("avx2", "avxvnni", "avx512vnni", "avx512vbmi", "amx")
TRIPLE = "x86_64-linux-gnu"
# What LLVM may use for -mcpu=haswell and -mcpu=cascadelake, with the names of /proc/cpuinfo.
AVX2 = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "popcnt")
# Alder Lake, Zen 5 and later.
AVXVNNI = (*AVX2, "avx_vnni")
AVX512VNNI = (*AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni")
# Ice Lake, Zen 4 and later.
AVX512VBMI = (*AVX512VNNI, "avx512vbmi")
# Sapphire Rapids and later.
AMX = (*AVX512VBMI, "amx_int8", "amx_tile")
CPU_FEATURES = dict(zip(VARIANTS, (AVX2, AVXVNNI, AVX512VNNI, AVX512VBMI, AMX), strict=True))
# What LLVM may use beyond haswell or cascadelake.
MORE = {"avxvnni": ("+avxvnni",), "avx512vbmi": ("+avx512vbmi",), "amx": ("+avx512vbmi", "+amx-tile", "+amx-int8")}


def bundled_features() -> tuple[tuple[str, ...], ...]:
    """Plain ``x86`` is every variant, from the one that all x86-64 processors since 2015 run."""
    return tuple((variant,) for variant in VARIANTS)


def declare(features: tuple[str, ...]) -> Target:
    """The target of a variant; with several names the widest counts."""
    variant = max(features, key=VARIANTS.index)
    wide = variant not in ("avx2", "avxvnni")
    # Explicit mcpu: "native" would make the library depend on the machine that built it.
    fields = (("kind", "llvm"), ("mtriple", TRIPLE), ("mcpu", "cascadelake" if wide else "haswell"))
    return Target(
        name=f"x86:{variant}",
        kind="x86",
        features=("avx512vbmi", "amx") if variant == "amx" else (variant,),
        machine="x86_64",
        triple=TRIPLE,
        device="cpu",
        cpu_features=CPU_FEATURES[variant],
        tvm_fields=(*fields, ("mattr", MORE[variant])) if variant in MORE else fields,
        vector_bytes=64 if wide else 32,
        lanes=16 if wide else 8,
        dot="vpdpbusd" if wide else "vpmaddwd" if variant == "avx2" else "vpdpbusd_ymm",
        registers=32 if wide else 16,
    )


def requirements(target: Target) -> list[Requirement]:
    """A C++ compiler that links for x86-64."""
    native = machine.architecture() == "x86_64"
    names = ("g++", "c++", "clang++") if native else ("x86_64-linux-gnu-g++",)
    package = "g++" if native else "g++-x86-64-linux-gnu"
    present = machine.tool(*names) is not None or machine.has_module("ziglang")
    return [Requirement(f"{names[0]} (or zig)", present, f"apt-get install {package}, or pip install ziglang")]
