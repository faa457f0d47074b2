"""What every family needs: new nodes in front of an old one, and the codes of a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.errors import InternalError
from kbitc.graph import edit, functions, integer_reduce
from kbitc.graph import integer_functions as integer
from kbitc.graph import integer_nonlinear as nonlinear
from kbitc.passes.allocate.decision import Decision
from kbitc.passes.allocate.families import Form
from kbitc.passes.allocate.static import EDGE_BITS
from kbitc.quant.static import ACCUMULATOR_LIMIT, INT8_SHIFT, Codes, StaticPlan
from kbitc.quant.tensor import QTensor

Array = npt.NDArray[Any]
I64, I32, U8 = ir.DataType.INT64, ir.DataType.INT32, ir.DataType.UINT8
I8, F32 = ir.DataType.INT8, ir.DataType.FLOAT


@dataclass(frozen=True)
class Sums:
    """An int32 accumulator and what one step of it is worth.

    Attributes:
        value: i32.
        scales: f64 [N] along `axis`, or [1], in units of x per step.
        axis: the axis of `value` with N elements.
        limit: |value| is at most this.
    """

    value: ir.Value
    scales: npt.NDArray[np.float64]
    axis: int
    limit: int = ACCUMULATOR_LIMIT


@dataclass
class Builder:
    """The graph while it is rewritten.

    Attributes:
        model: changed in place.
        plan: codes by value name.
        decision: forms of the nodes.
        tensors: quantized weights by initializer name.
        codes: value -> its u8 codes, as far as they are made.
        sums: value -> its accumulator, for values that leave the integers without codes.
        needed: names of kbitc functions in use.
    """

    model: ir.Model
    plan: StaticPlan
    decision: Decision
    tensors: Mapping[str, QTensor]
    codes: dict[ir.Value, ir.Value] = field(default_factory=dict)
    sums: dict[ir.Value, Sums] = field(default_factory=dict)
    needed: set[str] = field(default_factory=set)
    _constants: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)

    def form(self, node: ir.Node) -> Form:
        """The form of a node."""
        return self.decision.forms[node]

    def codes_of(self, value: ir.Value) -> Codes:
        """The planned codes of a value."""
        return self.plan.codes(value.name)

    def constant(self, name: str, array: Array) -> ir.Value:
        """An initializer; equal small ones are shared."""
        if array.size > 1:
            return edit.add_initializer(self.model.graph, name, array)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = edit.add_initializer(self.model.graph, name, array)
        return self._constants[key]

    def zero(self, codes: Codes, dtype: type[np.generic] = np.uint8) -> ir.Value:
        """The zero point, a scalar."""
        return self.scalar(codes.zero, dtype)

    def scalar(self, number: int, dtype: type[np.generic] = np.int32) -> ir.Value:
        """An integer scalar."""
        return self.constant(f"{np.dtype(dtype).name}_{number}".replace("-", "m"), np.array(number, dtype))

    def powers(self) -> ir.Value:
        """The table of IntegerSoftmax, one for all."""
        key = ("powers",)
        if key not in self._constants:
            self._constants[key] = edit.add_initializer(self.model.graph, "powers", nonlinear.powers())
        return self._constants[key]

    def emit(
        self, before: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], name: str, dtype: ir.DataType,
        shape: ir.Shape | None, **attrs: Any,
    ) -> ir.Value:  # fmt: skip
        """A new node in front of `before`; operators that are kbitc functions are called as such."""
        own = any(op_type in module.BODIES for module in (integer, nonlinear, integer_reduce))
        if own:
            self.needed.add(op_type)
        domain = functions.DOMAIN if own else ""
        made = edit.insert_before(before, op_type, inputs, name=name, domain=domain, **attrs)
        made.type, made.shape = ir.TensorType(dtype), shape
        return made

    def read(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """The codes of a value; a float value is quantized before its first reader, once."""
        if value in self.codes:
            return self.codes[value]
        codes = self.codes_of(value)
        root = self.decision.roots.get(value)
        if root is not None and (root in self.codes or root in self.sums):
            raise InternalError("a table is read before it is made", where=value.name)
        stored = self._stored(value, codes)
        if stored is not None:
            self.codes[value] = stored
            return stored
        scale = self.constant(f"{value.name}.scale", np.array(codes.scale, np.float32))
        inputs = [value, scale, self.zero(codes)]
        if codes.bits == EDGE_BITS:
            made = self.emit(before, "QuantizeLinear", inputs, f"{value.name}.q", U8, value.shape)
        else:
            wide = self.emit(before, "QuantizeLinear", inputs, f"{value.name}.quantize", U8, value.shape)
            limit = self.scalar(codes.high, np.uint8)
            made = self.emit(before, "Min", [wide, limit], f"{value.name}.q", U8, value.shape)
        self.codes[value] = made
        return made

    def _stored(self, value: ir.Value, codes: Codes) -> ir.Value | None:
        """The constant that is dequantized to a value by just these codes, as codes; None for another value."""
        node = edit.producer(value, "DequantizeLinear")
        array = None if node is None else edit.constant(node.inputs[0])
        if node is None or array is None or array.dtype not in (np.uint8, np.int8) or codes.bits != EDGE_BITS:
            return None
        shift = 0 if array.dtype == np.uint8 else INT8_SHIFT
        zero = edit.scalar(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else 0.0
        if zero is None or edit.scalar(node.inputs[1]) != codes.scale or zero + shift != codes.zero:
            return None
        if not shift:
            return node.inputs[0]
        moved = (array.astype(np.int16) + shift).astype(np.uint8)
        return edit.add_initializer(self.model.graph, f"{value.name}.codes", moved)

    def requantize(self, sums: Sums, value: ir.Value, before: ir.Node, low: int = 0, high: int = 255) -> None:
        """Give `value` codes made from an accumulator; low and high limit them further than their bits do."""
        codes = self.codes_of(value)
        pairs = [integer.code_factor(float(scale) / codes.scale) for scale in sums.scales]
        multiplier, shift = (np.array(column, np.int32) for column in zip(*pairs, strict=True))
        inputs = [
            sums.value,
            self.constant(f"{value.name}.multiplier", multiplier),
            self.constant(f"{value.name}.shift", shift),
            self.zero(codes, np.int32),
        ]
        limits = {"low": max(low, 0), "high": min(high, codes.high)}
        self.codes[value] = self.emit(
            before, integer.REQUANTIZE, inputs, f"{value.name}.q", U8, value.shape, axis=sums.axis, **limits
        )
