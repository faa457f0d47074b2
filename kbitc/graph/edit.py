"""The only functions that change an ONNX graph, and the reads that every rewrite needs.

Graphs are `onnx_ir` graphs in SSA form. Every editing function keeps three facts true: a graph output keeps its name,
no two values of one graph share a name, and nodes stay in an order in which producers come first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.errors import InternalError

Array = npt.NDArray[Any]
#: Where `digest` keeps its result in a tensor's meta store.
_DIGEST = "kbitc.sha256"
_NAMES = "kbitc.names"


def describe(node: ir.Node) -> str:
    """A node for an error message: its name, or its first output when it has none, and its operator type."""
    name = node.name or next((value.name for value in node.outputs if value.name), "") or "unnamed"
    if len(name) > 120:
        name = name[:117] + "..."
    domain = f"{node.domain}::" if node.domain else ""
    return f"{name} ({domain}{node.op_type})"


def constant(value: ir.Value | None) -> Array | None:
    """The array of a constant value (an initializer or a Constant node), else None. Not copied; do not write to it."""
    if value is None:
        return None
    tensor = value.const_value
    if tensor is None:
        producer = value.producer()
        if producer is None or producer.op_type != "Constant" or producer.domain:
            return None
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is None:
            return None
    elif value.is_graph_input() and not value.is_initializer():
        return None
    return tensor.numpy()


def digest(tensor: ir.TensorProtocol) -> bytes:
    """SHA-256 of a tensor's elements; computed once a tensor, without a copy where its bytes lie in one piece."""
    known = tensor.meta.get(_DIGEST)
    if isinstance(known, bytes):
        return known
    if tensor.dtype.bitwidth < 8 or tensor.dtype == ir.DataType.STRING:
        found = hashlib.sha256(tensor.tobytes()).digest()
    else:
        found = hashlib.sha256(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data).digest()
    tensor.meta[_DIGEST] = found
    return found


def scalar(value: ir.Value | None) -> float | None:
    """The number in a constant that holds exactly one element, else None."""
    array = constant(value)
    if array is None or array.size != 1 or array.dtype.kind not in "fiub":
        return None
    return float(array.reshape(-1)[0])


def integers(value: ir.Value | None) -> tuple[int, ...] | None:
    """The elements of a constant integer tensor of rank 0 or 1, else None."""
    array = constant(value)
    if array is None or array.dtype.kind not in "iu" or array.ndim > 1:
        return None
    return tuple(int(item) for item in array.reshape(-1))


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a value when every dim is a number, else None."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(dim) for dim in value.shape.dims if isinstance(dim, int))


def rank(value: ir.Value | None) -> int | None:
    """The number of dims of a value, or None when it is not known."""
    if value is None or value.shape is None:
        return None
    return len(value.shape)


