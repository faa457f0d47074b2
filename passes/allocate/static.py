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
from kbitc.passes.allocate import forms
from kbitc.passes.allocate.forms import Form
from kbitc.passes.allocate.proofs import prove
from kbitc.quant.static import FLOAT, INTEGER, Codes, NodeEntry, Proof, StaticPlan, ValueEntry, codes_for
from kbitc.quant.stats import CalibrationStats, ValueStats
from kbitc.quant.tensor import QTensor

#: (statistics, number of codes) -> range.
Observe = Callable[[ValueStats, int], "tuple[float, float]"]
#: Codes of the values that a first or last layer reads, whatever --act-bits says: they have the fewest channels to
#: average errors over and every error passes through them (Esser et al., arXiv 1902.08153, section 3).
EDGE_BITS = 8
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
        keep_float: node name -> why it must stay float.
    """

    observe: Observe
    observer: str
    bits: int
    data: str
    keep_float: Mapping[str, str] = field(default_factory=dict)


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
    known = forms.survey(model, tensors, refused)
    surveyed = {node: _with_stats(node, form, stats, wishes) for node, form in known.items()}
    for _ in range(len(surveyed) + 1):
        decision = Decision(model, surveyed)
        codes = Ranges(model, decision, stats, wishes).all()
        proofs = {node: prove(node, decision, codes, tensors) for node in decision.integer}
        unsafe = {node: proof for node, proof in proofs.items() if proof is not None and not proof.holds}
        if not unsafe:
            break
        surveyed |= {
            node: Form(forms.NONE, reason=f"its accumulators could overflow int32: {proof.words}")
            for node, proof in unsafe.items()
        }
    entries = tuple(_entry(node, decision, proofs.get(node)) for node in model.graph)
    values = tuple(ValueEntry(value.name or "", codes[value][0], codes[value][1]) for value in codes)
    return StaticPlan(wishes.observer, wishes.data, values, entries)


def _with_stats(node: ir.Node, form: Form, stats: CalibrationStats, wishes: Wishes) -> Form:
    """No integer form where the user forbids it or a value was never seen, or was seen not finite."""
    if form.family in (forms.NONE, forms.TABLE, forms.BIAS):
        return form
    reason = wishes.keep_float.get(node.name or "")
    for value in (*form.inputs, *([form.output] if form.output is not None else [])):
        if edit.constant(value) is not None:
            continue
        seen = stats.values.get(value.name or "")
        if seen is None or not seen.count:
            reason = reason or f"calibration never saw {value.name}"
        elif seen.infinite:
            reason = reason or f"{value.name} is not finite on the calibration data"
    return form if reason is None else Form(forms.NONE, reason=reason)


class Decision:
    """Which nodes run on integers.

    Attributes:
        forms: the form of every node.
        integer: the nodes that run on integers, in graph order, tables and biases apart.
        readers: value -> integer nodes that read its codes.
        images: root -> its images that have codes, in graph order; the root itself is not among them.
    """

    def __init__(self, model: ir.Model, surveyed: Mapping[ir.Node, Form]) -> None:
        self.model = model
        self.forms = surveyed
        self.roots = {
            form.output: form.inputs[0]
            for form in surveyed.values()
            if form.family == forms.TABLE and form.output is not None
        }
        self.producers = {
            form.output: node
            for node, form in surveyed.items()
            if form.output is not None and form.family != forms.BIAS
        }
        self.producers |= {value: node for node in surveyed for value in node.outputs if value not in self.producers}
        self.integer: list[ir.Node] = []
        self._forward()
        self._backward()
        self.readers: dict[ir.Value, list[ir.Node]] = {}
        for node in self.integer:
            for value in surveyed[node].inputs:
                self.readers.setdefault(value, []).append(node)
        self.images: dict[ir.Value, list[ir.Value]] = {}
        for value, root in self.roots.items():
            if value in self.readers and self._made_on_integers(root):
                self.images.setdefault(root, []).append(value)

    def has_codes(self, value: ir.Value) -> bool:
        """Whether an integer node reads the value's codes, or they are needed for a table."""
        return value in self.readers or (value in self.images and not self.folded(value))

    def folded(self, root: ir.Value) -> bool:
        """Whether a root's only use as codes is one image that requantization can clip to."""
        found = self.images.get(root, [])
        node = self.producers.get(root)
        if node is None or root in self.readers or len(found) != 1:
            return False
        if self.forms[node].family not in forms.ACCUMULATES | {forms.ADD}:
            return False
        return _is_clip_chain(found[0], root)

    def _forward(self) -> None:
        chosen: set[ir.Node] = set()
        for node, form in self.forms.items():
            if form.family in (forms.NONE, forms.TABLE, forms.BIAS):
                continue
            always = form.family in (forms.CONTRACTION, forms.PRODUCT)
            if always or all(self._available(value, chosen) for value in form.inputs):
                chosen.add(node)
        self._chosen = chosen

    def _available(self, value: ir.Value, chosen: set[ir.Node]) -> bool:
        if edit.constant(value) is not None:
            return True
        return self.producers.get(self.roots.get(value, value)) in chosen

    def _made_on_integers(self, root: ir.Value) -> bool:
        return self.producers.get(root) in self._chosen

    def _backward(self) -> None:
        wanted: set[ir.Value] = set()
        kept = []
        for node in reversed(list(self.forms)):
            form = self.forms[node]
            if node not in self._chosen:
                continue
            made = {value for value in (form.output, *node.outputs) if value is not None}
            made |= {image for image, root in self.roots.items() if root in made}
            if form.family not in (forms.CONTRACTION, forms.PRODUCT) and not made & wanted:
                self._chosen.discard(node)
                continue
            wanted.update(form.inputs)
            kept.append(node)
        self.integer = kept[::-1]


