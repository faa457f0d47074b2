"""Stage 4: edits of the float graph that make it easier to quantize.

One file an equalizer: `equalize(setting) -> number of places changed` on the model in place, float outputs equal up to
rounding. `bias_correction` is told apart by its name: it works on what was quantized, layer by layer. Files that begin
with an underscore are shared.
"""

from __future__ import annotations

from kbitc.passes.equalize._setting import Setting

__all__ = ["Setting"]
