"""From the canonical ONNX graph to a relax module `main(inputs..., weights...) -> tuple(outputs)`.

Every node is emitted by the function of its operator type. Elementwise and index operators stay formulas and fuse
into the kernel that reads them; shapes are evaluated while compiling; contractions go to the target's kernel rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from tvm import relax

from kbitc.errors import InternalError, KbitcError, UnsupportedError
from kbitc.graph import functions
from kbitc.graph.edit import describe
from kbitc.graph.evaluate import run_node
from kbitc.targets.lower import dims, dtypes, known
from kbitc.targets.lower.attention import fuse_attention
from kbitc.targets.lower.context import Context, DependsOnFailure, node_name
from kbitc.targets.lower.contraction import Dim, RelaxExpr
from kbitc.targets.lower.layout import to_channels_last
from kbitc.targets.lower.registry import FUNCTION_DOMAIN, Emit, emitters
from kbitc.targets.lower.unsupported import refuse
from kbitc.targets.lower.values import Constant, Deferred, Lazy, Tensor, Value
from kbitc.targets.lower.weight_checks import mark_inputs
from kbitc.targets.target import Target

# Failing nodes that one error message names.
MOST_LISTED = 12
FOLD_OPSET = 21
DEBUG_TYPES = (ir.DataType.UINT8, ir.DataType.INT32)
# Emitted only for readers that are no kernel rules.
WAITING = {
    ("", "DequantizeLinear"),
    *((FUNCTION_DOMAIN, name) for name in ("DynamicQuantize", "DequantizeKBit", "DequantizeKBitOffset")),
}


@dataclass(frozen=True)
class Signature:
    """One input or output of main.

    Attributes:
        name: tensor name in the model.
        dtype: tvm type name.
        shape: numbers, or text of symbolic dimensions.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Lowered:
    """A relax module and what belongs to it.

    Attributes:
        module: tvm IRModule with `main` and its kernels.
        weights: arrays of the parameters behind the inputs, in order.
        inputs, outputs: signature of main; debug outputs come last.
        layers: one dict of facts a contraction: which rule took it, why others declined.
        calls: one dict a kernel call: the layers it works for.
    """

    module: Any
    weights: dict[str, npt.NDArray[Any]]
    inputs: tuple[Signature, ...]
    outputs: tuple[Signature, ...]
    layers: tuple[dict[str, Any], ...]
    calls: tuple[dict[str, Any], ...] = ()


def lower(model: ir.Model, target: Target, *, debug_accumulators: bool = False) -> Lowered:
    """Emit a model.

    Args:
        model: canonical graph (see `kbitc.graph.legality`); not changed.
        target: whose kernel rules are asked.
        debug_accumulators: integer contractions also output their accumulators and codes, and every uint8 and int32
            value that is computed at run time is an output too, under its name in the channels-last graph.

    Raises:
        UnsupportedError: names every node that cannot be emitted.
    """
    model = _laid_out(functions.inline_plain(model.clone()), target, codes=not debug_accumulators)
    ctx = Context(target, debug_accumulators=debug_accumulators)
    with ctx.builder.function("main"):
        try:
            inputs = _bind_inputs(ctx, model.graph)
            _raise(_emit_nodes(ctx, model.graph))
            if debug_accumulators:
                _debug_integers(ctx, model.graph)
            outputs = _outputs(ctx, model.graph, inputs)
        except BaseException:
            ctx.builder._end_block()  # TVM would warn of it on standard error
            raise
        extra = list(ctx.debug_outputs.items())
        parameters = [*(pair[1].var for pair in inputs), *ctx.weight_parameters()]
        results = [*(pair[1].var for pair in outputs), *(var for _, var in extra)]
        # A tuple costs a call to make it and several to take it apart.
        ctx.builder.emit_func_output(results[0] if len(results) == 1 else relax.Tuple(results), params=parameters)
    return Lowered(
        mark_inputs(ctx.builder.finalize(), len(inputs)),
        ctx.weights,
        tuple(_signature(name, value) for name, value in inputs),
        (*(_signature(name, value) for name, value in outputs), *(_debug_signature(name, var) for name, var in extra)),
        tuple(ctx.layers),
        tuple(call.as_json() for call in ctx.calls.records),
    )


