"""What every form is written from, and codes in a wider standard type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from kbitc.graph.functions import add_functions
from kbitc.passes.rewrite.quantize_weights import STANDARD_DTYPES, quantize_weights
from kbitc.quant.format import Format
from kbitc.quant.plan import QuantPlan
from kbitc.quant.scheme import QuantScheme
from kbitc.quant.tensor import QTensor

STANDARD_BITS = (2, 4, 8)
WEIGHTS_ONLY = "this format holds quantized weights only"


@dataclass(frozen=True)
class Export:
    """A quantized model before it takes a form.

    Attributes:
        original: canonical float graph.
        quantized: the quantized ONNX model.
        plan: what every weight became.
        tensors: weight -> its quantized form.
        kinds: weight -> matmul, conv or embedding.
    """

    original: ir.Model
    quantized: ir.Model
    plan: QuantPlan
    tensors: Mapping[str, QTensor]
    kinds: Mapping[str, str]


def is_standard(scheme: QuantScheme) -> bool:
    """Whether ONNX has the type: int and uint of 2, 4 and 8 bits."""
    return (scheme.format, scheme.bits) in STANDARD_DTYPES


def has_offsets(scheme: QuantScheme) -> str | None:
    """Why a form of integers and zero points cannot hold a scheme; None when it has no offsets."""
    return f"it has no offsets, as {scheme} has: use :zp in place of :min" if scheme.offset else None


def wants_widening(scheme: QuantScheme, widen: bool) -> str | None:
    """Why a scheme cannot be written in a standard type; None when it can."""
    if widen or is_standard(scheme):
        return None
    return f"no standard type holds {scheme.format}{scheme.bits}: give --widen, or int or uint of 2, 4 or 8 bits"


def widened(tensor: QTensor) -> QTensor:
    """The same weights with codes of a standard type: levels keep their values, so every weight is the same float.

    Uniform codes of 1, 3, 5, 6, 7 bits take the next of 2, 4, 8 bits; other grids need 8 bits for their int8 levels.
    Scales that are themselves quantized become plain ones. Beside offsets the codes stay, as they are the levels.
    """
    tensor = tensor.with_plain_scales()
    if is_standard(tensor.scheme):
        return tensor
    low, high = min(tensor.format.levels), max(tensor.format.levels)
    bits = next(bits for bits in STANDARD_BITS if -(1 << (bits - 1)) <= low and high < 1 << (bits - 1))
    half, asymmetric = 1 << (bits - 1), tensor.format.asymmetric
    family = "uint" if asymmetric else "int"
    levels = tensor.format.grid.astype(np.int16)
    data_type = Format(family, bits, tuple(range(-half, half)), uniform=True, asymmetric=asymmetric)
    zeros = None if tensor.zero_points is None else (levels[tensor.zero_points] + half).astype(np.uint8)
    scheme = replace(tensor.scheme, format=family, bits=bits, variant="")
    if tensor.offsets is not None:
        return replace(tensor, format=scheme.data_type(), scheme=scheme)
    return QTensor((levels[tensor.codes] + half).astype(np.uint8), tensor.scales, zeros, data_type, scheme)


def standard_model(export: Export, tensors: Mapping[str, QTensor]) -> ir.Model:
    """A copy of the graph in which these weights are behind standard DequantizeLinear nodes."""
    copy = export.original.clone()
    needed = quantize_weights(copy, tensors, export.kinds)
    add_functions(copy, needed, copy.graph.opset_imports[""])
    return copy