def _is_clip_chain(value: ir.Value, root: ir.Value) -> bool:
    """Whether an image is made by Relu, Clip, Max and Min alone, one after the other."""
    while value is not root:
        node = value.producer()
        if node is None or node.op_type not in ("Relu", "Clip", "Max", "Min", "Identity"):
            return False
        sources = images.data_inputs(node)
        if len(sources) != 1:
            return False
        value = sources[0]
    return True


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
                array = edit.constant(value)
                if array is not None:
                    low, high = float(array.min()), float(array.max())
                    found[value] = (codes_for(low, high, EDGE_BITS), "the range of the constant")
        return found

    def _shared(self) -> dict[ir.Value, ir.Value]:
        """Value -> the value whose codes it must have."""
        shared: dict[ir.Value, ir.Value] = {}
        for node in self.decision.integer:
            form = self.decision.forms[node]
            if form.family in forms.KEEPS_CODES:
                shared |= dict.fromkeys(node.outputs, form.inputs[0])
        for node in self.decision.integer:
            form = self.decision.forms[node]
            if form.family != forms.CONCAT or form.output is None:
                continue
            for value in form.inputs:
                source = _last(shared, value)
                alone = all(edit.only_use(item) is not None for item in _chain(shared, value))
                if alone and edit.constant(source) is None and source.producer() is not None:
                    if source is not form.output and source not in shared:
                        shared[source] = form.output
        return shared

    def _observed(self, value: ir.Value) -> tuple[Codes, str]:
        """Codes of a value's own range; where only functions of it are read, without the parts where they are flat."""
        bits = EDGE_BITS if value in self.edges else self.wishes.bits
        stats = self.stats.values[value.name or ""]
        low, high = self.wishes.observe(stats, 1 << bits)
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
            made = images.function_of(image, value, self.opset)(numbers)
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
        if form.family == forms.CONTRACTION and not behind & set(node.outputs):
            found.update(form.inputs)
        if form.family in (forms.CONTRACTION, forms.PRODUCT) or behind & set(node.outputs):
            behind.update(value for value in node.inputs if value is not None)
    for node in decision.integer:
        if decision.forms[node].family == forms.CONTRACTION:
            found.update(value for value in decision.forms[node].inputs if value in inputs)
    return found


def _entry(node: ir.Node, decision: Decision, proof: Proof | None) -> NodeEntry:
    form = decision.forms[node]
    name, op_type = node.name or "", node.op_type
    if node in decision.integer:
        return NodeEntry(name, op_type, INTEGER, form.family, proof)
    if form.family == forms.NONE:
        return NodeEntry(name, op_type, FLOAT, form.reason)
    if form.family == forms.BIAS:
        inside = decision.producers.get(node.inputs[0] or node.outputs[0]) in decision.integer
        return NodeEntry(name, op_type, INTEGER if inside else FLOAT, "the bias of a contraction")
    if form.family == forms.TABLE:
        tabled = any(node.outputs[0] in found for found in decision.images.values())
        inner = not node.outputs[0].is_graph_output() and form.inputs[0] in decision.images
        if tabled or inner:
            return NodeEntry(name, op_type, INTEGER, f"a table or limits of {form.inputs[0].name}")
    return NodeEntry(name, op_type, FLOAT, "no integer node reads its codes, or it would read a float value")
