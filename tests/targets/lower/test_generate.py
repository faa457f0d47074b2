"""Operators that make values from shapes, where ends are symbolic."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc.errors import UnsupportedError
from tests.support.lowered import model_of, run_of


def anchors(step: str) -> str:
    """The grid of a detector: a Range over a size that was cast to float."""
    return f"""g (float[n, s] x) => (float[m] y)
        <int64[1] zero = {{0}}, float start = {{0}}, float step = {{{step}}}> {{
        shape = Shape<start = 1, end = 2>(x)
        size = Squeeze(shape, zero)
        wide = Cast<to = 1>(size)
        y = Range(start, wide, step)
    }}"""


@pytest.mark.parametrize("step", [1, 2])
def test_a_float_range_over_a_symbolic_size(step: int) -> None:
    runnable = run_of(model_of(anchors(str(step))))
    for size in (1, 6, 7):
        found = runnable({"x": np.zeros((1, size), np.float32)})[0]
        assert np.array_equal(found, np.arange(0, size, step, dtype=np.float32))


def test_a_range_of_fractions_over_a_symbolic_size_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Range with these ends"):
        run_of(model_of(anchors("0.5")))
