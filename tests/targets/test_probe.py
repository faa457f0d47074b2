"""Probes compute what they say, and limits say what cannot be exceeded."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import numpy as np
import pytest
import tvm

from kbitc.bundle.profile import LayerTimes
from kbitc.targets.kernels import probe as kernels
from kbitc.targets.kernels.ftile import registers_of
from kbitc.targets.kernels.isa import isa_of
from kbitc.targets.kernels.tile_peak import make_tile_peak
from kbitc.targets.probe import CACHES, SAMPLES, Limits, _rate, cache_sizes
from kbitc.targets.probe import probe as probe_limits
from kbitc.targets.target import Target, host_runs, parse_target
from tests.support import amx

X86 = [parse_target(name) for name in ("x86:avx2", "x86:avx512vnni", "x86:avx512vbmi")]
LIMITS = Limits((("L2", 100, 50.0), ("L3", 1000, 20.0), ("memory", 10_000, 10.0)), 100.0, 400.0)


def _layer(moved: int, stored: int, operations: int, integer: bool = False) -> LayerTimes:
    return LayerTimes("n", "r", True, [1.0], moved, stored, operations, integer)


@pytest.mark.parametrize(
    ("layer", "resident", "expected"),
    [
        (_layer(90, 0, 100), 0, (90 / 50, "L2")),  # activations that the layer before left in the cache
        (_layer(90, 60, 100), 500, (60 / 20 + 30 / 50, "L3")),  # weights of a model that fits the last cache
        (_layer(90, 60, 100), 5000, (60 / 10 + 30 / 50, "memory")),
        (_layer(90, 60, 100), 50_000, (60 / 10 + 30 / 50, "memory")),
        (_layer(90, 0, 1000), 0, (10.0, "products")),
        (_layer(90, 0, 1000, True), 0, (2.5, "products")),
    ],
)
def test_the_slower_of_reading_and_computing_is_the_limit(
    layer: LayerTimes, resident: int, expected: tuple[float, str]
) -> None:
    least, limited_by = LIMITS.seconds(layer, resident)
    assert (least, limited_by) == (pytest.approx(expected[0], rel=1e-12), expected[1])


def test_caches_are_as_large_as_the_system_says(tmp_path: Path) -> None:
    for index, (level, size) in enumerate([("1", "32K"), ("2", "1024K"), ("3", "32768K")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "level").write_text(level + "\n")
        (folder / "size").write_text(size + "\n")
    assert cache_sizes(tmp_path) == {"L2": 1 << 20, "L3": 32 << 20}
    assert cache_sizes(tmp_path / "none") == CACHES


def test_a_rate_is_that_of_the_fastest_sample() -> None:
    ticks = iter([0.0, 4.0, 4.0, 6.0, 6.0, 9.0, 9.0, 12.0, 12.0, 15.0])
    calls = count()
    amount = 64 << 20
    assert _rate(lambda: next(calls), [], amount, lambda: next(ticks)) == amount / 2.0
    assert next(calls) == 6


@pytest.mark.parametrize("target", X86, ids=str)
@pytest.mark.parametrize("tasks", [1, 2])
def test_probes_do_all_of_their_work(target: Target, tasks: int) -> None:
    reason = host_runs(target)
    if reason is not None:
        pytest.skip(reason)
    registers, isa = registers_of(target), isa_of(target)
    rounds = 3
    made = {
        "read": kernels.make_read(1 << 14, tasks, registers.lanes, "read"),
        "floats": kernels.make_float_peak(registers, rounds, tasks, "floats"),
        "integers": kernels.make_integer_peak(isa, rounds, tasks, "integers"),
    }
    named = {name: probe.function.with_attr("global_symbol", name) for name, probe in made.items()}
    module = tvm.compile(tvm.IRModule(named), target=tvm.target.Target(target.tvm))
    for name, probe in made.items():
        (shape, dtype), (out_shape, out_dtype) = probe.arguments
        out = tvm.runtime.tensor(np.zeros(out_shape, out_dtype))
        module[name](tvm.runtime.tensor(np.ones(shape, dtype)), out)
        # Of ones every sum counts its terms: an element read, or a product, which is two operations.
        work = 4 if name == "read" else 2
        assert work * int(out.numpy().sum()) == probe.amount, name


@pytest.mark.parametrize("tasks", [1, 2])
def test_the_probe_of_tiles_does_all_of_its_work(tasks: int) -> None:
    target, emulated = parse_target(amx.AMX), amx.emulator()
    probe = make_tile_peak(3, tasks, "peak")
    function = probe.function.with_attr("global_symbol", "peak")
    module = tvm.compile(tvm.IRModule({"peak": function}), target=tvm.target.Target(target.tvm))
    (shape, dtype), (out_shape, out_dtype) = probe.arguments
    out = tvm.runtime.tensor(np.zeros(out_shape, out_dtype))
    module["peak"](tvm.runtime.tensor(np.full(shape, 255, dtype)), out)
    assert 2 * int(out.numpy().sum(dtype=np.int64)) == 255 * 255 * probe.amount
    assert emulated is None or emulated.configured_threads() == 0


def test_machines_with_tiles_are_probed_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    amx.pretend(monkeypatch)
    monkeypatch.setattr("kbitc.targets.probe.PEAK_ROUNDS", 3)
    monkeypatch.setattr("kbitc.targets.probe.BYTES_A_SAMPLE", 1)
    emulated = amx.emulator()
    before = emulated.counts() if emulated else amx.Counts()
    assert probe_limits(parse_target(amx.AMX)) is not None
    assert emulated is None or emulated.counts().since(before).dot == 12 * (1 + SAMPLES)
