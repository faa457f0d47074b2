"""AMX for tests: the processor's own where there is one, else `amx_emulator.c`, which runs the same machine code."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from kbitc.targets import machine
from kbitc.targets.target import host_runs, parse_target

AMX = "x86:amx"
SOURCE = Path(__file__).with_name("amx_emulator.c")


@dataclass(frozen=True)
class Counts:
    """AMX instructions that the emulator has run."""

    configure: int = 0
    release: int = 0
    zero: int = 0
    load: int = 0
    store: int = 0
    dot: int = 0
    store_config: int = 0

    def since(self, before: Counts) -> Counts:
        """What was run after `before`."""
        return Counts(*(now - then for now, then in zip(vars(self).values(), vars(before).values(), strict=True)))


class Emulator:
    """The installed emulator: SIGILL belongs to it from now on."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        if library.amx_install():
            raise OSError("SIGILL cannot be handled")

    def configured_threads(self) -> int:
        """Threads that left their tiles configured."""
        return int(self._library.amx_configured_threads())

    def counts(self) -> Counts:
        """Instructions since it was installed."""
        values = (ctypes.c_uint64 * len(vars(Counts())))()
        self._library.amx_counts(values)
        return Counts(*values)


@cache
def library() -> Path:
    """The emulator as a shared library, built once a session."""
    compiler = machine.tool("gcc", "cc", "clang")
    if compiler is None:
        pytest.skip("no C compiler for the AMX emulator")
    path = Path(tempfile.mkdtemp(prefix="amx")) / "amx_emulator.so"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(path), str(SOURCE)], check=True, capture_output=True, timeout=60)
    return path


@cache
def emulator() -> Emulator | None:
    """Make x86:amx run in this process: None where the processor does it; skips where neither can."""
    if host_runs(parse_target(AMX)) is None:
        return None
    if reason := host_runs(parse_target("x86:avx512vbmi")):
        pytest.skip(reason)
    return Emulator(ctypes.CDLL(str(library())))


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this machine say that it has AMX, with the emulator for what it has not."""
    if emulator() is None:
        return
    features = machine.cpu_features() | set(parse_target(AMX).cpu_features)
    monkeypatch.setattr(machine, "cpu_features", lambda: features)
    monkeypatch.setattr(machine, "may_use_tiles", lambda: True)
