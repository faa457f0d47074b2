"""Other quantizers of ONNX files, for solvers.py: those that onnxruntime carries, and neural-compressor 2.6's AWQ.

All quantize the constant factors of MatMul nodes, in blocks along the reduction axis, and leave the rest float. Most of
them have a format for 4 bits alone; at other widths they write the rounded weights as floats, which is what their
numbers are worth too. onnxruntime ships neural-compressor's RTN and GPTQ and has an HQQ of its own (it needs torch).
`pip install neural-compressor==2.6` gives AWQ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
from tasks import Array, Task

Write = Callable[[Task, Path, int, int], None]  # task, file, bits, block


class Loader:
    """A task's calibration batches as neural-compressor reads them: pairs of feeds and label."""

    def __init__(self, task: Task) -> None:
        self._batches, self.batch_size = task.calibration, 1

    def __iter__(self) -> Iterator[tuple[Any, None]]:
        """All batches."""
        return ((dict(feeds), None) for feeds in self._batches)


def _save(model: Any, out: Path) -> None:
    onnx.save(getattr(model, "model", model), out)


def _rtn(scheme: str) -> Write:
    def write(task: Task, out: Path, bits: int, block: int) -> None:
        from onnxruntime.quantization.neural_compressor import weight_only as tool

        model = onnx.load(task.model)
        _save(tool.rtn_quantize(model, {}, bits, block, scheme, {}, accuracy_level=1, algorithm="rtn"), out)

    return write


def _gptq(task: Task, out: Path, bits: int, block: int) -> None:
    from onnxruntime.quantization.neural_compressor import weight_only as tool

    _save(tool.gptq_quantize(
        onnx.load(task.model), Loader(task), {}, bits, block, "asym", n_samples=-1, mse=True, accuracy_level=1,
    ), out)  # fmt: skip


def _awq(task: Task, out: Path, bits: int, block: int) -> None:
    from neural_compressor.adaptor.ox_utils import weight_only as tool

    _save(tool.awq_quantize(onnx.load(task.model), Loader(task), {}, bits, block, "asym", -1, accuracy_level=1), out)


def _hqq(task: Task, out: Path, bits: int, block: int) -> None:
    import torch
    from onnxruntime.quantization import matmul_nbits_quantizer as tool

    hqq = tool.HQQWeightOnlyQuantizer(tool.HQQWeightOnlyQuantConfig(block_size=block, bits=bits))

    def rounded(weight: Array) -> Array:
        rows = torch.from_numpy(np.ascontiguousarray(weight.T))
        codes, scales, zeros = hqq.quantize_internal(rows, bits=bits, group_size=block)
        values = (codes.reshape(*scales.shape, -1) - zeros[..., None]) * scales[..., None]
        return values.reshape(codes.shape)[:, : weight.shape[0]].numpy().T

    model = onnx.load(task.model)
    used = {node.input[1] for node in model.graph.node if node.op_type == "MatMul"}
    for tensor in model.graph.initializer:
        if tensor.name in used and len(tensor.dims) == 2:
            values = np.ascontiguousarray(rounded(onnx.numpy_helper.to_array(tensor)), np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, out)


#: Name of the row -> what writes the quantized file. sym: no zero points.
PEERS: Mapping[str, Write] = {
    "onnxruntime rtn, sym": _rtn("sym"),
    "onnxruntime rtn": _rtn("asym"),
    "onnxruntime gptq": _gptq,
    "onnxruntime hqq": _hqq,
    "neural-compressor awq": _awq,
}
