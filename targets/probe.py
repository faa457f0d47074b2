"""The limits of this machine, probed by tiny kernels: how fast it reads, and multiplies and adds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kbitc.targets.target import Target, host_runs

# Caches of a processor that does not say how large its own are.
CACHES = {"L2": 512 << 10, "L3": 16 << 20}
BEHIND_CACHES = 192 << 20
CACHE_INFO = Path("/sys/devices/system/cpu/cpu0/cache")
# The least work of one sample, and how many samples there are; the best one is the limit.
BYTES_A_SAMPLE = 64 << 20
PEAK_ROUNDS = 2000
SAMPLES = 5


class Layer(Protocol):
    """What the limits of a layer depend on."""

    moved: int
    stored: int
    operations: int
    integer: bool


@dataclass(frozen=True)
class Limits:
    """What a machine cannot exceed, with some number of threads.

    Attributes:
        reads: (name, bytes that fit, bytes a second) of every cache, ascending, and of what lies behind them.
        float_operations: float32 multiplications and additions a second.
        integer_operations: the same of int8 in int32 sums, by the fastest instructions of the target.
    """

    reads: tuple[tuple[str, int, float], ...]
    float_operations: float
    integer_operations: float

    def seconds(self, layer: Layer, resident: int) -> tuple[float, str]:
        """The least time of a layer and what limits it.

        Args:
            layer: bytes and operations.
            resident: weights that the model reads between two runs of the layer; says where they come from. The
                activations were written by the layer before.
        """
        level, speed = self._level(resident)
        reading = layer.stored / speed + (layer.moved - layer.stored) / self._level(layer.moved - layer.stored)[1]
        computing = layer.operations / (self.integer_operations if layer.integer else self.float_operations)
        if computing > reading:
            return computing, "products"
        return reading, level if layer.stored else self._level(layer.moved)[0]

    def _level(self, size: int) -> tuple[str, float]:
        name, _, speed = next((read for read in self.reads if size <= read[1]), self.reads[-1])
        return name, speed

    def as_json(self) -> dict[str, Any]:
        """Plain data for json.dumps: GB/s and Gop/s."""
        return {
            "read_gb_per_s": {name: round(speed / 1e9, 2) for name, _, speed in self.reads},
            "float_gop_per_s": round(self.float_operations / 1e9, 2),
            "integer_gop_per_s": round(self.integer_operations / 1e9, 2),
        }


def probe(target: Target, threads: int = 1, clock: Callable[[], float] = time.perf_counter) -> Limits | None:
    """Measure the limits of this machine for code of a target; None where it cannot run, or is no CPU."""
    if target.device != "cpu" or host_runs(target) is not None:
        return None
    from kbitc.bundle.engine import set_threads

    set_threads(threads)
    levels = {**cache_sizes(), "memory": BEHIND_CACHES}
    module, work = _kernels(target, threads, levels)
    rates = {name: _rate(module[name], arguments, amount, clock) for name, (arguments, amount) in work.items()}
    reads = tuple((name, size, rates[name]) for name, size in levels.items())
    return Limits(reads, rates["float_peak"], rates["integer_peak"])


def cache_sizes(folder: Path = CACHE_INFO) -> dict[str, int]:
    """Bytes of the second- and third-level cache as the system knows them."""
    found = {}
    for place in sorted(folder.glob("index*")):
        level, size = ((place / name).read_text(encoding="ascii").strip() for name in ("level", "size"))
        if level in ("2", "3") and size.endswith("K") and size[:-1].isdigit():
            found[f"L{level}"] = int(size[:-1]) << 10
    return found or CACHES


def _kernels(target: Target, tasks: int, levels: Mapping[str, int]) -> tuple[Any, Mapping[str, tuple[list[Any], int]]]:
    """The compiled kernels; by name their arguments, and the bytes or operations of one call."""
    import tvm

    from kbitc.targets.kernels import probe as kernels
    from kbitc.targets.kernels.ftile import registers_of
    from kbitc.targets.kernels.isa import isa_of
    from kbitc.targets.kernels.tile_peak import make_tile_peak

    registers, isa = registers_of(target), isa_of(target)
    made = {
        "float_peak": kernels.make_float_peak(registers, PEAK_ROUNDS, tasks, "float_peak"),
        "integer_peak": make_tile_peak(PEAK_ROUNDS, tasks, "integer_peak")
        if isa.tile_registers
        else kernels.make_integer_peak(isa, PEAK_ROUNDS, tasks, "integer_peak"),
        # Half of a cache: the rest of it holds something else.
        **{name: kernels.make_read(size // 2, tasks, registers.lanes, name) for name, size in levels.items()},
    }
    named = {name: probe.function.with_attr("global_symbol", name) for name, probe in made.items()}
    module = tvm.compile(tvm.IRModule(named), target=tvm.target.Target(target.tvm))
    work = {}
    for name, probe in made.items():
        arrays = [np.ones(shape, dtype) for shape, dtype in probe.arguments]
        work[name] = ([tvm.runtime.tensor(array) for array in arrays], probe.amount)
    return module, work


def _rate(function: Callable[..., Any], arguments: list[Any], amount: int, clock: Callable[[], float]) -> float:
    """Bytes or operations a second: of the fastest sample."""
    calls = max(1, BYTES_A_SAMPLE // amount)
    function(*arguments)
    seconds = []
    for _ in range(SAMPLES):
        start = clock()
        for _ in range(calls):
            function(*arguments)
        seconds.append(clock() - start)
    return amount * calls / min(seconds)
