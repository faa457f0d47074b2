"""com.microsoft MatMulNBits as DequantizeLinear and MatMul: a model that somebody else quantized keeps its bits.

MatMulNBits (onnxruntime, ContribOperators.md): B u8 [N, ceil(K / block), ceil(block bits / 8)] holds codes along K, low
bits first; scales [N, ceil(K / block)]; zero points packed alike along the blocks, or in the type of the scales, by
default 2^(bits - 1). y = A @ (scale (code - zero))^T + bias.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from kbitc.errors import ModelError
from kbitc.graph import edit
from kbitc.graph.edit import Array, add_initializer, constant, describe, insert_before, root_graph

#: Types that DequantizeLinear of opset 21 has for unsigned codes.
_TYPES = {4: (ml_dtypes.uint4, ir.DataType.UINT4), 8: (np.uint8, ir.DataType.UINT8)}


def translate(node: ir.Node) -> bool:
    """Rewrite one MatMulNBits in place. False when it has a form that is left alone.

    Raises:
        ModelError: tensors whose sizes do not fit K, N, bits and block_size.
    """
    data, bias = node.inputs[0], _input(node, 5)
    if _input(node, 4) is not None or data is None:
        return False
    codes, scales, zeros = _decode(node)
    if codes is None or scales is None:
        return False
    weight = _weight(node, codes, scales, zeros)
    if bias is None:
        edit.replace_with(node, "MatMul", [data, weight])
        return True
    product = insert_before(node, "MatMul", [data, weight], like=node.outputs[0])
    edit.replace_with(node, "Add", [product, bias])
    return True


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _decode(node: ir.Node) -> tuple[Array | None, Array | None, Array | None]:
    """(codes u8 [N, K], scales f32 [N, blocks], zero points [N, blocks]: u8 codes or f32 numbers)."""
    packed, scales, zeros = (constant(_input(node, index)) for index in (1, 2, 3))
    if packed is None or scales is None or (_input(node, 3) is not None and zeros is None):
        return None, None, None
    width, rows = node.attributes.get_int("K", 0), node.attributes.get_int("N", 0)
    bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 32)
    blocks = -(-width // block) if block > 0 else 0
    if packed.size != rows * blocks * -(-block * bits // 8) or scales.size != rows * blocks or packed.dtype != np.uint8:
        raise ModelError(
            "MatMulNBits: the packed weight does not fit K, N, bits and block_size",
            where=describe(node),
            got=f"B {list(packed.shape)}, scales {list(scales.shape)}, K {width}, N {rows}",
        )
    codes = _unpack(packed.reshape(rows * blocks, -1), bits, block).reshape(rows, blocks * block)[:, :width]
    if zeros is not None and zeros.dtype == np.uint8:
        zeros = _unpack(zeros.reshape(rows, -1), bits, blocks)
    elif zeros is not None:
        zeros = zeros.astype(np.float32).reshape(rows, blocks)
    return codes, scales.astype(np.float32).reshape(rows, blocks), zeros


def _unpack(packed: Array, bits: int, count: int) -> Array:
    """u8 [R, B] with codes of `bits` bits, low bits first -> u8 [R, count]."""
    stream = np.unpackbits(packed, axis=1, bitorder="little")[:, : count * bits].reshape(len(packed), count, bits)
    return np.asarray((stream << np.arange(bits, dtype=np.uint8)).sum(axis=2), np.uint8)


def _weight(node: ir.Node, codes: Array, scales: Array, zeros: Array | None) -> ir.Value:
    """The float weight [K, N] as a value: Transpose of a blocked DequantizeLinear, or an initializer."""
    bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 32)
    graph, name = root_graph(node), f"{node.name or node.outputs[0].name}.weight"
    middle = np.full(scales.shape, 1 << (bits - 1), np.uint8) if zeros is None else zeros
    if bits not in _TYPES or middle.dtype != np.uint8:
        wide = [np.repeat(array.astype(np.float32), block, axis=1)[:, : codes.shape[1]] for array in (scales, middle)]
        return add_initializer(graph, name, np.ascontiguousarray((wide[0] * (codes - wide[1])).T))
    element, dtype = _TYPES[bits]
    inputs: list[ir.Value | None] = [
        add_initializer(graph, name, codes.astype(element), dtype),
        add_initializer(graph, f"{name}.scale", scales),
        add_initializer(graph, f"{name}.zero_point", middle.astype(element), dtype),
    ]
    rows, width = codes.shape
    dense = insert_before(node, "DequantizeLinear", inputs, name=f"{name}.dense", axis=1, block_size=block)
    dense.type, dense.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([rows, width])
    turned = insert_before(node, "Transpose", [dense], name=f"{name}.transposed", like=dense, perm=[1, 0])
    turned.shape = ir.Shape([width, rows])
    return turned
