"""Offers a contraction to the kernel rules of the target, and fuses the bias and clamp that follow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.errors import InternalError
from kbitc.graph import edit
from kbitc.targets.lower.context import Context, node_name
from kbitc.targets.lower.contraction import RELU, Contraction, PostFunction, RelaxExpr
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Tensor
from kbitc.targets.tuning import FLOAT_BITS, scheduled, weight_text

FloatArray = npt.NDArray[np.float32]
#: Rules whose loops may run no times. Tiles of nothing are not worth a thought in the others.
PLAIN = ("reference", "plain_integers")
EMPTY = "it has no rows or no results"


@dataclass(frozen=True)
class Tail:
    """What follows a contraction and goes into its kernel.

    Attributes:
        bias: float32 [N] or None.
        post: clamp after it, or None.
        output: the graph value that the kernel then computes.
        nodes: the fused nodes.
    """

    bias: FloatArray | None
    post: PostFunction | None
    output: ir.Value
    nodes: tuple[ir.Node, ...]


def find_tail(node: ir.Node, bias: FloatArray | None, n: int, axis: int, rank: int) -> Tail:
    """The bias and clamp behind a contraction whose result nobody else reads.

    Args:
        node: the contraction.
        bias: its own bias.
        n: output channels.
        axis: axis of the output channels in the node's output.
        rank: rank of that output.
    """
    output, nodes, post = node.outputs[0], [], None
    user = edit.only_use(output)
    if user is not None and edit.is_op(user, "Add"):
        added = channel_vector(user, output, n, axis, rank, np.float32)
        if added is not None:
            bias = added if bias is None else np.asarray(bias + added, np.float32)
            nodes.append(user)
            output = user.outputs[0]
            user = edit.only_use(output)
    if user is not None and edit.is_op(user, "Relu", "Clip"):
        post = _post(user)
        if post is not None:
            nodes.append(user)
            output = user.outputs[0]
    return Tail(bias, post, output, tuple(nodes))


def channel_vector(
    user: ir.Node, output: ir.Value, n: int, axis: int, rank: int, dtype: npt.DTypeLike
) -> npt.NDArray[Any] | None:
    """The constant operand of an Add as one number of the dtype a channel; None when it is not that."""
    array = edit.constant(user.inputs[1] if user.inputs[0] is output else user.inputs[0])
    if array is None or array.dtype != dtype or array.ndim > rank:
        return None
    if array.size == 1:
        return np.full(n, array.reshape(-1)[0], dtype)
    wide = (1,) * (rank - array.ndim) + array.shape
    wanted = tuple(n if place == axis else 1 for place in range(rank))
    return np.asarray(array.reshape(-1), dtype) if wide == wanted else None


def _post(user: ir.Node) -> PostFunction | None:
    if user.op_type == "Relu":
        return RELU
    limits: list[float | None] = []
    for place, name in ((1, "min"), (2, "max")):
        source = user.inputs[place] if place < len(user.inputs) else None
        limit = edit.scalar(source) if source is not None else user.attributes.get_float(name)
        if source is not None and limit is None:
            return None
        limits.append(limit)
    low, high = limits
    if low is not None and high is not None and not low <= high:
        return None
    return None if low is None and high is None else PostFunction(low, high)


def finish(ctx: Context, tail: Tail) -> None:
    """Mark the nodes of a tail as done."""
    ctx.skipped.update(tail.nodes)


def unique_name(ctx: Context, node: ir.Node) -> str:
    """A name for a contraction that no other has."""
    base, count = node_name(node), 1
    taken = {layer["name"] for layer in ctx.layers}
    name = base
    while name in taken:
        name, count = f"{base}.{count}", count + 1
    return name


def offer(ctx: Context, node: ir.Node, contraction: Contraction, inputs: Sequence[RelaxExpr]) -> Tensor:
    """Emit a contraction with the first kernel rule of the target that takes it.

    Args:
        ctx: the lowering; its `layers` get the facts.
        node: for messages.
        contraction: what to compute.
        inputs: relax variables in the order that the kind says.

    Raises:
        UnsupportedError: when no rule takes it, or there is nothing to add up.
    """
    declined: list[dict[str, str]] = []
    weight = contraction.weight
    if weight is not None and 0 in weight.shape[1:]:
        raise refuse(node, "a sum of no products cannot be lowered", got=f"a weight of shape {list(weight.shape)}")
    empty = 0 in contraction.x_shape or 0 in contraction.out_shape
    for rule in ctx.target.contraction_rules():
        reason = EMPTY if empty and rule.name not in PLAIN else rule.match(contraction, ctx.target)
        if reason is not None:
            declined.append({"rule": rule.name, "reason": reason})
            continue
        facts = _facts(node, contraction, rule.name, declined)
        schedule = scheduled(ctx.target, rule.name, contraction).schedule
        ctx.layers.append({**facts, "schedule": None if schedule is None else asdict(schedule)})
        if ctx.dry:
            return ctx.placeholder(contraction.out_shape, contraction.out_dtype)
        with ctx.calls.working_for(contraction.name, rule.name), ctx.scheduled(rule.name, contraction):
            result = rule.emit(ctx, contraction, inputs)
        if result is None:
            raise InternalError("a kernel rule gave no result", where=node_name(node), got=rule.name)
        ctx.calls.give_result(result)
        return Tensor(result, contraction.out_shape, contraction.out_dtype)
    reasons = "; ".join(f"{item['rule']}: {item['reason']}" for item in declined)
    raise refuse(node, f"no kernel rule of {ctx.target} takes it", got=reasons)


def _facts(node: ir.Node, contraction: Contraction, rule: str, declined: list[dict[str, str]]) -> dict[str, object]:
    weight = contraction.weight
    return {
        "name": contraction.name,
        "operator": node.op_type,
        "kind": contraction.kind,
        "weight": None if weight is None else weight_text(weight),
        "bits": None if weight is None else getattr(weight, "bits", FLOAT_BITS),
        "weight_shape": None if weight is None else list(weight.shape),
        "activation": contraction.activation,
        "x_shape": [dim if isinstance(dim, int) else str(dim) for dim in contraction.x_shape],
        "out_shape": [dim if isinstance(dim, int) else str(dim) for dim in contraction.out_shape],
        "result": contraction.out_dtype,
        "rule": rule,
        "declined": declined,
        "conv": None if contraction.conv is None else asdict(contraction.conv),
        "keys_axis": None if contraction.attention is None else contraction.attention.k.axes[-1],
    }
