"""What loading and running take: processor time, and memory that does not grow with the shapes that have been seen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kbitc.bundle.runtime import POOLED_SHAPES
from tests.support import tiny

ROWS, SHAPES = 50_000, 40
# y and z, f32 [rows, 16]; x belongs to the caller.
LIVE = 2 * 4 * tiny.N * ROWS
SCRIPT = """
import sys
import numpy as np
from kbitc.bundle.runtime import load

def resident(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

model = load(sys.argv[1], threads=1)
rows, shapes = map(int, sys.argv[2:])
x = np.ones((rows, 8), np.float32)
model({"x": x[:1]})
before = resident("VmRSS")
for count in range(rows - 100 * shapes, rows, 100):
    model({"x": x[:count]})
print(resident("VmHWM") - before)
"""


def test_memory_does_not_add_up_over_shapes(bundle: Path) -> None:
    """Kept by exact size, the buffers of all shapes would stay; the heap between a few of them is the C library's."""
    command = [sys.executable, "-c", SCRIPT, str(bundle), str(ROWS), str(SHAPES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < SHAPES * LIVE / 4


@pytest.mark.parametrize("raw", [False, True])
def test_buffers_of_a_few_shapes_are_kept(bundle: Path, monkeypatch: pytest.MonkeyPatch, raw: bool) -> None:
    from kbitc.bundle.engine import Engine
    from kbitc.bundle.feeds import check_feeds
    from kbitc.bundle.runtime import load

    released: list[int] = []
    monkeypatch.setattr(Engine, "release_pool", lambda self: released.append(1))
    model = load(bundle)
    counts = []
    few = list(range(1, POOLED_SHAPES + 1))
    for rows in [*few, *few, POOLED_SHAPES + 1, 1, 1]:
        feeds = tiny.feeds(rows)
        if raw:
            model.run_raw(model.device_arguments(check_feeds(model.inputs, feeds)))
        else:
            model(feeds)
        counts.append(len(released))
    assert counts == [0] * 2 * POOLED_SHAPES + [1] * 3
