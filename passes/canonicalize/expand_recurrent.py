"""Takes LSTM, GRU and RNN apart: unrolled where they have few steps, else as a Scan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from kbitc.errors import ModelError
from kbitc.graph import dims, edit
from kbitc.graph.edit import all_nodes, constant, describe, is_op
from kbitc.passes.base import PassResult

#: Longer sequences would make large graphs, and long compilations.
MAX_UNROLLED = 16
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_DEFAULT_ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
#: Activations that take alpha and beta, and their defaults (ONNX, RNN; those without a default there are 1 and 0).
_SCALED = {
    "affine": (1.0, 0.0),
    "leakyrelu": (0.01, None),
    "thresholdedrelu": (1.0, None),
    "scaledtanh": (1.0, 1.0),
    "hardsigmoid": (0.2, 0.5),
    "elu": (1.0, None),
}
_PLAIN = {"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid", "softsign": "Softsign", "softplus": "Softplus"}
_NAMED = {"leakyrelu": "LeakyRelu", "thresholdedrelu": "ThresholdedRelu", "hardsigmoid": "HardSigmoid", "elu": "Elu"}

Activation = Callable[[ir.Value], ir.Value]
#: Hidden and, for LSTM, cell state, each f32 [batch, H]; None is all zero.
State = tuple["ir.Value | None", "ir.Value | None"]
NewState = tuple[ir.Value, "ir.Value | None"]


@dataclass(frozen=True)
class ExpandRecurrent:
    """Before: `LSTM(X, W, R, B, lengths, h, c, P)`, `GRU(...)`, `RNN(...)`, of any direction and layout.
    After: one MatMul of all steps of X by W, and for each step a MatMul of the state by R and the gates' formulas; when
    the number of steps is over `max_unrolled` or not known, these are the body of a Scan.

    All steps share one R, so that it is quantized once. Steps behind a sequence's end keep the state and give 0.

    Keeps the node when the size of its state is not known: it is refused later, by name.

    Args:
        max_unrolled: most steps that are unrolled.
    """

    max_unrolled: int = MAX_UNROLLED

    def __call__(self, model: ir.Model) -> PassResult:
        """Apply the pass.

        Raises:
            ModelError: an activation function that ONNX does not name.
        """
        modified = False
        for node in all_nodes(model):
            if not is_op(node, *_GATES) or node.graph is None or not all(node.inputs[:3]):
                continue
            cell = _Cell(node)
            if cell.size:
                cell.expand(unroll=cell.steps is not None and 0 < cell.steps <= self.max_unrolled)
                modified = True
        return PassResult(model, modified)


@dataclass
class _Parts:
    """What one direction reads: its rows of the node's inputs; None where an input is left out.

    wx: f32 [steps, batch, gates * H], X by W with the biases that need no gate. recurrent: matrices [H, n], all gates
    together, except for a GRU whose reset gate stands before the product: [H, 2H] and [H, H]. reset_bias: [H], the
    bias of the GRU's product that the reset gate multiplies. peepholes: i, o, f, each [H].
    """

    wx: ir.Value
    recurrent: list[ir.Value]
    state: State
    reset_bias: ir.Value | None = None
    peepholes: list[ir.Value] = field(default_factory=list)


class _Cell:
    """One node on its way to plain operators; the letters are those of ONNX's specification of LSTM, GRU and RNN."""

    def __init__(self, node: ir.Node) -> None:
        self.node = self.anchor = node
        self.prefix = node.name or next(value.name for value in node.outputs if value.name) or node.op_type
        self.batch_first = node.attributes.get_int("layout", 0) == 1
        self.gates = _GATES[node.op_type]
        x, r = (dims.of(node.inputs[index]) for index in (0, 2))
        steps, self.batch = (None, None) if x is None else (x[1], x[0]) if self.batch_first else (x[0], x[1])
        self.steps = steps if isinstance(steps, int) else None
        size = r[2] if r is not None else None
        self.size = size if isinstance(size, int) else 0
        self.direction = node.attributes.get_string("direction", "forward") or "forward"
        self.count = 2 if self.direction == "bidirectional" else 1
        self.clip = node.attributes.get_float("clip", 0.0)
        self.reset_after = node.attributes.get_int("linear_before_reset", 0) != 0
        self.activations = self._activations()

    # Making nodes

    def make(self, op_type: str, *inputs: ir.Value | None, **attrs: Any) -> ir.Value:
        return edit.insert_before(self.anchor, op_type, inputs, name=f"{self.prefix}.{op_type}", **attrs)

    def split(self, value: ir.Value, axis: int, sizes: Sequence[int]) -> list[ir.Value]:
        if len(sizes) == 1:
            return [value]
        if len(set(sizes)) == 1:  # shape inference knows no constants from outside a Scan: state no sizes
            first = self.make("Split", value, axis=axis, outputs=len(sizes), num_outputs=len(sizes))
        else:
            where = self.number(np.asarray(sizes, np.int64))
            first = self.make("Split", value, where, axis=axis, outputs=len(sizes))
        maker = first.producer()
        return list(maker.outputs) if maker is not None else []

    def number(self, array: np.ndarray | float) -> ir.Value:
        made = np.asarray(array, np.float32) if isinstance(array, float) else array
        return edit.add_initializer(edit.root_graph(self.node), f"{self.prefix}.constant", made)

    def squeeze(self, value: ir.Value, axis: int) -> ir.Value:
        return self.make("Squeeze", value, self.number(np.array([axis])))

    def unsqueeze(self, value: ir.Value, axis: int) -> ir.Value:
        return self.make("Unsqueeze", value, self.number(np.array([axis])))

    def concat(self, values: list[ir.Value], axis: int) -> ir.Value:
        return values[0] if len(values) == 1 else self.make("Concat", *values, axis=axis)

    def optional(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    # Activation functions

    def _activations(self) -> list[Activation]:
        """The functions of all directions, in order."""
        default = _DEFAULT_ACTIVATIONS[self.node.op_type] * self.count
        names = [str(name).lower() for name in self.node.attributes.get_strings("activations", default)]
        alphas, betas = (list(self.node.attributes.get_floats(f"activation_{key}", ())) for key in ("alpha", "beta"))
        made: list[Activation] = []
        for place, name in enumerate(names):
            if name not in _PLAIN and name not in _SCALED:
                raise ModelError("an activation function that ONNX does not name", where=describe(self.node), got=name)
            alpha, beta = _SCALED.get(name, (None, None))
            if alpha is not None and alphas:
                alpha = alphas.pop(0)
            if beta is not None and betas:
                beta = betas.pop(0)
            # As onnxruntime has it, the gates are clipped, and not the cell state in front of h.
            of_state = self.node.op_type == "LSTM" and place % 3 == 2
            made.append(self._activation(name, alpha, beta, 0.0 if of_state else self.clip))
        return made

    def _activation(self, name: str, alpha: float | None, beta: float | None, clip: float) -> Activation:
        def function(x: ir.Value) -> ir.Value:
            if clip > 0:
                x = self.make("Clip", x, self.number(-clip), self.number(clip))
            if name in _PLAIN:
                return self.make(_PLAIN[name], x)
            if name in _NAMED:
                return self.make(_NAMED[name], x, alpha=alpha, beta=beta)
            if name == "affine":
                return self.make("Add", self.make("Mul", x, self.number(alpha or 0.0)), self.number(beta or 0.0))
            return self.make(
                "Mul", self.make("Tanh", self.make("Mul", x, self.number(beta or 0.0))), self.number(alpha or 0.0)
            )

        return function

    # The whole

    def expand(self, *, unroll: bool) -> None:
        parts = self._parts()
        mask = self._mask(parts[0].wx)
        each = len(self.activations) // self.count
        outputs, finals = [], []
        for index, part in enumerate(parts):
            functions = self.activations[index * each : (index + 1) * each]
            backward = self.direction == "reverse" or index == 1
            run = self._unrolled if unroll else self._scan
            output, final = run(part, functions, mask, backward)
            outputs.append(self.unsqueeze(output, 1))
            finals.append(final)
        results = [self.concat(outputs, 1)]
        for place in (0, 1):
            states = [final[place] for final in finals]
            results += [self.concat([self.unsqueeze(state, 0) for state in states if state is not None], 0)] * any(
                states
            )
        for position, (old, new) in enumerate(zip(self.node.outputs, results, strict=False)):
            if self.batch_first:
                new = self.make("Transpose", new, perm=[1, 0, 2] if position else [2, 0, 1, 3])
            new.type, new.shape = old.type, old.shape
            edit.redirect(old, new)
        edit.remove(self.node)

    def _parts(self) -> list[_Parts]:
        """The inputs of each direction."""
        x = self.node.inputs[0]
        if self.batch_first:
            x = self.make("Transpose", x, perm=[1, 0, 2])
        rows = {index: self._rows(index) for index in (1, 2, 3, 5, 6, 7)}
        made = []
        for direction in range(self.count):
            w, r, b, h, c, p = (rows[index][direction] for index in (1, 2, 3, 5, 6, 7))
            product = self.make("MatMul", x, self._turned(w))
            bias, reset_bias = (None, None) if b is None else self._biases(b)
            wx = product if bias is None else self.make("Add", product, bias)
            peepholes = [] if p is None else self.split(p, 0, [self.size] * 3)
            made.append(_Parts(wx, self._recurrent(r), (h, c), reset_bias, peepholes))
        return made

    def _rows(self, index: int) -> list[ir.Value | None]:
        """An input's rows by direction, without the axis of directions; states of layout 1 have it second."""
        value = self.optional(index)
        if value is None:
            return [None] * self.count
        axis = 1 if self.batch_first and index in (5, 6) else 0
        return [self.squeeze(part, axis) for part in self.split(value, axis, [1] * self.count)]

    def _turned(self, matrix: ir.Value | None) -> ir.Value:
        return self.make("Transpose", matrix, perm=[1, 0])

    def _recurrent(self, r: ir.Value | None) -> list[ir.Value]:
        if r is None or self.node.op_type != "GRU" or self.reset_after:
            return [self._turned(r)]
        return [self._turned(part) for part in self.split(r, 0, [2 * self.size, self.size])]

    def _biases(self, b: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        """(bias [gates * H] of the product of X, bias [H] that the reset gate multiplies, or None)."""
        width = self.gates * self.size
        of_w, of_r = self.split(b, 0, [width, width])
        if self.node.op_type != "GRU" or not self.reset_after:
            return self.make("Add", of_w, of_r), None
        gates, hidden = self.split(of_r, 0, [2 * self.size, self.size])
        zero = self.number(np.zeros(self.size, np.float32))
        return self.make("Add", of_w, self.concat([gates, zero], 0)), hidden

    def _mask(self, wx: ir.Value) -> ir.Value | None:
        """bool [steps, batch, 1]: the sequence is not over yet. None where all have full length."""
        lengths = self.optional(4)
        known = constant(lengths)
        if lengths is None or (known is not None and self.steps is not None and bool((known >= self.steps).all())):
            return None
        steps = self.squeeze(self.make("Shape", wx, start=0, end=1), 0)
        zero, one = (self.number(np.array(number)) for number in (0, 1))
        row = self.make("Unsqueeze", self.make("Range", zero, steps, one), self.number(np.array([1, 2])))
        column = self.make("Unsqueeze", self.make("Cast", lengths, to=ir.DataType.INT64), self.number(np.array([0, 2])))
        return self.make("Less", row, column)

    def _unrolled(
        self, part: _Parts, functions: list[Activation], mask: ir.Value | None, backward: bool
    ) -> tuple[ir.Value, State]:
        """All steps of one direction: hidden states [steps, batch, H] in the order of X, and the last state."""
        steps = self.steps or 0
        inputs, masks = (
            [self.squeeze(item, 0) for item in self.split(value, 0, [1] * steps)]
            if value is not None
            else [None] * steps
            for value in (part.wx, mask)
        )
        state, outputs = part.state, {}
        for step in reversed(range(steps)) if backward else range(steps):
            output, state = self._step(inputs[step] or part.wx, state, part, functions, masks[step])
            outputs[step] = self.unsqueeze(output, 0)
        return self.concat([outputs[step] for step in range(steps)], 0), state

    def _scan(
        self, part: _Parts, functions: list[Activation], mask: ir.Value | None, backward: bool
    ) -> tuple[ir.Value, State]:
        """As `_unrolled`, for any number of steps."""
        prefix, self.prefix = self.prefix, f"{self.prefix}.{'backward' if backward else 'forward'}"
        count = 2 if self.node.op_type == "LSTM" else 1
        states = [part.state[place] or self._zeros(part.wx) for place in range(count)]
        series = [part.wx] if mask is None else [part.wx, mask]
        inner = [self._inner(place, self.size) for place in range(count)]
        inner += [self._inner(count, self.gates * self.size), self._inner(count + 1, 1, ir.DataType.BOOL)][
            : len(series)
        ]
        self.anchor = ir.Node("", "Identity", inner[:1])
        body = ir.Graph(inner, [], nodes=[self.anchor], opset_imports={}, name=f"{self.prefix}.body")
        state = inner[0], inner[1] if count == 2 else None
        output, new = self._step(inner[count], state, part, functions, inner[-1] if mask is not None else None)
        if output is new[0]:
            output = self.make("Identity", output)
        body.outputs.extend([*(value for value in new if value is not None), output])
        body.remove(self.anchor)
        self.anchor = self.node
        directions = {"scan_input_directions": [1] * len(series), "scan_output_directions": [1]} if backward else {}
        first = self.make(
            "Scan", *states, *series, outputs=count + 1, body=body, num_scan_inputs=len(series), **directions
        )
        self.prefix = prefix
        maker = first.producer()
        found = list(maker.outputs) if maker is not None else []
        return found[count], (found[0], found[1] if count == 2 else None)

    def _inner(self, place: int, width: int, kind: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """An input [batch, width] of the graph of one step."""
        shape = ir.Shape([self.batch, width])
        return ir.Value(name=f"{self.prefix}.in{place}", type=ir.TensorType(kind), shape=shape)

    def _zeros(self, wx: ir.Value) -> ir.Value:
        """f32 [batch, H]."""
        batch = self.make("Shape", wx, start=1, end=2)
        return self.make("ConstantOfShape", self.concat([batch, self.number(np.array([self.size]))], 0))

    def _step(
        self, x: ir.Value, state: State, part: _Parts, functions: list[Activation], mask: ir.Value | None
    ) -> tuple[ir.Value, NewState]:
        """One step: what it gives [batch, H], and the new state."""
        one_step = {"LSTM": self._lstm, "GRU": self._gru, "RNN": self._rnn}[self.node.op_type]
        hidden, cell = one_step(x, state, part, functions)
        if mask is None:
            return hidden, (hidden, cell)
        kept = self._where(mask, hidden, state[0])
        return self._where(mask, hidden, None), (kept, None if cell is None else self._where(mask, cell, state[1]))

    def _where(self, mask: ir.Value, new: ir.Value, old: ir.Value | None) -> ir.Value:
        """`new` where the mask holds, elsewhere `old`, or 0 without it."""
        return self.make("Where", mask, new, self.number(0.0) if old is None else old)

    # One step

    def _plus_recurrent(self, x: ir.Value, h: ir.Value | None, matrix: ir.Value) -> ir.Value:
        return x if h is None else self.make("Add", x, self.make("MatMul", h, matrix))

    def _rnn(self, x: ir.Value, state: State, part: _Parts, functions: list[Activation]) -> NewState:
        """Ht = f(Xt Wi^T + Ht-1 Ri^T + biases)."""
        return functions[0](self._plus_recurrent(x, state[0], part.recurrent[0])), None

    def _lstm(self, x: ir.Value, state: State, part: _Parts, functions: list[Activation]) -> NewState:
        """it = f(. + Pi Ct-1), ft = f(. + Pf Ct-1), Ct = ft Ct-1 + it g(.), Ht = f(. + Po Ct) h(Ct)."""
        f, g, h = functions
        hidden, cell = state
        i, o, forget, c = self.split(self._plus_recurrent(x, hidden, part.recurrent[0]), 1, [self.size] * 4)
        if part.peepholes and cell is not None:
            i, forget = (
                self.make("Add", gate, self.make("Mul", part.peepholes[place], cell))
                for gate, place in ((i, 0), (forget, 2))
            )
        i = f(i)
        new = self.make("Mul", i, g(c))
        if cell is not None:
            coupled = self.node.attributes.get_int("input_forget", 0) != 0
            kept = self.make("Sub", self.number(1.0), i) if coupled else f(forget)
            new = self.make("Add", self.make("Mul", kept, cell), new)
        if part.peepholes:
            o = self.make("Add", o, self.make("Mul", part.peepholes[1], new))
        return self.make("Mul", f(o), h(new)), new

    def _gru(self, x: ir.Value, state: State, part: _Parts, functions: list[Activation]) -> NewState:
        """zt, rt = f(.), ht = g(. + (rt Ht-1) Rh^T) or g(. + rt (Ht-1 Rh^T + Rbh)), Ht = (1 - zt) ht + zt Ht-1."""
        f, g = functions
        hidden = state[0]
        z, r, new = self.split(x, 1, [self.size] * 3)
        product = part.reset_bias
        if hidden is not None:
            added = self.split(self.make("MatMul", hidden, part.recurrent[0]), 1, [self.size] * (2 + self.reset_after))
            z, r = self.make("Add", z, added[0]), self.make("Add", r, added[1])
            if self.reset_after:
                product = added[2] if product is None else self.make("Add", added[2], product)
        z, r = f(z), f(r)
        if product is not None:
            new = self.make("Add", new, self.make("Mul", r, product))
        elif hidden is not None:
            new = self._plus_recurrent(new, self.make("Mul", r, hidden), part.recurrent[1])
        result = self.make("Mul", self.make("Sub", self.number(1.0), z), g(new))
        if hidden is not None:
            result = self.make("Add", result, self.make("Mul", z, hidden))
        return result, None
