"""Scales up the input channels whose activations are large, so that their weights are rounded more finely.

Before:
    y = x W
After:
    y = (x / s) Q(s W),  s = mean|x|^alpha (geometric middle 1), alpha from 0 to 1 with the least output error
(AWQ, Lin et al., arXiv 2306.00978, equations 4 and 5). The error is that of round to nearest in the scheme of the plan,
E |x (W - Q(s W) / s)|^2 from the second moments of x, summed over all weights that read x. 1 / s goes into what makes x
(LayerNormalization, constant Mul, a contraction with bias and ReLU); a multiplication is inserted only where the error
falls to WORTH of what it was.
Keeps the graph when there are no data, when a weight is shared or belongs to a grouped convolution, when alpha = 0 is
best.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph import ops
from kbitc.passes.equalize import Setting
from kbitc.passes.equalize._channels import Site, division, insert_division, multiply, sites
from kbitc.passes.solvers import rtn
from kbitc.quant.moments import InputMoments

FloatArray = npt.NDArray[np.float32]
#: Exponents tried.
ALPHAS = tuple(np.linspace(0, 1, 11))
#: Share of the error that must be left at most for an inserted multiplication to pay, and for any change at all.
WORTH, ANY = 0.8, 0.98


def equalize(setting: Setting) -> int:
    """Apply it to the model of the setting, in place. Returns the number of activations that were changed."""
    changed = 0
    found = [site for site in sites(setting.nodes()) if all(_whole(node) for node in site.readers)]
    for group in setting.groups(found):
        for site, inputs in group:
            factors, share = best_factors(site, inputs, setting)
            changes = division(site, factors) if share < ANY else None
            if changes is None and share >= WORTH:
                continue
            if changes is None:
                insert_division(site, factors, list(setting.model.graph))
            for change in changes or ():
                change()
            for node in site.readers:
                multiply(node, factors)
            changed += 1
    return changed


def _whole(node: ir.Node) -> bool:
    return node.op_type == "MatMul" or ops.conv_group(node) == 1


def _weight(node: ir.Node) -> str:
    value = node.inputs[1]
    return (value.name if value is not None else None) or ""


def best_factors(site: Site, inputs: InputMoments, setting: Setting) -> tuple[FloatArray, float]:
    """The factors f32 [C] with the least error, and that error over the error without factors."""
    size = inputs.mean_abs.reshape(-1, site.channels).mean(axis=0).astype(np.float64)
    size = np.maximum(size, max(float(size.max()), 1e-30) * 1e-4)
    weights = [(setting.view(name), setting.schemes[name]) for name in (_weight(node) for node in site.readers)]
    best, least, plain = np.ones(site.channels, np.float32), np.inf, 0.0
    for alpha in ALPHAS:
        factors = size**alpha
        factors = (factors / np.sqrt(factors.max() * factors.min())).astype(np.float32)
        error = 0.0
        for weight, scheme in weights:
            back = np.asarray(rtn.solve(weight * factors, scheme).dequantize() / factors, np.float32)
            error += float(inputs.output_power(weight - back).sum())
        plain = error if alpha == 0 else plain
        if error < least:
            best, least = factors, error
    return best, least / plain if plain > 0 else 1.0
