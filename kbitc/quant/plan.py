"""The quantization plan: which tensor gets which scheme, and why. Data that a person can print, edit and pass back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from kbitc.quant.scheme import QuantScheme

PLAN_VERSION = 1
FLOAT = "float32"
INT8 = "int8"


@dataclass(frozen=True)
class PlanEntry:
    """The decision about one weight.

    Attributes:
        tensor: name of the weight initializer.
        nodes: names of the nodes that use it.
        op_type: their operator type.
        shape: (N, T, C) view of the weight.
        scheme: what it becomes; None keeps float32.
        activation: "int8" when the other operand is quantized at run time, else "float32".
        reason: why, in words.
    """

    tensor: str
    nodes: tuple[str, ...]
    op_type: str
    shape: tuple[int, int, int]
    scheme: QuantScheme | None
    activation: str
    reason: str

    def as_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        data = asdict(self)
        data["scheme"] = None if self.scheme is None else str(self.scheme)
        return data


@dataclass(frozen=True)
class QuantPlan:
    """All decisions, in the order of the graph."""

    entries: tuple[PlanEntry, ...]

    def quantized(self) -> tuple[PlanEntry, ...]:
        """The entries that have a scheme."""
        return tuple(entry for entry in self.entries if entry.scheme is not None)

    def as_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        return {"version": PLAN_VERSION, "tensors": [entry.as_json() for entry in self.entries]}

    def text(self) -> str:
        """The plan as indented JSON."""
        return json.dumps(self.as_json(), indent=1) + "\n"