def check_lowerable(model: ir.Model, target: Target) -> None:
    """Walk a model without building kernels.

    Raises:
        UnsupportedError: one error that names every node that cannot be emitted.
    """
    model = _laid_out(model.clone(), target)
    ctx = Context(target, dry=True)
    _bind_inputs(ctx, model.graph)
    _raise(_emit_nodes(ctx, model.graph))


def _laid_out(model: ir.Model, target: Target, *, codes: bool = True) -> ir.Model:
    """The graph as the rules of the target want it, rewritten in place; `codes`: attention of codes may be fused."""
    model = to_channels_last(model)
    return fuse_attention(model, codes=codes) if target.fuses_attention() else model


def emit_graph(ctx: Context, graph: ir.Graph) -> None:
    """Emit the nodes of a graph whose inputs are bound.

    Raises:
        UnsupportedError: names every node that cannot be emitted.
    """
    _raise(_emit_nodes(ctx, graph))


def _bind_inputs(ctx: Context, graph: ir.Graph) -> list[tuple[str, Tensor]]:
    found = []
    for position, value in enumerate(graph.inputs):
        if value.is_initializer():
            continue
        where = f"input {value.name!r}"
        if value.shape is None:
            raise UnsupportedError("an input has no shape", where=where, remedy="give it with --shape")
        dtype = dtypes.tvm_type(value.dtype, where)
        shape = tuple(_input_dim(ctx, dim, f"{position}_{axis}") for axis, dim in enumerate(value.shape.dims))
        var = relax.Var(f"input_{position}", relax.TensorType(tuple(dims.expression(dim) for dim in shape), dtype))
        tensor = Tensor(var, shape, dtype)
        ctx.bind(value, tensor)
        found.append((value.name or f"input_{position}", tensor))
    return found


def _input_dim(ctx: Context, dim: int | ir.SymbolicDim, place: str) -> Dim:
    if isinstance(dim, int):
        return dim
    return ctx.symbol(dim.value if dim.value else f"dim_{place}")


def _emit_nodes(ctx: Context, graph: ir.Graph) -> list[KbitcError]:
    """Emit all nodes; the errors of those that cannot be."""
    errors: list[KbitcError] = []
    for node in graph:
        if node in ctx.skipped:
            continue
        try:
            with ctx.calls.working_for(node_name(node)):
                _emit(ctx, node)
        except DependsOnFailure:
            _fail(ctx, node)
            if (node.domain, node.op_type) not in emitters():
                errors.append(_no_emitter(node))
        except UnsupportedError as error:
            _fail(ctx, node)
            errors.append(error)
    return errors


def _debug_integers(ctx: Context, graph: ir.Graph) -> None:
    """Make the codes and sums of integer islands outputs; what is fused into a kernel is an output of its rule."""
    for node in graph:
        for output in node.outputs:
            if output.dtype in DEBUG_TYPES and not output.is_graph_output() and ctx.is_computed(output):
                ctx.debug_output(output.name or "", ctx.var(ctx.get(output), "debug"))


def _fail(ctx: Context, node: ir.Node) -> None:
    for output in node.outputs:
        ctx.fail(output)


def _no_emitter(node: ir.Node) -> UnsupportedError:
    return refuse(node, f"operator {node.op_type} cannot be compiled")


def _emit(ctx: Context, node: ir.Node) -> None:
    """Emit one node and bind its outputs."""
    emit = emitters().get((node.domain, node.op_type))
    if emit is None:
        raise _no_emitter(node)
    if _waits(ctx, node):
        _bind_later(ctx, node, emit)
        return
    if not node.domain and node.op_type in known.OPERATORS:
        result: Any = known.evaluate(ctx, node, ctx.inputs(node))
        result = emit(ctx, node) if result is None else result
    else:
        result = emit(ctx, node)
    if result is None:
        return  # the emitter has bound the outputs itself
    values: Sequence[Value | Deferred] = result if isinstance(result, list) else [result]
    for output, value in zip(node.outputs, values, strict=False):
        ctx.bind(output, value)


def _waits(ctx: Context, node: ir.Node) -> bool:
    """Whether a node is emitted only when somebody reads it: it makes a quantized operand, or all it reads is known.

    Kernel rules read codes and scales behind such nodes, so that emitting them would leave dead kernels and weights.
    """
    if (node.domain, node.op_type) in WAITING:
        return True
    sources = [source for source in node.inputs if source is not None]
    return bool(sources) and all(ctx.is_constant(source) for source in sources) and not _small(ctx, node)


