"""Stage 7: the plan and the solved weights become a quantized ONNX graph."""

from __future__ import annotations

import onnx_ir as ir

from kbitc.graph.functions import add_functions
from kbitc.passes.rewrite.quantize_activations import quantize_activations
from kbitc.passes.rewrite.quantize_static import quantize_static
from kbitc.passes.rewrite.quantize_weights import quantize_weights
from kbitc.quant.plan import INT8, QuantPlan
from kbitc.quant.tensor import QTensor


def rewrite(model: ir.Model, plan: QuantPlan, tensors: dict[str, QTensor], kinds: dict[str, str]) -> ir.Model:
    """Stage 7, on a copy of the graph that shares the weights."""
    copy = model.clone()
    needed = quantize_activations(copy, activation_blocks(plan, tensors))
    if plan.static is not None:
        needed += quantize_static(copy, plan.static, tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if name in copy.graph.initializers}
    needed += quantize_weights(copy, tensors, kinds)
    add_functions(copy, needed, copy.graph.opset_imports[""])
    return copy


def activation_blocks(plan: QuantPlan, tensors: dict[str, QTensor]) -> dict[str, int]:
    """Node -> elements that share a scale of its run-time quantized activation."""
    return {
        node: tensors[entry.tensor].block
        for entry in plan.quantized()
        if entry.activation == INT8
        for node in entry.nodes
    }
