"""What onnxruntime's fused operators of transformers compute, as bodies of functions in standard operators."""

from __future__ import annotations

from kbitc.passes.canonicalize.contrib_quantized import Statements

BODIES: dict[str, Statements] = {}
