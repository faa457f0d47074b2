"""Checks of the message's structure before any library walks it: versions, names, producers, order, recursion."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx.helper

from kbitc.errors import ModelError, UnsupportedError

MIN_OPSET, MAX_OPSET = 9, 25
MIN_IR, MAX_IR = 3, 13
MAX_DEPTH = 32
#: No operator set of any domain has come near this version.
_MAX_DOMAIN_VERSION = 1 << 16
_MAX_SHOWN = 5


def label(node: onnx.NodeProto) -> str:
    """A node for a message: its name, else its first output; and its operator."""
    name = node.name or next((output for output in node.output if output), "") or "unnamed"
    return f"{name[:117] + '...' if len(name) > 120 else name} ({node.op_type})"


def check_versions(proto: onnx.ModelProto) -> None:
    """Refuse IR and operator-set versions that we do not know.

    Raises:
        ModelError: no operator set, or one given twice.
        UnsupportedError: a version outside the supported range.
    """
    if not MIN_IR <= proto.ir_version <= MAX_IR:
        raise UnsupportedError(
            "this ONNX IR version is not supported", got=proto.ir_version, remedy=f"supported: {MIN_IR} to {MAX_IR}"
        )
    if not proto.opset_import:
        raise ModelError("the model has no opset_import", remedy="export it again, or set opset_import")
    _check_opsets(proto.opset_import, "the model")
    for function in proto.functions:
        _check_opsets(function.opset_import, f"function {function.domain}::{function.name}")


def _check_opsets(imports: Iterable[onnx.OperatorSetIdProto], where: str) -> None:
    seen: dict[str, int] = {}
    for entry in imports:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if seen.setdefault(domain, entry.version) != entry.version:
            raise ModelError("an opset is imported twice", where=where, got=f"domain {entry.domain!r}")
        if not 0 < entry.version <= _MAX_DOMAIN_VERSION:
            raise ModelError("an opset version is absurd", where=where, got=f"{entry.domain!r} {entry.version}")
        if not domain and not MIN_OPSET <= entry.version <= MAX_OPSET:
            raise UnsupportedError(
                "this opset is not supported",
                where=where,
                got=entry.version,
                remedy=f"export with an opset from {MIN_OPSET} to {MAX_OPSET}",
            )


def hoist_constants(graph: onnx.GraphProto) -> None:
    """Turn the main graph's Constant nodes that hold a tensor into initializers: a weight in its other spelling."""
    kept: list[onnx.NodeProto] = []
    moved = False
    for node in graph.node:
        held = [attribute for attribute in node.attribute if attribute.name == "value" and attribute.HasField("t")]
        plain = node.op_type == "Constant" and node.domain in ("", "ai.onnx") and len(node.output) == 1
        if plain and node.output[0] and len(held) == 1 and len(node.attribute) == 1 and not held[0].ref_attr_name:
            held[0].t.name = node.output[0]
            graph.initializer.append(held[0].t)
            moved = True
        else:
            kept.append(node)
    if moved:
        saved = [_copy(node) for node in kept]
        del graph.node[:]
        graph.node.extend(saved)


def state_defaults(proto: onnx.ModelProto) -> None:
    """Write out STFT's default of `onesided`, which is 1: ONNX's shape inference takes an absent one for 0."""
    for nodes in (proto.graph.node, *(function.node for function in proto.functions)):
        for node in nodes_below(nodes, 0):
            plain = node.op_type == "STFT" and node.domain in ("", "ai.onnx")
            if plain and all(attribute.name != "onesided" for attribute in node.attribute):
                node.attribute.append(onnx.helper.make_attribute("onesided", 1))


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def check_functions(proto: onnx.ModelProto) -> None:
    """Refuse functions that call themselves, directly or not, and two functions with one name.

    Raises:
        ModelError: names the function.
    """
    bodies: dict[tuple[str, str, str], onnx.FunctionProto] = {}
    for function in proto.functions:
        key = (function.domain, function.name, function.overload)
        if key in bodies:
            raise ModelError("two functions have one name", got=f"{function.domain}::{function.name}")
        bodies[key] = function
    calls = {
        key: {
            found
            for node in nodes_below(body.node, 0)
            if (found := (node.domain, node.op_type, node.overload)) in bodies
        }
        for key, body in bodies.items()
    }
    done: set[tuple[str, str, str]] = set()
    for start in bodies:
        _refuse_cycle(start, calls, done)


def _refuse_cycle(
    start: tuple[str, str, str],
    calls: dict[tuple[str, str, str], set[tuple[str, str, str]]],
    done: set[tuple[str, str, str]],
) -> None:
    path: list[tuple[str, str, str]] = []
    stack: list[tuple[tuple[str, str, str], bool]] = [(start, False)]
    while stack:
        key, leaving = stack.pop()
        if leaving:
            path.pop()
            done.add(key)
            continue
        if key in path:
            raise ModelError("a function calls itself", got=f"{key[0]}::{key[1]}")
        if key in done:
            continue
        path.append(key)
        stack.append((key, True))
        stack += [(called, False) for called in sorted(calls[key])]


