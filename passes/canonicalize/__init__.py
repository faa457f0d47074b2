"""Stage 2: any imported model becomes a small, fixed vocabulary of operators in opset-21 form."""

from __future__ import annotations

from kbitc.passes.canonicalize.pipeline import canonicalize

__all__ = ["canonicalize"]
