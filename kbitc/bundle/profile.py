"""Times every kernel call of a loaded model, layer by layer. Needs what running needs; tvm is not imported.

The virtual machine asks a watcher before every call (`Engine.watched`). The watcher makes the call of a kernel itself,
between two readings of the clock, and answers that it is done. So a layer is timed as it runs in the model: once, with
the caches as the layers before it left them.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from kbitc.bundle.engine import RUN, SKIP
from kbitc.bundle.runtime import Model

Clock = Callable[[], float]
Call = Mapping[str, Any]
EMBEDDING = "embedding"
BATCH_PRODUCT = "batch_matmul"
ATTENTION = "attention"
SEVERAL = "several layers"


@dataclass(frozen=True)
class Sample:
    """One call of a kernel in one run.

    Attributes:
        kernel: its name.
        seconds: wall time.
        shapes: of its tensor arguments, in order; the outputs come last.
        sizes: their bytes.
        stored: whether each is a weight of the model.
    """

    kernel: str
    seconds: float
    shapes: tuple[tuple[int, ...], ...] = ()
    sizes: tuple[int, ...] = ()
    stored: tuple[bool, ...] = ()


@dataclass
class LayerTimes:
    """One layer, or one kernel that belongs to no contraction.

    Attributes:
        name: name of the ONNX node.
        rule: kernel rule of a contraction; else the kind of kernel.
        contraction: whether it is one.
        seconds: one entry a run.
        moved: bytes that the kernels read and write, each tensor counted once a kernel.
        stored: those of them that are weights.
        operations: multiplications and additions of a contraction; 0 else.
        integer: whether they are of integers.
    """

    name: str
    rule: str
    contraction: bool
    seconds: list[float] = field(default_factory=list)
    moved: int = 0
    stored: int = 0
    operations: int = 0
    integer: bool = False

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)

    def slower_than(self, other: LayerTimes) -> bool:
        """Whether this layer takes longer in at least three quarters of the runs than the other in half of its.

        Nothing is, where the clock did not see the other.
        """
        return sorted(self.seconds)[len(self.seconds) // 4] > other.median > 0


class Watcher:
    """Times the kernels of one model; `samples` are those of the last run.

    Args:
        model: what is run.
        kernels: names of its kernels; other calls are of the virtual machine itself.
        clock: seconds.
    """

    def __init__(self, model: Model, kernels: set[str], clock: Clock) -> None:
        self._model, self._kernels, self._clock = model, kernels, clock
        self._nothing = model.engine.nothing()
        self._weights = {tensor.data_ptr() for tensor in model.parameters}
        self.samples: list[Sample] = []

    def run(self, arguments: Sequence[Any]) -> list[Sample]:
        """Run the model once on device arguments; one sample a kernel call, in order."""
        self.samples = []
        with self._model.engine.watched(self.watch):
            self._model.run_raw(arguments)
        return self.samples

    def watch(self, function: Callable[..., Any], symbol: str, before: bool, result: Any, *arguments: Any) -> int:
        """What the virtual machine calls; the cost of calling from Python, that of an empty function, is taken off."""
        if not before or symbol not in self._kernels:
            return RUN
        start = self._clock()
        self._nothing(*arguments)
        middle = self._clock()
        function(*arguments)
        self._model.engine.synchronize()
        end = self._clock()
        tensors = [item for item in arguments if hasattr(item, "shape") and hasattr(item, "dtype")]
        shapes = tuple(tuple(map(int, tensor.shape)) for tensor in tensors)
        sizes = tuple(prod(s) * _item_bytes(str(t.dtype)) for s, t in zip(shapes, tensors, strict=True))
        stored = tuple(tensor.data_ptr() in self._weights for tensor in tensors)
        seconds = max(0.0, (end - middle) - (middle - start))
        self.samples.append(Sample(symbol, seconds, shapes, sizes, stored))
        return SKIP


def _item_bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def clock_of(threads: int) -> Clock:
    """A clock that leaves out what other processes take of a busy machine, where one thread does all the work."""
    return time.thread_time if threads == 1 else time.perf_counter


def profile(
    models: Mapping[str, tuple[Model, Sequence[Any], Mapping[str, Any]]], rounds: int, clock: Clock
) -> dict[str, list[LayerTimes]]:
    """Time the layers of several models, in turn in every round.

    Args:
        models: by name: the model, its device arguments, and its report (`layers` and `calls` are read).
        rounds: runs of each that count; one before them does not.
        clock: seconds.
    """
    watchers = {
        name: Watcher(model, {call["kernel"] for call in report["calls"]}, clock)
        for name, (model, _, report) in models.items()
    }
    found: dict[str, dict[tuple[str, str], LayerTimes]] = {name: {} for name in models}
    for turn in range(rounds + 1):
        for name, (_, arguments, report) in models.items():
            samples = watchers[name].run(arguments)
            if turn:
                _add(found[name], attribute(samples, report))
    return {name: list(layers.values()) for name, layers in found.items()}


def _add(all_runs: dict[tuple[str, str], LayerTimes], run: Sequence[LayerTimes]) -> None:
    for layer in run:
        known = all_runs.setdefault((layer.name, layer.rule), layer)
        if known is not layer:
            known.seconds.extend(layer.seconds)


def attribute(samples: Sequence[Sample], report: Mapping[str, Any]) -> list[LayerTimes]:
    """The layers of one run, in the order of their first call.

    What several layers share, such as a quantized activation, is split evenly among them.
    """
    facts = {layer["name"]: layer for layer in report["layers"]}
    layers: dict[tuple[str, str], LayerTimes] = {}
    for sample, call in zip(samples, match(samples, report["calls"]), strict=True):
        rule = call["rule"] or re.sub(r"_?\d*$", "", sample.kernel)
        for name in call["layers"]:
            layer = layers.setdefault((name, rule), LayerTimes(name, rule, bool(call["rule"]), [0.0]))
            layer.seconds[0] += sample.seconds / len(call["layers"])
            read, written = traffic(sample, facts.get(name, {}))
            layer.moved += (read + written) // len(call["layers"])
            layer.stored += read // len(call["layers"])
            if call["result"] and name in facts:
                layer.operations += operations(sample, call, facts[name])
                layer.integer = facts[name]["activation"] != "float32"
    return list(layers.values())


def match(samples: Sequence[Sample], calls: Sequence[Call]) -> list[Call]:
    """The record of every sample.

    The calls of a kernel come in the order of their records, again from the first one when the function that makes them
    is called again. Where several functions call a kernel, nobody knows the order: its calls are one row.
    """
    by_kernel: dict[str, list[Call]] = {}
    for call in calls:
        by_kernel.setdefault(call["kernel"], []).append(call)
    for kernel, records in by_kernel.items():
        if len({call["function"] for call in records}) > 1 and len({tuple(call["layers"]) for call in records}) > 1:
            by_kernel[kernel] = [{**records[0], "layers": [SEVERAL], "result": False}]
    seen = dict.fromkeys(by_kernel, 0)
    found = []
    for sample in samples:
        records = by_kernel[sample.kernel]
        found.append(records[seen[sample.kernel] % len(records)])
        seen[sample.kernel] += 1
    return found


def traffic(sample: Sample, facts: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of weights, and other bytes, that a call reads and writes. Of a table it reads one row an index."""
    sizes = list(zip(sample.sizes, sample.stored, strict=True))
    weights, others = (sum(size for size, stored in sizes if stored is wanted) for wanted in (True, False))
    if facts.get("kind") == EMBEDDING and sample.shapes:
        weights = prod(sample.shapes[0]) * weights // max(1, facts["weight_shape"][0])
    return weights, others


def operations(sample: Sample, call: Call, facts: Mapping[str, Any]) -> int:
    """Multiplications and additions of the call that gives the result of a contraction."""
    if facts["kind"] == EMBEDDING or not sample.shapes:
        return 0
    out = prod(sample.shapes[-call["outputs"]])
    if facts["kind"] == BATCH_PRODUCT:
        return int(2 * out * sample.shapes[0][-1])
    if facts["kind"] == ATTENTION:
        return int(2 * sample.shapes[1][facts["keys_axis"]] * (prod(sample.shapes[0]) + out))
    _, taps, channels = facts["weight_shape"]
    return int(2 * out * taps * channels)
