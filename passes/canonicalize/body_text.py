"""Pieces of function bodies in ONNX's text form."""

from __future__ import annotations


def ints(name: str, *items: int) -> str:
    """A constant of int64 [len(items)]."""
    return f"{name} = Constant<value_ints = {list(items)}>()"


def number(name: str, value: float) -> str:
    """A float32 scalar."""
    return f"{name} = Constant<value_float = {value!r}>()"
