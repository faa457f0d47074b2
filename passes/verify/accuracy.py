"""Three-way comparison: float model, quantized ONNX, compiled module, on the same samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.errors import AccuracyError, InternalError
from kbitc.graph.evaluate import Session
from kbitc.graph.functions import rounds_floats, without_rounding
from kbitc.graph.legality import float_operators
from kbitc.passes.carried import read_carried
from kbitc.quant.metrics import OutputAccuracy, compare

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Run = Callable[[Feeds], Mapping[str, Array]]
# The last bits of float32 sums of different order: no module is asked to agree better with its quantized ONNX.
LOWERING_CEILING_DB = 60.0
# 20 log10 2: see `needed_sqnr_db`.
TWO_DRAWS_DB = 6.02
#: Bytes of one model's outputs that are held for the comparison; the first batches are compared that fit.
HELD_BYTES = 1 << 28


@dataclass(frozen=True)
class Accuracy:
    """The comparison, output by output.

    Attributes:
        quantized: quantized ONNX against the float model, both in onnxruntime.
        module: compiled module against the float model; None when it cannot run here.
        lowering: compiled module against the quantized ONNX; None when it cannot run here.
        rounding: quantized ONNX against itself without the rounding of activations: the noise of that rounding.
        data: where the samples came from.
        exact: nothing but integers is computed, so the module must give the numbers of the quantized ONNX.
    """

    quantized: dict[str, OutputAccuracy]
    module: dict[str, OutputAccuracy] | None
    lowering: dict[str, OutputAccuracy] | None
    rounding: dict[str, OutputAccuracy]
    data: str
    exact: bool = False

    @property
    def worst_sqnr_db(self) -> float:
        """The smallest SQNR of any output against the float model."""
        outputs = self.module or self.quantized
        return min((item.sqnr_db for item in outputs.values()), default=float("inf"))

    def as_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        data: dict[str, Any] = {"data": self.data, "exact": self.exact}
        for field in ("quantized", "module", "lowering", "rounding"):
            outputs = getattr(self, field)
            data[field] = None if outputs is None else {name: item.as_json() for name, item in outputs.items()}
        return data


@dataclass(frozen=True)
class References:
    """Outputs on the samples, kept for the comparison with the module.

    Attributes:
        feeds: the samples.
        original: outputs of the float model.
        quantized: outputs of the quantized model.
        unrounded: outputs of the quantized model without the rounding of activations.
        data: where the samples came from.
        exact: the quantized model computes nothing but integers.
    """

    feeds: Sequence[Feeds]
    original: list[dict[str, Array]]
    quantized: list[dict[str, Array]]
    unrounded: list[dict[str, Array]]
    data: str
    exact: bool = False


def reference_runs(
    original: ir.Model, quantized: ir.Model, feeds: Sequence[Feeds], data: str, held: float = HELD_BYTES
) -> References:
    """Run the models in onnxruntime, one after the other so that only one is loaded at a time.

    Args:
        original, quantized: the float and the quantized model.
        feeds: samples; as many of the first as give `held` bytes of outputs are run.
        data: where they come from.
        held: bytes of one model's outputs.
    """
    floats = _run_all(original, feeds, held)
    if len(floats) < len(feeds):
        feeds, data = feeds[: len(floats)], f"{data}, compared on the first {len(floats)}"
    runs = floats, _run_all(quantized, feeds)
    exact = not float_operators(quantized)
    if rounds_floats(quantized):
        # Codes that are planned cannot be left out of the graph: the noise of all quantization bounds theirs. Those
        # of a model that is quantized already can.
        carried = read_carried(original)
        return References(feeds, *runs, runs[0] if carried is None else _run_all(carried.limited(), feeds), data, exact)
    plain = without_rounding(quantized)
    return References(feeds, *runs, runs[1] if plain is None else _run_all(plain, feeds), data, exact)


def _run_all(model: ir.Model, feeds: Sequence[Feeds], held: float = math.inf) -> list[dict[str, Array]]:
    session, outputs = Session(model), list[dict[str, Array]]()
    for feed in feeds:
        outputs.append(session.run(feed))
        held -= sum(array.nbytes for array in outputs[-1].values())
        if held <= 0:
            break
    return outputs


def measure(references: References, run: Run | None) -> Accuracy:
    """Compare; `run` calls the compiled module, None when this machine cannot."""
    quantized = compare(references.original, references.quantized)
    rounding = compare(references.unrounded, references.quantized)
    if run is None:
        return Accuracy(quantized, None, None, rounding, references.data, references.exact)
    results = [dict(run(feed)) for feed in references.feeds]
    module = compare(references.original, results)
    lowering = compare(references.quantized, results)
    return Accuracy(quantized, module, lowering, rounding, references.data, references.exact)


def needed_sqnr_db(rounding_db: float) -> float:
    """Least SQNR of the module against its quantized ONNX.

    Let w(x) be the quantized model with exact activations, and w(x) + a what onnxruntime makes of it with activations
    rounded to int8. The module adds its values in another order. Where an activation lies within the last bit of a
    float32 of the middle between two codes, it rounds the other way; a difference e before a step s grows to about
    sqrt(e s) behind it, and so to s itself within a few layers. So the module holds w(x) + b, where a and b are two
    draws of the same noise, somewhere between equal and independent. Whatever their correlation,
    |b - a| <= |a| + |b|, and the two have the same power: at most twice the amplitude of a.

    The noise a is measured, not modelled: the quantized ONNX is run once more with DynamicQuantize as the identity.
    It does not hold the error of the weights, which both sides share, and so the bound does not weaken with fewer
    bits. Rounding noise of the float model would be another number: quantized weights amplify it differently (PP-OCR's
    angle classifier with 3-bit weights on rendered lines: 31.6 dB in the quantized, 44.1 dB in the float model).

    Args:
        rounding_db: SQNR of the quantized ONNX against itself without the rounding of activations.

    Returns:
        dB; `LOWERING_CEILING_DB` where nothing is rounded.
    """
    return min(LOWERING_CEILING_DB, rounding_db - TWO_DRAWS_DB)


def check_lowering(accuracy: Accuracy) -> None:
    """Refuse a module that departs from the meaning of its quantized ONNX.

    Raises:
        InternalError: when lowering added more noise than `needed_sqnr_db` allows, or any where all is exact.
    """
    for name, found in (accuracy.lowering or {}).items():
        if accuracy.exact and found.max_error > 0:
            raise InternalError(
                "compiled module differs from its integer ONNX",
                where=f"output {name!r}",
                got=f"largest difference {found.max_error:g}, needs 0",
                remedy="please report this model; --target reference may serve until it is fixed",
            )
        needed = needed_sqnr_db(accuracy.rounding[name].sqnr_db)
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
