"""Stage 5 for activations: calibrate, and plan which nodes run on integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from kbitc.errors import UsageError
from kbitc.options import DEFAULT_FORM, CompileOptions
from kbitc.quant.plan import UINT8, QuantPlan
from kbitc.quant.tensor import QTensor
from kbitc.report import WeightReport

if TYPE_CHECKING:
    import onnx_ir as ir

    from kbitc.passes.carried import Carried
    from kbitc.targets.target import Target


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

    @property
    def carried(self) -> Carried | None:
        """What the model itself says of ranges and levels."""
        ...


def find_carried(model: ir.Model, options: CompileOptions, target: Target) -> Carried | None:
    """What an already quantized model carries, where the options leave it to the model; None without.

    Nobody has to ask for it on a CPU. Budgets choose widths anew, and other formats hold float activations.
    """
    from kbitc.passes.carried import read_carried

    chooses = options.scheme is None or options.budget.limits_plan or options.form != DEFAULT_FORM
    if not options.own_ranges or chooses or options.speed.never_slower:
        return None
    if options.activation != UINT8 and target.device != "cpu":
        return None
    return read_carried(model)


def plan_static(
    samples: Samples, plan: QuantPlan, tensors: Mapping[str, QTensor], weights: tuple[WeightReport, ...],
    options: CompileOptions, progress: Callable[[str], None] = lambda text: None,
) -> tuple[QuantPlan, tuple[WeightReport, ...]]:  # fmt: skip
    """The plan with codes for activations, and the account of the weights under that plan.

    Raises:
        UsageError: there are neither calibration data nor ranges in the model, or no such observer.
        CalibrationError: the data do not fit the model.
    """
    from kbitc.importer.feeds import open_batches
    from kbitc.passes.allocate.activations import plan_activations

    if options.scheme is None:
        return plan, weights
    carried = samples.carried
    if samples.calibration is None and (carried is None or options.integer_only):
        raise UsageError("--activations static needs samples", remedy="give --calibration DATA, or use dynamic")
    static = options.activation == UINT8 and samples.calibration is not None
    batches = open_batches(samples.original, samples.calibration) if static else None
    planned = plan_activations(
        samples.original,
        plan,
        tensors,
        batches,
        observer=options.observer,
        bits=options.act_bits,
        integer_only=options.integer_only,
        carried={} if carried is None else carried.codes,
        watched=None if carried is None else carried.limited(),
        progress=progress,
    )
    entries = {entry.tensor: entry for entry in planned.entries}
    return planned, tuple(replace(item, entry=entries[item.entry.tensor]) for item in weights)
