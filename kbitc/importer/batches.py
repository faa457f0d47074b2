"""Batches of a data set: read as often as they are needed, one in memory at a time."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kbitc.errors import CalibrationError

Array = npt.NDArray[Any]
Feeds = dict[str, Array]


class Batches:
    """An iterable of feeds that can be read again.

    Args:
        make: gives an iterator over all batches; it is handed a function to call with the number of samples that fill
            no batch.
        source: what the batches are, for people: "batches from data.npz".
    """

    def __init__(self, make: Callable[[Callable[[int], None]], Iterator[Feeds]], source: str) -> None:
        self._make = make
        self._source = source

    def __iter__(self) -> Iterator[Feeds]:
        """All batches, from the first."""
        return self._make(lambda count: None)

    def first(self, limit: int) -> tuple[list[Feeds], str]:
        """At most `limit` batches, and a sentence that says where they come from."""
        lost: list[int] = []
        found: list[Feeds] = []
        for feeds in self._make(lost.append):
            if len(found) == limit:
                break
            found.append(feeds)
        note = f", {sum(lost)} left out because they fill no batch" if sum(lost) else ""
        return found, f"{len(found)} {self._source}{note}"

    def spread(self, limit: int, most_bytes: int) -> list[Feeds]:
        """Batches from all over the data: at most `limit`, of at most `most_bytes` together (one batch may be more).

        Where there are too many, every second, fourth, eighth ... batch is kept; all are read.
        """
        kept: list[Feeds] = []
        step = 1
        for position, feeds in enumerate(self):
            if position % step:
                continue
            kept.append(feeds)
            while len(kept) > 1 and (len(kept) > limit or _bytes_of(kept) > most_bytes):
                kept, step = kept[::2], 2 * step
        return kept


def _bytes_of(batches: Iterable[Feeds]) -> int:
    return sum(array.nbytes for feeds in batches for array in feeds.values())


class Spool:
    """Makes an iterator readable again: what was taken from it lies in a temporary folder that goes with the object."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._folder = tempfile.TemporaryDirectory(prefix="kbitc-feeds-")
        self._count = 0

    def __iter__(self) -> Iterator[Any]:
        """What was read before, then what is left of the iterator."""
        position = 0
        while True:
            if position < self._count:
                with np.load(self._file(position), allow_pickle=False) as arrays:
                    item: Any = dict(arrays)
            else:
                try:
                    item = next(self._source)
                except StopIteration:
                    return
                if isinstance(item, Mapping):
                    self._keep(item)
            yield item
            position += 1

    def _keep(self, item: Mapping[str, Any]) -> None:
        arrays = {str(name): np.asarray(array) for name, array in item.items()}
        for name, array in arrays.items():
            if array.dtype.hasobject:
                raise CalibrationError(
                    "the array does not hold plain numbers",
                    where=f"feeds {self._count}, array {name!r}",
                    got=f"dtype {array.dtype}",
                )
        np.savez(self._file(self._count), allow_pickle=False, **arrays)
        self._count += 1

    def _file(self, position: int) -> Path:
        return Path(self._folder.name) / f"{position}.npz"


def digest(batches: Iterable[Mapping[str, Array]]) -> str:
    """SHA-256 of a set of batches, the same for any order of them."""
    found = []
    for feeds in batches:
        one = hashlib.sha256()
        for name in sorted(feeds):
            one.update(f"{name} {feeds[name].dtype} {feeds[name].shape} ".encode())
            one.update(np.ascontiguousarray(feeds[name]).tobytes())
        found.append(one.digest())
    return hashlib.sha256(b"".join(sorted(found))).hexdigest()
