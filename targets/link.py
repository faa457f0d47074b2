"""From object files to a shared library, for this machine or another: a system compiler, or the one in ziglang."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kbitc.errors import InternalError, ResourceError
from kbitc.targets import machine
from kbitc.targets.target import Target

TIMEOUT_SECONDS = 900
GLIBC = "2.28"  # the oldest C library that TVM's own runtime wheels support (manylinux_2_28)
NATIVE_COMPILERS = ("g++", "c++", "clang++")
CROSS_COMPILERS = {"aarch64": "aarch64-linux-gnu-g++", "x86_64": "x86_64-linux-gnu-g++"}
PACKAGES = {"aarch64": "g++-aarch64-linux-gnu", "x86_64": "g++-x86-64-linux-gnu"}
# No build id: its hash covers the names of temporary files with some linkers.
_LINK_OPTIONS = ("-shared", "-fPIC", "-Wl,--build-id=none", "-Wl,--as-needed")


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler and linker for one architecture.

    Attributes:
        command: program and leading arguments.
        machine: "x86_64" or "aarch64".
        name: short name, part of cache keys.
    """

    command: tuple[str, ...]
    machine: str
    name: str

    def run(self, arguments: Sequence[str | Path], what: str) -> None:
        """Run it.

        Args:
            arguments: what follows the program.
            what: what is being made, for the error message.

        Raises:
            ResourceError: when it cannot be started or takes too long.
            InternalError: when it fails.
        """
        command = [*self.command, *map(str, arguments)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ResourceError(f"{self.name} could not make {what}", got=str(error)) from error
        if done.returncode != 0:
            raise InternalError(
                f"{self.name} could not make {what}", got=_first_error(done.stderr), remedy=" ".join(command)[:400]
            )


def _first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "no message")[:300]


def find_compiler(architecture: str, *, prefer_zig: bool = False) -> Compiler:
    """The compiler for an architecture: the system's, otherwise ziglang's.

    Args:
        architecture: "x86_64" or "aarch64".
        prefer_zig: take ziglang's when it is installed (its result runs on every glibc since 2.28).

    Raises:
        ResourceError: when there is none; names the command that installs one.
    """
    native = architecture == machine.architecture()
    names = NATIVE_COMPILERS if native else (CROSS_COMPILERS.get(architecture, ""),)
    system = machine.tool(*filter(None, names))
    zig = machine.has_module("ziglang")
    if system is not None and not (prefer_zig and zig):
        return Compiler((system,), architecture, Path(system).name)
    if zig:
        command = (sys.executable, "-m", "ziglang", "c++", "-target", f"{architecture}-linux-gnu.{GLIBC}")
        return Compiler(command, architecture, f"zig-{architecture}")
    package = "g++" if native else PACKAGES.get(architecture, f"a cross compiler for {architecture}")
    raise ResourceError(
        f"no C++ compiler that links for {architecture} is installed",
        got=f"none of {', '.join(names)}",
        remedy=f"apt-get install {package}, or pip install ziglang",
    )


def link_shared(output: str | Path, objects: Sequence[str | Path], architecture: str) -> None:
    """Link object files into a shared library.

    Args:
        output: the library to write.
        objects: object files and archives, in order.
        architecture: "x86_64" or "aarch64".

    Raises:
        ResourceError: when there is no linker.
        InternalError: when linking fails.
    """
    compiler = find_compiler(architecture)
    compiler.run([*_LINK_OPTIONS, "-o", output, *objects, "-lm"], "a shared library")


def linker(target: Target) -> Callable[..., None]:
    """What `export_library(fcompile=...)` of TVM takes, for a target."""

    def link(output: str, objects: Sequence[str], options: Sequence[str] | None = None, **ignored: Any) -> None:
        link_shared(output, [*objects, *(options or [])], target.machine)

    return link


def export_library(executable: Any, target: Target) -> bytes:
    """The shared library of a compiled relax executable or module.

    Args:
        executable: what `tvm.compile` or `relax.build` gave.
        target: what it was compiled for.

    Returns:
        The bytes of module.so; equal inputs give equal bytes.

    Raises:
        ResourceError: when no linker for the target is installed.
    """
    find_compiler(target.machine)
    with tempfile.TemporaryDirectory(prefix="kbitc-link-") as folder:
        path = Path(folder) / "module.so"
        executable.export_library(str(path), fcompile=linker(target))
        return path.read_bytes()
