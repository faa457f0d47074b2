"""What a plan has to keep: bits a weight, bytes on disk, predicted time, loss of accuracy. Text becomes types here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from kbitc.errors import UsageError

ALLOCATOR = "sensitivity"
METRIC = "top1"
#: Bits of a weight that no quantized model goes below or above.
BPW_RANGE = (1.0, 32.0)
_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_TIMES = {"us": 1.0, "ms": 1e3, "s": 1e6}
_TIME = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(us|ms|s)\s*")
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True)
class Budget:
    """What was asked for; None where nothing was.

    Attributes:
        bpw: most bits a weight, codes, scales and zero points counted, over all weights that could be quantized.
        size: most bytes of the result on disk, all files of a bundle together.
        microseconds: most that the products with weights may take on the target, as the cost model predicts.
        max_drop: most that the score may fall, as a fraction: 0.005 for 0.5%.
        metric: a name of `kbitc.passes.verify.metrics`, or the path of a Python file with score(outputs, labels).
        labels: file of labels for the metric.
        allocate: name of the allocator.
    """

    bpw: float | None = None
    size: int | None = None
    microseconds: float | None = None
    max_drop: float | None = None
    metric: str = METRIC
    labels: Path | None = None
    allocate: str = ALLOCATOR

    @property
    def limits_plan(self) -> bool:
        """Whether widths are to be chosen at all."""
        return any(item is not None for item in (self.bpw, self.size, self.microseconds, self.max_drop))


def make_budget(
    *,
    target_bpw: float | None = None,
    size_budget: str | int | None = None,
    time_budget: str | None = None,
    max_drop: str | float | None = None,
    metric: str | None = None,
    labels: str | PathLike[str] | None = None,
    allocate: str | None = None,
) -> Budget:
    """A budget from the plain values of the command line or the Python call.

    Raises:
        UsageError: a value that is none, or options that need another one.
    """
    if target_bpw is not None and not BPW_RANGE[0] <= target_bpw <= BPW_RANGE[1]:
        raise UsageError("--target-bpw is a number from 1 to 32", got=target_bpw, remedy="write --target-bpw 4.5")
    if sum(item is not None for item in (target_bpw, size_budget, time_budget)) > 1:
        raise UsageError("--target-bpw, --size-budget and --time-budget exclude each other", remedy="give one of them")
    if max_drop is None and (metric is not None or labels is not None):
        raise UsageError("--metric and --labels go with --max-drop", remedy="add --max-drop 0.5%")
    made = Budget(
        bpw=target_bpw,
        size=None if size_budget is None else parse_size(size_budget),
        microseconds=None if time_budget is None else parse_time(time_budget),
        max_drop=None if max_drop is None else parse_drop(max_drop),
        metric=metric or METRIC,
        labels=None if labels is None else Path(labels),
        allocate=allocate or ALLOCATOR,
    )
    if allocate is not None and not made.limits_plan:
        raise UsageError("--allocate goes with a budget", remedy="add --target-bpw, --size-budget, ...")
    return made


def parse_size(text: str | int) -> int:
    """Bytes of a text such as 20MB (10^6 each), 20MiB (2^20 each), 512kB or 1048576.

    Raises:
        UsageError: when it is none, or zero.
    """
    match = _SIZE.fullmatch(str(text))
    unit = None if match is None else _UNITS.get(match[2].lower())
    size = 0 if match is None or unit is None else int(float(match[1]) * unit)
    if size < 1:
        raise UsageError("not a size", got=repr(text), remedy="write --size-budget 20MB, 512kB or 20MiB")
    return size


def parse_time(text: str) -> float:
    """Microseconds of a text such as 800us, 1.5ms or 1s.

    Raises:
        UsageError: when it is none, or zero.
    """
    match = _TIME.fullmatch(str(text))
    found = 0.0 if match is None else float(match[1]) * _TIMES[match[2]]
    if found <= 0:
        raise UsageError("not a time", got=repr(text), remedy="write --time-budget 1.5ms or 800us")
    return found


def parse_drop(text: str | float) -> float:
    """The fraction of a text such as 0.5%; a number of the Python interface is the fraction itself.

    Raises:
        UsageError: when it is none, or above 100 %.
    """
    match = _PERCENT.fullmatch(text) if isinstance(text, str) else None
    drop = float(match[1]) / 100 if match is not None else (-1.0 if isinstance(text, str) else float(text))
    if not 0 <= drop <= 1:
        raise UsageError("not a drop in percent", got=repr(text), remedy="write --max-drop 0.5%")
    return drop
