"""`kbitc inspect`: what is in a model or a bundle."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kbitc import options
from kbitc.bundle.manifest import REPORT
from kbitc.bundle.reader import open_bundle
from kbitc.importer import load_model
from kbitc.passes.allocate.survey import survey
from kbitc.passes.allocate.uniform import allocate
from kbitc.passes.canonicalize import canonicalize
from kbitc.quant.plan import INT8, PlanEntry
from kbitc.quant.tensor import storage_bits
from kbitc.targets.target import host_target

FLOAT_BITS = 32


def inspect_path(path: Path) -> dict[str, Any]:
    """Describe a bundle folder or a model file."""
    return _bundle(path) if path.is_dir() else _model(path)


def _bundle(path: Path) -> dict[str, Any]:
    """From the manifest and the report alone; nothing is loaded, so any machine can inspect any bundle."""
    opened = open_bundle(path)
    manifest = opened.manifest
    report = json.loads(opened.path(REPORT).read_text())
    return {
        "kind": "bundle",
        "path": str(path),
        "target": manifest.target.name,
        "inputs": [asdict(item) for item in manifest.inputs],
        "outputs": [asdict(item) for item in manifest.outputs],
        "files": {name: item.size for name, item in manifest.files.items()},
        "weights": report["weights"],
        "bits_per_weight": report["bits_per_weight"],
        "layers": report["layers"],
        "accuracy": report["accuracy"],
    }


def _model(path: Path) -> dict[str, Any]:
    """What `kbitc compile` would do with default options, without doing it."""
    imported = load_model(path)
    before = Counter(_operator(node) for node in imported.graph.all_nodes())
    model = canonicalize(imported)
    scheme = options.default_scheme()
    target = host_target()
    candidates = survey(model)
    plan = allocate(
        model, candidates, scheme, INT8, {},
        lambda op_type, activation, wanted, terms: target.accepts(op_type, activation, wanted, reduction=terms),
    )  # fmt: skip
    return {
        "kind": "model",
        "path": str(path),
        "inputs": [_value(value) for value in model.graph.inputs],
        "outputs": [_value(value) for value in model.graph.outputs],
        "operators": dict(before.most_common()),
        "canonical_operators": dict(Counter(_operator(node) for node in model.graph).most_common()),
        "weights": [_weight(entry) for entry in plan.entries],
    }


def _operator(node: Any) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else str(node.op_type)


def _value(value: Any) -> dict[str, Any]:
    shape = [] if value.shape is None else [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
    return {"name": value.name, "dtype": str(value.dtype), "shape": shape}


def _weight(entry: PlanEntry) -> dict[str, Any]:
    n, t, c = entry.shape
    weights = n * t * c
    bits = float(FLOAT_BITS)
    if entry.scheme is not None:
        bits = storage_bits(entry.shape, entry.scheme) / weights
    sizes = {"weights": weights, "bits_per_weight": round(bits, 3), "bytes": round(bits * weights / 8)}
    return {**entry.as_json(), **sizes}
