"""Which nodes of a static graph run on integers, who reads codes, and who reads finer int32 numbers."""

from __future__ import annotations

from collections.abc import Container, Mapping

import onnx_ir as ir

from kbitc.graph import edit, images
from kbitc.passes.allocate import families
from kbitc.passes.allocate.families import Form

#: Families that read int32 numbers where their source has some.
_READS_WIDE = families.WIDE | {families.SOFTMAX}
#: Families whose result is made as codes.
_GIVES_CODES = frozenset(
    (families.ADD, families.PRELU, families.CONCAT, families.MOVE, families.PEAK, families.SOFTMAX)
)
#: Families whose result is an int32 number before it is rounded to codes.
GIVES_WIDE = families.ACCUMULATES | families.WIDE


class Decision:
    """Which nodes run on integers.

    Attributes:
        forms: the form of every node.
        integer: the nodes that run on integers, in graph order, tables and biases apart.
        readers: value -> integer nodes that read its codes.
        images: root -> its images that have codes, in graph order; the root itself is not among them.
        wide: sums that are kept as int32 numbers because only a normalization or a softmax reads them.
    """

    def __init__(
        self, model: ir.Model, surveyed: Mapping[ir.Node, Form], *, integer_only: bool = False,
        carried: Container[str] = (),
    ) -> None:  # fmt: skip
        self.model, self.integer_only, self.carried = model, integer_only, carried
        self.forms = surveyed
        self.roots = {
            form.output: form.inputs[0]
            for form in surveyed.values()
            if form.family == families.TABLE and form.output is not None
        }
        self.producers = {
            form.output: node
            for node, form in surveyed.items()
            if form.output is not None and form.family != families.BIAS
        }
        self.producers |= {value: node for node in surveyed for value in node.outputs if value not in self.producers}
        self.integer: list[ir.Node] = []
        self._forward()
        self._backward()
        self.wide = self._wide_sums() if integer_only else set[ir.Node]()
        self.readers: dict[ir.Value, list[ir.Node]] = {}
        for node in self.integer:
            for value in surveyed[node].inputs:
                if not (self.reads_wide(node) and self.wide_source(value) is not None):
                    self.readers.setdefault(value, []).append(node)
        wanted = {*self.readers}
        for value, root in reversed(self.roots.items()):
            if value in wanted or value.name in carried or self._leaves(value):
                wanted |= {value, root}
        self.images: dict[ir.Value, list[ir.Value]] = {}
        for value, root in self.roots.items():
            if value in wanted and self._made_on_integers(root):
                self.images.setdefault(root, []).append(value)

    def has_codes(self, value: ir.Value) -> bool:
        """Whether an integer node reads the value's codes, or they are needed for a table."""
        if value in self.readers or (value in self.images and not self.folded(value)):
            return True
        if value in self.roots:
            given_out = self._leaves(value) or value.name in self.carried
            return given_out and self._made_on_integers(self.roots[value])
        node = self.producers.get(value)
        if value.name in self.carried and node in self._chosen:
            return True
        if node in self._chosen and node is not None and self.forms[node].family == families.MOVE:
            if len(node.outputs) > 1:
                return True  # all its results are moved as codes, whoever reads them
        return (
            node in self._chosen
            and node is not None
            and self.forms[node].family in _GIVES_CODES
            and (self._leaves(value) or (self.integer_only and bool(value.uses()) and not self._unread(value, node)))
        )

    def _unread(self, value: ir.Value, node: ir.Node) -> bool:
        """Whether a result of an integer-only graph needs no codes: it stays int32, or becomes one limited value."""
        return node in self.wide or self.folded(value)

    def _leaves(self, value: ir.Value) -> bool:
        """Whether codes of the value are given out as they are, because its function may not be computed on floats."""
        return self.integer_only and value.is_graph_output()

    def folded(self, root: ir.Value) -> bool:
        """Whether a root's only use as codes is one image that requantization can clip to."""
        found = self.images.get(root, [])
        node = self.producers.get(root)
        if node is None or root in self.readers or len(found) != 1 or root.name in self.carried:
            return False
        if self.forms[node].family not in families.ACCUMULATES | {families.ADD}:
            return False
        return is_clip_chain(found[0], root)

    def reads_wide(self, node: ir.Node) -> bool:
        """Whether a node reads int32 numbers where there are some."""
        return self.forms[node].family in _READS_WIDE or node in self.wide

    def wide_source(self, value: ir.Value) -> tuple[ir.Value, float] | None:
        """(result of a node that gives int32 numbers, factor) with value = factor times that result; None without."""
        factor = 1.0
        while value in self.roots:
            step = _scaled(value)
            if step is None:
                return None
            value, factor = step[0], factor * step[1]
        node = self.producers.get(value)
        if node not in self._chosen or node is None:
            return None
        gives = self.forms[node].family in GIVES_WIDE or node in self.wide
        return (value, factor) if gives and value is self.forms[node].output else None

    def _wide_sums(self) -> set[ir.Node]:
        """Sums that only softmax, normalization and other such sums read, directly."""
        self.wide = set()
        users: dict[ir.Value, list[ir.Node]] = {}
        for node in self.integer:
            for value in self.forms[node].inputs:
                users.setdefault(self.roots.get(value, value), []).append(node)
        for node in reversed(self.integer):
            form = self.forms[node]
            if form.family != families.ADD or form.output is None or form.output.is_graph_output():
                continue
            found = users.get(form.output, [])
            if found and all(self.reads_wide(user) and form.output in self.forms[user].inputs for user in found):
                self.wide.add(node)
        return self.wide

    def given(self, value: ir.Value) -> bool:
        """Whether a float value is an input of the graph, or integers of the input made float."""
        node = value.producer()
        if node is None:
            return value.is_graph_input()
        source = node.inputs[0] if node.op_type == "Cast" and not node.domain else None
        return source is not None and source.dtype != ir.DataType.FLOAT

    def _forward(self) -> None:
        chosen: set[ir.Node] = set()
        for node, form in self.forms.items():
            if form.family in (families.NONE, families.TABLE, families.BIAS):
                continue
            always = form.family in (families.CONTRACTION, families.PRODUCT)
            if always or all(self._available(value, chosen) for value in form.inputs):
                chosen.add(node)
        self._chosen = chosen

    def _available(self, value: ir.Value, chosen: set[ir.Node]) -> bool:
        if edit.constant(value) is not None:
            return True
        root = self.base(value)
        made = self.producers.get(root) in chosen or (self.integer_only and self.given(root))
        return made or value.name in self.carried

    def base(self, value: ir.Value) -> ir.Value:
        """The value that is no function of another and of which this one is a function, maybe by way of others."""
        while value in self.roots:
            value = self.roots[value]
        return value

    def _made_on_integers(self, root: ir.Value) -> bool:
        root = self.base(root)
        return self.producers.get(root) in self._chosen or (self.integer_only and self.given(root))

    def _backward(self) -> None:
        wanted: set[ir.Value] = set()
        kept = []
        for node in reversed(list(self.forms)):
            form = self.forms[node]
            if node not in self._chosen:
                continue
            made = {value for value in (form.output, *node.outputs) if value is not None}
            for image, root in self.roots.items():
                made |= {image} if root in made else set()
            needed = self.integer_only or form.family in (families.CONTRACTION, families.PRODUCT)
            needed = needed or any(value.name in self.carried for value in made)
            if not needed and not made & wanted:
                self._chosen.discard(node)
                continue
            wanted.update(form.inputs)
            kept.append(node)
        self.integer = kept[::-1]


def _scaled(value: ir.Value) -> tuple[ir.Value, float] | None:
    """(x, c) of a value x * c or x / c' with a constant c' = 1 / c; None for another function."""
    node = value.producer()
    if node is None or not edit.is_op(node, "Mul", "Div") or len(images.data_inputs(node)) != 1:
        return None
    source = images.data_inputs(node)[0]
    number = edit.scalar(node.inputs[1] if node.inputs[0] is source else node.inputs[0])
    if number is None or number == 0 or (node.op_type == "Div" and node.inputs[0] is not source):
        return None
    factor = number if node.op_type == "Mul" else 1.0 / number
    return (source, factor) if factor > 0 else None


def is_clip_chain(value: ir.Value, root: ir.Value) -> bool:
    """Whether an image is made by Relu, Clip, Max and Min alone, one after the other."""
    while value is not root:
        node = value.producer()
        if node is None or node.op_type not in ("Relu", "Clip", "Max", "Min", "Identity"):
            return False
        sources = images.data_inputs(node)
        if len(sources) != 1:
            return False
        value = sources[0]
    return True
