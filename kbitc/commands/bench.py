"""`kbitc bench`: interleaved rounds of a bundle, the float build for the same target, and onnxruntime fp32."""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy.typing as npt

from kbitc.bundle.reader import constants_of
from kbitc.bundle.runtime import Model, load
from kbitc.errors import CalibrationError
from kbitc.importer.feeds import made_up_feeds, read_feeds
from kbitc.importer.signature import parse_constant, parse_shape

Feeds = Mapping[str, npt.NDArray[Any]]
WARM_UP = 3
BUNDLE, FLOAT_BUILD, ONNXRUNTIME = "bundle", "float build", "onnxruntime fp32"


def bench_bundle(
    bundle: Path,
    against: Path | None,
    inputs: Path | None,
    shapes: Sequence[str],
    threads: int,
    rounds: int,
    on_stage: Callable[[str], None] = lambda name: None,
    *,
    variant: str | None = None,
) -> dict[str, Any]:
    """Time one call of every engine a round, in turn; report medians and ratios to the bundle's."""
    model = load(bundle, threads=threads, variant=variant)
    with tempfile.TemporaryDirectory() as folder:
        on_stage("prepare")
        engines, feeds = _engines(model, bundle, against, inputs, shapes, threads, Path(folder))
        on_stage("measure")
        times = interleave({name: partial(run, feeds) for name, run in engines.items()}, rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "bundle": str(bundle),
        "target": model.target_name,
        "threads": threads,
        "rounds": rounds,
        "inputs": {name: list(array.shape) for name, array in feeds.items()},
        "machine": {"cpu": cpu_name(), "onnxruntime": metadata.version("onnxruntime")},
        "engines": [
            {
                "name": name,
                "milliseconds": {
                    "min": 1e3 * min(times[name]), "median": 1e3 * median, "max": 1e3 * max(times[name]),
                },
                "ratio_to_bundle": median / medians[BUNDLE],
            }
            for name, median in medians.items()
        ],
        "warning": _warning(medians),
    }  # fmt: skip


def interleave(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round, each round calling all of them in turn after a warm-up."""
    for _ in range(WARM_UP):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def _engines(
    model: Model,
    bundle: Path,
    against: Path | None,
    inputs: Path | None,
    shapes: Sequence[str],
    threads: int,
    folder: Path,
) -> tuple[dict[str, Callable[[Feeds], object]], Feeds]:
    """What is timed, and the one set of inputs they all get."""
    feeds, imported = bench_feeds(model, bundle, against, inputs, shapes)
    engines: dict[str, Callable[[Feeds], object]] = {BUNDLE: model}
    if against is not None:
        from kbitc.graph.evaluate import Session

        engines[FLOAT_BUILD] = load(
            compile_float(model, bundle, against, folder), threads=threads, variant=model.target_name
        )
        engines[ONNXRUNTIME] = Session(imported, threads=threads, optimize=True).run
    return engines, feeds


def bench_feeds(
    model: Model, bundle: Path, against: Path | None, inputs: Path | None, shapes: Sequence[str]
) -> tuple[Feeds, Any]:
    """The inputs to time with, and the imported model when one is given.

    Raises:
        CalibrationError: there is neither a file of inputs nor a model to make some up for.
    """
    if against is None:
        if inputs is None:
            raise CalibrationError("nothing to run on", remedy="give --input feeds.npz, or --against MODEL")
        return read_feeds(inputs, model.inputs), None
    from kbitc.importer import load_model

    bound = {item.name: item.shape for item in model.inputs} | dict(map(parse_shape, shapes))
    imported = load_model(against, shapes=bound, constants=dict(map(parse_constant, constants_of(bundle))))
    return (read_feeds(inputs, model.inputs) if inputs is not None else made_up_feeds(imported)), imported


def compile_float(model: Model, bundle: Path, against: Path, folder: Path) -> Path:
    """The float build of a model for the target and the shapes of a bundle; the folder of its bundle."""
    from kbitc import compile as compile_bundle

    made = folder / "float.kbit"
    fixed = [f"{item.name}=" + "x".join(map(str, item.shape)) for item in model.inputs]
    compile_bundle(
        against, made, scheme="float32", target=model.target_name, shapes=fixed, constants=constants_of(bundle)
    )
    return made


def _warning(medians: Mapping[str, float]) -> str | None:
    slower = [name for name, value in medians.items() if name != BUNDLE and value < medians[BUNDLE]]
    return f"the bundle is slower than {' and '.join(slower)}" if slower else None


def cpu_name() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
