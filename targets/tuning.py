"""Schedules that were found by measuring (`kbitc tune`), by rule, instruction set and class of shapes.

A schedule changes which register tile computes an output, never the order of its sums: results are the same bits.

::

    {"version": 1, "entries": [{"rule": "integer_product", "target": "x86:avx512vbmi",
      "shape": "int4:b32, 1 rows, 384x1x384", "schedule": {"rows": 4, "tiles": 3, "few_tiles": 4}, "speed": 1.08,
      "machine": "AuthenticAMD 25 17"}]}

What is fastest on one processor need not be on another. An entry with a machine is taken only where the compiling
machine has that model of processor, unless its file is named (`--tuned FILE`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kbitc.errors import UsageError
from kbitc.quant.levels import LevelTensor
from kbitc.quant.tensor import QTensor
from kbitc.targets import machine

if TYPE_CHECKING:
    from kbitc.targets.lower.contraction import Contraction
    from kbitc.targets.target import Target

VERSION = 1
#: In the cache folder: what `kbitc tune` finds. Beside this module: what ships.
FILE = "tuned.json"
SHIPPED = Path(__file__).with_name(FILE)
NONE = "none"
MOST_BYTES = 64 << 20
FLOAT_BITS = 32
#: Rows of products of few rows: their kernels walk the weight once.
FEW_ROWS = 15


@dataclass(frozen=True)
class Schedule:
    """What `kbitc tune` searches.

    Attributes:
        rows, tiles: register tile of a product, in rows and 16-channel tiles.
        few_tiles: 16-channel tiles of a product of one row.
        unroll: steps of a float product's reduction that are written out; 0 for the usual number.
    """

    rows: int
    tiles: int
    few_tiles: int
    unroll: int = 0


@dataclass(frozen=True)
class Entry:
    """A schedule that was found.

    Attributes:
        rule: kernel rule.
        target: text form of the target.
        shape: class of shapes, from `shape_class`.
        schedule: the fastest.
        speed: how many times as fast as the usual schedule it was.
        machine: model of the processor that was measured (`machine.processor`); empty for any.
    """

    rule: str
    target: str
    shape: str
    schedule: Schedule
    speed: float
    machine: str = ""

    @property
    def here(self) -> bool:
        """Whether it was measured on such a processor as this one."""
        return self.machine in ("", machine.processor())

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is looked up by."""
        return self.rule, self.target, self.shape

    def as_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        return {**asdict(self), "speed": round(self.speed, 3)}


class Tuning:
    """A database of schedules.

    Args:
        entries: of a later one with the same key counts.
    """

    def __init__(self, entries: Sequence[Entry] = ()) -> None:
        self._entries = {entry.key: entry for entry in entries}

    def find(self, rule: str, target: str, shape: str) -> Schedule | None:
        """The schedule for a class of shapes; None where none was found."""
        entry = self._entries.get((rule, target, shape))
        return None if entry is None else entry.schedule

    def merged(self, others: Sequence[Entry]) -> Tuning:
        """With further entries, which replace those of the same key."""
        return Tuning((*self._entries.values(), *others))

    def entries(self) -> tuple[Entry, ...]:
        """All of them, by key."""
        return tuple(self._entries[key] for key in sorted(self._entries))

    def text(self) -> str:
        """The database as JSON; the same entries give the same text."""
        entries = [entry.as_json() for entry in self.entries()]
        return json.dumps({"version": VERSION, "entries": entries}, indent=1) + "\n"

    def facts(self) -> dict[str, Any] | None:
        """What a bundle records: how many schedules there were, and the hash of all; None without any."""
        if not self._entries:
            return None
        return {"schedules": len(self._entries), "sha256": hashlib.sha256(self.text().encode()).hexdigest()}

    def __len__(self) -> int:
        return len(self._entries)


