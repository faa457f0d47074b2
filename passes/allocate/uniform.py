"""The same scheme for every weight, with the few exceptions that the shape of a weight forces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from kbitc.graph import ops
from kbitc.passes.allocate.survey import Candidate
from kbitc.quant.plan import FLOAT, INT8, UINT8, PlanEntry, QuantPlan
from kbitc.quant.scheme import Granularity, QuantScheme, ScaleType
from kbitc.targets.target import Target

# A convolution with fewer channels than this per tap would spend more bits on block scales than on codes.
MIN_BLOCK_CHANNELS = 16
# Scales outside this range lose precision or overflow when stored as float16.
F16_SCALE_RANGE = (2.0**-14, 65504.0)
# (operator type, activation, scheme, products per accumulator) -> why the target declines, or None.
Accepts = Callable[[str, str, QuantScheme, int], "str | None"]


def allocate(
    model: ir.Model,
    candidates: Sequence[Candidate],
    scheme: QuantScheme,
    activation: str,
    excluded: Mapping[str, str],
    accepts: Accepts,
) -> QuantPlan:
    """Give every candidate the scheme, or say why not.

    Args:
        model: canonical graph, for the weights' ranges.
        candidates: from `survey`.
        scheme: what every weight becomes.
        activation: "int8" or "float32" for the other operand.
        excluded: tensor name -> pattern, from `exclude`.
        accepts: what the target can run.
    """
    entries = [decide(model, c, scheme, activation, excluded.get(c.tensor), accepts) for c in candidates]
    return QuantPlan(tuple(entries))


def accepted_by(target: Target, declines: Callable[[str, str, QuantScheme], str | None] | None = None) -> Accepts:
    """What a target, and the form of the result, decline, asked as the allocators ask."""

    def accepts(op_type: str, activation: str, scheme: QuantScheme, terms: int) -> str | None:
        refusal = None if declines is None else declines(op_type, activation, scheme)
        return refusal or target.accepts(op_type, activation, scheme, reduction=terms)

    return accepts


def keep_float(candidates: Sequence[Candidate]) -> QuantPlan:
    """The plan of a float build."""
    return QuantPlan(tuple(_entry(candidate, None, FLOAT, "float build") for candidate in candidates))


def decide(
    model: ir.Model,
    candidate: Candidate,
    scheme: QuantScheme,
    activation: str,
    pattern: str | None,
    accepts: Accepts,
) -> PlanEntry:
    """The entry of one weight, when it is asked to become `scheme`; arguments as in `allocate`.

    The scheme is adapted to the weight (scale type, one scale a channel where a block does not fill), never its bits.
    """
    if candidate.obstacle is not None:
        return _entry(candidate, None, FLOAT, candidate.obstacle)
    if pattern is not None:
        return _entry(candidate, None, FLOAT, f"excluded by {pattern!r}")
    fitted, reasons = _fit(model, candidate, scheme)
    chosen, why = _activation(candidate, activation)
    if why:
        reasons.append(why)
    refusal = accepts(candidate.op_type, chosen, fitted, _terms(candidate, fitted))
    if refusal is not None and chosen != FLOAT:
        reasons.append(f"float activations: {refusal}")
        chosen = FLOAT
        refusal = accepts(candidate.op_type, chosen, fitted, _terms(candidate, fitted))
    if refusal is not None:
        return _entry(candidate, None, FLOAT, refusal)
    return _entry(candidate, fitted, chosen, "; ".join(reasons) or "asked for")


def _entry(candidate: Candidate, scheme: QuantScheme | None, activation: str, reason: str) -> PlanEntry:
    nodes = tuple(node.name or "" for node in candidate.nodes)
    return PlanEntry(candidate.tensor, nodes, candidate.op_type, candidate.shape, scheme, activation, reason)


def _fit(model: ir.Model, candidate: Candidate, scheme: QuantScheme) -> tuple[QuantScheme, list[str]]:
    """Adapt granularity and scale type to the weight."""
    reasons: list[str] = []
    channels = candidate.shape[2]
    small = candidate.kind == "conv" and channels < min(scheme.block, MIN_BLOCK_CHANNELS)
    if scheme.granularity is Granularity.BLOCK and small:
        scheme = scheme.per_channel()
        reasons.append(f"one scale a channel: {channels} channels a tap are fewer than a block")
    if scheme.scale_type is ScaleType.F16 and not _fits_f16(model, candidate, scheme):
        scheme = replace(scheme, scale_type=ScaleType.F32)
        reasons.append("f32 scales: the weights are outside the range of f16 scales")
    return scheme, reasons


def _fits_f16(model: ir.Model, candidate: Candidate, scheme: QuantScheme) -> bool:
    tensor = model.graph.initializers[candidate.tensor].const_value
    peak = 0.0 if tensor is None else float(np.abs(tensor.numpy()).max())
    scale = peak / max(abs(level) for level in scheme.data_type().levels)
    return peak == 0.0 or F16_SCALE_RANGE[0] <= scale and peak <= F16_SCALE_RANGE[1]


def _activation(candidate: Candidate, wanted: str) -> tuple[str, str]:
    """The activation type of this operator and, where it is not the one wanted, why."""
    if wanted == FLOAT or ops.WEIGHT_USES[candidate.op_type].activation_input is None:
        return FLOAT, ""
    if wanted == UINT8:
        return UINT8, ""
    if candidate.group > 1:
        return FLOAT, "float activations: a grouped convolution is bound by memory, not by products"
    if candidate.kind == "conv" and candidate.shape[2] < MIN_BLOCK_CHANNELS:
        return FLOAT, "float activations: too few channels for an integer dot product"
    return INT8, ""


def _terms(candidate: Candidate, scheme: QuantScheme) -> int:
    """Products that one int32 accumulator sums: a block, or all channels of a tap."""
    return scheme.block if scheme.granularity is Granularity.BLOCK else candidate.shape[2]
