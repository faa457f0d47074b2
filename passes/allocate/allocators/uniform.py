"""The same width for every weight: the widest that fits. The baseline of the other allocators."""

from __future__ import annotations

from kbitc.passes.allocate.allocation import Allocate, Allocation, Sizes
from kbitc.passes.allocate.choices import Problem


def make(problem: Problem) -> Allocate:
    """Nothing is measured."""
    widths = [[_bits(choice.entry.scheme) for choice in layer.choices] for layer in problem.layers]

    def allocate(sizes: Sizes, limit: int) -> Allocation | None:
        for width in sorted({bits for row in widths for bits in row}, reverse=True):
            chosen = tuple(_at_most(row, width) for row in widths)
            size = sum(row[index] for row, index in zip(sizes, chosen, strict=True))
            if size <= limit:
                return Allocation(chosen, size)
        return None

    return allocate


def _bits(scheme: object) -> int:
    return int(getattr(scheme, "bits", 32))


def _at_most(widths: list[int], most: int) -> int:
    """Index of the widest choice of at most this width, else of the narrowest."""
    fitting = [index for index, bits in enumerate(widths) if bits <= most]
    return fitting[-1] if fitting else 0
