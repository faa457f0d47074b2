"""What a model that is already quantized carries: levels of its weights and ranges of its activations.

Before:
    Conv(DequantizeLinear(QuantizeLinear(x, s, z), s, z), DequantizeLinear(levels, scales), DequantizeLinear(bias, t))
After:
    Conv(x, W, b) on floats; and beside it: W has these levels and scales, x is rounded to these codes

int8 codes become uint8 codes by adding 128. A pair whose source has other readers, or codes already, leaves an Identity
that has the codes. Reshape, Transpose, MaxPool and the like between codes are done on floats, whose codes they keep.
Keeps what has no such meaning: blocks and several scales of an activation, 4 and 16 bits, float8, weights whose levels
do not fit int8 or have a scale for each input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from kbitc.graph import edit, ops
from kbitc.graph.quantized import read_weight
from kbitc.passes.allocate.survey import Candidate
from kbitc.passes.allocate.uniform import Accepts, decide
from kbitc.quant.plan import UINT8, QuantPlan
from kbitc.quant.scheme import Granularity, QuantScheme, ScaleType
from kbitc.quant.static import INT8_SHIFT, Codes
from kbitc.quant.tensor import QTensor

#: Why a weight has its scheme; the report looks for it.
REASON = "the model's own levels"
_SHIFTS = {ir.DataType.UINT8: 0, ir.DataType.INT8: INT8_SHIFT}
#: Results hold nothing but elements of the first input.
_MOVES = frozenset(
    "Reshape Transpose Slice Squeeze Unsqueeze Flatten Expand DepthToSpace SpaceToDepth Gather MaxPool "
    "GlobalMaxPool ReduceMax Identity".split()
)
#: The codes of a sum of products are those of an Identity: a constant that is added later is then no part of it.
_SUMS = ("Conv", "MatMul")
#: Results also hold zeros, or are several: on integers they have the codes of the first input too.
_KEEPS = frozenset(("Resize", "Pad", "Split"))
#: Constants that no weight is made of are dequantized up to this many elements.
_MAX_CONSTANT = 1 << 16


@dataclass(frozen=True)
class Carried:
    """A quantized model as a float model and what belongs to it.

    Attributes:
        model: without the rounding of activations.
        tensors: weight name -> its levels and scales.
        codes: value name -> the codes that the model rounds it to.
    """

    model: ir.Model
    tensors: dict[str, QTensor] = field(default_factory=dict)
    codes: dict[str, Codes] = field(default_factory=dict)

    def limited(self) -> ir.Model:
        """The float model in which values end where their codes end: what would be computed with infinitely fine codes.

        A file counts on these ends: quantizers leave out a Relu or Clip in front of codes that end there.
        """
        copy = self.model.clone()
        edit.forget_names(copy)
        for value in [value for node in copy.graph for value in node.outputs if value.name in self.codes]:
            codes = self.codes[value.name or ""]
            ends = [(0 - codes.zero) * codes.scale, (codes.high - codes.zero) * codes.scale]
            low, high = (edit.add_initializer(copy.graph, "limit", np.array(end, np.float32)) for end in ends)
            edit.append(value, "Clip", [low, high], f"{value.name}.limited")
        return copy


def read_carried(model: ir.Model) -> Carried | None:
    """What a canonical model carries; it is not changed. None when it rounds no activation to 8 bits."""
    copy = model.clone()
    edit.forget_names(copy)
    taken = _Taken(copy)
    taken.weights()
    taken.constants()
    taken.lift_dequantize()
    taken.activations()
    edit.remove_dead(copy)
    edit.name_nodes(copy)
    alive = {value.name: codes for value, codes in taken.codes.items() if value.name and _is_alive(value)}
    if not any(edit.constant(value) is None for value in taken.codes if value.name in alive):
        return None
    return Carried(copy, taken.tensors, alive)


def with_levels(
    model: ir.Model, plan: QuantPlan, candidates: Sequence[Candidate], tensors: Mapping[str, QTensor],
    excluded: Mapping[str, str], accepts: Accepts,
) -> QuantPlan:  # fmt: skip
    """The plan in which weights that came with levels keep them."""
    known = {candidate.tensor: candidate for candidate in candidates}
    entries = []
    for entry in plan.entries:
        if entry.tensor in tensors:
            scheme = tensors[entry.tensor].scheme
            entry = decide(model, known[entry.tensor], scheme, UINT8, excluded.get(entry.tensor), accepts)
            entry = replace(entry, reason=REASON) if entry.scheme is not None else entry
        entries.append(entry)
    return QuantPlan(tuple(entries))


def _is_alive(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


class _Taken:
    """The copy while quantization is taken out of it."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.tensors: dict[str, QTensor] = {}
        self.codes: dict[ir.Value, Codes] = {}

    def weights(self) -> None:
        """Levels behind the weight operand of MatMul, Conv and Gather become float initializers again."""
        found: dict[ir.Node, tuple[str, QTensor | None]] = {}
        for node in edit.all_nodes(self.model):
            source = _weight_node(node)
            if source is None or source[0].graph is not self.model.graph:
                continue
            maker, kind = source
            tensor = read_weight(maker.outputs[0], kind)
            tensor = None if tensor is None or found.get(maker, (kind,))[0] != kind else _in_int8(tensor)
            found[maker] = kind, tensor
        for maker, (kind, tensor) in found.items():
            if tensor is None:
                continue
            shape = edit.static_shape(maker.inputs[0]) or ()
            array = np.ascontiguousarray(ops.from_view(tensor.dequantize(), kind, shape))
            self.tensors[self._hold(maker, array).name or ""] = tensor

    def _hold(self, maker: ir.Node, array: edit.Array) -> ir.Value:
        """An initializer in place of a DequantizeLinear."""
        source = maker.inputs[0]
        name = (source.name if source is not None else "") or "weight"
        held = edit.add_initializer(self.model.graph, name.removesuffix("_quantized"), array)
        edit.replace(maker, held)
        return held

    def constants(self) -> None:
        """Biases and constant operands become floats; those of 8 bits and one scale keep their codes."""
        weights = {source[0] for source in map(_weight_node, edit.all_nodes(self.model)) if source is not None}
        for node in list(self.model.graph):
            array = edit.constant(node.inputs[0]) if edit.is_op(node, "DequantizeLinear") else None
            if array is None or node in weights or array.size > _MAX_CONSTANT or node.outputs[0].is_graph_output():
                continue
            numbers = _dequantized(node, array)
            if numbers is None:
                continue
            codes = _codes(node)
            held = self._hold(node, numbers)
            if codes is not None:
                self.codes[held] = codes

    def lift_dequantize(self) -> None:
        """Before: DequantizeLinear(Reshape(q)). After: Reshape(DequantizeLinear(q)), as in the QOperator format."""
        for node in reversed(list(self.model.graph)):
            if not edit.is_op(node, "DequantizeLinear") or _codes(node) is None or node.graph is None:
                continue
            while (mover := _moved(node.inputs[0])) is not None:
                source, rest = mover.inputs[0], mover.inputs[1:]
                inner = edit.insert_before(mover, "DequantizeLinear", [source, *node.inputs[1:]])
                inner.type, inner.shape = node.outputs[0].type, source.shape if source is not None else None
                attributes = {key: item.value for key, item in mover.attributes.items()}
                moved = edit.insert_before(
                    mover, mover.op_type, [inner, *rest], like=node.outputs[0], name=f"{mover.name}.float", **attributes
                )
                edit.replace(node, moved)
                node = edit_producer(inner)

    def activations(self) -> None:
        """Pairs of QuantizeLinear and DequantizeLinear vanish; their source, or an Identity of it, has the codes."""
        for node in list(self.model.graph):
            if not edit.is_op(node, "DequantizeLinear") or node.graph is None:
                continue
            codes = _codes(node)
            if codes is None:
                continue
            maker = edit.producer(node.inputs[0], "QuantizeLinear")
            if maker is None:
                self.codes[node.outputs[0]] = codes  # codes that come from outside, or from integer operators
            elif _codes(maker) == codes and maker.inputs[0] is not None:
                self._take_pair(maker, codes)

    def _take_pair(self, maker: ir.Node, codes: Codes) -> None:
        """Take out one QuantizeLinear with all its DequantizeLinear of the same codes."""
        source = maker.inputs[0]
        readers = [user for user in maker.outputs[0].consumers() if _codes(user) == codes]
        if source is None:
            return
        value = self._rounded(source, maker, codes)
        for reader in dict.fromkeys(readers):
            edit.replace(reader, value)

    def _rounded(self, source: ir.Value, maker: ir.Node, codes: Codes) -> ir.Value:
        """The value that has the codes: the source itself, or an Identity of it."""
        if self.codes.get(source) == codes:
            return source
        origin = source
        while _only_reader(origin) and origin not in self.codes and (mover := _moved(origin)) is not None:
            behind = mover.inputs[0]
            if behind is None or edit.constant(behind) is not None:
                break
            if self.codes.get(behind) == codes:
                return source  # it only holds numbers that are rounded already
            if not _only_reader(behind):
                break
            origin = behind
        behind_of = origin.producer()
        if behind_of is None or not _only_reader(origin) or origin in self.codes or _moved(origin) is not None:
            return self._identity(source, maker, codes)
        if edit.is_op(behind_of, *_KEEPS) and self.codes.get(_first(behind_of)) != codes:
            return self._identity(source, maker, codes)
        if edit.is_op(behind_of, *_SUMS):
            (reader,) = origin.consumers()
            value = self._identity(origin, reader, codes)
            reader.replace_input_with(0, value)
            return value if origin is source else source
        self.codes[origin] = codes
        return source

    def _identity(self, source: ir.Value, before: ir.Node, codes: Codes) -> ir.Value:
        value = edit.insert_before(before, "Identity", [source], name=f"{source.name}.rounded", like=source)
        self.codes[value] = codes
        return value


