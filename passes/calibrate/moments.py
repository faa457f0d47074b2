"""Moments of the inputs of every planned weight, a few layers at a time.

A solver needs E[x x^T] of a layer's unfolded input, K x K numbers, so all layers of a model at once would be too many.
Layers are taken in graph order in groups whose moments fit a memory budget, and the model is run once a group.

A row counts for what it holds, but for no more than `LIMIT` mean rows of its batch (`weights`). In language models the
first token can hold 10^5 times the energy of any other in front of one product (Sun et al., "Massive activations in
large language models", arXiv 2402.17762): it would be all that a solver sees there, though a normalization behind
takes its size away again.

Products of 1024 rows are summed in float32, everything beyond in float64, and the batches are taken in the order of
their SHA-256: the same data in another order give the same bits.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph import ops
from kbitc.passes.calibrate.stream import stream
from kbitc.passes.calibrate.unfold import can_unfold, rows
from kbitc.quant.moments import InputMoments

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
#: Bytes of moments that are held at once.
BUDGET = 1 << 29
#: Bytes of the moments of one weight, at most: sums of up to 16384 products.
LARGEST = 1 << 31
#: Rows of one layer that all batches together contribute at most: so many, or so many times K where that is more.
ROWS = 16384
ROWS_PER_COLUMN = 16
#: Mean rows of its batch, those that count less included, for which one row counts at most.
LIMIT = 16
#: Rounds in which that mean is found; each brings it nearer by LIMIT times the share of the rows that count less.
ROUNDS = 64
#: Rows that are multiplied in float32 before the sum goes to float64.
CHUNK = 1024


@dataclass(frozen=True)
class Reader:
    """One weight and the nodes whose inputs it is multiplied with."""

    tensor: str
    nodes: tuple[ir.Node, ...]
    groups: int
    size: int

    @property
    def nbytes(self) -> int:
        """Bytes of its float64 moments."""
        return 8 * self.groups * self.size * self.size

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for weights that are multiplied with the same rows."""
        return tuple(_geometry(node) for node in self.nodes)


def readers(nodes: Mapping[str, Sequence[ir.Node]]) -> list[Reader]:
    """The weights whose inputs can be watched: no look-ups, no input-dependent padding, and moments up to LARGEST.

    Args:
        nodes: weight name -> the nodes that use it.
    """
    found = []
    for tensor, users in nodes.items():
        usable = tuple(node for node in users if can_unfold(node))
        if usable:
            weight, kind = ops.weight_source(usable[0])
            shape = weight.const_value.shape.numpy() if weight is not None and weight.const_value is not None else ()
            _, taps, channels = ops.view_shape(kind, tuple(int(dim) for dim in shape))
            groups = ops.conv_group(usable[0]) if usable[0].op_type == "Conv" else 1
            found.append(Reader(tensor, usable, groups, taps * channels))
    return [reader for reader in found if reader.nbytes <= LARGEST]


