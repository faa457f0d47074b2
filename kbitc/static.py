"""Stage 5 for activations: calibrate, and plan which nodes run on integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from kbitc.errors import UsageError
from kbitc.options import CompileOptions
from kbitc.quant.plan import QuantPlan
from kbitc.quant.tensor import QTensor
from kbitc.report import WeightReport

if TYPE_CHECKING:
    import onnx_ir as ir


class Samples(Protocol):
    """A canonical model and the data to calibrate it with."""

    @property
    def original(self) -> ir.Model:
        """The model."""
        ...

    @property
    def calibration(self) -> Any:
        """As the user gave it; see `kbitc.importer.feeds.open_batches`."""
        ...


def plan_static(
    samples: Samples, plan: QuantPlan, tensors: Mapping[str, QTensor], weights: tuple[WeightReport, ...],
    options: CompileOptions,
) -> tuple[QuantPlan, tuple[WeightReport, ...]]:  # fmt: skip
    """The plan with codes for activations, and the account of the weights under that plan.

    Raises:
        UsageError: there are no calibration data, or no such observer.
        CalibrationError: the data do not fit the model.
    """
    from kbitc.importer.feeds import open_batches
    from kbitc.passes.allocate.activations import plan_activations

    if options.scheme is None:
        return plan, weights
    if samples.calibration is None:
        raise UsageError("--activations static needs samples", remedy="give --calibration DATA, or use dynamic")
    batches = open_batches(samples.original, samples.calibration)
    planned = plan_activations(
        samples.original,
        plan,
        tensors,
        batches,
        observer=options.observer,
        bits=options.act_bits,
        integer_only=options.integer_only,
    )
    entries = {entry.tensor: entry for entry in planned.entries}
    return planned, tuple(replace(item, entry=entries[item.entry.tensor]) for item in weights)
