"""Launches for kernels that arrive as plain TE loops: elementwise groups, reductions, rows, float products.

Every rule takes a prim func and the target and returns it with threads bound, or None when it is not its case.
`whole_grid`, the last, takes everything: each block of the function becomes one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
import tvm_ffi
from tvm import ir, s_tir, tirx
from tvm.s_tir import dlight

from kbitc.targets.kernels.lets import flatten_lets
from kbitc.targets.rules.base import kind_of
from kbitc.targets.target import Target

PrimFunc = Any
Schedule = Any
Block = Any
Loop = Any
THREADS = 256
WARP = 32
# Reductions shorter than this are summed by one thread.
SHORT_REDUCTION = 64
# With this many results there are enough threads to give each a whole reduction that does not run along memory.
MANY_RESULTS = 1 << 16
# Longest row (elements) that a row kernel may keep in shared memory.
LONGEST_ROW = 8192
FUSED = {"float32": "__fmaf_rn", "float64": "__fma_rn"}
# The schedule machinery signals "not my case" in many ways.
NOT_MINE = (s_tir.ScheduleError, ValueError, AssertionError, LookupError, RuntimeError, TypeError, AttributeError)


def _with_dlight(func: PrimFunc, target: Target, rule: Any) -> PrimFunc | None:
    """Apply one of TVM's own GPU rules; None when it declines."""
    tvm_target = tvm.target.Target(target.tvm)
    try:
        with tvm_target:
            space = rule.apply(func, tvm_target, False)
    except NOT_MINE:
        return None
    if space is None:
        return None
    schedule = space[0] if isinstance(space, list) else space
    return _for_cuda(schedule.mod["main"]) if _is_bound(schedule) else None


def _for_cuda(func: PrimFunc) -> PrimFunc:
    """The function as TVM's CUDA code generator takes it.

    A fused multiply-add becomes the CUDA function: the generator does not know the operator, and an external call is
    not made a vector operation either.
    """

    def replace(call: Any) -> Any:
        name = FUSED.get(str(call.ty.dtype)) if isinstance(call.op, ir.Op) and call.op.name == "tirx.fma" else None
        return call if name is None else tirx.call_pure_extern(str(call.ty.dtype), name, *call.args)

    flat = flatten_lets(func)
    rules = [(ir.Call, replace), (tirx.BufferStore, _reduction_outside)]
    return flat.with_body(tvm_ffi.structural_map(flat.body, rules, order="post"))


def _reduction_outside(store: Any) -> Any:
    """Let t = v in (sum + f(t)) -> sum + (Let t = v in f(t)), where sum is what is stored: a reduction must be seen."""
    bindings, value = [], store.value
    while isinstance(value, tirx.Let):
        bindings.append((value.var, value.value))
        value = value.body
    if not bindings or not isinstance(value, tirx.Add | tirx.Mul | tirx.Max | tirx.Min):
        return store
    kept, other = value.a, value.b
    if not (isinstance(kept, ir.TensorLoad) and kept.source.same_as(store.buffer)):
        return store
    for variable, bound in reversed(bindings):
        other = tirx.Let(variable, bound, other)
    return tirx.BufferStore(store.buffer, type(value)(kept, other), store.indices)


def rows(func: PrimFunc, target: Target) -> PrimFunc | None:
    """Softmax, normalisations: a thread block a row, intermediate rows in shared memory (dlight GeneralReduction)."""
    if kind_of(func) != "rows" or not _static_rows(func):
        return None
    return _with_dlight(func, target, dlight.gpu.GeneralReduction())


def _static_rows(func: PrimFunc) -> bool:
    """Whether every reduction has a known length that fits shared memory."""
    schedule = s_tir.Schedule(_fresh(func))
    for block in _blocks(schedule):
        length = 1
        for extent in _extents(schedule, block, reduction=True):
            if not isinstance(extent, tirx.IntImm):
                return False
            length *= int(extent)
        if length > LONGEST_ROW:
            return False
    return True