def _small(ctx: Context, node: ir.Node) -> bool:
    """Whether the node is evaluated at once while compiling."""
    if node.domain or node.op_type not in known.OPERATORS or any(ctx.is_deferred(source) for source in node.inputs):
        return False
    return known.is_small(ctx.inputs(node))


def _bind_later(ctx: Context, node: ir.Node, emit: Emit) -> None:
    made: list[Value] = []
    constant = all(source is None or ctx.is_constant(source) for source in node.inputs)

    def compute(index: int) -> Value:
        if not made:
            made.extend(_folded(ctx, node) if _foldable(ctx, node) else _emitted(ctx, node, emit))
        return made[index]

    for index, output in enumerate(node.outputs):
        ctx.bind(output, Deferred(partial(compute, index), constant))


def _emitted(ctx: Context, node: ir.Node, emit: Emit) -> list[Value]:
    with ctx.calls.working_for(node_name(node)):
        result = emit(ctx, node)
    values = result if isinstance(result, list) else [result]
    return [value.value() if isinstance(value, Deferred) else value for value in values]


def _foldable(ctx: Context, node: ir.Node) -> bool:
    """Whether onnxruntime can work a node out: all it reads is known, and not only up to symbolic dimensions; types
    below 8 bits are not as it wants them here."""
    if node.domain or node.op_type in ("DequantizeLinear", "QuantizeLinear"):
        return False
    values = [ctx.get(source) for source in node.inputs if source is not None]
    return all(isinstance(value, Constant) and not value.is_symbolic for value in values)


def _folded(ctx: Context, node: ir.Node) -> list[Value]:
    """The outputs of a node of constants, worked out while compiling."""
    arrays = [None if source is None else np.asarray(_known_array(ctx, source)) for source in node.inputs]
    opset = node.graph.opset_imports.get("", FOLD_OPSET) if node.graph is not None else FOLD_OPSET
    results = run_node(node, arrays, opset)
    return [
        Constant(array, dtypes.tvm_type(ir.DataType.from_numpy(array.dtype), describe(node)), output.name or "")
        for array, output in zip(results, node.outputs, strict=False)
    ]


def _known_array(ctx: Context, source: ir.Value) -> npt.NDArray[Any]:
    value = ctx.get(source)
    if not isinstance(value, Constant) or value.is_symbolic:
        raise InternalError("a constant is not known", where=source.name)
    return value.array


def _raise(errors: Sequence[KbitcError]) -> None:
    if not errors:
        return
    if len(errors) == 1:
        raise errors[0]
    shown = "; ".join(f"({number}) {error}" for number, error in enumerate(errors[:MOST_LISTED], start=1))
    more = f"; and {len(errors) - MOST_LISTED} more" if len(errors) > MOST_LISTED else ""
    raise UnsupportedError(f"{len(errors)} nodes cannot be compiled: {shown}{more}")


def _outputs(ctx: Context, graph: ir.Graph, inputs: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The graph's outputs in memory of their own: an input, a weight or a repeated output is copied."""
    taken: list[RelaxExpr] = [tensor.var for _, tensor in inputs]
    taken.extend(ctx.weight_parameters())
    found = []
    for value in graph.outputs:
        if value.name is None:
            raise InternalError("an output has no name")
        tensor = _own_memory(ctx, ctx.get(value), taken)
        taken.append(tensor.var)
        found.append((value.name, tensor))
    return found


def _own_memory(ctx: Context, value: Value, taken: Sequence[RelaxExpr]) -> Tensor:
    if dtypes.storage(value.dtype) != value.dtype:
        raise UnsupportedError("an output of a type below 8 bits cannot be compiled", got=value.dtype)
    shared = isinstance(value, Constant) or (
        isinstance(value, Tensor) and any(value.var.same_as(other) for other in taken)
    )
    if shared:
        lazy = ctx.lazy(value)
        value = Lazy(lazy.element, lazy.shape, lazy.dtype)
    return ctx.tensor(value, "copy")


def _signature(name: str, value: Tensor) -> Signature:
    return Signature(name, value.dtype, tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape))


def _debug_signature(name: str, var: RelaxExpr) -> Signature:
    shape = tuple(dims.as_dim(dim) for dim in var.ty.shape.values)
    return Signature(name, str(var.ty.dtype), tuple(dim if isinstance(dim, int) else str(dim) for dim in shape))