def producer(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that makes `value` when it is an `op_type` of `domain`, else None."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != op_type or node.domain != domain:
        return None
    return node


def is_op(node: ir.Node, *op_types: str) -> bool:
    """Whether a node is one of the named operators of the default domain."""
    return not node.domain and node.op_type in op_types


def only_use(value: ir.Value) -> ir.Node | None:
    """The single node that reads `value` (once), or None when it has other readers or is a graph output."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    return uses[0].node


def used_names(graph: ir.Graph) -> set[str]:
    """All value names of a graph and its subgraphs."""
    names = {value.name for value in graph.inputs if value.name} | set(graph.initializers)
    for node in graph.all_nodes():
        names.update(value.name for value in node.outputs if value.name)
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                subgraph = attribute.as_graph()
                names.update(value.name for value in subgraph.inputs if value.name)
                names.update(subgraph.initializers)
    return names


def fresh_name(graph: ir.Graph, base: str) -> str:
    """`base`, or `base_1`, `base_2`, ... : the first that no value of the graph bears.

    The names of the graph are collected once and remembered with it until `forget_names`: collecting them anew for
    every edit would make a pass quadratic in the number of nodes.
    """
    names = graph.meta.get(_NAMES)
    if names is None:
        names = graph.meta[_NAMES] = used_names(graph)
    name, counter = base, 0
    while name in names:
        counter += 1
        name = f"{base}_{counter}"
    names.add(name)
    return name


def forget_names(model: ir.Model) -> None:
    """Collect names anew at the next `fresh_name`: a pass may have added values by other means."""
    for graph in model.graphs():
        graph.meta.pop(_NAMES, None)


def add_initializer(graph: ir.Graph, name: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
    """A new initializer that holds `array` (not copied). Its name is `name`, made unique.

    Args:
        graph: the graph that gets it.
        name: the wished name.
        array: its elements; sub-byte types one element a byte in an `ml_dtypes` array.
        dtype: the ONNX type, when numpy's type does not tell it.
    """
    return add_tensor(graph, name, ir.Tensor(np.asarray(array), dtype=dtype))


def add_tensor(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer that holds `tensor`. Its name is `name`, made unique; the tensor is renamed too."""
    unique = fresh_name(graph, name)
    if tensor.name != unique:
        tensor.name = unique
    value = ir.Value(
        name=unique, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def root_graph(node: ir.Node) -> ir.Graph:
    """The graph that holds `node` directly.

    Raises:
        InternalError: when the node was removed from its graph.
    """
    if node.graph is None:
        raise InternalError("node belongs to no graph", where=describe(node))
    return node.graph


def attributes(**items: Any) -> list[ir.Attr]:
    """Attributes made from plain Python values; None values are left out."""
    return list(ir.convenience.convert_attributes({key: item for key, item in items.items() if item is not None}))


def insert_before(
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    *,
    name: str | None = None,
    domain: str = "",
    like: ir.Value | None = None,
    outputs: int = 1,
    **attrs: Any,
) -> ir.Value:
    """Put a new node before `node` and return its first output.

    Args:
        node: the node in front of which the new one goes.
        op_type: the operator of the new node.
        inputs: its inputs; None leaves an optional input out.
        name: base of the node's and the output's name; default: made from the name of `node`.
        domain: the operator's domain.
        like: a value whose type and shape the output has.
        outputs: how many outputs the node has.
        attrs: its attributes as plain values; None values are left out.
    """
    graph = root_graph(node)
    base = name or f"{node.outputs[0].name or node.op_type}.{op_type.lower()}"
    new = ir.Node(domain, op_type, list(inputs), attributes(**attrs), num_outputs=outputs, name=base)
    for index, value in enumerate(new.outputs):
        value.name = fresh_name(graph, f"{base}.{index}" if index else base)
        if like is not None:
            value.type, value.shape = like.type, like.shape
    graph.insert_before(node, new)
    return new.outputs[0]


def append(value: ir.Value, op_type: str, others: Sequence[ir.Value], name: str, **attrs: Any) -> ir.Value:
    """Put `op_type(value, *others)` behind the node that makes `value`: every reader of `value` now reads the result.

    A graph output keeps its name. Returns the result, with the type and shape of `value`.

    Raises:
        InternalError: when no node makes `value`.
    """
    maker = value.producer()
    if maker is None:
        raise InternalError("a value that no node makes has nothing to put a node behind", where=value.name)
    graph = root_graph(maker)
    node = ir.Node("", op_type, [value, *others], attributes(**attrs), name=name)
    new = node.outputs[0]
    new.name, new.type, new.shape = fresh_name(graph, name), value.type, value.shape
    graph.insert_after(maker, node)
    if value.is_graph_output():
        _move_output(value, new, graph, maker)
        return new
    for user, index in tuple(value.uses()):
        if user is not node:
            user.replace_input_with(index, new)
    return new


def redirect(old: ir.Value, new: ir.Value) -> None:
    """Make every reader of `old` read `new`. A graph output keeps its name.

    When `old` is a graph output, `new` takes over its name, or an Identity stands between them when `new` is itself
    an input, an initializer or an output of the graph.
    """
    if old is new:
        return
    if not old.is_graph_output():
        old.replace_all_uses_with(new)
        return
    graph = old.graph
    maker = old.producer()
    if graph is None or maker is None:
        raise InternalError("a graph output without a producer cannot be redirected", where=old.name)
    _move_output(old, new, graph, maker)


def _move_output(old: ir.Value, new: ir.Value, graph: ir.Graph, maker: ir.Node) -> None:
    """`redirect` for a value that is an output of `graph`, made by `maker`."""
    name, kind, shape = old.name, old.type, old.shape
    source = new.producer()
    target = new
    if source is None or new.is_graph_output() or source.graph is not graph:
        bridge = ir.Node("", "Identity", [new], name=f"{name}.identity")
        graph.insert_after(maker, bridge)
        target = bridge.outputs[0]
    for position, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[position] = target
    for user, index in tuple(old.uses()):
        if user is not source:
            user.replace_input_with(index, new)
    old.name = fresh_name(graph, f"{name}.old")
    target.name = name
    target.type, target.shape = target.type or kind, target.shape or shape


def replace(node: ir.Node, new: ir.Value) -> None:
    """Replace a node with one output by the value `new`, and remove the node."""
    if len(node.outputs) > 1 and any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        raise InternalError("only a node with one used output can be replaced by a value", where=describe(node))
    redirect(node.outputs[0], new)
    remove(node)


def replace_with(
    node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], *, domain: str = "", **attrs: Any
) -> ir.Value:
    """Replace a node by one new node with the same first output (type and shape too) and return its output."""
    new = insert_before(
        node, op_type, inputs, name=node.name or node.outputs[0].name, domain=domain, like=node.outputs[0], **attrs
    )
    replace(node, new)
    return new


def remove(node: ir.Node) -> None:
    """Remove a node whose outputs nobody reads."""
    root_graph(node).remove(node, safe=True)


def remove_dead(model: ir.Model) -> bool:
    """Remove nodes and initializers that no output depends on. Graph inputs stay. True when something went."""
    modified = False
    for graph in model.graphs():
        for node in reversed(list(graph)):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                _release(node)
                graph.remove(node, safe=True)
                modified = True
    for graph in model.graphs():
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del graph.initializers[name]
                modified = True
    return modified


def _release(node: ir.Node) -> None:
    """Take the inputs from the nodes of a dead node's inner graphs, whose uses would keep outer values alive."""
    for inner in list(_inner_nodes(node)):
        for index in range(len(inner.inputs)):
            inner.replace_input_with(index, None)


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes of the main graph and of the graphs inside its nodes, in order. Safe against edits while walking."""
    yield from list(model.graph.all_nodes())


def holders(graph: ir.Graph) -> dict[ir.Node, ir.Node]:
    """For each node of `graph`, and of the graphs inside its nodes, the node of `graph` itself that it belongs to."""
    found: dict[ir.Node, ir.Node] = {}
    for node in graph:
        found[node] = node
        found.update(dict.fromkeys(_inner_nodes(node), node))
    return found


def _inner_nodes(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes of the graphs inside a node."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            yield from attribute.as_graph().all_nodes()


def name_nodes(model: ir.Model) -> bool:
    """Give each node a name of its own: nameless ones that of their first output. True when one was renamed."""
    taken: set[str] = set()
    modified = False
    for node in all_nodes(model):
        base = node.name or next((value.name for value in node.outputs if value.name), "") or node.op_type
        name, counter = base, 1
        while name in taken:
            name, counter = f"{base}_{counter}", counter + 1
        taken.add(name)
        if node.name != name:
            node.name = name
            modified = True
    return modified


def set_attribute(node: ir.Node, name: str, value: Any) -> None:
    """Set one attribute of a node from a plain Python value; None removes it."""
    node.attributes.pop(name, None)
    for attribute in attributes(**{name: value}):
        node.attributes.add(attribute)


def set_inputs(node: ir.Node, inputs: Iterable[ir.Value | None]) -> None:
    """Give a node another list of inputs; trailing None are dropped."""
    wanted = list(inputs)
    while wanted and wanted[-1] is None:
        wanted.pop()
    node.resize_inputs(len(wanted))
    for index, value in enumerate(wanted):
        node.replace_input_with(index, value)


def permute(shape: ir.Shape | None, axes: Sequence[int]) -> ir.Shape | None:
    """The shape of a transposed value; None stays None."""
    if shape is None:
        return None
    return ir.Shape([shape[axis] for axis in axes])
