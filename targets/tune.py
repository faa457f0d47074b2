"""The search of `kbitc tune`: the schedules of products, measured on this machine against the usual one.

All candidates of a product run in turn in every round. What is fastest in the median of the ratios within a round is
measured twice more against the usual schedule alone, once behind it and once before it, and kept only when it is ahead
in both: the best of many measurements is too good by chance, and what runs behind its like finds its code in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from statistics import median
from typing import Any

from kbitc.errors import KbitcError
from kbitc.quant.packing import LANES
from kbitc.quant.tensor import QTensor
from kbitc.targets import machine
from kbitc.targets.cpu.rules.integer import usual_tile
from kbitc.targets.kernels.ftile import MOST_ROWS, registers_of
from kbitc.targets.kernels.isa import isa_of
from kbitc.targets.lower.contraction import Contraction
from kbitc.targets.target import Target
from kbitc.targets.trial import Trial, build_trials, from_facts, time_trials
from kbitc.targets.tuning import Entry, Schedule, shape_class, weight_text

CODES = "code_product"
INTEGER, FLOATS = ("integer_product", "weight_only_product", CODES), ("float_product", "unpacked_conv")
MOST_TILES, MOST_FEW = 4, 8
UNROLLS = (1, 2, 4, 8)
USUAL = "usual"
# Runs before the others in every round and does not count: what comes first finds the weight in no cache.
FIRST = "first"
FOUND = "found"
# A schedule has to be so much faster, in the search and in both measurements after it, to be kept.
GAIN = 1.03
MOST_ROUNDS, LEAST_ROUNDS = 60, 12
SECONDS_A_SEARCH = 3.0

Timer = Callable[[Sequence[Trial], Target], Mapping[str, Sequence[float]]]


def usual_schedule(rule: str, target: Target, contraction: Contraction) -> Schedule:
    """What a rule does when nothing was found."""
    if rule in FLOATS:
        registers = registers_of(target)
        return Schedule(*registers.shape(_tiles(contraction)), registers.few_tiles)
    if rule == CODES:
        return Schedule(*usual_tile(contraction, target))
    isa, weight = isa_of(target), contraction.weight
    if rule != "integer_product" or not isinstance(weight, QTensor):
        return Schedule(isa.rows, isa.tiles, isa.vector_tiles)
    return Schedule(isa.rows, isa.tiles, isa.few_tiles(isa.feed(weight.format)))


def candidates(rule: str, target: Target, contraction: Contraction) -> list[Schedule]:
    """What is worth trying, apart from the usual schedule: tiles that fit the registers and are not tiny."""
    usual, tiles, rows = usual_schedule(rule, target, contraction), _tiles(contraction), _rows(contraction)
    # Register tiles of codes do not cross from one group into the next.
    apart = rule == CODES and _groups(contraction) > 1
    whole = [t for t in range(1, min(MOST_FEW, tiles) + 1) if not apart or tiles % t == 0]
    found = []
    if rows < usual.rows:
        found = [replace(usual, few_tiles=few) for few in whole]
    else:
        shapes = [(r, t) for t in whole if t <= MOST_TILES for r in range(1, min(MOST_ROWS, rows) + 1)]
        found = [replace(usual, rows=r, tiles=t) for r, t in shapes if _fits(rule, target, r, t)]
    if rule in FLOATS:
        found += [replace(usual, unroll=steps) for steps in UNROLLS]
    return [schedule for schedule in found if schedule != usual]


def _fits(rule: str, target: Target, rows: int, tiles: int) -> bool:
    """Sums, weights and an activation fit, and fill a good part of the registers.

    An integer product has a second sum a place, which may be spilled: it is touched once a block only. Products of
    codes need the levels of one tile at a time.
    """
    parts = LANES // min(target.lanes, LANES)
    sums, levels = rows * tiles * parts, (1 if rule == CODES else tiles) * parts
    least = target.registers // 3
    return least <= sums and sums + levels + 1 <= target.registers


def _tiles(contraction: Contraction) -> int:
    outputs = int(contraction.out_shape[-1])
    return -(-outputs // _groups(contraction) // LANES)


def _groups(contraction: Contraction) -> int:
    return 1 if contraction.conv is None else contraction.conv.group


def _rows(contraction: Contraction) -> int:
    return prod(int(dim) for dim in contraction.out_shape[:-1])


def search(
    rule: str, target: Target, contraction: Contraction, shape: str, timer: Timer | None = None, *,
    open_rows: bool = False,
) -> tuple[Entry | None, int]:  # fmt: skip
    """The schedule that is faster than the usual one, if there is one; and how many were tried."""
    timer = timer or timed
    tried = candidates(rule, target, contraction)
    if not tried:
        return None, 0
    usual = [Trial(name, contraction, None, open_rows) for name in (FIRST, USUAL)]
    trials = [*usual, *(Trial(f"s{i}", contraction, schedule, open_rows) for i, schedule in enumerate(tried))]
    gains = ratios(timer(trials, target))
    best = max(range(len(tried)), key=lambda i: gains[f"s{i}"])
    if gains[f"s{best}"] < GAIN:
        return None, len(tried)
    again = gain(tried[best], target, contraction, timer, open_rows=open_rows)
    kept = Entry(rule, target.name, shape, tried[best], again, machine.processor()) if again >= GAIN else None
    return kept, len(tried)


def gain(
    schedule: Schedule, target: Target, contraction: Contraction, timer: Timer | None = None, *, open_rows: bool = False
) -> float:
    """How many times as fast as the usual schedule one is: behind it or before it, whichever is less."""
    found = []
    for first, order in ((None, (USUAL, FOUND)), (schedule, (FOUND, USUAL))):
        trials = [Trial(FIRST, contraction, first, open_rows)]
        trials += [Trial(name, contraction, schedule if name == FOUND else None, open_rows) for name in order]
        found.append(ratios((timer or timed)(trials, target))[FOUND])
    return min(found)


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """How many times as fast as the usual schedule each is: the median of the ratios within a round."""
    usual = seconds[USUAL]
    return {
        name: median(base / own if own else 0.0 for base, own in zip(usual, values, strict=True))
        for name, values in seconds.items()
        if name not in (FIRST, USUAL)
    }


def timed(trials: Sequence[Trial], target: Target) -> dict[str, Sequence[float]]:
    """Seconds of every trial in every round."""
    built = build_trials(trials, target)
    size = trials[0].rows
    once = sum(layer.median for layer in time_trials(built, 2, size).values())
    rounds = int(SECONDS_A_SEARCH / max(once, 1e-9))
    found = time_trials(built, max(LEAST_ROUNDS, min(MOST_ROUNDS, rounds)), size)
    return {name: layer.seconds for name, layer in found.items()}


def tune_layers(
    layers: Sequence[Mapping[str, Any]], target: Target, sizes: Mapping[str, int],
    on_stage: Callable[[str], None] = lambda name: None, timer: Timer | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Search the schedules of all products of a model, each class of shapes once.

    Args:
        layers: `layers` of report.json.
        target: what this machine runs.
        sizes: of symbolic dims.
        on_stage: told what is being searched.
        timer: seconds of trials; None measures.

    Returns:
        One dict a class: rule, shape, layers, tried, entry (None when the usual schedule stays), or why not.
    """
    done: dict[tuple[str, str], dict[str, Any]] = {}
    for facts in layers:
        if facts["rule"] not in (*INTEGER, *FLOATS):
            continue
        contraction = _contraction(facts, sizes)
        if contraction is None or contraction.weight is None:
            continue
        weight = contraction.weight
        key = (facts["rule"], shape_class(weight_text(weight), facts["out_shape"][:-1], weight.shape))
        if key in done:
            done[key]["layers"].append(facts["name"])
            continue
        on_stage(" ".join(key))
        unknown = contraction.kind == "matmul" and not all(isinstance(dim, int) for dim in facts["out_shape"])
        entry, tried = search(key[0], target, contraction, key[1], timer, open_rows=unknown)
        done[key] = {"rule": key[0], "shape": key[1], "layers": [facts["name"]], "tried": tried, "entry": entry}
    return list(done.values())


def _contraction(facts: Mapping[str, Any], sizes: Mapping[str, int]) -> Contraction | None:
    """None for a scheme whose levels are learned: there is nothing to make weights up from."""
    try:
        return from_facts(facts, sizes)
    except KbitcError:
        return None
