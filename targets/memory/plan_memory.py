"""Gives every value of a function its place in memory while compiling.

Before, after CallTIRRewrite:
    a = builtin.alloc_tensor([n, 64]);  kernel(x, a);  b = builtin.alloc_tensor([n, 64]);  kernel_1(a, b);  ...
After:
    arena = memory.alloc_storage([size of the arena])
    a = memory.alloc_tensor(arena, 0, [n, 64]);  b = memory.alloc_tensor(arena, 0, [n, 64]);  ...
    place(a, b, ..., n);  kernel(x, a);  kernel_1(a, b);  ...
and a storage for each value that the function returns. Kernels take no tensor that starts inside of its memory, so
`place` moves the pointers, by offsets that it computes from the symbolic dims.
Keeps, for TVM's StaticPlanBlockMemory, a function that branches; and a value whose size depends on more than the shapes
of the parameters.

Symbolic sizes of storages are rounded up to a power of two: TVM keeps freed memory for requests of the same size, and
then there are few sizes. Pages that nobody touches take no memory on a CPU. From LARGEST_STEP on, sizes are rounded up
to its multiples.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kbitc.targets.memory.arena import ALIGNMENT, Value, plan
from kbitc.targets.memory.bounds import Bound, Quantities

ALLOCATE, KILL, RESHAPE = "relax.builtin.alloc_tensor", "relax.memory.kill_tensor", "relax.reshape"
LARGEST_STEP = 2**30
# Symbolic dims for which plans are made and compared; the one that is taken is right for all.
TRIED = (4, 32, 128, 512)
# TVMStructFieldKind of TVM: where a DLTensor's values lie.
DATA_FIELD = 1


@dataclass
class _Tensor:
    """One allocation: its variable, its value, bytes, and the steps from its making to its last use."""

    var: Any
    value: Any
    size: Bound
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
    quantities = Quantities()
    tensors = _tensors(bindings, function, quantities)
    made = _shared(builder, [tensor for tensor in tensors if not tensor.kept], quantities)
    lasting = {tensor.var for tensor in tensors}
    kept = {tensor.var: tensor for tensor in tensors if tensor.kept}
    for binding in bindings:
        value = binding.value
        if _is_call(value, RESHAPE) and value.args[0] in lasting:
            lasting.add(binding.var)
        if binding.var in kept:
            made += _in_storage([kept[binding.var]], _largest([kept[binding.var].size], quantities.expressions))
        elif not _is_allocation(value) or binding.var not in lasting:
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


def _tensors(bindings: Sequence[Any], function: Any, quantities: Quantities) -> list[_Tensor]:
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
            size = _bytes(value, known, quantities)
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


def _bytes(allocation: Any, known: Sequence[Any], quantities: Quantities) -> Bound | None:
    """The size of a tensor; None where it is not known at the start of the function."""
    from tvm import DataType

    from kbitc.targets.lower import dims

    shape = [dims.as_dim(dim) for dim in allocation.args[0].values]
    if any(not any(symbol.same_as(other) for other in known) for dim in shape for symbol in dims.variables(dim)):
        return None
    return quantities.product(shape).times(DataType(str(allocation.args[1].value)).itemsize)


def _shared(builder: Any, tensors: Sequence[_Tensor], quantities: Quantities) -> list[Any]:
    """Bindings of tensors that lie in one storage."""
    from tvm import relax

    if not tensors:
        return []
    expressions = quantities.expressions
    points = [quantities.at(number) for number in TRIED]
    arena = plan([Value(tensor.size, tensor.first, tensor.last) for tensor in tensors], points)
    made = _in_storage(tensors, _largest(arena.size, expressions))
    place = builder.add_func(_place(arena.offsets, len(expressions)), "place")
    arguments = [*(tensor.var for tensor in tensors), *map(relax.prim_value, expressions)]
    return [*made, relax.VarBinding(relax.Var("placed", relax.TupleType([])), relax.Call(place, arguments))]


def _in_storage(tensors: Sequence[_Tensor], size: Any) -> list[Any]:
    """Bindings of a storage, in bytes, and of tensors at its start."""
    from tvm import relax

    memory = relax.op.memory
    storage = relax.Var("storage", relax.ObjectType())
    made = [relax.VarBinding(storage, memory.alloc_storage(relax.ShapeExpr([rounded(size)]), 0, "global", "uint8"))]
    for tensor in tensors:
        shape, kind = tensor.value.args[:2]
        made.append(relax.VarBinding(tensor.var, memory.alloc_tensor(storage, 0, shape, kind.value)))
    return made


def _place(offsets: Sequence[Sequence[Bound]], quantities: int) -> Any:
    """The function (tensor_0, tensor_1, ..., quantities...) that adds its offset to each tensor's pointer."""
    from tvm import tirx

    tensors = [tirx.Var(f"tensor_{index}", "handle") for index in range(len(offsets))]
    given = [tirx.Var(f"quantity_{index}", "int64") for index in range(quantities)]
    steps = []
    for tensor, sums in zip(tensors, offsets, strict=True):
        data = tirx.call_intrin("handle", "tirx.tvm_struct_get", tensor, 0, DATA_FIELD)
        offset = tirx.floordiv(_largest(sums, given) + tirx.const(ALIGNMENT - 1, "int64"), ALIGNMENT) * ALIGNMENT
        moved = tirx.call_intrin("handle", "tirx.handle_add_byte_offset", data, offset)
        steps.append(tirx.Evaluate(tirx.call_intrin("int32", "tirx.tvm_struct_set", tensor, 0, DATA_FIELD, moved)))
    function = tirx.PrimFunc([*tensors, *given], tirx.SeqStmt(steps) if len(steps) > 1 else steps[0])
    return function.with_attr({"tirx.is_host_func": True})


def _largest(sums: Sequence[Bound], quantities: Sequence[Any]) -> Any:
    """The largest of the sums, for quantities that are taken for 1 where they are 0: an int64 expression or an int."""
    from tvm import tirx

    if all(bound.is_constant for bound in sums):
        return max(bound.at(()) for bound in sums)
    one = tirx.const(1, "int64")
    return functools.reduce(tirx.max, [bound.expression([tirx.max(q, one) for q in quantities]) for bound in sums])


def rounded(size: Any) -> Any:
    """A number as it is; an expression rounded up to a power of two, or to a multiple of LARGEST_STEP."""
    from tvm import tirx

    if isinstance(size, int):
        return tirx.IntImm("int64", max(size, 1))
    bits = tirx.const(64, "int64") - tirx.Cast("int64", tirx.clz(tirx.max(size - 1, tirx.const(1, "int64"))))
    step = tirx.min(tirx.shift_left(tirx.const(1, "int64"), bits), tirx.const(LARGEST_STEP, "int64"))
    return tirx.floordiv(size + (step - 1), step) * step
