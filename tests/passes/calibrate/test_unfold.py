"""The rows of a contraction times its weight are its output."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from kbitc.graph import ops
from kbitc.graph.evaluate import evaluate
from kbitc.passes.calibrate.unfold import can_unfold, rows
from tests.support.onnx_text import model

EVERYTHING = 1 << 30


def conv(
    weight: npt.NDArray[np.float32], x: npt.NDArray[np.float32], attributes: str
) -> tuple[ir.Node, npt.NDArray[np.float32]]:
    """The Conv node of a model of one and its output, both from onnxruntime."""
    dims, out = ",".join(map(str, x.shape)), ",".join("abcd"[: x.ndim])
    made = model(f"g (float[{dims}] x) => (float[{out}] y) {{ y = Conv<{attributes}>(x, w) }}", {"w": weight})
    return made.graph[0], evaluate(made, {"x": x})["y"]


@pytest.mark.parametrize(
    ("shape", "size", "attributes"),
    [
        ((6, 4, 3, 3), (5, 7), "pads=[1,1,1,1]"),
        ((6, 4, 3, 2), (9, 8), "strides=[2,1], pads=[0,1,2,0]"),
        ((6, 2, 3, 3), (8, 8), "group=2, dilations=[2,1], pads=[2,1,2,1]"),
        ((4, 1, 5, 5), (6, 6), "group=4, pads=[2,2,2,2], strides=[2,2]"),
        ((3, 4, 1, 1), (2, 3), "group=1"),
        ((3, 4, 3), (7,), "pads=[1,0]"),
        ((3, 4, 2, 2), (4, 4), 'auto_pad="VALID"'),
    ],
)
def test_rows_of_a_convolution_times_its_weight(shape: tuple[int, ...], size: tuple[int, ...], attributes: str) -> None:
    rng = np.random.default_rng(0)
    weight = rng.integers(-3, 4, shape).astype(np.float32)
    group = 2 if "group=2" in attributes else 4 if "group=4" in attributes else 1
    x = rng.integers(-3, 4, (2, shape[1] * group, *size)).astype(np.float32)
    node, expected = conv(weight, x, attributes)
    found = rows(node, x, EVERYTHING)
    view = ops.to_view(weight, "conv").reshape(group, shape[0] // group, -1)
    product = found @ view.transpose(0, 2, 1)  # [G, rows, N / G]
    flat = product.transpose(1, 0, 2).reshape(-1, shape[0])
    np.testing.assert_array_equal(flat, np.moveaxis(expected, 1, -1).reshape(-1, shape[0]))


def test_rows_of_a_product_are_its_rows() -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    node = ir.node("MatMul", [ir.Value(name="x"), ir.Value(name="w")])
    np.testing.assert_array_equal(rows(node, x, EVERYTHING), x.reshape(1, 6, 4))
    np.testing.assert_array_equal(rows(node, x, 3), x.reshape(1, 6, 4)[:, [0, 2, 4]])


def test_the_limit_holds_and_reaches_every_image() -> None:
    x = np.zeros((3, 2, 8, 8), np.float32)
    x += np.arange(3, dtype=np.float32)[:, None, None, None]
    node, _ = conv(np.ones((1, 2, 1, 1), np.float32), x, "group=1")
    found = rows(node, x, 20)
    assert found.shape == (1, 20, 2)
    assert set(found.reshape(-1)) == {0.0, 1.0, 2.0}


def test_what_is_not_multiplied_has_no_rows() -> None:
    value = ir.Value(name="x")
    assert not can_unfold(ir.node("Gather", [value, value]))
    assert not can_unfold(ir.node("Conv", [value, value], attributes={"auto_pad": "SAME_UPPER"}))
    assert can_unfold(ir.node("MatMul", [value, value]))
