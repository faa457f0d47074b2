"""Stage 5 for activations: statistics of the data, then the plan of a static integer graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy.typing as npt
import onnx_ir as ir

from kbitc import catalog
from kbitc.graph import ops
from kbitc.importer.batches import Batches
from kbitc.passes.allocate.measured import BATCHES, least_noise
from kbitc.passes.allocate.static import OWN, Wishes, observable, plan_static
from kbitc.passes.calibrate.collect import cached
from kbitc.passes.calibrate.moments import fixed_sample
from kbitc.quant.plan import FLOAT, UINT8, PlanEntry, QuantPlan
from kbitc.quant.static import INTEGER, Codes, StaticPlan
from kbitc.quant.stats import CalibrationStats, ValueStats
from kbitc.quant.tensor import QTensor

OBSERVERS = "kbitc.passes.observers"
Feeds: TypeAlias = Mapping[str, npt.NDArray[Any]]
Range: TypeAlias = tuple[float, float]
Ranges: TypeAlias = Mapping[str, Range]


def plan_activations(
    model: ir.Model,
    plan: QuantPlan,
    tensors: Mapping[str, QTensor],
    batches: Batches | None,
    *,
    observer: str,
    bits: int,
    integer_only: bool = False,
    carried: Mapping[str, Codes] = MappingProxyType({}),
    watched: ir.Model | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> QuantPlan:
    """The plan with codes for activations; weights that no integer node reads keep float activations.

    Args:
        model: canonical graph.
        plan: of the weights; entries whose activation is "uint8" may run on integers.
        tensors: quantized weights by initializer name.
        batches: calibration data; None leaves float what `carried` gives no codes to.
        observer: name of the observer.
        bits: of an activation.
        integer_only: no float node may be left.
        carried: value name -> the codes that the model itself rounds it to.
        watched: the model that calibration runs, which computes the same values; None for `model`.
        progress: hears how far it is.

    Raises:
        UsageError: there is no such observer.
        CalibrationError: the data do not fit the model.
    """
    module = catalog.find(OBSERVERS, observer, "observer")
    watched = watched or model
    stats = CalibrationStats() if batches is None else cached(watched, observable(model), batches, progress)
    chosen = {entry.tensor for entry in plan.quantized() if entry.activation == UINT8}
    refused = {entry.tensor: entry.reason for entry in plan.entries if entry.tensor not in chosen}
    data = "the model" if batches is None else f"{stats.batches} batches"
    wishes = Wishes(module.observe, OWN if batches is None else observer, bits, data, integer_only, carried=carried)
    known = {name: tensors[name] for name in chosen}

    def planned(ranges: Ranges) -> StaticPlan:
        return plan_static(model, known, refused, stats, replace(wishes, ranges=ranges))

    static = planned({})
    if batches is not None and hasattr(module, "candidates"):
        feeds = fixed_sample(batches, BATCHES)
        offered = _candidates(module.candidates, static, stats)
        static = planned(measured_ranges(watched, planned, offered, feeds, progress))
    return QuantPlan(tuple(_settled(model, entry, static) for entry in plan.entries), static)


def measured_ranges(
    model: ir.Model, planned: Callable[[Ranges], StaticPlan], candidates: Mapping[str, list[Range]],
    feeds: Sequence[Feeds], progress: Callable[[str], None] = lambda text: None,
) -> Ranges:  # fmt: skip
    """Value -> that one of its candidates which does least to the outputs, where it is not the first.

    Args:
        model: canonical graph.
        planned: the plan with these ranges of values.
        candidates: value -> ranges to choose from, in order.
        feeds: samples.
        progress: hears how far it is.
    """
    turns = range(max(map(len, candidates.values()), default=0))
    plans = [planned({name: every[min(turn, len(every) - 1)] for name, every in candidates.items()}) for turn in turns]
    offers = {name: [plans[turn].codes(name) for turn in range(len(every))] for name, every in candidates.items()}
    best = least_noise(model, offers, feeds, progress)
    return {name: candidates[name][index] for name, index in best.items() if index}


def _candidates(
    offered: Callable[[ValueStats, int], list[Range]], static: StaticPlan, stats: CalibrationStats
) -> dict[str, list[Range]]:
    """The ranges to choose from of each value that has one of its own."""
    own = [entry for entry in static.values if entry.reason.startswith(static.observer)]
    return {entry.value: offered(stats.values[entry.value], 1 << entry.codes.bits) for entry in own}


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
