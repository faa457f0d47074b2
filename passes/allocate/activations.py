"""Stage 5 for activations: statistics of the data, then the plan of a static integer graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from kbitc import catalog
from kbitc.graph import ops
from kbitc.importer.batches import Batches
from kbitc.passes.allocate.static import Wishes, observable, plan_static
from kbitc.passes.calibrate.collect import cached
from kbitc.quant.plan import FLOAT, UINT8, PlanEntry, QuantPlan
from kbitc.quant.static import INTEGER, StaticPlan
from kbitc.quant.tensor import QTensor

OBSERVERS = "kbitc.passes.observers"


def plan_activations(
    model: ir.Model,
    plan: QuantPlan,
    tensors: Mapping[str, QTensor],
    batches: Batches,
    *,
    observer: str,
    bits: int,
    integer_only: bool = False,
) -> QuantPlan:
    """The plan with codes for activations; weights that no integer node reads keep float activations.

    Args:
        model: canonical graph.
        plan: of the weights; entries whose activation is "uint8" may run on integers.
        tensors: quantized weights by initializer name.
        batches: calibration data.
        observer: name of the observer.
        bits: of an activation.
        integer_only: no float node may be left.

    Raises:
        UsageError: there is no such observer.
        CalibrationError: the data do not fit the model.
    """
    observe = catalog.find(OBSERVERS, observer, "observer").observe
    stats = cached(model, observable(model), batches)
    chosen = {entry.tensor for entry in plan.quantized() if entry.activation == UINT8}
    refused = {entry.tensor: entry.reason for entry in plan.entries if entry.tensor not in chosen}
    wishes = Wishes(observe, observer, bits, f"{stats.batches} batches", integer_only)
    static = plan_static(model, {name: tensors[name] for name in chosen}, refused, stats, wishes)
    return QuantPlan(tuple(_settled(model, entry, static) for entry in plan.entries), static)


def _settled(model: ir.Model, entry: PlanEntry, static: StaticPlan) -> PlanEntry:
    """The entry with the activation that its nodes got."""
    if entry.activation != UINT8:
        return entry
    found = {item.node: item for item in static.nodes}
    users = [found[node] for node in entry.nodes if node in found and found[node].op_type in ops.WEIGHT_USES]
    declined = next((item.reason for item in users if item.form != INTEGER), None)
    if not users:
        declined = "no node of the main graph reads it"
    return entry if declined is None else replace(entry, activation=FLOAT, reason=f"float activations: {declined}")
