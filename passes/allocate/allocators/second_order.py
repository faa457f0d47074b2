"""Least noise at the outputs, estimated to second order: mean Hessian trace times squared error of the weights.

HAWQ-V2 (arXiv 1911.03852, equation 6): Omega = sum over layers of Tr(H_i) / n_i * ||Q(W_i) - W_i||^2. The loss here is
the noise at the outputs themselves, ||f(W + d) - f(W)||^2 = d^T J^T J d + O(d^3), whose Hessian is 2 J^T J; its trace
is estimated as Hutchinson does, E[z^T H z] with random signs z, by running the model with W + step * z. Two runs a
layer instead of one for every width.
"""

from __future__ import annotations

import numpy as np

from kbitc.passes.allocate.allocation import Allocate, by_noise
from kbitc.passes.allocate.choices import Problem
from kbitc.passes.allocate.probe import Probe

PROBES = 2
# Of the weights' root mean square: small enough for the second order, large beside float32 rounding.
STEP = 2.0**-6


def make(problem: Problem) -> Allocate:
    """Estimate, then solve the knapsack for every limit that is asked."""
    return by_noise(problem, estimate(problem))


def estimate(problem: Problem) -> list[list[float]]:
    """Estimated noise to signal at the outputs, one row a layer, one number a choice."""
    probe = Probe(problem.model, {item.candidate.tensor: item.candidate.kind for item in problem.layers}, problem.feeds)
    random = np.random.default_rng(0)
    table = []
    for layer in problem.layers:
        weight, name = problem.weight(layer), layer.candidate.tensor
        step = np.float32(STEP * max(float(np.sqrt(np.mean(np.square(weight, dtype=np.float64)))), 1e-30))
        found = []
        for _ in range(PROBES):
            signs = random.integers(0, 2, weight.shape, dtype=np.int8).astype(np.float32) * 2 - 1
            found.append(probe.noise({name: weight + step * signs}))
        per_square = float(np.mean(found)) / (float(step) ** 2 * weight.size)
        row = []
        for choice in layer.choices:
            scheme = choice.entry.scheme
            error = weight - problem.quantize(weight, scheme).dequantize() if scheme is not None else np.zeros(1)
            row.append(per_square * float(np.square(error, dtype=np.float64).sum()))
        table.append(row)
    return table
