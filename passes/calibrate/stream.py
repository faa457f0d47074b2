"""Runs a model on sample inputs and hands out intermediate values, one batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.errors import InternalError
from kbitc.graph import edit
from kbitc.graph.evaluate import Session

Array = npt.NDArray[Any]


def stream(
    model: ir.Model, names: Sequence[str], feeds: Iterable[Mapping[str, Array]], *, threads: int | None = None
) -> Iterator[dict[str, Array]]:
    """Run the model batch by batch and give the named values of each batch.

    Only the part of the graph that the values depend on is run, and only one batch is in memory at a time.

    Args:
        model: canonical graph; it is not changed.
        names: values to give: graph inputs or results of nodes of the main graph.
        feeds: one mapping of input name to array a batch.
        threads: threads inside one operator; None means all cores.

    Raises:
        InternalError: a name that the main graph does not hold.
        ModelError: onnxruntime fails on the model.
    """
    inputs = {value.name for value in model.graph.inputs}
    computed = [name for name in dict.fromkeys(names) if name not in inputs]
    session = Session(only(model, computed), threads=threads) if computed else None
    for feed in feeds:
        given = {name: np.asarray(feed[name]) for name in names if name in inputs}
        yield {**given, **(session.run(feed) if session is not None else {})}


def only(model: ir.Model, names: Sequence[str], given: Sequence[str] = ()) -> ir.Model:
    """A copy of the model, sharing its weights, that computes the named values and nothing else.

    Args:
        model: canonical graph; it is not changed.
        names: what it computes.
        given: values that are known; those that spare work become inputs.

    Raises:
        InternalError: a name that no node of the main graph computes.
    """
    copy = model.clone()
    made = {value.name: value for node in copy.graph for value in node.outputs}
    unknown = [name for name in names if name not in made]
    if unknown:
        raise InternalError("asked for a value that no node computes", got=repr(unknown[0]))
    copy.graph.outputs[:] = [made[name] for name in names]
    for value in (made[name] for name in given):
        node = value.producer()
        known = ir.Value(name=value.name, shape=value.shape, type=value.type)
        ir.convenience.replace_all_uses_with(value, known)
        copy.graph.inputs.append(known)
        # Another result of the same node may still be needed; an optional result without a name is left out.
        value.name = (
            edit.fresh_name(copy.graph, f"{value.name}.again") if node is not None and len(node.outputs) > 1 else None
        )
    edit.remove_dead(copy)
    wanted = {value.name for value in model.graph.inputs}
    copy.graph.inputs[:] = [value for value in copy.graph.inputs if value.name in wanted or value.uses()]
    return copy


def read_by(node: ir.Node) -> list[ir.Value]:
    """What a node reads, in its inner graphs too."""
    inner = [graph for attribute in node.attributes.values() for graph in _graphs(attribute)]
    return [value for value in node.inputs if value is not None] + [
        value for graph in inner for nested in graph for value in read_by(nested)
    ]


def _graphs(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else []
