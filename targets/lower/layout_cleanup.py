"""Transposes that move only dims of size 1 move no data: they become Reshapes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kbitc.graph import edit
from kbitc.graph.edit import add_initializer, is_op, root_graph


def reshape_idle_transposes(model: ir.Model) -> bool:
    """Replace each Transpose that keeps the order of all dims other than 1 by a Reshape. True when one was found.

    Keeps a Transpose when more than one dim of its result is symbolic and out of place.
    """
    modified = False
    for node in list(model.graph):
        if not is_op(node, "Transpose") or node.inputs[0] is None or node.inputs[0].shape is None:
            continue
        shape = node.inputs[0].shape
        perm = list(node.attributes.get_ints("perm", list(range(len(shape)))[::-1]))
        moved = [axis for axis in perm if shape[axis] != 1]
        if moved != sorted(moved):
            continue
        target = _target(shape, perm)
        if target is None:
            continue
        name = f"{node.outputs[0].name}.shape"
        value = add_initializer(root_graph(node), name, np.asarray(target, np.int64))
        edit.replace_with(node, "Reshape", [node.inputs[0], value])
        modified = True
    return modified


def _target(shape: ir.Shape, perm: list[int]) -> list[int] | None:
    target: list[int] = []
    for position, axis in enumerate(perm):
        dim = shape[axis]
        if isinstance(dim, int):
            target.append(dim)
        elif axis == position:
            target.append(0)
        elif -1 in target:
            return None
        else:
            target.append(-1)
    return None if 0 in [dim for dim in shape if isinstance(dim, int)] else target
