"""How much memory the values of a relax function need at the same time."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

ALIASES = ("relax.reshape",)


def largest_live_set(module: Any, dims: Mapping[str, int]) -> int:
    """Bytes of the largest set of values that `main` holds at once, inputs and weights not counted.

    A value lives from the call that makes it to the last one that reads it, outputs to the end; a reshape is the value
    that it reshapes.

    Args:
        module: relax module before memory is planned, whose main is one sequence of calls.
        dims: numbers for symbolic dims, by name.
    """
    from tvm import relax

    main = module["main"]
    bindings = [item for block in main.body.blocks for item in block.bindings]
    made: dict[Any, int] = {}
    last: dict[Any, int] = {}
    owner: dict[Any, list[Any]] = {parameter: [] for parameter in main.params}
    for step, item in enumerate(bindings):
        read = [root for var in _variables(item.value) for root in owner.get(var, [])]
        kinds = relax.Var | relax.TupleGetItem | relax.Tuple
        alias = isinstance(item, relax.MatchCast) or isinstance(item.value, kinds)
        if alias or (isinstance(item.value, relax.Call) and getattr(item.value.op, "name", "") in ALIASES):
            owner[item.var] = read
        else:
            owner[item.var] = [item.var]
            made[item.var] = step
        for root in [*read, *owner[item.var]]:
            last[root] = step
    for var in _variables(main.body.body):
        last |= dict.fromkeys(owner.get(var, []), len(bindings))
    sizes = {var: _bytes(var.ty, dims) for var in made}
    return max(
        sum(size for var, size in sizes.items() if made[var] <= step <= last[var]) for step in range(len(bindings))
    )


def _variables(expression: Any) -> list[Any]:
    from tvm import relax

    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, relax.Var):
            found.append(node)

    relax.analysis.post_order_visit(expression, visit)
    return found


def _bytes(kind: Any, dims: Mapping[str, int]) -> int:
    from tvm import relax

    if isinstance(kind, relax.TupleType):
        return sum(_bytes(field, dims) for field in kind.fields)
    if not isinstance(kind, relax.TensorType):
        return 0
    return prod(_number(dim, dims) for dim in kind.shape.values) * np.dtype(str(kind.dtype)).itemsize


def _number(expression: Any, dims: Mapping[str, int]) -> int:
    from tvm import sym, tirx

    if isinstance(expression, int):
        return expression
    analyzer = sym.Analyzer()
    for var in tirx.analysis.undefined_vars(expression):
        analyzer.bind(var, tirx.const(dims[var.name], "int64"))
    return int(analyzer.simplify(expression))
