"""Fits the levels of a learned data type to one weight."""

from __future__ import annotations

import numpy as np

from kbitc import catalog
from kbitc.errors import UsageError
from kbitc.quant.format import FloatArray, Format
from kbitc.quant.scheme import FORMATS, QuantScheme
from kbitc.quant.tensor import block_range, shape3, spread


def data_type_of(weight: FloatArray, scheme: QuantScheme, importance: FloatArray | None = None) -> Format:
    """The data type that a weight gets: that of the scheme, its levels fitted where they are learned.

    Args:
        weight: f32 [N, T, C].
        scheme: what it becomes.
        importance: f32 that broadcasts to [N, T, C], at least 0: what the squared error of each weight counts, such
            as the second moment of its input; None counts all alike.

    Raises:
        UsageError: the scheme names a data type whose levels only a quantized file can give.
    """
    data_type = scheme.data_type()
    if not data_type.learned:
        return data_type
    module = catalog.find(FORMATS, scheme.format, "data type")
    if not hasattr(module, "fit"):
        raise UsageError("this data type has no levels of its own", got=str(scheme), remedy="use kmeans or quantile")
    low, high = block_range(weight, scheme)
    scales = data_type.scale_for(low, high)
    wide = spread(np.where(scales > 0, scales, np.float32(1)), shape3(weight), scheme)
    counted = None
    if importance is not None:
        counted = np.broadcast_to(importance * np.square(wide), weight.shape)
    elif scales.size > 1:
        counted = np.broadcast_to(np.square(wide), weight.shape)
    fitted: Format = module.fit(scheme.bits, np.asarray(weight / wide, np.float32), counted)
    return fitted
