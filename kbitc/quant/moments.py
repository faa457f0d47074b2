"""First and second moments of what a weight is multiplied with: all that a solver needs to know of the data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class InputMoments:
    """Moments of the unfolded inputs of one weight [N, T, C].

    A row x of K = T * C numbers, in the order (tap, channel) of the weight's view, is what one output channel's
    weights are multiplied with. A convolution with G groups sees G different rows; everywhere else G = 1.
    With the error D [N, K] of a quantized weight, the mean squared error of output channel n is D_n second D_n^T.

    Attributes:
        second: f32 [G, K, K], E[x x^T] (not centred).
        mean: f32 [G, K], E[x].
        mean_abs: f32 [G, K], E[|x|].
        peak: f32 [G, K], max |x|.
        count: number of rows behind the means.
    """

    second: FloatArray
    mean: FloatArray
    mean_abs: FloatArray
    peak: FloatArray
    count: int

    @property
    def groups(self) -> int:
        """G."""
        return int(self.second.shape[0])

    @property
    def power(self) -> FloatArray:
        """E[x^2], f32 [G, K]: the diagonal of `second`."""
        return np.ascontiguousarray(np.diagonal(self.second, axis1=1, axis2=2))

    def never_negative(self, weight: FloatArray) -> bool:
        """Whether no number seen and no weight f32 [N, T, C] is below zero, as in a bank of filters over energies."""
        return bool(np.all(weight >= 0) and np.all(self.mean >= self.mean_abs))

    def shrunk(self) -> InputMoments:
        """The same with E[x_i x_j], i != j, times count / (count + K).

        From few rows the products of different inputs are mostly chance, and a solver that moves errors along them
        fits the samples, not the data: a fixed form of shrinkage to the diagonal (Ledoit and Wolf, 2004).
        """
        size = self.second.shape[1]
        second = self.second * np.float32(self.count / (self.count + size))
        inside = np.arange(size)
        second[:, inside, inside] = self.power
        return replace(self, second=second)

    def output_power(self, weight: FloatArray) -> npt.NDArray[np.float64]:
        """E[(w_n x)^2] of every output channel, f64 [N]; of an error W - Wq, the mean squared error that it makes.

        Args:
            weight: f32 [N, T, C].
        """
        rows = weight.shape[0]
        grouped = weight.reshape(self.groups, rows // self.groups, -1)
        power = np.einsum("gnk,gnk->gn", grouped @ self.second, grouped, dtype=np.float64)
        return np.asarray(power, np.float64).reshape(rows)
