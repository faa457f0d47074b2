"""All emitters by operator type: the standard domain, and the channels-last operators of `kbitc.core`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import onnx_ir as ir

from kbitc.targets.lower.context import Context
from kbitc.targets.lower.ops import (
    activation,
    attention,
    contraction,
    conv_transpose,
    convolution,
    einsum,
    elementwise,
    generate,
    indexing,
    integer,
    integer_nonlinear,
    integer_product,
    movement,
    norm,
    padding,
    pool,
    quantized,
    reduce,
    resize,
    scan,
)

Emit = Callable[[Context, ir.Node], Any]
CORE_DOMAIN = "kbitc.core"
FUNCTION_DOMAIN = "kbitc"


FAMILIES = (
    *(elementwise, activation, movement, generate, indexing, contraction, attention, convolution, conv_transpose),
    *(einsum, reduce, padding, pool, norm, resize, scan, quantized, integer, integer_nonlinear, integer_product),
)


@cache
def emitters() -> Mapping[tuple[str, str], Emit]:
    """(domain, operator type) -> emitter. The standard domain is the empty string."""
    table: dict[tuple[str, str], Emit] = {}
    for family in FAMILIES:
        table.update({("", name): emit for name, emit in family.TABLE.items()})
        core = getattr(family, "CORE_TABLE", {})
        table.update({(CORE_DOMAIN, name): emit for name, emit in core.items()})
        functions = getattr(family, "FUNCTION_TABLE", {})
        table.update({(FUNCTION_DOMAIN, name): emit for name, emit in functions.items()})
    return table


def standard_operators() -> frozenset[str]:
    """Operator types of the standard domain that have an emitter."""
    return frozenset(name for domain, name in emitters() if not domain)
