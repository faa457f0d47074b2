"""`--never-slower`: which quantized weights make their layers slower than float, so that they stay float.

The whole model is built twice, quantized and float, and every layer is compared at its real shapes: measured where
this machine runs the target, predicted by the cost model (`kbitc.targets.costs`) where it does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from kbitc.bundle.profile import Clock, LayerTimes, clock_of, profile
from kbitc.quant.plan import PlanEntry, QuantPlan, read_plan

if TYPE_CHECKING:
    import onnx_ir as ir

    from kbitc.targets.target import Target

    Feeds = Mapping[str, Any]

Compared: TypeAlias = "tuple[Comparison, ...]"
QUANTIZED, FLOAT_BUILD = "quantized", "float"
ROUNDS = 20
THREADS = 1


@dataclass(frozen=True)
class Comparison:
    """The layers of one weight, quantized and float.

    Attributes:
        entry: what the plan made of the weight.
        seconds: of its layers, quantized; with what quantizes their activations.
        float_seconds: of its layers in the float build.
        slower: whether the weight stays float.
        measured: whether both times were measured; else predicted.
    """

    entry: PlanEntry
    seconds: float
    float_seconds: float
    slower: bool
    measured: bool

    @property
    def reason(self) -> str:
        """What the plan says of a weight that stays float."""
        times = f"{1e6 * self.seconds:.1f} us as {self.entry.scheme}, {1e6 * self.float_seconds:.1f} us as float"
        return f"slower than float: {times}, {'measured' if self.measured else 'predicted'}"

    def as_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        return {
            "tensor": self.entry.tensor, "nodes": list(self.entry.nodes), "scheme": str(self.entry.scheme),
            "microseconds": round(1e6 * self.seconds, 2), "float_microseconds": round(1e6 * self.float_seconds, 2),
            "measured": self.measured, "kept_float": self.slower,
        }  # fmt: skip


def compare(
    original: ir.Model, quantized: ir.Model, plan: QuantPlan, target: Target, feeds: Feeds, given: Path | None = None,
    clock: Clock | None = None,
) -> tuple[Comparison, ...]:  # fmt: skip
    """Build a model quantized and float, and compare the layers of every quantized weight.

    Args:
        original: canonical float graph.
        quantized: the same after the rewrite.
        plan: what was carried out.
        target: what is compiled for.
        feeds: one set of inputs; gives the shapes.
        given: plan file of the user. What it names is not asked about: a plan goes first, so that a written plan is
            carried out again.
        clock: seconds; None takes the one of `kbitc.bundle.profile.clock_of`.
    """
    from kbitc.targets.target import host_runs

    models = {QUANTIZED: quantized, FLOAT_BUILD: original}
    here = host_runs(target) is None
    found = _measured(models, target, feeds, clock) if here else _predicted(models, target, feeds)
    named = {request.tensor for request in read_plan(given)} if given is not None else set()
    asked = QuantPlan(tuple(entry for entry in plan.entries if entry.tensor not in named))
    return judge(asked, found[QUANTIZED], found[FLOAT_BUILD], measured=here)


def _measured(
    models: Mapping[str, ir.Model], target: Target, feeds: Feeds, clock: Clock | None
) -> Mapping[str, Sequence[LayerTimes]]:
    from kbitc.bundle.feeds import check_feeds
    from kbitc.bundle.runtime import load_built
    from kbitc.targets.build import build

    timed = {}
    for name, model in models.items():
        built = build(model, target)
        module = load_built(built.library, built.weights, built.inputs, built.outputs, threads=THREADS)
        report = {"layers": built.layers, "calls": built.calls}
        timed[name] = (module, module.device_arguments(check_feeds(module.inputs, feeds)), report)
    return profile(timed, ROUNDS, clock or clock_of(THREADS))


def _predicted(models: Mapping[str, ir.Model], target: Target, feeds: Feeds) -> Mapping[str, Sequence[LayerTimes]]:
    """What the cost model says; layers of which it knows nothing are left out."""
    from kbitc.targets.costs import predicted, sizes_of
    from kbitc.targets.lower.emitter import lower

    found: dict[str, list[LayerTimes]] = {}
    for name, model in models.items():
        lowered = lower(model, target)
        sizes = sizes_of(lowered.inputs, feeds)
        costs = [(layer, predicted(layer, target.name, sizes)) for layer in lowered.layers]
        found[name] = [
            LayerTimes(layer["name"], layer["rule"], True, [cost / 1e6]) for layer, cost in costs if cost is not None
        ]
    return found


def judge(
    plan: QuantPlan, quantized: Sequence[LayerTimes], floats: Sequence[LayerTimes], *, measured: bool
) -> tuple[Comparison, ...]:
    """Compare the layers of every quantized weight that both builds have."""
    sides = [{layer.name: layer for layer in layers if layer.contraction} for layers in (quantized, floats)]
    made = []
    for entry in plan.quantized():
        ours, theirs = (_of_nodes(side, entry.nodes) for side in sides)
        if ours is not None and theirs is not None:
            slower = ours.slower_than(theirs)
            made.append(Comparison(entry, ours.median, theirs.median, slower, measured))
    return tuple(made)


def _of_nodes(layers: Mapping[str, LayerTimes], nodes: Sequence[str]) -> LayerTimes | None:
    """The layers of some nodes as one; None when one of them was not measured."""
    found = [layers.get(f"{node}.channels_last") or layers.get(node) for node in nodes]
    there = [layer for layer in found if layer is not None]
    if not there or len(there) < len(nodes):
        return None
    runs = [sum(seconds) for seconds in zip(*(layer.seconds for layer in there), strict=True)]
    return LayerTimes(there[0].name, there[0].rule, True, runs)
