"""Proofs that int32 accumulators cannot overflow, from the codes' ranges and the actual weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph import edit, ops
from kbitc.graph.integer_nonlinear import NORM_BITS
from kbitc.graph.integer_reduce import MAX_FACTOR_BITS, MEAN_BITS, ROOT_BITS, WIDE_LIMIT, norm2_bits
from kbitc.passes.allocate import families, forms
from kbitc.quant.scheme import ScaleCode
from kbitc.quant.static import ACCUMULATOR_LIMIT, Codes, Proof
from kbitc.quant.tensor import QTensor, spread

if TYPE_CHECKING:
    from kbitc.passes.allocate.decision import Decision

#: Factors that `kbitc::Requantize`, and `kbitc::IntegerAdd` and `kbitc::IntegerPRelu`, cannot have.
MAX_RATIO, MAX_ADD_RATIO = 2.0**29, 2.0**19
Known = Mapping[ir.Value, tuple[Codes, str]]


def prove(node: ir.Node, decision: Decision, codes: Known, tensors: Mapping[str, QTensor]) -> Proof | None:
    """The bound of a node's accumulators; None for a node that has none."""
    form = decision.forms[node]
    if form.family == families.CONTRACTION:
        return _contraction(node, codes[form.inputs[0]][0], tensors)
    if form.family in (families.PRODUCT, families.MUL):
        spans = [span(codes[value][0]) for value in form.inputs]
        terms = _terms(form.inputs[0]) if form.family == families.PRODUCT else 1
        if terms is None:
            most = (ACCUMULATOR_LIMIT - 1) // (spans[0] * spans[1])
            words = f"{most} terms * {spans[0]} * {spans[1]} < 2^31; the number of terms is only known at run time"
            return Proof(0, most * spans[0] * spans[1], words)
        bound = terms * spans[0] * spans[1]
        return Proof(terms, bound, f"{terms} * {spans[0]} * {spans[1]} = {bound}")
    if form.family in (families.MEAN, families.AVERAGE):
        terms = families.reduced_count(node) if form.family == families.MEAN else _window(node)
        if form.family == families.MEAN and terms is None:
            return _counted(span(codes[form.inputs[0]][0]))
        reach = span(codes[form.inputs[0]][0])
        bound = (terms or 0) * reach
        return Proof(terms or 0, bound, f"{terms} * {reach} = {bound}")
    return _in_int64(form.family, node)


def rescalable(node: ir.Node, decision: Decision, codes: Known, tensors: Mapping[str, QTensor]) -> bool:
    """Whether the factor from a node's sums to the codes of its result fits the integer functions."""
    form = decision.forms[node]
    if (
        form.output is None
        or form.family not in families.ACCUMULATES | {families.ADD, families.PRELU}
        or node in decision.wide
    ):
        return True
    limited = decision.images.get(form.output, []) if decision.folded(form.output) else []
    target = codes.get(limited[0] if limited else form.output)
    if target is None:
        return True
    scales = [codes[value][0].scale for value in form.inputs]
    if form.family == families.ADD:
        return max(scales) / target[0].scale < MAX_ADD_RATIO
    if form.family == families.PRELU:
        return scales[0] * steepest(node) / target[0].scale < MAX_ADD_RATIO
    step = math.prod(scales)
    if form.family == families.CONTRACTION:
        weight, _ = ops.weight_source(node)
        step = float(output_scales(codes[form.inputs[0]][0], tensors[(weight.name if weight else "") or ""]).max())
    return step / target[0].scale < MAX_RATIO


def steepest(node: ir.Node) -> float:
    """The largest factor of a PRelu by a constant."""
    slope = edit.constant(node.inputs[1])
    return 1.0 if slope is None else max(1.0, float(np.abs(slope).max(initial=0)))


def _counted(reach: int) -> Proof:
    """A mean whose count is known at run time: a sum in int64, over its count before it is an int32 again."""
    bound = reach << MEAN_BITS
    words = f"a mean of n numbers up to {reach} in steps of 2^-{MEAN_BITS}: {bound}; n {bound} < 2^61 inside"
    return Proof(0, bound, words)


