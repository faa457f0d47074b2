"""Walks through a model group by group: each run takes up where the one before it got to.

The weights of a group are solved after its run, so what that run keeps lies in front of the group: the values that are
computed before its first node and read there or later. A walk through all groups costs about two runs of the model,
however many groups there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph.evaluate import Session
from kbitc.passes.calibrate.stream import only, read_by

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
#: Bytes of values that a walk keeps from one run to the next; with more it takes up further back.
HELD_BYTES = 1 << 29


class Walk:
    """One walk over the same batches.

    Args:
        batches: one mapping of input name to array a batch.
        limit: bytes that are kept; while a run goes on, twice as many.
    """

    def __init__(self, batches: Sequence[Feeds], limit: int = HELD_BYTES) -> None:
        self._batches, self._limit = batches, limit
        self._held: list[dict[str, Array]] = [{} for _ in batches]

    def run(self, model: ir.Model, names: Sequence[str], first: str) -> Iterator[dict[str, Array]]:
        """The named values of each batch, which have to be read to the end.

        Args:
            model: canonical graph, not changed; what lies in front of `first` of the run before is what it was then.
            names: values to give: graph inputs or results of nodes of the main graph.
            first: name of a node; what changes before the next run lies at it or behind it, and so do all later names.
        """
        inputs = {value.name for value in model.graph.inputs}
        kept = [name for name in alive_at(model, first) if name not in inputs]
        known = list(self._held[0]) if self._held else []
        missing = [name for name in dict.fromkeys([*names, *kept]) if name not in inputs and name not in known]
        session = Session(only(model, missing, known)) if missing else None
        held: list[dict[str, Array]] = []
        size = 0
        for feed, before in zip(self._batches, self._held, strict=True):
            found = {**before, **(session.run({**feed, **before}) if session is not None else {})}
            size += sum(found[name].nbytes for name in kept)
            if size <= self._limit:
                held.append({name: found[name] for name in kept})
            yield {name: np.asarray(feed[name]) if name in inputs else found[name] for name in names}
        if size <= self._limit:
            self._held = held


def alive_at(model: ir.Model, first: str) -> list[str]:
    """What nodes compute in front of a node and it or later ones read, in graph order."""
    made: list[str] = []
    read: set[str] = set()
    reached = False
    for node in model.graph:
        reached = reached or node.name == first
        if reached:
            read.update(value.name for value in read_by(node) if value.name)
        else:
            made += [value.name for value in node.outputs if value.name]
    return [name for name in made if name in read]
