"""Round to nearest with the smallest scale that clips nothing.

Per block with weights w and levels g_0 < ... < g_max (Jacob et al., arXiv 1712.05877, section 2.1):

    symmetric:   scale = max(min(w) / g_0, max(w) / g_max)
    asymmetric:  scale = (max(w, 0) - min(w, 0)) / (2^k - 1),  zero point = round(-min(w, 0) / scale)
    offset:      scale = (max(w) - min(w)) / (2^k - 1),  offset = min(w)  (Q4_1 of ggml)
    one bit:     scale = mean |w|  (least squares for a sign; XNOR-Net, arXiv 1603.05279, equation 6)
    learned:     scale = max |w| / 127, then the levels are fitted to w / scale

The scale is rounded to its storage type before the weights are divided by it, so the codes fit the stored scale. An
integer block scale is the nearest multiple of its channel's step, or the one above or below when that gives the block
less squared error.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kbitc.passes.solvers._blocks import importance_of
from kbitc.quant.format import Format
from kbitc.quant.learn import data_type_of
from kbitc.quant.moments import InputMoments
from kbitc.quant.scales import round_offsets, spread_steps, store_scales
from kbitc.quant.scheme import QuantScheme, ScaleCode
from kbitc.quant.tensor import QTensor, block_extent, block_range, block_sum, shape3, spread

FloatArray = npt.NDArray[np.float32]


def solve(weight: FloatArray, scheme: QuantScheme, inputs: InputMoments | None = None) -> QTensor:
    """Quantize one weight.

    Args:
        weight: f32 [N, T, C], finite.
        scheme: what it becomes.
        inputs: moments of what it is multiplied with; only a learned table looks at them.

    Returns:
        The codes, with scales already rounded to what the scheme stores.
    """
    importance = None if inputs is None else importance_of(weight, inputs)
    return solve_with(weight, scheme, data_type_of(weight, scheme, importance))


def solve_with(weight: FloatArray, scheme: QuantScheme, data_type: Format) -> QTensor:
    """The same with a data type of the scheme whose levels are already fitted (`kbitc.quant.learn`)."""
    low, high = block_extent(weight, scheme) if scheme.offset else block_range(weight, scheme)
    if data_type.asymmetric:
        wanted = (high - low) / np.float32(2**scheme.bits - 1)
    elif scheme.bits == 1:
        wanted = block_sum(np.abs(weight), scheme) / block_sum(np.ones_like(weight), scheme)
    else:
        wanted = data_type.scale_for(low, high)
    scales, steps = store_scales(wanted, scheme)
    if not data_type.asymmetric and 0 not in data_type.levels:
        # Without a zero level only a zero scale makes an all-zero block zero again.
        scales = np.where(low == high, np.float32(0), scales)
    found = encode(weight, scales, steps, data_type, scheme)
    return best_scale_codes(weight, found) if scheme.scale_code is ScaleCode.INTEGER else found


def encode(
    weight: FloatArray, scales: FloatArray, steps: FloatArray | None, data_type: Format, scheme: QuantScheme
) -> QTensor:
    """Zero points or offsets, and nearest codes for given scales.

    Args:
        weight: f32 [N, T, C].
        scales, steps: as `kbitc.quant.scales.store_scales` gives them.
        data_type: the levels.
        scheme: what the weight becomes.
    """
    zero_points = offsets = None
    if scheme.offset:
        offsets = round_offsets(block_extent(weight, scheme)[0], scheme.scale_type)
        weight = weight - spread(offsets, shape3(weight), scheme)
    ratio = weight / spread(np.where(scales > 0, scales, np.float32(1)), shape3(weight), scheme)
    if scheme.offset:
        ratio = ratio + np.float32(data_type.levels[0])
    elif data_type.asymmetric:
        low, _ = block_range(weight, scheme)
        zero_points = np.clip(np.rint(-low / scales), 0, 2**scheme.bits - 1).astype(np.uint8)
        ratio = ratio + data_type.grid.astype(np.float32)[spread(zero_points, shape3(weight), scheme)]
    codes = data_type.encode(np.asarray(ratio, np.float32))
    return QTensor(codes, scales, zero_points, data_type, scheme, steps, offsets)


def best_scale_codes(weight: FloatArray, start: QTensor) -> QTensor:
    """Move each integer block scale by one step where that lowers the squared error of its block."""
    best = start
    for shift in (-1, 1):
        codes = np.clip(best.scale_codes().astype(np.int16) + shift, 1, best.scheme.largest_scale_code)
        moved = np.where(best.scales > 0, codes * _steps(best), best.scales).astype(np.float32)
        other = encode(weight, moved, best.scale_steps, best.format, best.scheme)
        better = _squared_error(weight, other) < _squared_error(weight, best)
        scales = np.where(better, other.scales, best.scales)
        best = encode(weight, scales, best.scale_steps, best.format, best.scheme)
    return best


def _steps(tensor: QTensor) -> FloatArray:
    """The step of every scale, f32 of the scales' shape."""
    if tensor.scale_steps is None:
        return tensor.scales
    return spread_steps(tensor.scale_steps, tensor.scales.shape, tensor.scheme.scale_code)


def _squared_error(weight: FloatArray, tensor: QTensor) -> FloatArray:
    """Sums over the weights of each scale."""
    return block_sum(np.square(weight - tensor.dequantize()), tensor.scheme)
