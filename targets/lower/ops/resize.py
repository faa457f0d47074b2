"""Resize: nearest, linear and cubic interpolation along any axes, channels first or last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from tvm import tirx

from kbitc.targets.lower import attributes, dims, scalar
from kbitc.targets.lower.attributes import axis_of, known, known_dims
from kbitc.targets.lower.broadcast import REPEATED_COST
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.contraction import Dim
from kbitc.targets.lower.group import Group
from kbitc.targets.lower.known import is_expression
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Expr, Index, Lazy, Value

Tap = tuple[Expr, Expr]  # (input index, weight)
HALF_PIXEL = ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric")


@dataclass(frozen=True)
class Axis:
    """The resizing of one axis.

    Attributes:
        size, out: dimension before and after.
        scale: out / in, a float or a float32 expression.
    """

    size: Dim
    out: Dim
    scale: Any

    def scale_expression(self) -> Expr:
        """The scale as a float32 expression."""
        return self.scale if is_expression(self.scale) else tirx.const(float(self.scale), "float32")


def resize(ctx: Context, node: ir.Node) -> Value:
    """Resize, and kbitc.core::ResizeNHWC: scales, sizes and axes follow the order of the data's axes."""
    source = attributes.value(ctx, node, 0)
    _check(node)
    axes = _axes(ctx, node, source.shape)
    if not axes:
        return source
    lazy = ctx.lazy(source)
    if lazy.cost > REPEATED_COST:
        lazy = ctx.lazy(ctx.tensor(lazy))
    shape = tuple(axes[axis].out if axis in axes else dim for axis, dim in enumerate(source.shape))
    return _interpolate(node, lazy, axes, shape)


def _check(node: ir.Node) -> None:
    mode = node.attributes.get_string("mode", "nearest")
    if mode not in ("nearest", "linear", "cubic"):
        raise refuse(node, "unknown mode of Resize", got=mode)
    coordinates = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if coordinates not in (*HALF_PIXEL, "asymmetric", "align_corners"):
        raise refuse(node, "coordinate_transformation_mode cannot be compiled", got=coordinates)
    if node.attributes.get_int("antialias", 0) == 1:
        raise refuse(node, "Resize with antialias cannot be compiled")
    if node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise refuse(node, "keep_aspect_ratio_policy cannot be compiled", remedy="write the sizes that it gives")


def _axes(ctx: Context, node: ir.Node, shape: Sequence[Dim]) -> dict[int, Axis]:
    """The axes that change."""
    rank = len(shape)
    given = node.attributes.get_ints("axes")
    places = range(rank) if given is None else [axis_of(node, int(axis), rank) for axis in given]
    sizes = known_dims(ctx, node, 3, "the sizes of a Resize")
    scales = known(ctx, node, 2 if len(node.inputs) != 2 else 1, "the scales of a Resize")
    result: dict[int, Axis] = {}
    if sizes is not None and len(sizes) > 0:
        for place, size in zip(places, sizes, strict=True):
            if not dims.equal(size, shape[place]):
                result[place] = Axis(shape[place], size, _ratio(size, shape[place]))
        return result
    if scales is None or scales.size == 0:
        raise refuse(node, "Resize needs scales or sizes", remedy="repair the model")
    for place, scale in zip(places, scales.reshape(-1).tolist(), strict=True):
        if is_expression(scale) or float(scale) != 1.0:
            result[place] = Axis(shape[place], _scaled(shape[place], scale), scale)
    return result


def _ratio(out: Dim, size: Dim) -> Any:
    if dims.is_static(out) and dims.is_static(size):
        return out / size if size else 1.0
    quotient = dims.divide_exactly([out], [size]) if not dims.is_static(size) else None
    if isinstance(quotient, int) and quotient > 0 and dims.equal(dims.simplify(size * quotient), out):
        return float(quotient)
    return tirx.Cast("float32", dims.expression(out)) / tirx.Cast("float32", dims.expression(size))


def _scaled(size: Dim, scale: Any) -> Dim:
    """floor(size * scale)."""
    if not is_expression(scale):
        if dims.is_static(size):
            return int(size * float(scale))
        if float(scale).is_integer():
            return dims.product([size, int(scale)])
        scale = tirx.const(float(scale), "float32")
    product = tirx.Cast("float32", dims.expression(size)) * scale
    return tirx.Cast("int64", tirx.floor(product))


def _interpolate(node: ir.Node, source: Lazy, axes: dict[int, Axis], shape: tuple[Dim, ...]) -> Lazy:
    mode = node.attributes.get_string("mode", "nearest")
    taps = {"nearest": _nearest, "linear": _linear, "cubic": _cubic}[mode]
    dtype = source.dtype
    wide = dtype if mode == "nearest" or dtype == "float64" else "float32"
    count = {"nearest": 1, "linear": 2, "cubic": 4}[mode] ** len(axes)

    def element(group: Group, indices: Sequence[Index]) -> Expr:
        chosen = [(axis, taps(node, axes[axis], indices[axis])) for axis in sorted(axes)]
        value = _sum_taps(group, source, list(indices), chosen, wide)
        if scalar.dtype_of(value) != dtype and not dtype.startswith(("float", "bfloat")):
            value = tirx.nearbyint(value) if mode != "nearest" else value
        return scalar.cast(value, dtype)

    return Lazy(element, shape, dtype, source.cost + 4 * count, pointwise=False)


