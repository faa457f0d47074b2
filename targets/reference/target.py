"""The reference target: plain loops for this machine's baseline instruction set. Slow, always right."""

from __future__ import annotations

from kbitc.targets import machine
from kbitc.targets.target import Requirement, Target

VARIANTS: tuple[str, ...] = ()
BASELINE = {"x86_64": "x86-64", "aarch64": "generic"}


def bundled_features() -> tuple[tuple[str, ...], ...]:
    """The reference target has no variants."""
    return ((),)


def declare(features: tuple[str, ...]) -> Target:
    """The reference target of this machine's architecture."""
    here = machine.architecture()
    triple = f"{here}-linux-gnu"
    return Target(
        name="reference",
        kind="reference",
        features=(),
        machine=here,
        triple=triple,
        device="cpu",
        cpu_features=(),
        tvm_fields=(("kind", "llvm"), ("mtriple", triple), ("mcpu", BASELINE.get(here, "generic"))),
        vector_bytes=16,
        lanes=4,
        dot="",
        registers=16,
    )


def requirements(target: Target) -> list[Requirement]:
    """A C++ compiler that links for this machine."""
    present = machine.tool("g++", "c++", "clang++") is not None or machine.has_module("ziglang")
    return [Requirement("g++ (or zig)", present, "apt-get install g++, or pip install ziglang")]