def _in_int64(family: str, node: ir.Node) -> Proof | None:
    """Families that compute in int64 and limit their int32 result to 2^30 or less."""
    count = families.reduced_count(node) if family in (families.SUM, families.LENGTH) else None
    if family == families.SUM:
        words = f"{count or 'n'} * 2^31 < 2^61 inside; limited to 2^29"
        return Proof(count or 0, WIDE_LIMIT, words)
    if family == families.LENGTH:
        words = f"{count} * 2^{2 * NORM_BITS} * 4^{norm2_bits(count or 1)} <= 2^{ROOT_BITS} inside; its root is 2^30"
        return Proof(count or 0, 1 << (ROOT_BITS // 2), words)
    if family == families.QUOTIENT:
        words = f"2^31 * 2^{MAX_FACTOR_BITS} <= 2^61 inside; limited to 2^29"
        return Proof(1, WIDE_LIMIT, words)
    return None


def span(codes: Codes) -> int:
    """The largest |code - zero|."""
    return max(codes.zero, codes.high - codes.zero)


def _terms(value: ir.Value) -> int | None:
    dim = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return dim if isinstance(dim, int) else None


def _window(node: ir.Node) -> int:
    return int(np.prod(node.attributes.get_ints("kernel_shape", (1,))))


def _contraction(node: ir.Node, codes: Codes, tensors: Mapping[str, QTensor]) -> Proof:
    """max over channels of max|code - zero| * sum |level| + |bias|."""
    weight, kind = ops.weight_source(node)
    tensor = tensors[(weight.name if weight is not None else "") or ""]
    levels = whole_levels(tensor).astype(np.int64)
    terms = levels.shape[1] * levels.shape[2]
    products = span(codes) * np.abs(levels).sum(axis=(1, 2))
    added = np.abs(integer_bias(node, codes, tensor)) if kind else np.zeros(1)
    bound = int(np.max(products + added))
    largest = int(np.abs(levels).max(initial=0))
    words = (
        f"{terms} * {span(codes)} * {largest} = {terms * span(codes) * largest} at most; "
        f"{int(products.max(initial=0))} with these weights, {bound} with the bias"
    )
    return Proof(terms, bound, words)


def output_scales(codes: Codes, tensor: QTensor) -> npt.NDArray[np.float64]:
    """Units of x per accumulator step, f64 [N]."""
    if tensor.scale_steps is not None:
        return codes.scale * tensor.scale_steps.astype(np.float64)
    scales = spread(tensor.scales, tensor.shape, tensor.scheme)[:, 0, 0].astype(np.float64)
    return codes.scale * np.broadcast_to(scales, (tensor.shape[0],))


def whole_levels(tensor: QTensor) -> npt.NDArray[np.int16]:
    """The integers that are summed, int16 [N, T, C] in the range of int8: levels, times integer block scales."""
    if tensor.scheme.scale_code is ScaleCode.INTEGER:
        return tensor.integer_levels().astype(np.int16)
    return tensor.levels()


def integer_bias(node: ir.Node, codes: Codes, tensor: QTensor) -> npt.NDArray[np.float64]:
    """The bias in accumulator steps, whole numbers as f64 [N]; 0 without a bias."""
    numbers = float_bias(node)
    if numbers is None:
        return np.zeros(tensor.shape[0])
    return np.asarray(np.rint(numbers.astype(np.float64) / output_scales(codes, tensor)))


def float_bias(node: ir.Node) -> npt.NDArray[np.float32] | None:
    """The constant that is added to each output channel of a contraction, f32 [N]; None for none."""
    if node.op_type == "Conv" and len(node.inputs) > 2 and node.inputs[2] is not None:
        array = edit.constant(node.inputs[2])
        return None if array is None else np.asarray(array.reshape(-1), np.float32)
    user = forms.bias_node(node)
    if user is None:
        return None
    array = edit.constant(user.inputs[1] if user.inputs[0] is node.outputs[0] else user.inputs[0])
    return None if array is None else np.asarray(array.reshape(-1), np.float32)
