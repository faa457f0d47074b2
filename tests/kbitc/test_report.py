"""What the report says a weight takes is what is stored."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc.passes.solvers.rtn import solve
from kbitc.quant.plan import INT8, PlanEntry
from kbitc.quant.scheme import QuantScheme
from kbitc.report import weight_report, with_packed_sizes


@pytest.mark.parametrize(
    ("text", "in_file", "scale_dtype", "in_bundle"),
    [
        ("int4:b32", 4 + 16 / 32, np.float16, 4 + 16 / 32),
        ("int4:b32/i4", 4 + 4 / 32 + 16 / 128, np.float16, 4 + 16 / 32),
        ("int4:b32/i4:f32", 4 + 4 / 32 + 32 / 128, np.float32, 4 + 32 / 32),
        ("nf4:b64:dq8", 4 + 8 / 64 + 32 / (64 * 128), np.float16, 4 + 16 / 64),
        ("uint3:b32:min", 3 + (16 + 16) / 32, np.float16, 3 + (16 + 16) / 32),
        ("uint3:b32:zp:dq8", 3 + (8 + 3) / 32 + 32 / (64 * 128), np.float16, 3 + (16 + 3) / 32),
    ],
)
def test_scales_that_a_bundle_holds_decoded_are_counted_so(
    text: str, in_file: float, scale_dtype: type, in_bundle: float
) -> None:
    scheme = QuantScheme.parse(text)
    weight = np.random.default_rng(0).normal(size=(64, 1, 128)).astype(np.float32)
    tensor = solve(weight, scheme)
    entry = PlanEntry("w", ("node",), "MatMul", tensor.shape, scheme, INT8, "asked for")
    report = weight_report(entry, weight, tensor)
    assert report.bits_per_weight == pytest.approx(in_file, abs=1e-9)
    stored = {"node.codes": np.zeros(5000, np.uint8), "node.scales": tensor.scales.astype(scale_dtype)}
    (bundled,) = with_packed_sizes([report], stored)
    assert bundled.packed_bytes == 5000
    assert bundled.bits_per_weight == pytest.approx(in_bundle, abs=1e-9)


def test_integer_block_scales_that_a_bundle_holds_as_bytes_are_counted_so() -> None:
    scheme = QuantScheme.parse("int4:b32/i4")
    weight = np.random.default_rng(0).normal(size=(64, 1, 128)).astype(np.float32)
    entry = PlanEntry("w", ("node",), "MatMul", (64, 1, 128), scheme, INT8, "asked for")
    stored = {
        "node.codes": np.zeros(5000, np.uint8),
        "node.scales": np.zeros((4, 1, 1, 16), np.float16),
        "node.factors": np.zeros((4, 1, 4, 16), np.uint8),
    }
    (bundled,) = with_packed_sizes([weight_report(entry, weight, solve(weight, scheme))], stored)
    assert bundled.bits_per_weight == pytest.approx(4 + 8 / 32 + 16 / 128, abs=1e-9)
