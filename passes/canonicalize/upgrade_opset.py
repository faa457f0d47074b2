"""Rewrites the operators of opsets 9 to 20 into their opset-21 form, by adapters of our own."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kbitc.graph.edit import all_nodes
from kbitc.passes.base import PassResult
from kbitc.passes.canonicalize.adapters import ADAPTERS

#: The operator set all later stages are written for.
CANONICAL_OPSET = 21
_MIN_IR = 10


@dataclass(frozen=True)
class UpgradeOpset:
    """Before: a model of opset 9..20. After: the same function in the operator forms of opset 21.

    Keeps the graph when the opset is `target` or later. Each adapter states the version in which ONNX changed its
    operator and is applied to nodes of earlier versions only. Nodes that came out of an inlined function carry that
    function's version.

    Args:
        target: the opset the model has afterwards, when it had an earlier one.
    """

    target: int = CANONICAL_OPSET

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass.

        Raises:
            UnsupportedError: a form that has no equivalent, such as BatchNormalization in training mode.
        """
        version = model.opset_imports.get("", self.target)
        modified = version < self.target
        for node in all_nodes(model):
            if node.domain:
                continue
            own = node.version or version
            for changed_in, adapter in ADAPTERS.get(node.op_type, ()):
                if own < changed_in and node.graph is not None:
                    adapter(node)
                    modified = True
            node.version = None
        model.graph.opset_imports[""] = max(version, self.target)
        if model.ir_version < _MIN_IR:
            model.ir_version = _MIN_IR
            modified = True
        return PassResult(model, modified)