def edit_producer(value: ir.Value) -> ir.Node:
    """The node that makes a value that was just made by one."""
    node = value.producer()
    if node is None:
        raise ValueError("the value has no producer")
    return node


def _first(node: ir.Node) -> ir.Value:
    """The first input of a node, or its result where that is left out."""
    return node.inputs[0] or node.outputs[0]


def _only_reader(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _moved(value: ir.Value | None) -> ir.Node | None:
    """The node behind a value that only moves elements of its first input, or takes the largest."""
    node = None if value is None else value.producer()
    if node is None or not edit.is_op(node, *_MOVES) or node.inputs[0] is None or len(node.outputs) != 1:
        return None
    return node if edit.constant(node.inputs[0]) is None else None


def _weight_node(node: ir.Node) -> tuple[ir.Node, str] | None:
    """(DequantizeLinear behind the weight operand of a node, layout of its result), or None."""
    use = None if node.domain else ops.WEIGHT_USES.get(node.op_type)
    if use is None or len(node.inputs) <= use.weight_input:
        return None
    value, kind = node.inputs[use.weight_input], use.kind
    turned = edit.producer(value, "Transpose")
    if use.kind == "matmul" and turned is not None and list(turned.attributes.get_ints("perm", ())) == [1, 0]:
        value, kind = turned.inputs[0], "embedding"
    maker = edit.producer(value, "DequantizeLinear")
    return None if maker is None or edit.constant(maker.inputs[0]) is None else (maker, kind)


def _in_int8(tensor: QTensor) -> QTensor | None:
    """The tensor with one scale a channel or one for all and no zero point, its numbers unchanged; None without."""
    scheme = tensor.scheme
    plain = scheme.granularity is not Granularity.BLOCK and tensor.scale_steps is None and tensor.offsets is None
    if not plain or not (np.isfinite(tensor.scales).all() and (tensor.scales > 0).all()):
        return None
    if tensor.zero_points is None:
        return tensor
    levels = tensor.levels()
    if levels.min(initial=0) < -INT8_SHIFT or levels.max(initial=0) >= INT8_SHIFT:
        return None
    scheme = QuantScheme("int", 8, scheme.granularity, 0, False, ScaleType.F32)
    codes = np.asarray(levels + INT8_SHIFT, np.uint8)
    return QTensor(codes, tensor.scales, None, scheme.data_type(), scheme)


def _codes(node: ir.Node) -> Codes | None:
    """The uint8 codes of a QuantizeLinear or DequantizeLinear with one scale for all; None for another."""
    if not edit.is_op(node, "QuantizeLinear", "DequantizeLinear") or node.attributes.get_int("block_size", False):
        return None
    stored = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    wide = node.inputs[0] if node.op_type == "QuantizeLinear" else node.outputs[0]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    dtype = zero.dtype if zero is not None else None if stored is None else stored.dtype
    scale, middle = edit.scalar(node.inputs[1]), 0.0 if zero is None else edit.scalar(zero)
    if dtype not in _SHIFTS or scale is None or middle is None or wide is None:
        return None
    kind = None if node.inputs[1] is None else node.inputs[1].dtype
    if wide.dtype not in (None, ir.DataType.FLOAT) or kind != ir.DataType.FLOAT:
        return None
    if not (np.isfinite(scale) and scale >= np.finfo(np.float32).tiny):
        return None
    return Codes(scale, int(middle) + _SHIFTS[dtype])


def _dequantized(node: ir.Node, array: edit.Array) -> edit.Array | None:
    """What a DequantizeLinear of 8 or 32 bits gives, f32: one scale for all or one along its axis."""
    scale = edit.constant(node.inputs[1])
    zero = edit.constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(1)
    if scale is None or zero is None or scale.dtype != np.float32 or node.attributes.get_int("block_size", False):
        return None
    if array.dtype not in (np.int8, np.uint8, np.int32) or scale.ndim > 1 or zero.size not in (1, scale.size):
        return None
    if scale.size > 1 and array.ndim == 0:
        return None
    axis = node.attributes.get_int("axis", 1)
    spread = [-1] + [1] * (array.ndim - 1 - axis % array.ndim) if scale.size > 1 else [1] * array.ndim
    steps = array.astype(np.int64) - zero.astype(np.int64).reshape(spread if zero.size > 1 else [])
    return np.asarray(steps.astype(np.float32) * scale.reshape(spread), np.float32)
