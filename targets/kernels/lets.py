"""Makes bound names (`Let`) cheap to compile: flat, and through memory where they would grow.

TVM's analyses put the value of a name in the place of the name and walk the result as a tree, whose size is
exponential in a chain such as exp(exp(x)): minutes for three functions. Two steps cure it.

`flatten_lets` moves every Let outwards:
    Before: f(Let a = (Let b = v in g(b)) in h(a))        After: Let b = v in Let a = g(b) in f(h(a))
    Keeps a Let inside: the values of an if_then_else, and those of a Select when the bound value reads memory,
    because what was read only under the condition may be out of bounds.
`lower_lets` then gives every name whose tree is large a local buffer of its own:
    Before: B[i] = Let a = v in f(a)                      After: r = local; r[0] = v; B[i] = f(r[0])
    LLVM keeps such a buffer in a register; the analyses stop at a load. Inside a vectorised loop of variable j the
    buffer is allocated in front of the loop and its index is j.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import ir, tirx

Expr = Any
Binding = tuple[Any, Any]

_BINARY = (
    tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod, tirx.Min, tirx.Max,
    tirx.EQ, tirx.NE, tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.And, tirx.Or,
)  # fmt: skip
_ARITHMETIC = (tirx.Add, tirx.Sub, tirx.Mul, tirx.FloorDiv, tirx.FloorMod, tirx.Min, tirx.Max)
_GUARDED = "prim.if_then_else"
_LARGEST_TREE = 60
#: Nodes of an expression of sizes that stays where it is: quotients of one or two dims are simplified well.
_LARGEST_SIZE = 30


def _peel(value: Expr) -> tuple[list[Binding], Expr]:
    """The bindings at the top of a value, and what is inside them."""
    bindings: list[Binding] = []
    while isinstance(value, tirx.Let):
        bindings.append((value.var, value.value))
        value = value.body
    return bindings, value


def _wrap(bindings: list[Binding], value: Expr) -> Expr:
    for variable, bound in reversed(bindings):
        value = tirx.Let(variable, bound, value)
    return value


def _reads_memory(value: Expr) -> bool:
    loads: list[Any] = []
    tvm_ffi.structural_walk(value, (ir.TensorLoad, loads.append))
    return bool(loads)


def _peel_unguarded(value: Expr) -> tuple[list[Binding], Expr]:
    """As `_peel`, up to the first binding that reads memory."""
    bindings: list[Binding] = []
    while isinstance(value, tirx.Let) and not _reads_memory(value.value):
        bindings.append((value.var, value.value))
        value = value.body
    return bindings, value


def _hoist_let(let: Any) -> Expr:
    inner, value = _peel(let.value)
    return _wrap([*inner, (let.var, value)], let.body) if inner else let


def _hoist_binary(node: Any) -> Expr:
    left, a = _peel(node.a)
    right, b = _peel(node.b)
    return _wrap([*left, *right], type(node)(a, b)) if left or right else node


def _hoist_not(node: Any) -> Expr:
    bindings, a = _peel(node.a)
    return _wrap(bindings, tirx.Not(a)) if bindings else node


def _hoist_cast(node: Any) -> Expr:
    bindings, value = _peel(node.value)
    return _wrap(bindings, tirx.Cast(node.ty.dtype, value)) if bindings else node


def _hoist_select(node: Any) -> Expr:
    outer, condition = _peel(node.condition)
    left, yes = _peel_unguarded(node.true_value)
    right, no = _peel_unguarded(node.false_value)
    bindings = [*outer, *left, *right]
    return _wrap(bindings, tirx.Select(condition, yes, no)) if bindings else node


def is_guard(node: Any) -> bool:
    """Whether a call is an if_then_else, which evaluates only one of its values."""
    return isinstance(node.op, ir.Op) and node.op.name == _GUARDED


def _hoist_call(node: Any) -> Expr:
    guarded = is_guard(node)
    bindings: list[Binding] = []
    arguments = []
    for position, argument in enumerate(node.args):
        if guarded and position:
            arguments.append(argument)
            continue
        found, value = _peel(argument)
        bindings += found
        arguments.append(value)
    if not bindings:
        return node
    return _wrap(bindings, ir.Call(node.op, arguments, ret_ty=node.ty, attrs=node.attrs))


def flatten_lets(node: Any) -> Any:
    """The expression, statement or PrimFunc with its Let chains flat; names that occur twice are made unique.

    Args:
        node: an expression, a statement, or a PrimFunc (then every Let variable of the result is bound once).
    """
    if isinstance(node, tirx.PrimFunc):
        module = tirx.transform.ConvertSSA()(ir.IRModule({"main": node}))
        node = module["main"]
        return node.with_body(flatten_lets(node.body))
    rules = [
        (tirx.Let, _hoist_let),
        *[(kind, _hoist_binary) for kind in _BINARY],
        (tirx.Not, _hoist_not),
        (tirx.Cast, _hoist_cast),
        (tirx.Select, _hoist_select),
        (ir.Call, _hoist_call),
    ]
    return tvm_ffi.structural_map(node, rules, order="post")


def _tree_sizes(value: Expr, sizes: dict[Any, int]) -> int:
    """Nodes of the tree that a value stands for, with names replaced by what they are bound to."""
    total = 0

    def count(node: Any) -> None:
        nonlocal total
        total += sizes.get(node, 1) if isinstance(node, tirx.Var) else 1

    tvm_ffi.structural_walk(value, ((ir.Expr,), count))
    return total


class _Spiller:
    """Rewrites the stores of one loop nest.

    `lane` is the variable of the vectorised loop around them, of extent `lanes`; None outside of one.
    """

    def __init__(self, lane: Any, lanes: int) -> None:
        self.lane, self.lanes = lane, lanes
        self.allocations: list[Any] = []

    def _buffer(self, variable: Any) -> tuple[Any, Expr]:
        """A new buffer for a name, and the index of its value."""
        text = str(variable.ty.dtype)
        dtype, _, width = text.partition("x")
        lanes = int(width) if width else self.lanes
        # Scope "global": small buffers of it lie on the stack, those of scope "local" are allocated by a call.
        buffer = tirx.decl_buffer((lanes,), dtype, name=variable.name)
        self.allocations.append(tirx.AllocBuffer(buffer))
        zero = tirx.const(0, "int64")
        if width:
            return buffer, tirx.Ramp(zero, tirx.const(1, "int64"), lanes)
        return buffer, zero if self.lane is None else self.lane

    def store(self, store: Any) -> Any:
        """One BufferStore, behind the stores of the names that were too large."""
        bindings, value = _peel(flatten_lets(store.value))
        sizes: dict[Any, int] = {}
        kept: list[Binding] = []
        statements = []
        for variable, bound in bindings:
            sizes[variable] = _tree_sizes(bound, sizes)
            if sizes[variable] <= _LARGEST_TREE:
                kept.append((variable, bound))
                continue
            buffer, index = self._buffer(variable)
            statements.append(tirx.BufferStore(buffer, _wrap(_needed(kept, bound), bound), [index]))
            # The load gets the name: a Select of loads would become a branch (RewriteUnsafeSelect).
            kept.append((variable, buffer[index]))
            sizes[variable] = 1
        statements.append(tirx.BufferStore(store.buffer, _wrap(_needed(kept, value), value), store.indices))
        return statements[0] if len(statements) == 1 else tirx.SeqStmt(statements)


def _needed(bindings: list[Binding], value: Expr) -> list[Binding]:
    """The bindings that a value uses, directly or through others, under fresh names."""
    used: set[Any] = set()
    tvm_ffi.structural_walk(value, (tirx.Var, used.add))
    needed = []
    for variable, bound in reversed(bindings):
        if variable in used:
            needed.append((variable, bound))
            tvm_ffi.structural_walk(bound, (tirx.Var, used.add))
    return needed[::-1]


def lower_lets(function: Any) -> Any:
    """A PrimFunc without blocks, in which no name stands for a large tree."""

    vectorised: set[Any] = set()

    def note(loop: Any) -> None:
        if loop.kind == tirx.ForKind.VECTORIZED:
            tvm_ffi.structural_walk(loop.body, ((tirx.BufferStore, lambda store: vectorised.add(store)),))

    def single_store(store: Any) -> Any:
        if store in vectorised:
            return store
        spiller = _Spiller(None, 1)
        statement = spiller.store(store)
        return tirx.SeqStmt([*spiller.allocations, statement]) if spiller.allocations else store

    def vector_loop(loop: Any) -> Any:
        if loop.kind != tirx.ForKind.VECTORIZED:
            return loop
        spiller = _Spiller(loop.loop_var, int(loop.extent))
        body = tvm_ffi.structural_map(loop.body, [(tirx.BufferStore, spiller.store)], order="post")
        if not spiller.allocations:
            return loop
        renewed = tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body)
        return tirx.SeqStmt([*spiller.allocations, renewed])

    tvm_ffi.structural_walk(function.body, ((tirx.For, note),))
    body = tvm_ffi.structural_map(function.body, [(tirx.BufferStore, single_store)], order="post")
    body = tvm_ffi.structural_map(body, [(tirx.For, vector_loop)], order="post")
    module = tirx.transform.ConvertSSA()(ir.IRModule({"main": function.with_body(body)}))
    return module["main"]


def name_sizes(function: Any, body: Any) -> Any:
    """The body with a name for every large expression of nothing but sizes, computed once, in front of it.

    Open heights and widths give dims such as ((h - 1) // 32 * 4 + 4) * ((w - 1) // 32 * 4 + 4), and an index divides by
    sums of them: TVM's simplifier then takes minutes for one kernel. A name is bound to a load, where it stops.
    """
    sizes: set[Any] = set()
    for param in function.params:
        for dim in getattr(param.ty, "shape", ()):
            tvm_ffi.structural_walk(dim, (tirx.Var, sizes.add))
    named: list[Binding] = []

    def name(value: Expr) -> Expr:
        if not _is_of(sizes, value) or _tree_sizes(value, {}) <= _LARGEST_SIZE:
            return value
        for variable, known in named:
            if tvm_ffi.structural_equal(known, value):
                return variable
        named.append((tirx.Var(f"size{len(named)}", str(value.ty.dtype)), value))
        return named[-1][0]

    body = tvm_ffi.structural_map(body, [(_BINARY, name)], order="pre")
    if not named:
        return body
    held = tirx.decl_buffer((len(named),), "int64", name="sizes")
    statements = [tirx.AllocBuffer(held)]
    places = [tirx.const(position, "int64") for position in range(len(named))]
    statements += [tirx.BufferStore(held, value, [place]) for (_, value), place in zip(named, places, strict=True)]
    statements += [tirx.Bind(variable, held[place]) for (variable, _), place in zip(named, places, strict=True)]
    return tirx.SeqStmt([*statements, body])


def _is_of(sizes: set[Any], value: Expr) -> bool:
    """Whether an int64 expression is made of these variables and numbers alone."""
    if isinstance(value, _ARITHMETIC):
        return str(value.ty.dtype) == "int64" and _is_of(sizes, value.a) and _is_of(sizes, value.b)
    return value in sizes if isinstance(value, tirx.Var) else isinstance(value, tirx.IntImm)
