"""`kbitc verify`: integrity first, then numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from kbitc.bundle.manifest import QUANTIZED
from kbitc.bundle.reader import constants_of, read_manifest
from kbitc.bundle.runtime import Model, load
from kbitc.errors import AccuracyError
from kbitc.graph.evaluate import Session
from kbitc.graph.functions import rounds_floats
from kbitc.importer import load_model
from kbitc.importer.feeds import sample_feeds
from kbitc.importer.signature import parse_constant
from kbitc.passes.canonicalize import canonicalize
from kbitc.passes.verify import accuracy
from kbitc.quant.metrics import compare


def verify_bundle(
    bundle: Path, model: Path | None, inputs: Path | None, min_sqnr: float | None, variant: str | None = None
) -> dict[str, Any]:
    """Check every hash; then compare with the quantized ONNX in the bundle, if any, and with the float model, if given.

    Raises:
        BundleError: the bundle is damaged or for another machine, or lacks the variant.
        InternalError: the module departs from its quantized ONNX.
        AccuracyError: an output is further off than `min_sqnr` dB.
    """
    loaded = load(bundle, variant=variant)
    integrity = "every file has the size and SHA-256 of the manifest"
    result: dict[str, Any] = {"bundle": str(bundle), "integrity": integrity, "target": loaded.target_name}
    original = None if model is None else _original(bundle, model, loaded)
    quantized = ir.load(bundle / QUANTIZED) if QUANTIZED in read_manifest(bundle).files else None
    source = original or quantized
    if source is None:
        return result
    feeds, result["data"] = sample_feeds(source, inputs)
    if quantized is not None:
        result["lowering"] = _lowering(loaded, original, quantized, feeds)
    if original is None:
        return result
    session = Session(original)
    found = compare([session.run(feed) for feed in feeds], [loaded(feed) for feed in feeds])
    result["outputs"] = {name: item.as_json() for name, item in found.items()}
    for name, item in found.items():
        if min_sqnr is not None and item.sqnr_db < min_sqnr:
            raise AccuracyError(
                "accuracy is below --min-sqnr", where=f"output {name!r}",
                got=f"{item.sqnr_db:.2f} dB, asked for {min_sqnr:g} dB", remedy="compile with more bits",
            )  # fmt: skip
    return result


def _original(bundle: Path, model: Path, loaded: Model) -> ir.Model:
    shapes = {item.name: item.shape for item in loaded.inputs}
    return canonicalize(load_model(model, shapes=shapes, constants=dict(map(parse_constant, constants_of(bundle)))))


def _lowering(loaded: Model, original: ir.Model | None, quantized: ir.Model, feeds: list[Any]) -> dict[str, Any]:
    """The module against its quantized ONNX, held to the bound of a compilation.

    The bound on graphs of planned codes needs the float model: without it only those that are all integers are held.
    """
    references = accuracy.reference_runs(original or quantized, quantized, feeds, "")
    measured = accuracy.measure(references, loaded)
    if original is not None or measured.exact or not rounds_floats(quantized):
        accuracy.check_lowering(measured)
    return {name: item.as_json() for name, item in (measured.lowering or {}).items()}
