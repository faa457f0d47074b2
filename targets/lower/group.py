"""A TE group: the expressions that become one kernel, and the tensors they read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import relax, s_tir, te, tirx

from kbitc.targets.lower import dims
from kbitc.targets.lower.contraction import Dim, PrimFunc, RelaxExpr
from kbitc.targets.lower.values import Expr, Index

TeTensor = Any


class Group:
    """Collects what a kernel reads while its expressions are written."""

    def __init__(self) -> None:
        self._inputs: dict[int, tuple[RelaxExpr, TeTensor]] = {}

    def tensor(self, var: RelaxExpr) -> TeTensor:
        """The placeholder of a relax variable; the same one for the same variable."""
        key = id(var)
        if key not in self._inputs:
            shape = tuple(dims.as_dim(dim) for dim in var.ty.shape.values)
            placeholder = te.placeholder(shape, str(var.ty.dtype), name=f"in{len(self._inputs)}")
            # The variable is kept so that its id stays its own.
            self._inputs[key] = (var, placeholder)
        return self._inputs[key][1]

    def read(self, var: RelaxExpr, indices: Sequence[Index]) -> Expr:
        """One element of a relax variable."""
        return self.tensor(var)(*indices)

    def finish(
        self, outputs: Sequence[TeTensor], symbols: Sequence[Any]
    ) -> tuple[PrimFunc, list[RelaxExpr], list[Any]]:
        """The kernel, its arguments, and the types of its outputs.

        Args:
            outputs: the tensors that the kernel writes.
            symbols: all symbolic dimensions of the model. Those that the kernel uses but cannot take from the shape
                of an input become arguments behind the tensors.
        """
        variables = [pair[0] for pair in self._inputs.values()]
        placeholders = [pair[1] for pair in self._inputs.values()]
        function = te.create_prim_func([*placeholders, *outputs], "int64")
        bound = [dim for tensor in placeholders for dim in tensor.shape if isinstance(dim, tirx.Var)]
        used = list(tirx.analysis.undefined_vars(function.body, []))
        for tensor in (*placeholders, *outputs):
            for dim in tensor.shape:
                used.extend(dims.variables(dims.as_dim(dim)))
        free = [symbol for symbol in symbols if _among(symbol, used) and not _among(symbol, bound)]
        if free:
            function = te.create_prim_func([*placeholders, *free, *outputs], "int64")
        types = [relax.TensorType(tuple(out.shape), str(out.dtype)) for out in outputs]
        return s_tir.renew_defs(function.without_attr("global_symbol")), [*variables, *free], types


def _among(variable: Any, others: Sequence[Any]) -> bool:
    return any(variable.same_as(other) for other in others)


def compute(shape: Sequence[Dim], element: Callable[[Sequence[Index]], Expr], name: str) -> TeTensor:
    """te.compute for any rank, also 0."""
    return te.compute(tuple(shape), lambda *indices: element(indices), name=name)


def named(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """body(value) with the value computed once, however often the body repeats it."""
    if isinstance(value, tirx.Var | tirx.IntImm | tirx.FloatImm):
        return body(value)
    variable = tirx.Var("t", value.ty.dtype)
    return tirx.Let(variable, value, body(variable))
