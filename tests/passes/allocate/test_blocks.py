"""Static graphs take integer block scales where rows are long, and stay with one scale a channel elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from kbitc import driver, options
from kbitc.passes.allocate import blocks
from kbitc.quant.plan import QuantPlan
from kbitc.quant.scheme import QuantScheme
from kbitc.targets.target import parse_target
from tests.support.onnx_text import model

GRAPH = """agraph (float[4, 256] x) => (float[4, 24] y) {
    a = MatMul(x, long)  b = Relu(a)  c = MatMul(b, short)  d = MatMul(c, even)  e = MatMul(d, none)  y = Relu(e) }"""
RNG = np.random.default_rng(0)
WEIGHTS = {
    "long": RNG.normal(size=(256, 32)) * np.exp(RNG.normal(size=(8, 32))).repeat(32, 0),
    "short": RNG.normal(size=(32, 24)),
    "even": RNG.choice([-7.0, 7.0], (24, 256)), "none": np.zeros((256, 24)),
}  # fmt: skip


def plan(**asked: object) -> QuantPlan:
    made = model(GRAPH, {name: array.astype(np.float32) for name, array in WEIGHTS.items()})
    chosen = options.from_arguments(**{"activations": "static", **asked})  # type: ignore[arg-type]
    return driver.make_plan(made, chosen, parse_target("reference"))[0]


def schemes(found: QuantPlan) -> dict[str, str]:
    return {entry.tensor: str(entry.scheme) for entry in found.entries}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_long_rows_get_blocks_and_the_reason_says_what_they_save(bits: int) -> None:
    """A row of one block gains nothing, nor one that a single scale holds exactly, nor zeros."""
    found = plan(bits=bits)
    assert schemes(found) == {
        "long": f"int{bits}:b32/i4", "short": f"int{bits}:c", "even": f"int{bits}:c", "none": f"int{bits}:c"
    }  # fmt: skip
    entry = found.entries[0]
    weight = WEIGHTS["long"].T.astype(np.float32).reshape(32, 1, 256)
    share = blocks.share_left(weight, QuantScheme.parse(f"int{bits}:c"), QuantScheme.parse(f"int{bits}:b32/i4"))
    assert (
        entry.reason
        == f"integer block scales: {-10 * np.log10(share):.1f} dB less error than one scale a channel leaves"
    )
    assert entry.activation == "uint8"


@pytest.mark.parametrize(
    "asked",
    [{"bits": 8}, {"bits": 5}, {"scheme": "int4:c"}, {"scheme": "int4:t"}, {"bits": 4, "activations": "dynamic"}],
)
def test_nothing_is_chosen_where_it_was_asked_for_or_blocks_have_no_room(asked: dict[str, object]) -> None:
    assert not any("/i4" in scheme for scheme in schemes(plan(**asked)).values())


def test_block_is_taken_as_it_is_given() -> None:
    assert schemes(plan(bits=4, block=64))["long"] == "int4:b64"
