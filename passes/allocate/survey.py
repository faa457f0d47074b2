"""Finds every weight of a graph that could be quantized, and says of the others why not."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kbitc.graph import edit, ops

#: Operators that pass rows of a table on.
_MOVES = frozenset("Cast Concat Expand Identity Reshape Slice Split Squeeze Tile Transpose Unsqueeze".split())


@dataclass(frozen=True)
class Candidate:
    """One weight initializer and the nodes that use it.

    Attributes:
        tensor: initializer name.
        kind: matmul, conv or embedding: the view that `kbitc.graph.ops` gives the weight.
        nodes: the nodes that use it as their weight.
        shape: (N, T, C).
        group: convolution groups, 1 elsewhere.
        obstacle: why it cannot be quantized; None when it can.
    """

    tensor: str
    kind: str
    nodes: tuple[ir.Node, ...]
    shape: tuple[int, int, int]
    group: int
    obstacle: str | None

    @property
    def op_type(self) -> str:
        """Operator type of the first user that has an activation, else of the first user."""
        for node in self.nodes:
            if ops.WEIGHT_USES[node.op_type].activation_input is not None:
                return node.op_type
        return self.nodes[0].op_type


def survey(model: ir.Model) -> list[Candidate]:
    """Candidates in graph order, one per weight initializer (tied weights appear once)."""
    found: dict[str, tuple[str, list[ir.Node]]] = {}
    obstacles: dict[str, str] = {}
    for node in edit.all_nodes(model):
        use = ops.WEIGHT_USES.get(node.op_type)
        if use is None or node.domain != "":
            continue
        weight, kind = ops.weight_source(node)
        if weight is None or weight.name is None or weight.graph is not model.graph:
            continue
        reason = ops.reason_not_quantizable(node) or _reason_of_rows(node)
        if ops.WAVES in weight.name:
            reason = "it is the table of a Fourier transform"
        if weight.is_graph_output():
            reason = "it is an output of the model"
        known = found.setdefault(weight.name, (kind, []))
        known[1].append(node)
        if reason is None and known[0] != kind:
            reason = "it is used in two layouts"
        if reason is not None:
            obstacles[weight.name] = reason
    return [_candidate(model, name, kind, nodes, obstacles.get(name)) for name, (kind, nodes) in found.items()]


def _reason_of_rows(node: ir.Node) -> str | None:
    """Rows that multiply other values, as the cosines and sines of rotary positions do, stay as they are.

    A row that a matrix product or a normalization reads averages the errors of its codes; a factor passes on each one.
    """
    if node.op_type != "Gather":
        return None
    rest, seen = list(node.outputs), set[ir.Value]()
    while rest:
        value = rest.pop()
        if value in seen:
            continue
        seen.add(value)
        for user, index in value.uses():
            if user.op_type in _MOVES and not user.domain:
                rest += user.outputs
            elif edit.is_op(user, "Mul") and _is_computed(user.inputs[1 - index]):
                return "its rows are factors of other values"
    return None


def _is_computed(value: ir.Value | None) -> bool:
    """Whether a factor is neither a constant, nor one number a row, nor itself rows of a table."""
    if value is None or ops.is_constant(value) or value.shape is None or not value.shape or value.shape[-1] == 1:
        return False
    maker = value.producer()
    while maker is not None and maker.op_type in _MOVES and maker.inputs[0] is not None:
        maker = maker.inputs[0].producer()
    return maker is not None and maker.op_type != "Gather"


def _candidate(model: ir.Model, name: str, kind: str, nodes: list[ir.Node], obstacle: str | None) -> Candidate:
    weight = model.graph.initializers[name]
    shape = tuple(int(dim) for dim in weight.const_value.shape.numpy()) if weight.const_value is not None else ()
    group = max(ops.conv_group(node) for node in nodes) if kind == "conv" else 1
    view = ops.view_shape(kind, shape) if obstacle is None else (0, 0, 0)
    return Candidate(name, kind, tuple(nodes), view, group, obstacle)
