"""`kbitc run`: a bundle, once, on inputs from a file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from kbitc.bundle.runtime import load
from kbitc.errors import ResourceError
from kbitc.importer.feeds import read_feeds


def run_bundle(
    bundle: Path, inputs: Path, output: Path | None, threads: int | None, variant: str | None = None
) -> dict[str, Any]:
    """Run and describe the outputs; writes them to `output` as .npz when given."""
    model = load(bundle, threads=threads, variant=variant)
    feeds = read_feeds(inputs, model.inputs)
    start = time.perf_counter()
    results = model(feeds)
    milliseconds = 1e3 * (time.perf_counter() - start)
    if output is not None:
        _write(output, results)
    described = [
        {"name": name, "dtype": str(array.dtype), "shape": list(array.shape), **_range(array)}
        for name, array in results.items()
    ]
    return {"bundle": str(bundle), "target": model.target_name, "milliseconds": round(milliseconds, 3),
            "outputs": described, "output_file": None if output is None else str(output)}  # fmt: skip


def _range(array: np.ndarray[Any, Any]) -> dict[str, float | None]:
    if array.size == 0:
        return {"min": None, "max": None, "mean": None}
    values = array.astype(np.float64)
    return {"min": float(values.min()), "max": float(values.max()), "mean": float(values.mean())}


def _write(path: Path, results: dict[str, Any]) -> None:
    """Write an .npz through a temporary file, so that a failure leaves nothing behind."""
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("wb") as file:
            np.savez(file, **results)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ResourceError("cannot write the outputs", where=str(path), got=error.strerror) from error
