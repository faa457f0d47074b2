"""What is saved when kbitc itself is at fault, so that the defect can be reported and reproduced."""

from __future__ import annotations

import hashlib
import json
import platform
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from kbitc import __version__
from kbitc.errors import InternalError

PACKAGES = ("apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript")


def save_reproducer(error: BaseException, arguments: Sequence[str]) -> InternalError:
    """Write `kbitc-crash-<hash>.json` into the current folder and return the error to show.

    The file holds the command line, the traceback, library versions and the SHA-256 of every file named on the
    command line; no content of a model.
    """
    text = "".join(traceback.format_exception(error))
    data = {
        "command": ["kbitc", *arguments],
        "traceback": text.splitlines(),
        "versions": {"kbitc": __version__, "python": platform.python_version(), **versions()},
        "machine": platform.platform(),
        "files": {name: _digest(Path(name)) for name in arguments if Path(name).is_file()},
    }
    path = Path(f"kbitc-crash-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json")
    summary = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    try:
        path.write_text(json.dumps(data, indent=1) + "\n")
    except OSError:
        return InternalError("defect in kbitc", got=summary, remedy="report it; the reproducer could not be saved")
    return InternalError("defect in kbitc", got=summary, remedy=f"report it with the reproducer {path}")


def versions() -> dict[str, str]:
    """Versions of the libraries that decide what comes out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
