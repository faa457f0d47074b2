"""Checks at the start of a run: those of weights go, those of inputs stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from kbitc.targets.build import relax_pipeline
from kbitc.targets.lower.emitter import lower
from kbitc.targets.lower.weight_checks import CHECKS
from kbitc.targets.rules.base import schedule
from kbitc.targets.target import parse_target
from tests.support.lowered import model_of, run_of

# The constant is larger than those that a module holds itself.
GRAPH = "g (float[n, 64] x) => (float[n, 64] y) <float[64, 64] w = {%s}> { y = MatMul(x, w) }"
NUMBERS = ", ".join(str(number) for number in np.random.default_rng(0).standard_normal(64 * 64).round(3))


def checked(main: Any) -> list[str]:
    """The parameters that main checks, in order."""
    found = []
    for block in main.body.blocks:
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, relax.Call) and getattr(call.op, "global_symbol", "") in CHECKS:
                found += [str(param.name) for param in main.params if call.args[0].same_as(param)]
    return found


def test_only_inputs_are_checked() -> None:
    target = parse_target("reference")
    lowered = lower(model_of(GRAPH % NUMBERS), target)
    module, _ = schedule(lowered.module, target, target.schedule_rules())
    with tvm.target.Target(target.tvm):
        main = relax_pipeline()(module)["main"]
    assert len(main.params) == 2
    assert checked(main) == ["input_0"] * len(CHECKS)


def test_an_input_of_the_wrong_shape_is_refused() -> None:
    runnable = run_of(model_of(GRAPH % NUMBERS))
    assert runnable({"x": np.ones((3, 64), np.float32)})[0].shape == (3, 64)
    with pytest.raises(Exception, match="(?i)shape|match|check"):
        runnable({"x": np.ones((3, 65), np.float32)})
