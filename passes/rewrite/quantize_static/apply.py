"""Walks the graph in order, lets each family write its integer form, and joins integers and floats.

An integer node's result becomes codes where an integer node reads it, and float where a float node or an output of the
graph does: by DequantizeLinear of the codes, or, where nothing reads codes, of the int32 accumulator itself, which
saves one rounding. Relu and Clip behind a contraction, product or sum become limits of its requantization.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from kbitc.errors import UnsupportedError
from kbitc.graph import edit, images, legality
from kbitc.passes.allocate import families, forms
from kbitc.passes.allocate.decision import Decision
from kbitc.passes.allocate.ranged import NO_RANGE
from kbitc.passes.rewrite.quantize_static import contraction, elementwise, movement, pooling, wide
from kbitc.passes.rewrite.quantize_static.builder import F32, U8, Builder, Sums
from kbitc.quant.static import StaticPlan
from kbitc.quant.tensor import QTensor

_SUMS: dict[str, Callable[[Builder, ir.Node], Sums]] = {
    families.CONTRACTION: contraction.contraction,
    families.PRODUCT: contraction.product,
    families.MUL: elementwise.mul,
    families.MEAN: pooling.mean,
    families.AVERAGE: pooling.average,
    families.NORM: wide.norm,
    families.SUM: wide.total,
    families.LENGTH: wide.length,
    families.ROOT: wide.root,
    families.QUOTIENT: wide.quotient,
    families.SHIFT: wide.shift,
    families.EXP: wide.exp,
    families.SCALE: wide.scale,
}
#: Numbers between two codes at which a limited value is compared with its limits.
_SAMPLES = 1025


def quantize_static(model: ir.Model, plan: StaticPlan, tensors: Mapping[str, QTensor]) -> list[str]:
    """Write the integer form of a plan.

    Args:
        model: changed in place; the graph that the plan was made for, or a copy of it.
        plan: from `kbitc.passes.allocate.static.plan_static`.
        tensors: quantized weights by initializer name; those that integer nodes read vanish from the graph.

    Returns:
        Names of the kbitc functions that the graph now needs.
    """
    surveyed = _as_planned(model, plan, tensors)
    decision = Decision(model, surveyed, integer_only=plan.integer_only, carried=plan.carried)
    builder = Builder(model, plan, decision, tensors)
    for node in builder.decision.integer:
        _rewrite(builder, node)
    for value in (*builder.codes, *builder.sums):
        root = builder.decision.base(value)
        if edit.constant(value) is None and builder.decision.producers.get(root) in builder.decision.integer:
            _leave(builder, value)
    edit.remove_dead(model)
    _round_carried(builder)
    edit.name_nodes(model)
    if plan.integer_only:
        _refuse_floats(model, plan)
    return sorted(builder.needed)


def _as_planned(model: ir.Model, plan: StaticPlan, tensors: Mapping[str, QTensor]) -> dict[ir.Node, families.Form]:
    """The form of every node; none where the plan keeps it float."""
    kept = {entry.node: entry.reason for entry in plan.nodes if entry.form != "integer"}
    free = (families.TABLE, families.BIAS, families.NONE)
    found = forms.survey(model, tensors, {}, integer_only=plan.integer_only, carried=plan.carried)
    for node, form in found.items():
        reason = kept.get(node.name or "")
        if reason is not None and (form.family not in free or reason == NO_RANGE):
            found[node] = families.Form(families.NONE, reason=reason)
    return found


def _rewrite(builder: Builder, node: ir.Node) -> None:
    """The integer form of one node and of the images of its result."""
    form = builder.form(node)
    if form.output is None:
        return
    output = form.output
    _read_given(builder, node)
    limited = builder.decision.images.get(output, []) if builder.decision.folded(output) else []
    target = limited[0] if limited else output
    low, high = limits(builder, target, output) if limited else (0, 255)
    if form.family in _SUMS or node in builder.decision.wide:
        sums = wide.wide_sum(builder, node) if form.family == families.ADD else _SUMS[form.family](builder, node)
        if limited or builder.decision.has_codes(output):
            builder.requantize(sums, target, _place(node, output), low, high)
        builder.sums[output] = sums
    elif form.family == families.ADD:
        elementwise.add(builder, node, target, low, high)
    elif form.family == families.PRELU:
        elementwise.prelu(builder, node)
    elif form.family == families.SOFTMAX:
        wide.softmax(builder, node)
    elif form.family == families.CONCAT:
        movement.concat(builder, node)
    else:
        movement.move(builder, node)
    for made in node.outputs if form.family == families.MOVE else [output]:
        _tables(builder, made, _place(node, output))


def _tables(builder: Builder, root: ir.Value, place: ir.Node) -> None:
    """The codes of the images of a value, and of their images."""
    for image in builder.decision.images.get(root, []):
        if image not in builder.codes:
            elementwise.tabled(builder, image, root, place)
        _tables(builder, image, place)


def _read_given(builder: Builder, node: ir.Node) -> None:
    """The codes of functions of the graph's own inputs that a node reads."""
    for value in builder.form(node).inputs:
        root = builder.decision.roots.get(value)
        if not builder.decision.integer_only or root is None:
            continue
        if value not in builder.codes and builder.decision.given(root):
            builder.codes[root] = builder.read(root, node)
            elementwise.tabled(builder, value, root, node)


