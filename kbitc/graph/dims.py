"""Arithmetic on tensor dims: a dim is an int, an expression over the model's symbols, or None when not known."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import onnx_ir as ir

Dim = int | ir.SymbolicDim | None
#: Results kept: the same few sums occur in every layer of a network, and symbolic arithmetic is slow.
_REMEMBERED = 1 << 14


def tidy(dim: Dim) -> Dim:
    """A symbolic dim that is a number after all as int; an anonymous one as None."""
    if not isinstance(dim, ir.SymbolicDim):
        return None if dim is None else int(dim)
    if dim.value is None:
        return None
    text = dim.value.lstrip("-")
    return int(dim.value) if text.isdigit() else dim


@lru_cache(_REMEMBERED)
def add(left: Dim, right: Dim) -> Dim:
    """left + right."""
    return None if left is None or right is None else tidy(left + right)


@lru_cache(_REMEMBERED)
def subtract(left: Dim, right: Dim) -> Dim:
    """left - right."""
    return None if left is None or right is None else tidy(left - right)


@lru_cache(_REMEMBERED)
def multiply(left: Dim, right: Dim) -> Dim:
    """left * right; 0 whenever one of them is 0."""
    if left == 0 or right == 0:
        return 0
    return None if left is None or right is None else tidy(left * right)


@lru_cache(_REMEMBERED)
def floor_divide(left: Dim, right: Dim) -> Dim:
    """floor(left / right); None when right is 0 or when an int is divided by a symbol."""
    if left is None or right is None or right == 0:
        return None
    if isinstance(left, int):
        return left // right if isinstance(right, int) else None
    return tidy(left // right)


def product(dims: Sequence[Dim]) -> Dim:
    """The product of dims; 1 of none."""
    result: Dim = 1
    for dim in dims:
        result = multiply(result, dim)
    return result


@lru_cache(_REMEMBERED)
def exact_divide(left: Dim, right: Dim) -> Dim:
    """left / right where the model guarantees that it divides without rest (the -1 of a Reshape)."""
    if left is None or right is None or right == 0:
        return None
    if isinstance(left, int) and isinstance(right, int):
        return left // right if left % right == 0 else None
    if isinstance(left, ir.SymbolicDim):
        return tidy(left / right)
    return None


def same(left: Dim, right: Dim) -> bool:
    """Whether two dims are known to be equal."""
    return left is not None and right is not None and left == right


def broadcast(shapes: Sequence[Sequence[Dim]]) -> list[Dim]:
    """The dims of an elementwise result. A dim next to an unlike symbol: the number, when it is over 1, else None."""
    rank = max((len(shape) for shape in shapes), default=0)
    result: list[Dim] = []
    for position in range(rank):
        dims = [shape[position - rank] for shape in shapes if position - rank >= -len(shape)]
        wide = [dim for dim in dims if dim != 1]
        if not wide:
            result.append(1)
            continue
        fixed = [dim for dim in wide if isinstance(dim, int)]
        if fixed:
            result.append(fixed[0])
        elif all(same(dim, wide[0]) for dim in wide):
            result.append(wide[0])
        else:
            result.append(None)
    return result


def of(value: ir.Value | None) -> list[Dim] | None:
    """The dims of a value, or None when even its rank is not known."""
    if value is None or value.shape is None:
        return None
    found = [tidy(dim) for dim in value.shape.dims]
    return [None if isinstance(dim, int) and dim < 0 else dim for dim in found]
