"""The range of every value by what it does to the outputs: the float model is run with this one value rounded.

Noise that is small adds up over the values, so each is chosen for itself. Runs start behind the value: what else is
alive there comes from one walk through the float model, so that the parts in front of it are not computed again.

The parts behind the values of a deep model are as much work as there are values times the model. Where that is more
than `WORK`, the model is cut into windows of equal work, as few as bring it below, and a value is rounded up to the end
of the window behind its own: outputs are then what is alive there. As many windows as there are nodes leave about one
run of the model for each range and batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph.evaluate import Session
from kbitc.passes.allocate.probe import difference, signal_of
from kbitc.passes.calibrate.moments import weights
from kbitc.passes.calibrate.sizes import bound_dims, work_of
from kbitc.passes.calibrate.stream import only, read_by
from kbitc.passes.calibrate.walk import Walk, alive_at
from kbitc.quant.static import Codes

Array = npt.NDArray[Any]
#: Batches that one measurement runs on.
BATCHES = 2
#: Share of the noise that another range has to save: less is chance.
WORTH = 0.05
#: Multiply-adds of all measurements together, about: one or two minutes of one core.
WORK = 2 * 10**12


def least_noise(
    model: ir.Model,
    offers: Mapping[str, Sequence[Codes]],
    feeds: Sequence[Mapping[str, Array]],
    progress: Callable[[str], None] = lambda text: None,
    *,
    limit: int = WORK,
) -> dict[str, int]:
    """The best offer of every value, as an index; the first one where no other saves `WORTH` of its noise.

    Args:
        model: canonical graph; not changed.
        offers: value name -> codes to choose from. A value that is an output of the model, of an inner graph or of a
            node with several results keeps the first.
        feeds: samples.
        progress: hears how far it is.
        limit: multiply-adds of all runs, unless a window for each node already needs more.
    """
    chosen = dict.fromkeys(offers, 0)
    outputs = {value.name for value in model.graph.outputs}
    asked = {name: every for name, every in offers.items() if len(every) > 1 and name not in outputs}
    if not asked:
        return chosen
    alive = alive_behind(model)
    walk = Walk(feeds)
    done = 0
    for window in windows(model, {name: len(every) for name, every in asked.items()}, feeds, limit):
        names = [name for name in window.names if name in asked and name in alive]
        if not names:
            continue
        probe = _Probe(model, window, walk, feeds)
        for name in names:
            done += 1
            progress(f"measure the range of value {done} of {len(asked)}")
            noises = probe.noises(name, alive[name], asked[name])
            best = min(range(len(noises)), key=noises.__getitem__, default=0)
            if noises and noises[best] < (1 - WORTH) * noises[0]:
                chosen[name] = best
    return chosen


@dataclass(frozen=True)
class Window:
    """Part of the graph in which values are rounded, and how far behind it the noise is looked at.

    Attributes:
        first: name of its first node.
        names: what its nodes compute, in order.
        ends: what is alive behind the next window or an output of the model, of what this and the next one compute.
    """

    first: str
    names: tuple[str, ...]
    ends: tuple[str, ...]


def windows(
    model: ir.Model, offers: Mapping[str, int], feeds: Sequence[Mapping[str, Array]], limit: int
) -> list[Window]:
    """The fewest windows of 1, 2, 4 ... with which measuring so many ranges a value stays within the limit.

    Args:
        model: canonical graph; not changed.
        offers: value name -> ranges to tell apart.
        feeds: samples; the sizes of the first one count.
        limit: multiply-adds.
    """
    nodes = list(model.graph)
    bound = bound_dims(model, feeds[0]) if feeds else {}
    sums = list(accumulate((work_of(node, bound) for node in nodes), initial=0))
    runs = [len(feeds) * sum(offers.get(value.name or "", 0) for value in node.outputs) for node in nodes]
    count = 1
    while True:
        cuts = _cuts(sums, count)
        behind = [*cuts[2:], cuts[-1]]
        total = sum(
            runs[index] * (sums[end] - sums[index + 1])
            for start, stop, end in zip(cuts[:-1], cuts[1:], behind, strict=True)
            for index in range(start, stop)
        )
        if total <= limit or count >= len(nodes):
            return [_window(model, nodes, *ends) for ends in zip(cuts[:-1], cuts[1:], behind, strict=True)]
        count *= 2


def _cuts(sums: Sequence[int], count: int) -> list[int]:
    """Indices of nodes that cut the graph into at most so many parts of about equal work, 0 and the end among them."""
    step = max(sums[-1] / count, 1)
    cuts = [0]
    for index in range(1, len(sums) - 1):
        if sums[index] // step > sums[cuts[-1]] // step:
            cuts.append(index)
    return [*cuts, len(sums) - 1] if len(sums) > 1 else [0]


def _window(model: ir.Model, nodes: Sequence[ir.Node], start: int, stop: int, end: int) -> Window:
    outputs = {value.name for value in model.graph.outputs}
    later = {value.name for node in nodes[end:] for value in read_by(node)} | outputs
    made = [value.name for node in nodes[start:end] for value in node.outputs if value.name]
    names = tuple(value.name for node in nodes[start:stop] for value in node.outputs if value.name)
    return Window(nodes[start].name or "", names, tuple(name for name in made if name in later))


class _Probe:
    """Two windows of the float model, what they compute for the samples, and runs from behind each value to their end.

    Args:
        model: canonical graph; not changed.
        window: part of it.
        walk: over the samples, through the whole model; it goes on from one window to the next.
        feeds: samples.
    """

    def __init__(self, model: ir.Model, window: Window, walk: Walk, feeds: Sequence[Mapping[str, Array]]) -> None:
        inputs = {value.name for value in model.graph.inputs}
        before = [name for name in alive_at(model, window.first) if name not in inputs]
        known = walk.run(model, before, window.first)
        self._feeds = [{**feed, **found} for feed, found in zip(feeds, known, strict=True)]
        self._part = only(model, window.ends, before)
        self._makers = {value.name: node.name or "" for node in self._part.graph for value in node.outputs}
        self._readers = {node: {value.name for value in read_by(node)} for node in self._part.graph}
        self._walk = Walk(self._feeds)
        outputs = {value.name for value in model.graph.outputs}
        session = Session(self._part)
        found = [session.run(feed) for feed in self._feeds]
        self._shares = [
            {name: 1.0 if name in outputs else _shares(array) for name, array in batch.items()} for batch in found
        ]
        self._expected = [_counted(batch, shares) for batch, shares in zip(found, self._shares, strict=True)]
        self._signal = signal_of(self._expected)

    def noises(self, name: str, around: Sequence[str], every: Sequence[Codes]) -> list[float]:
        """Noise to signal at the ends with the value through each of these codes; none where no end depends on it.

        Args:
            name: value that the window computes.
            around: what is alive behind it, itself among it.
            every: codes.
        """
        ends = self._behind(name)
        if not ends or name not in self._makers:
            return []
        tail = Session(only(self._part, ends, [other for other in around if other in self._makers]))
        computed = [other for other in around if other in tail.inputs]
        totals = np.zeros(len(every))
        batches = self._walk.run(self._part, computed, self._makers[name])
        for feed, expected, shares, known in zip(self._feeds, self._expected, self._shares, batches, strict=True):
            for index, codes in enumerate(every):
                rounded = codes.rounded(known[name])
                found = _counted({**tail.run({**feed, **known, name: rounded}), name: rounded}, shares)
                totals[index] += sum(
                    difference(expected[out], found[out]) / self._signal[out] for out in self._signal if out in found
                )
        return [float(total) for total in totals]

    def _behind(self, name: str) -> list[str]:
        """The ends that are computed from a value."""
        reached = {name}
        for node, read in self._readers.items():
            if reached & read:
                reached.update(value.name or "" for value in node.outputs)
        return [value.name or "" for value in self._part.graph.outputs if value.name in reached - {name}]


def _shares(array: Array) -> Array:
    """Square roots of what the rows along the last axis count: a few of a language model hold most of the energy."""
    if array.dtype.kind != "f" or array.ndim == 0:
        return np.ones((), np.float32)
    rows = np.where(np.isfinite(array), array, 0).reshape(1, -1, array.shape[-1])
    return np.sqrt(weights(rows)).reshape(*array.shape[:-1], 1)


def _counted(found: Mapping[str, Array], shares: Mapping[str, Any]) -> dict[str, Array]:
    return {name: array * shares[name] for name, array in found.items() if name in shares}


def alive_behind(model: ir.Model) -> dict[str, list[str]]:
    """Value -> the computed values that exist when it is made and are read later, itself among them.

    Values of nodes with one result only, in graph order.
    """
    places = {node: index for index, node in enumerate(model.graph)}
    last: dict[str, int] = {}
    for node, index in places.items():
        for value in read_by(node):
            if value.name:
                last[value.name] = index
    made: list[str] = []
    found: dict[str, list[str]] = {}
    for node, index in places.items():
        results = [value.name for value in node.outputs if value.name]
        made = [name for name in made if last.get(name, -1) > index]
        if len(node.outputs) == 1 and results:
            found[results[0]] = [*made, *results]
        made += results
    return found
