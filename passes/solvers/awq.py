"""The clipping half of AWQ; the scaling half is the equalizer of the same name, which the option turns on with it.

AWQ (Lin et al., arXiv 2306.00978) scales input channels by the size of their activations before rounding
(`passes/equalize/awq.py`) and then searches a clipping range for each block by the output error, here with the error
weighted by E[x_j^2] of the scaled inputs (`mse_clip`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kbitc.passes.solvers import mse_clip
from kbitc.passes.solvers.gptq import better_rows
from kbitc.passes.solvers.rtn import solve as round_to_nearest
from kbitc.quant.moments import InputMoments
from kbitc.quant.scheme import QuantScheme
from kbitc.quant.tensor import QTensor

FloatArray = npt.NDArray[np.float32]


def solve(weight: FloatArray, scheme: QuantScheme, inputs: InputMoments | None = None) -> QTensor:
    """Quantize one weight.

    Args:
        weight: f32 [N, T, C], finite; already scaled.
        scheme: what it becomes.
        inputs: moments of the scaled inputs; without them this is `mse_clip`.
    """
    found = mse_clip.solve(weight, scheme, inputs)
    return found if inputs is None else better_rows(weight, inputs, round_to_nearest(weight, scheme), found)
