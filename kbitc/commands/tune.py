"""`kbitc tune`: search the schedules of a model's products on this machine, and keep what is faster."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kbitc.bundle.manifest import REPORT, Described
from kbitc.bundle.reader import open_bundle
from kbitc.errors import UsageError
from kbitc.importer.signature import parse_shape
from kbitc.targets.target import Target, host_runs, parse_target
from kbitc.targets.tuning import Tuning, read_tuning, tuned_file


def tune_path(
    path: Path,
    output: Path | None,
    shapes: Sequence[str],
    compiling: Mapping[str, Any],
    on_stage: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Tune a bundle, or a model as `compiling` says it is compiled; add what is found to the database.

    Args:
        path: bundle folder or ONNX file.
        output: the database; None for the one of the cache folder.
        shapes: NAME=1x128 texts; give symbolic dims their sizes.
        compiling: options of `kbitc.compile` for a model.
        on_stage: told what is being searched.

    Raises:
        UsageError: the bundle is for another machine, or a symbolic dim has no size.
    """
    from kbitc.targets.tune import tune_layers

    with tempfile.TemporaryDirectory() as folder:
        bundle = path if path.is_dir() else _compiled(path, shapes, compiling, Path(folder), on_stage)
        opened = open_bundle(bundle)
        layers = json.loads(opened.path(REPORT).read_text(encoding="utf-8")).get("layers", [])
    target = parse_target(opened.manifest.variants[0].target)  # the one whose layers the report tells
    check_tunable(target, str(path))
    found = tune_layers(layers, target, sizes_of(opened.manifest.inputs, shapes), on_stage)
    file = tuned_file() if output is None else output
    known = read_tuning(file) if file.exists() else Tuning()
    entries = [item["entry"] for item in found if item["entry"] is not None]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(known.merged(entries).text(), encoding="utf-8")
    rows = [{**item, "entry": None if item["entry"] is None else item["entry"].as_json()} for item in found]
    return {"path": str(path), "target": target.name, "output": str(file), "classes": rows}


def _compiled(
    path: Path, shapes: Sequence[str], compiling: Mapping[str, Any], folder: Path, on_stage: Callable[[str], None]
) -> Path:
    from kbitc import compile as compile_bundle

    on_stage("compile")
    bundle = folder / "model.kbit"
    compile_bundle(path, bundle, shapes=shapes, **compiling)
    return bundle


def check_tunable(target: Target, where: str) -> None:
    """Refuse targets whose kernels this machine cannot time.

    Raises:
        UsageError: with the reason.
    """
    reason = host_runs(target) or (None if target.device == "cpu" else f"{target.name} is no CPU target")
    if reason is not None:
        raise UsageError("schedules are found by measuring on the machine itself", where=where, got=reason,
                         remedy="tune on such a machine and copy the database")  # fmt: skip


def sizes_of(inputs: Sequence[Described], shapes: Sequence[str]) -> dict[str, int]:
    """Sizes of symbolic dims by their names, as shapes of inputs give them.

    Raises:
        UsageError: a shape is of no input or of another rank, or a dim has no size.
    """
    known = {item.name: item.shape for item in inputs}
    sizes: dict[str, int] = {}
    for name, shape in map(parse_shape, shapes):
        if name not in known or len(shape) != len(known[name]):
            raise UsageError("--shape is of no input", got=name, remedy=f"the inputs are {', '.join(known)}")
        pairs = zip(known[name], shape, strict=True)
        sizes |= {dim: size for dim, size in pairs if isinstance(dim, str) and isinstance(size, int)}
    for name, dims in known.items():
        missing = [dim for dim in dims if isinstance(dim, str) and dim not in sizes]
        if missing:
            raise UsageError("a dim has no size", where=name, got=missing[0], remedy=f"give --shape {name}=1x128")
    return sizes
