"""What a graph pass is: a frozen dataclass, called with a model, that says whether it changed it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import onnx_ir as ir

from kbitc.errors import InternalError
from kbitc.graph import edit


class PassResult(NamedTuple):
    """A pass's answer. `model` is the model it was given, changed in place."""

    model: ir.Model
    modified: bool


class GraphPass(Protocol):
    """A rewrite of the ONNX graph. Its fields are its options; its docstring says Before, After, and when it stops."""

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass everywhere."""
        ...


def run_once(model: ir.Model, passes: Sequence[GraphPass]) -> PassResult:
    """Run passes in order, each once."""
    modified = False
    for graph_pass in passes:
        edit.forget_names(model)
        model, changed = graph_pass(model)
        modified = modified or changed
    return PassResult(model, modified)


def run_until_stable(model: ir.Model, passes: Sequence[GraphPass], *, limit: int = 30) -> PassResult:
    """Run passes in order, over and over, until none changes anything.

    Raises:
        InternalError: when they still change the model after `limit` rounds: two passes undo each other.
    """
    modified = False
    for _ in range(limit):
        model, changed = run_once(model, passes)
        if not changed:
            return PassResult(model, modified)
        modified = True
    names = ", ".join(type(graph_pass).__name__ for graph_pass in passes if graph_pass(model).modified)
    raise InternalError("canonicalisation does not come to rest", got=names)