def _sum_taps(
    group: Group, source: Lazy, indices: list[Index], chosen: Sequence[tuple[int, Sequence[Tap]]], wide: str
) -> Expr:
    """The weighted sum over the taps of all axes, the first axis outermost."""
    if not chosen:
        return scalar.cast(source.element(group, indices), wide)
    (axis, taps), rest = chosen[0], chosen[1:]
    total = None
    for place, weight in taps:
        own = [*indices[:axis], place, *indices[axis + 1 :]]
        value = _sum_taps(group, source, own, rest, wide)
        if len(taps) > 1:
            value = value * scalar.cast(weight, wide)
        total = value if total is None else total + value
    return total


def _coordinate(node: ir.Node, axis: Axis, index: Index) -> Expr:
    """Position in the input of an output index, as float32."""
    mode = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    x = tirx.Cast("float32", index)
    half = tirx.const(0.5, "float32")
    scale = axis.scale_expression()
    if mode == "asymmetric":
        return x / scale
    if mode == "align_corners":
        out, size = (tirx.Cast("float32", dims.expression(dims.simplify(d - 1))) for d in (axis.out, axis.size))
        safe = tirx.max(out, tirx.const(1.0, "float32"))
        return x * size / safe
    position = (x + half) / scale - half
    if mode == "half_pixel_symmetric":
        true_out = tirx.Cast("float32", dims.expression(axis.size)) * scale
        adjustment = tirx.Cast("float32", dims.expression(axis.out)) / true_out
        centre = tirx.Cast("float32", dims.expression(axis.size)) / tirx.const(2.0, "float32")
        return centre * (tirx.const(1.0, "float32") - adjustment) + position
    if mode == "pytorch_half_pixel":
        if dims.is_static(axis.out):
            return position if axis.out > 1 else tirx.const(0.0, "float32")
        return tirx.Select(dims.expression(axis.out) > 1, position, tirx.const(0.0, "float32"))
    return position


def _bounded(place: Expr, size: Dim) -> Expr:
    last = dims.expression(dims.simplify(size - 1))
    return tirx.max(tirx.min(place, last), dims.expression(0))


def _nearest(node: ir.Node, axis: Axis, index: Index) -> list[Tap]:
    rounding = node.attributes.get_string("nearest_mode", "round_prefer_floor")
    one = tirx.const(1.0, "float32")
    coordinates = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    whole = not is_expression(axis.scale) and float(axis.scale).is_integer() and float(axis.scale) >= 1.0
    centred = coordinates in ("half_pixel", "pytorch_half_pixel") and rounding.startswith("round")
    if whole and (centred or (coordinates == "asymmetric" and rounding == "floor")):
        return [(tirx.floordiv(index, int(axis.scale)), one)]
    position = _coordinate(node, axis, index)
    half = tirx.const(0.5, "float32")
    if rounding == "floor":
        place = tirx.floor(position)
    elif rounding == "ceil":
        place = tirx.ceil(position)
    elif rounding == "round_prefer_ceil":
        place = tirx.floor(position + half)
    else:
        place = tirx.ceil(position - half)
    return [(_bounded(tirx.Cast("int64", place), axis.size), one)]


def _linear(node: ir.Node, axis: Axis, index: Index) -> list[Tap]:
    position = _coordinate(node, axis, index)
    low = tirx.floor(position)
    fraction = position - low
    place = tirx.Cast("int64", low)
    if node.attributes.get_int("exclude_outside", 0) == 0:
        weights = [tirx.const(1.0, "float32") - fraction, fraction]
        return [(_bounded(place + k, axis.size), weight) for k, weight in enumerate(weights)]
    return _without_outside(axis, place, [tirx.const(1.0, "float32") - fraction, fraction], 0)


def _cubic(node: ir.Node, axis: Axis, index: Index) -> list[Tap]:
    """Keys' cubic convolution with coefficient a."""
    a = attributes.float_attribute(node, "cubic_coeff_a", -0.75)
    position = _coordinate(node, axis, index)
    low = tirx.floor(position)
    place = tirx.Cast("int64", low)
    s = position - low

    def const(value: float) -> Expr:
        return tirx.const(value, "float32")

    def near(t: Expr) -> Expr:
        return ((const(a + 2) * t - const(a + 3)) * t) * t + const(1.0)

    def far(t: Expr) -> Expr:
        return ((const(a) * t - const(5 * a)) * t + const(8 * a)) * t - const(4 * a)

    weights = [far(s + const(1.0)), near(s), near(const(1.0) - s), far(const(2.0) - s)]
    if node.attributes.get_int("exclude_outside", 0) == 1:
        return _without_outside(axis, place, weights, -1)
    return [(_bounded(place + (k - 1), axis.size), weight) for k, weight in enumerate(weights)]


def _without_outside(axis: Axis, place: Expr, weights: Sequence[Expr], first: int) -> list[Tap]:
    """Taps outside the input get weight 0, and the others are scaled so that they sum to 1."""
    size = dims.expression(axis.size)
    kept = []
    for k, weight in enumerate(weights):
        at = place + (k + first)
        kept.append(tirx.Select(tirx.And(at >= 0, at < size), weight, tirx.const(0.0, "float32")))
    total = sum(kept[1:], kept[0])
    return [(_bounded(place + (k + first), axis.size), weight / total) for k, weight in enumerate(kept)]


TABLE: dict[str, Callable[[Context, ir.Node], Any]] = {"Resize": resize}
CORE_TABLE: dict[str, Callable[[Context, ir.Node], Any]] = {"ResizeNHWC": resize}
