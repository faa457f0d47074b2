"""Puts attention together before emission. Works on the ONNX graph; needs no tvm.

Before: Softmax(MatMul(q, Transpose(k)) * scale + mask) by MatMul with v, heads moved by Transposes.
After: `kbitc.core::Attention(q, k, v, mask)` on what the Transposes read and write; its attributes say how it lies.
The same of codes: MatMulInteger and DequantizeLinear in place of the first product, QuantizeLinear, MatMulInteger and
kbitc::Requantize in place of the second; the inputs behind the mask are the numbers of the requantization.
Keeps: fewer than five queries (their keys are better read where they lie), operands whose channels are not side by
side, a mask with one number for all keys, sizes of 0, other types, and what others read too; with codes also channels
that are no multiple of 16 and steps that are no constant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.functions import DOMAIN as FUNCTIONS
from kbitc.graph.integer_functions import REQUANTIZE
from kbitc.targets.lower.layout import CORE_DOMAIN

OPERATOR = "Attention"
#: Channels of queries, keys and values that a kernel takes: their products are written out.
MOST_CHANNELS = 256
#: With so few queries it is faster to read each key once, where it lies.
FEW_ROWS = 4
#: Channels of codes come in multiples of that.
CODE_CHANNELS = 16
ALL = 3


@dataclass
class _Operand:
    """A tensor [*lead, rows, channels]: `source` has axis order[i] of it as axis i."""

    source: ir.Value
    order: list[int]

    @property
    def places(self) -> list[int]:
        """Where in `source` each axis is."""
        return [self.order.index(axis) for axis in range(len(self.order))]


@dataclass
class _Found:
    """The scores of one attention: `step` is that of their sums when they are products of codes."""

    scores: ir.Node
    scale: float = 1.0
    divide: bool = False
    mask: ir.Value | None = None
    step: float | None = None


@dataclass
class _Tail:
    """What follows the softmax; `numbers`, `zeros` and `share` are there when the products are of codes.

    Attributes:
        product: the second product.
        result: the node that makes its result.
        numbers: multiplier, shift and zero point of the requantization.
        share: scale of the codes of the softmax.
        limits: low and high of the requantization.
    """

    product: ir.Node
    result: ir.Node
    numbers: tuple[ir.Value | None, ...] = ()
    share: float | None = None
    limits: tuple[int, int] = (0, 255)


def fuse_attention(model: ir.Model, *, codes: bool = True) -> ir.Model:
    """Rewrite the main graph of a model in place and return the model. Computes the same numbers.

    Args:
        model: the graph.
        codes: also put attention of codes together.
    """
    changed = False
    for node in list(model.graph):
        if edit.is_op(node, "Softmax") and _fuse(node, codes):
            changed = True
    if changed:
        model.graph.opset_imports.setdefault(CORE_DOMAIN, 1)
        edit.remove_dead(model)
    return model


def _fuse(softmax: ir.Node, codes: bool) -> bool:
    size = edit.rank(softmax.inputs[0])
    if size is None or size < 2 or softmax.attributes.get_int("axis", -1) not in (-1, size - 1):
        return False
    tail, found = _behind(softmax), _scores_of(softmax.inputs[0])
    if tail is None or found is None or not _mask_fits(found.mask, size):
        return False
    of_codes = tail.share is not None
    if of_codes != (found.step is not None) or (of_codes and not codes):
        return False
    q, turned, values = found.scores.inputs[0], found.scores.inputs[1], tail.product.inputs[1]
    if q is None or turned is None or values is None or _few_rows(q):
        return False
    operands = [_untransposed(q), _untransposed(turned, swap=True), _untransposed(values)]
    seen = [operand for operand in operands if operand is not None and _fits(operand, size, of_codes)]
    if len(seen) < len(operands):
        return False
    attributes = _code_numbers(found, tail) if of_codes else {}
    if attributes is None:
        return False
    last, order = _written(tail.result)
    made = edit.insert_before(
        tail.result, OPERATOR, [*(operand.source for operand in seen), found.mask, *tail.numbers],
        name=tail.product.name or tail.product.outputs[0].name, domain=CORE_DOMAIN, like=last.outputs[0],
        q=seen[0].places, k=seen[1].places, v=seen[2].places, out=order, scale=found.scale, divide=int(found.divide),
        **attributes,
    )  # fmt: skip
    edit.redirect(last.outputs[0], made)
    return True


def _behind(softmax: ir.Node) -> _Tail | None:
    """The second product: MatMul, or QuantizeLinear, MatMulInteger and Requantize."""
    user = edit.only_use(softmax.outputs[0])
    if user is None or user.inputs[0] is not softmax.outputs[0]:
        return None
    if edit.is_op(user, "MatMul"):
        return _Tail(user, user)
    share = edit.scalar(user.inputs[1]) if edit.is_op(user, "QuantizeLinear") and len(user.inputs) == ALL else None
    product = edit.only_use(user.outputs[0])
    if share is None or product is None or not edit.is_op(product, "MatMulInteger"):
        return None
    result = edit.only_use(product.outputs[0])
    first = product.inputs[0] is user.outputs[0] and _number(user, 2) == _number(product, 2)
    if result is None or not first or (result.domain, result.op_type) != (FUNCTIONS, REQUANTIZE):
        return None
    numbers = tuple(result.inputs[1:])
    if any(edit.scalar(number) is None for number in numbers):
        return None
    limits = (result.attributes.get_int("low", 0), result.attributes.get_int("high", 255))
    return _Tail(product, result, numbers, share, limits)


def _code_numbers(found: _Found, tail: _Tail) -> dict[str, Any] | None:
    """Attributes of an attention of codes; None when a zero point is not one constant number."""
    zeros = [_number(node, place) for node in (found.scores, tail.product) for place in (2, 3)]
    known = [zero for zero in zeros if zero is not None]
    if len(known) < len(zeros):
        return None
    low, high = tail.limits
    return {"zeros": known, "step": found.step, "share": tail.share, "low": low, "high": high}


def _number(node: ir.Node, place: int) -> int | None:
    """A zero point; 0 when it is left out, None when it is not one constant number."""
    value = node.inputs[place] if place < len(node.inputs) else None
    number = 0.0 if value is None else edit.scalar(value)
    return None if number is None else int(number)


def _scores_of(value: ir.Value | None) -> _Found | None:
    """The product behind scale and mask; None when it is not that, or somebody else reads it."""
    if value is None:
        return None
    added = _made_by(value, "Add")
    if added is not None:
        for place in (0, 1):
            found = _scaled(added.inputs[place])
            if found is not None:
                found.mask = added.inputs[1 - place]
                return found
        return None
    return _scaled(value)


def _scaled(value: ir.Value | None) -> _Found | None:
    scaling = _made_by(value, "Mul", "Div")
    if scaling is None:
        return _product(value)
    divide = scaling.op_type == "Div"
    for place in (0,) if divide else (0, 1):
        factor, found = edit.scalar(scaling.inputs[1 - place]), _product(scaling.inputs[place])
        same = edit.rank(scaling.inputs[place]) == edit.rank(scaling.outputs[0])
        if factor is not None and found is not None and same:
            return replace(found, scale=factor, divide=divide)
    return None


def _product(value: ir.Value | None) -> _Found | None:
    """MatMul, or MatMulInteger whose sums become float32 by one constant."""
    product = _made_by(value, "MatMul")
    if product is not None:
        return _Found(product)
    floats = _made_by(value, "DequantizeLinear")
    if floats is None or value is None or value.dtype != ir.DataType.FLOAT:
        return None
    product, step = _made_by(floats.inputs[0], "MatMulInteger"), edit.scalar(floats.inputs[1])
    plain = len(floats.inputs) == 2 or floats.inputs[2] is None
    return _Found(product, step=step) if product is not None and step is not None and plain else None


def _made_by(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """The producer of a value that only one node reads."""
    node = None if value is None else value.producer()
    if node is None or value is None or not edit.is_op(node, *kinds) or edit.only_use(value) is None:
        return None
    return node


def _mask_fits(mask: ir.Value | None, size: int) -> bool:
    """Whether there is no mask, or one with a number for each key."""
    if mask is None:
        return True
    if mask.dtype != ir.DataType.FLOAT or mask.shape is None or not 1 <= len(mask.shape) <= size:
        return False
    return mask.shape[-1] != 1 and 0 not in mask.shape.dims


def _untransposed(value: ir.Value, swap: bool = False) -> _Operand | None:
    """What lies behind the Transposes in front of an operand, when its channels are last; `swap` reads [.., C, N].

    None when they are not, or the shape is not known.
    """
    size = edit.rank(value)
    if size is None or size < 2:
        return None
    order = list(range(size))
    if swap:
        order[-2:] = order[:-3:-1]
    best = _Operand(value, order) if not swap else None
    while (turn := edit.producer(value, "Transpose")) is not None and turn.inputs[0] is not None:
        perm = list(turn.attributes.get_ints("perm") or range(size)[::-1])
        order = [order[perm.index(axis)] for axis in range(size)]
        value = turn.inputs[0]
        if order[-1] == size - 1:
            best = _Operand(value, order)
    return best


def _fits(operand: _Operand, size: int, codes: bool) -> bool:
    """Whether an operand has the rank of the scores, the type, and few channels, their number known."""
    source = operand.source
    wanted = ir.DataType.UINT8 if codes else ir.DataType.FLOAT
    if source.shape is None or len(source.shape) != size or source.dtype != wanted:
        return False
    channels = source.shape[-1]
    if not isinstance(channels, int) or 0 in source.shape.dims or channels > MOST_CHANNELS:
        return False
    return not codes or channels % CODE_CHANNELS == 0


def _few_rows(q: ir.Value) -> bool:
    rows = None if q.shape is None else q.shape[-2]
    return isinstance(rows, int) and rows <= FEW_ROWS


def _written(product: ir.Node) -> tuple[ir.Node, list[int]]:
    """The node whose output is written, and for each axis of it the axis of [*lead, rows, columns]."""
    size = edit.rank(product.outputs[0]) or 0
    turn = edit.only_use(product.outputs[0])
    if turn is not None and edit.is_op(turn, "Transpose"):
        perm = list(turn.attributes.get_ints("perm") or range(size)[::-1])
        if perm[-1] == size - 1:
            return turn, perm
    return product, list(range(size))
