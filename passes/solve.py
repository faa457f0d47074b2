"""Stage 6: every planned weight becomes a QTensor, a few layers at a time, and biases take over what the mean lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc import catalog
from kbitc.errors import UsageError
from kbitc.graph import edit, ops
from kbitc.options import EQUALIZERS, SOLVERS, Method
from kbitc.passes.calibrate.moments import BUDGET, Reader, in_groups, moments, readers
from kbitc.passes.calibrate.paired import Pair, Walks, paired_moments
from kbitc.passes.equalize import Setting, bias_correction
from kbitc.passes.solvers import rtn
from kbitc.quant.metrics import sqnr_db
from kbitc.quant.moments import InputMoments
from kbitc.quant.plan import QuantPlan
from kbitc.quant.tensor import QTensor
from kbitc.report import Fit, WeightReport, weight_report

FloatArray = npt.NDArray[np.float32]
Feeds = Mapping[str, npt.NDArray[Any]]
BIAS_CORRECTION = "bias_correction"
#: Equalizers that do nothing without calibration data.
NEED_DATA = ("awq", "norm_outliers", "smoothquant")
#: Parts into which `sequential` cuts the layers of a model, where it has so many.
PARTS = 128


@dataclass(frozen=True)
class Solved:
    """`model` is the float model with corrected biases; `tensors` and `fits` go by weight name."""

    model: ir.Model
    tensors: dict[str, QTensor]
    fits: dict[str, Fit]


def solve_weights(
    model: ir.Model,
    plan: QuantPlan,
    kinds: Mapping[str, str],
    method: Method,
    feeds: Sequence[Feeds] = (),
    progress: Callable[[str], None] = lambda text: None,
    memo: dict[str, InputMoments] | None = None,
    *,
    carried: Mapping[str, QTensor] = MappingProxyType({}),
) -> Solved:
    """Quantize every weight of the plan that has a scheme and elements.

    Args:
        model: canonical graph; it is not changed.
        plan: which weight gets which scheme.
        kinds: weight name -> the view that `kbitc.graph.ops` gives it.
        method: how.
        feeds: calibration batches; without them the solvers work from the weights alone.
        progress: told what is being done.
        memo: keeps the moments of the float model from one call to the next, for callers that solve several plans of
            one model on the same data; all of them stay in memory. Not used where the model is changed first.
        carried: weight name -> the levels that it came with, which are taken where the plan has their scheme. The
            biases of such a model belong to its levels: nothing equalizes or corrects it.
    """
    float_model = model
    method = replace(method, equalizers=()) if carried else method
    model = equalized(model, plan, kinds, method, feeds, progress)
    work = _Work(model, kinds, method, progress)
    nodes = {node.name: node for node in model.graph}  # what is inside a loop cannot be watched
    entries = [entry for entry in plan.quantized() if 0 not in entry.shape]
    schemes = {entry.tensor: entry.scheme for entry in entries}
    kept = {name for name, scheme in schemes.items() if name in carried and carried[name].scheme == scheme}
    work.tensors |= {name: carried[name] for name in kept}
    users = {
        entry.tensor: [nodes[name] for name in entry.nodes if name in nodes]
        for entry in entries
        if entry.tensor not in kept
    }
    watched = readers(users) if feeds else []
    rest = [name for name in schemes if name not in {reader.tensor for reader in watched} | kept]
    for name in rest:
        work.solve(name, schemes[name], None)
    memo = memo if model is float_model and not method.sequential else None
    for group, inputs in _watch(work, watched, feeds, memo):
        for reader in group:
            work.solve(reader.tensor, schemes[reader.tensor], inputs.get(reader.tensor))
            work.correct(reader, inputs.get(reader.tensor))
    edit.remove_dead(work.model)
    return Solved(work.model, {name: work.tensors[name] for name in schemes}, work.fits)


def equalized(
    model: ir.Model,
    plan: QuantPlan,
    kinds: Mapping[str, str],
    method: Method,
    feeds: Sequence[Feeds],
    progress: Callable[[str], None],
) -> ir.Model:
    """The model after the equalizers of the method; the same object when there are none but bias correction.

    Raises:
        UsageError: an equalizer needs calibration data and there are none.
    """
    names = [name for name in method.equalizers if name != BIAS_CORRECTION]
    missing = [name for name in names if name in NEED_DATA and not feeds]
    if missing:
        raise UsageError(f"{missing[0]} looks at activations", remedy="give --calibration DATA")
    copy = model.clone() if names else model
    edit.forget_names(copy)
    for name in names:
        progress(f"equalize: {name}")
        catalog.find(EQUALIZERS, name, "equalizer").equalize(Setting(copy, plan, kinds, feeds))
    return copy


def _watch(
    work: _Work, watched: Sequence[Reader], feeds: Sequence[Feeds], memo: dict[str, InputMoments] | None
) -> Iterator[tuple[list[Reader], dict[str, InputMoments]]]:
    """Groups of layers with the moments of their inputs: in the float model, or `sequential` as they will be."""
    sequential = work.method.sequential
    # Pairs are two moments, of two halves and of the whole.
    groups = in_groups(watched, BUDGET // 6, PARTS) if sequential else in_groups(watched)
    walks, firsts = Walks(feeds), _first_nodes(work.original, groups)
    for number, group in enumerate(groups, 1):
        work.progress(f"calibrate layers {number} of {len(groups)}")
        inputs = (
            {} if memo is None else {reader.tensor: memo[reader.tensor] for reader in group if reader.tensor in memo}
        )
        if sequential:
            work.pair(group, walks, firsts[number - 1])
            inputs = {name: pair.inputs for name, pair in work.pairs.items()}
        elif len(inputs) < len(group):
            inputs = moments(work.original, group, feeds)
        if memo is not None:
            memo.update(inputs)
        work.progress(f"solve layers {number} of {len(groups)}")
        yield group, inputs


def _first_nodes(model: ir.Model, groups: Sequence[Sequence[Reader]]) -> list[str]:
    """The name of the first node, in graph order, of each group and all groups behind it."""
    places = {node.name: index for index, node in enumerate(model.graph)}
    names = list(places)
    firsts: list[int] = []
    for group in reversed(groups):
        firsts.append(min([*firsts[-1:], *(places[node.name] for reader in group for node in reader.nodes)]))
    return [names[index] or "" for index in reversed(firsts)]


class _Work:
    """The weights solved so far and the model whose biases they correct."""

    def __init__(
        self, model: ir.Model, kinds: Mapping[str, str], method: Method, progress: Callable[[str], None]
    ) -> None:
        self.original, self.model = model, model.clone()
        edit.forget_names(self.model)
        self.kinds, self.method, self.progress = kinds, method, progress
        self.solver = catalog.find(SOLVERS, method.solver, "solver")
        self.nodes = {node.name: node for node in self.model.graph}
        self.tensors: dict[str, QTensor] = {}
        self.fits: dict[str, Fit] = {}
        self.pairs: dict[str, Pair] = {}

    def pair(self, group: Sequence[Reader], walks: Walks, first: str) -> None:
        """Look at the inputs of a group of layers, in the float model and as they are by now."""
        centred = BIAS_CORRECTION in self.method.equalizers
        self.pairs = paired_moments(self.original, self.running(), group, walks, first, centred=centred)

    def view(self, name: str) -> FloatArray:
        """A weight as f32 [N, T, C]."""
        weight = self.model.graph.initializers[name]
        return np.asarray(ops.to_view(np.asarray(edit.constant(weight)), self.kinds[name]), np.float32)

    def solve(self, name: str, scheme: Any, inputs: InputMoments | None) -> None:
        """Quantize one weight and note how well that went.

        Sums that were never negative stay so, as what takes their logarithm or root relies on: such a weight is rounded
        to the nearest levels, since other solvers make zeros negative where that lessens the error.
        """
        weight = self.view(name)
        positive = inputs is not None and inputs.never_negative(weight)
        if name in self.pairs and not positive:
            weight = self.pairs[name].target(weight)
        tensor = (rtn if positive else self.solver).solve(weight, scheme, inputs)
        self.tensors[name] = tensor
        plain = after = None
        if inputs is not None:
            signal = float(inputs.output_power(weight).sum())
            both = rtn.solve(weight, scheme, inputs), tensor
            old, new = (inputs.output_power(weight - each.dequantize()) for each in both)
            plain, after = sqnr_db(signal, float(old.sum())), sqnr_db(signal, float(new.sum()))
        self.fits[name] = Fit(self.method.solver, plain, after)

    def correct(self, reader: Reader, inputs: InputMoments | None) -> None:
        """Correct the bias behind the only node that reads a weight.

        Only what this weight's own rounding takes from the mean is given back. What comes in from earlier layers is
        theirs to correct: layers of one group are watched together and would each correct it once more. `sequential`
        sees what they left and corrects it too. Sums that were never negative are not made smaller.
        """
        if BIAS_CORRECTION not in self.method.equalizers or inputs is None or len(reader.nodes) != 1:
            return
        weight, tensor = self.view(reader.tensor), self.tensors[reader.tensor]
        pair = self.pairs.get(reader.tensor)
        amount = bias_correction.shift(weight, tensor, inputs) if pair is None else pair.shift(weight, tensor)
        if inputs.never_negative(weight):
            amount = np.maximum(amount, 0)
        if amount.any():
            bias_correction.add_to_bias(self.nodes[reader.nodes[0].name], amount)

    def running(self) -> ir.Model:
        """The model with the weights solved so far in the place of the float ones."""
        copy = self.model.clone()
        for name, tensor in self.tensors.items():
            value = copy.graph.initializers[name]
            shape = edit.static_shape(value) or ()
            array = ops.from_view(tensor.dequantize(), self.kinds[name], shape)
            value.const_value = ir.Tensor(np.ascontiguousarray(array), name=name)
        return copy


def account(solved: Solved, plan: QuantPlan, kinds: Mapping[str, str]) -> tuple[WeightReport, ...]:
    """The account of every weight."""
    reports = []
    for entry in plan.entries:
        weight = solved.model.graph.initializers[entry.tensor].const_value
        if weight is None or 0 in entry.shape:
            continue
        view = np.asarray(ops.to_view(weight.numpy(), kinds[entry.tensor]), np.float32)
        reports.append(weight_report(entry, view, solved.tensors.get(entry.tensor), solved.fits.get(entry.tensor)))
    return tuple(reports)