def in_groups(wanted: Sequence[Reader], budget: int = BUDGET, parts: int = 1) -> list[list[Reader]]:
    """Cut the weights, in order, into groups whose moments fit the budget; equal inputs count once.

    Args:
        wanted: weights in graph order.
        budget: bytes of float64 moments in one group; a single weight may exceed it.
        parts: at least so many groups, where there are so many different inputs.
    """
    groups: list[list[Reader]] = []
    most = -(-len({reader.key for reader in wanted}) // parts)
    used, seen = 0, set[tuple[object, ...]]()
    for reader in wanted:
        extra = 0 if reader.key in seen else reader.nbytes
        if not groups or used + extra > budget or len(seen | {reader.key}) > most:
            groups.append([])
            used, seen, extra = 0, set(), reader.nbytes
        groups[-1].append(reader)
        seen.add(reader.key)
        used += extra
    return groups


def moments(model: ir.Model, group: Sequence[Reader], feeds: Sequence[Feeds]) -> dict[str, InputMoments]:
    """Run the model once over all batches and give the moments of a group of weights by name.

    Weights that read the same rows share one object. A weight that no row reaches is left out.
    """
    sums = {reader.key: Sums.zeros(reader.groups, reader.size) for reader in group}
    nodes = {reader.key: reader.nodes for reader in group}
    names = sorted({source_of(node) for reader in group for node in reader.nodes})
    for values in stream(model, names, in_fixed_order(feeds)):
        for key, total in sums.items():
            for node in nodes[key]:
                total.add(rows(node, values[source_of(node)], row_limit(total.size, len(feeds))))
    made = {key: total.finish() for key, total in sums.items() if total.count}
    return {reader.tensor: made[reader.key] for reader in group if reader.key in made}


def row_limit(size: int, batches: int) -> int:
    """Rows of K = `size` numbers that one of so many batches contributes at most."""
    return -(-max(ROWS, ROWS_PER_COLUMN * size) // max(batches, 1))


def in_fixed_order(feeds: Sequence[Feeds]) -> list[Feeds]:
    """The batches in the order of the SHA-256 of what they hold."""
    return sorted(feeds, key=_digest)


def fixed_sample(feeds: Iterable[Feeds], count: int) -> list[Feeds]:
    """So many batches, the same ones for any order of the batches: those with the smallest SHA-256."""
    return heapq.nsmallest(count, feeds, key=_digest)


def _digest(feed: Feeds) -> bytes:
    found = hashlib.sha256()
    for name in sorted(feed):
        found.update(f"{name} {feed[name].dtype} {feed[name].shape}".encode())
        found.update(np.ascontiguousarray(feed[name]).tobytes())
    return found.digest()


def source_of(node: ir.Node) -> str:
    """Name of the activation that a node reads."""
    value = node.inputs[ops.WEIGHT_USES[node.op_type].activation_input or 0]
    return (value.name if value is not None else None) or ""


def _geometry(node: ir.Node) -> tuple[object, ...]:
    """Which rows a node cuts out of which value."""
    if node.op_type != "Conv":
        return (source_of(node),)
    names = ("strides", "dilations", "pads")
    numbers = tuple(tuple(node.attributes.get_ints(name, ())) for name in names)
    return (source_of(node), ops.kernel_shape(node), ops.conv_group(node), *numbers)


@dataclass
class Sums:
    """Running sums of one set of rows: second f64 [G, K, K], first and absolute f64 [G, K]; peak f32 [G, K].

    `count` is the number of rows, `weight` the sum of what they count.
    """

    second: npt.NDArray[np.float64]
    first: npt.NDArray[np.float64]
    absolute: npt.NDArray[np.float64]
    peak: npt.NDArray[np.float32]
    count: int = 0
    weight: float = 0.0

    @property
    def size(self) -> int:
        """K."""
        return int(self.second.shape[1])

    @classmethod
    def zeros(cls, groups: int, size: int) -> Sums:
        """Nothing added yet."""
        rows = (groups, size)
        return cls(np.zeros((*rows, size)), np.zeros(rows), np.zeros(rows), np.zeros(rows, np.float32))

    def add(self, found: Array, shares: Array | None = None) -> None:
        """Take in rows f32 [G, rows, K] with what they count f32 [rows]; rows that are not finite are left out."""
        if not all_finite(found):
            finite = np.isfinite(found).all(axis=(0, 2))
            found, shares = found[:, finite], None if shares is None else shares[finite]
        shares = weights(found) if shares is None else shares
        for start in range(0, found.shape[1], CHUNK):
            part, share = found[:, start : start + CHUNK], shares[start : start + CHUNK]
            scaled = part if (share == 1).all() else part * np.sqrt(share)[:, None]
            self.second += scaled.transpose(0, 2, 1) @ scaled
            self.first += (share[None] @ part)[:, 0]
            magnitude = np.abs(part)
            self.absolute += (share[None] @ magnitude)[:, 0]
            np.maximum(self.peak, magnitude.max(axis=1), out=self.peak)
            self.count += part.shape[1]
            self.weight += float(share.sum(dtype=np.float64))

    def plus(self, other: Sums) -> Sums:
        """The sums over the rows of both."""
        peak, count, weight = np.maximum(self.peak, other.peak), self.count + other.count, self.weight + other.weight
        both = self.second + other.second, self.first + other.first, self.absolute + other.absolute
        return Sums(*both, peak, count, weight)

    def finish(self) -> InputMoments:
        """The sums over what the rows count."""
        arrays = (self.second, self.first, self.absolute)
        second, mean, mean_abs = ((total / self.weight).astype(np.float32) for total in arrays)
        return InputMoments(second, mean, mean_abs, self.peak, self.count)


def all_finite(found: Array) -> bool:
    """Whether no number of f32 [...] is infinite or NaN: then their sum in float64 is a number."""
    with np.errstate(invalid="ignore"):
        return bool(np.isfinite(found.sum(dtype=np.float64)))


def weights(found: Array) -> npt.NDArray[np.float32]:
    """What each of the rows f32 [G, rows, K] of a batch counts, f32 [rows]: 1, or less where it holds too much.

    A row with energy e counts min(1, c / e), where c is LIMIT times the mean of min(e, c). Where one row in LIMIT or
    more holds that much, nothing is cut.
    """
    energy = np.einsum("grk,grk->r", found, found, dtype=np.float64)
    most = np.inf
    for _ in range(ROUNDS):
        lower = LIMIT * np.minimum(energy, most).mean() if energy.size else 0.0
        if not lower < most:
            break
        most = lower
    return np.asarray(np.divide(most, energy, out=np.ones_like(energy), where=energy > most), np.float32)
