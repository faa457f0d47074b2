"""Moves convolution islands to channels-last before emission. Works on the ONNX graph; needs no tvm.

Before: Conv, pools and Resize on [N, C, H, W].
After: `kbitc.core::ConvNHWC`, ... on [N, H, W, C], and the elementwise operators, concatenations, reductions and so
on between them on channels-last data too. Transposes stand only where an island meets the rest. Convolution weights
keep their ONNX layout; graph inputs and outputs keep theirs. 1-D operators become the same node types on [N, L, C].

How: one walk in running order. A value may have a *twin*, the same data with channels last. A convolution is
rewritten on the twin of its input; an operator that does not care about layout is rewritten when at least half of its
large inputs have twins. A Transpose of the graph whose input has a twin is composed with the twin's permutation, and
disappears when both cancel. Readers that were not rewritten get a Transpose back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.edit import add_initializer, constant, insert_before, is_op, root_graph

CORE_DOMAIN = "kbitc.core"


def to_channels_last(model: ir.Model) -> ir.Model:
    """Rewrite the main graph of a model in place and return the model. Computes the same function."""
    # The rules are written against this module, so they can only be read once it is loaded.
    from kbitc.targets.lower.layout_cleanup import reshape_idle_transposes
    from kbitc.targets.lower.layout_rules import RULES, SPATIAL_RULES

    if not any(_key(node) in SPATIAL_RULES for node in model.graph):
        return model
    edit.forget_names(model)
    layout = Layout(model.graph)
    for node in list(model.graph):
        if is_op(node, "Transpose"):
            layout.compose(node)
            continue
        rule = SPATIAL_RULES.get(_key(node)) or RULES.get(_key(node))
        if rule is not None:
            layout.apply(node, rule)
    layout.finish()
    reshape_idle_transposes(model)
    model.graph.opset_imports.setdefault(CORE_DOMAIN, 1)
    edit.remove_dead(model)
    edit.name_nodes(model)
    return model


def _key(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def last_from_first(rank: int) -> list[int]:
    """The permutation of a Transpose from channels-first to channels-last: [0, 2, 3, 1] for rank 4."""
    return [0, *range(2, rank), 1] if rank > 2 else list(range(rank))


def first_from_last(rank: int) -> list[int]:
    """The permutation of a Transpose from channels-last to channels-first: [0, 3, 1, 2] for rank 4."""
    return [0, rank - 1, *range(1, rank - 1)] if rank > 2 else list(range(rank))


def last_axis(axis: int, rank: int) -> int:
    """Where a channels-first axis stands in channels-last data."""
    return last_from_first(rank).index(axis % rank)


class Layout:
    """The twins of one graph, and the edits that rules make."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._twins: dict[ir.Value, ir.Value] = {}
        self._rewritten: list[ir.Node] = []

    def has_twin(self, value: ir.Value | None) -> bool:
        """Whether the channels-last form of `value` is at hand without a new Transpose of large data."""
        if value is None:
            return False
        return value in self._twins or self._source_of_twin(value) is not None

    def twin(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """The channels-last form of a value of known rank, made by a Transpose before `before` when there is none."""
        if value in self._twins:
            return self._twins[value]
        size = edit.rank(value) or 0
        if size <= 2:
            return value
        perm = last_from_first(size)
        array = constant(value)
        source = self._source_of_twin(value)
        if source is not None:
            made = source
        elif array is not None:
            moved = np.ascontiguousarray(array.transpose(perm))
            made = add_initializer(self.graph, f"{value.name}.channels_last", moved, value.dtype)
        else:
            made = self._transpose(value, perm, before)
        self._twins[value] = made
        return made

    def _source_of_twin(self, value: ir.Value) -> ir.Value | None:
        """u when `value` is the channels-first Transpose of u, so that u itself is the twin."""
        node = edit.producer(value, "Transpose")
        size = edit.rank(value)
        if node is None or size is None or size <= 2:
            return None
        return node.inputs[0] if _perm(node, size) == first_from_last(size) else None

    def _transpose(self, value: ir.Value, perm: Sequence[int], before: ir.Node) -> ir.Value:
        node = edit.producer(value, "Transpose")
        source = value
        if node is not None and node.inputs[0] is not None:
            source = node.inputs[0]
            inner = _perm(node, len(perm))
            perm = [inner[axis] for axis in perm]
        made = insert_before(before, "Transpose", [source], name=f"{value.name}.channels_last", perm=list(perm))
        made.type, made.shape = value.type, edit.permute(source.shape, perm)
        return made

    def apply(self, node: ir.Node, rule: Callable[[Layout, ir.Node], list[ir.Value] | None]) -> None:
        """Let a rule rewrite a node. The old node stays until `finish` knows who still reads it."""
        made = rule(self, node)
        if made is None:
            return
        for old, new in zip(node.outputs, made, strict=True):
            size = edit.rank(old) or 0
            new.type = old.type
            new.shape = edit.permute(old.shape, last_from_first(size))
            self._twins[old] = new
        self._rewritten.append(node)

    def emit(
        self, node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], *, domain: str = "", **changed: object
    ) -> list[ir.Value]:
        """A channels-last copy of `node` before it: same attributes but for `changed` (None drops one), new inputs."""
        name = f"{node.name or node.outputs[0].name}.channels_last"
        first = insert_before(node, op_type, inputs, name=name, domain=domain, outputs=len(node.outputs))
        new = first.producer()
        outputs = [] if new is None else list(new.outputs)
        if new is not None:
            for attribute in node.attributes.values():
                if attribute.name not in changed:
                    new.attributes.add(attribute)
            for key, item in changed.items():
                edit.set_attribute(new, key, item)
        return outputs

    def compose(self, node: ir.Node) -> None:
        """A Transpose of the graph reads its input's twin instead, or goes away when the twin already is its result."""
        value = node.inputs[0]
        if value is None or value not in self._twins:
            return
        source = self._twins[value]
        size = edit.rank(value) or 0
        back = first_from_last(size)
        perm = [back[axis] for axis in _perm(node, size)]
        if perm == list(range(size)) and not (node.outputs[0].is_graph_output() and source.producer() is None):
            edit.replace(node, source)
            return
        node.replace_input_with(0, source)
        edit.set_attribute(node, "perm", perm)

    def finish(self) -> None:
        """Give readers that were not rewritten their channels-first data, and remove the old nodes."""
        for node in reversed(self._rewritten):
            for old in node.outputs:
                if old.uses() or old.is_graph_output():
                    self._give_back(node, old, self._twins[old])
            root_graph(node).remove(node, safe=True)

    def _give_back(self, node: ir.Node, old: ir.Value, twin: ir.Value) -> None:
        size = edit.rank(old) or 0
        if size <= 2:
            edit.redirect(old, twin)
            return
        perm = first_from_last(size)
        made = insert_before(node, "Transpose", [twin], name=f"{old.name}.channels_first", like=old, perm=perm)
        edit.redirect(old, made)


def _perm(node: ir.Node, rank: int) -> list[int]:
    return list(node.attributes.get_ints("perm", list(range(rank))[::-1]))
