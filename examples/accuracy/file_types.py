"""Magika: the type of a file from its bytes, on files of the Python installation, whose extensions are the labels."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import fetch
import numpy as np
import numpy.typing as npt
from tasks import Array, Outputs, Task, joined, percent

BLOCK, PART, PADDING = 4096, 1024, 256  # bytes read at each end, bytes kept, padding token
SHORTEST = 64  # bytes; empty package files and the like say nothing
PER_EXTENSION = 50  # files at most, evenly spaced in the sorted list
CALIBRATE_EVERY, BATCH = 8, 20

# The types that are right for a file with this extension.
TYPES = {
    ".py": ("python",), ".pyi": ("python",), ".so": ("elf",),
    ".h": ("c", "cpp"), ".c": ("c",), ".cc": ("cpp",), ".cpp": ("cpp",), ".hpp": ("cpp",), ".cu": ("c", "cpp"),
    ".cuh": ("c", "cpp"), ".cmake": ("cmake",), ".json": ("json",), ".md": ("markdown",), ".rst": ("rst",),
    ".txt": ("txt",), ".html": ("html",), ".css": ("css",), ".js": ("javascript",), ".xml": ("xml",),
    ".yaml": ("yaml",), ".yml": ("yaml",), ".toml": ("toml",), ".csv": ("csv",), ".png": ("png",),
    ".gif": ("gif",), ".jpg": ("jpeg",),
    ".svg": ("svg",), ".ico": ("ico",), ".zip": ("zip",), ".whl": ("zip",), ".gz": ("gzip",), ".exe": ("pebin",),
    ".sh": ("shell",), ".bat": ("batch",), ".ps1": ("powershell",), ".ini": ("ini",), ".cfg": ("ini",),
    ".npy": ("npy",), ".npz": ("npz", "zip"), ".pkl": ("pickle",), ".pickle": ("pickle",), ".wav": ("wav",),
    ".ttf": ("ttf",), ".f90": ("fortran",), ".f": ("fortran",), ".sql": ("sql",), ".tcl": ("tcl",),
    ".proto": ("proto",),
}  # fmt: skip


def file_bytes(content: bytes) -> npt.NDArray[np.int32]:
    """Magika's features, i32 [2048]: the first and the last 1024 bytes without outer white space, padded with 256."""
    features = np.full(2 * PART, PADDING, np.int32)
    begin = np.frombuffer(content[:BLOCK].lstrip()[:PART], np.uint8)
    end = np.frombuffer(content[-BLOCK:].rstrip()[-PART:], np.uint8)
    features[: len(begin)] = begin
    features[len(features) - len(end) :] = end
    return features


def read_ends(path: Path) -> bytes:
    """The whole of a short file, the first and last 4096 bytes of a longer one."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        if size <= 2 * BLOCK:
            return file.read()
        head = file.read(BLOCK)
        file.seek(-BLOCK, 2)
        return head + file.read()


def installed_files() -> list[Path]:
    """Files of the standard library and of the installed packages, at most PER_EXTENSION of an extension."""
    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    by_extension: dict[str, set[Path]] = {}
    for root in roots:
        for path in root.rglob("*.*"):
            if (
                path.suffix in TYPES
                and "__pycache__" not in path.parts
                and path.is_file()
                and path.stat().st_size >= SHORTEST
            ):
                by_extension.setdefault(path.suffix, set()).add(path)
    chosen: list[Path] = []
    for _, paths in sorted(by_extension.items()):
        ordered = sorted(paths)
        chosen += ordered[:: -(-len(ordered) // PER_EXTENSION)]
    return chosen


def distinct(paths: list[Path]) -> tuple[npt.NDArray[np.int32], list[Path]]:
    """Features i32 [files, 2048] and their files; of files that the model sees alike, only the last.

    Files may differ where the model does not look, and then one of them would calibrate and the other be measured.
    """
    by_features = {file_bytes(read_ends(path)).tobytes(): path for path in paths}
    rows = np.frombuffer(b"".join(by_features), np.int32).reshape(len(by_features), 2 * PART)
    return rows, list(by_features.values())


def file_type() -> Task:
    """Share of files that get a type that is right for their extension, in percent; one file in eight calibrates.

    Which files there are depends on the Python version and the packages that are installed.
    """
    folder = fetch.fetch("magika")
    model = folder / "model.onnx"
    labels = json.loads((folder / "config.min.json").read_text(encoding="utf-8"))["target_labels_space"]
    features, paths = distinct(installed_files())
    right = np.array([[label in TYPES[path.suffix] for label in labels] for path in paths])
    calibrates = np.arange(len(features)) % CALIBRATE_EVERY == 0
    wanted = right[~calibrates]

    def feeds(chosen: npt.NDArray[np.int32]) -> list[dict[str, npt.NDArray[np.int32]]]:
        return [{"bytes": chosen[start : start + BATCH]} for start in range(0, len(chosen), BATCH)]

    def rows(outputs: Outputs) -> Array:
        said = joined(outputs).argmax(axis=1)
        return wanted[np.arange(len(wanted)), said][:, None].astype(np.float64)

    batches = feeds(features[~calibrates])
    return Task(
        "file type", model, batches, {"bytes": features[:1]}, rows, percent, "{:.1f} % right",
        calibration=feeds(features[calibrates]),
    )  # fmt: skip
