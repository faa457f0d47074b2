"""Computes nodes whose inputs are all constants."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from kbitc.errors import ModelError
from kbitc.graph import edit
from kbitc.graph.edit import add_initializer, all_nodes, constant, describe
from kbitc.graph.evaluate import run_node
from kbitc.passes.base import PassResult

#: Never folded: quantized weights stay quantized, random numbers stay random. An Identity of a constant is what makes a
#: constant graph output; RemoveIdentity takes the others away.
_KEPT = frozenset(
    "DequantizeLinear DynamicQuantizeLinear RandomNormal RandomNormalLike RandomUniform "
    "RandomUniformLike Bernoulli Multinomial If Loop Scan Constant Identity".split()
)
#: What a QuantizeLinear of constants is folded to: codes that onnxruntime hands over as they are.
_WHOLE_CODES = frozenset((ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16))
#: Their result can be far larger than their inputs.
_GROWING = frozenset("ConstantOfShape Expand Tile Range OneHot Pad Resize EyeLike Gather".split())


@dataclass(frozen=True)
class FoldConstants:
    """Before: `t = Transpose(W)` of an initializer. After: an initializer that holds the result.

    Each node is run by onnxruntime, so the result is what the model would have computed.

    Keeps the node when the result is larger than `max_bytes`, when it grows beyond `max_growth_bytes` although its
    inputs are small, when its size cannot be told before, when it quantizes or draws random numbers, and when a large
    input has other readers too: a tied weight must not become two weights.

    Args:
        max_bytes: largest result, in bytes.
        max_growth_bytes: largest result of an operator that blows its inputs up, in bytes.
        tied_bytes: inputs of at least this size that others read too are left alone.
    """

    max_bytes: int = 1 << 30
    max_growth_bytes: int = 1 << 16
    tied_bytes: int = 1 << 14

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass.

        Raises:
            ModelError: a node of constants fails when it is run: the model could never run.
        """
        modified = False
        opset = model.opset_imports.get("", 21)
        for node in all_nodes(model):
            if node.graph is not None and self._foldable(node):
                modified = _fold(node, opset, model.graph) or modified
        return PassResult(model, modified)

    def _foldable(self, node: ir.Node) -> bool:
        if (
            node.domain
            or node.op_type in _KEPT
            or any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values())
        ):
            return False
        if not node.inputs or any(value is not None and constant(value) is None for value in node.inputs):
            return False
        if node.op_type == "QuantizeLinear" and node.outputs[0].dtype not in _WHOLE_CODES:
            return False
        size = 0
        for output in node.outputs:
            shape = edit.static_shape(output)
            if shape is None or output.dtype is None:
                if node.op_type in _GROWING:
                    return False
            else:
                size += prod(shape) * output.dtype.bitwidth // 8
        taken = [value for value in node.inputs if value is not None and value.const_value is not None]
        given = sum(value.const_value.nbytes for value in taken if value.const_value is not None)
        if size > self.max_bytes or (size > self.max_growth_bytes and size > 2 * given):
            return False
        return not any(
            value.const_value is not None and value.const_value.nbytes >= self.tied_bytes and len(value.uses()) > 1
            for value in taken
        )


def _fold(node: ir.Node, opset: int, main: ir.Graph) -> bool:
    if any(value is not None and value.dtype is not None and value.dtype.bitwidth < 8 for value in node.inputs):
        return False
    try:
        arrays = run_node(node, [constant(value) for value in node.inputs], opset)
    except ModelError as error:
        raise ModelError("a node of constants fails when it is run", where=describe(node), got=error.got) from error
    made = [output for output in node.outputs if output.name]
    for output, array in zip(made, arrays, strict=True):
        name = output.name or "folded"
        value = add_initializer(main, f"{name}.folded", array, output.dtype if array.dtype.kind == "V" else None)
        edit.redirect(output, value)
    edit.remove(node)
    return True
