"""Puts attention together before emission. Works on the ONNX graph; needs no tvm.

Before: Softmax(MatMul(q, Transpose(k)) * scale + mask) by MatMul with v, heads moved by Transposes.
After: `kbitc.core::Attention(q, k, v, mask)` on what the Transposes read and write; its attributes say how it lies.
Keeps: fewer than five queries (their keys are better read where they lie), operands whose channels are not side by
side, a mask with one number for all keys, sizes of 0, types other than float32, and what others read too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from kbitc.graph import edit
from kbitc.targets.lower.layout import CORE_DOMAIN

OPERATOR = "Attention"
#: Channels of queries, keys and values that a kernel takes: their products are written out.
MOST_CHANNELS = 256
#: With so few queries it is faster to read each key once, where it lies.
FEW_ROWS = 4


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
    """The parts of one attention."""

    scores: ir.Node
    scale: float = 1.0
    divide: bool = False
    mask: ir.Value | None = None
    nodes: list[ir.Node] = field(default_factory=list)


def fuse_attention(model: ir.Model) -> ir.Model:
    """Rewrite the main graph of a model in place and return the model. Computes the same numbers."""
    changed = False
    for node in list(model.graph):
        if edit.is_op(node, "Softmax") and _fuse(node):
            changed = True
    if changed:
        model.graph.opset_imports.setdefault(CORE_DOMAIN, 1)
        edit.remove_dead(model)
    return model


def _fuse(softmax: ir.Node) -> bool:
    size = edit.rank(softmax.inputs[0])
    if size is None or size < 2 or softmax.attributes.get_int("axis", -1) not in (-1, size - 1):
        return False
    product = edit.only_use(softmax.outputs[0])
    if product is None or not edit.is_op(product, "MatMul") or product.inputs[0] is not softmax.outputs[0]:
        return False
    found = _scores_of(softmax.inputs[0])
    if found is None or not _mask_fits(found.mask, size):
        return False
    q, turned = found.scores.inputs
    if q is None or turned is None or product.inputs[1] is None:
        return False
    queries, keys, values = _untransposed(q), _untransposed(turned, swap=True), _untransposed(product.inputs[1])
    if any(operand is None for operand in (queries, keys, values)):
        return False
    assert queries is not None and keys is not None and values is not None
    if not all(_fits(operand, size) for operand in (queries, keys, values)) or _few_rows(q):
        return False
    last, order = _written(product)
    made = edit.insert_before(
        product, OPERATOR, [queries.source, keys.source, values.source, found.mask],
        name=product.name or product.outputs[0].name, domain=CORE_DOMAIN, like=last.outputs[0],
        q=queries.places, k=keys.places, v=values.places, out=order, scale=found.scale, divide=int(found.divide),
    )  # fmt: skip
    edit.redirect(last.outputs[0], made)
    return True


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
        product = _made_by(value, "MatMul")
        return None if product is None else _Found(product)
    divide = scaling.op_type == "Div"
    for place in (0,) if divide else (0, 1):
        factor, product = edit.scalar(scaling.inputs[1 - place]), _made_by(scaling.inputs[place], "MatMul")
        same = edit.rank(scaling.inputs[place]) == edit.rank(scaling.outputs[0])
        if factor is not None and product is not None and same:
            return _Found(product, factor, divide)
    return None


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


def _fits(operand: _Operand, size: int) -> bool:
    """Whether an operand has the rank of the scores, is float32 and has few channels, their number known."""
    source = operand.source
    if source.shape is None or len(source.shape) != size or source.dtype != ir.DataType.FLOAT:
        return False
    channels = source.shape[-1]
    return isinstance(channels, int) and 0 < channels <= MOST_CHANNELS and 0 not in source.shape.dims


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
