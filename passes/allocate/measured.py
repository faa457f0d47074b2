"""The range of every value by what it does to the outputs: the float model is run with this one value rounded.

Noise that is small adds up over the values, so each is chosen for itself. Runs start behind the value: what else is
alive there comes from one walk through the float model, so that the parts in front of it are not computed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph.evaluate import Session
from kbitc.passes.allocate.probe import difference, signal_of
from kbitc.passes.calibrate.stream import only, read_by
from kbitc.passes.calibrate.walk import Walk
from kbitc.quant.static import Codes

Array = npt.NDArray[Any]
#: Batches that one measurement runs on.
BATCHES = 2
#: Share of the noise that another range has to save: less is chance.
WORTH = 0.05


def least_noise(
    model: ir.Model, offers: Mapping[str, Sequence[Codes]], feeds: Sequence[Mapping[str, Array]]
) -> dict[str, int]:
    """The best offer of every value, as an index; the first one where no other saves `WORTH` of its noise.

    Args:
        model: canonical graph; not changed.
        offers: value name -> codes to choose from. A value that is an output of the model, of an inner graph or of a
            node with several results keeps the first.
        feeds: samples.
    """
    probe = _Probe(model, feeds)
    chosen = dict.fromkeys(offers, 0)
    for name in probe.order:
        every = offers.get(name, ())
        noises = probe.noises(name, every) if len(every) > 1 else []
        best = min(range(len(noises)), key=noises.__getitem__, default=0)
        if noises and noises[best] < (1 - WORTH) * noises[0]:
            chosen[name] = best
    return chosen


class _Probe:
    """The float model, its outputs for the samples, and what is alive behind each value.

    Attributes:
        order: the values that can be measured, in the order in which they have to be.
    """

    def __init__(self, model: ir.Model, feeds: Sequence[Mapping[str, Array]]) -> None:
        self._model, self._feeds = model, feeds
        self._outputs = [value.name or "" for value in model.graph.outputs]
        session = Session(model)
        self._expected = [session.run(feed) for feed in feeds]
        self._signal = signal_of(self._expected)
        self._alive = alive_behind(model)
        self._makers = {value.name: node.name or "" for node in model.graph for value in node.outputs}
        self._walk = Walk(feeds)
        self.order = [name for name in self._alive if name not in self._outputs]

    def noises(self, name: str, every: Sequence[Codes]) -> list[float]:
        """Noise to signal at the outputs with the value through each of these codes; none where that cannot be run."""
        around = self._alive[name]
        tail = Session(only(self._model, self._outputs, around))
        if name not in tail.inputs:
            return []
        computed = [other for other in around if other in tail.inputs]
        totals = np.zeros(len(every))
        batches = self._walk.run(self._model, computed, self._makers[name])
        for feed, expected, known in zip(self._feeds, self._expected, batches, strict=True):
            for index, codes in enumerate(every):
                found = tail.run({**feed, **known, name: codes.rounded(known[name])})
                totals[index] += sum(difference(expected[out], found[out]) / self._signal[out] for out in self._signal)
        return [float(total) for total in totals]


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
        if len(node.outputs) != 1 or not node.outputs[0].name:
            continue
        made = [name for name in made if last.get(name, -1) > index] + [node.outputs[0].name]
        found[made[-1]] = list(made)
    return found
