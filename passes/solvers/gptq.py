"""Rounds a weight column by column and lets the columns that are left make up for the error so far.

The layer's error is tr((W - Q) H (W - Q)^T) with H = E[x x^T] of its inputs. GPTQ (Frantar et al., arXiv 2210.17323,
equations 2 and 3) takes the columns in order and adds to the next ones what minimises that error. In the equivalent
form used here (LDLQ; Chee et al., arXiv 2307.13304, theorem 6): with H + damping = U D U^T, U unit upper triangular,

    q_k = nearest(w_k + sum_{i<k} (w_i - q_i) U_ik)        error = sum_k D_k (target_k - q_k)^2

needs no inverse. Scales (and zero points or offsets) are chosen anew for every block when its first column comes, on
the corrected weights, weighted with D_k. Order (`act_order`): blocks with the most input energy first, within a block
too; a block stays together.

H is shrunk towards its diagonal where there are few rows (`InputMoments.shrunk`).

`sweeps` rounds of coordinate descent follow (QuantEase, Behdin et al., arXiv 2309.01885, equation 9): alternately the
least-squares scale (and offset) of each block and the best code of each column, everything else fixed; neither can
raise the error. At the end each output channel keeps round to nearest where that is still better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kbitc.passes.solvers import mse_clip, rtn
from kbitc.passes.solvers._blocks import Affine, encode, fit_blocks, nearest, rebuilt, searchable, store
from kbitc.quant.format import Format
from kbitc.quant.moments import InputMoments
from kbitc.quant.scales import round_offsets
from kbitc.quant.scheme import Granularity, QuantScheme
from kbitc.quant.tensor import QTensor, blocks_of, spread

FloatArray = npt.NDArray[np.float32]
D = TypeVar("D", bound=np.generic)
#: What can be stored in place of a wanted number, or of the old one.
Storable = Callable[[FloatArray, FloatArray], FloatArray]
#: Share of the mean of H's diagonal that is added to it (GPTQ, section 3.3, step 3).
DAMPING = 0.01
#: Rounds of coordinate descent.
SWEEPS = 2
#: Columns whose corrections are applied together (GPTQ, section 3.3, step 2).
BATCH = 128


def solve(
    weight: FloatArray,
    scheme: QuantScheme,
    inputs: InputMoments | None = None,
    *,
    damping: float = DAMPING,
    act_order: bool = True,
    sweeps: int = SWEEPS,
) -> QTensor:
    """Quantize one weight.

    Args:
        weight: f32 [N, T, C], finite.
        scheme: what it becomes.
        inputs: moments of what it is multiplied with; without them this is `mse_clip`.
        damping: share of the mean input energy that regularises H.
        act_order: blocks with the most input energy first.
        sweeps: rounds of coordinate descent.
    """
    first = mse_clip.solve(weight, scheme, inputs)
    if inputs is None:
        return first
    problem = Columns.of(weight, first, inputs.shrunk(), act_order)
    problem.round_in_order(damping)
    for _ in range(sweeps):
        problem.refit_scales()
        problem.descend()
    return better_rows(weight, inputs, rtn.solve(weight, scheme, inputs), problem.tensor(first))


def better_rows(weight: FloatArray, inputs: InputMoments, plain: QTensor, found: QTensor) -> QTensor:
    """Each output channel from the one with the smaller error; the whole tensor where one scale serves all."""
    old, new = (inputs.output_power(weight - tensor.dequantize()) for tensor in (plain, found))
    if found.scheme.granularity is Granularity.TENSOR:
        return plain if old.sum() < new.sum() else found
    worse = (old < new)[:, None, None]
    codes = np.where(worse, plain.codes, found.codes)
    return rebuilt(found, codes, Affine.of(plain).where(worse, Affine.of(found)))


@dataclass
class Columns:
    """A weight column by column, in the order in which the columns are rounded.

    Attributes:
        weight: f32 [G, K, n], n = N / G output channels of each of G groups.
        error: f32 [G, K, n], weight minus value so far.
        codes: uint8 [G, K, n].
        affine: arrays of f32 [G, B, n] of the B blocks of a row.
        second: f32 [G, K, K].
        block: int [K], the block of each column.
        order: int [K], where each column was.
        shape: (N, T, C) of the weight.
    """

    weight: FloatArray
    error: FloatArray
    codes: npt.NDArray[np.uint8]
    affine: Affine
    second: FloatArray
    block: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]
    shape: tuple[int, int, int]
    data_type: Format
    scheme: QuantScheme

    @classmethod
    def of(cls, weight: FloatArray, first: QTensor, inputs: InputMoments, act_order: bool) -> Columns:
        """The columns with the scales and codes of `first`."""
        groups, shape, scheme = inputs.groups, first.shape, first.scheme
        block = column_blocks(shape, scheme)
        energy = inputs.power.mean(axis=0, dtype=np.float64)
        order = by_energy(energy, block) if act_order else np.arange(len(block))

        def turned(array: npt.NDArray[D]) -> npt.NDArray[D]:
            """[N, ...] or [1, ...] -> [G, the rest, n]."""
            wide = np.broadcast_to(array, (shape[0], *array.shape[1:]))
            return np.array(wide.reshape(groups, shape[0] // groups, -1).transpose(0, 2, 1), order="C")

        columns = np.asarray(turned(weight)[:, order], np.float32)
        error = np.asarray(turned(weight - first.dequantize())[:, order], np.float32)
        second = np.ascontiguousarray(inputs.second[:, order][:, :, order])
        return cls(
            columns, error, np.asarray(turned(first.codes)[:, order], np.uint8), Affine.of(first).each(turned), second,
            block[order], order, shape, first.format, scheme,
        )  # fmt: skip

    def tensor(self, first: QTensor) -> QTensor:
        """The result in the layout of `first`."""
        back = np.argsort(self.order)
        codes = self.codes[:, back].transpose(0, 2, 1).reshape(self.shape)
        affine = self.affine.each(lambda array: array.transpose(0, 2, 1).reshape(self.shape[0], -1))
        if self.scheme.granularity is Granularity.TENSOR:
            affine = affine.each(lambda array: array[:1])
        return rebuilt(first, np.ascontiguousarray(codes), affine)

    def round_in_order(self, damping: float) -> None:
        """The GPTQ pass over all columns."""
        feedback, pivots = factor(self.second, damping)
        size = self.weight.shape[1]
        self.error[:] = 0
        for start in range(0, size, BATCH):
            stop = min(size, start + BATCH)
            target = self._target(feedback, start, start, stop)
            for k in range(start, stop):
                if k == 0 or self.block[k - 1] != self.block[k]:
                    self._choose_scale(feedback, pivots, k, target[:, k - start :])
                self._round(k, target[:, k - start])
                target[:, k + 1 - start :] += feedback[:, k, k + 1 : stop, None] * self.error[:, k, None]

    def _target(self, feedback: FloatArray, known: int, start: int, stop: int) -> FloatArray:
        """Columns start..stop plus the corrections for the errors of the columns before `known`."""
        corrected = feedback[:, :known, start:stop].transpose(0, 2, 1) @ self.error[:, :known]
        return np.asarray(self.weight[:, start:stop] + corrected, np.float32)

    def _choose_scale(self, feedback: FloatArray, pivots: FloatArray, k: int, target: FloatArray) -> None:
        """Fit scale and zero point of the block that begins at column k to its corrected weights."""
        if self.scheme.granularity is not Granularity.BLOCK or not searchable(self.scheme):
            return
        block = self.block[k]
        stop = k + int((self.block == block).sum())
        if stop - k > target.shape[1]:
            target = self._target(feedback, k, k, stop)
        groups, _, rows = self.weight.shape
        weight = np.ascontiguousarray(target[:, : stop - k].transpose(0, 2, 1)).reshape(groups * rows, stop - k)
        importance = np.repeat(pivots[:, k:stop], rows, axis=0)
        known = nearest(weight, importance, self._of(block).each(lambda array: array.reshape(-1, 1)), self.data_type)
        best = fit_blocks(weight, importance, self.data_type, self.scheme, known)
        self._put(block, best.affine.each(lambda array: array.reshape(groups, rows)))

    def _of(self, block: np.int64) -> Affine:
        """Arrays [G, n] of one block."""
        return self.affine.each(lambda array: array[:, block])

    def _put(self, block: np.int64, affine: Affine) -> None:
        for held, array in zip(self.affine, affine, strict=True):
            if held is not None:
                held[:, block] = array

    def _round(self, k: int, target: FloatArray) -> FloatArray:
        """Give column k the codes nearest to `target` f32 [G, n]; returns by how much its error changed."""
        affine = self._of(self.block[k])
        codes = encode(target, affine, self.data_type)
        before = self.error[:, k].copy()
        self.codes[:, k] = codes
        self.error[:, k] = self.weight[:, k] - affine.values(self.data_type.grid.astype(np.float32)[codes])
        return np.asarray(self.error[:, k] - before, np.float32)

    def descend(self) -> None:
        """One round over all columns: the code that is best with every other column fixed."""
        size = self.weight.shape[1]
        diagonal = np.maximum(np.diagonal(self.second, axis1=1, axis2=2), np.finfo(np.float32).tiny)
        for start in range(0, size, BATCH):
            stop = min(size, start + BATCH)
            pull = self.second[:, start:stop] @ self.error
            for k in range(start, stop):
                others = pull[:, k - start] / diagonal[:, k, None] - self.error[:, k]
                change = self._round(k, np.asarray(self.weight[:, k] + others, np.float32))
                pull[:, k + 1 - start :] += self.second[:, k, k + 1 : stop, None] * change[:, None]

    def refit_scales(self) -> None:
        """The least-squares scale, then offset, of every block, one after the other, codes and other blocks fixed."""
        if self.scheme.granularity is Granularity.TENSOR or not searchable(self.scheme):
            return
        grid = self.data_type.grid.astype(np.float32)
        for block in np.unique(self.block):
            inside, affine = np.flatnonzero(self.block == block), self._of(block)
            levels = grid[self.codes[:, inside]] - affine.zeros[:, None]
            scales = self._step(inside, levels, affine.scales, partial(self._storable_scales, affine.steps))
            offsets = affine.offsets
            if offsets is not None:
                offsets = self._step(inside, np.ones_like(levels), offsets, self._storable_offsets)
            self._put(block, affine._replace(scales=scales, offsets=offsets))

    def _step(
        self, inside: npt.NDArray[np.int64], factors: FloatArray, old: FloatArray, storable: Storable
    ) -> FloatArray:
        """The best number s in place of `old` f32 [G, n], by which the values of some columns grow as factors * s.

        The error as a function of s is a parabola: with factors q [G, columns, n] and e the errors of the row, it
        changes by d^2 q H q - 2 d q H e for s + d; d is taken where the stored number still lowers it.
        """
        slope = (factors * (self.second[:, inside] @ self.error)).sum(axis=1)
        curve = (factors * (self.second[:, inside][:, :, inside] @ factors)).sum(axis=1)
        wanted = storable(np.asarray(old + slope / np.where(curve > 0, curve, 1), np.float32), old)
        step = wanted - old
        step = np.where(step * (step * curve - 2 * slope) < 0, step, np.float32(0))
        self.error[:, inside] -= step[:, None] * factors
        return np.where(step != 0, wanted, old)

    def _storable_scales(self, steps: FloatArray | None, wanted: FloatArray, old: FloatArray) -> FloatArray:
        return store(np.asarray(np.where(wanted * old > 0, wanted, old), np.float32), self.scheme, steps)

    def _storable_offsets(self, wanted: FloatArray, old: FloatArray) -> FloatArray:
        return round_offsets(wanted, self.scheme.scale_type)


def column_blocks(shape: tuple[int, int, int], scheme: QuantScheme) -> npt.NDArray[np.int64]:
    """The block that each of the K = T * C columns belongs to, int64 [K]."""
    _, taps, channels = shape
    if scheme.granularity is not Granularity.BLOCK:
        return np.zeros(taps * channels, np.int64)
    count = blocks_of(channels, scheme)
    numbers = np.arange(taps * count, dtype=np.int64).reshape(1, taps, count)
    return spread(numbers, (1, taps, channels), scheme).reshape(-1)


def by_energy(energy: npt.NDArray[np.float64], block: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Columns by falling energy, blocks by falling mean energy, a block in one piece."""
    mean = np.bincount(block, energy) / np.bincount(block)
    return np.lexsort((-energy, block, -mean[block]))


def factor(second: FloatArray, damping: float) -> tuple[FloatArray, FloatArray]:
    """U and D with second + damping * mean diagonal = U D U^T.

    Args:
        second: f32 [G, K, K], symmetric, positive semidefinite.
        damping: share of the mean diagonal that is added.

    Returns:
        U f32 [G, K, K], unit upper triangular, and D f32 [G, K].
    """
    matrix = second.astype(np.float64)
    mean = np.diagonal(matrix, axis1=1, axis2=2).mean(axis=1)
    floor = np.where(mean > 0, damping * mean, 1.0)
    matrix += floor[:, None, None] * np.eye(matrix.shape[1])
    # The Cholesky factor of the matrix with its axes reversed, reversed back, is upper triangular.
    upper = np.linalg.cholesky(matrix[:, ::-1, ::-1])[:, ::-1, ::-1]
    pivots = np.diagonal(upper, axis1=1, axis2=2)
    return np.asarray(upper / pivots[:, None, :], np.float32), np.asarray(pivots**2, np.float32)