def whole_grid(func: PrimFunc, target: Target) -> PrimFunc:
    """One launch for every block: a thread for an element, or a warp-wide tree for a long reduction."""
    schedule = s_tir.Schedule(_fresh(func))
    for block in _blocks(schedule):
        _bind_block(schedule, block)
    return _for_cuda(schedule.mod["main"])


def _fresh(func: PrimFunc) -> PrimFunc:
    """Schedules must not share a function."""
    return s_tir.renew_defs(func)


def _blocks(schedule: Schedule) -> list[Block]:
    """Leaf blocks in order of execution."""
    root = schedule.get_sblock("root")
    return list(schedule.get_child_blocks(root))


def _kinds(schedule: Schedule, block: Block) -> list[int]:
    return [int(var.iter_type) for var in schedule.get(block).iter_vars]


def _extents(schedule: Schedule, block: Block, *, reduction: bool) -> list[Any]:
    wanted = tirx.IterVar.CommReduce if reduction else tirx.IterVar.DataPar
    return [var.dom.extent for var in schedule.get(block).iter_vars if int(var.iter_type) == wanted]


def _is_bound(schedule: Schedule) -> bool:
    """Whether every block runs in threads."""
    for block in _blocks(schedule):
        loops = schedule.get_loops(block)
        if not any(schedule.get(loop).thread_binding is not None for loop in loops):
            return False
    return True


def _bind_block(schedule: Schedule, block: Block) -> None:
    """Bind the loops of one block."""
    loops = schedule.get_loops(block)
    kinds = _kinds(schedule, block)
    if len(kinds) != len(loops) or any(kind not in (tirx.IterVar.DataPar, tirx.IterVar.CommReduce) for kind in kinds):
        _one_thread(schedule, block)
        return
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == tirx.IterVar.DataPar]
    summed = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == tirx.IterVar.CommReduce]
    if not spatial:
        spatial = [schedule.add_unit_loop(block if not loops else loops[0])]
    schedule.reorder(*spatial, *summed)
    fused = schedule.fuse(*spatial) if len(spatial) > 1 else spatial[0]
    if summed and _worth_a_warp(schedule, block):
        _warp_reduction(schedule, fused, summed)
        return
    outer, inner = schedule.split(fused, factors=[None, THREADS])
    schedule.bind(outer, "blockIdx.x")
    schedule.bind(inner, "threadIdx.x")
    if summed:
        schedule.decompose_reduction(block, summed[0])


def _worth_a_warp(schedule: Schedule, block: Block) -> bool:
    """A long reduction with few results; a symbolic one counts as long, a symbolic number of results as few."""
    length = _product(_extents(schedule, block, reduction=True))
    results = _product(_extents(schedule, block, reduction=False))
    long = length is None or length >= SHORT_REDUCTION
    return long and (results is None or results < MANY_RESULTS)


def _product(extents: list[Any]) -> int | None:
    total = 1
    for extent in extents:
        if not isinstance(extent, tirx.IntImm):
            return None
        total *= int(extent)
    return total


def _warp_reduction(schedule: Schedule, fused: Loop, summed: list[Loop]) -> None:
    """A warp for each result: lanes take every 32nd term, then a tree over the lanes."""
    schedule.bind(fused, "blockIdx.x")
    whole = schedule.fuse(*summed) if len(summed) > 1 else summed[0]
    _, lanes = schedule.split(whole, factors=[None, WARP])
    schedule.bind(lanes, "threadIdx.x")


def _one_thread(schedule: Schedule, block: Block) -> None:
    """Loops that depend on each other (scans, opaque blocks) run in one thread."""
    loops = schedule.get_loops(block)
    outer = schedule.add_unit_loop(loops[0] if loops else block)
    grid, thread = schedule.split(outer, factors=[1, 1])
    schedule.bind(grid, "blockIdx.x")
    schedule.bind(thread, "threadIdx.x")


SCHEDULE_RULES: list[Callable[[PrimFunc, Target], PrimFunc | None]] = [rows, whole_grid]
