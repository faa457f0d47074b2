"""Makes the kernels that compute symbolic sizes the same in every process.

Before (order of a hash set of pointers, different in every run):
    H[7] = H[0] * 28;  H[6] = H[0] * 56;  H[1] = H[0] * 40
After:
    H[1] = H[0] * 40;  H[6] = H[0] * 56;  H[7] = H[0] * 28
Keeps the function when it is anything but stores of one slot each that read no slot written by another of them.
"""

from __future__ import annotations

from typing import Any

SHAPE_FUNCTION = "shape_func"


def sort_shape_functions(module: Any) -> Any:
    """The module with the statements of every shape function in the order of the slots they write."""
    from tvm import tirx

    module = module.clone()
    for var, function in list(module.functions.items()):
        if isinstance(function, tirx.PrimFunc) and var.name_hint.startswith(SHAPE_FUNCTION):
            ordered = _sorted(function)
            if ordered is not None:
                module[var] = ordered
    return module


def _sorted(function: Any) -> Any | None:
    from tvm import tirx

    if not isinstance(function.body, tirx.SeqStmt):
        return None
    stores = list(function.body.seq)
    if not all(isinstance(store, tirx.BufferStore) and len(store.indices) == 1 for store in stores):
        return None
    slots = [int(store.indices[0]) for store in stores]
    if set(slots) & {slot for store in stores for slot in _read_slots(store.value)}:
        return None
    order = sorted(range(len(stores)), key=slots.__getitem__)
    return function.with_body(tirx.SeqStmt([stores[index] for index in order]))


def _read_slots(value: Any) -> list[int]:
    """Slots of the shape heap that an expression reads."""
    import tvm_ffi
    from tvm import ir

    found: list[int] = []
    tvm_ffi.structural_walk(value, (ir.TensorLoad, lambda load: found.append(int(load.indices[0]))))
    return found
