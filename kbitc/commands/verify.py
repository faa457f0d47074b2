"""`kbitc verify`: integrity first, then numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kbitc.bundle.reader import constants_of
from kbitc.bundle.runtime import load
from kbitc.errors import AccuracyError
from kbitc.graph.evaluate import Session
from kbitc.importer import load_model
from kbitc.importer.feeds import sample_feeds
from kbitc.importer.signature import parse_constant
from kbitc.passes.canonicalize import canonicalize
from kbitc.quant.metrics import compare


def verify_bundle(
    bundle: Path, model: Path | None, inputs: Path | None, min_sqnr: float | None, variant: str | None = None
) -> dict[str, Any]:
    """Check every hash, then compare with the float model when it is given.

    Raises:
        BundleError: the bundle is damaged or for another machine, or lacks the variant.
        AccuracyError: an output is further off than `min_sqnr` dB.
    """
    loaded = load(bundle, variant=variant)
    integrity = "every file has the size and SHA-256 of the manifest"
    result: dict[str, Any] = {"bundle": str(bundle), "integrity": integrity, "target": loaded.target_name}
    if model is None:
        return result
    shapes = {item.name: item.shape for item in loaded.inputs}
    original = canonicalize(load_model(model, shapes=shapes, constants=dict(map(parse_constant, constants_of(bundle)))))
    feeds, data = sample_feeds(original, inputs)
    session = Session(original)
    found = compare([session.run(feed) for feed in feeds], [loaded(feed) for feed in feeds])
    result["data"] = data
    result["outputs"] = {name: item.as_json() for name, item in found.items()}
    for name, item in found.items():
        if min_sqnr is not None and item.sqnr_db < min_sqnr:
            raise AccuracyError(
                "accuracy is below --min-sqnr", where=f"output {name!r}",
                got=f"{item.sqnr_db:.2f} dB, asked for {min_sqnr:g} dB", remedy="compile with more bits",
            )  # fmt: skip
    return result
