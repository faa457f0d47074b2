"""From a quantized model to a compiled library: emit, schedule, relax passes, machine code, shared library."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.bundle.writer import Compiled
from kbitc.errors import UnsupportedError
from kbitc.targets.cpu.codegen import compile_kernels
from kbitc.targets.link import export_library, find_compiler
from kbitc.targets.lower.emitter import Lowered, Signature, check_lowerable, lower
from kbitc.targets.lower.shape_functions import sort_shape_functions
from kbitc.targets.lower.weight_checks import drop_weight_checks
from kbitc.targets.memory.plan_memory import plan_memory
from kbitc.targets.rules.base import schedule
from kbitc.targets.target import Target

#: In what TVM says when its analysis of flat indices over open sizes has no answer.
UNPROVED = "CanProveDivisible"

# Passes of TVM's pipeline for GPUs and for blocks: CPU kernels reach it without either, and their time, which grows
# with the nesting of symbolic indices, is up to half of a compilation. MiniLM has the same library bytes without them.
IDLE_ON_CPU = [
    "s_tir.CompactBufferAllocation",
    "s_tir.InjectPermutedLayout",
    "s_tir.InjectVirtualThread",
    "s_tir.HoistIfThenElse",
    "s_tir.RenormalizeSplitPattern",
]
# (file name, what makes its text): the text is made only where somebody wants it.
Dump = Callable[[str, Callable[[], str]], None]


@dataclass(frozen=True)
class Built(Compiled):
    """A compiled module and what is known of it.

    Attributes:
        inputs, outputs: signature of main; debug outputs come last.
        layers: one dict of facts a contraction.
        kernels: (kernel, schedule rule) pairs.
        calls: one dict a kernel call: the layers it works for.
    """

    inputs: tuple[Signature, ...]
    outputs: tuple[Signature, ...]
    layers: tuple[dict[str, Any], ...]
    kernels: tuple[tuple[str, str], ...]
    calls: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Scheduled:
    """What is compiled for a target: the lowered model, its module with schedules, and (kernel, rule) pairs."""

    target: Target
    lowered: Lowered
    module: Any
    kernels: tuple[tuple[str, str], ...]
    dump: Dump | None


def build(
    model: ir.Model,
    target: Target,
    *,
    debug_accumulators: bool = False,
    dump: Dump | None = None,
) -> Built:
    """Compile a model for a target. Same model, target and versions: the same bytes.

    Args:
        model: canonical graph, float or quantized (the graph says which); not changed.
        target: what to compile for.
        debug_accumulators: integer contractions also output their accumulators and codes.
        dump: called with (file name, function that makes its text) for 09-relax.py, 10-tir.py, 10-rules.txt and
            11-source.s or 11-source.cu.

    Raises:
        UnsupportedError: names every node that cannot be compiled.
        ResourceError: a cross compiler or toolkit is missing.
    """
    return build_all(model, (target,), debug_accumulators=debug_accumulators, dump=dump)[0]


def build_all(
    model: ir.Model,
    targets: Sequence[Target],
    *,
    debug_accumulators: bool = False,
    dump: Dump | None = None,
) -> tuple[Built, ...]:
    """Compile a model for several targets of which the first runs wherever another does; arguments as for `build`.

    Weights that are equal for several targets are one array. Where a target has the kernels of an earlier one, it gets
    that one's library. Machine code is made in threads: TVM lets go of Python's lock meanwhile.
    """
    weights: dict[str, list[npt.NDArray[Any]]] = {}
    made: list[Scheduled] = []
    for target in targets:
        named = dump if dump is None or len(targets) == 1 else partial(_dump_variant, dump, target.variant)
        item = _scheduled(model, target, debug_accumulators, named)
        stored = {name: _once(weights.setdefault(name, []), array) for name, array in item.lowered.weights.items()}
        made.append(replace(item, lowered=replace(item.lowered, weights=stored)))
    libraries = _libraries(made)
    return tuple(
        Built(
            item.target, library, item.lowered.weights, item.lowered.inputs, item.lowered.outputs,
            item.lowered.layers, item.kernels, item.lowered.calls,
        )
        for item, library in zip(made, libraries, strict=True)
    )  # fmt: skip


def _dump_variant(dump: Dump, variant: str, name: str, text: Callable[[], str]) -> None:
    path = PurePath(name)
    dump(f"{path.stem}.{variant}{path.suffix}", text)


def _once(known: list[npt.NDArray[Any]], array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The known array of the same bytes and shape, or this one, which is known from now on."""
    for other in known:
        same = (other.dtype, other.shape) == (array.dtype, array.shape)
        if same and np.array_equal(_raw(other), _raw(array)):
            return other
    known.append(array)
    return array


