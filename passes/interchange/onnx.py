"""The default: standard DequantizeLinear where ONNX has the type, a model-local function where it has none."""

from __future__ import annotations

from pathlib import Path

from kbitc.importer.files import write_model
from kbitc.passes.interchange._export import Export
from kbitc.quant.scheme import QuantScheme


def declines(widen: bool, op_type: str, activation: str, scheme: QuantScheme) -> str | None:
    """Nothing is declined."""
    return None


def write(export: Export, path: Path) -> int:
    """Write one ONNX file; returns its bytes."""
    return write_model(export.quantized, path)