def _refuse_floats(model: ir.Model, plan: StaticPlan) -> None:
    """Stop when a float operator is left between the quantization of inputs and the outputs.

    Raises:
        UnsupportedError: names the first such operators and why they stay.
    """
    reasons = {entry.node: entry.reason for entry in plan.nodes}
    left = legality.float_operators(model)
    if left:
        words = [f"{edit.describe(node)}: {reasons.get(node.name or '', 'it reads floats')}" for node in left[:5]]
        raise UnsupportedError(
            f"--integer-only leaves {len(left)} float operators", got="; ".join(words), remedy="drop --integer-only"
        )


def _place(node: ir.Node, output: ir.Value) -> ir.Node:
    """New nodes go in front of this one: the node that computes the float value."""
    return output.producer() or node


def limits(builder: Builder, image: ir.Value, root: ir.Value) -> tuple[int, int]:
    """The codes at which an image made by Relu, Clip, Max and Min limits its root."""
    codes = builder.codes_of(image)
    ends = np.array([-np.finfo(np.float32).max, np.finfo(np.float32).max], np.float32)
    opset = builder.model.graph.opset_imports.get("", 21)
    low, high = images.function_of(image, root, opset, builder.plan.carried)(ends)
    return codes.code_of(float(low)), codes.code_of(float(high))


def _leave(builder: Builder, value: ir.Value) -> None:
    """Give the float readers of an integer value a float value again."""
    readers = [user for user, _ in value.uses() if _stays_float(builder, user)]
    if not readers and not value.is_graph_output():
        return
    before = _first(value, readers)
    if value in builder.codes:
        codes = builder.codes_of(value)
        scale = builder.constant(f"{value.name}.scale", np.array(codes.scale, np.float32))
        inputs = [builder.codes[value], scale, builder.zero(codes)]
        made = builder.emit(before, "DequantizeLinear", inputs, f"{value.name}.float", F32, value.shape)
    else:
        sums = builder.sums[value]
        scales = sums.scales.astype(np.float32)
        whole = scales.size == 1
        scale = builder.constant(f"{value.name}.scale", scales.reshape(()) if whole else scales)
        attrs = {} if whole else {"axis": sums.axis}
        made = builder.emit(
            before, "DequantizeLinear", [sums.value, scale], f"{value.name}.float", F32, value.shape, **attrs
        )
    edit.redirect(value, made)


def _round_carried(builder: Builder) -> None:
    """What still reads a value that the model itself rounds as floats reads it rounded."""
    graph = builder.model.graph
    for value in [value for node in graph for value in node.outputs if value.name in builder.plan.carried]:
        codes, maker = builder.plan.carried[value.name or ""], value.producer()
        held = builder.codes.get(value)
        own = None if held is None else held.producer()
        if maker is None or not (value.is_graph_output() or any(user is not own for user in value.consumers())):
            continue
        if maker.op_type == "DequantizeLinear":
            continue  # from codes that come from outside: it is rounded
        scale = builder.constant(f"{value.name}.scale", np.array(codes.scale, np.float32))
        zero = builder.zero(codes)
        if own is None or own.graph is None:
            own = _after(maker, "QuantizeLinear", [value, scale, zero], f"{value.name}.q", U8, value.shape)
        else:
            graph.remove(own)  # it stands in front of its first reader, which may come behind others
            graph.insert_after(maker, own)
        made = _after(own, "DequantizeLinear", [own.outputs[0], scale, zero], f"{value.name}.float", F32, value.shape)
        edit.redirect(value, made.outputs[0])
        own.replace_input_with(0, value)


def _after(
    maker: ir.Node, op_type: str, inputs: list[ir.Value], name: str, dtype: ir.DataType, shape: ir.Shape | None
) -> ir.Node:
    """A new node right behind another."""
    graph = edit.root_graph(maker)
    made = ir.Node("", op_type, inputs, name=name)
    made.outputs[0].name = edit.fresh_name(graph, name)
    made.outputs[0].type, made.outputs[0].shape = ir.TensorType(dtype), shape
    graph.insert_after(maker, made)
    return made


def _stays_float(builder: Builder, node: ir.Node) -> bool:
    """Whether a node computes on floats: it is in the plan's float part, or belongs to a chain that still is."""
    form = builder.decision.forms.get(node)
    if form is None:
        return node.op_type in ("QuantizeLinear",)
    if node in builder.decision.integer or form.family == families.BIAS:
        return False
    return not (form.family == families.TABLE and _is_inside(builder, node))


def _is_inside(builder: Builder, node: ir.Node) -> bool:
    """Whether an elementwise node only serves images that are tables or limits."""
    value = node.outputs[0]
    if value in builder.codes:
        return True
    if value.is_graph_output():
        return False
    return all(not _stays_float(builder, user) for user, _ in value.uses())


def _first(value: ir.Value, readers: list[ir.Node]) -> ir.Node:
    """The place for a float form: in front of the node that computed it before."""
    producer = value.producer()
    if producer is None:
        return readers[0]
    return producer
