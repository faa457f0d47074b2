"""The geometry of sliding windows: padding, output sizes, for convolutions and pools of any number of dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from tvm import tirx

from kbitc.targets.lower import dims
from kbitc.targets.lower.contraction import Dim
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Expr, Index


@dataclass(frozen=True)
class Window:
    """A window that slides over the spatial dimensions.

    Attributes:
        kernel, strides, dilations: one number a spatial dimension, in pixels.
        before, after: padding at the low and high end, in pixels.
        sizes: spatial dimensions of the input.
        out: spatial dimensions of the output.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[Dim, ...]
    after: tuple[Dim, ...]
    sizes: tuple[Dim, ...]
    out: tuple[Dim, ...]

    def positions(self, out: Sequence[Index], taps: Sequence[Index]) -> list[Expr]:
        """Input positions of the taps of an output pixel; they may lie in the padding."""
        result = []
        for axis, (o, k) in enumerate(zip(out, taps, strict=True)):
            place = o if self.strides[axis] == 1 else o * self.strides[axis]
            place = place + (k if self.dilations[axis] == 1 else k * self.dilations[axis])
            start = self.before[axis]
            result.append(place if isinstance(start, int) and start == 0 else place - start)
        return result

    def inside(self, positions: Sequence[Expr], low: Sequence[Dim] = (), high: Sequence[Dim] = ()) -> list[Expr]:
        """Conditions under which positions lie in the input; only those that can fail.

        Args:
            positions: of the input.
            low, high: widen the input by so many pixels on each side (for pools that count padding).
        """
        conditions = []
        for axis, place in enumerate(positions):
            under = low[axis] if low else 0
            over = high[axis] if high else 0
            if not _is_zero(dims.simplify(self.before[axis] - under)):
                conditions.append(place >= dims.expression(dims.simplify(0 - under)))
            if self._reaches(axis, over):
                conditions.append(place < dims.expression(dims.simplify(self.sizes[axis] + over)))
        return conditions

    def _reaches(self, axis: int, over: Dim) -> bool:
        """Whether the last window may reach behind size + over."""
        span = (self.kernel[axis] - 1) * self.dilations[axis] + 1
        last = dims.simplify((self.out[axis] - 1) * self.strides[axis] + span - self.before[axis])
        limit = dims.simplify(self.sizes[axis] + over)
        if isinstance(last, int) and isinstance(limit, int):
            return last > limit
        return not dims.provably(dims.expression(last) <= dims.expression(limit))


def _is_zero(dim: Dim) -> bool:
    return isinstance(dim, int) and dim == 0


def all_of(conditions: Sequence[Expr]) -> Expr | None:
    """The conjunction; None when there is nothing to check."""
    return tirx.all(*conditions) if conditions else None


def read_window(node: ir.Node, sizes: Sequence[Dim], kernel: Sequence[int], *, ceil_mode: bool = False) -> Window:
    """The window of a convolution or pool node.

    Args:
        node: read for strides, dilations, pads and auto_pad.
        sizes: spatial dimensions of the input.
        kernel: spatial dimensions of the window.
        ceil_mode: the last window may start inside and end outside.
    """
    rank = len(sizes)
    strides = _ints(node, "strides", [1] * rank)
    dilations = _ints(node, "dilations", [1] * rank)
    pads = _ints(node, "pads", [0] * (2 * rank))
    if not (len(kernel) == len(strides) == len(dilations) == rank and len(pads) == 2 * rank):
        raise refuse(
            node, "attributes do not fit the rank of the input", got=f"rank {rank + 2}", remedy="repair the model"
        )
    if min([*strides, *dilations, *kernel], default=1) < 1:
        raise refuse(node, "strides, dilations and kernel must be positive", remedy="repair the model")
    before: list[Dim] = list(pads[:rank])
    after: list[Dim] = list(pads[rank:])
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    out: list[Dim] = []
    for axis, size in enumerate(sizes):
        span = (kernel[axis] - 1) * dilations[axis] + 1
        if mode == "VALID":
            before[axis] = after[axis] = 0
        if mode in ("SAME_UPPER", "SAME_LOWER"):
            count = dims.ceil_divide(size, strides[axis])
            total = dims.maximum(0, dims.simplify((count - 1) * strides[axis] + span - size))
            small = dims.floor_divide(total, 2)
            large = dims.simplify(total - small)
            before[axis], after[axis] = (small, large) if mode == "SAME_UPPER" else (large, small)
            out.append(count)
            continue
        out.append(_windows(size, before[axis], after[axis], span, strides[axis], ceil_mode))
    _check_out(node, out, sizes)
    return Window(
        tuple(kernel), tuple(strides), tuple(dilations), tuple(before), tuple(after), tuple(sizes), tuple(out)
    )


def _windows(size: Dim, before: Dim, after: Dim, span: int, stride: int, ceil_mode: bool) -> Dim:
    room = dims.simplify(size + before + after - span)
    if not ceil_mode:
        return dims.simplify(dims.floor_divide(room, stride) + 1)
    count = dims.simplify(dims.ceil_divide(room, stride) + 1)
    # A window that would start in the padding behind the input is left out.
    starts = dims.simplify((count - 1) * stride)
    limit = dims.simplify(size + before)
    if isinstance(starts, int) and isinstance(limit, int):
        return count - 1 if starts >= limit else count
    return dims.simplify(tirx.Select(dims.expression(starts) >= dims.expression(limit), count - 1, count))


def _check_out(node: ir.Node, out: Sequence[Dim], sizes: Sequence[Dim]) -> None:
    if any(isinstance(dim, int) and dim < 1 for dim in out) and not any(_is_zero(size) for size in sizes):
        raise refuse(node, "the window is larger than its input", got=dims.text(sizes), remedy="use a larger --shape")


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    given = node.attributes.get_ints(name)
    return default if given is None else [int(item) for item in given]
