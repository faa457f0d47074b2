"""Brings the channels of a normalization nearer to one another in front of products, for codes with one scale a tensor.

Before:
    y = x W,  x made by a LayerNormalization or RMSNormalization, and read by others too (a residual sum)
After:
    y = (x * 1/s) (s W),  s_j = max|x_j|^0.5 / max|W_j|^0.5, a product with a constant in front of W
(SmoothQuant, Xiao et al., arXiv 2211.10438, equation 4, where 1 / s has no place upstream. A few channels of BERT's
normalizations are ten times as large as the rest: Bondarenko et al., arXiv 2109.12948, section 3.) On integers the
product costs nothing: it is part of the multiplier, one a channel, that makes the codes.
Keeps the graph when there are no data, when x is made otherwise, when 1 / s has a place upstream (`smoothquant`), and
when the expected error of rounding x falls by less than a fifth.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kbitc.passes.equalize import Setting
from kbitc.passes.equalize._channels import input_peaks, insert_division, multiply, sites, weight_array

#: Migration strength.
ALPHA = 0.5
#: Share of the expected squared error that may be left.
WORTH = 0.8
_NORMS = ("LayerNormalization", "RMSNormalization")

FloatArray = npt.NDArray[np.float32]


def equalize(setting: Setting) -> int:
    """Apply it to the model of the setting, in place. Returns the number of activations that were changed."""
    changed = 0
    found = [site for site in sites(setting.nodes()) if site.last and not site.alone]
    found = [site for site in found if (maker := site.value.producer()) is not None and maker.op_type in _NORMS]
    for group in setting.groups(found):
        for site, inputs in group:
            peaks = inputs.peak.reshape(-1, site.channels).max(axis=0)
            weights = np.max([input_peaks(node) for node in site.readers], axis=0)
            usable = (peaks > 0) & (weights > 0)
            moved = np.where(usable, peaks, 1) ** ALPHA / np.where(usable, weights, 1) ** (1 - ALPHA)
            factors = np.where(usable, moved, 1).astype(np.float32)
            energy = np.sum([(weight_array(node) ** 2).sum(axis=1) for node in site.readers], axis=0)
            if rounding_error(peaks / factors, energy * factors**2) > WORTH * rounding_error(peaks, energy):
                continue
            insert_division(site, factors, list(setting.model.graph))
            for node in site.readers:
                multiply(node, factors)
            changed += 1
    return changed


def rounding_error(peaks: FloatArray, energy: FloatArray) -> float:
    """Expected squared error of x W by rounding x, up to a factor: step^2 times the squares that a channel meets."""
    return float(peaks.max(initial=0)) ** 2 * float(energy.sum())
