"""Least noise at the outputs, measured: each weight alone at each width, all others float.

Noise of different layers is taken to be independent, so that the powers add up (ZeroQ, arXiv 2001.00281, section 3.2,
which adds sensitivities in the same way).
"""

from __future__ import annotations

from kbitc.passes.allocate.allocation import Allocate, by_noise
from kbitc.passes.allocate.choices import Problem
from kbitc.passes.allocate.probe import Probe


def make(problem: Problem) -> Allocate:
    """Measure, then solve the knapsack for every limit that is asked."""
    return by_noise(problem, measure(problem))


def measure(problem: Problem) -> list[list[float]]:
    """Noise to signal at the outputs, one row a layer, one number a choice."""
    probe = Probe(problem.model, {item.candidate.tensor: item.candidate.kind for item in problem.layers}, problem.feeds)
    table = []
    for layer in problem.layers:
        weight, name = problem.weight(layer), layer.candidate.tensor
        row = []
        for choice in layer.choices:
            scheme = choice.entry.scheme
            changed = weight if scheme is None else problem.quantize(weight, scheme).dequantize()
            row.append(probe.noise({name: changed}))
        table.append(row)
    return table
