"""Stage 4: exact rewrites that split a product in two, so that the larger part is easier to quantize.

`y = x W` becomes `y = x W' + s(x) V` with a small V: block means (`centre_weights`) or chosen rows (`keep_columns`).
Both happen on the float graph; everything after them treats the two products like any others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph import edit
from kbitc.passes.allocate.survey import Candidate, survey
from kbitc.quant.plan import QuantPlan
from kbitc.quant.scheme import Granularity, QuantScheme, ScaleType

# The small weights are known by their names.
MEANS, COLUMNS = "_block_means", "_kept_columns"
KEPT_BITS = 8


def matmul_weights(model: ir.Model) -> list[Candidate]:
    """The weights that are read by MatMul nodes of the main graph alone, as [C, N]."""
    return [candidate for candidate in survey(model) if candidate.obstacle is None and _only_products(model, candidate)]


def _only_products(model: ir.Model, candidate: Candidate) -> bool:
    weight = model.graph.initializers[candidate.tensor]
    uses = [(use.node, use.idx) for use in weight.uses()]
    products = all(node.op_type == "MatMul" and index == 1 and node.graph is model.graph for node, index in uses)
    return candidate.kind == "matmul" and products and not weight.is_graph_output()


def set_weight(weight: ir.Value, array: npt.NDArray[np.float32]) -> None:
    """Give an initializer other elements of the same shape."""
    weight.const_value = ir.Tensor(np.ascontiguousarray(array), name=weight.name)


def add_product(node: ir.Node, x: ir.Value, weight: ir.Value, suffix: str) -> None:
    """y = MatMul(a, b) becomes y = MatMul(a, b) + MatMul(x, weight); the first product keeps the node's name."""
    name, like = node.name or node.outputs[0].name, node.outputs[0]
    kept = edit.insert_before(node, "MatMul", node.inputs, name=f"{name}_main", like=like)
    added = edit.insert_before(node, "MatMul", [x, weight], name=f"{name}{suffix}", like=like)
    total = edit.replace_with(node, "Add", [kept, added])
    for value, wanted in ((kept, name), (total, f"{name}_sum")):
        producer = value.producer()
        if producer is not None:
            producer.name = wanted


def kept_float(candidates: Sequence[Candidate]) -> dict[str, str]:
    """The means of centred weights, which stay float: tensor name -> the option that made them."""
    return {candidate.tensor: "--centre" for candidate in candidates if candidate.tensor.endswith(MEANS)}


def widen_kept(plan: QuantPlan) -> QuantPlan:
    """The plan with 8 bits for the columns that `keep_columns` has taken out."""
    return QuantPlan(
        tuple(
            replace(entry, scheme=_wide(entry.scheme.scale_type), reason="--proxy keeps these columns at 8 bits")
            if entry.scheme is not None and entry.tensor.endswith(COLUMNS)
            else entry
            for entry in plan.entries
        )
    )


def _wide(scale_type: ScaleType) -> QuantScheme:
    return QuantScheme("int", KEPT_BITS, Granularity.CHANNEL, scale_type=scale_type)
