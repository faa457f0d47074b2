"""Which nodes have the ranges that their integer form needs: from the model itself, from calibration, or by moving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from kbitc.graph import edit
from kbitc.passes.allocate import families
from kbitc.passes.allocate.decision import is_clip_chain
from kbitc.passes.allocate.families import Form
from kbitc.quant.static import Codes
from kbitc.quant.stats import CalibrationStats

#: Why a function of a value stays float when that value has no codes.
NO_RANGE = "the model carries no range of what it is a function of, and there are no calibration data"


def with_ranges(
    known: Mapping[ir.Node, Form], stats: CalibrationStats, carried: Mapping[str, Codes], keep_float: Mapping[str, str]
) -> dict[ir.Node, Form]:
    """The forms; none where the user forbids it or a value that needs codes has no range.

    Args:
        known: node -> form, in graph order.
        stats: of calibration; without batches only what the model carries counts.
        carried: value name -> the codes that the model itself rounds it to.
        keep_float: node name -> why it must stay float.
    """
    ranges = _Ranges(known, stats, carried)
    found = {}
    for node, form in known.items():
        reason = None
        if form.family == families.TABLE:
            reason = ranges.obstacle_of_image(form)
        elif form.family not in (families.NONE, families.BIAS):
            reason = keep_float.get(node.name or "") or ranges.obstacle(form)
        found[node] = form if reason is None else Form(families.NONE, reason=reason)
        if form.family in families.KEEPS_CODES and reason is None:
            ranges.moved.update(node.outputs)
    return found


@dataclass
class _Ranges:
    """What is known of values.

    Attributes:
        moved: results that have the codes of what they move.
        limits: value without a range -> the only image of it with codes, a limited form of it.
    """

    known: Mapping[ir.Node, Form]
    stats: CalibrationStats
    carried: Mapping[str, Codes]
    moved: set[ir.Value] = field(default_factory=set)
    limits: dict[ir.Value, ir.Value] = field(init=False)

    def __post_init__(self) -> None:
        makers = {form.output: form for form in self.known.values() if form.output is not None}
        images: dict[ir.Value, list[ir.Value]] = {}
        for form in self.known.values():
            if form.family == families.TABLE and form.output is not None and form.output.name in self.carried:
                images.setdefault(form.inputs[0], []).append(form.output)
        self.limits = {
            root: found[0]
            for root, found in images.items()
            if len(found) == 1 and root in makers and is_clip_chain(found[0], root)
            if makers[root].family in families.ACCUMULATES | {families.ADD}
        }

    def obstacle_of_image(self, form: Form) -> str | None:
        """Why a function of one value cannot be a table or limits."""
        root = form.inputs[0]
        known = self.stats.batches or root in self.moved or root.name in self.carried or root in self.limits
        return None if known else NO_RANGE

    def obstacle(self, form: Form) -> str | None:
        """Why a node cannot run on integers: the first of its values that has no range."""
        for value in form.inputs:
            divides = form.family == families.QUOTIENT and value is form.inputs[-1]
            reason = self._missing(value, positive=divides)
            if reason is not None:
                return reason
        if form.output is None or (not self.stats.batches and self._free(form)):
            return None
        return self._missing(form.output)

    def _free(self, form: Form) -> bool:
        """Whether a result needs no range of its own."""
        if form.family in families.ACCUMULATES | families.KEEPS_CODES:
            return True
        return form.family == families.ADD and form.output in self.limits

    def _missing(self, value: ir.Value, *, positive: bool = False) -> str | None:
        name = value.name or ""
        if edit.constant(value) is not None or (name in self.carried and not positive) or value in self.moved:
            return None
        if not self.stats.batches:
            return f"the model carries no range of {name}, and there are no calibration data"
        seen = self.stats.values.get(name)
        if seen is None or not seen.count:
            return f"calibration never saw {name}"
        if seen.infinite:
            return f"{name} is not finite on the calibration data"
        if positive and not seen.low > 0:
            return f"its divisor {name} is not positive on the calibration data"
        return None
