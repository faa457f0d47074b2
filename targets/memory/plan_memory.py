"""Gives every value of a function its place in memory while compiling.

Before, after CallTIRRewrite:
    a = builtin.alloc_tensor([n, 64]);  kernel(x, a);  b = builtin.alloc_tensor([n, 64]);  kernel_1(a, b);  ...
After:
    arena = memory.alloc_storage([extent(n)])
    a = memory.alloc_tensor(arena, 0, [n, 64]);  b = memory.alloc_tensor(arena, 0, [n, 64]);  ...
    place(a, b, ..., n);  kernel(x, a);  kernel_1(a, b);  ...
and a storage for each value that the function returns, in which others lie before that. Kernels take no tensor that
starts inside of its memory, so `place` moves the pointers, by offsets that it computes from the symbolic dims.
Keeps, for TVM's StaticPlanBlockMemory, a function that branches; and a value whose size depends on more than the shapes
of the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kbitc.targets.memory.arena import Room, Value, plan
from kbitc.targets.memory.place import extent_function, place_function, rounded
from kbitc.targets.memory.sizes import Sizes

ALLOCATE, KILL, RESHAPE = "relax.builtin.alloc_tensor", "relax.memory.kill_tensor", "relax.reshape"
# Symbolic dims for which layouts are made and compared: all alike, and one of them against the others (one sample, one
# token, many tokens, a line of text as OCR models read it). They decide which layouts there are, not what is right.
TRIED = (4, 32, 128, 512)
AGAINST = ((1, 64), (1, 512), (512, 32), (48, 320))


@dataclass
class _Tensor:
    """One allocation: its variable, its value, the place of its size, and the steps from its making to its last use."""

    var: Any
    value: Any
    size: int
    first: int
    last: int
    kept: bool = False


@dataclass
class _Uses:
    """What is known of the variables of a function.

    Attributes:
        tensors: by the variable of the allocation.
        memory: variable -> the allocations that it may lie in.
        fields: variable of a tuple -> the expressions in it.
    """

    tensors: dict[Any, _Tensor] = field(default_factory=dict)
    memory: dict[Any, frozenset[Any]] = field(default_factory=dict)
    fields: dict[Any, Sequence[Any]] = field(default_factory=dict)

    def of(self, expression: Any) -> frozenset[Any]:
        """The allocations that an expression may lie in; of what is not known, all that it is made from."""
        from tvm import relax

        if isinstance(expression, relax.TupleGetItem) and expression.tuple_value in self.fields:
            return self.of(self.fields[expression.tuple_value][int(expression.index)])
        if isinstance(expression, relax.Var):
            return self.memory.get(expression, frozenset())
        if isinstance(expression, relax.Tuple):
            return self._all(expression.fields)
        if isinstance(expression, relax.TupleGetItem):
            return self.of(expression.tuple_value)
        if isinstance(expression, relax.Call):
            return self._all(expression.args)
        return frozenset()

    def _all(self, expressions: Iterable[Any]) -> frozenset[Any]:
        return frozenset().union(*(self.of(item) for item in expressions))


def plan_memory(module: Any) -> Any:
    """The module, after CallTIRRewrite, with storages in place of allocations."""
    import tvm
    from tvm import relax, transform

    passes = relax.transform
    functions = dict(module.functions_items())
    straight = {var: function for var, function in functions.items() if _is_straight(function)}
    others = {var: function for var, function in functions.items() if var not in straight}
    tvms = transform.Sequential([passes.StaticPlanBlockMemory(), passes.LowerAllocTensor(), passes.KillAfterLastUse()])
    builder = relax.BlockBuilder(tvms(tvm.IRModule(others, attrs=module.attrs)))
    # It also puts allocations in the place of what merely names them.
    known = passes.KillAfterLastUse()(tvm.IRModule(straight))
    for var, function in known.functions_items():
        planned = _planned(builder, function)
        if _allocates(planned):
            planned = tvms(tvm.IRModule({var: planned}))[var]
        made = builder.get()
        made[var] = planned
        builder = relax.BlockBuilder(made)
    return builder.get()


def _allocates(function: Any) -> bool:
    """Whether there are values that are left to TVM."""
    return any(_is_call(binding.value, ALLOCATE) for block in function.body.blocks for binding in block.bindings)


def _is_straight(function: Any) -> bool:
    """Whether it is a relax function without branches."""
    from tvm import relax

    if not isinstance(function, relax.Function) or not isinstance(function.body, relax.SeqExpr):
        return False
    found: list[bool] = []
    relax.analysis.post_order_visit(function.body, lambda node: found.append(isinstance(node, relax.If)))
    return not any(found)


def _planned(builder: Any, function: Any) -> Any:
    from tvm import relax

    bindings = _used([binding for block in function.body.blocks for binding in block.bindings], function.body.body)
    sizes = Sizes()
    tensors = _tensors(bindings, function, sizes)
    made = _allocated(builder, tensors, sizes)
    lasting = {tensor.var for tensor in tensors}
    for binding in bindings:
        value = binding.value
        if _is_call(value, RESHAPE) and value.args[0] in lasting:
            lasting.add(binding.var)
        if not _is_allocation(value) or binding.var not in lasting:
            # A kill gives nothing back while other tensors lie in the storage.
            made += [] if _is_call(value, KILL) and value.args[0] in lasting else [binding]
    body = relax.SeqExpr([relax.BindingBlock(made)], function.body.body)
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs, function.span)


def _used(bindings: Sequence[Any], result: Any) -> list[Any]:
    """The bindings without tuples that nobody reads any more."""
    from tvm import relax

    read: set[Any] = set()

    def visit(node: Any) -> None:
        if isinstance(node, relax.Var):
            read.add(node)

    for expression in (*(binding.value for binding in bindings), result):
        relax.analysis.post_order_visit(expression, visit)
    return [binding for binding in bindings if binding.var in read or not isinstance(binding.value, relax.Tuple)]


def _tensors(bindings: Sequence[Any], function: Any, sizes: Sizes) -> list[_Tensor]:
    """The allocations that are planned, in order."""
    from tvm import relax

    uses = _Uses()
    known = _dims_of_parameters(function)
    for step, binding in enumerate(bindings):
        value = binding.value
        if _is_call(value, KILL):
            continue
        for root in uses.of(value):
            uses.tensors[root].last = step
        if _is_allocation(value):
            size = _size(value, known, sizes)
            if size is not None:
                uses.tensors[binding.var] = _Tensor(binding.var, value, size, step, step)
                uses.memory[binding.var] = frozenset([binding.var])
            continue
        if isinstance(value, relax.Tuple):
            uses.fields[binding.var] = list(value.fields)
        uses.memory[binding.var] = uses.of(value)
    for root in uses.of(function.body.body):
        uses.tensors[root].kept = True
    return list(uses.tensors.values())


def _is_allocation(value: Any) -> bool:
    """Whether it is of the function's own device and ordinary memory."""
    return _is_call(value, ALLOCATE) and _number(value.args[2]) == 0 and str(value.args[3].value) == "global"


