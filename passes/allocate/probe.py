"""Runs the float model with one weight replaced: how much noise that alone puts on the outputs.

One session serves all: its quantizable weights are inputs, so that no model is built and loaded for each measurement,
and the outputs of the float run are computed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph import ops
from kbitc.graph.evaluate import Session

Array = npt.NDArray[Any]
#: Most batches that one measurement runs on.
MAX_BATCHES = 4
#: Noise to signal of an output that is no longer finite.
LOST = 1e6


class Probe:
    """The float model with weights that can be exchanged.

    Args:
        model: canonical float graph; not changed.
        kinds: weight -> matmul, conv or embedding, of every weight that may be exchanged.
        feeds: samples; at most `MAX_BATCHES` are used.
    """

    def __init__(self, model: ir.Model, kinds: Mapping[str, str], feeds: Sequence[Mapping[str, Array]]) -> None:
        copy = model.clone()
        self._kinds = dict(kinds)
        self._weights: dict[str, Array] = {}
        for name in kinds:
            value = copy.graph.initializers.pop(name)
            if value.const_value is None:
                continue
            self._weights[name] = np.ascontiguousarray(value.const_value.numpy())
            value.const_value = None
            copy.graph.inputs.append(value)
        self._session = Session(copy)
        self._feeds = [dict(item) for item in feeds[:MAX_BATCHES]]
        self.original = [self._run(item, {}) for item in self._feeds]
        self._signal = signal_of(self.original)

    def noise(self, changed: Mapping[str, Array]) -> float:
        """Mean over the float outputs of sum((y - y')^2) / sum(y^2), with these weights in place of their own.

        Args:
            changed: weight -> its new values as a view f32 [N, T, C].
        """
        arrays = {name: self._onnx(name, view) for name, view in changed.items()}
        total = dict.fromkeys(self._signal, 0.0)
        for feed, expected in zip(self._feeds, self.original, strict=True):
            found = self._run(feed, arrays)
            for name in total:
                total[name] += difference(expected[name], found[name])
        ratios = [min(LOST, total[name] / signal) for name, signal in self._signal.items()]
        return float(np.mean(ratios)) if ratios else 0.0

    def _onnx(self, name: str, view: Array) -> Array:
        return np.asarray(ops.from_view(view, self._kinds[name], self._weights[name].shape), np.float32)

    def _run(self, feed: Mapping[str, Array], changed: Mapping[str, Array]) -> dict[str, Array]:
        return self._session.run({**feed, **self._weights, **changed})


def signal_of(outputs: Iterable[Mapping[str, Array]]) -> dict[str, float]:
    """Energy of every floating-point output; integer ones when there are no others. Outputs of zeros are left out."""
    total: dict[str, float] = {}
    integers: dict[str, float] = {}
    for batch in outputs:
        for name, array in batch.items():
            into = total if array.dtype.kind == "f" else integers
            finite = np.where(np.isfinite(array), array, 0).astype(np.float64)
            into[name] = into.get(name, 0.0) + float((finite * finite).sum())
    return {name: energy for name, energy in (total or integers).items() if energy > 0}


def difference(expected: Array, found: Array) -> float:
    """sum((y - y')^2) over what is finite in y; infinity for another shape or numbers that are lost."""
    if expected.shape != found.shape:
        return float("inf")
    known = np.isfinite(expected)
    error = np.where(known, found, 0).astype(np.float64) - np.where(known, expected, 0)
    energy = float((error * error).sum())
    return energy if np.isfinite(energy) else float("inf")
