"""AMX instructions equal their numpy meaning; where the emulator runs them, it refuses what a processor would."""

from __future__ import annotations

import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

from kbitc.targets import machine
from kbitc.targets.kernels import vector as v
from kbitc.targets.target import parse_target
from kbitc.targets.x86.intrin import tdpb, tiles
from tests.support import amx

RANDOM = np.random.default_rng(5)
SIGNS = tuple(product((False, True), repeat=2))
# (rows of the left tile, dwords of its rows, columns of the right tile)
SHAPES = ((16, 16, 16), (16, 8, 16), (7, 12, 16), (1, 1, 1), (3, 16, 5))


def _bytes(signed: bool, shape: tuple[int, ...], value: int | None = None) -> Any:
    dtype = np.int8 if signed else np.uint8
    limits = np.iinfo(dtype)
    if value is not None:
        return np.full(shape, limits.max if value else limits.min, dtype)
    return RANDOM.integers(limits.min, limits.max + 1, shape).astype(dtype)


def _kernel(shape: tuple[int, int, int], signs: tuple[bool, bool]) -> Any:
    """sums += left by right, one tile each, the left rows 64 bytes apart."""
    rows, inner, columns = shape

    def body() -> None:
        left = v.argument("left", (rows * tiles.ROW_BYTES,), "uint8")
        right = v.argument("right", (inner * 4 * columns,), "uint8")
        sums = v.argument("sums", (rows * columns,), "int32")
        with v.root():
            tiles.configure([rows, rows, inner], [4 * columns, 4 * inner, 4 * columns])
            tiles.load(0, tiles.address(sums, v.i64(0)), 4 * columns)
            tiles.load(1, tiles.address(left, v.i64(0)), tiles.ROW_BYTES)
            tiles.load(2, tiles.address(right, v.i64(0)), 4 * columns)
            tdpb.emit(0, 1, 2, left_signed=signs[0], right_signed=signs[1])
            tiles.store(0, tiles.address(sums, v.i64(0)), 4 * columns)
            tiles.release()

    return v.kernel("dot", body).with_attr("global_symbol", "dot")


@pytest.mark.parametrize("signs", SIGNS, ids=lambda signs: "".join(tdpb.LETTERS[sign] for sign in signs))
def test_dot_products_are_numpys(signs: tuple[bool, bool]) -> None:
    emulator = amx.emulator()
    target = tvm.target.Target(parse_target(amx.AMX).tvm)
    for shape in SHAPES:
        rows, inner, columns = shape
        run = tvm.tirx.build(_kernel(shape, signs), target=target)
        for values in (None, *product((0, 1), repeat=2)):
            sides = (None, None) if values is None else values
            left = _bytes(signs[0], (rows, tiles.ROW_BYTES), sides[0])
            right = _bytes(signs[1], (inner, 4 * columns), sides[1])
            sums = RANDOM.integers(-(2**31), 2**31, (rows, columns)).astype(np.int32)
            given = (left.view(np.uint8).reshape(-1), right.view(np.uint8).reshape(-1))
            out = tvm.runtime.tensor(sums.reshape(-1))
            run["dot"](*map(tvm.runtime.tensor, given), out)
            wanted = tdpb.meaning(sums, left[:, : 4 * inner], right)
            np.testing.assert_array_equal(out.numpy().reshape(rows, columns), wanted, err_msg=f"{shape} {values}")
    assert emulator is None or emulator.configured_threads() == 0


@pytest.fixture(scope="module")
def misuse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if machine.architecture() != "x86_64" or amx.emulator() is None:
        pytest.skip("the processor itself refuses")
    compiler, folder = machine.tool("gcc", "cc", "clang") or "cc", tmp_path_factory.mktemp("amx")
    sources = [str(amx.SOURCE), str(amx.SOURCE.with_name("amx_misuse.c"))]
    command = [compiler, "-O1", "-mamx-tile", "-mamx-int8", "-o", str(folder / "misuse"), *sources]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "-mamx" in done.stderr:
        pytest.skip("the C compiler knows no AMX")
    assert not done.returncode, done.stderr
    return folder / "misuse"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unconfigured", "without a configuration"),
        ("released", "without a configuration"),
        ("missing", "does not have"),
        ("palette", "unknown palette"),
        ("wide", "more than 16 rows or 64 bytes"),
        ("reserved", "reserved bytes"),
        ("half", "rows but no bytes"),
        ("twice", "same tile twice"),
        ("rows", "rows of the sums"),
        ("inner", "rows of the right one"),
        ("columns", "columns of the sums"),
    ],
)
def test_the_emulator_refuses_misuse(misuse: Path, case: str, message: str) -> None:
    done = subprocess.run([misuse, case], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode < 0 and done.stderr.startswith("amx emulator:") and message in done.stderr


def test_the_emulator_leaves_the_rest_alone(misuse: Path) -> None:
    """A right use goes through; an illegal instruction that is not of AMX still ends the process."""
    assert subprocess.run([misuse, "right"], check=False, timeout=20).returncode == 0
    done = subprocess.run([misuse, "other"], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode < 0 and "amx emulator" not in done.stderr
