"""Replaces calls of model-local functions by their bodies."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from kbitc.graph.edit import all_nodes
from kbitc.passes.base import PassResult

#: Functions of this domain are kbitc's own quantization operators and stay whole.
OWN_DOMAIN = "kbitc"


@dataclass(frozen=True)
class InlineFunctions:
    """Before: `y = my::Block(x)` with a body in the model. After: the nodes of the body.

    Keeps the graph when a function belongs to a domain in `keep`. Nodes of a body remember the opset their function
    was written for, so that UpgradeOpset can run afterwards.

    Args:
        keep: domains whose functions stay calls.
    """

    keep: tuple[str, ...] = (OWN_DOMAIN,)

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        chosen = [function for function in model.functions.values() if function.domain not in self.keep]
        if not chosen:
            return PassResult(model, False)
        for function in chosen:
            _remember_versions(function, model)
        result = InlinePass(criteria=lambda function: function.domain not in self.keep)(model)
        for key in [key for key, function in model.functions.items() if function.domain not in self.keep]:
            del model.functions[key]
        used = {node.domain for node in all_nodes(model)} | {function.domain for function in model.functions.values()}
        for domain in [domain for domain in model.graph.opset_imports if domain and domain not in used]:
            del model.graph.opset_imports[domain]
        return PassResult(model, result.modified or bool(chosen))


def _remember_versions(function: ir.Function, model: ir.Model) -> None:
    """Write the body's opset on its nodes, then declare the model's: the inliner wants both to agree."""
    version = function.opset_imports.get("", model.opset_imports.get(""))
    for node in function.all_nodes():
        if not node.domain and node.version is None:
            node.version = version
    if "" in model.opset_imports:
        function.opset_imports[""] = model.opset_imports[""]
