"""The rows that a weight is multiplied with, cut out of the activation that its node reads."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph import ops

Array = npt.NDArray[Any]


def can_unfold(node: ir.Node) -> bool:
    """Whether `rows` knows what the weight of a node is multiplied with: not in a look-up, nor with SAME padding."""
    if ops.WEIGHT_USES[node.op_type].activation_input is None:
        return False
    return node.op_type != "Conv" or node.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")


def rows(node: ir.Node, activation: Array, limit: int) -> Array:
    """What the weight of `node` is multiplied with, f32 [G, rows, T * C / G], at most `limit` rows, evenly spread.

    Args:
        node: a MatMul (activation f32 [..., C]) or a Conv (activation f32 [batch, C, *spatial]).
        activation: its data operand.
        limit: most rows to give.
    """
    if node.op_type != "Conv":
        flat = activation.reshape(-1, activation.shape[-1])
        return np.ascontiguousarray(flat[_spread(len(flat), limit)][None], np.float32)
    windows = _windows(node, activation)
    rank = activation.ndim - 2
    sizes = (windows.shape[0], *windows.shape[2 : 2 + rank])
    image, *places = np.unravel_index(_spread(prod(sizes), limit), sizes)
    where: tuple[Any, ...] = (image, slice(None), *places)
    chosen = windows[where]
    group, channels = ops.conv_group(node), activation.shape[1]
    # [rows, C, *kernel] -> [rows, G, C / G, T] -> [G, rows, T * C / G]
    split = chosen.reshape(len(image), group, channels // group, prod(chosen.shape[2:])).transpose(1, 0, 3, 2)
    return np.ascontiguousarray(split, np.float32).reshape(group, len(image), -1)


def _spread(count: int, limit: int) -> npt.NDArray[np.int64]:
    """At most `limit` of the numbers 0 .. count - 1, evenly spread."""
    kept = min(count, limit)
    return np.arange(kept, dtype=np.int64) * count // max(kept, 1)


def _windows(node: ir.Node, activation: Array) -> Array:
    """A view of the padded activation under every kernel position, [batch, C, *places, *kernel]."""
    rank = activation.ndim - 2
    kernel = ops.kernel_shape(node)
    strides = node.attributes.get_ints("strides", (1,) * rank)
    dilations = node.attributes.get_ints("dilations", (1,) * rank)
    fixed = node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    pads = node.attributes.get_ints("pads", (0,) * (2 * rank)) if fixed else (0,) * (2 * rank)
    rim = [(0, 0), (0, 0), *((pads[i], pads[rank + i]) for i in range(rank))]
    padded = np.pad(activation, rim) if any(pads) else activation
    spans = tuple((size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True))
    view = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=tuple(range(2, 2 + rank)))
    places = (slice(None, None, stride) for stride in strides)
    inside = (slice(None, None, dilation) for dilation in dilations)
    found: Array = view[(slice(None), slice(None), *places, *inside)]
    return found
