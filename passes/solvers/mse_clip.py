"""Per block the scale (and zero point) with the least squared error, instead of the one that clips nothing.

For each block minimises sum_j h_j (w_j - s * level_j)^2 over the scale s: a search over shares of the full range
(Banner et al., arXiv 1810.05723), then alternately the least-squares s and the nearest codes. h_j = E[x_j^2], the
diagonal of the layer's second moments, where there are calibration data; else 1, the plain error of the weights.
Starts from round to nearest and keeps what is better, block by block: never worse than it. Integer block scales are
multiples of the step that round to nearest gives their channel; doubly quantized scales stay as it chose them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kbitc.passes.solvers import rtn
from kbitc.passes.solvers._blocks import fit_all, importance_of, searchable
from kbitc.quant.moments import InputMoments
from kbitc.quant.scheme import QuantScheme
from kbitc.quant.tensor import QTensor

FloatArray = npt.NDArray[np.float32]


def solve(weight: FloatArray, scheme: QuantScheme, inputs: InputMoments | None = None) -> QTensor:
    """Quantize one weight.

    Args:
        weight: f32 [N, T, C], finite.
        scheme: what it becomes.
        inputs: moments of what it is multiplied with; None weighs all errors alike.
    """
    first = rtn.solve(weight, scheme, inputs)
    return fit_all(weight, importance_of(weight, inputs), first) if searchable(scheme) else first
