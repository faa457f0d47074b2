"""Import: an ONNX file (or message) becomes a checked `onnx_ir` model whose values have types and shapes."""

from __future__ import annotations

from kbitc.importer.load import load_model

__all__ = ["load_model"]
