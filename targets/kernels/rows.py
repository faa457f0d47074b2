"""Which row of the activation a kernel reads for an output row and a tap: the only difference of a convolution.

A row is a vector of C channels. The activation of a convolution has its border already in memory: int8 codes lie
as [B, H + top + bottom, W + left + right, Cp] with a border of zero codes, zero scales and zero sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from tvm import tirx

from kbitc.targets.kernels import vector as v
from kbitc.targets.lower.contraction import ConvAttributes

Expr = Any
Dim = Any


@dataclass(frozen=True)
class MatmulRows:
    """Rows of a matrix [*lead, C].

    Attributes:
        lead: leading dimensions, ints or int64 expressions.
    """

    lead: tuple[Dim, ...]

    def with_dims(self, dims: Callable[[Dim], Dim]) -> MatmulRows:
        """The same with the kernel's own variables for symbolic dimensions."""
        return MatmulRows(tuple(dims(d) for d in self.lead))

    @property
    def count(self) -> Dim:
        """M, the number of output rows."""
        return v.product(self.lead)

    @property
    def least(self) -> int:
        """Rows that there are if there are any."""
        return _least(self.lead)

    @property
    def source_shape(self) -> tuple[Dim, ...]:
        """Leading dimensions of the activation."""
        return self.lead

    @property
    def source_rows(self) -> Dim:
        """Rows of the activation."""
        return self.count

    @property
    def out_shape(self) -> tuple[Dim, ...]:
        """Leading dimensions of the output."""
        return self.lead

    def base(self, row: Expr) -> Expr:
        """Row of the activation for output row `row` at tap 0."""
        return row

    def tap_offset(self, tap: Expr) -> Expr:
        """What tap adds to `base`."""
        return v.i64(0)


def unknown_size(shape: Sequence[Dim]) -> bool:
    """Whether the height or the width of [B, H, W] is only known at run time."""
    return not all(isinstance(dim, int) for dim in shape[1:])


def padded_size(pads: tuple[int, int, int, int]) -> tuple[tuple[Dim, Dim], tuple[Dim, Dim]]:
    """Variables for (height, width) of an image, and (height, width) with its border; only for sizes of run time.

    The length of a line of bytes does not tell them, so a kernel takes the image without its border as an argument.
    """
    height, width = (tirx.Var(name, "int64") for name in ("image_height", "image_width"))
    top, left, bottom, right = pads
    return (height, width), (top + height + bottom, left + width + right)


@dataclass(frozen=True)
class ConvRows:
    """Pixels of a convolution's window.

    Attributes:
        batch: images.
        padded_height, padded_width: of the activation with its border.
        out_height, out_width: of the output.
        attributes: geometry.
    """

    batch: Dim
    padded_height: Dim
    padded_width: Dim
    out_height: Dim
    out_width: Dim
    attributes: ConvAttributes

    def with_dims(self, dims: Callable[[Dim], Dim]) -> ConvRows:
        """The same with the kernel's own variables for symbolic dimensions."""
        return replace(
            self,
            batch=dims(self.batch),
            padded_height=dims(self.padded_height),
            padded_width=dims(self.padded_width),
            out_height=dims(self.out_height),
            out_width=dims(self.out_width),
        )

    @property
    def count(self) -> Dim:
        """M, the number of output pixels."""
        return v.product(self.out_shape)

    @property
    def least(self) -> int:
        """Pixels that there are if there are any."""
        return _least(self.out_shape)

    @property
    def source_shape(self) -> tuple[Dim, ...]:
        """Leading dimensions of the activation with its border."""
        return self.batch, self.padded_height, self.padded_width

    @property
    def source_rows(self) -> Dim:
        """Pixels of the activation with its border."""
        return v.product(self.source_shape)

    @property
    def out_shape(self) -> tuple[Dim, ...]:
        """Leading dimensions of the output."""
        return self.batch, self.out_height, self.out_width

    def base(self, row: Expr) -> Expr:
        """Pixel of the bordered activation under the first tap of output pixel `row`."""
        stride_y, stride_x = self.attributes.strides
        x = row % self.out_width
        line = row // self.out_width
        y = line % self.out_height
        image = line // self.out_height
        return (image * self.padded_height + y * stride_y) * self.padded_width + x * stride_x

    def tap_offset(self, tap: Expr) -> Expr:
        """Pixels from the first tap to tap `tap`."""
        across = self.attributes.kernel[1]
        down_step, across_step = self.attributes.dilations
        return (tap // across) * (down_step * self.padded_width) + (tap % across) * across_step


def _least(shape: tuple[Dim, ...]) -> int:
    return prod(dim for dim in shape if isinstance(dim, int))
