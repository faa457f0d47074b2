"""Moves the difficulty of activations with outlier channels into the weights.

Before:
    y = x W,  x made by a LayerNormalization, a Mul with a constant, or a contraction (with bias, ReLU)
After:
    y = (x / s) (s W),  s_j = max|x_j|^alpha / max|W_j|^(1 - alpha), alpha = 0.5, 1 / s taken into what makes x
(SmoothQuant, Xiao et al., arXiv 2211.10438, equation 4). For int8 activations with one scale a tensor or a row.
Keeps the graph when there are no data, when something else reads x, when 1 / s has nowhere to go, when W is shared.
"""

from __future__ import annotations

import numpy as np

from kbitc.passes.equalize import Setting
from kbitc.passes.equalize._channels import division, input_peaks, multiply, sites

#: Migration strength.
ALPHA = 0.5


def equalize(setting: Setting) -> int:
    """Apply it to the model of the setting, in place. Returns the number of activations that were changed."""
    changed = 0
    for group in setting.groups(sites(setting.nodes())):
        for site, inputs in group:
            peaks = inputs.peak.reshape(inputs.groups, -1, site.channels // inputs.groups).max(axis=1).reshape(-1)
            weights = np.max([input_peaks(node) for node in site.readers], axis=0)
            usable = (peaks > 0) & (weights > 0)
            moved = np.where(usable, peaks, 1) ** ALPHA / np.where(usable, weights, 1) ** (1 - ALPHA)
            factors = np.where(usable, moved, 1).astype(np.float32)
            changes = division(site, factors)
            if changes is None:
                continue
            for change in changes:
                change()
            for node in site.readers:
                multiply(node, factors)
            changed += 1
    return changed
