"""How emitters refuse: one error a node, with the node's name, what cannot be done, and what helps."""

from __future__ import annotations

import onnx_ir as ir

from kbitc.errors import UnsupportedError
from kbitc.graph.edit import describe

GENERAL_REMEDY = "exclude or replace this operator in the model"


def refuse(node: ir.Node, what: str, *, got: object = None, remedy: str = GENERAL_REMEDY) -> UnsupportedError:
    """The error for a node that cannot be lowered."""
    return UnsupportedError(what, where=describe(node), got=got, remedy=remedy)
