"""Quantizes weights without the mean of their block (centring: arXiv 2212.09720, section 2 and appendix)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kbitc.graph import edit
from kbitc.passes.base import PassResult
from kbitc.passes.split import MEANS, add_product, matmul_weights, set_weight


@dataclass(frozen=True)
class CentreWeights:
    """Before: `MatMul(x, W)` with a constant W [C, N].

    After: `MatMul(x, W - m) + MatMul(s, M)` with M [ceil(C / block), N] the means of W over blocks of C, m the same
    repeated over its block, and s the sums of x over those blocks, made once for all products that read x alike:
    sum_c x_c m_c = sum_b (sum of x in block b) M_b. Block 0 is the whole of C.

    Keeps weights that another operator than MatMul reads, and x of rank 1 or unknown rank.
    """

    block: int

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass."""
        sums: dict[ir.Value, ir.Value] = {}
        modified = False
        for candidate in matmul_weights(model):
            if all((edit.rank(node.inputs[0]) or 0) > 1 for node in candidate.nodes):
                self._split(model.graph, candidate.tensor, candidate.nodes, sums)
                modified = True
        return PassResult(model, modified)

    def _split(self, graph: ir.Graph, name: str, nodes: tuple[ir.Node, ...], sums: dict[ir.Value, ir.Value]) -> None:
        weight = graph.initializers[name]
        array = edit.constant(weight)
        if array is None:
            return
        channels = array.shape[0]
        block = self.block or channels
        starts = np.arange(0, channels, block)
        counts = np.diff([*starts, channels])
        means = (np.add.reduceat(array.astype(np.float64), starts, axis=0) / counts[:, None]).astype(np.float32)
        set_weight(weight, array - np.repeat(means, counts, axis=0))
        stored = edit.add_initializer(graph, f"{name}{MEANS}", means)
        for node in nodes:
            x = node.inputs[0]
            if x is None:
                continue
            if x not in sums:
                sums[x] = self._block_sums(node, x, channels, block)
            add_product(node, sums[x], stored, "_means")

    def _block_sums(self, node: ir.Node, x: ir.Value, channels: int, block: int) -> ir.Value:
        """Sums of x [..., C] over blocks along the last axis: [..., ceil(C / block)]."""
        graph, rank = edit.root_graph(node), edit.rank(x) or 0
        blocks = -(-channels // block)
        if blocks == 1:
            last = edit.add_initializer(graph, "last_axis", np.array([-1], np.int64))
            return edit.insert_before(node, "ReduceSum", [x, last], keepdims=1)
        if channels % block:
            ends = np.zeros(2 * rank, np.int64)
            ends[-1] = blocks * block - channels
            x = edit.insert_before(node, "Pad", [x, edit.add_initializer(graph, "block_padding", ends)])
        shape = np.array([*[0] * (rank - 1), blocks, block], np.int64)
        parts = edit.insert_before(node, "Reshape", [x, edit.add_initializer(graph, "block_shape", shape)])
        last = edit.add_initializer(graph, "last_axis", np.array([-1], np.int64))
        return edit.insert_before(node, "ReduceSum", [parts, last], keepdims=0)
