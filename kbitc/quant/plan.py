"""The quantization plan: which tensor gets which scheme, and why. Data that a person can print, edit and pass back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from kbitc.catalog import nearest
from kbitc.errors import UsageError
from kbitc.quant.scheme import QuantScheme
from kbitc.quant.static import StaticPlan

PLAN_VERSION = 1
FLOAT = "float32"
INT8 = "int8"
UINT8 = "uint8"
MAX_PLAN_BYTES = 64 << 20
EXAMPLE = '{"version": 1, "tensors": [{"tensor": "encoder.weight", "scheme": "int4:b32"}]}'


@dataclass(frozen=True)
class PlanEntry:
    """The decision about one weight.

    Attributes:
        tensor: name of the weight initializer.
        nodes: names of the nodes that use it.
        op_type: their operator type.
        shape: (N, T, C) view of the weight.
        scheme: what it becomes; None keeps float32.
        activation: "int8" when the other operand is quantized at run time, "uint8" when its codes are planned
            (`static`), else "float32".
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
    """All decisions, in the order of the graph.

    Attributes:
        entries: one entry a weight.
        static: the decisions about activations, when their codes are planned.
    """

    entries: tuple[PlanEntry, ...]
    static: StaticPlan | None = None

    def quantized(self) -> tuple[PlanEntry, ...]:
        """The entries that have a scheme."""
        return tuple(entry for entry in self.entries if entry.scheme is not None)

    def kept_float(self, reasons: Mapping[str, str]) -> QuantPlan:
        """The plan with some weights float; tensor name -> why."""
        entries = tuple(
            replace(entry, scheme=None, activation=FLOAT, reason=reasons[entry.tensor])
            if entry.tensor in reasons
            else entry
            for entry in self.entries
        )
        return replace(self, entries=entries)

    def as_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        data = {"version": PLAN_VERSION, "tensors": [entry.as_json() for entry in self.entries]}
        return data if self.static is None else {**data, "static": self.static.as_json()}

    def text(self) -> str:
        """The plan as indented JSON."""
        return json.dumps(self.as_json(), indent=1) + "\n"

    def write(self, path: Path | None) -> None:
        """Leave the plan in a file, when one is given."""
        if path is not None:
            path.write_text(self.text(), encoding="utf-8")


@dataclass(frozen=True)
class PlanRequest:
    """One entry of a plan file: what a person asks for one weight.

    Attributes:
        tensor: name of the weight initializer.
        scheme: what it becomes; None keeps float32.
        activation: "int8" or "float32"; None where the file leaves it open.
        shape: (N, T, C) that the file states; None where it does not.
    """

    tensor: str
    scheme: QuantScheme | None
    activation: str | None = None
    shape: tuple[int, int, int] | None = None


def read_plan(path: str | PathLike[str]) -> tuple[PlanRequest, ...]:
    """The entries of a plan file. An entry needs `tensor` and `scheme`; what else `as_json` writes is optional.

    Raises:
        UsageError: the file is missing, is not JSON or not a plan of this version, or an entry is wrong.
    """
    file = Path(path)
    try:
        if file.stat().st_size > MAX_PLAN_BYTES:
            raise UsageError("the file is too large for a plan", where=str(file), got=f"{file.stat().st_size} bytes")
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError("cannot read the plan", where=str(file), got=error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise UsageError("the plan is not JSON", where=str(file), got=str(error), remedy=f"write {EXAMPLE}") from error
    return parse_plan(data, str(file))


def parse_plan(data: Any, where: str) -> tuple[PlanRequest, ...]:
    """The entries of a plan that was read from JSON; `where` is its file, for messages.

    Raises:
        UsageError: as `read_plan`.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("tensors"), list):
        raise UsageError("not a plan", where=where, got=_kind(data), remedy=f"write {EXAMPLE}")
    if data.get("version") != PLAN_VERSION or isinstance(data["version"], bool):
        raise UsageError("unknown version of a plan", where=where, got=data.get("version"), remedy="this is version 1")
    requests = tuple(_request(item, f"{where}, tensors[{i}]") for i, item in enumerate(data["tensors"]))
    for name, count in Counter(request.tensor for request in requests).items():
        if count > 1:
            raise UsageError("the plan lists a tensor twice", where=where, got=repr(name), remedy="keep one entry")
    return requests


def _request(item: Any, where: str) -> PlanRequest:
    if not isinstance(item, Mapping) or not isinstance(item.get("tensor"), str) or "scheme" not in item:
        raise UsageError("an entry of a plan needs tensor and scheme", where=where, got=_kind(item))
    where = f"{where}, tensor {item['tensor']!r}"
    known = [field.name for field in fields(PlanEntry)]
    for key in item:
        if key not in known:
            raise UsageError("unknown key in a plan", where=where, got=repr(key), remedy=nearest(str(key), known))
    activation = item.get("activation")
    if activation not in (None, FLOAT, INT8, UINT8):
        remedy = "int8, uint8 or float32"
        raise UsageError("unknown activation in a plan", where=where, got=repr(activation), remedy=remedy)
    return PlanRequest(item["tensor"], _scheme(item["scheme"], where), activation, _shape(item.get("shape"), where))


def _scheme(text: Any, where: str) -> QuantScheme | None:
    if text is None or text == FLOAT:
        return None
    if not isinstance(text, str):
        raise UsageError("a scheme is a text", where=where, got=repr(text), remedy="write int4:b32, or float32")
    try:
        return QuantScheme.parse(text)
    except UsageError as error:
        raise UsageError(error.message, where=where, got=error.got, remedy=error.remedy) from error


def _shape(value: Any, where: str) -> tuple[int, int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 3 or not all(type(size) is int and size >= 0 for size in value):
        raise UsageError("the shape in a plan is [N, T, C]", where=where, got=repr(value), remedy="or leave it out")
    return value[0], value[1], value[2]


def _kind(data: Any) -> str:
    text = json.dumps(data)
    return text if len(text) <= 80 else text[:77] + "..."
