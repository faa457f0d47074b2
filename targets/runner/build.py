"""Builds kbitc-run for a machine and keeps it in the cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from kbitc.errors import ResourceError
from kbitc.targets.link import Compiler, find_compiler
from kbitc.targets.runner.libraries import MEMBERS, cache_folder, find_libraries, include_folder, installed_version

RUNNER = "kbitc-run"
SOURCES = Path(__file__).parent
OPTIONS = ("-std=c++17", "-O2", "-s", "-Wl,--build-id=none")
# Linked although nothing names their symbols: the libraries register the virtual machine when they are loaded.
LIBRARIES = ("-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_ffi", "-Wl,--as-needed", "-ldl", "-lpthread")
# The runner is old-glibc friendly and self-contained: TVM's libraries bring their own needs.
STATIC = ("-static-libstdc++", "-static-libgcc")


def runner_folder(architecture: str, *, prefer_zig: bool = True) -> Path:
    """A folder with kbitc-run and, in lib/, the runtime libraries for an architecture; built when it is not cached.

    Args:
        architecture: "x86_64" or "aarch64".
        prefer_zig: build with ziglang's compiler where it is installed, so that old systems run the result.

    Raises:
        ResourceError: when a compiler, header or library is missing; names what installs it.
        InternalError: when the runner does not compile.
    """
    compiler = find_compiler(architecture, prefer_zig=prefer_zig)
    libraries = find_libraries(architecture, tuple(MEMBERS))
    folder = cache_folder() / "runner" / f"{architecture}-{_key(compiler, libraries)}"
    if not (folder / RUNNER).is_file():
        _build(compiler, libraries, folder)
    return folder


def _key(compiler: Compiler, libraries: dict[str, Path]) -> str:
    """What the result depends on: sources, options, compiler, and the versions of the runtime."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cc")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for text in (*OPTIONS, *LIBRARIES, *STATIC, *compiler.command[1:], compiler.name):
        digest.update(text.encode() + b"\0")
    for name, path in sorted(libraries.items()):
        digest.update(f"{name} {path.stat().st_size}".encode())
    digest.update(f"{installed_version('apache-tvm')} {installed_version('apache-tvm-ffi')}".encode())
    return digest.hexdigest()[:16]


def _build(compiler: Compiler, libraries: dict[str, Path], folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=".build-", dir=folder.parent))
    except OSError as error:
        raise ResourceError("cannot write to the cache", where=str(folder.parent), got=error.strerror) from error
    try:
        (place / "lib").mkdir()
        for name, path in libraries.items():
            shutil.copyfile(path, place / "lib" / name)
        version = installed_version("apache-tvm")
        compiler.run(
            [
                *OPTIONS,
                f'-DKBITC_TVM_VERSION="{version}"',
                *("-isystem", include_folder(), SOURCES / "main.cc", "-o", place / RUNNER, f"-L{place / 'lib'}"),
                *LIBRARIES,
                *(() if compiler.name.startswith("zig") else STATIC),
                "-Wl,-rpath,$ORIGIN/lib",
                # TVM's libraries may want newer or older symbols of the C library than the compiler's own.
                "-Wl,--allow-shlib-undefined",
            ],
            f"{RUNNER} for {compiler.machine}",
        )
        place.chmod(0o755)
        _publish(place, folder)
    except OSError as error:
        raise ResourceError("cannot write to the cache", where=str(folder.parent), got=error.strerror) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _publish(place: Path, folder: Path) -> None:
    """Rename the finished folder into place; another process that was faster wins."""
    try:
        os.rename(place, folder)
    except OSError:
        if not (folder / RUNNER).is_file():
            raise
