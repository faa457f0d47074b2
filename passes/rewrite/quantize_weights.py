"""Replace a float weight by the operators that dequantize its codes.

Before:
    MatMul(x, W)                                  W f32 initializer
After, where ONNX has the type (int and uint of 2, 4, 8 bits):
    MatMul(x, DequantizeLinear(codes, Cast(scales), [zero points], axis, block_size))
After, for every other format, and where scales are themselves quantized:
    MatMul(x, Transpose(Reshape(kbitc::DequantizeKBit(stream, grid, Cast(scales), zeros, shape))))
with DequantizeLinear(scale codes, Cast(steps)) in place of Cast(scales) for quantized scales, and
kbitc::DequantizeKBitOffset(stream, grid, Cast(scales), zeros, shape, Cast(offsets)) for offsets, of every width: there
the grid is that of uint and the zero the lowest level.
Keeps the graph when the plan gives the tensor no scheme. Every user of the initializer sees the same new value,
so tied weights stay tied.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph import edit, functions, ops
from kbitc.quant.packing import pack_dense
from kbitc.quant.scales import GROUP
from kbitc.quant.scheme import Granularity, ScaleCode, ScaleType
from kbitc.quant.tensor import QTensor

STANDARD_DTYPES = {
    ("int", 2): ml_dtypes.int2,
    ("int", 4): ml_dtypes.int4,
    ("int", 8): np.int8,
    ("uint", 2): ml_dtypes.uint2,
    ("uint", 4): ml_dtypes.uint4,
    ("uint", 8): np.uint8,
}
OPSET = 21
# INT2 and UINT2 entered DequantizeLinear with opset 25.
OPSET_INT2 = 25
IR_VERSION = 10
IR_VERSION_INT2 = 13


def quantize_weights(model: ir.Model, tensors: Mapping[str, QTensor], kinds: Mapping[str, str]) -> list[str]:
    """Put quantized weights into the graph.

    Args:
        model: changed in place; opset 21 semantics.
        tensors: initializer name -> its quantized form.
        kinds: initializer name -> matmul, conv or embedding (`kbitc.graph.ops`).

    Returns:
        Names of the kbitc functions that the graph now needs.
    """
    needed: set[str] = set()
    low_bits = any(tensor.bits == 2 and _is_standard(tensor) for tensor in tensors.values())
    opset = OPSET_INT2 if low_bits else OPSET
    model.graph.opset_imports[""] = opset
    model.ir_version = IR_VERSION_INT2 if low_bits else IR_VERSION
    for name, tensor in tensors.items():
        weight = model.graph.initializers[name]
        builder = _Builder(model.graph, name)
        if _is_standard(tensor):
            builder.standard(weight, tensor, kinds[name])
        else:
            builder.function(weight, tensor, kinds[name])
            needed.add(functions.DEQUANTIZE if tensor.offsets is None else functions.DEQUANTIZE_OFFSET)
        del model.graph.initializers[name]
    return sorted(needed)


def _is_standard(tensor: QTensor) -> bool:
    plain = tensor.scale_steps is None and tensor.offsets is None
    return plain and (tensor.format.name, tensor.bits) in STANDARD_DTYPES


class _Builder:
    """Adds the initializers and nodes that stand for one weight in front of its first user."""

    def __init__(self, graph: ir.Graph, name: str) -> None:
        self.graph = graph
        self.name = name
        holders = edit.holders(graph)
        users = [holders[node] for node, _ in graph.initializers[name].uses()]
        self.position = min(users, key=list(graph).index) if users else None

    def constant(self, suffix: str, array: npt.NDArray[np.generic]) -> ir.Value:
        tensor = ir.Tensor(array, name=f"{self.name}.{suffix}")
        value = ir.Value(name=tensor.name, shape=ir.Shape(array.shape), const_value=tensor)
        value.type = ir.TensorType(tensor.dtype)
        self.graph.register_initializer(value)
        return value

    def node(
        self, op_type: str, inputs: list[ir.Value | None], suffix: str, domain: str = "", **attrs: int | list[int]
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attrs, domain=domain, name=f"{self.name}.{suffix}")
        output = node.outputs[0]
        output.name = f"{self.name}.{suffix}"
        if self.position is not None:
            self.graph.insert_before(self.position, node)
        return output

    def scales(self, suffix: str, array: npt.NDArray[np.generic], scale_type: ScaleType) -> ir.Value:
        """Scales, or steps of scales, as float32."""
        if scale_type is ScaleType.F32:
            return self.constant(suffix, array)
        stored = self.constant(suffix, array.astype(np.float16))
        return self.node("Cast", [stored], f"{suffix}_f32", to=int(ir.DataType.FLOAT))

    def view_scales(self, tensor: QTensor) -> ir.Value:
        """The scales of a weight in their own shape [N, T, CB]."""
        if tensor.scale_steps is None:
            return self.scales("scales", tensor.scales, tensor.scheme.scale_type)
        codes = tensor.scale_codes()
        if tensor.scheme.scale_code is ScaleCode.INTEGER:
            steps = self.scales("scale_steps", tensor.scale_steps, tensor.scheme.scale_type)
            stored = self.constant("scale_codes", codes.astype(ml_dtypes.uint4))
            return self.node("DequantizeLinear", [stored, steps], "scales", axis=0)
        stored = self.constant("scale_codes", codes.reshape(-1))
        # onnxruntime takes one step in a vector for a scale of the whole tensor, which has no blocks.
        if tensor.scale_steps.size == 1:
            steps = self.constant("scale_steps", tensor.scale_steps.reshape(()))
            line = self.node("DequantizeLinear", [stored, steps], "scale_line")
        else:
            steps = self.constant("scale_steps", tensor.scale_steps)
            line = self.node("DequantizeLinear", [stored, steps], "scale_line", axis=0, block_size=GROUP)
        return self.node("Reshape", [line, self.scale_shape(tensor)], "scales")

    def scale_shape(self, tensor: QTensor) -> ir.Value:
        """The shape of the scales as a constant, once a weight."""
        name = f"{self.name}.scale_shape"
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        return self.constant("scale_shape", np.array(tensor.scales.shape, np.int64))

    def replace(self, weight: ir.Value, value: ir.Value) -> None:
        value.shape = weight.shape
        value.type = ir.TensorType(ir.DataType.FLOAT)
        ir.convenience.replace_all_uses_with(weight, value)

    def standard(self, weight: ir.Value, tensor: QTensor, kind: str) -> None:
        """DequantizeLinear on codes in the ONNX layout of the weight."""
        shape = tuple(int(dim) for dim in weight.const_value.shape.numpy()) if weight.const_value is not None else ()
        dtype = STANDARD_DTYPES[tensor.format.name, tensor.bits]
        offset = 0 if tensor.format.asymmetric else 2 ** (tensor.bits - 1)
        codes = ops.from_view(tensor.codes.astype(np.int16) - offset, kind, shape)
        inputs: list[ir.Value | None] = [self.constant("codes", codes.astype(dtype))]
        arranged = _onnx_scales(tensor.scales, tensor, kind, shape)
        inputs.append(self.scales("scales", arranged, tensor.scheme.scale_type))
        if tensor.zero_points is not None:
            zeros = _onnx_scales(tensor.zero_points, tensor, kind, shape)
            inputs.append(self.constant("zero_points", zeros.astype(dtype)))
        use = next(use for use in ops.WEIGHT_USES.values() if use.kind == kind)
        if tensor.scheme.granularity is Granularity.BLOCK:
            block, axis = tensor.scheme.block, use.reduction_axis
            value = self.node("DequantizeLinear", inputs, "dequantized", axis=axis, block_size=block)
        elif tensor.scheme.granularity is Granularity.CHANNEL:
            value = self.node("DequantizeLinear", inputs, "dequantized", axis=use.channel_axis)
        else:
            value = self.node("DequantizeLinear", inputs, "dequantized")
        self.replace(weight, value)

    def function(self, weight: ir.Value, tensor: QTensor, kind: str) -> None:
        """kbitc::DequantizeKBit on a dense bit stream, then the ONNX layout of the weight."""
        shape = [int(dim) for dim in weight.const_value.shape.numpy()] if weight.const_value is not None else []
        stream = self.constant("codes", pack_dense(tensor.codes, tensor.bits))
        grid = self.constant("grid", tensor.format.grid.astype(np.float32))
        scales = self.view_scales(tensor)
        sizes = self.constant("shape", np.array(tensor.shape, np.int64))
        inputs: list[ir.Value | None] = [stream, grid, scales, self._zeros(tensor, grid), sizes]
        if tensor.offsets is not None:
            inputs.append(self.scales("offsets", tensor.offsets, tensor.scheme.scale_type))
        value = self.node(
            functions.DEQUANTIZE if tensor.offsets is None else functions.DEQUANTIZE_OFFSET,
            inputs,
            "view",
            domain=functions.DOMAIN,
            bits=tensor.bits,
            block=tensor.block,
        )
        if kind == "conv":
            value = self.node("Transpose", [value], "channels_first", perm=[0, 2, 1])
        rows = [shape[1], shape[0]] if kind == "matmul" else shape
        value = self.node("Reshape", [value, self.constant("onnx_shape", np.array(rows, np.int64))], "onnx")
        if kind == "matmul":
            value = self.node("Transpose", [value], "transposed", perm=[1, 0])
        self.replace(weight, value)

    def _zeros(self, tensor: QTensor, grid: ir.Value) -> ir.Value:
        if tensor.zero_points is None:
            lowest = 0 if tensor.offsets is None else tensor.format.levels[0]
            return self.constant("zeros", np.full_like(tensor.scales[:1, :1], lowest))
        stream = self.constant("zero_points", pack_dense(tensor.zero_points, tensor.bits))
        sizes = self.scale_shape(tensor)
        codes = self.node(functions.UNPACK, [stream, sizes], "zero_codes", domain=functions.DOMAIN, bits=tensor.bits)
        return self.node("Gather", [grid, codes], "zeros")


def _onnx_scales(
    array: npt.NDArray[np.generic], tensor: QTensor, kind: str, shape: tuple[int, ...]
) -> npt.NDArray[np.generic]:
    """[N, T, CB] -> what DequantizeLinear expects: scalar, one a channel, or the weight's layout with blocks."""
    if tensor.scheme.granularity is Granularity.TENSOR:
        return array.reshape(())
    if tensor.scheme.granularity is Granularity.CHANNEL:
        return array.reshape(-1)
    blocks = array.shape[2]
    if kind == "conv":
        return ops.from_view(array, kind, (shape[0], blocks, *shape[2:]))
    return ops.from_view(array, kind, shape)
