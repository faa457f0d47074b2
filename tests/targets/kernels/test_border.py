"""Images with a border, of codes and of floats, as an image and as a line, with sizes known late."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from kbitc.targets.kernels.border import BorderSpec, make_border
from kbitc.targets.target import parse_target

SLACK, UNTOUCHED = 7, 99
PADS = [(0, 0, 0, 0), (1, 2, 0, 3), (2, 1, 3, 0)]


@pytest.mark.parametrize("channels", [1, 3, 17])
@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize(("dtype", "fill", "slack"), [("uint8", 113, SLACK), ("uint8", 3, 0), ("float32", 0.0, None)])
def test_it_is_the_image_padded(dtype: str, fill: float, slack: int | None, symbolic: bool, channels: int) -> None:
    target = parse_target("x86:avx2")
    sizes = (2, 5, 9)
    lead = tuple(tvm.tirx.Var(name, "int64") for name in "bhw") if symbolic else sizes
    functions = {
        f"border{i}": make_border(BorderSpec(lead, channels, pads, dtype, fill, slack), "border")
        for i, pads in enumerate(PADS)
    }
    functions = {name: function.with_attr("global_symbol", name) for name, function in functions.items()}
    library = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(target.tvm))
    image = np.random.default_rng(0).integers(0, 256, (*sizes, channels)).astype(dtype)
    for i, (top, left, bottom, right) in enumerate(PADS):
        wanted = np.pad(image, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=fill)
        flat = np.append(wanted.reshape(-1), np.full(slack or 0, UNTOUCHED, dtype))
        out = tvm.runtime.tensor(np.full(wanted.shape if slack is None else flat.shape, UNTOUCHED, dtype))
        library[f"border{i}"](tvm.runtime.tensor(image), out)
        np.testing.assert_array_equal(out.numpy().reshape(-1), flat)
