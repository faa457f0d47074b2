"""What operators of the standard compute that ONNX gives no body: Fourier transforms, GridSample, ReverseSequence.

Each function takes the node and gives the statements of its body in ONNX's text form, or None for a form that is not
known here or not yet: it stays, and is refused later, by name.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.ops import WAVES
from kbitc.passes.canonicalize.body_text import ints, number
from kbitc.passes.canonicalize.contrib_quantized import Statements, has

_REAL, _COMPLEX = 1, 2
_COSINES, _SINES = f"{WAVES}_cosines", f"{WAVES}_sines"


def _span(name: str, count: int) -> str:
    """0, 1, ... count - 1."""
    ends = f"{name}_zero = Constant<value_int = 0>() {name}_count = Constant<value_int = {count}>()"
    return f"{ends} {name}_one = Constant<value_int = 1>() {name} = Range({name}_zero, {name}_count, {name}_one)"


def _waves(times: int, bins: int, length: int) -> str:
    """Cosines and sines f32 [times, bins] of 2 pi t f / length; t f modulo length stays exact."""
    return (
        f"{_span('t', times)} {_span('f', bins)} {ints('t_axis', 1)} t_up = Unsqueeze(t, t_axis) turns = Mul(t_up, f) "
        f"{ints('length', length)} part = Mod(turns, length) part_double = Cast<to = 11>(part) "
        f"step = Constant<value = double {{{2 * math.pi!r}}}>() "
        f"length_double = Cast<to = 11>(length) scaled = Mul(part_double, step) angle = Div(scaled, length_double) "
        f"angle_single = Cast<to = 1>(angle) {_COSINES} = Cos(angle_single) {_SINES} = Sin(angle_single)"
    )


def _dft(node: ir.Node) -> str | None:
    """DFT: input [..., n, ..., 1 or 2], length, axis; the sum over t of x[t] exp(-+2 pi i t f / length)."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    given = edit.integers(node.inputs[1]) if has(node, 1) else ()
    axis = edit.integers(node.inputs[2]) if has(node, 2) else (node.attributes.get_int("axis", -2),)
    if shape is None or given is None or not axis:
        return None
    rank, parts = len(shape), shape[-1]
    place = axis[0] % rank
    size = shape[place]
    inverse, onesided = (bool(node.attributes.get_int(name, 0)) for name in ("inverse", "onesided"))
    if not isinstance(size, int) or parts not in (_REAL, _COMPLEX) or place == rank - 1 or (inverse and onesided):
        return None
    length = given[0] if given else size
    bins, used = (length // 2 + 1 if onesided else length), min(size, length)
    order = [axis for axis in range(rank - 1) if axis != place] + [place]
    back = [order.index(axis) for axis in range(rank - 1)] + [rank - 1]
    body = [_waves(used, bins, length), ints("last", -1), ints("zero", 0), ints("used", used), ints("time", place)]
    body.append("cut = Slice(i0, zero, used, time)")
    sign, scale = (1.0, 1 / length) if inverse else (-1.0, 1.0)
    body += [number("scale", scale), number("turn", sign * scale)]
    body += [f"{WAVES}_cos = Mul({_COSINES}, scale)", f"{WAVES}_sin = Mul({_SINES}, turn)"]
    plain = parts == _REAL
    for index, name in enumerate(("real",) if plain else ("real", "imaginary")):
        body.append(f"{ints(f'{name}_at', index)} {ints(f'{name}_end', index + 1)}")
        body.append(f"{name}_cut = Slice(cut, {name}_at, {name}_end, last) {name}_flat = Squeeze({name}_cut, last)")
        body.append(f"{name} = Transpose<perm = {order}>({name}_flat)")
        body += [f"{name}_cos = MatMul({name}, {WAVES}_cos)", f"{name}_sin = MatMul({name}, {WAVES}_sin)"]
    body.append("re = Identity(real_cos)" if plain else "re = Sub(real_cos, imaginary_sin)")
    body.append("im = Identity(real_sin)" if plain else "im = Add(real_sin, imaginary_cos)")
    body.append("re_up = Unsqueeze(re, last) im_up = Unsqueeze(im, last) both = Concat<axis = -1>(re_up, im_up)")
    return " ".join([*body, f"o0 = Transpose<perm = {back}>(both)"])


def _stft(node: ir.Node) -> str | None:
    """STFT of a real signal [B, L] or [B, L, 1]: step, window, length; a convolution with windowed waves."""
    signal = node.inputs[0].shape if node.inputs[0] is not None else None
    step, given = (edit.integers(node.inputs[index]) if has(node, index) else None for index in (1, 3))
    window = edit.static_shape(node.inputs[2]) if has(node, 2) else None
    length = given[0] if given else (window[0] if window else 0)
    if signal is None or not step or not length or (has(node, 2) and edit.constant(node.inputs[2]) is None):
        return None
    if len(signal) > 3 or (len(signal) == 3 and signal[2] != _REAL) or (window is not None and window[0] != length):
        return None
    bins = length // 2 + 1 if node.attributes.get_int("onesided", 1) else length
    body = [_waves(length, bins, length), f"falling = Neg({_SINES}) both = Concat<axis = 1>({_COSINES}, falling)"]
    body.append("rows = Transpose<perm = [1, 0]>(both)")
    body.append("shaped = Mul(rows, i2)" if has(node, 2) else "shaped = Identity(rows)")
    body.append(f"{ints('one', 1)} {WAVES}_kernel = Unsqueeze(shaped, one) {ints('flat', 0, 1, -1)}")
    body.append(f"line = Reshape(i0, flat) found = Conv<strides = [{step[0]}]>(line, {WAVES}_kernel)")
    body.append(f"{ints('split', 0, 2, bins, -1)} apart = Reshape(found, split)")
    return " ".join([*body, "o0 = Transpose<perm = [0, 3, 2, 1]>(apart)"])


def _reverse_sequence(node: ir.Node) -> str | None:
    """ReverseSequence: the first lengths[b] steps of sequence b turned round."""
    rank = edit.rank(node.inputs[0])
    time, batch = (node.attributes.get_int(name, default) for name, default in (("time_axis", 0), ("batch_axis", 1)))
    if rank is None or {time, batch} != {0, 1}:
        return None
    rest = list(range(2, rank))
    body = [
        f"size = Shape<start = {time}, end = {time + 1}>(i0) count = Squeeze(size) zero = Constant<value_int = 0>() "
        "one = Constant<value_int = 1>() steps = Range(zero, count, one)",
        f"{ints('step_axis', 1 - time)} {ints('length_axis', 1 - batch)} at = Unsqueeze(steps, step_axis)",
        "long = Cast<to = 7>(i1) length = Unsqueeze(long, length_axis) last = Sub(length, one) turned = Sub(last, at)",
        "inside = Less(at, length) from = Where(inside, turned, at)",
        f"{ints('rest', *rest)} from_up = Unsqueeze(from, rest)" if rest else "from_up = Identity(from)",
        f"whole = Shape(i0) places = Expand(from_up, whole) o0 = GatherElements<axis = {time}>(i0, places)",
    ]
    return " ".join(body)


def _grid_sample(node: ir.Node) -> str | None:
    """GridSample of images [N, C, H, W] at grid [N, h, w, 2] of x and y from -1 to 1: nearest or bilinear."""
    mode, padding = (node.attributes.get_string(name, "") for name in ("mode", "padding_mode"))
    if edit.rank(node.inputs[0]) != 4 or mode not in ("", "linear", "bilinear", "nearest"):
        return None
    corners = bool(node.attributes.get_int("align_corners", 0))
    body = [
        f"{number('unit', 1.0)} {number('half', 0.5)} {number('zero', 0.0)} {number('two', 2.0)} {ints('last', -1)}",
        "images = Transpose<perm = [0, 2, 3, 1]>(i0) "
        f"{ints('x_place', 0)} {ints('y_place', 1)} gx = Gather<axis = -1>(i1, x_place) "
        "gy = Gather<axis = -1>(i1, y_place)",
    ]
    for name, axis in (("x", 3), ("y", 2)):
        body += [
            f"{name}_dim = Shape<start = {axis}, end = {axis + 1}>(i0) {name}_size = Cast<to = 1>({name}_dim)",
            f"{name}_top = Sub({name}_size, unit) {name}_from = Add(g{name}, unit)",
        ]
        if corners:
            body.append(f"{name}_long = Mul({name}_from, {name}_top) {name}_plain = Mul({name}_long, half)")
        else:
            body.append(f"{name}_long = Mul({name}_from, {name}_size) {name}_less = Sub({name}_long, unit)")
            body.append(f"{name}_plain = Mul({name}_less, half)")
        body.append(_padded(name, padding or "zeros", corners))
    masked = padding in ("", "zeros")
    if mode == "nearest":
        body.append("x0 = Round(x) y0 = Round(y)")
        return " ".join([*body, _corner("o", "x0", "y0", masked), "o0 = Transpose<perm = [0, 3, 1, 2]>(o_seen)"])
    body.append("x0 = Floor(x) y0 = Floor(y) x1 = Add(x0, unit) y1 = Add(y0, unit)")
    body.append("wx1 = Sub(x, x0) wy1 = Sub(y, y0) wx0 = Sub(unit, wx1) wy0 = Sub(unit, wy1)")
    for row in "01":
        for column in "01":
            name = f"c{row}{column}"
            body.append(_corner(name, f"x{column}", f"y{row}", masked))
            body.append(f"{name}_weight = Mul(wy{row}, wx{column}) {name}_share = Mul({name}_seen, {name}_weight)")
    body.append("upper = Add(c00_share, c01_share) lower = Add(c10_share, c11_share) sum = Add(upper, lower)")
    return " ".join([*body, "o0 = Transpose<perm = [0, 3, 1, 2]>(sum)"])


def _padded(name: str, padding: str, corners: bool) -> str:
    """Coordinate `name` from `name`_plain: clipped to the image, or mirrored at its borders first."""
    clip = f"{name} = Clip({name}_inner, zero, {name}_top_flat)"
    flat = f"{name}_top_flat = Squeeze({name}_top)"
    if padding == "zeros":
        return f"{name} = Identity({name}_plain)"
    if padding == "border":
        return f"{flat} {name}_inner = Identity({name}_plain) {clip}"
    # Mirrors stand on the outermost pixels, or half a pixel outside them.
    low, span = ("zero", f"{name}_top") if corners else ("edge", f"{name}_size")
    return (
        f"edge_{name} = Neg(half) {name}_low = Identity({'zero' if low == 'zero' else f'edge_{name}'}) "
        f"{name}_off = Sub({name}_plain, {name}_low) {name}_far = Abs({name}_off) {name}_double = Mul({span}, two) "
        f"{name}_floor = Max({name}_double, unit) {name}_part = Mod<fmod = 1>({name}_far, {name}_floor) "
        f"{name}_rest = Sub({name}_double, {name}_part) {name}_near = Min({name}_part, {name}_rest) "
        f"{name}_inner = Add({name}_near, {name}_low) {flat} {clip}"
    )


def _corner(name: str, x: str, y: str, masked: bool) -> str:
    """`name`_seen [N, h, w, C]: the pixel at whole coordinates; zero outside the image when `masked`."""
    parts = []
    for axis, value in (("x", x), ("y", y)):
        clipped = f"{name}_{axis}_low = Max({value}, zero) {name}_{axis}_in = Min({name}_{axis}_low, {axis}_top)"
        parts.append(f"{clipped} {name}_{axis}_at = Cast<to = 7>({name}_{axis}_in)")
    parts.append(f"{name}_at = Concat<axis = -1>({name}_y_at, {name}_x_at)")
    if not masked:
        return " ".join([*parts, f"{name}_seen = GatherND<batch_dims = 1>(images, {name}_at)"])
    parts.append(f"{name}_pixel = GatherND<batch_dims = 1>(images, {name}_at)")
    parts += [f"{name}_{axis}_same = Equal({name}_{axis}_in, {value})" for axis, value in (("x", x), ("y", y))]
    parts.append(f"{name}_inside = And({name}_x_same, {name}_y_same)")
    return " ".join([*parts, f"{name}_seen = Where({name}_inside, {name}_pixel, zero)"])


BODIES: dict[str, Statements] = {
    "DFT": _dft,
    "GridSample": _grid_sample,
    "ReverseSequence": _reverse_sequence,
    "STFT": _stft,
}
