"""`kbitc bench --layers`: where the time of a bundle goes, beside its float build and the limits of the machine."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbitc.bundle.feeds import check_feeds
from kbitc.bundle.manifest import REPORT
from kbitc.bundle.profile import LayerTimes, clock_of, profile
from kbitc.bundle.reader import open_bundle
from kbitc.bundle.runtime import Model, load
from kbitc.commands.bench import BUNDLE, FLOAT_BUILD, Feeds, bench_feeds, compile_float, cpu_name
from kbitc.errors import BundleError

if TYPE_CHECKING:
    from kbitc.targets.probe import Limits

FLOAT_WEIGHT = "float32"


def bench_layers(
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
    """Time every layer of a bundle, and of the float build of `against`, in interleaved rounds."""
    from kbitc.targets.costs import sizes_of, with_predictions
    from kbitc.targets.probe import probe
    from kbitc.targets.target import parse_target

    model = load(bundle, threads=threads, variant=variant)
    with tempfile.TemporaryDirectory() as folder:
        on_stage("prepare")
        feeds, _ = bench_feeds(model, bundle, against, inputs, shapes)
        timed = {BUNDLE: (model, *_ready(model, bundle, feeds))}
        if against is not None:
            float_bundle = compile_float(model, bundle, against, Path(folder))
            built = load(float_bundle, threads=threads, variant=model.target_name)
            timed[FLOAT_BUILD] = (built, *_ready(built, float_bundle, feeds))
        on_stage("probe")
        limits = probe(parse_target(model.target_name), threads, clock_of(threads))
        on_stage("measure")
        found = profile(timed, rounds, clock_of(threads))
    report = timed[BUNDLE][2]
    sizes = sizes_of(model.inputs, feeds)
    report = {**report, "layers": with_predictions(report["layers"], model.target_name, sizes)}
    rows = layer_rows(found[BUNDLE], found.get(FLOAT_BUILD, ()), limits, report)
    return {
        "bundle": str(bundle),
        "threads": threads,
        "rounds": rounds,
        "inputs": {name: list(array.shape) for name, array in feeds.items()},
        "machine": {"cpu": cpu_name(), **({} if limits is None else limits.as_json())},
        "milliseconds": {name: 1e3 * sum(layer.median for layer in layers) for name, layers in found.items()},
        "rules": rule_sums(rows),
        "layers": rows,
        "warnings": [row["warning"] for row in rows if row["warning"]],
    }


def _ready(model: Model, bundle: Path, feeds: Feeds) -> tuple[list[Any], dict[str, Any]]:
    """Device arguments, and the report of the bundle.

    Raises:
        BundleError: the bundle is older than measurements by layer, or its report is of another variant.
    """
    opened = open_bundle(bundle)
    report: dict[str, Any] = json.loads(opened.path(REPORT).read_text(encoding="utf-8"))
    told = opened.manifest.variants[0].target
    if model.target_name != told:
        raise BundleError(f"{REPORT} tells which kernel is which layer for one variant only", where=str(bundle),
                          got=model.target_name, remedy=f"it does for {told}")  # fmt: skip
    if "calls" not in report:
        raise BundleError(f"{REPORT} does not say which kernel is which layer", where=str(bundle),
                          remedy="compile the model again")  # fmt: skip
    return model.device_arguments(check_feeds(model.inputs, feeds)), report


def layer_rows(
    layers: Sequence[LayerTimes],
    floats: Sequence[LayerTimes],
    limits: Limits | None,
    report: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """One row a layer, in the order of the model.

    Args:
        layers: measured layers of the bundle.
        floats: those of the float build; empty without one.
        limits: of the machine; None where they are not known.
        report: of the bundle.
    """
    total = sum(layer.median for layer in layers)
    resident = sum(layer.stored for layer in layers)
    costs = {layer["name"]: layer.get("predicted_microseconds") for layer in report["layers"]}
    schemes = {layer["name"]: layer["weight"] for layer in report["layers"]}
    float_layers = {layer.name: layer for layer in floats if layer.contraction}
    rows = []
    for layer in layers:
        seconds, scheme = layer.median, schemes.get(layer.name) if layer.contraction else None
        row: dict[str, Any] = {
            "name": node_name(layer.name),
            "rule": layer.rule,
            "weight": scheme,
            "milliseconds": 1e3 * seconds,
            "share": seconds / total if total else 0.0,
            "bytes": layer.moved,
            "operations": layer.operations,
        }
        if limits is not None:
            least, limited_by = limits.seconds(layer, resident)
            row |= {"limit_milliseconds": 1e3 * least, "limited_by": limited_by,
                    "fraction_of_limit": least / seconds if seconds else 0.0}  # fmt: skip
        cost = costs.get(layer.name) if layer.contraction else None
        row["predicted_milliseconds"] = None if cost is None else cost / 1e3
        base = float_layers.get(layer.name) if layer.contraction else None
        row["float_milliseconds"] = None if base is None else 1e3 * base.median
        quantized = scheme not in (None, FLOAT_WEIGHT)
        row["warning"] = slower_than_float(layer, base, scheme) if quantized and base is not None else None
        rows.append(row)
    return rows


def rule_sums(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Calls, time and share of every rule, the longest first."""
    sums: dict[str, dict[str, Any]] = {}
    for row in rows:
        found = sums.setdefault(row["rule"], {"rule": row["rule"], "layers": 0, "milliseconds": 0.0, "share": 0.0})
        found["layers"] += 1
        found["milliseconds"] += row["milliseconds"]
        found["share"] += row["share"]
    return sorted(sums.values(), key=lambda item: -item["milliseconds"])


def node_name(layer: str) -> str:
    """The name of an ONNX node; the channels-last graph calls its copies after them."""
    return layer.removesuffix(".channels_last")


def slower_than_float(layer: LayerTimes, base: LayerTimes, scheme: str | None) -> str | None:
    """What to say of a quantized layer that takes longer than in the float build."""
    if not layer.slower_than(base):
        return None
    times = f"{1e6 * layer.median:.1f} us against {1e6 * base.median:.1f} us"
    ratio = f"{layer.median / base.median:.2f}x"
    return f"{node_name(layer.name)} ({scheme}) is slower than its float build: {times} ({ratio})"
