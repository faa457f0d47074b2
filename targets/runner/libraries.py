"""The runtime libraries of TVM for this machine and for others.

This machine's lie in the installed packages. Those of another architecture come from the wheels of the same versions
on the package index and are kept in the cache.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

from kbitc.errors import ResourceError
from kbitc.targets import machine

RUNTIME = "libtvm_runtime.so"
RUNTIME_CUDA = "libtvm_runtime_cuda.so"
FFI = "libtvm_ffi.so"
CUDART = "libcudart.so.13"  # what libtvm_runtime_cuda.so of the pinned wheel links against
PACKAGES = ("apache-tvm", "apache-tvm-ffi")
# Where the libraries lie in the wheels, and in the installed packages.
MEMBERS = {RUNTIME: "tvm/lib", RUNTIME_CUDA: "tvm/lib", FFI: "tvm_ffi/lib"}
TIMEOUT_SECONDS = 900


def cache_folder() -> Path:
    """Where kbitc keeps what it builds or downloads: $XDG_CACHE_HOME/kbitc or ~/.cache/kbitc."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "kbitc"


def installed_version(package: str) -> str:
    """Version of an installed package.

    Raises:
        ResourceError: when it is not installed.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise ResourceError(f"{package} is not installed", remedy=f"pip install {package}") from error


def include_folder() -> Path:
    """The C++ headers of tvm_ffi in the installed package.

    Raises:
        ResourceError: when they are missing.
    """
    folder = _package_folder("tvm_ffi") / "include"
    if not (folder / "tvm/ffi/function.h").is_file():
        raise ResourceError("the headers of tvm_ffi are missing", where=str(folder), remedy="reinstall apache-tvm-ffi")
    return folder


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ResourceError(f"the package {name} is not installed", remedy="pip install apache-tvm apache-tvm-ffi")
    return Path(next(iter(spec.submodule_search_locations)))


def find_libraries(architecture: str, names: tuple[str, ...] = (RUNTIME, FFI)) -> dict[str, Path]:
    """Runtime libraries for an architecture: from the installed packages, the cache, or the package index.

    Args:
        architecture: "x86_64" or "aarch64".
        names: some of RUNTIME, RUNTIME_CUDA, FFI.

    Returns:
        Name -> file.

    Raises:
        ResourceError: when they are not here and cannot be downloaded.
    """
    if architecture == machine.architecture():
        found = {name: _package_folder(MEMBERS[name].split("/")[0]) / "lib" / name for name in names}
    else:
        folder = foreign_folder(architecture)
        if not all((folder / name).is_file() for name in MEMBERS):
            download(architecture, folder)
        found = {name: folder / name for name in names}
    if missing := [str(path) for path in found.values() if not path.is_file()]:
        raise ResourceError("a runtime library is missing", where=missing[0], remedy="reinstall apache-tvm")
    return found


def foreign_folder(architecture: str) -> Path:
    """The cache folder of another architecture's libraries, one for each pair of versions."""
    versions = "-".join(installed_version(package) for package in PACKAGES)
    return cache_folder() / "runtimes" / f"{versions}-{architecture}"


def download(architecture: str, folder: Path) -> None:
    """Take the libraries out of the wheels of the installed versions for another architecture.

    Args:
        architecture: such as "aarch64".
        folder: where the libraries go; made complete or not at all.

    Raises:
        ResourceError: when pip cannot reach the index or finds no such wheel.
    """
    wanted = [f"{package}=={installed_version(package)}" for package in PACKAGES]
    # The wheel of tvm_ffi holds one Python's extension module too; which Python does not matter here.
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--no-input"]
    options += ["--platform", f"manylinux_2_28_{architecture}", "--python-version", version]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as temporary:
            place = Path(temporary)
            command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(place / "wheels"), *wanted]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
            if done.returncode != 0:
                raise _download_failed(architecture, folder, wanted, done.stderr)
            _unpack(place / "wheels", place / "libraries")
            _move(place / "libraries", folder)
    except (OSError, subprocess.TimeoutExpired, zipfile.BadZipFile) as error:
        raise _download_failed(architecture, folder, wanted, str(error)) from error


def _download_failed(architecture: str, folder: Path, wanted: list[str], text: str) -> ResourceError:
    lines = [line for line in text.splitlines() if re.search("error", line, re.IGNORECASE)] or text.splitlines()
    return ResourceError(
        f"the TVM runtime for {architecture} is not here and cannot be downloaded",
        got=(lines[-1] if lines else "no message")[:200],
        remedy=f"connect to the package index, or put {', '.join(MEMBERS)} of {' '.join(wanted)} into {folder}",
    )


def _unpack(wheels: Path, folder: Path) -> None:
    folder.mkdir()
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name, place in MEMBERS.items():
                if f"{place}/{name}" in archive.namelist():
                    (folder / name).write_bytes(archive.read(f"{place}/{name}"))
    if missing := [name for name in MEMBERS if not (folder / name).is_file()]:
        raise OSError(f"the wheels lack {', '.join(missing)}")


def _move(source: Path, folder: Path) -> None:
    """Rename a complete folder into place; another process that was faster wins."""
    try:
        os.rename(source, folder)
    except OSError:
        if not all((folder / name).is_file() for name in MEMBERS):
            raise


def find_cudart() -> Path | None:
    """The CUDA runtime library that TVM's needs, in a toolkit or package; None when at most the system has it."""
    from kbitc.targets.cuda.toolchain import toolkit_roots

    for root in toolkit_roots():
        for folder in ("lib64", "lib"):
            if (root / folder / CUDART).is_file():
                return root / folder / CUDART
    return None
