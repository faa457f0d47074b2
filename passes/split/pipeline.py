"""Which products are split, in order: a kept column is taken out before the means of the rest are."""

from __future__ import annotations

import onnx_ir as ir

from kbitc.passes.base import GraphPass, run_once
from kbitc.passes.default import CANONICALIZE_FINISH
from kbitc.passes.split.centre_weights import CentreWeights
from kbitc.passes.split.keep_columns import KeepColumns
from kbitc.quant.scheme import QuantScheme


def split_products(model: ir.Model, scheme: QuantScheme | None, *, centre: bool, proxy: float | None) -> ir.Model:
    """Split the products of the canonical float model as asked for.

    Args:
        model: changed in place.
        scheme: what weights become; its blocks are those whose means are taken.
        centre: take block means out.
        proxy: share of the inputs, in percent, that is kept at more bits; None for none.
    """
    passes: list[GraphPass] = []
    if proxy is not None:
        passes.append(KeepColumns(proxy / 100))
    if centre and scheme is not None:
        passes.append(CentreWeights(scheme.block))
    return run_once(model, (*passes, *CANONICALIZE_FINISH)).model if passes else model
