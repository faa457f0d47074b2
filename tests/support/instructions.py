"""Runs single vector instructions, each as a kernel of its own, natively or under qemu."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from kbitc.bundle.manifest import ValueInfo
from kbitc.targets import machine
from kbitc.targets.kernels import vector as v
from kbitc.targets.link import export_library
from kbitc.targets.runner.execute import run_library
from kbitc.targets.target import Target
from tests.support.kernels import QEMU_CPUS

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Instruction:
    """One use of an instruction: `emit` makes the expression from one vector a operand, `wanted` is its meaning."""

    name: str
    operands: Sequence[Array]
    emit: Callable[..., Any]
    wanted: Array


def kernel(instruction: Instruction) -> Any:
    """out = emit(operands): every operand is one vector."""

    def body() -> None:
        given = [v.argument(f"operand{i}", a.shape, str(a.dtype)) for i, a in enumerate(instruction.operands)]
        wanted = instruction.wanted
        out = v.argument("out", wanted.shape, str(wanted.dtype))
        with v.root():
            values = [v.bind(v.load(b, [0], a.size)) for b, a in zip(given, instruction.operands, strict=True)]
            v.store(out, [0], instruction.emit(*values), wanted.size)

    return v.kernel(instruction.name, body)


def run(instructions: Sequence[Instruction], target: Target) -> dict[str, Array]:
    """The results by name."""
    builder = relax.BlockBuilder()
    inputs: list[Any] = []
    feeds: list[Array] = []
    outputs = []
    with builder.function("main"):
        with builder.dataflow():
            for instruction in instructions:
                own = [
                    relax.Var(f"x{len(inputs) + i}", relax.TensorType(a.shape, str(a.dtype)))
                    for i, a in enumerate(instruction.operands)
                ]
                inputs += own
                feeds += instruction.operands
                function = builder.add_func(kernel(instruction).without_attr("global_symbol"), instruction.name)
                kind = relax.TensorType(instruction.wanted.shape, str(instruction.wanted.dtype))
                outputs.append(builder.emit(relax.op.call_tir(function, own, kind)))
            result = builder.emit_output(relax.Tuple(outputs))
        builder.emit_func_output(result, params=inputs)
    built = relax.build(builder.get(), tvm.target.Target(target.tvm))
    names = [instruction.name for instruction in instructions]
    if target.machine == machine.architecture():
        values = relax.VirtualMachine(built, tvm.cpu())["main"](*[tvm.runtime.tensor(a) for a in feeds])
        return {name: value.numpy() for name, value in zip(names, values, strict=True)}
    by_name = {f"x{i}": np.asarray(a) for i, a in enumerate(feeds)}
    described = [ValueInfo(name, str(a.dtype), a.shape) for name, a in by_name.items()]
    results = [ValueInfo(i.name, str(i.wanted.dtype), i.wanted.shape) for i in instructions]
    library = export_library(built, target)
    return run_library(target, library, {}, described, results, by_name, cpu=QEMU_CPUS[target.name]).outputs
