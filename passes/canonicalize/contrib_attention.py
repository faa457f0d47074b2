"""What onnxruntime's fused operators of transformers compute, as bodies of functions in standard operators.

ContribOperators.md of onnxruntime. Sizes: B sequences of S new tokens, P of them past, T = P + S; H heads of D numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from kbitc.graph import edit
from kbitc.passes.canonicalize.body_text import ints, number
from kbitc.passes.canonicalize.contrib_quantized import Statements, has

#: What a place that may not be seen gets in front of the softmax.
_LOWEST = float(np.finfo(np.float32).min)
_FILTER = -10000.0


def _size(node: ir.Node, index: int, axis: int) -> int | None:
    """A dim of an input, where it is a number."""
    value = node.inputs[index] if has(node, index) else None
    size = value.shape[axis] if value is not None and value.shape is not None else None
    return size if isinstance(size, int) else None


def _heads(name: str, source: str, count: int) -> str:
    """[B, S, count D] -> [B, count, S, D]."""
    shape = f"{ints(f'{name}_shape', 0, 0, count, -1)} {name}_cut = Reshape({source}, {name}_shape)"
    return f"{shape} {name} = Transpose<perm = [0, 2, 1, 3]>({name}_cut)"


def _flat(name: str, source: str) -> str:
    """[B, H, S, D] -> [B, S, H D]."""
    turned = f"{name}_turned = Transpose<perm = [0, 2, 1, 3]>({source})"
    return f"{turned} {ints(f'{name}_shape', 0, 0, -1)} {name} = Reshape({name}_turned, {name}_shape)"


def _places(name: str, value: str, axis: int) -> str:
    """0, 1, 2, ... as many as `value` has along an axis."""
    count = f"{name}_dim = Shape<start = {axis}, end = {axis + 1}>({value}) {name}_count = Squeeze({name}_dim)"
    ends = f"{name}_zero = Constant<value_int = 0>() {name}_one = Constant<value_int = 1>()"
    return f"{count} {ends} {name} = Range({name}_zero, {name}_count, {name}_one)"


def _causal(scores: str, queries: str, keys: str) -> str:
    """Hide what comes after a token from it: `scores`_seen."""
    return (
        f"{_places('rows', queries, 2)} {_places('columns', keys, 2)} past = Sub(columns_dim, rows_dim) "
        f"row = Add(rows, past) {ints('row_axis', 1)} row_up = Unsqueeze(row, row_axis) "
        f"after = Less(row_up, columns) {number('lowest', _LOWEST)} {scores}_seen = Where(after, lowest, {scores})"
    )


def _padding(node: ir.Node, index: int, keys: str, given: float) -> str | None:
    """`padding` [B, 1, 1, T] or [B, 1, S, T] to add, from a mask of zeros and ones or from lengths [B]."""
    value = node.inputs[index]
    size = edit.rank(value)
    fill = f"{number('fill', given)} {number('unit', 1.0)} {number('nothing', 0.0)}"
    ones = f"{fill} wide = Cast<to = 1>(i{index}) off = Sub(unit, wide) added = Mul(off, fill)"
    if size == 2:
        return f"{ones} {ints('padding_axes', 1, 2)} padding = Unsqueeze(added, padding_axes)"
    if size == 3:
        return f"{ones} {ints('padding_axes', 1)} padding = Unsqueeze(added, padding_axes)"
    batch = node.inputs[0].shape if node.inputs[0] is not None else None
    if size != 1 or value is None or value.shape is None or batch is None or value.shape[0] != batch[0]:
        return None
    return (
        f"{fill} {_places('keyed', keys, 2)} length = Cast<to = 7>(i{index}) {ints('length_axis', 1)} "
        "length_up = Unsqueeze(length, length_axis) inside = Less(keyed, length_up) "
        f"added = Where(inside, nothing, fill) {ints('padding_axes', 1, 2)} padding = Unsqueeze(added, padding_axes)"
    )


def _attend(scale: float, added: Sequence[str], causal: bool, softcap: float = 0.0) -> str:
    """o0 = softmax(scale q k^T + added) v of q, k and v, all [B, H, *, D]."""
    parts = [
        f"k_turned = Transpose<perm = [0, 1, 3, 2]>(k) raw = MatMul(q, k_turned) {number('scale', scale)}",
        "s0 = Mul(raw, scale)",
    ]
    last = "s0"
    for position, term in enumerate(added):
        parts.append(f"s{position + 1} = Add({last}, {term})")
        last = f"s{position + 1}"
    if causal:
        parts.append(_causal(last, "q", "k"))
        last += "_seen"
    parts.append(f"p = Softmax<axis = -1>({last}) context = MatMul(p, v) {_flat('o0', 'context')}")
    return " ".join(parts)


def _attention(node: ir.Node) -> str | None:
    """Attention: x, weights [*, 3 H D], bias, mask, past [2, B, H, P, D], bias of the scores."""
    heads, total = node.attributes.get_int("num_heads", 0), _size(node, 1, 1)
    if not heads or total is None or has(node, 6) or node.attributes.get_int("do_rotary", 0) > 0:
        return None
    sizes = list(node.attributes.get_ints("qkv_hidden_sizes", ())) or [total // 3] * 3
    parts = ["projected = MatMul(i0, i1)", f"moved = {'Add(projected, i2)' if has(node, 2) else 'Identity(projected)'}"]
    parts.append(f"{ints('sizes', *sizes)} q3, k3, v3 = Split<axis = -1>(moved, sizes)")
    parts += [_heads("q", "q3", heads), _heads("k_new", "k3", heads), _heads("v_new", "v3", heads)]
    parts.append(ints("first", 0))
    for place, name in enumerate("kv"):
        old = f"{name}_at = Constant<value_int = {place}>() {name}_old = Gather<axis = 0>(i4, {name}_at)"
        joined = f"{old} {name} = Concat<axis = 2>({name}_old, {name}_new)"
        parts.append(joined if has(node, 4) else f"{name} = Identity({name}_new)")
    if len(node.outputs) > 1:
        parts.append("k_up = Unsqueeze(k, first) v_up = Unsqueeze(v, first) o1 = Concat<axis = 0>(k_up, v_up)")
    added = _added(node, 3, 5, parts)
    if added is None:
        return None
    scale = node.attributes.get_float("scale", 0.0) or 1.0 / math.sqrt(sizes[0] // heads)
    parts.append(_attend(scale, added, bool(node.attributes.get_int("unidirectional", 0))))
    return " ".join(parts)


def _added(node: ir.Node, mask: int, bias: int, parts: list[str]) -> list[str] | None:
    """Names of what is added to the scores; their statements go to `parts`. None for a mask of another form."""
    added = []
    if has(node, mask):
        text = _padding(node, mask, "k", node.attributes.get_float("mask_filter_value", _FILTER))
        if text is None:
            return None
        parts.append(text)
        added.append("padding")
    return [*added, f"i{bias}"] if has(node, bias) else added


def _multi_head(node: ir.Node) -> str | None:
    """MultiHeadAttention: q, k, v, bias of all three, mask of keys, bias of the scores, past k and v."""
    heads, width = node.attributes.get_int("num_heads", 0), _size(node, 0, -1)
    ranks = [edit.rank(node.inputs[index]) if has(node, index) else None for index in range(3)]
    if not heads or width is None or ranks[0] != 3 or ranks[1] not in (3, 4) or ranks[1] != ranks[2]:
        return None
    if any(has(node, index) for index in (8, 9)) or len(node.outputs) > 3 or (ranks[1] == 4 and has(node, 3)):
        return None
    parts, names = [], ["i0", "i1", "i2"]
    if has(node, 3):
        inner = _size(node, 2, -1)
        if inner is None:
            return None
        parts.append(f"{ints('sizes', width, width, inner)} qb, kb, vb = Split<axis = 0>(i3, sizes)")
        parts.append("qm = Add(i0, qb) km = Add(i1, kb) vm = Add(i2, vb)")
        names = ["qm", "km", "vm"]
    parts.append(_heads("q", names[0], heads))
    for name, source, past in (("k", names[1], 6), ("v", names[2], 7)):
        made = _heads(f"{name}_new", source, heads) if ranks[1] == 3 else f"{name}_new = Identity({source})"
        joined = f"Concat<axis = 2>(i{past}, {name}_new)" if has(node, past) else f"Identity({name}_new)"
        parts.append(f"{made} {name} = {joined}")
    parts += [f"o{place} = Identity({name})" for place, name in ((1, "k"), (2, "v")) if place < len(node.outputs)]
    added = _added(node, 4, 5, parts)
    if added is None:
        return None
    scale = node.attributes.get_float("scale", 0.0) or 1.0 / math.sqrt(width // heads)
    parts.append(_attend(scale, added, bool(node.attributes.get_int("unidirectional", 0))))
    return " ".join(parts)


def _embedding(node: ir.Node) -> str:
    """EmbedLayerNormalization: LayerNorm(words + positions + segments), how many places the mask keeps, the sum."""
    parts = ["words = Gather<axis = 0>(i2, i0)"]
    if has(node, 8):
        parts.append("at = Identity(i8)")
    else:
        parts.append(_places("at", "i0", 1))
    parts.append("places = Gather<axis = 0>(i3, at) both = Add(words, places)")
    if has(node, 1) and has(node, 4):
        parts.append("segments = Gather<axis = 0>(i4, i1) total = Add(both, segments)")
    else:
        parts.append("total = Identity(both)")
    epsilon = node.attributes.get_float("epsilon", 1e-12)
    parts.append(f"o0 = LayerNormalization<axis = -1, epsilon = {epsilon!r}>(total, i5, i6)")
    if len(node.outputs) > 1:
        parts.append(ints("one", 1))
        if has(node, 7):
            parts.append("kept = Cast<to = 6>(i7) o1 = ReduceSum<keepdims = 0>(kept, one)")
        else:
            parts.append("batch = Shape<start = 0, end = 1>(i0) o1 = ConstantOfShape<value = int32[1] {0}>(batch)")
    if len(node.outputs) > 2:
        parts.append("o2 = Identity(total)")
    return " ".join(parts)


def _rotated(name: str, source: str, rotated: int, size: int, interleaved: bool) -> str:
    """Rotate the first `rotated` of the numbers of each head [B, H, S, size] by the angles `cos` and `sin`."""
    parts = []
    turned = source
    if rotated != size:
        sizes = ints(f"{name}_sizes", rotated, size - rotated)
        parts.append(f"{sizes} {name}_in, {name}_rest = Split<axis = -1>({source}, {name}_sizes)")
        turned = f"{name}_in"
    if interleaved:
        parts.append(
            f"{ints(f'{name}_pairs', 0, 0, 0, -1, 2)} {name}_cut = Reshape({turned}, {name}_pairs) "
            f"{ints(f'{name}_last', -1)} {name}_a1, {name}_b1 = Split<axis = -1, num_outputs = 2>({name}_cut) "
            f"{name}_a = Squeeze({name}_a1, {name}_last) {name}_b = Squeeze({name}_b1, {name}_last)"
        )
    else:
        parts.append(f"{name}_a, {name}_b = Split<axis = -1, num_outputs = 2>({turned})")
    parts.append(
        f"{name}_ac = Mul({name}_a, cos) {name}_bs = Mul({name}_b, sin) {name}_low = Sub({name}_ac, {name}_bs) "
        f"{name}_as = Mul({name}_a, sin) {name}_bc = Mul({name}_b, cos) {name}_high = Add({name}_as, {name}_bc)"
    )
    end = name if rotated == size else f"{name}_out"
    if interleaved:
        parts.append(
            f"{name}_lu = Unsqueeze({name}_low, {name}_last) {name}_hu = Unsqueeze({name}_high, {name}_last) "
            f"{name}_joined = Concat<axis = -1>({name}_lu, {name}_hu) {ints(f'{name}_flat', 0, 0, 0, -1)} "
            f"{end} = Reshape({name}_joined, {name}_flat)"
        )
    else:
        parts.append(f"{end} = Concat<axis = -1>({name}_low, {name}_high)")
    if rotated != size:
        parts.append(f"{name} = Concat<axis = -1>({end}, {name}_rest)")
    return " ".join(parts)


def _angles(positions: str, cos: int, sin: int) -> str:
    """`cos` and `sin` [B, 1, S, D / 2] at positions [B, S]."""
    rows = f"cos3 = Gather<axis = 0>(i{cos}, {positions}) sin3 = Gather<axis = 0>(i{sin}, {positions})"
    return f"{rows} {ints('head_axis', 1)} cos = Unsqueeze(cos3, head_axis) sin = Unsqueeze(sin3, head_axis)"


def _rotary(node: ir.Node) -> str | None:
    """RotaryEmbedding: x [B, S, H D] or [B, H, S, D], positions [B, S] or the first one, cosines, sines."""
    size, half = edit.rank(node.inputs[0]), _size(node, 2, 1)
    width, heads = _size(node, 0, -1), node.attributes.get_int("num_heads", 0)
    scaled = node.attributes.get_float("scale", 1.0) != 1.0 or node.attributes.get_int("is_packed_batching", 0) > 0
    if size not in (3, 4) or half is None or width is None or scaled:
        return None
    rotated = node.attributes.get_int("rotary_embedding_dim", 0) or 2 * half
    each = width if size == 4 else width // heads if heads else rotated
    parts = [_heads("x", "i0", width // each) if size == 3 else "x = Identity(i0)"]
    if edit.rank(node.inputs[1]) == 1:
        parts.append(
            f"{_places('steps', 'x', 2)} moved = Add(steps, i1) {ints('batch', 0)} at = Unsqueeze(moved, batch)"
        )
    else:
        parts.append("at = Identity(i1)")
    parts += [_angles("at", 2, 3), _rotated("y", "x", rotated, each, bool(node.attributes.get_int("interleaved", 0)))]
    parts.append(_flat("o0", "y") if size == 3 else "o0 = Identity(y)")
    return " ".join(parts)


def _grouped(node: ir.Node) -> str | None:
    """GroupQueryAttention: q, k, v (or all three in q), past k and v, last places, tables of angles.

    Keys and values of a sequence lie without gaps in the cache, as many as `seqlens_k` says; the cache grows by S.
    """
    heads, groups = node.attributes.get_int("num_heads", 0), node.attributes.get_int("kv_num_heads", 0)
    width, packed = _size(node, 0, -1), not has(node, 1)
    odd = node.attributes.get_int("smooth_softmax", 0) > 0 or has(node, 11) or (has(node, 3) and len(node.outputs) < 3)
    odd = odd or any(node.attributes.get_string(name, "NONE") != "NONE" for name in ("k_quant_type", "v_quant_type"))
    if not heads or not groups or heads % groups or width is None or odd or len(node.outputs) > 3:
        return None
    size = width // (heads + 2 * groups if packed else heads)
    parts, names = [], ["i0", "i1", "i2"]
    if packed:
        sizes = ints("sizes", heads * size, groups * size, groups * size)
        parts.append(f"{sizes} q3, k3, v3 = Split<axis = -1>(i0, sizes)")
        names = ["q3", "k3", "v3"]
    parts += [_heads("q_new", names[0], heads), _heads("k_new", names[1], groups), _heads("v_new", names[2], groups)]
    parts.append(
        f"{_places('rows', 'q_new', 2)} {ints('one', 1)} {ints('zero', 0)} last = Cast<to = 7>(i5) "
        "last1 = Reshape(last, minus) length = Add(last1, one) before = Sub(length, rows_dim) past = Max(before, zero) "
        "past_up = Unsqueeze(past, one) place = Add(past_up, rows)"
    )
    parts.insert(0, ints("minus", -1))
    if node.attributes.get_int("do_rotary", 0):
        half = _size(node, 7, 1)
        if half is None:
            return None
        pairs = bool(node.attributes.get_int("rotary_interleaved", 0))
        parts.append(_angles("i9" if has(node, 9) else "place", 7, 8))
        parts += [_rotated("q", "q_new", 2 * half, size, pairs), _rotated("k_now", "k_new", 2 * half, size, pairs)]
    else:
        parts.append("q = Identity(q_new) k_now = Identity(k_new)")
    parts.append(_cache(has(node, 3)))
    parts += [f"o{place} = Identity({name})" for place, name in ((1, "k"), (2, "v")) if place < len(node.outputs)]
    parts.append(_group_scores(node, heads, groups, size))
    return " ".join(parts)


def _cache(filled: bool) -> str:
    """k and v [B, groups, T, D]: the old ones, as many as a sequence has, and the new ones behind them."""
    if not filled:
        return f"k = Identity(k_now) v = Identity(v_new) {_places('columns', 'k', 2)}"
    parts = [
        f"k_all = Concat<axis = 2>(i3, k_now) v_all = Concat<axis = 2>(i4, v_new) {_places('columns', 'k_all', 2)}"
    ]
    parts.append(
        "held = Shape<start = 2, end = 3>(i3) is_old = Less(columns, past_up) gap = Sub(held, past_up) "
        "shifted = Add(columns, gap) end = Sub(columns_dim, one) behind = Min(shifted, end) "
        "source = Where(is_old, columns, behind) "
        f"{ints('source_axes', 1, 3)} source_up = Unsqueeze(source, source_axes) all_shape = Shape(k_all) "
        "source_all = Expand(source_up, all_shape)"
    )
    parts += [f"{name} = GatherElements<axis = 2>({name}_all, source_all)" for name in "kv"]
    return " ".join(parts)


def _group_scores(node: ir.Node, heads: int, groups: int, size: int) -> str:
    """The heads of a group are rows of one product with their common keys."""
    scale = node.attributes.get_float("scale", 0.0) or 1.0 / math.sqrt(size)
    window, cap = node.attributes.get_int("local_window_size", -1), node.attributes.get_float("softcap", 0.0)
    parts = [
        f"{ints('grouped', 0, groups, -1, size)} q_rows = Reshape(q, grouped)",
        "k_turned = Transpose<perm = [0, 1, 3, 2]>(k)",
        f"raw = MatMul(q_rows, k_turned) {ints('single', 0, heads, -1, 0)} split = Reshape(raw, single)",
        f"{number('scale', scale)} s0 = Mul(split, scale)",
    ]
    last = "s0"
    if cap > 0:
        parts.append(f"{number('cap', cap)} small = Div(s0, cap) bent = Tanh(small) s1 = Mul(bent, cap)")
        last = "s1"
    if has(node, 10):
        parts.append(f"s2 = Add({last}, i10)")
        last = "s2"
    parts.append(f"{ints('place_axis', 2)} place_up = Unsqueeze(place, place_axis) hidden0 = Less(place_up, columns)")
    hidden = "hidden0"
    if window > 0:
        parts.append(f"{ints('window', window)} start = Sub(place_up, window) early = LessOrEqual(columns, start)")
        parts.append("hidden1 = Or(hidden0, early)")
        hidden = "hidden1"
    parts.append(
        f"hidden = Unsqueeze({hidden}, one) {number('lowest', _LOWEST)} seen = Where(hidden, lowest, {last}) "
        f"p = Softmax<axis = -1>(seen) {ints('rows_again', 0, groups, -1, 0)} p_rows = Reshape(p, rows_again) "
        f"c_rows = MatMul(p_rows, v) {ints('heads_again', 0, heads, -1, size)} context = Reshape(c_rows, heads_again) "
        f"{_flat('o0', 'context')}"
    )
    return " ".join(parts)


BODIES: dict[str, Statements] = {
    "Attention": _attention,
    "MultiHeadAttention": _multi_head,
    "EmbedLayerNormalization": _embedding,
    "RotaryEmbedding": _rotary,
    "GroupQueryAttention": _grouped,
}
