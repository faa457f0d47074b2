"""Recognises the integer weights of a static graph, by structure alone."""

from __future__ import annotations

from math import prod

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph import functions, ops
from kbitc.graph.integer_functions import BLOCK_LEVELS, LEVELS
from kbitc.quant.levels import WHOLE_BYTES, LevelTensor, of_levels
from kbitc.quant.packing import unpack_dense

Array = npt.NDArray[np.generic]


def read_levels(value: ir.Value | None, kind: str, zero: ir.Value | None = None) -> LevelTensor | None:
    """The weight operand of a ConvInteger or MatMulInteger, seen as [N, T, C].

    Args:
        value: the operand: an 8-bit initializer, or a call of kbitc::LevelsKBit behind Reshape and Transpose.
        kind: "conv" or "matmul".
        zero: its zero point, one number; None is 0.

    Returns:
        None when the operand is not constant, or a level less its zero point does not fit int8.
    """
    shift = 0 if zero is None else _one_number(zero)
    if value is None or shift is None:
        return None
    if ops.is_constant(value) and value.const_value is not None:
        return _from_bytes(value.const_value.numpy(), kind, shift)
    return _from_function(value, kind) if shift == 0 else None


def _one_number(value: ir.Value) -> int | None:
    array = None if value.const_value is None else value.const_value.numpy()
    return None if array is None or array.size == 0 or np.any(array != array.flat[0]) else int(array.flat[0])


def _from_bytes(array: npt.NDArray[np.generic], kind: str, shift: int) -> LevelTensor | None:
    use = next(use for use in ops.WEIGHT_USES.values() if use.kind == kind)
    if array.dtype not in (np.int8, np.uint8) or array.ndim not in use.ranks:
        return None
    levels = np.asarray(array, np.int16) - shift
    if levels.size == 0 or levels.min() < -128 or levels.max() > 127:
        return None
    return of_levels(np.asarray(ops.to_view(levels.astype(np.int8), kind), np.int8))


def _behind_layout(value: ir.Value) -> tuple[ir.Node | None, list[ir.Node]]:
    """The producer behind Reshapes and Transposes, and those in running order."""
    chain: list[ir.Node] = []
    node = value.producer()
    while node is not None and not node.domain and node.op_type in ("Reshape", "Transpose"):
        chain.insert(0, node)
        source = node.inputs[0]
        node = None if source is None else source.producer()
    return node, chain


def _in_layout(codes: Array, chain: list[ir.Node], kind: str) -> Array | None:
    """Codes [N, T, C] after the Reshapes and Transposes that give the operator its layout, seen as [N, T, C] again."""
    for node in chain:
        if node.op_type == "Transpose":
            codes = codes.transpose(list(node.attributes.get_ints("perm", list(range(codes.ndim))[::-1])))
            continue
        target = node.inputs[1].const_value if node.inputs[1] is not None else None
        if target is None:
            return None
        sizes = [int(size) for size in target.numpy()]
        codes = codes.reshape([codes.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)])
    use = next(use for use in ops.WEIGHT_USES.values() if use.kind == kind)
    return np.asarray(ops.to_view(codes, kind)) if codes.ndim in use.ranks else None


def _from_function(value: ir.Value, kind: str) -> LevelTensor | None:
    node, chain = _behind_layout(value)
    if node is None or node.domain != functions.DOMAIN or node.op_type not in (LEVELS, BLOCK_LEVELS):
        return None
    arrays = [None if v is None or v.const_value is None else v.const_value.numpy() for v in node.inputs]
    if any(array is None for array in arrays):
        return None
    stream, grid, *factors, sizes = (np.asarray(array) for array in arrays)
    bits = node.attributes.get_int("bits", WHOLE_BYTES)
    shape = tuple(int(size) for size in sizes)
    stored = unpack_dense(np.asarray(stream, np.uint8), bits, prod(shape)).reshape(shape)
    if bits == WHOLE_BYTES:
        stored = np.asarray(grid, np.int8)[stored].view(np.uint8)
    codes = _in_layout(stored, chain, kind)
    if codes is None or (factors and not np.array_equal(codes, stored)):
        return None
    return LevelTensor(
        np.ascontiguousarray(codes, np.uint8),
        bits,
        () if bits == WHOLE_BYTES else tuple(int(level) for level in grid),
        np.asarray(factors[0], np.int8) if factors else None,
        node.attributes.get_int("block", 0) if factors else 0,
    )