def _is_call(value: Any, name: str) -> bool:
    from tvm import relax

    return isinstance(value, relax.Call) and getattr(value.op, "name", "") == name


def _number(expression: Any) -> int:
    return int(getattr(expression, "value", expression))


def _dims_of_parameters(function: Any) -> list[Any]:
    """The symbols that are known where the function starts."""
    from tvm import relax, tirx

    found: list[Any] = []
    for parameter in function.params:
        kind = parameter.ty if isinstance(parameter.ty, relax.ShapeType) else getattr(parameter.ty, "shape", None)
        found.extend(value for value in getattr(kind, "values", None) or () if isinstance(value, tirx.Var))
    return found


def _size(allocation: Any, known: Sequence[Any], sizes: Sizes) -> int | None:
    """The place of the size of a tensor; None where it is not known at the start of the function."""
    from tvm import DataType

    from kbitc.targets.lower import dims

    shape = [dims.as_dim(dim) for dim in allocation.args[0].values]
    if any(not any(symbol.same_as(other) for other in known) for dim in shape for symbol in dims.variables(dim)):
        return None
    return sizes.place(shape, DataType(str(allocation.args[1].value)).itemsize)


def _allocated(builder: Any, tensors: Sequence[_Tensor], sizes: Sizes) -> list[Any]:
    """Bindings of all storages and of the tensors in them, at their places."""
    from tvm import relax, tirx

    inner, outputs = ([tensor for tensor in tensors if tensor.kept is kept] for kept in (False, True))
    made = [item for output in outputs for item in _in_storage([output], rounded(sizes.expressions[output.size]))]
    if not inner:
        return made
    values = [Value(tensor.size, tensor.first, tensor.last) for tensor in inner]
    rooms = [Room(output.size, output.first) for output in outputs]
    layouts = plan(values, rooms, [sizes.at(numbers) for numbers in _tried(len(sizes.symbols))])
    # Of known sizes, the last one fits and is the best.
    layouts = layouts if sizes.symbols else layouts[-1:]
    symbols = [relax.prim_value(symbol) for symbol in sizes.symbols]
    extent = extent_function(layouts, values, rooms, sizes)
    if not isinstance(extent, int):
        size = tirx.Var("extent", "int64")
        made.append(relax.VarBinding(size, relax.Call(builder.add_func(extent, "extent"), symbols)))
        extent = size
    made += _in_storage(inner, extent)
    place = builder.add_func(place_function(layouts, values, rooms, sizes), "place")
    arguments = [*(tensor.var for tensor in (*inner, *outputs)), *symbols]
    return [*made, relax.VarBinding(relax.Var("placed", relax.TupleType([])), relax.Call(place, arguments))]


def _tried(symbols: int) -> list[list[int]]:
    """Numbers for the symbols, for which layouts are found and compared."""
    if not symbols:
        return [[]]
    alone = [[one if i == j else rest for i in range(symbols)] for one, rest in AGAINST for j in range(symbols)]
    return [*([number] * symbols for number in TRIED), *(alone if symbols > 1 else [])]


def _in_storage(tensors: Sequence[_Tensor], size: Any) -> list[Any]:
    """Bindings of a storage, in bytes, and of tensors at its start."""
    from tvm import relax

    memory = relax.op.memory
    storage = relax.Var("storage", relax.ObjectType())
    made = [relax.VarBinding(storage, memory.alloc_storage(relax.ShapeExpr([size]), 0, "global", "uint8"))]
    for tensor in tensors:
        shape, kind = tensor.value.args[:2]
        made.append(relax.VarBinding(tensor.var, memory.alloc_tensor(storage, 0, shape, kind.value)))
    return made
