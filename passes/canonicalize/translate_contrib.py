"""Rewrites onnxruntime's own operators (domain com.microsoft) as standard ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.edit import add_initializer, all_nodes, insert_before, root_graph
from kbitc.passes.base import PassResult
from kbitc.passes.canonicalize.matmul_nbits import translate as translate_matmul_nbits

DOMAIN = "com.microsoft"
#: Simplified layer norms are written with and without the domain.
_DOMAINS = (DOMAIN, "")


@dataclass(frozen=True)
class TranslateContrib:
    """Before: com.microsoft MatMulNBits, SkipLayerNormalization, FastGelu, BiasGelu, QuickGelu, FusedMatMul, ...
    After: standard operators with the same meaning (onnxruntime, ContribOperators.md).

    Keeps operators that are not in the table and forms without standard equivalent: they are refused later, by name.
    """

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass.

        Raises:
            ModelError: a MatMulNBits whose parts do not fit together.
        """
        modified = False
        for node in all_nodes(model):
            rule = _RULES.get(node.op_type) if node.domain in _DOMAINS else None
            if rule is None or (node.domain == "" and node.op_type not in _SIMPLIFIED):
                continue
            modified = rule(node) or modified
        return PassResult(model, modified)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _number(node: ir.Node, label: str, number: float, like: ir.Value | None) -> ir.Value:
    kind = like.dtype.numpy() if like is not None and like.dtype is not None else np.dtype(np.float32)
    return add_initializer(root_graph(node), f"{node.outputs[0].name}.{label}", np.asarray(number, kind))


def _unused(node: ir.Node, *indices: int) -> bool:
    outputs = [node.outputs[index] for index in indices if index < len(node.outputs)]
    return not any(value.uses() or value.is_graph_output() for value in outputs)


def _gelu(node: ir.Node) -> bool:
    edit.replace_with(node, "Gelu", [node.inputs[0]])
    return True


def _biased(node: ir.Node) -> ir.Value | None:
    """Input 0 plus input 1, when that is there."""
    data, bias = node.inputs[0], _input(node, 1)
    return data if bias is None else insert_before(node, "Add", [data, bias], like=data)


def _bias_gelu(node: ir.Node) -> bool:
    edit.replace_with(node, "Gelu", [_biased(node)])
    return True


def _fast_gelu(node: ir.Node) -> bool:
    edit.replace_with(node, "Gelu", [_biased(node)], approximate="tanh")
    return True


def _quick_gelu(node: ir.Node) -> bool:
    """x * sigmoid(alpha x)."""
    data = node.inputs[0]
    alpha = _number(node, "alpha", node.attributes.get_float("alpha", 1.702), data)
    scaled = insert_before(node, "Mul", [data, alpha], like=data)
    gate = insert_before(node, "Sigmoid", [scaled], like=data)
    edit.replace_with(node, "Mul", [data, gate])
    return True


def _sum_of_skip(node: ir.Node, bias: ir.Value | None) -> ir.Value:
    total = insert_before(node, "Add", [node.inputs[0], node.inputs[1]], like=node.inputs[0])
    return total if bias is None else insert_before(node, "Add", [total, bias], like=total)


def _skip_layer_norm(node: ir.Node) -> bool:
    """LayerNorm(x + skip + bias); output 3 is the sum."""
    if not _unused(node, 1, 2):
        return False
    total = _sum_of_skip(node, _input(node, 4))
    epsilon = node.attributes.get_float("epsilon", 1e-12)
    inputs = [total, node.inputs[2], _input(node, 3)]
    return _finish_skip(
        node, total, insert_before(node, "LayerNormalization", inputs, like=total, axis=-1, epsilon=epsilon)
    )


def _skip_simplified(node: ir.Node) -> bool:
    """RMSNorm(x + skip + bias); output 3 is the sum."""
    if not _unused(node, 1, 2):
        return False
    total = _sum_of_skip(node, _input(node, 3))
    return _finish_skip(node, total, _rms_norm(node, total, node.inputs[2], node.attributes.get_float("epsilon", 1e-5)))


def _finish_skip(node: ir.Node, total: ir.Value, result: ir.Value) -> bool:
    if len(node.outputs) > 3:
        edit.redirect(node.outputs[3], total)
    edit.redirect(node.outputs[0], result)
    edit.remove(node)
    return True


def _simplified(node: ir.Node) -> bool:
    data = node.inputs[0]
    if (
        data is None
        or not _unused(node, 1)
        or node.attributes.get_int("axis", -1) not in (-1, (edit.rank(data) or 0) - 1)
    ):
        return False
    edit.replace(node, _rms_norm(node, data, node.inputs[1], node.attributes.get_float("epsilon", 1e-5)))
    return True


def _rms_norm(node: ir.Node, data: ir.Value, scale: ir.Value | None, epsilon: float) -> ir.Value:
    """x / sqrt(mean(x x) + epsilon) * scale over the last axis (Zhang and Sennrich, arXiv 1910.07467, eq. 4)."""
    axes = add_initializer(root_graph(node), f"{node.outputs[0].name}.axes", np.asarray([-1], np.int64))
    square = insert_before(node, "Mul", [data, data], like=data)
    mean = insert_before(node, "ReduceMean", [square, axes], keepdims=1)
    shifted = insert_before(node, "Add", [mean, _number(node, "epsilon", epsilon, data)])
    root = insert_before(node, "Sqrt", [shifted])
    for value in (mean, shifted, root):
        value.type = data.type
    normal = insert_before(node, "Div", [data, root], like=data)
    return insert_before(node, "Mul", [normal, scale], like=data)


def _fused_matmul(node: ir.Node) -> bool:
    """alpha * op(A) @ op(B), op: swap of the last two axes; batch transposes are left alone."""
    if node.attributes.get_int("transBatchA", 0) + node.attributes.get_int("transBatchB", 0) > 0:
        return False
    operands = []
    for value, flag in zip(node.inputs[:2], ("transA", "transB"), strict=True):
        size = edit.rank(value)
        if node.attributes.get_int(flag, 0) == 0 or value is None:
            operands.append(value)
            continue
        if size is None or size < 2:
            return False
        perm = [*range(size - 2), size - 1, size - 2]
        swapped = insert_before(node, "Transpose", [value], like=value, perm=perm)
        swapped.shape = edit.permute(value.shape, perm)
        operands.append(swapped)
    alpha = node.attributes.get_float("alpha", 1.0)
    if alpha == 1.0:
        edit.replace_with(node, "MatMul", operands)
        return True
    product = insert_before(node, "MatMul", operands, like=node.outputs[0])
    edit.replace_with(node, "Mul", [product, _number(node, "alpha", alpha, node.inputs[0])])
    return True


def _standard(node: ir.Node) -> bool:
    """The same operator under the default domain."""
    node.domain = ""
    return True


_SIMPLIFIED = frozenset(("SimplifiedLayerNormalization",))
_RULES: dict[str, Callable[[ir.Node], bool]] = {
    "MatMulNBits": translate_matmul_nbits,
    "Gelu": _gelu,
    "BiasGelu": _bias_gelu,
    "FastGelu": _fast_gelu,
    "QuickGelu": _quick_gelu,
    "SkipLayerNormalization": _skip_layer_norm,
    "SimplifiedLayerNormalization": _simplified,
    "SkipSimplifiedLayerNormalization": _skip_simplified,
    "FusedMatMul": _fused_matmul,
    "QuantizeLinear": _standard,
    "DequantizeLinear": _standard,
    "LayerNormalization": _standard,
}
