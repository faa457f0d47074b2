"""How kernels that are TE groups get their schedules.

A group is a prim func made from TE expressions. Its attribute `kbitc.kind` says what it is:

- ``injective``: one stage without reduction;
- ``reduce``: a reduction and stages around it that work element by element;
- ``rows``: several stages over the last axis of a matrix [rows, columns], such as softmax and normalisation;
- ``general``: anything else.

A group with the attribute `kbitc.table` is out[...] = table[code[...]] of bytes; its inputs are code, then table.

Kernels written directly as TIR carry `kbitc.scheduled` and are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from kbitc.targets.target import Target

SCHEDULED = "kbitc.scheduled"
KIND = "kbitc.kind"
BYTE_TABLE = "kbitc.table"
PrimFunc = Any
IRModule = Any
ScheduleRule = Callable[[PrimFunc, Target], PrimFunc | None]


def kind_of(function: PrimFunc) -> str:
    """The kind of a TE group, "general" when it says nothing."""
    attrs = function.attrs
    return str(attrs[KIND]) if attrs is not None and KIND in attrs else "general"


def is_scheduled(function: PrimFunc) -> bool:
    """Whether a kernel has its schedule already."""
    return function.attrs is not None and SCHEDULED in function.attrs


def schedule(module: IRModule, target: Target, rules: Sequence[ScheduleRule]) -> tuple[IRModule, list[tuple[str, str]]]:
    """Give every group of a module the schedule of the first rule that takes it.

    Args:
        module: relax module with its kernels; not changed.
        target: passed to the rules.
        rules: in priority order; a rule returns None for what it does not take. A group that no rule takes stays
            as plain loops.

    Returns:
        The module, and (kernel, rule) pairs in the order of the kernels' names.
    """
    functions = dict(module.functions.items())
    taken: list[tuple[str, str]] = []
    for var in sorted(functions, key=lambda item: str(item.name_hint)):
        function = functions[var]
        if not isinstance(function, tirx.PrimFunc):
            continue
        if is_scheduled(function):
            taken.append((str(var.name_hint), "kernel"))
            continue
        done, name = _first(function, target, rules)
        functions[var] = _keep_attributes(function, done).with_attr(SCHEDULED, 1)
        taken.append((str(var.name_hint), name))
    return type(module)(functions, attrs=module.attrs), taken


def _first(function: PrimFunc, target: Target, rules: Sequence[ScheduleRule]) -> tuple[PrimFunc, str]:
    for rule in rules:
        done = rule(function, target)
        if done is not None:
            return done, getattr(rule, "__name__", type(rule).__name__)
    return function, "plain loops"


def _keep_attributes(before: PrimFunc, after: PrimFunc) -> PrimFunc:
    """The scheduled function with the attributes and the (missing) global symbol of the group."""
    after = after.without_attr("global_symbol")
    for key, value in (before.attrs or {}).items():
        if after.attrs is None or key not in after.attrs:
            after = after.with_attr(key, value)
    return after
