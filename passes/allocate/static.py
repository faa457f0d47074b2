"""Decide which nodes of a static graph run on integers and which codes each value has.

1. What has an integer form and reads codes that exist anyway runs on integers: a MatMul or Conv quantizes its float
   input, everything else must follow an integer node.
2. From the back: what no integer node reads as codes stays float, so that no value is rounded for a float reader alone.
3. Values with codes get the range that the observer gives; reshaped values share their source's codes, the operands of
   a Concat take those of the result where nothing else reads them.
4. A contraction whose int32 accumulators could overflow stays float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from kbitc.graph import edit, images
from kbitc.graph.integer_nonlinear import POWER_BITS, PROBABILITY_STEPS
from kbitc.passes.allocate import families, forms
from kbitc.passes.allocate.decision import Decision
from kbitc.passes.allocate.families import Form
from kbitc.passes.allocate.proofs import prove, rescalable
from kbitc.passes.allocate.ranged import with_ranges
from kbitc.quant.static import FLOAT, INTEGER, Codes, NodeEntry, Proof, StaticPlan, ValueEntry, codes_for
from kbitc.quant.stats import CalibrationStats, ValueStats
from kbitc.quant.tensor import QTensor

#: (statistics, number of codes) -> range.
Observe = Callable[[ValueStats, int], "tuple[float, float]"]
#: Codes of the values that a first or last layer reads, whatever --act-bits says: they have the fewest channels to
#: average errors over and every error passes through them (Esser et al., arXiv 1902.08153, section 3).
EDGE_BITS = 8
#: What a normalization reads and gives is so fine that the largest number seen is 2^15 steps: |x| <= 2^17 leaves room.
WIDE_PEAK_BITS = 15
#: Step of the int32 numbers that a softmax reads: exp changes by a factor of 1.001.
LOGIT_SCALE = 2.0**-10
_READS_LOGITS = frozenset((families.SOFTMAX, families.EXP))
#: Families whose input has a step of its own in the plan.
_READS_SCALED = frozenset((families.NORM, families.SOFTMAX, families.LENGTH))
#: The reason of codes that the model itself has.
OWN = "the model's own"
#: Why a node stays float whose result is rounded to steps far finer than its operands'.
STEEP = "its scales are too far apart for a fixed-point multiplier"
#: Numbers at which a function is sampled to find where it is flat.
_SAMPLES = 4097


@dataclass(frozen=True)
class Wishes:
    """What the user asks of activations.

    Attributes:
        observe: gives the range of a value.
        observer: its name.
        bits: of a code.
        data: where the statistics come from.
        integer_only: no float node may be left.
        keep_float: node name -> why it must stay float.
        ranges: value name -> the range that it gets in place of what `observe` says.
        carried: value name -> the codes that the model itself rounds it to; they come before every range.
    """

    observe: Observe
    observer: str
    bits: int
    data: str
    integer_only: bool = False
    keep_float: Mapping[str, str] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    carried: Mapping[str, Codes] = field(default_factory=dict)


def observable(model: ir.Model) -> list[str]:
    """Names of the values whose statistics a static plan may need: float results and inputs of the main graph."""
    inputs = [value.name for value in model.graph.inputs if value.dtype == ir.DataType.FLOAT]
    made = [value.name for node in model.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    return [name for name in (*inputs, *made) if name]


def plan_static(
    model: ir.Model,
    tensors: Mapping[str, QTensor],
    refused: Mapping[str, str],
    stats: CalibrationStats,
    wishes: Wishes,
) -> StaticPlan:
    """The plan of a static integer graph.

    Args:
        model: canonical graph.
        tensors: quantized weights by initializer name.
        refused: weight name -> why it stays float.
        stats: of the values that `observable` names.
        wishes: what the user asks for.
    """
    known = forms.survey(model, tensors, refused, integer_only=wishes.integer_only, carried=wishes.carried)
    surveyed = with_ranges(known, stats, wishes.carried, wishes.keep_float)
    for _ in range(len(surveyed) + 1):
        decision = Decision(model, surveyed, integer_only=wishes.integer_only, carried=wishes.carried)
        codes = Ranges(model, decision, stats, wishes).all()
        proofs = {node: prove(node, decision, codes, tensors) for node in decision.integer}
        unsafe = {
            node: f"its accumulators could overflow int32: {proof.words}"
            for node, proof in proofs.items()
            if proof is not None and not proof.holds
        }
        unsafe |= {node: STEEP for node in decision.integer if not rescalable(node, decision, codes, tensors)}
        if not unsafe:
            break
        surveyed |= {node: Form(families.NONE, reason=reason) for node, reason in unsafe.items()}
    entries = tuple(_entry(node, decision, proofs.get(node)) for node in model.graph)
    values = tuple(ValueEntry(value.name or "", codes[value][0], codes[value][1]) for value in codes)
    wides = wide_entries(decision, stats)
    return StaticPlan(wishes.observer, wishes.data, values, entries, wides, wishes.integer_only, wishes.carried)


def wide_entries(decision: Decision, stats: CalibrationStats) -> tuple[ValueEntry, ...]:
    """The steps of the values that are kept as int32: of what a normalization reads and gives, and of wide sums."""
    found: dict[str, ValueEntry] = {}
    logits: set[ir.Value] = set()
    for node in reversed(decision.integer):
        form = decision.forms[node]
        if form.family in _READS_LOGITS or (node in decision.wide and form.output in logits):
            logits.update(form.inputs)
        ends = [form.output] if node in decision.wide or form.family in families.WIDE - {families.SCALE} else []
        ends += [form.inputs[0]] if form.family in _READS_SCALED else []
        for value in ends:
            if value is None or value.name in found or edit.constant(value) is not None:
                continue
            seen = stats.values[value.name or ""]
            bits = POWER_BITS if form.family == families.EXP and value is form.output else WIDE_PEAK_BITS
            peak = max(abs(seen.low), abs(seen.high)) or 1.0
            scale = LOGIT_SCALE if value in logits else peak / (1 << bits)
            reason = "an exponent" if value in logits else f"{peak:.6g} is 2^{bits} steps"
            found[value.name or ""] = ValueEntry(value.name or "", Codes(scale, 0, 32), reason)
    return tuple(found.values())


class Ranges:
    """The codes of every value that has some, and why."""

    def __init__(self, model: ir.Model, decision: Decision, stats: CalibrationStats, wishes: Wishes) -> None:
        self.decision, self.stats, self.wishes = decision, stats, wishes
        self.opset = model.graph.opset_imports.get("", 21)
        self.edges = _edge_values(model, decision) if wishes.bits < EDGE_BITS else set[ir.Value]()

    def all(self) -> dict[ir.Value, tuple[Codes, str]]:
        """Value -> (codes, reason), in graph order."""
        found: dict[ir.Value, tuple[Codes, str]] = {}
        shared = self._shared()
        values = [*self.decision.model.graph.inputs, *(v for node in self.decision.forms for v in node.outputs)]
        for value in values:
            if not self.decision.has_codes(value):
                continue
            source = _last(shared, value)
            if source in found:
                found[value] = (found[source][0], f"as {source.name}")
            else:
                found[value] = self._observed(source)
                if source is not value:
                    found[value] = (found[value][0], f"as {source.name}: {found[value][1]}")
        for node in self.decision.integer:
            for value in self.decision.forms[node].inputs:
                if edit.constant(value) is not None and value not in found:
                    found[value] = self._observed(value)
        return found

    def _shared(self) -> dict[ir.Value, ir.Value]:
        """Value -> the value whose codes it must have."""
        shared: dict[ir.Value, ir.Value] = {}
        for node in self.decision.integer:
            form = self.decision.forms[node]
            if form.family in families.KEEPS_CODES:
                shared |= dict.fromkeys(node.outputs, form.inputs[0])
        for node in self.decision.integer:
            form = self.decision.forms[node]
            if form.family != families.CONCAT or form.output is None:
                continue
            for value in form.inputs:
                source = _last(shared, value)
                alone = all(edit.only_use(item) is not None for item in _chain(shared, value))
                alone = alone and source.name not in self.wishes.carried
                if alone and edit.constant(source) is None and source.producer() is not None:
                    if source is not form.output and source not in shared:
                        shared[source] = form.output
        return shared

    def _observed(self, value: ir.Value) -> tuple[Codes, str]:
        """Codes of a value's own range; where only functions of it are read, without the parts where they are flat."""
        if value.name in self.wishes.carried:
            return self.wishes.carried[value.name or ""], OWN
        maker = self.decision.producers.get(value)
        if maker is not None and self.decision.forms[maker].family == families.SOFTMAX:
            return Codes(float(np.float32(1 / PROBABILITY_STEPS)), 0), "probabilities"
        bits = EDGE_BITS if value in self.edges else self.wishes.bits
        array = edit.constant(value)
        if array is not None:
            return codes_for(float(array.min()), float(array.max()), EDGE_BITS), "the range of the constant"
        stats = self.stats.values[value.name or ""]
        low, high = self.wishes.ranges.get(value.name or "") or self.wishes.observe(stats, 1 << bits)
        reason = f"{self.wishes.observer} of {stats.count} numbers in [{stats.low:.6g}, {stats.high:.6g}]"
        if value in self.edges:
            reason += f"; {EDGE_BITS} bits: read by the first or last layer"
        if value in self.decision.images and value not in self.decision.readers:
            trimmed = self._trim(value, low, high, bits)
            if trimmed != (low, high):
                low, high = trimmed
                reason += "; without the flat ends of its functions"
        return codes_for(low, high, bits), reason

    def _trim(self, value: ir.Value, low: float, high: float, bits: int) -> tuple[float, float]:
        """The part of [low, high] outside which all images stay within half a code of their value at its end."""
        numbers = np.linspace(min(low, 0.0), max(high, 0.0), _SAMPLES).astype(np.float32)
        first, last = 0, _SAMPLES - 1
        starts, ends = [], []
        for image in self.decision.images[value]:
            made = images.function_of(image, value, self.opset, self.wishes.carried)(numbers)
            step = (float(made.max()) - float(made.min())) / ((1 << bits) - 1)
            starts.append(_flat(made, step / 2))
            ends.append(last - _flat(made[::-1], step / 2))
        first, last = min(starts, default=first), max(ends, default=last)
        return (float(numbers[first]), float(numbers[last])) if first < last else (low, high)


