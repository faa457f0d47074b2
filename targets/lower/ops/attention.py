"""`kbitc.core::Attention`, which `kbitc.targets.lower.attention` makes: one contraction of the target's rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from kbitc.graph import edit
from kbitc.targets.lower import attributes
from kbitc.targets.lower.broadcast import is_one, result_shape
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.contraction import Attention, AttentionCodes, Contraction, Dim, Place, Requantization
from kbitc.targets.lower.offer import offer, unique_name
from kbitc.targets.lower.values import Tensor


def attention(ctx: Context, node: ir.Node) -> Tensor:
    """softmax(q k^T * scale + mask) v; the attributes q, k, v and out are the places of axes, see there."""
    tensors = [ctx.tensor(attributes.value(ctx, node, index), "operand") for index in range(3)]
    orders = [list(node.attributes.get_ints(name, ())) for name in "qkv"]
    q, k, v = (tuple(tensor.shape[axis] for axis in order) for tensor, order in zip(tensors, orders, strict=True))
    mask = _mask(ctx, node)
    seen = () if mask is None else mask.shape[:-2]
    lead = result_shape(node, [q[:-2], k[:-2], v[:-2], seen])
    wanted = [(*lead, q[-2], q[-1]), (*lead, k[-2], q[-1]), (*lead, k[-2], v[-1])]
    given = [_seen(ctx, tensor, order, shape) for tensor, order, shape in zip(tensors, orders, wanted, strict=True)]
    if mask is not None:
        given.append(_seen(ctx, mask, list(range(len(mask.shape))), (*lead, q[-2], k[-2])[-len(mask.shape) :]))
    written = list(node.attributes.get_ints("out", ()))
    whole = (*lead, q[-2], v[-1])
    out = Place(tuple(whole[axis] for axis in written), tuple(written.index(axis) for axis in range(len(whole) - 1)))
    requantize, codes = _numbers(node)
    queries, keys, values = (_place(tensor, order) for tensor, order in zip(given[:3], orders, strict=True))
    what = Attention(
        lead, q[-2], k[-2], int(q[-1]), int(v[-1]), queries, keys, values, out,
        mask=None if mask is None else _mask_place(given[3], len(whole)),
        scale=attributes.float_attribute(node, "scale", 1.0),
        divide=node.attributes.get_int("divide", 0) == 1,
        codes=codes,
    )  # fmt: skip
    contraction = Contraction(
        name=unique_name(ctx, node), kind="attention", weight=None, activation="float32" if codes is None else "uint8",
        x_shape=given[0].shape, out_shape=out.shape, b_shape=given[1].shape, attention=what, requantize=requantize,
    )  # fmt: skip
    return offer(ctx, node, contraction, [tensor.var for tensor in given])


def _numbers(node: ir.Node) -> tuple[Requantization | None, AttentionCodes | None]:
    """The requantization and the other numbers of an attention of codes; None of another."""
    zeros = node.attributes.get_ints("zeros", ())
    if not zeros:
        return None, None
    multiplier, shift, zero = (edit.constant(value) for value in node.inputs[4:])
    assert multiplier is not None and shift is not None and zero is not None
    low, high = node.attributes.get_int("low", 0), node.attributes.get_int("high", 255)
    requantize = Requantization(multiplier.reshape(-1), shift.reshape(-1), int(zero.reshape(())), low, high)
    step, share = (attributes.float_attribute(node, name, 1.0) for name in ("step", "share"))
    q_zero, k_zero, share_zero, v_zero = zeros
    return requantize, AttentionCodes(q_zero, k_zero, v_zero, step, share, share_zero)


def _mask(ctx: Context, node: ir.Node) -> Tensor | None:
    """The mask in memory, once for all layers that read it."""
    source = attributes.present(node, 3)
    if source is None:
        return None
    key = ("attention mask", source)
    if key not in ctx.memo:
        ctx.memo[key] = ctx.tensor(ctx.get(source), "mask")
    made: Tensor = ctx.memo[key]
    return made


def _seen(ctx: Context, tensor: Tensor, order: Sequence[int], whole: Sequence[Dim]) -> Tensor:
    """The tensor with the dimensions that it must have; those of size 1 repeat."""
    shape = list(tensor.shape)
    for axis, place in enumerate(order):
        shape[place] = tensor.shape[place] if is_one(tensor.shape[place]) else whole[axis]
    return ctx.tensor(ctx.cast_shape(tensor, shape))


def _place(tensor: Tensor, order: Sequence[int]) -> Place:
    *lead, rows, _ = order
    repeated = (None if is_one(tensor.shape[place]) else place for place in lead)
    return Place(tensor.shape, (*repeated, rows))


def _mask_place(mask: Tensor, size: int) -> Place:
    missing = size - len(mask.shape)
    own = (None if is_one(dim) else axis for axis, dim in enumerate(mask.shape[:-1]))
    return Place(mask.shape, (*[None] * min(missing, size - 1), *own))


CORE_TABLE: dict[str, Callable[[Context, ir.Node], Any]] = {"Attention": attention}
TABLE: dict[str, Callable[[Context, ir.Node], Any]] = {}
