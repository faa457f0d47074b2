"""Schedules a TE group by the CPU rules, compiles it, runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import te

from kbitc.targets.cpu.rules.schedule import SCHEDULE_RULES
from kbitc.targets.target import Target, host_runs, parse_target

Array = npt.NDArray[Any]
NAMES = ("x86:avx2", "x86:avx512vnni", "arm-neon:dotprod")
TARGETS = [parse_target(name) for name in NAMES]
HERE = [target for target in TARGETS if host_runs(target) is None]
NEON = TARGETS[2]


class Scheduled:
    """A group under the first rule that takes it.

    Attributes:
        rule: name of that rule.
        function: what the rule made of it.
    """

    def __init__(self, inputs: Sequence[Any], outputs: Any, target: Target) -> None:
        many = outputs if isinstance(outputs, list) else [outputs]
        group = te.create_prim_func([*inputs, *many], "int64")
        for rule in SCHEDULE_RULES:
            function = rule(group, target)
            if function is not None:
                break
        self.rule, self.function = rule.__name__, function
        module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
        self.module = tvm.compile(module, target=tvm.target.Target(target.tvm))

    def __call__(self, arrays: Sequence[Array], *outputs: tuple[tuple[int, ...], str]) -> Any:
        """Run it; the result, or a list of several."""
        # What is not written must show.
        made = [tvm.runtime.tensor(np.full(shape, 77).astype(dtype)) for shape, dtype in outputs]
        self.module(*[tvm.runtime.tensor(array) for array in arrays], *made)
        results = [tensor.numpy() for tensor in made]
        return results[0] if len(results) == 1 else results

    def assembly(self) -> str:
        """Text of the machine code."""
        return str(self.module.mod.inspect_source("s"))
