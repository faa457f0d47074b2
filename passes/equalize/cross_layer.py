"""Evens out the ranges of two layers that stand one behind the other, channel by channel.

Before:
    y = W2 relu(W1 x + b1)
After:
    y = (W2 S) relu(S^-1 W1 x + S^-1 b1),  s_i = sqrt(range(row i of W1) / range(column i of W2))
(Nagel et al., arXiv 1906.04721, equations 8 to 11), repeated until no s departs from 1: both ranges are then
sqrt(range1 range2). ReLU and LeakyReLU may stand between, or nothing; Conv (grouped too) and MatMul on both sides.
Keeps the graph when anything else stands between, when the value has other readers, when a weight is shared.
"""

from __future__ import annotations

import numpy as np

from kbitc.passes.equalize import Setting
from kbitc.passes.equalize._channels import division, input_peaks, maker, multiply, output_peaks, sites

#: Rounds over the model, and the departure from 1 below which a factor is left.
ROUNDS, CLOSE = 20, 0.01


def equalize(setting: Setting) -> int:
    """Apply it to the model of the setting, in place. Returns the number of pairs that were changed."""
    changed: set[str] = set()
    for _ in range(ROUNDS):
        moved = False
        for site in sites(setting.nodes()):
            first = maker(site.value)
            if first is None:
                continue
            before, behind = output_peaks(first), np.max([input_peaks(node) for node in site.readers], axis=0)
            usable = (before > 0) & (behind > 0)
            ratio = np.where(usable, before, 1) / np.where(usable, behind, 1)
            factors = np.sqrt(ratio).astype(np.float32)
            changes = division(site, factors) if np.abs(factors - 1).max() > CLOSE else None
            if changes is None:
                continue
            for change in changes:
                change()
            for node in site.readers:
                multiply(node, factors)
            changed.add(site.value.name or "")
            moved = True
        if not moved:
            break
    return len(changed)
