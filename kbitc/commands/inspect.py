"""`kbitc inspect`: what is in a model or a bundle."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from kbitc import driver, options
from kbitc.bundle.manifest import REPORT, TargetFacts, Variant
from kbitc.bundle.reader import open_bundle
from kbitc.errors import UsageError
from kbitc.importer import load_model
from kbitc.passes.allocate.choices import FLOAT_BITS, weight_bits
from kbitc.passes.canonicalize import canonicalize
from kbitc.quant.plan import PlanEntry
from kbitc.targets.target import host_target, machine_runs


def inspect_path(path: Path, plan: Path | None = None, write_plan: Path | None = None) -> dict[str, Any]:
    """Describe a bundle folder or a model file.

    Args:
        path: the bundle or the model.
        plan: of a model: a plan to check, and to show in place of the default one.
        write_plan: of a model: file that receives the plan that is shown.

    Raises:
        UsageError: a bundle with a plan, whose own plan cannot be changed.
    """
    if not path.is_dir():
        return _model(path, plan, write_plan)
    if plan is not None or write_plan is not None:
        raise UsageError("a plan is for a model, not for a bundle", got=str(path), remedy="inspect the model")
    return _bundle(path)


def _bundle(path: Path) -> dict[str, Any]:
    """From the manifest and the report alone; nothing is loaded, so any machine can inspect any bundle."""
    opened = open_bundle(path)
    manifest = opened.manifest
    report = json.loads(opened.path(REPORT).read_text())
    return {
        "kind": "bundle",
        "path": str(path),
        "target": manifest.target.name,
        "variants": [_variant(item, manifest.target) for item in manifest.variants],
        "inputs": [asdict(item) for item in manifest.inputs],
        "outputs": [asdict(item) for item in manifest.outputs],
        "files": {name: item.size for name, item in manifest.files.items()},
        "weights": report["weights"],
        "bits_per_weight": report["bits_per_weight"],
        "layers": report["layers"],
        "accuracy": report["accuracy"],
    }


def _variant(variant: Variant, target: TargetFacts) -> dict[str, Any]:
    """What it needs, and why this machine does not run it (None when it does)."""
    reason = machine_runs(variant.target, target.machine, variant.cpu_features, target.device, target.arch)
    facts = {"target": variant.target, "library": variant.library, "cpu_features": list(variant.cpu_features)}
    return {**facts, "runs": reason}


def _model(path: Path, given: Path | None, write_plan: Path | None) -> dict[str, Any]:
    """What `kbitc compile` would do with default options, without doing it."""
    imported = load_model(path)
    before = Counter(_operator(node) for node in imported.graph.all_nodes())
    model = canonicalize(imported)
    chosen = options.from_arguments(plan=given, write_plan=write_plan)
    plan, _ = driver.make_plan(model, chosen, host_target())
    plan.write(chosen.write_plan)
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
    weights = prod(entry.shape)
    bits = weight_bits(entry) / weights if weights else float(FLOAT_BITS)
    sizes = {"weights": weights, "bits_per_weight": round(bits, 3), "bytes": round(bits * weights / 8)}
    return {**entry.as_json(), **sizes}
