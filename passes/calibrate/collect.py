"""Statistics of intermediate values over a data set, in bounded memory, and their cache.

All wanted values of one batch would not fit beside a large model, so they are taken in groups whose size fits a budget,
one session a group, which starts from what the sessions before it gave. Sessions use one thread an operator and the
graph as it is, and statistics are order-free, so that the result depends on the model and the set of batches alone.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph.evaluate import Session, light_proto
from kbitc.importer.batches import digest
from kbitc.passes.calibrate.sizes import bound_dims, elements_of
from kbitc.passes.calibrate.stream import only
from kbitc.quant.stats import CalibrationStats

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
#: Bytes of values that one run may return.
BUDGET = 1 << 29
#: Part of the cache key: counts up when what is collected changes.
VERSION = 1


def collect(
    model: ir.Model,
    names: Sequence[str],
    batches: Iterable[Feeds],
    *,
    budget: int = BUDGET,
    progress: Callable[[str], None] = lambda text: None,
) -> CalibrationStats:
    """Run the model over all batches and observe the named float values.

    Args:
        model: canonical graph; it is not changed.
        names: graph inputs or values that nodes of the main graph compute.
        batches: feeds; read once.
        budget: bytes of values held at once, beside those that later parts of the graph start from.
        progress: hears how far it is.

    Raises:
        CalibrationError: the data do not fit the model.
        ModelError: onnxruntime fails on the model.
    """
    stats = CalibrationStats()
    inputs = {value.name for value in model.graph.inputs}
    computed = [name for name in dict.fromkeys(names) if name not in inputs]
    sessions: list[Session] = []
    for number, feeds in enumerate(batches, 1):
        progress(f"batch {number}")
        if number == 1:
            sessions = _in_turn(model, in_groups(model, computed, feeds, budget))
        stats.add({name: feeds[name] for name in names if name in inputs})
        held: dict[str, Array] = {}
        for index, session in enumerate(sessions):
            found = session.run({**feeds, **held})
            for name, array in found.items():
                stats.add_value(name, array)
            later = {name for other in sessions[index + 1 :] for name in other.inputs}
            held = {name: array for name, array in (held | found).items() if name in later}
    return stats


def _in_turn(model: ir.Model, groups: Sequence[Sequence[str]]) -> list[Session]:
    """A session a group of values, each of which takes up where earlier ones got to."""
    sessions: list[Session] = []
    before: list[str] = []
    for group in groups:
        sessions.append(Session(only(model, group, before), threads=1, lean=True))
        before += group
    return sessions


def in_groups(model: ir.Model, names: Sequence[str], feeds: Feeds, budget: int) -> list[list[str]]:
    """Cut the names, in order, into groups whose values fit the budget for one batch like `feeds`."""
    bound = bound_dims(model, feeds)
    values = ir.convenience.create_value_mapping(model.graph)
    groups: list[list[str]] = []
    used = budget
    for name in names:
        size = 4 * elements_of(values[name], bound)
        if not groups or used + size > budget:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def cached(
    model: ir.Model, names: Sequence[str], batches: Iterable[Feeds], progress: Callable[[str], None] = lambda text: None
) -> CalibrationStats:
    """`collect`, or what it gave before for the same model, names and set of batches.

    Args:
        model, names, progress: as for `collect`.
        batches: feeds that can be read twice.
    """
    path = cache_folder() / f"{cache_key(model, names, batches)}.npz"
    try:
        return CalibrationStats.from_bytes(path.read_bytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    stats = collect(model, names, batches, progress=progress)
    _store(path, stats.to_bytes())
    return stats


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/kbitc/stats or ~/.cache/kbitc/stats."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "kbitc" / "stats"


def cache_key(model: ir.Model, names: Sequence[str], batches: Iterable[Feeds]) -> str:
    """SHA-256 over the graph, its weights, the names and the batches in any order."""
    key = hashlib.sha256(f"stats {VERSION}".encode())
    proto, detached = light_proto(model)
    key.update(proto.SerializeToString(deterministic=True))
    for name, array in detached.items():
        key.update(name.encode())
        key.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    key.update("\n".join(names).encode())
    key.update(digest(batches).encode())
    return key.hexdigest()


def _store(path: Path, data: bytes) -> None:
    """Write a file in one step; a cache that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
    except OSError:
        return
