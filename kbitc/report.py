"""The report of a compilation: what became of every weight, how close the result is, what it weighs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kbitc.quant.metrics import sqnr_db
from kbitc.quant.plan import PlanEntry
from kbitc.quant.scheme import ScaleCode, ScaleType
from kbitc.quant.tensor import QTensor, scale_shape, storage_bits

REPORT_VERSION = 1
FLOAT_BYTES = 4
CODES = ".codes"
SCALES = ".scales"
FACTORS = ".factors"


@dataclass(frozen=True)
class Fit:
    """How well a solver did on one weight, on its calibration inputs.

    Attributes:
        solver: its name.
        rtn_db: signal-to-noise ratio of the layer's output with round to nearest, dB; None without inputs.
        output_db: the same with this solver. Biases are not counted in either.
    """

    solver: str
    rtn_db: float | None = None
    output_db: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        found: dict[str, Any] = {"solver": self.solver}
        if self.rtn_db is not None and self.output_db is not None:
            found |= {"rtn_output_sqnr_db": round(self.rtn_db, 2), "output_sqnr_db": round(self.output_db, 2)}
        return found


@dataclass(frozen=True)
class WeightReport:
    """One weight after quantization.

    Attributes:
        entry: the decision.
        weights: number of weights.
        code_bytes: ceil(weights * bits / 8); 0 for a float weight.
        packed_bytes: the codes as they are stored: in a bundle in the kernels' layout, tile padding included.
        bits_per_weight: codes, scales and zero points over the number of weights, as they are stored: in a bundle,
            coded scales count as what they are decoded to: bytes (`/i4`), or plain scales.
        sqnr_db: of the weights themselves; None for a float weight.
        fit: how the solver did; None for a float weight.
    """

    entry: PlanEntry
    weights: int
    code_bytes: int
    packed_bytes: int
    bits_per_weight: float
    sqnr_db: float | None
    fit: Fit | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        return {
            **self.entry.as_json(),
            **({} if self.fit is None else self.fit.as_json()),
            "weights": self.weights,
            "code_bytes": self.code_bytes,
            "packed_bytes": self.packed_bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "weight_sqnr_db": None if self.sqnr_db is None else round(self.sqnr_db, 2),
        }


def weight_report(
    entry: PlanEntry, weight: npt.NDArray[np.float32], tensor: QTensor | None, fit: Fit | None = None
) -> WeightReport:
    """Count one weight; `weight` is its float form seen as [N, T, C]."""
    if tensor is None:
        return WeightReport(entry, weight.size, 0, FLOAT_BYTES * weight.size, 8.0 * FLOAT_BYTES, None)
    error = weight.astype(np.float64) - tensor.dequantize()
    quality = sqnr_db(float((weight.astype(np.float64) ** 2).sum()), float((error * error).sum()))
    size = tensor.code_bytes()
    return WeightReport(entry, weight.size, size, size, tensor.bits_per_weight(), quality, fit)


def with_packed_sizes(
    reports: Sequence[WeightReport], stored: Mapping[str, npt.NDArray[Any]]
) -> tuple[WeightReport, ...]:
    """The reports with what the weights take in a bundle.

    Args:
        reports: one a weight.
        stored: parameters of the module by name; the codes of a weight are called after one of its nodes.
    """
    return tuple(_as_stored(item, stored) for item in reports)


def _as_stored(item: WeightReport, stored: Mapping[str, npt.NDArray[Any]]) -> WeightReport:
    codes, scales, factors = (_part(item, stored, part) for part in (CODES, SCALES, FACTORS))
    if codes is not None:
        item = replace(item, packed_bytes=codes.nbytes)
    scheme = item.entry.scheme
    if scheme is not None and factors is not None:
        shape = item.entry.shape
        spare = (8 * factors.itemsize - scheme.scale_code.bits) * prod(scale_shape(shape, scheme))
        return replace(item, bits_per_weight=(storage_bits(shape, scheme) + spare) / item.weights)
    if scheme is None or scales is None or scales.dtype.kind != "f" or scheme.scale_code is ScaleCode.PLAIN:
        return item
    scale_type = ScaleType.F16 if scales.dtype == np.float16 else ScaleType.F32
    plain = replace(scheme, scale_code=ScaleCode.PLAIN, scale_type=scale_type)
    return replace(item, bits_per_weight=storage_bits(item.entry.shape, plain) / item.weights)


def _part(item: WeightReport, stored: Mapping[str, npt.NDArray[Any]], part: str) -> npt.NDArray[Any] | None:
    """The stored array of a weight that ends in `part`."""
    for name, array in stored.items():
        if name.endswith(part) and any(name.startswith(f"{node}.") for node in item.entry.nodes):
            return array
    return None


@dataclass(frozen=True)
class Report:
    """Everything a compilation found out; `report.json` of the bundle.

    Attributes:
        output: where the result lies.
        target: text form of the target; None for a quantized ONNX file.
        scheme: text form of the asked scheme, or float32.
        weights: one entry a weight.
        accuracy: comparison with the float model (`kbitc.passes.verify`), as plain data.
        layers: facts of the lowering, one a contraction: rule, declined rules and why.
        bytes: size of the parts of the result.
        seconds: wall time of each stage.
        planning: how widths were chosen; empty when they were given.
        calls: one entry a kernel call of the module: the layers it works for (`kbitc.bundle.profile`).
        compared: one entry a weight that `--never-slower` has compared with float.
    """

    output: str
    target: str | None
    scheme: str
    weights: tuple[WeightReport, ...]
    accuracy: Mapping[str, Any]
    layers: Sequence[Mapping[str, Any]] = ()
    bytes: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    planning: Mapping[str, Any] = field(default_factory=dict)
    calls: Sequence[Mapping[str, Any]] = ()
    compared: Sequence[Mapping[str, Any]] = ()

    @property
    def bits_per_weight(self) -> float:
        """Mean over all weights that were candidates, scales and zero points counted."""
        count = sum(item.weights for item in self.weights)
        return sum(item.bits_per_weight * item.weights for item in self.weights) / count if count else 0.0

    def as_json(self, *, timings: bool = True) -> dict[str, Any]:
        """Plain data for json.dumps; without timings equal compilations give equal data."""
        quantized = [item for item in self.weights if item.entry.scheme is not None]
        data = {
            "version": REPORT_VERSION,
            "target": self.target,
            "scheme": self.scheme,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "quantized_weights": len(quantized),
            "float_weights": len(self.weights) - len(quantized),
            "bytes": dict(self.bytes),
            "accuracy": dict(self.accuracy),
            "weights": [item.as_json() for item in self.weights],
            "layers": [dict(layer) for layer in self.layers],
            "planning": dict(self.planning),
            "calls": [dict(call) for call in self.calls],
            "compared": [dict(item) for item in self.compared],
        }
        if timings:
            data["output"] = self.output
            data["seconds"] = {name: round(value, 3) for name, value in self.seconds.items()}
        return data


def provenance(source: Any, options: str) -> dict[str, Any]:
    """Where a result comes from: no time and no path, so that equal inputs give equal bytes.

    Args:
        source: path of the model, or a model in memory.
        options: as JSON.
    """
    from kbitc.commands.crash import versions

    digest = name = None
    if isinstance(source, str | PathLike):
        with open(source, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = Path(source).name
    chosen = json.loads(options)
    return {"model": name, "model_sha256": digest, "options": chosen, "versions": versions()}