def _flat(made: images.FloatArray, tolerance: float) -> int:
    """The last index up to which all numbers stay within the tolerance of the number there."""
    highest, lowest = np.maximum.accumulate(made), np.minimum.accumulate(made)
    within = (highest - made <= tolerance) & (made - lowest <= tolerance)
    return int(np.argmin(within)) - 1 if not within.all() else len(made) - 1


def _last(shared: Mapping[ir.Value, ir.Value], value: ir.Value) -> ir.Value:
    return _chain(shared, value)[-1]


def _chain(shared: Mapping[ir.Value, ir.Value], value: ir.Value) -> list[ir.Value]:
    chain = [value]
    while chain[-1] in shared:
        chain.append(shared[chain[-1]])
    return chain


def _edge_values(model: ir.Model, decision: Decision) -> set[ir.Value]:
    """What the first and last contractions read: those fed by a graph input, and those from which no other follows."""
    found: set[ir.Value] = set()
    inputs = set(model.graph.inputs)
    behind: set[ir.Value] = set()  # values on which a later contraction depends
    for node in reversed(list(model.graph)):
        form = decision.forms[node]
        if form.family == families.CONTRACTION and not behind & set(node.outputs):
            found.update(form.inputs)
        if form.family in (families.CONTRACTION, families.PRODUCT) or behind & set(node.outputs):
            behind.update(value for value in node.inputs if value is not None)
    for node in decision.integer:
        if decision.forms[node].family == families.CONTRACTION:
            found.update(value for value in decision.forms[node].inputs if value in inputs)
    return found


def _entry(node: ir.Node, decision: Decision, proof: Proof | None) -> NodeEntry:
    form = decision.forms[node]
    name, op_type = node.name or "", node.op_type
    if node in decision.integer:
        return NodeEntry(name, op_type, INTEGER, form.family, proof)
    if form.family == families.NONE:
        return NodeEntry(name, op_type, FLOAT, form.reason)
    if form.family == families.BIAS:
        inside = decision.producers.get(node.inputs[0] or node.outputs[0]) in decision.integer
        return NodeEntry(name, op_type, INTEGER if inside else FLOAT, "the bias of a contraction")
    if form.family == families.TABLE:
        tabled = any(node.outputs[0] in found for found in decision.images.values())
        inner = not node.outputs[0].is_graph_output() and form.inputs[0] in decision.images
        if tabled or inner:
            return NodeEntry(name, op_type, INTEGER, f"a table or limits of {form.inputs[0].name}")
    return NodeEntry(name, op_type, FLOAT, "no integer node reads its codes, or it would read a float value")
