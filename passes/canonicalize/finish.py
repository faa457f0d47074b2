"""Housekeeping: dead code, node order, node names, shapes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.shapes import infer_shapes
from kbitc.passes.base import PassResult


@dataclass(frozen=True)
class RemoveDeadCode:
    """Before: nodes and initializers that no output needs. After: they are gone.

    Keeps graph inputs that nothing reads: they belong to the model's signature.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        return PassResult(model, edit.remove_dead(model))


@dataclass(frozen=True)
class SortNodes:
    """Before: nodes in any order. After: each node comes after those it reads from, otherwise in the old order."""

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        before = [id(node) for node in model.graph]
        model.graph.sort()
        return PassResult(model, before != [id(node) for node in model.graph])


@dataclass(frozen=True)
class InferShapes:
    """Completes the types and shapes stored on values. It changes no node, so it never reports a modification."""

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        infer_shapes(model)
        return PassResult(model, False)


@dataclass(frozen=True)
class NameNodes:
    """Before: nodes without a name or with another node's name. After: each node has a name of its own.

    A nameless node is called as its first output. Domains that no node uses leave the opset imports.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        modified = edit.name_nodes(model)
        used = {node.domain for node in edit.all_nodes(model)} | {key[0] for key in model.functions}
        for domain in [domain for domain in model.graph.opset_imports if domain and domain not in used]:
            del model.graph.opset_imports[domain]
            modified = True
        return PassResult(model, modified)