def nodes_below(nodes: Iterable[onnx.NodeProto], depth: int) -> Iterable[onnx.NodeProto]:
    """All nodes, those of subgraphs too. Raises ModelError: they are nested too deep."""
    if depth > MAX_DEPTH:
        raise ModelError("graphs are nested too deep", got=f"more than {MAX_DEPTH} levels")
    for node in nodes:
        yield node
        for graph in _subgraphs(node):
            yield from nodes_below(graph.node, depth + 1)


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    graphs = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    for attribute in node.attribute:
        graphs += list(attribute.graphs)
    return graphs


def check_names(proto: onnx.ModelProto) -> None:
    """Check that every name has one meaning and every read name a producer; put nodes in an order that runs.

    Raises:
        ModelError: duplicate, dangling or missing names, and cycles, each named.
    """
    _check_graph(proto.graph, frozenset(), 0)
    for function in proto.functions:
        known = set(function.input)
        if len(known) != len(function.input):
            raise ModelError("a function has two inputs of one name", where=f"function {function.name}")
        body = onnx.GraphProto(name=function.name)
        body.node.extend(function.node)
        body.output.extend(onnx.ValueInfoProto(name=name) for name in function.output)
        _check_nodes(body, known, frozenset(), 0)
        del function.node[:]
        function.node.extend(body.node)


def _check_graph(graph: onnx.GraphProto, outer: frozenset[str], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ModelError("graphs are nested too deep", got=f"more than {MAX_DEPTH} levels")
    known: set[str] = set()
    for item in graph.input:
        if not item.name:
            raise ModelError("a graph input has no name")
        if item.name in known:
            raise ModelError("two graph inputs have one name", got=repr(item.name))
        known.add(item.name)
    weights: set[str] = set()
    for tensor in graph.initializer:
        if not tensor.name:
            raise ModelError("an initializer has no name", where=f"graph {graph.name}")
        if tensor.name in weights:
            raise ModelError("two initializers have one name", got=repr(tensor.name))
        weights.add(tensor.name)
    _check_nodes(graph, known | weights, outer, depth)


def _check_nodes(graph: onnx.GraphProto, known: set[str], outer: frozenset[str], depth: int) -> None:
    made: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        for output in filter(None, node.output):
            if output in made or output in known:
                raise ModelError("a value has two producers", where=label(node), got=repr(output))
            made[output] = node
    _check_outputs(graph, known | set(made), outer)
    ordered = _order(graph, known, made, outer)
    if ordered is not None:
        del graph.node[:]
        graph.node.extend(ordered)
    visible = frozenset(known | set(made) | outer)
    for node in graph.node:
        for subgraph in _subgraphs(node):
            _check_graph(subgraph, visible, depth + 1)


def _check_outputs(graph: onnx.GraphProto, known: set[str], outer: frozenset[str]) -> None:
    if not graph.output:
        raise ModelError("the graph has no outputs", where=f"graph {graph.name or 'unnamed'}")
    seen: set[str] = set()
    for item in graph.output:
        if item.name in seen:
            raise ModelError("two graph outputs have one name", got=repr(item.name))
        if item.name not in known and item.name not in outer:
            raise ModelError("a graph output is made by no node", got=repr(item.name), remedy="export the model again")
        seen.add(item.name)


def _reads(node: onnx.NodeProto, depth: int = 0) -> set[str]:
    """Names that a node reads from the graph it stands in, through its subgraphs too."""
    names = {name for name in node.input if name}
    if depth > MAX_DEPTH:
        return names
    for graph in _subgraphs(node):
        inner = {item.name for item in graph.input} | {tensor.name for tensor in graph.initializer}
        inner |= {output for child in graph.node for output in child.output}
        for child in graph.node:
            names |= _reads(child, depth + 1) - inner
        names |= {output.name for output in graph.output} - inner
    return names


def _order(
    graph: onnx.GraphProto, known: set[str], made: dict[str, onnx.NodeProto], outer: frozenset[str]
) -> list[onnx.NodeProto] | None:
    """The nodes in a running order, stable; None when they stand in one already."""
    reads = [_reads(node) for node in graph.node]
    for node, names in zip(graph.node, reads, strict=True):
        ghosts = sorted(name for name in names if name not in known and name not in made and name not in outer)
        if ghosts:
            raise ModelError(
                "a node reads values that nothing makes",
                where=label(node),
                got=", ".join(repr(name[:80]) for name in ghosts[:_MAX_SHOWN]),
                remedy="the file was cut or edited: export the model again",
            )
    ready: set[str] = set(known) | set(outer)
    waiting = list(range(len(graph.node)))
    order: list[int] = []
    while waiting:
        late: list[int] = []
        for index in waiting:
            if all(name in ready or name not in made for name in reads[index]):
                order.append(index)
                ready.update(graph.node[index].output)
            else:
                late.append(index)
        if len(late) == len(waiting):
            shown = ", ".join(label(graph.node[index]) for index in late[:_MAX_SHOWN])
            raise ModelError("the graph has a cycle", got=f"among {shown}")
        waiting = late
    if order == sorted(order):
        return None
    return [_copy(graph.node[index]) for index in order]
