"""dp4a: four products of signed bytes added to an int32, without saturation (PTX ISA, "dp4a")."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

OPCODE = "IDP.4A.S8.S8"


def dp4a(levels: Any, activations: Any, total: Any) -> Any:
    """total + sum over the four signed bytes of levels * activations; all three are int32 expressions."""
    return tirx.call_pure_extern("int32", "__dp4a", levels, activations, total)


def dp4a_means(
    levels: npt.NDArray[np.int32], activations: npt.NDArray[np.int32], total: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """The same in numpy, for int32 arrays of one shape; wraps like the instruction."""
    left = levels[..., None].view(np.int8).astype(np.int64)
    right = activations[..., None].view(np.int8).astype(np.int64)
    return np.asarray((total.astype(np.int64) + (left * right).sum(axis=-1)).astype(np.int32))
