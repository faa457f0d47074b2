"""A packed weight as every kernel sees it: what it is, and the arguments that hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kbitc.quant.format import Format
from kbitc.quant.packing import LANES, UNIT, packed_shape, round_up
from kbitc.quant.scheme import Granularity, ScaleType
from kbitc.quant.tensor import QTensor
from kbitc.targets.kernels import vector as v

Buffer = Any
SCALE_DTYPES = {ScaleType.F16: "float16", ScaleType.F32: "float32"}


@dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """A packed weight [N, T, C].

    Attributes:
        outputs, taps, channels: N, T, C.
        data_type: format of the codes.
        block: channels per weight scale; C when there is one scale a channel or none.
        scale_per_block: scales are [Np/16, T, CB, 16]; otherwise [Np/16, 1, 1, 16].
        scale_dtype: "float16" or "float32", of the stored scales.
        zero_point: zero points are stored, one a block of scales (see `isa.stored_bias`).
        offset: offsets are stored beside the scales, in their type.
        factors: block scales are integers (`ScaleCode.INTEGER`): they lie beside the codes as uint8 [Np/16, T, CB, 16],
            and the stored scales are the steps of the channels.
    """

    outputs: int
    taps: int
    channels: int
    data_type: Format
    block: int
    scale_per_block: bool
    scale_dtype: str
    zero_point: bool = False
    offset: bool = False
    factors: bool = False

    @property
    def origin(self) -> int:
        """What is taken off every level: with offsets the lowest one, so that the integer of a weight is its code."""
        return self.data_type.levels[0] if self.offset else 0

    @property
    def blocks(self) -> int:
        """CB, blocks along C within a tap."""
        return -(-self.channels // self.block)

    @property
    def padded_channels(self) -> int:
        """Cp."""
        return round_up(self.channels, UNIT)

    @property
    def units(self) -> int:
        """Cp / 32."""
        return self.padded_channels // UNIT

    @property
    def output_tiles(self) -> int:
        """Np / 16."""
        return round_up(self.outputs, LANES) // LANES

    @property
    def block_shape(self) -> tuple[int, int, int, int]:
        """Shape of what is stored once a block: zero points and factors."""
        return self.output_tiles, *((self.taps, self.blocks) if self.scale_per_block else (1, 1)), LANES

    @property
    def scale_shape(self) -> tuple[int, int, int, int]:
        """Shape of the stored scales."""
        return (self.output_tiles, 1, 1, LANES) if self.factors else self.block_shape


def weight_fields(weight: QTensor) -> dict[str, Any]:
    """The fields of `WeightSpec` for a weight, also for the specifications that add to them."""
    n, taps, channels = weight.shape
    return {
        "outputs": n,
        "taps": taps,
        "channels": channels,
        "data_type": weight.format,
        "block": min(weight.block, channels),
        "scale_per_block": weight.scheme.granularity is Granularity.BLOCK,
        "scale_dtype": SCALE_DTYPES[weight.scheme.scale_type],
        "zero_point": weight.zero_points is not None,
        "offset": weight.offsets is not None,
    }


@dataclass
class WeightArguments:
    """The buffers of a packed weight.

    Attributes:
        packed: codes, uint8 [Np/16, T, Cp/32, k, 64].
        scales: of shape `WeightSpec.scale_shape`.
        zeros, factors: uint8 of shape `WeightSpec.block_shape`, where the weight has them.
        offsets: of the shape and type of the scales, where the weight has them.
    """

    packed: Buffer
    scales: Buffer
    zeros: Buffer | None
    offsets: Buffer | None
    factors: Buffer | None


def declare_weight(spec: WeightSpec) -> WeightArguments:
    """Declare codes, scales, factors, zero points or offsets (those there are) as the next arguments of a function."""
    shape = packed_shape(spec.outputs, spec.taps, spec.channels, spec.data_type.bits)
    packed = v.argument("packed", shape, "uint8")
    scales = v.argument("scales", spec.scale_shape, spec.scale_dtype)
    factors = v.argument("factors", spec.block_shape, "uint8") if spec.factors else None
    zeros = v.argument("zeros", spec.block_shape, "uint8") if spec.zero_point else None
    offsets = v.argument("offsets", spec.scale_shape, spec.scale_dtype) if spec.offset else None
    return WeightArguments(packed, scales, zeros, offsets, factors)


def declare_bias(spec: WeightSpec, bias: bool) -> Buffer | None:
    """Declare the bias f32 [Np], if there is one, as the next argument."""
    return v.argument("bias", (spec.output_tiles * LANES,), "float32") if bias else None
