"""The cost model: what a kernel takes, predicted from a short table that was measured once a kind of machine.

A row of the table says what a rule took for one product. Another product takes as long a multiply-add as the rows
that are most like it: the mean of their logarithms, weighted by the inverse square of the distance in the logarithms
of its dimensions. Of a machine that was not measured the table holds speeds, and the slower of reading and computing
counts.

`python examples/benchmarks/costs.py` measures the table again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import exp, log, prod
from pathlib import Path
from typing import Any

from kbitc.bundle.manifest import Described
from kbitc.quant.packing import LANES, round_up

SHIPPED = Path(__file__).with_name("costs.json")
FLOAT_BITS = 32
# Added to squared distances: several rows very near to a product count alike.
SOFTNESS = 0.005
KINDS = ("matmul", "conv")


@dataclass(frozen=True)
class Work:
    """The dimensions of a product.

    Attributes:
        rows: of the output: pixels of a convolution.
        outputs: N; of all groups.
        taps, channels: T and C of the weight [N, T, C].
        bits: of a weight.
    """

    rows: int
    outputs: int
    taps: int
    channels: int
    bits: int

    @property
    def products(self) -> int:
        """Multiply-adds, padding of the outputs to whole tiles included."""
        return self.rows * round_up(self.outputs, LANES) * self.taps * self.channels

    @property
    def moved(self) -> float:
        """Bytes read and written, about."""
        weights = self.outputs * self.taps * self.channels * self.bits / 8
        return weights + 4.0 * self.rows * (self.channels + self.outputs)

    @property
    def logarithms(self) -> tuple[float, ...]:
        """Where it lies among others."""
        return tuple(log(size) for size in (self.rows, self.outputs, self.taps, self.channels, self.bits))


@dataclass(frozen=True)
class Row:
    """One measurement: microseconds of a rule."""

    rule: str
    work: Work
    microseconds: float


@dataclass(frozen=True)
class Speeds:
    """A machine that was not measured: gigabytes and 10^9 multiply-adds a second, microseconds to start a kernel."""

    read: float
    floats: float
    integers: float
    start: float


@dataclass(frozen=True)
class Costs:
    """The table of one target.

    Attributes:
        rows: measured.
        speeds: for rules without rows; None where everything was measured.
        machine: what was measured, for people.
    """

    rows: tuple[Row, ...]
    speeds: Speeds | None = None
    machine: str = ""

    def predict(self, rule: str, work: Work, *, integer: bool) -> float | None:
        """Microseconds of a product; None where nothing is known of the rule."""
        if not work.products:
            return 0.0
        rows = [row for row in self.rows if row.rule == rule]
        if rows:
            return _like(rows, work)
        if self.speeds is None:
            return None
        rate = self.speeds.integers if integer else self.speeds.floats
        return self.speeds.start + max(work.moved / self.speeds.read, work.products / rate) / 1e3


def _like(rows: Sequence[Row], work: Work) -> float:
    total = weights = 0.0
    for row in rows:
        pairs = zip(row.work.logarithms, work.logarithms, strict=True)
        weight = 1 / (sum((a - b) ** 2 for a, b in pairs) + SOFTNESS)
        total += weight * log(row.microseconds / row.work.products)
        weights += weight
    return work.products * exp(total / weights)


def predicted(facts: Mapping[str, Any], target: str, sizes: Mapping[str, int] | None = None) -> float | None:
    """Microseconds of a layer of a report; None where its shape or its rule is not known.

    Args:
        facts: an entry of `layers` of report.json.
        target: text form of the target.
        sizes: of symbolic dims.
    """
    work = work_of(facts, sizes or {})
    costs = read_costs().get(target)
    if work is None or costs is None:
        return None
    return costs.predict(facts["rule"], work, integer=facts["activation"] != "float32")


def with_predictions(
    layers: Sequence[Mapping[str, Any]], target: str, sizes: Mapping[str, int]
) -> list[dict[str, Any]]:
    """The layers of a report with the microseconds that the cost model predicts, and from what it does.

    Args:
        layers: of report.json.
        target: text form of the target.
        sizes: of symbolic dims.
    """
    costs = read_costs().get(target)
    source = "" if costs is None else f"{target}, {costs.machine}"
    return [
        {**layer, "predicted_microseconds": _rounded(predicted(layer, target, sizes)), "predicted_from": source}
        for layer in layers
    ]


def _rounded(microseconds: float | None) -> float | None:
    return None if microseconds is None else round(microseconds, 2)


def sizes_of(inputs: Sequence[Described], feeds: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of symbolic dims in one set of inputs, by their names in a report."""
    sizes: dict[str, int] = {}
    for item in inputs:
        pairs = zip(item.shape, feeds[item.name].shape, strict=True) if item.name in feeds else ()
        sizes |= {dim: int(size) for dim, size in pairs if isinstance(dim, str)}
    return sizes


def work_of(facts: Mapping[str, Any], sizes: Mapping[str, int]) -> Work | None:
    """The dimensions of a layer; None for what is no product by a weight, or where a dim is not known."""
    out = [dim if isinstance(dim, int) else sizes.get(dim) for dim in facts["out_shape"]]
    known = [dim for dim in out if dim is not None]
    if facts["kind"] not in KINDS or facts.get("bits") is None or len(known) < len(out):
        return None
    outputs, taps, channels = facts["weight_shape"]
    return Work(prod(known[:-1]), outputs, taps, channels, facts["bits"])


@cache
def read_costs(path: Path = SHIPPED) -> dict[str, Costs]:
    """The shipped tables by text form of the target."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return {name: costs_from(table) for name, table in data["targets"].items()}


def costs_from(table: Mapping[str, Any]) -> Costs:
    """A table from plain data: rows are [rule, bits, rows, N, T, C, microseconds]."""
    rows = tuple(
        Row(rule, Work(count, outputs, taps, channels, bits), microseconds)
        for rule, bits, count, outputs, taps, channels, microseconds in table.get("rows", ())
    )
    speeds = table.get("speeds")
    return Costs(rows, None if speeds is None else Speeds(**speeds), table.get("machine", ""))


def as_row(row: Row) -> list[Any]:
    """A row as plain data."""
    work = row.work
    return [row.rule, work.bits, work.rows, work.outputs, work.taps, work.channels, round(row.microseconds, 2)]
