"""Chooses, for each weight of a static graph, between one scale a channel and integer block scales of the same bits.

Both sum all of K in one int32. Blocks cost 4 bits for every 32 weights and an integer multiplication a block. In long
rows they take a third to a half off the squared error of 4-bit weights; in rows of a few blocks they take off nothing,
because there a small integer times the step of the channel fits no better than the channel's own scale. Measured on the
weights of the examples: 1.7 to 3.6 dB in rows of 384 to 1536, -0.4 to 0.7 dB in rows of 50 or fewer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.errors import UsageError
from kbitc.graph import ops
from kbitc.passes.allocate.survey import Candidate
from kbitc.passes.allocate.uniform import Accepts, decide
from kbitc.passes.solvers import mse_clip
from kbitc.quant.plan import PlanEntry, QuantPlan
from kbitc.quant.scheme import DEFAULT_BLOCK, Granularity, QuantScheme, ScaleCode

#: Share of the squared error with one scale a channel that may be left with blocks.
WORTH = 0.8
#: Output channels that are looked at, evenly spread.
ROWS = 256


def with_blocks(model: ir.Model, candidates: Sequence[Candidate], plan: QuantPlan, accepts: Accepts) -> QuantPlan:
    """The plan with integer block scales where they are worth it.

    Args:
        model: canonical graph.
        candidates: from `survey`.
        plan: what every weight becomes; entries with other schemes than one plain scale a channel stay.
        accepts: what the target can run.
    """
    known = {candidate.tensor: candidate for candidate in candidates}
    return replace(plan, entries=tuple(_entry(model, known[entry.tensor], entry, accepts) for entry in plan.entries))


def blocked(scheme: QuantScheme) -> QuantScheme | None:
    """The same data type with integer block scales; None where its levels leave them no room."""
    try:
        return replace(scheme, granularity=Granularity.BLOCK, block=DEFAULT_BLOCK, scale_code=ScaleCode.INTEGER)
    except UsageError:
        return None


def share_left(weight: npt.NDArray[np.float32], plain: QuantScheme, blocks: QuantScheme) -> float:
    """Squared error with blocks over that with one scale a channel, at the scales of least error; 1 if both are 0.

    Args:
        weight: f32 [N, T, C].
        plain: one scale a channel.
        blocks: with blocks.
    """
    rows = weight[np.linspace(0, len(weight) - 1, min(ROWS, len(weight))).astype(np.int64)]
    before, after = (
        float(np.square(rows - mse_clip.solve(rows, scheme).dequantize(), dtype=np.float64).sum())
        for scheme in (plain, blocks)
    )
    return after / before if before else 1.0


def _entry(model: ir.Model, candidate: Candidate, entry: PlanEntry, accepts: Accepts) -> PlanEntry:
    scheme = entry.scheme
    plain = scheme is not None and scheme.granularity is Granularity.CHANNEL and scheme.scale_code is ScaleCode.PLAIN
    wanted = blocked(scheme) if scheme is not None and plain else None
    if scheme is None or wanted is None or 0 in entry.shape:
        return entry
    made = decide(model, candidate, wanted, entry.activation, None, accepts)
    if made.scheme is None or made.scheme.granularity is not Granularity.BLOCK or made.activation != entry.activation:
        return entry
    tensor = model.graph.initializers[candidate.tensor].const_value
    weight = np.asarray(ops.to_view(np.asarray(tensor), candidate.kind), np.float32)
    share = share_left(weight, scheme, made.scheme)
    if share > WORTH:
        return entry
    gain = f"{-10 * math.log10(share):.1f} dB less error" if share else "no error"
    return replace(entry, scheme=made.scheme, reason=f"integer block scales: {gain} than one scale a channel leaves")