def read_tuning(path: Path) -> Tuning:
    """The database of a file.

    Raises:
        UsageError: the file is missing or is no database of this version.
    """
    remedy = "make it with `kbitc tune`"
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UsageError("the file is too large for schedules", where=str(path), remedy=remedy)
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError("cannot read the schedules", where=str(path), got=error.strerror, remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        raise UsageError("the schedules are not JSON", where=str(path), got=str(error)[:80], remedy=remedy) from error
    if not isinstance(data, Mapping) or data.get("version") != VERSION or not isinstance(data.get("entries"), list):
        raise UsageError("not a database of schedules", where=str(path), remedy=remedy)
    return Tuning([_entry(item, f"{path}, entries[{i}]") for i, item in enumerate(data["entries"])])


def tuned_file() -> Path:
    """Where `kbitc tune` keeps what it finds: in the cache folder."""
    from kbitc.targets.runner.libraries import cache_folder

    return cache_folder() / FILE


def find_tuning(given: Path | None) -> Tuning:
    """The schedules for a compilation: those of a file, or those that ship and over them those of the cache folder.

    Of the latter two only what was measured on such a processor as this one.

    Args:
        given: of --tuned; the name "none" for no schedules at all.

    Raises:
        UsageError: a file is no database.
    """
    if given is not None:
        return Tuning() if str(given) == NONE else read_tuning(given)
    found = Tuning()
    for file in (SHIPPED, tuned_file()):
        if file.is_file():
            found = found.merged([entry for entry in read_tuning(file).entries() if entry.here])
    return found


def _entry(item: Any, where: str) -> Entry:
    texts = [item.get(key) for key in ("rule", "target", "shape")] if isinstance(item, Mapping) else [None]
    measured = item.get("machine", "") if isinstance(item, Mapping) else ""
    if not all(isinstance(text, str) for text in (*texts, measured)) or not isinstance(item.get("schedule"), Mapping):
        raise UsageError("an entry needs rule, target, shape and schedule", where=where)
    given, speed = dict(item["schedule"]), item.get("speed", 1.0)
    names = {field.name for field in fields(Schedule)}
    sizes = all(type(size) is int and 0 <= size <= 64 for size in given.values())
    if not {"rows", "tiles", "few_tiles"} <= set(given) <= names or not sizes or not isinstance(speed, int | float):
        raise UsageError("not a schedule", where=where, got=json.dumps(given)[:80])
    if not all(given[name] for name in ("rows", "tiles", "few_tiles")):
        raise UsageError("a register tile needs at least one row and tile", where=where, got=json.dumps(given)[:80])
    return Entry(item["rule"], item["target"], item["shape"], Schedule(**given), float(speed), measured)


def weight_text(weight: Any) -> str:
    """What a weight [N, T, C] is, in a word: its scheme, or the width of its levels (and blocks), or float32."""
    if isinstance(weight, QTensor):
        return str(weight.scheme)
    if not isinstance(weight, LevelTensor):
        return "float32"
    return f"{weight.bits}-bit levels" + (f" in blocks of {weight.block}" if weight.block else "")


def shape_class(weight: str, rows: Sequence[Any], shape: Sequence[int]) -> str:
    """The class of a product: of its rows only whether there is one, few, many, or nobody knows before it runs.

    Args:
        weight: from `weight_text`.
        rows: dims of the output before the channels.
        shape: of the weight, [N, T, C].
    """
    which = "any"
    if all(isinstance(dim, int) for dim in rows):
        count = prod(rows)
        which = "1" if count == 1 else "few" if count <= FEW_ROWS else "many"
    n, taps, channels = shape
    return f"{weight}, {which} rows, {n}x{taps}x{channels}"


def scheduled(target: Target, rule: str, contraction: Contraction) -> Target:
    """The target with the schedule that was found for a contraction; the target itself without one."""
    weight = contraction.weight
    if not target.tuning or weight is None:
        return target
    shape = shape_class(weight_text(weight), contraction.out_shape[:-1], weight.shape)
    found = target.tuning.find(rule, target.name, shape)
    return target if found is None else target.with_schedule(found)
