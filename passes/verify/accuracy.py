"""Three-way comparison: float model, quantized ONNX, compiled module, on the same samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.errors import AccuracyError, InternalError
from kbitc.graph.evaluate import Session
from kbitc.quant.metrics import OutputAccuracy, compare

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Run = Callable[[Feeds], Mapping[str, Array]]
# With float activations lowering may add at most a tenth of the noise power that quantization itself added ...
LOWERING_MARGIN_DB = 10.0
# ... but is never asked to agree better than float32 sums of different order do.
LOWERING_CEILING_DB = 60.0
# Where activations are rounded to int8 again and again, a difference e of the last bit before a step s grows to
# about sqrt(e * s) behind it, and so to s itself within a few layers: module and ONNX then hold two draws of the same
# rounding noise, whose difference has at most twice its power.
REDRAWN_NOISE_DB = -3.0


@dataclass(frozen=True)
class Accuracy:
    """The comparison, output by output.

    Attributes:
        quantized: quantized ONNX against the float model, both in onnxruntime.
        module: compiled module against the float model; None when it cannot run here.
        lowering: compiled module against the quantized ONNX; None when it cannot run here.
        data: where the samples came from.
    """

    quantized: dict[str, OutputAccuracy]
    module: dict[str, OutputAccuracy] | None
    lowering: dict[str, OutputAccuracy] | None
    data: str

    @property
    def worst_sqnr_db(self) -> float:
        """The smallest SQNR of any output against the float model."""
        outputs = self.module or self.quantized
        return min((item.sqnr_db for item in outputs.values()), default=float("inf"))

    def as_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        data: dict[str, Any] = {"data": self.data}
        for field in ("quantized", "module", "lowering"):
            outputs = getattr(self, field)
            data[field] = None if outputs is None else {name: item.as_json() for name, item in outputs.items()}
        return data


@dataclass(frozen=True)
class References:
    """Outputs of the float and the quantized model on the samples, kept for the comparison with the module."""

    feeds: Sequence[Feeds]
    original: list[dict[str, Array]]
    quantized: list[dict[str, Array]]
    data: str


def reference_runs(original: ir.Model, quantized: ir.Model, feeds: Sequence[Feeds], data: str) -> References:
    """Run both models in onnxruntime, one after the other so that only one is loaded at a time."""
    return References(feeds, _run_all(original, feeds), _run_all(quantized, feeds), data)


def _run_all(model: ir.Model, feeds: Sequence[Feeds]) -> list[dict[str, Array]]:
    session = Session(model)
    return [session.run(feed) for feed in feeds]


def measure(references: References, run: Run | None) -> Accuracy:
    """Compare; `run` calls the compiled module, None when this machine cannot."""
    quantized = compare(references.original, references.quantized)
    if run is None:
        return Accuracy(quantized, None, None, references.data)
    results = [dict(run(feed)) for feed in references.feeds]
    module = compare(references.original, results)
    lowering = compare(references.quantized, results)
    return Accuracy(quantized, module, lowering, references.data)


def needed_sqnr_db(quantized_db: float, rounded_activations: bool) -> float:
    """Least SQNR of the module against its quantized ONNX, from that of the quantized ONNX against the float model."""
    margin = REDRAWN_NOISE_DB if rounded_activations else LOWERING_MARGIN_DB
    return min(LOWERING_CEILING_DB, quantized_db + margin)


def check_lowering(accuracy: Accuracy, rounded_activations: bool) -> None:
    """Refuse a module that departs from the meaning of its quantized ONNX.

    Args:
        accuracy: from `measure`.
        rounded_activations: activations are quantized at run time.

    Raises:
        InternalError: when lowering added more noise than `needed_sqnr_db` allows.
    """
    for name, found in (accuracy.lowering or {}).items():
        needed = needed_sqnr_db(accuracy.quantized[name].sqnr_db, rounded_activations)
        if found.sqnr_db < needed and found.max_error > np.finfo(np.float32).eps:
            raise InternalError(
                "compiled module departs from its quantized ONNX",
                where=f"output {name!r}",
                got=f"SQNR {found.sqnr_db:.1f} dB, needs {needed:.1f} dB",
                remedy="please report this model; --target reference may serve until it is fixed",
            )


def check_floor(accuracy: Accuracy, min_sqnr: float | None) -> None:
    """Hold the result to --min-sqnr.

    Raises:
        AccuracyError: when an output is further from the float model.
    """
    if min_sqnr is None or accuracy.worst_sqnr_db >= min_sqnr:
        return
    outputs = accuracy.module or accuracy.quantized
    name = min(outputs, key=lambda output: outputs[output].sqnr_db)
    raise AccuracyError(
        "accuracy is below --min-sqnr",
        where=f"output {name!r}",
        got=f"{accuracy.worst_sqnr_db:.2f} dB, asked for {min_sqnr:g} dB",
        remedy="use more bits, smaller blocks, or exclude the layers that `kbitc inspect` shows as largest",
    )
