"""Compiles small ONNX models in this process and runs them, for tests of the lowering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir
import tvm
from tvm import relax

from kbitc.importer import load_model
from kbitc.passes.canonicalize import canonicalize
from kbitc.targets.build import relax_pipeline
from kbitc.targets.lower.emitter import Lowered, lower
from kbitc.targets.rules.base import schedule
from kbitc.targets.target import Target, parse_target

Array = npt.NDArray[Any]


@dataclass
class Runnable:
    """A model compiled just in time, and what the lowering said about it."""

    lowered: Lowered
    machine: Any

    def __call__(self, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs in the model's order, then the debug outputs."""
        given = [tvm.runtime.tensor(np.array(feeds[info.name], order="C")) for info in self.lowered.inputs]
        given += [tvm.runtime.tensor(np.array(array, order="C")) for array in self.lowered.weights.values()]
        results = self.machine["main"](*given)
        return [value.numpy() for value in ([results] if isinstance(results, tvm.runtime.Tensor) else results)]

    def kernels(self) -> list[str]:
        """Names of the module's kernels."""
        functions = self.lowered.module.functions.items()
        return sorted(str(var.name_hint) for var, function in functions if not isinstance(function, relax.Function))


def model_of(text: str, opset: int = 21) -> ir.Model:
    """A canonical model from the body of an ONNX graph in text form."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    return canonicalize(load_model(proto))


def run_of(model: ir.Model, target: Target | None = None, **options: Any) -> Runnable:
    """Lower, schedule and compile a model for this process (without a shared library)."""
    target = target or parse_target("reference")
    lowered = lower(model, target, **options)
    module, _ = schedule(lowered.module, target, target.schedule_rules())
    tvm_target = tvm.target.Target(target.tvm)
    with tvm_target:
        executable = relax.build(module, tvm_target, relax_pipeline=relax_pipeline())
    return Runnable(lowered, relax.VirtualMachine(executable, tvm.cpu()))
