"""What `--with-runtime` puts into a bundle, so that copying one folder is the whole deployment."""

from __future__ import annotations

from pathlib import Path

from kbitc.targets.runner.build import RUNNER, runner_folder
from kbitc.targets.runner.libraries import CUDART, FFI, RUNTIME, RUNTIME_CUDA, find_cudart
from kbitc.targets.target import Target


def with_runtime(target: Target) -> dict[str, Path]:
    """The files that make a bundle run on a bare device: relative path in the bundle -> file to copy.

    Args:
        target: what the bundle is for.

    Raises:
        ResourceError: when the runner cannot be built or a library is missing.
    """
    folder = runner_folder(target.machine)
    files = {RUNNER: folder / RUNNER}
    files |= {f"lib/{name}": folder / "lib" / name for name in (RUNTIME, FFI)}
    if target.device == "cuda":
        files[f"lib/{RUNTIME_CUDA}"] = folder / "lib" / RUNTIME_CUDA
        # The driver is the device's own; the CUDA runtime may be absent there.
        cudart = find_cudart()
        if cudart is not None:
            files[f"lib/{CUDART}"] = cudart.resolve()
    return files
