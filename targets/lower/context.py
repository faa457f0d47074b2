"""The state of one lowering: the values of the graph so far, the relax function under construction, the weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from tvm import relax, tirx

from kbitc.errors import InternalError, UnsupportedError
from kbitc.graph.edit import describe
from kbitc.targets.lower import dims, dtypes
from kbitc.targets.lower.calls import Calls
from kbitc.targets.lower.contraction import Contraction, Dim, PrimFunc, RelaxExpr
from kbitc.targets.lower.group import Group, TeTensor, compute
from kbitc.targets.lower.values import Constant, Deferred, Expr, Index, Lazy, Tensor, Value, without_ones
from kbitc.targets.target import Target
from kbitc.targets.tuning import scheduled

# Constants up to this size stay inside the library; larger ones are parameters of main.
SMALL_CONSTANT_BYTES = 4096
# A value that several nodes read is written to memory unless computing it again is about as cheap as reading it.
SHARED_COST = 6
# No expression grows beyond this many operations an element.
LARGEST_COST = 96
SCHEDULED = "kbitc.scheduled"
KIND = "kbitc.kind"


class DependsOnFailure(Exception):
    """A node reads a value whose producer could not be lowered."""


class Context:
    """What the emitters of operators work with. It is the `EmitContext` of the kernel rules.

    Attributes:
        target: what is compiled for.
        dry: no kernel is built; shapes, types and refusals are worked out only.
        memo: results shared between kernel rules.
        weights: parameters of main behind the graph inputs, by name, in order.
        debug_outputs: extra outputs of main by name.
        layers: one dict of facts a contraction.
        calls: which kernel call belongs to which layer.
        skipped: nodes that an earlier node has fused.
    """

    def __init__(self, target: Target, *, dry: bool = False, debug_accumulators: bool = False) -> None:
        self.target = target
        self.dry = dry
        self.debug_accumulators = debug_accumulators
        self.memo: dict[object, Any] = {}
        self.weights: dict[str, npt.NDArray[Any]] = {}
        self.debug_outputs: dict[str, RelaxExpr] = {}
        self.layers: list[dict[str, Any]] = []
        self.calls = Calls()
        self._function = 0
        self.skipped: set[ir.Node] = set()
        self.builder = relax.BlockBuilder()
        self._parameters: dict[str, RelaxExpr] = {}
        self._symbols: dict[str, Dim] = {}
        self._values: dict[ir.Value, Value | Deferred | None] = {}
        self._constants: dict[int, tuple[Constant, Tensor]] = {}

    # Values of the graph

    def symbol(self, name: str) -> Dim:
        """The symbolic dimension of this name."""
        if name not in self._symbols:
            self._symbols[name] = dims.symbol(re.sub(r"\W", "_", name))
        return self._symbols[name]

    def fresh_symbol(self, name: str) -> Dim:
        """A symbolic dimension that no dimension of the model shares, whatever that is called."""
        while name in self._symbols:
            name += "_"
        return self.symbol(name)

    def symbols(self) -> list[Dim]:
        """All symbolic dimensions so far; a function besides main takes them as arguments."""
        return list(self._symbols.values())

    def bind(self, target: ir.Value, value: Value | Deferred) -> None:
        """Give a graph value its lowered form; write it to memory where that saves work."""
        if isinstance(value, Lazy):
            # An output is written in any case.
            shared = bool(target.uses()) if target.is_graph_output() else len(target.uses()) > 1
            if value.cost > LARGEST_COST or (shared and (value.cost > SHARED_COST or target.is_graph_output())):
                value = self.tensor(value)
        self._values[target] = value

    def fail(self, target: ir.Value) -> None:
        """Note that a graph value could not be lowered."""
        self._values[target] = None

    def is_constant(self, source: ir.Value) -> bool:
        """Whether a graph value depends on constants only."""
        value = self._values.get(source)
        if source not in self._values:
            return source.const_value is not None
        return isinstance(value, Constant) or (isinstance(value, Deferred) and value.constant)

    def is_computed(self, source: ir.Value) -> bool:
        """Whether a graph value has been emitted and is not known while compiling."""
        return isinstance(self._values.get(source), Tensor | Lazy)

    def is_deferred(self, source: ir.Value | None) -> bool:
        """Whether a graph value waits for somebody to read it."""
        return source is not None and isinstance(self._values.get(source), Deferred)

    def get(self, source: ir.Value | None) -> Value:
        """The lowered form of a graph value.

        Raises:
            DependsOnFailure: when its producer could not be lowered.
        """
        if source is None:
            raise InternalError("an input that must be present is missing")
        if source not in self._values:
            self._values[source] = self._initializer(source)
        value = self._values[source]
        if value is None:
            raise DependsOnFailure(source.name)
        return value.value() if isinstance(value, Deferred) else value

    def _initializer(self, source: ir.Value) -> Constant:
        if source.const_value is None:
            raise InternalError("a value is read before it is computed", where=source.name)
        array, dtype = dtypes.from_tensor(source.const_value, source.name or "an initializer")
        return Constant(array, dtype, source.name or "")

    def inputs(self, node: ir.Node) -> list[Value | None]:
        """The lowered inputs of a node; None where an optional one is left out."""
        return [None if source is None else self.get(source) for source in node.inputs]

    # Forms of a value

    def lazy(self, value: Value) -> Lazy:
        """The value as a formula for its elements."""
        if isinstance(value, Lazy):
            return value
        if isinstance(value, Constant):
            return self._lazy_constant(value)
        var = value.var
        return Lazy(lambda group, indices: group.read(var, indices), value.shape, value.dtype)

    def _lazy_constant(self, value: Constant) -> Lazy:
        dtype = dtypes.storage(value.dtype)
        if value.array.size == 1:
            item = value.array.reshape(-1)[0]
            return Lazy(lambda group, indices: number(item, dtype), value.shape, value.dtype, cost=0)
        if value.is_symbolic:
            return Lazy(lambda group, indices: _pick(value.array, indices, dtype), value.shape, value.dtype, cost=2)
        var = self.tensor(value).var
        return Lazy(lambda group, indices: group.read(var, indices), value.shape, value.dtype)

    def tensor(self, value: Value, name: str = "elementwise") -> Tensor:
        """The value in memory."""
        if isinstance(value, Tensor):
            return value
        if isinstance(value, Constant) and not value.is_symbolic:
            return self._constant_tensor(value)
        lazy = self.lazy(value)
        return self.kernel(name, [(lazy.shape, lazy.dtype)], lambda group: [stage(group, lazy, name)])[0]

    def var(self, value: Value, name: str = "elementwise") -> RelaxExpr:
        """The relax variable of the value in memory."""
        return self.tensor(value, name).var

    def _constant_tensor(self, value: Constant) -> Tensor:
        found = self._constants.get(id(value))
        if found is not None:
            return found[1]
        array = np.ascontiguousarray(value.array, dtype=dtypes.numpy_type(value.dtype))
        array = array.reshape(value.shape)
        dtype = dtypes.storage(value.dtype)
        if array.nbytes <= SMALL_CONSTANT_BYTES:
            var = relax.const(array, dtype)
        else:
            var = self.weight(value.name or "constant", array)
        self._constants[id(value)] = (value, Tensor(var, value.shape, value.dtype))
        return self._constants[id(value)][1]

    def reshape(self, value: Value, shape: Sequence[Dim]) -> Value:
        """The same elements in the same order under another shape of the same size; costs nothing at run time."""
        shape = tuple(shape)
        if isinstance(value, Constant) and all(dims.is_static(dim) for dim in shape):
            return Constant(value.array.reshape(shape), value.dtype, value.name)
        if dims.same_shape(value.shape, shape):
            return value
        if any(dims.is_static(dim) and dim == 0 for dim in shape):
            dtype = dtypes.storage(value.dtype)
            return Lazy(lambda group, indices: number(0, dtype), shape, value.dtype, cost=0)  # it has no elements
        if isinstance(value, Lazy):
            moved = without_ones(value, shape)
            if moved is not None:
                return moved
        tensor = self.tensor(value)
        if self.dry:
            return self.placeholder(shape, tensor.dtype)
        var = self.emit(relax.op.reshape(tensor.var, relax.ShapeExpr([dims.expression(dim) for dim in shape])))
        return Tensor(var, shape, tensor.dtype)

    def cast_shape(self, value: Value, shape: Sequence[Dim]) -> Value:
        """The value seen with dimensions that cannot be proved to be its own; the module checks them when it runs."""
        if dims.same_shape(value.shape, shape):
            return value
        tensor = self.tensor(value)
        if self.dry:
            return Tensor(tensor.var, tuple(shape), tensor.dtype)
        if not dims.defines_itself(tensor.shape, shape):
            kind = relax.TensorType(tuple(dims.expression(dim) for dim in shape), tensor.dtype)
            return Tensor(self.builder.match_cast(tensor.var, kind), tuple(shape), tensor.dtype)
        # TVM takes a cast for a definition, and of n as min(n, 3) would never come to an end. A view is refused when
        # it is larger than what it shows; that it is smaller is ruled out here.
        pairs = zip(tensor.shape, shape, strict=True)
        if not all(dims.provably(dims.expression(old) <= dims.expression(new)) for old, new in pairs):
            given, wanted = dims.text(tensor.shape), dims.text(shape)
            raise UnsupportedError("sizes cannot be told to be equal", got=f"{given} for {wanted}",
                                   remedy="fix the sizes with --shape")  # fmt: skip
        return self.reshape(tensor, shape)

    # Functions besides main

    def inner(self) -> Context:
        """A context for another function: it sees all values so far, keeps what it makes, and shares the weights."""
        other = Context(self.target, dry=self.dry)
        other.builder, other.weights, other.layers = self.builder, self.weights, self.layers
        other._parameters = self._parameters
        other.calls, other._function = self.calls, self.calls.functions
        self.calls.functions += 1
        other.memo, other._symbols = dict(self.memo), dict(self._symbols)
        other._values, other._constants = dict(self._values), dict(self._constants)
        return other

    def settle(self, source: ir.Value, *, deferred: bool) -> None:
        """Write a value to memory that another function will read; with `deferred`, one that waits for a reader too."""
        value = self._values.get(source)
        if isinstance(value, Deferred) and deferred:
            value = value.value()
        if isinstance(value, Lazy):
            self._values[source] = self.tensor(value)

    def emit(self, value: Any) -> RelaxExpr:
        """The relax variable of a new binding."""
        return self.builder.emit(value)

    def sequence(self, parameters: Sequence[RelaxExpr], body: Callable[[], RelaxExpr]) -> Any:
        """The bindings that `body` emits, with its result: the body of a function or a branch."""
        self.builder.begin_scope(list(parameters))
        self.builder._begin_binding_block()
        try:
            result = body()
        finally:
            block = self.builder._end_block()
            self.builder.end_scope()
        return relax.SeqExpr([block], result)

    def function(self, name: str, parameters: Sequence[RelaxExpr], body: Any, result: Any) -> Any:
        """Add a function to the module, with variables of its own; its global variable."""
        return self.define(self.declare(name, parameters, result), parameters, body, result)

    def declare(self, name: str, parameters: Sequence[RelaxExpr], result: Any) -> Any:
        """The global variable of a function that is defined later, so that it can call itself."""
        empty = relax.Function.create_empty(list(parameters), result)
        return self.builder.add_func(empty, re.sub(r"\W", "_", name))

    def define(self, variable: Any, parameters: Sequence[RelaxExpr], body: Any, result: Any) -> Any:
        """Give a declared function its body; the same variable."""
        function = relax.utils.copy_with_new_vars(relax.Function(list(parameters), body, result))
        self.builder.update_func(variable, function.with_attr("global_symbol", variable.name_hint))
        return variable

    # Kernels

    def kernel(
        self,
        name: str,
        outputs: Sequence[tuple[tuple[Dim, ...], str]],
        build: Callable[[Group], Sequence[TeTensor]],
        kind: str = "injective",
        attributes: Mapping[str, Any] | None = None,
    ) -> list[Tensor]:
        """One kernel made of TE expressions, to be scheduled by the target's rules.

        Args:
            name: base of its name.
            outputs: (shape, dtype) of what it writes.
            build: makes the te tensors that are written, reading its inputs through the group.
            kind: what the schedule rules may expect: "injective" (one stage, no reduction), "reduce" (one reduction
                and its epilogue), "rows" (stages over the last axis of a matrix) or "general".
            attributes: further attributes of the prim func.
        """
        if self.dry:
            return [self.placeholder(shape, dtype) for shape, dtype in outputs]
        group = Group()
        function, arguments, types = group.finish(list(build(group)), list(self._symbols.values()))
        function = function.with_attrs({KIND: kind, **(attributes or {})})
        variables = self._call(function, name, arguments, types)
        return [Tensor(var, tuple(shape), dtype) for var, (shape, dtype) in zip(variables, outputs, strict=True)]

    def call(
        self,
        prim_func: PrimFunc,
        name_hint: str,
        inputs: Sequence[RelaxExpr],
        outputs: Sequence[tuple[tuple[Dim, ...], str]],
    ) -> Any:
        """call_tir: one variable for one output (shape, dtype), a list of variables for several."""
        types = [relax.TensorType(tuple(dims.expression(dim) for dim in shape), dtype) for shape, dtype in outputs]
        variables = self._call(prim_func, name_hint, list(inputs), types)
        return variables[0] if len(variables) == 1 else variables

    def _call(self, function: PrimFunc, name: str, arguments: list[Any], types: list[Any]) -> list[RelaxExpr]:
        function = function.without_attr("global_symbol")
        found = self.builder.add_func(function, re.sub(r"\W", "_", name) or "kernel")
        result = self.emit(relax.op.call_tir(found, arguments, types if len(types) > 1 else types[0]))
        made = [result]
        if len(types) > 1:
            made = [self.emit(relax.TupleGetItem(result, index)) for index in range(len(types))]
        self.calls.add(str(found.name_hint), self._function, arguments, made)
        return made

    def placeholder(self, shape: Sequence[Dim], dtype: str) -> Tensor:
        """A value without a kernel behind it, for dry runs."""
        kind = relax.TensorType(tuple(dims.expression(dim) for dim in shape), dtypes.storage(dtype))
        return Tensor(relax.Var("dry", kind), tuple(shape), dtype)

    @contextmanager
    def scheduled(self, rule: str, contraction: Contraction) -> Iterator[None]:
        """The target has the schedule that was found for a contraction, while it lasts."""
        usual = self.target
        self.target = scheduled(usual, rule, contraction)
        try:
            yield
        finally:
            self.target = usual

    # Parameters and outputs of main

    def weight(self, name: str, array: npt.NDArray[Any]) -> RelaxExpr:
        """Register a parameter of main; the bundle stores the array under this name (made unique)."""
        unique, count = name, 1
        while unique in self.weights:
            unique, count = f"{name}.{count}", count + 1
        dtype = "bfloat16" if array.dtype == dtypes.numpy_type("bfloat16") else str(array.dtype)
        self.weights[unique] = array
        var = relax.Var(f"weight_{len(self.weights)}", relax.TensorType(array.shape, dtype))
        self._parameters[unique] = var
        return var

    def weight_parameters(self) -> list[RelaxExpr]:
        """The relax variables of `weights`, in the same order."""
        return list(self._parameters.values())

    def debug_output(self, name: str, value: RelaxExpr) -> None:
        """Make a value an extra output of main under this name."""
        self.debug_outputs[name] = value


def number(item: Any, dtype: str) -> Expr:
    """A number or an expression over dimensions as a scalar expression of a type."""
    if isinstance(item, bool | np.bool_):
        return tirx.const(bool(item), "bool") if dtype == "bool" else tirx.const(int(item), dtype)
    if isinstance(item, int | float | np.generic):
        value = float(item) if dtypes.is_float(dtype) else int(item)
        return tirx.const(bool(value), "bool") if dtype == "bool" else tirx.const(value, dtype)
    return item if str(item.ty.dtype) == dtype else tirx.Cast(dtype, item)


def stage(group: Group, lazy: Lazy, name: str = "compute") -> TeTensor:
    """A lazy value as the te tensor that a kernel writes."""
    return compute(lazy.shape, lambda indices: lazy.element(group, indices), name)


def _pick(array: npt.NDArray[Any], indices: Sequence[Index], dtype: str) -> Expr:
    """An element of a small array of expressions at run-time indices: a chain of selects."""
    flat: Any = 0
    for size, index in zip(array.shape, indices, strict=True):
        flat = flat * size + index
    items = [number(item, dtype) for item in array.reshape(-1)]
    result = items[-1]
    for position in range(len(items) - 2, -1, -1):
        result = tirx.Select(flat == position, items[position], result)
    return result


def node_name(node: ir.Node) -> str:
    """A name for a node's kernels and weights: its own, or that of its first output."""
    return node.name or next((value.name for value in node.outputs if value.name), "") or describe(node)