def _raw(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _scheduled(model: ir.Model, target: Target, debug_accumulators: bool, dump: Dump | None) -> Scheduled:
    lowered = lower(model, target, debug_accumulators=debug_accumulators)
    if dump is not None:
        dump("09-relax.py", lambda: str(lowered.module.script(show_meta=False)))
    module, kernels = schedule(lowered.module, target, target.schedule_rules())
    if dump is not None:
        dump("10-tir.py", lambda: str(module.script(show_meta=False)))
        dump("10-rules.txt", lambda: rules_text(lowered, kernels))
    return Scheduled(target, lowered, module, tuple(kernels), dump)


def _libraries(made: Sequence[Scheduled]) -> list[bytes]:
    """One library an item; items with equal modules share the first one's."""
    import tvm_ffi

    firsts = [
        next(i for i, other in enumerate(made) if other is item or tvm_ffi.structural_equal(other.module, item.module))
        for item in made
    ]

    def compiled(index: int) -> bytes:
        return compile_module(made[index].module, made[index].target, made[index].dump)

    distinct = sorted(set(firsts))
    if len(distinct) == 1:
        return [compiled(0)] * len(made)
    with ThreadPoolExecutor(min(len(distinct), os.cpu_count() or 1)) as pool:
        libraries = dict(zip(distinct, pool.map(compiled, distinct), strict=True))
    return [libraries[first] for first in firsts]


def rules_text(lowered: Lowered, kernels: list[tuple[str, str]]) -> str:
    """Which rule took every contraction and kernel, and why others declined, for a person to read."""
    out = io.StringIO()
    for layer in lowered.layers:
        print(f"{layer['name']} ({layer['operator']}, {layer['kind']}): {layer['rule']}", file=out)
        print(f"    weight {layer['weight']} {layer['weight_shape']}, activation {layer['activation']}", file=out)
        print(f"    x {layer['x_shape']} -> {layer['out_shape']}", file=out)
        for item in layer["declined"]:
            print(f"    declined by {item['rule']}: {item['reason']}", file=out)
    print("\nschedules:", file=out)
    for kernel, rule in kernels:
        print(f"    {kernel}: {rule}", file=out)
    return out.getvalue()


def relax_pipeline() -> Any:
    """The relax passes between emission and machine code. The emitter makes only call_tir, reshape and match_cast."""
    from tvm import relax, transform

    passes = relax.transform
    return transform.Sequential(
        [
            passes.ToNonDataflow(),
            passes.RemovePurityChecking(),
            passes.CallTIRRewrite(),
            transform.module_pass(lambda module, _: plan_memory(module), opt_level=0, name="PlanMemory"),
            passes.LowerRuntimeBuiltin(),
            passes.ComputePrimValue(),
            passes.VMShapeLower(),
            transform.module_pass(lambda module, _: drop_weight_checks(module), opt_level=0, name="DropWeightChecks"),
            transform.module_pass(lambda module, _: sort_shape_functions(module), opt_level=0, name="SortShapes"),
            passes.AttachGlobalSymbol(),
        ]
    )


def compile_module(module: Any, target: Target, dump: Dump | None = None) -> bytes:
    """Compile a scheduled relax module into the bytes of a shared library.

    Args:
        module: tvm IRModule with main and its kernels.
        target: what to compile for.
        dump: as in `build`.

    Raises:
        ResourceError: no linker, or for cuda no compiler of kernels.
        UnsupportedError: for cuda, open sizes that TVM's analysis of memory gives up on.
    """
    if target.device != "cuda":
        return _compiled(module, target, dump)
    from kbitc.targets.cuda.compile import machine_code

    with machine_code(target.arch) as compilation:
        library = _compiled(module, target, None)
    if dump is not None:
        dump("11-source.cu", lambda: "\n".join(compilation.sources))
    return library


def _compiled(module: Any, target: Target, dump: Dump | None) -> bytes:
    import tvm
    from tvm import relax

    if target.device != "cpu":
        tvm_target = tvm.target.Target(target.tvm)
        with tvm_target:
            try:
                built = relax.build(module, tvm_target, relax_pipeline=relax_pipeline())
            except tvm.error.InternalError as error:
                if UNPROVED not in str(error):
                    raise
                raise UnsupportedError(
                    "TVM cannot prove how far a kernel reads where sizes are open",
                    where=str(target),
                    remedy="fix the sizes of the inputs with --shape",
                ) from error
        return export_library(built, target)
    find_compiler(target.machine)
    code = compile_kernels(module, target, relax_pipeline(), IDLE_ON_CPU)
    if dump is not None:
        dump("11-source.s", code.assembly)
    with tempfile.TemporaryDirectory(prefix="kbitc-link-") as folder:
        return code.link(Path(folder))


__all__ = [
    "Built",
    "Signature",
    "build",
    "build_all",
    "check_lowerable",
    "compile_module",
    "relax_pipeline",
    "rules_text",
]
