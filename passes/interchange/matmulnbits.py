"""onnxruntime's com.microsoft MatMulNBits for matrix products; standard DequantizeLinear for all other weights.

Before:
    MatMul(x, W)
After:
    com.microsoft::MatMulNBits(x, B, scales, [zero points]; K, N, bits, block_size, accuracy_level = 0)

Operator (onnxruntime, docs/ContribOperators.md): B u8 [N, ceil(K / block), block bits / 8] holds the codes of a row
block by block, low bits first, the last block padded; scales [N, ceil(K / block)] in the type of x; zero points u8
[N, ceil(ceil(K / block) bits / 8)], packed alike, 2^(bits - 1) when left out. They may be real numbers instead, f32 [N,
ceil(K / block)], for which onnxruntime 1.31 has a kernel on CPUs at 2 and 4 bits: an offset is -zero point * scale.
Level 0 multiplies in the type of x, so the result is that of MatMul on the dequantized weight up to the order of its
sums.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.errors import InternalError
from kbitc.graph import edit, ops
from kbitc.importer.files import write_model
from kbitc.passes.interchange._export import (
    WEIGHTS_ONLY,
    Export,
    has_offsets,
    standard_model,
    wants_widening,
    widened,
)
from kbitc.quant.packing import round_up
from kbitc.quant.plan import INT8
from kbitc.quant.scheme import Granularity, QuantScheme
from kbitc.quant.tensor import QTensor

Bytes = npt.NDArray[np.uint8]

DOMAIN = "com.microsoft"
OPERATOR = "MatMulNBits"
BLOCKS = (16, 32, 64, 128, 256)
# The widest codes beside which onnxruntime takes zero points that are floats.
REAL_ZERO_POINTS = 4


def declines(widen: bool, op_type: str, activation: str, scheme: QuantScheme) -> str | None:
    """Run-time quantized activations, blocks and widths that the operator lacks, offsets that it would round."""
    if activation == INT8:
        return WEIGHTS_ONLY
    if op_type == "MatMul" and (scheme.granularity is not Granularity.BLOCK or scheme.block not in BLOCKS):
        return f"MatMulNBits has blocks of {', '.join(map(str, BLOCKS))}, not {scheme}"
    if op_type != "MatMul" and scheme.offset:
        return has_offsets(scheme)
    if scheme.offset and scheme.bits > REAL_ZERO_POINTS:
        return f"MatMulNBits has real zero points at 2 and 4 bits, not at {scheme.bits}: use :zp in place of :min"
    return wants_widening(scheme, widen)


def write(export: Export, path: Path) -> int:
    """Write one ONNX file; returns its bytes."""
    return write_model(make(export), path)


def make(export: Export) -> ir.Model:
    """The model."""
    tensors = {name: widened(tensor) for name, tensor in export.tensors.items()}
    products = {
        name: tensor
        for name, tensor in tensors.items()
        if export.kinds[name] == "matmul" and tensor.scheme.granularity is Granularity.BLOCK
    }
    others = {name: tensor for name, tensor in tensors.items() if name not in products}
    model = standard_model(export, others)
    for name, tensor in products.items():
        _replace(model, name, tensor)
    if products:
        model.opset_imports[DOMAIN] = 1
    return model


def _replace(model: ir.Model, name: str, tensor: QTensor) -> None:
    """Every user of a weight becomes the operator; they share its codes."""
    graph = model.graph
    weight = graph.initializers[name]
    n, _, k = tensor.shape
    arrays: list[tuple[str, npt.NDArray[np.generic]]] = [
        ("codes", _packed_codes(tensor)),
        ("scales", tensor.scales.reshape(n, -1).astype(np.float32)),
    ]
    if tensor.zero_points is not None:
        arrays.append(("zero_points", _bit_rows(tensor.zero_points.reshape(n, -1), tensor.bits)))
    if tensor.offsets is not None:
        arrays.append(("zero_points", (-tensor.offsets / tensor.scales).reshape(n, -1)))
    operands = [_initializer(graph, f"{name}.{part}", array) for part, array in arrays]
    attributes = {"K": k, "N": n, "bits": tensor.bits, "block_size": tensor.block, "accuracy_level": 0}
    for node, index in tuple(weight.uses()):
        if node.op_type != "MatMul" or index != ops.WEIGHT_USES["MatMul"].weight_input:
            raise InternalError("a weight of a matrix product has another reader", where=f"node {node.name!r}")
        made = ir.node(OPERATOR, [node.inputs[0], *operands], attributes=attributes, domain=DOMAIN, name=node.name)
        old, new = node.outputs[0], made.outputs[0]
        new.name, new.shape, new.type = old.name, old.shape, old.type
        inner = edit.root_graph(node)  # the body of a loop reads weights of the graph around it
        inner.insert_before(node, made)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        inner.remove(node, safe=True)
    del graph.initializers[name]


def _initializer(graph: ir.Graph, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    tensor = ir.Tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _packed_codes(tensor: QTensor) -> Bytes:
    """u8 [N, blocks, block * bits / 8]."""
    n, _, k = tensor.shape
    width = round_up(k, tensor.block)
    padded = np.zeros((n, width), np.uint8)
    padded[:, :k] = tensor.codes[:, 0, :]
    blocks = width // tensor.block
    return _bit_rows(padded.reshape(n * blocks, tensor.block), tensor.bits).reshape(n, blocks, -1)


def _bit_rows(codes: Bytes, bits: int) -> Bytes:
    """Each row of codes as a bit stream of its own, low bits first: u8 [R, C] -> [R, ceil(C * bits / 8)]."""
    planes = (codes[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.reshape(len(codes), -1), axis=1, bitorder="little")
