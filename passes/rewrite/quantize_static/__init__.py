"""Write the integer form of a static plan into the graph; one file a family of operators."""

from __future__ import annotations

from kbitc.passes.rewrite.quantize_static.apply import quantize_static

__all__ = ["quantize_static"]
