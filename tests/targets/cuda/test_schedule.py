"""TE groups with bound threads, on the emulated GPU: any size of the symbolic dimension, both thread orders."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from tests.targets.cuda.emulator.emulator import Emulator, launch

SIZES = (1, 7, 300)
COLUMNS = 100
# Sums of at most 300 * 100 terms, in any order.
TOLERANCE = 300 * 2.0**-23


def groups() -> dict[str, tuple[Any, str]]:
    """Prim funcs of x f32 [m, 100], by name, with their kind."""
    from tvm import te, tirx

    m = tirx.Var("m", "int64")
    x = te.placeholder((m, COLUMNS), "float32", name="x")
    k, r = te.reduce_axis((0, COLUMNS), "k"), te.reduce_axis((0, m), "r")
    k2, k3, r3 = te.reduce_axis((0, COLUMNS), "k2"), te.reduce_axis((0, COLUMNS), "k3"), te.reduce_axis((0, m), "r3")
    top = te.compute((m,), lambda i: te.max(x[i, k], axis=k), name="top")

    def shifted(i: Any, j: Any) -> Any:
        """exp with a Let and an fma inside, as the float functions of the emitter have them."""
        variable = tirx.Var("t", "float32")
        one = tirx.const(1.0, "float32")
        return tirx.Let(variable, x[i, j] - top[i], tirx.op.fma(variable, variable, one))

    total = te.compute((m,), lambda i: te.sum(shifted(i, k2), axis=k2), name="total")
    share = te.compute((m, COLUMNS), lambda i, j: shifted(i, j) / total[i], name="share")
    two = tirx.const(2.0, "float32")
    made = {
        "elementwise": (te.compute((m, COLUMNS), lambda i, j: x[i, j] * two, name="y"), "injective"),
        "transposed": (te.compute((COLUMNS, m), lambda i, j: x[j, i], name="y"), "injective"),
        "share": (share, "rows"),
        "columns": (te.compute((COLUMNS,), lambda j: te.sum(x[r, j], axis=r), name="y"), "reduce"),
        "all": (te.compute((), lambda: te.sum(x[r3, k3], axis=[r3, k3]), name="y"), "reduce"),
    }
    return {name: (te.create_prim_func([x, out], "int64"), kind) for name, (out, kind) in made.items()}


def check() -> list[str]:
    """In the emulator: what differs from numpy."""
    from kbitc.targets.cuda.rules.schedule import SCHEDULE_RULES
    from kbitc.targets.target import parse_target

    target = parse_target("cuda:sm_90")
    functions, rules = {}, {}
    for name, (function, kind) in groups().items():
        bare = function.with_attrs({"kbitc.kind": kind, "tirx.noalias": True}).without_attr("global_symbol")
        for rule in SCHEDULE_RULES:
            done = rule(bare, target)
            if done is not None:
                functions[name], rules[name] = done, rule.__name__
                break
    failures = [] if rules["share"] == "rows" and rules["columns"] == "whole_grid" else [f"rules {rules}"]
    rng = np.random.default_rng(0)
    for size in SIZES:
        x = rng.standard_normal((size, COLUMNS)).astype(np.float32)
        moved = (x - x.max(axis=1, keepdims=True)).astype(np.float64) ** 2 + 1
        right = {
            "elementwise": 2 * x, "transposed": x.T, "share": moved / moved.sum(axis=1, keepdims=True),
            "columns": x.astype(np.float64).sum(axis=0), "all": np.asarray(x.astype(np.float64).sum()),
        }  # fmt: skip
        scale = {name: np.abs(value).max() + (np.abs(x).sum() if name == "all" else 0) for name, value in right.items()}
        for order in ("forward", "backward"):
            os.environ["KBITC_EMULATOR_ORDER"] = order
            calls = [(name, [x, np.full(value.shape, np.nan, np.float32)]) for name, value in right.items()]
            for (name, _), got in zip(calls, launch(functions, calls, target.tvm), strict=True):
                if not (np.abs(got[1] - right[name]) <= TOLERANCE * scale[name]).all():
                    failures.append(f"{name} of {size} rows, {order}")
    return failures


def test_groups_are_right_for_every_size(emulator: Emulator) -> None:
    assert emulator.run(check) == []
