"""From a quantized model to a compiled library: emit, schedule, relax passes, machine code, shared library."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from kbitc.targets.cpu.codegen import compile_kernels
from kbitc.targets.link import export_library, find_compiler
from kbitc.targets.lower.emitter import Lowered, Signature, check_lowerable, lower
from kbitc.targets.lower.shape_functions import sort_shape_functions
from kbitc.targets.lower.weight_checks import drop_weight_checks
from kbitc.targets.rules.base import schedule
from kbitc.targets.target import Target

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
class Built:
    """A compiled module.

    Attributes:
        library: bytes of the shared library.
        weights: arrays of main's parameters behind the inputs, in order.
        inputs, outputs: signature of main; debug outputs come last.
        layers: one dict of facts a contraction.
        kernels: (kernel, schedule rule) pairs.
        calls: one dict a kernel call: the layers it works for.
    """

    library: bytes
    weights: dict[str, npt.NDArray[Any]]
    inputs: tuple[Signature, ...]
    outputs: tuple[Signature, ...]
    layers: tuple[dict[str, Any], ...]
    kernels: tuple[tuple[str, str], ...]
    calls: tuple[dict[str, Any], ...] = ()


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
    lowered = lower(model, target, debug_accumulators=debug_accumulators)
    if dump is not None:
        dump("09-relax.py", lambda: str(lowered.module.script(show_meta=False)))
    module, kernels = schedule(lowered.module, target, target.schedule_rules())
    if dump is not None:
        dump("10-tir.py", lambda: str(module.script(show_meta=False)))
        dump("10-rules.txt", lambda: rules_text(lowered, kernels))
    library = compile_module(module, target, dump)
    return Built(
        library, lowered.weights, lowered.inputs, lowered.outputs, lowered.layers, tuple(kernels), lowered.calls
    )


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
            passes.StaticPlanBlockMemory(),
            passes.LowerAllocTensor(),
            passes.KillAfterLastUse(),
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
            return export_library(relax.build(module, tvm_target, relax_pipeline=relax_pipeline()), target)
    find_compiler(target.machine)
    code = compile_kernels(module, target, relax_pipeline(), IDLE_ON_CPU)
    if dump is not None:
        dump("11-source.s", code.assembly)
    with tempfile.TemporaryDirectory(prefix="kbitc-link-") as folder:
        return code.link(Path(folder))


__all__ = ["Built", "Signature", "build", "check_lowerable", "compile_module", "relax_pipeline", "rules_text"]
