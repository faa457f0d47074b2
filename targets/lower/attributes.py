"""Reads of a node's inputs and attributes that many operators share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.targets.lower.context import Context
from kbitc.targets.lower.contraction import Dim
from kbitc.targets.lower.dims import as_dim, is_static
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Constant, Value


def present(node: ir.Node, index: int) -> ir.Value | None:
    """An optional input: None when it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def value(ctx: Context, node: ir.Node, index: int) -> Value:
    """A required input.

    Raises:
        UnsupportedError: when the node leaves it out.
    """
    source = present(node, index)
    if source is None:
        raise refuse(node, f"input {index} is missing")
    return ctx.get(source)


def optional(ctx: Context, node: ir.Node, index: int) -> Value | None:
    """An optional input, lowered."""
    source = present(node, index)
    return None if source is None else ctx.get(source)


def known(ctx: Context, node: ir.Node, index: int, what: str) -> npt.NDArray[Any] | None:
    """An optional input that must be known while compiling (up to symbolic dimensions), as an array.

    Raises:
        UnsupportedError: when it is computed from run-time data.
    """
    given = optional(ctx, node, index)
    if given is None:
        return None
    if not isinstance(given, Constant):
        raise refuse(node, f"{what} must be known while compiling, but it is computed at run time")
    return given.array


def known_ints(ctx: Context, node: ir.Node, index: int, what: str) -> list[int] | None:
    """As `known`, for a list of plain integers."""
    array = known(ctx, node, index, what)
    if array is None:
        return None
    items = [as_dim(item) for item in array.reshape(-1).tolist()]
    if not all(isinstance(item, int) for item in items):
        raise refuse(node, f"{what} must not depend on symbolic dimensions", remedy="fix the shape with --shape")
    return items


def known_dims(ctx: Context, node: ir.Node, index: int, what: str) -> list[Dim] | None:
    """As `known`, for a list of dimensions."""
    array = known(ctx, node, index, what)
    return None if array is None else [as_dim(item) for item in array.reshape(-1).tolist()]


def axis_of(node: ir.Node, axis: int, rank: int) -> int:
    """A possibly negative axis as 0..rank-1.

    Raises:
        UnsupportedError: when it is outside.
    """
    if not -rank <= axis < max(rank, 1):
        raise refuse(node, f"axis is outside a tensor of rank {rank}", got=axis, remedy="repair the model")
    return axis % max(rank, 1)


def axes_of(node: ir.Node, axes: Sequence[int], rank: int) -> list[int]:
    """Axes as sorted numbers 0..rank-1, each once."""
    return sorted({axis_of(node, int(axis), rank) for axis in axes})


def static_shape(node: ir.Node, shape: Sequence[Dim], what: str) -> tuple[int, ...]:
    """A shape that must be all numbers.

    Raises:
        UnsupportedError: when some dimension is symbolic.
    """
    if not all(is_static(dim) for dim in shape):
        raise refuse(node, f"{what} must have fixed dimensions", got=str(list(shape)), remedy="fix them with --shape")
    return tuple(shape)


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """A float attribute, rounded to float32 as ONNX stores it."""
    return float(np.float32(node.attributes.get_float(name, default)))
