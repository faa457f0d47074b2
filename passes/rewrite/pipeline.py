"""Stage 7: the plan and the solved weights become a quantized ONNX graph."""

from __future__ import annotations

import onnx_ir as ir

from kbitc.graph.functions import add_functions
from kbitc.passes.rewrite.quantize_activations import quantize_activations
from kbitc.passes.rewrite.quantize_static import quantize_static
from kbitc.passes.rewrite.quantize_weights import quantize_weights
from kbitc.quant.plan import INT8, QuantPlan
from kbitc.quant.scheme import ScaleCode
from kbitc.quant.tensor import QTensor

# int8 codes and products of at most 127 by a level times its block scale.
LONGEST_SUM = (2**31 - 1) // (127 * 127)


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
    """Node -> elements that share a scale of its run-time quantized activation.

    They are those of a block of the weight, or of a whole row where the weight's block scales are integers: then the
    sum over all blocks is one of integers (QServe, arXiv 2405.04532, section 4), as long as int32 holds it.
    """
    return {
        node: activation_block(tensors[entry.tensor])
        for entry in plan.quantized()
        if entry.activation == INT8
        for node in entry.nodes
    }


def activation_block(weight: QTensor) -> int:
    """Channels that share a scale of the activation which meets this weight."""
    channels = weight.shape[2]
    whole = weight.scheme.scale_code is ScaleCode.INTEGER and channels <= LONGEST_SUM
    return channels if whole else weight.block
