"""Every value of a static integer graph against the float operators between it and the integers in front of it.

The float graph is cut at each value that has codes: what is behind reads the numbers that the codes stand for, and the
weights are those that the levels stand for. So each value is compared with the exact result of the very numbers that
its integer form reads, and may differ by what is rounded there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph import ops
from kbitc.graph.evaluate import evaluate
from kbitc.options import Method
from kbitc.passes.allocate.proofs import output_scales
from kbitc.passes.allocate.survey import survey
from kbitc.passes.solve import solve_weights
from kbitc.quant.plan import QuantPlan
from kbitc.quant.static import INTEGER, StaticPlan
from kbitc.quant.tensor import QTensor

Array = npt.NDArray[Any]
#: A code is the nearest one: half a step. Multipliers of sums have 21 bits and codes 8, so that they move it by 2^-12.
HALF = 0.5 + 2.0**-12
#: int32 numbers in front of a code are 2^15 steps of their largest: they move it by less than another half.
WIDE = 1.0
#: Probabilities: half a code, an exponent off by 1/256 of an octave, and two logits off by half of 2^-10.
PROBABILITY = 0.5 + 255 * (2.0 ** (1 / 256) * np.exp(2.0**-10) - 1)
#: float32 evaluation of the reference, of the largest number.
FLOAT32 = 2.0**-16
#: Operators whose int32 numbers have the very step of the plan.
_KEPT_WIDE = frozenset(("LayerNormalization", "RMSNormalization", "Add", "Sub"))
_WIDE = frozenset(("LayerNormalization", "ReduceSum", "ReduceL2", "Div", "Sqrt", "Exp", "Reciprocal"))


def check_steps(original: ir.Model, made: ir.Model, plan: QuantPlan, feeds: Mapping[str, Array]) -> int:
    """Compare every value with codes, and the outputs; returns how many values were compared."""
    static = plan.static
    assert static is not None
    present = {value.name for node in made.graph for value in node.outputs}
    inputs = {value.name for value in original.graph.inputs}
    coded = [entry.value for entry in static.values if f"{entry.value}.q" in present]
    coded = [name for name in coded if name in inputs or _value(original, name).producer() is not None]
    kinds = {candidate.tensor: candidate.kind for candidate in survey(original)}
    tensors = solve_weights(original, plan, kinds, Method("rtn")).tensors
    wide = {
        entry.value: entry.codes.scale
        for entry in static.wides
        if f"{entry.value}.wide" in present and _maker(original, entry.value) in _KEPT_WIDE
    }
    found = evaluate(made, dict(feeds), [*(f"{name}.q" for name in coded), *(f"{name}.wide" for name in wide)])
    reads = {name: _numbers(static, name, found[f"{name}.q"]) for name in coded}
    finer = {name: np.asarray(found[f"{name}.wide"] * scale, np.float32) for name, scale in wide.items()}
    behind = _cut(original, static, tensors, kinds, coded, wide)
    _hold_constants(behind, made, static)
    given = {**feeds, **{f"{name}.read": array for name, array in reads.items()}}
    given |= {f"{name}.finer": array for name, array in finer.items()}
    known = {value.name for value in behind.graph.inputs}
    wanted = evaluate(behind, {name: array for name, array in given.items() if name in known})
    for name in coded:
        if name in inputs:
            continue
        codes = static.codes(name)
        low, high = (codes.scale * (end - codes.zero) for end in (0, codes.high))
        reference = np.clip(wanted[name], low, high)
        limit = codes.scale * _steps(original, name, coded) + _accumulator(original, static, name, tensors)
        worst = float(np.abs(reads[name] - reference).max())
        assert worst <= limit + FLOAT32 * max(abs(low), abs(high)), f"{name}: {worst / codes.scale:.4f} steps"
    for value in original.graph.outputs:
        name = value.name or ""
        if name in coded:
            np.testing.assert_allclose(found[name], reads[name], rtol=1e-6)
            continue
        limit = _accumulator(original, static, name, tensors) + FLOAT32 * float(np.abs(wanted[name]).max())
        limit += _wide_step(static, name)
        assert float(np.abs(found[name] - wanted[name]).max()) <= limit, name
    return len(coded)


def _value(model: ir.Model, name: str) -> ir.Value:
    found = (value for node in model.graph for value in node.outputs if value.name == name)
    return next(found, model.graph.inputs[0])


def _numbers(static: StaticPlan, name: str, codes: Array) -> Array:
    entry = static.codes(name)
    return np.asarray((codes.astype(np.float64) - entry.zero) * entry.scale, np.float32)


def _cut(
    original: ir.Model, static: StaticPlan, tensors: Mapping[str, QTensor], kinds: Mapping[str, str], coded: list[str],
    wide: Mapping[str, float],
) -> ir.Model:  # fmt: skip
    """The float graph with an input NAME.read for every value with codes, which is an output too; what reads int32
    numbers reads NAME.finer."""
    copy = original.clone()
    integer = {entry.node for entry in static.nodes if entry.form == INTEGER}
    for name, tensor in tensors.items():
        value = copy.graph.initializers.get(name)
        # A table's rows become codes as they are.
        if value is not None and value.const_value is not None and kinds[name] != "embedding":
            shape = tuple(int(size) for size in value.const_value.shape.numpy())
            held = ops.from_view(np.asarray(tensor.dequantize(), np.float32), kinds[name], shape)
            value.const_value = ir.Tensor(np.ascontiguousarray(held, np.float32), name=name)
    values = {value.name: value for value in copy.graph.inputs}
    values |= {value.name: value for node in copy.graph for value in node.outputs}
    finer = {entry.value for entry in static.wides}
    for name in wide:
        read = ir.Value(name=f"{name}.finer", type=ir.TensorType(ir.DataType.FLOAT), shape=values[name].shape)
        for user, index in tuple(values[name].uses()):
            if user.name in integer and (user.op_type == "Softmax" or user.outputs[0].name in finer):
                user.replace_input_with(index, read)
        if read.uses():
            copy.graph.inputs.append(read)
    for name in coded:
        value = values[name]
        read = ir.Value(name=f"{name}.read", type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)
        maker = value.producer()
        made_on_integers = maker is not None and maker.name in integer
        for user, index in tuple(value.uses()):
            if made_on_integers or user.name in integer:
                user.replace_input_with(index, read)
        if read.uses():
            copy.graph.inputs.append(read)
        if maker is not None and not value.is_graph_output():
            copy.graph.outputs.append(value)
    return copy


def _hold_constants(behind: ir.Model, made: ir.Model, static: StaticPlan) -> None:
    """Constant operands become what their codes stand for."""
    for name, value in behind.graph.initializers.items():
        held = made.graph.initializers.get(f"{name}.q")
        if held is not None and held.const_value is not None:
            value.const_value = ir.Tensor(_numbers(static, name, held.const_value.numpy()), name=name)


def _maker(model: ir.Model, name: str) -> str:
    node = _value(model, name).producer()
    return "" if node is None else node.op_type


def _behind(model: ir.Model, name: str, coded: list[str]) -> list[ir.Node]:
    """The nodes between a value and the values with codes in front of it."""
    found, rest = [], [_value(model, name)]
    while rest:
        node = rest.pop().producer()
        if node is not None and node not in found:
            found.append(node)
            rest += [item for item in node.inputs if item is not None and item.name not in coded]
    return found


def _steps(model: ir.Model, name: str, coded: list[str]) -> float:
    operators = {node.op_type for node in _behind(model, name, coded)}
    if "Softmax" in operators:
        return PROBABILITY
    return WIDE if operators & _WIDE else HALF


def _accumulator(model: ir.Model, static: StaticPlan, name: str, tensors: Mapping[str, QTensor]) -> float:
    """Half an accumulator step, which a bias is rounded to, of the contractions right in front of a value."""
    largest = 0.0
    for node in _behind(model, name, [entry.value for entry in static.values]):
        weight, _ = ops.weight_source(node) if node.op_type in ops.WEIGHT_USES else (None, "")
        source = node.inputs[0] if node.inputs else None
        if weight is not None and weight.name in tensors and source is not None and static.has_codes(source.name):
            scales = output_scales(static.codes(source.name), tensors[weight.name or ""])
            largest = max(largest, float(scales.max()))
    return largest / 2


def _wide_step(static: StaticPlan, name: str) -> float:
    """Two steps of an output that stays int32: its own rounding, and as much from its operands."""
    return next((2 * entry.codes.scale for entry in static.wides if entry.value == name), 0.0)
