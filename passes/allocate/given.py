"""A plan that a person gives: `--plan`. What it names is decided by it, what it leaves out by the other options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from kbitc.catalog import nearest
from kbitc.errors import UnsupportedError, UsageError
from kbitc.passes.allocate.survey import Candidate
from kbitc.passes.allocate.uniform import Accepts, decide
from kbitc.quant.plan import FLOAT, INT8, PlanEntry, PlanRequest, QuantPlan

REASON = "from the plan"


def apply_requests(
    model: ir.Model,
    candidates: Sequence[Candidate],
    base: QuantPlan,
    requests: Sequence[PlanRequest],
    activation: str,
    excluded: Mapping[str, str],
    accepts: Accepts,
) -> QuantPlan:
    """The base plan with the asked entries in place of its own.

    Args:
        model: canonical graph.
        candidates: from `survey`.
        base: what the other options make of every weight.
        requests: from `kbitc.quant.plan.read_plan`.
        activation: "int8" or "float32", where a request leaves it open.
        excluded: tensor name -> pattern, from `exclude`.
        accepts: what the target can run.

    Raises:
        UsageError: a tensor that the model does not have, of another shape, or that --exclude keeps float.
        UnsupportedError: the weight cannot be quantized, or the target refuses the scheme.
    """
    known = {candidate.tensor: candidate for candidate in candidates}
    asked = {}
    for request in requests:
        _check(request, known, excluded)
        asked[request.tensor] = _entry(model, known[request.tensor], request, activation, accepts)
    return QuantPlan(tuple(asked.get(entry.tensor, entry) for entry in base.entries))


def _check(request: PlanRequest, known: Mapping[str, Candidate], excluded: Mapping[str, str]) -> None:
    where = f"plan, tensor {request.tensor!r}"
    if request.tensor not in known:
        remedy = nearest(request.tensor, list(known))
        raise UsageError("the plan names no weight of the model", got=repr(request.tensor), remedy=remedy)
    shape = known[request.tensor].shape
    if request.shape is not None and known[request.tensor].obstacle is None and request.shape != shape:
        raise UsageError("the plan is for another model: shapes differ", where=where, got=request.shape,
                         remedy=f"the weight is {shape}")  # fmt: skip
    if request.scheme is not None and request.tensor in excluded:
        raise UsageError("the plan gives a scheme to a weight that --exclude keeps float", where=where,
                         got=repr(excluded[request.tensor]), remedy="drop one of them")  # fmt: skip


def _entry(model: ir.Model, candidate: Candidate, request: PlanRequest, activation: str, accepts: Accepts) -> PlanEntry:
    if request.scheme is None:
        nodes = tuple(node.name or "" for node in candidate.nodes)
        reason = candidate.obstacle or REASON
        return PlanEntry(candidate.tensor, nodes, candidate.op_type, candidate.shape, None, FLOAT, reason)
    entry = decide(model, candidate, request.scheme, request.activation or activation, None, accepts)
    where = f"plan, tensor {candidate.tensor!r}"
    if entry.scheme is None:
        raise UnsupportedError("the plan asks for a scheme that cannot be had", where=where, got=str(request.scheme),
                               remedy=f"{entry.reason}; change its scheme, or write float32")  # fmt: skip
    if request.activation == INT8 and entry.activation != INT8:
        raise UnsupportedError("the plan asks for int8 activations that cannot be had", where=where,
                               remedy=f"{entry.reason}; write float32, or leave activation out")  # fmt: skip
    return replace(entry, reason=REASON if entry.reason == "asked for" else f"{REASON}; {entry.reason}")
