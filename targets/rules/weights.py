"""How packed weights become parameters of a module, and kernels are shared: what all rules for them have in common.

A weight is `<name>.codes` (packed), `<name>.scales`, `<name>.factors`, `<name>.zero_points` or `<name>.offsets`, and
`<name>.bias`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from kbitc.errors import InternalError
from kbitc.quant.packing import LANES, pack_codes, pack_per_channel, round_up
from kbitc.quant.tensor import QTensor
from kbitc.targets.kernels.isa import stored_zero_points
from kbitc.targets.kernels.packed import SCALE_DTYPES
from kbitc.targets.lower.contraction import Contraction, EmitContext

RelaxExpr = Any


def quantized_weight(contraction: Contraction) -> QTensor:
    """The weight of a contraction that a rule here has taken."""
    if not isinstance(contraction.weight, QTensor):
        raise InternalError("a rule for quantized weights was given another", where=contraction.name)
    return contraction.weight


def cached(ctx: EmitContext, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """Build a kernel once for all contractions of the same specification and schedule."""
    key = (*key, repr(ctx.target.schedule))
    if key not in ctx.memo:
        ctx.memo[key] = make()
    return ctx.memo[key]


def weight_parameters(
    ctx: EmitContext, contraction: Contraction, weight: QTensor, *, factors: bool = False
) -> list[RelaxExpr]:
    """Packed codes, scales, factors, zero points or offsets, and bias, in the order in which every kernel takes them.

    A weight that several contractions share is stored once.
    """
    key = ("weight", id(weight), factors)
    if key not in ctx.memo:
        parts = [ctx.weight(f"{contraction.name}.{part}", array) for part, array in stored(weight, factors=factors)]
        ctx.memo[key] = (weight, parts)
    parameters: list[RelaxExpr] = list(ctx.memo[key][1])
    if contraction.bias is not None:
        padded = np.zeros(round_up(weight.shape[0], LANES), np.float32)
        padded[: weight.shape[0]] = contraction.bias
        parameters.append(ctx.weight(f"{contraction.name}.bias", padded))
    return parameters


def stored(weight: QTensor, *, factors: bool = False) -> list[tuple[str, npt.NDArray[Any]]]:
    """The arrays of a weight as they lie in memory, by the part of their name.

    Args:
        weight: what is stored.
        factors: as `WeightSpec.factors`; the scales are then the steps, one a channel.
    """
    n = weight.shape[0]
    if factors and weight.scale_steps is None:
        raise InternalError("factors of a weight without integer scales", where=str(weight.scheme))
    scales = weight.scale_steps.reshape(n, 1, 1) if factors and weight.scale_steps is not None else weight.scales
    dtype = SCALE_DTYPES[weight.scheme.scale_type]
    parts: list[tuple[str, npt.NDArray[Any]]] = [
        ("codes", pack_codes(weight.codes, weight.bits)),
        ("scales", pack_per_channel(scales.astype(dtype), n)),
    ]
    if factors:
        parts.append(("factors", pack_per_channel(weight.scale_codes(), n)))
    if weight.zero_points is not None:
        parts.append(("zero_points", pack_per_channel(stored_zero_points(weight.zero_points, weight.format), n)))
    if weight.offsets is not None:
        parts.append(("offsets", pack_per_channel(weight.offsets.astype(dtype), n)))
    return parts
