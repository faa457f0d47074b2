"""Other quantizers of ONNX files, for solvers.py: those that onnxruntime carries and those of neural-compressor 2.6.

    python examples/accuracy/peers.py minilm "neural-compressor awq" --bits 3 --out awq3.onnx

All quantize the constant factors of MatMul nodes, in blocks along the reduction axis, and leave the rest float. Most of
them have a format for 4 bits alone; at other widths they write the rounded weights as floats, which is what their
numbers are worth too. onnxruntime ships copies of neural-compressor's RTN and GPTQ and has an HQQ of its own (it needs
torch). neural-compressor 2.6 wants an older numpy and onnx than kbitc: give it an environment of its own and tell
solvers.py its interpreter (`--peer-python`), which runs this file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import onnx
import onnx.numpy_helper
from tasks import TASKS, Array, Task

BLOCK = 32
ONNXRUNTIME, NEURAL_COMPRESSOR = "onnxruntime.quantization.neural_compressor", "neural_compressor.adaptor.ox_utils"
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


def _rtn(package: str, scheme: str) -> Write:
    def write(task: Task, out: Path, bits: int, block: int) -> None:
        tool = import_module(f"{package}.weight_only")
        _save(tool.rtn_quantize(onnx.load(task.model), {}, bits, block, scheme, accuracy_level=1), out)

    return write


def _gptq(package: str, *, mse: bool) -> Write:
    """`mse`: with their search for a clipping range, which is off unless asked for."""

    def write(task: Task, out: Path, bits: int, block: int) -> None:
        tool = import_module(f"{package}.weight_only")
        model, loader = onnx.load(task.model), Loader(task)
        made = tool.gptq_quantize(
            model, loader, {}, bits, block, "asym", n_samples=-1, mse=mse, accuracy_level=1,
        )  # fmt: skip
        _save(made, out)

    return write


def _awq(task: Task, out: Path, bits: int, block: int) -> None:
    tool = import_module(f"{NEURAL_COMPRESSOR}.weight_only")
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
    "onnxruntime rtn, sym": _rtn(ONNXRUNTIME, "sym"),
    "onnxruntime rtn": _rtn(ONNXRUNTIME, "asym"),
    "onnxruntime gptq": _gptq(ONNXRUNTIME, mse=False),
    "onnxruntime gptq, mse": _gptq(ONNXRUNTIME, mse=True),
    "onnxruntime hqq": _hqq,
    "neural-compressor rtn": _rtn(NEURAL_COMPRESSOR, "asym"),
    "neural-compressor gptq": _gptq(NEURAL_COMPRESSOR, mse=False),
    "neural-compressor gptq, mse": _gptq(NEURAL_COMPRESSOR, mse=True),
    "neural-compressor awq": _awq,
}


def main() -> None:
    """Write the file of one quantizer; solvers.py calls this in the environment of the quantizer."""
    parser = argparse.ArgumentParser(description="Quantize the model of a task with another quantizer.")
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    PEERS[arguments.peer](TASKS[arguments.task](), arguments.out, arguments.bits, BLOCK)


if __name__ == "__main__":
    main()
