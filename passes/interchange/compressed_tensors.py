"""compressed-tensors (github.com/vllm-project/compressed-tensors), format `pack-quantized`: a folder of two files.

`model.safetensors` holds for every packed weight, named after its module:

    weight_packed      i32 [N, ceil(C bits / 32)]   a row is a little-endian bit stream of value + 2^(bits - 1)
    weight_scale       f32 [N, groups], [N, 1] (channel) or [1] (tensor)
    weight_zero_point  i32 [ceil(N bits / 32), groups], a column is a bit stream; i8 [1] for one scale a tensor
    weight_shape       i64 [2]

and every other tensor of the graph as it is. weight = scale * (value - zero point). `config.json` holds the
`quantization_config` with one group a scheme. Weights of matrix products are [out, in], as torch.nn.Linear has them,
packed or not. Bits that do not divide 32 are packed without gaps, as the package does since 0.19.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from kbitc.errors import ResourceError, UnsupportedError, UsageError
from kbitc.graph import ops
from kbitc.passes.interchange._export import WEIGHTS_ONLY, Export, has_offsets
from kbitc.quant.plan import INT8
from kbitc.quant.scheme import Granularity, QuantScheme
from kbitc.quant.tensor import QTensor

Array = npt.NDArray[Any]

WEIGHTS, CONFIG = "model.safetensors", "config.json"
WORD = 32
SUFFIX = ".weight"
STRATEGIES = {Granularity.BLOCK: "group", Granularity.CHANNEL: "channel", Granularity.TENSOR: "tensor"}


def declines(widen: bool, op_type: str, activation: str, scheme: QuantScheme) -> str | None:
    """Run-time quantized activations, offsets, convolutions, and grids that are not uniform."""
    if activation == INT8:
        return WEIGHTS_ONLY
    if scheme.offset:
        return has_offsets(scheme)
    if op_type not in ("MatMul", "Gather"):
        return f"pack-quantized holds linear layers and embeddings, not {op_type}"
    if not scheme.data_type().uniform:
        return f"pack-quantized holds integers, not {scheme.format}{scheme.bits}"
    return None


def write(export: Export, path: Path) -> int:
    """Write the folder, whole or not at all; returns the bytes of its files.

    Raises:
        UnsupportedError: a row is not a whole number of groups.
        UsageError: the path holds something else.
        ResourceError: the disk is full or not writable.
    """
    if path.exists() and not (path / CONFIG).is_file():
        raise UsageError("the output exists and is no such folder, so it is not replaced", got=str(path))
    tensors = packed_tensors(export)
    config = {"quantization_config": quantization_config(export)}
    try:
        with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as name:
            folder = Path(name) / path.name
            folder.mkdir()
            _save(tensors, folder / WEIGHTS)
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            size = sum(file.stat().st_size for file in folder.iterdir())
            if path.exists():
                path.rename(Path(name) / "replaced")
            folder.rename(path)
    except OSError as error:
        raise ResourceError("cannot write the folder", where=str(path), got=error.strerror or str(error)) from error
    return size


def _save(tensors: Mapping[str, Array], path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(dict(tensors), path, metadata={"format": "pt"})


def packed_tensors(export: Export) -> dict[str, Array]:
    """Everything that `model.safetensors` holds, by name."""
    found: dict[str, Array] = {}
    for name, value in export.original.graph.initializers.items():
        if name in export.tensors:
            found.update((f"{module(name)}.{part}", array) for part, array in _packed(name, export.tensors[name]))
        elif value.const_value is not None:
            array = value.const_value.numpy()
            found[name] = np.ascontiguousarray(array.T if export.kinds.get(name) == "matmul" else array)
    return found


def module(tensor: str) -> str:
    """The module that a weight belongs to: its name without `.weight`."""
    return tensor.removesuffix(SUFFIX)


def _packed(name: str, tensor: QTensor) -> list[tuple[str, Array]]:
    n, _, channels = tensor.shape
    if tensor.scheme.granularity is Granularity.BLOCK and channels % tensor.block:
        raise UnsupportedError(
            "compressed-tensors wants whole groups", where=f"tensor {name!r}",
            got=f"{channels} channels in groups of {tensor.block}",
            remedy="use a block that divides them, --scheme int4:c, or --exclude it",
        )  # fmt: skip
    per_tensor = tensor.scheme.granularity is Granularity.TENSOR
    shape = (1,) if per_tensor else (n, -1)
    parts: list[tuple[str, Array]] = [
        ("weight_packed", bit_words(tensor.codes[:, 0, :], tensor.bits)),
        ("weight_scale", tensor.scales.reshape(shape).astype(np.float32)),
        ("weight_shape", np.array([n, channels], np.int64)),
    ]
    if tensor.zero_points is not None:
        zeros = tensor.zero_points.reshape(shape)
        half = 1 << (tensor.bits - 1)
        packed = (zeros.astype(np.int16) - half).astype(np.int8) if per_tensor else bit_words(zeros.T, tensor.bits).T
        parts.append(("weight_zero_point", np.ascontiguousarray(packed)))
    return parts


def bit_words(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Each row as a little-endian bit stream in 32-bit words: u8 [R, C] -> i32 [R, ceil(C * bits / 32)]."""
    rows, count = codes.shape
    planes = (codes[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    padded = np.zeros((rows, -(-count * bits // WORD) * WORD), np.uint8)
    padded[:, : count * bits] = planes.reshape(rows, -1)
    return np.packbits(padded, axis=1, bitorder="little").view("<i4").astype(np.int32)


def quantization_config(export: Export) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    groups: dict[str, list[str]] = {}
    schemes: dict[str, QuantScheme] = {}
    for name, tensor in export.tensors.items():
        key = str(tensor.scheme)
        schemes[key] = tensor.scheme
        groups.setdefault(key, []).append(module(name))
    left = [
        module(entry.tensor) for entry in export.plan.entries
        if entry.scheme is None and entry.op_type in ops.WEIGHT_USES
    ]  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": _group(schemes[key], targets) for index, (key, targets) in enumerate(groups.items())
        },
        "ignore": left,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(scheme: QuantScheme, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": not scheme.zero_point,
            "strategy": STRATEGIES[scheme.granularity],
            "group_size": scheme.block if scheme.granularity is Granularity.BLOCK else None,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
