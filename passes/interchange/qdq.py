"""Standard QuantizeLinear and DequantizeLinear only: what every ONNX runtime knows.

DequantizeLinear (ONNX operators, opset 21; INT2 and UINT2 since opset 25): y = (x - zero point) * scale, blocked along
an axis. Widths that ONNX lacks are widened on request; the levels keep their values, so the numbers stay the same.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from kbitc.importer.files import write_model
from kbitc.passes.interchange._export import WEIGHTS_ONLY, Export, has_offsets, standard_model, wants_widening, widened
from kbitc.quant.plan import INT8
from kbitc.quant.scheme import QuantScheme


def declines(widen: bool, op_type: str, activation: str, scheme: QuantScheme) -> str | None:
    """Run-time quantized activations, and a data type that ONNX lacks, unless it may be widened."""
    if activation == INT8:
        return WEIGHTS_ONLY
    return has_offsets(scheme) or wants_widening(scheme, widen)


def write(export: Export, path: Path) -> int:
    """Write one ONNX file; returns its bytes."""
    return write_model(make(export), path)


def make(export: Export) -> ir.Model:
    """The model."""
    return standard_model(export, {name: widened(tensor) for name, tensor in export.tensors.items()})
