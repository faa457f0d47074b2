"""Measures the table of the cost model (`costs.py`) for a target that this machine runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod

from kbitc.targets.costs import FLOAT_BITS, Row, Work
from kbitc.targets.lower.contraction import Contraction, ConvAttributes
from kbitc.targets.target import Target
from kbitc.targets.trial import Trial, build_trials, made_up_weight, time_trials

ROUNDS = 15
ROWS = (1, 16, 128)
# (N, C) of matrix products; all widths are measured at the first, a few at the others.
MATRICES = ((768, 768), (384, 384), (1536, 384), (384, 1536))
FEW_WIDTHS = (2, 4, 8)
# (image side, channels in, channels out, window side) of convolutions, without a border.
IMAGES = ((30, 64, 64, 3), (14, 256, 256, 1), (28, 64, 128, 1), (8, 16, 16, 1))
DEPTHWISE = ((30, 64, 3), (14, 256, 5))


def contractions() -> Iterator[Contraction]:
    """What is measured, under names of their own."""
    count = 0
    for place, (n, channels) in enumerate(MATRICES):
        for bits in (None, *(range(1, 9) if place == 0 else FEW_WIDTHS)):
            for rows in ROWS:
                for activation in ("int8", "float32") if bits in FEW_WIDTHS else ("int8",):
                    yield _matmul(f"m{count}", bits, rows, n, channels, "float32" if bits is None else activation)
                    count += 1
    for side, channels, n, window in IMAGES:
        for bits, activation in ((None, "float32"), (4, "float32"), (4, "int8"), (8, "int8")):
            yield _conv(f"c{count}", bits, side, channels, n, window, activation)
            count += 1
    for side, channels, window in DEPTHWISE:
        for bits in (None, 4):
            yield _conv(f"d{count}", bits, side, 1, channels, window, "float32", group=channels)
            count += 1


def _matmul(name: str, bits: int | None, rows: int, n: int, channels: int, activation: str) -> Contraction:
    weight = made_up_weight(None if bits is None else f"int{bits}:b32", (n, 1, channels))
    block = 32 if activation == "int8" else 0
    return Contraction(name, "matmul", weight, activation, (rows, channels), (rows, n), block)  # type: ignore[arg-type]


def _conv(
    name: str, bits: int | None, side: int, channels: int, n: int, window: int, activation: str, group: int = 1
) -> Contraction:
    scheme = None if bits is None else f"int{bits}:b32" if activation == "int8" and channels >= 32 else f"int{bits}:c"
    weight = made_up_weight(scheme, (n, window * window, channels))
    block = 32 if activation == "int8" and channels >= 32 else 0
    out = side - window + 1
    shapes = (1, side, side, channels * group), (1, out, out, n)
    geometry = ConvAttributes((window, window), group=group)
    return Contraction(name, "conv", weight, activation, *shapes, block, geometry)  # type: ignore[arg-type]


def measure(target: Target, on_stage: Callable[[str], None] = lambda name: None) -> list[Row]:
    """The rows of a target; the kernels of each run interleaved, one thread.

    Args:
        target: what this machine runs.
        on_stage: told how far it is.
    """
    trials = [Trial(contraction.name, contraction) for contraction in contractions()]
    on_stage(f"{target}: compile {len(trials)} kernels")
    built = build_trials(trials, target)
    on_stage(f"{target}: measure")
    times = time_trials(built, ROUNDS)
    return rows_of(trials, {name: (layer.rule, 1e6 * layer.median) for name, layer in times.items()})


def rows_of(trials: Sequence[Trial], times: dict[str, tuple[str, float]]) -> list[Row]:
    """The rows of a table from (rule, microseconds) by name."""
    made = []
    for trial in trials:
        given = trial.contraction
        if given.weight is None or trial.name not in times:
            continue
        n, taps, channels = given.weight.shape
        bits = getattr(given.weight, "bits", FLOAT_BITS)
        rule, microseconds = times[trial.name]
        rows = prod(int(dim) for dim in given.out_shape[:-1])
        made.append(Row(rule, Work(rows, n, taps, channels, bits), microseconds))
    return made
