"""The peak of AMX: dot products of tiles that stay in their registers.

As in `tiled.py`, two left tiles meet two right tiles, so that four sums are under way: a tdpb takes 52 cycles, and a
new one can start every 16.
"""

from __future__ import annotations

from tvm.script.ir_builder import tirx as builder

from kbitc.targets.kernels import vector as v
from kbitc.targets.kernels.probe import Probe
from kbitc.targets.x86.intrin import tdpb, tiles

SUMS, LEFT, RIGHT = (0, 1, 2, 3), (4, 5), (6, 7)
TILE_BYTES = tiles.ROWS * tiles.ROW_BYTES
COLUMNS = tiles.ROW_BYTES // 4
OPERATIONS = 2 * tiles.ROWS * COLUMNS * tiles.ROW_BYTES


def make_tile_peak(rounds: int, tasks: int, name: str) -> Probe:
    """Multiplies tiles of x uint8 [4 * 1024] into out int32 [tasks, 4 * 256]."""
    operands = (*LEFT, *RIGHT)
    shape = (tasks, len(SUMS) * tiles.ROWS * COLUMNS)

    def body() -> None:
        x = v.argument("x", (len(operands) * TILE_BYTES,), "uint8")
        out = v.argument("out", shape, "int32")
        places = v.view(out, (shape[0] * shape[1],), "int32")
        with v.root(), builder.parallel(v.i64(0), v.i64(tasks)) as task:
            tiles.configure([tiles.ROWS] * tiles.TILES, [tiles.ROW_BYTES] * tiles.TILES)
            for place, tile in enumerate(operands):
                tiles.load(tile, tiles.address(x, v.i64(place * TILE_BYTES)), tiles.ROW_BYTES)
            for tile in SUMS:
                tiles.zero(tile)
            v.loop(rounds, lambda _: _round())
            for tile in SUMS:
                start = task * shape[1] + tile * tiles.ROWS * COLUMNS
                tiles.store(tile, tiles.address(places, start), tiles.ROW_BYTES)
            tiles.release()

    arguments = (((len(operands) * TILE_BYTES,), "uint8"), (shape, "int32"))
    return Probe(v.kernel(name, body), arguments, rounds * len(SUMS) * OPERATIONS * tasks)


def _round() -> None:
    for i, left in enumerate(LEFT):
        for j, right in enumerate(RIGHT):
            tdpb.emit(SUMS[2 * i + j], left, right, left_signed=False, right_signed=False)
