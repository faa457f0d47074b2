"""The fallback: the loops as they are, the outermost in parallel where it is a spatial axis."""

from __future__ import annotations

from typing import Any

from tvm import IRModule, s_tir

from kbitc.targets.cpu.rules import nest
from kbitc.targets.cpu.rules.stages import read_group
from kbitc.targets.kernels.lets import lower_lets
from kbitc.targets.target import Target

PrimFunc = Any


def plain_loops(function: PrimFunc, target: Target) -> PrimFunc | None:
    """Takes every group. Blocks are lowered, so that names that stand for large trees can become buffers."""
    passes = s_tir.transform
    module = IRModule({"main": _outer_parallel(function)})
    for step in (
        passes.LowerInitBlock(),
        passes.PlanAndUpdateBufferAllocationLocation(),
        passes.ConvertBlocksToOpaque(),
        passes.LowerOpaqueBlock(),
    ):
        module = step(module)
    return lower_lets(module["main"])


def _outer_parallel(function: PrimFunc) -> PrimFunc:
    """The function with the outer spatial loops of its only stage joined and in parallel, if that is much work."""
    group = read_group(function)
    if group is None or len(group.stages) != 1 or not group.stages[0].axes:
        return function
    stage = group.stages[0]
    work = nest.as_int(nest.product([axis.extent for axis in (*stage.axes, *stage.over)]))
    if work is not None and work < nest.PARALLEL_WORK:
        return function
    schedule = s_tir.Schedule(IRModule({"main": function.with_attr("global_symbol", "main")}))
    loops = schedule.get_loops(schedule.get_child_blocks(schedule.get_sblock("root"))[0])[: len(stage.axes)]
    schedule.parallel(schedule.fuse(*loops) if len(loops) > 1 else loops[0])
    return schedule.mod["main"]
