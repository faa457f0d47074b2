"""What an allocator chooses from: for every weight the schemes of each width, with what each one costs.

Before an allocation a weight has `choices`; after it one of them is its entry of the plan. Two sizes are counted for
each: the bits of codes, scales and zero points, which `--target-bpw` limits, and the bytes that the packed arrays take
in weights.safetensors, tile padding and 64-byte alignment included, which `--size-budget` limits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.errors import UsageError
from kbitc.graph import ops
from kbitc.passes.allocate.survey import Candidate
from kbitc.passes.allocate.uniform import Accepts, decide
from kbitc.quant.packing import LANES, packed_shape, round_up
from kbitc.quant.plan import FLOAT, PlanEntry, QuantPlan
from kbitc.quant.scheme import Granularity, QuantScheme
from kbitc.quant.tensor import SCALE_BITS, QTensor, storage_bits

FloatArray = npt.NDArray[np.float32]
Quantize = Callable[[FloatArray, QuantScheme], QTensor]

WIDTHS = range(2, 9)
FLOAT_BITS = 32
# Every array of weights.safetensors starts on such a boundary (kbitc.bundle.weights.ALIGNMENT; a test compares them).
ALIGNMENT = 64


@dataclass(frozen=True)
class Choice:
    """One thing that a weight could become.

    Attributes:
        entry: the entry of the plan.
        bits: bits of codes, scales and zero points, as `QTensor.bits_per_weight` counts them.
        stored: bytes of the packed arrays on disk, padding included.
        cost: what its kernels cost beside another width's: predicted microseconds (`Problem.priced`), or bits read.
    """

    entry: PlanEntry
    bits: int
    stored: int
    cost: float


@dataclass(frozen=True)
class Layer:
    """A weight and what it could become, in ascending width; never empty."""

    candidate: Candidate
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Problem:
    """What an allocator decides on.

    Attributes:
        model: canonical float graph.
        feeds: samples to measure on.
        layers: the weights that have a choice, in graph order.
        fixed: the entries of all other weights, by tensor.
        order: names of all weights in graph order.
        quantize: (view f32 [N, T, C], scheme) -> the quantized weight.
    """

    model: ir.Model
    feeds: Sequence[Mapping[str, npt.NDArray[np.generic]]]
    layers: tuple[Layer, ...]
    fixed: Mapping[str, PlanEntry]
    order: tuple[str, ...]
    quantize: Quantize

    def plan(self, chosen: Sequence[int]) -> QuantPlan:
        """The plan that takes choice `chosen[i]` of layer i."""
        entries = dict(self.fixed)
        for layer, index in zip(self.layers, chosen, strict=True):
            entries[layer.candidate.tensor] = layer.choices[index].entry
        return QuantPlan(tuple(entries[name] for name in self.order))

    def weight(self, layer: Layer) -> FloatArray:
        """The float weight of a layer, seen as [N, T, C]."""
        value = self.model.graph.initializers[layer.candidate.tensor].const_value
        array = np.zeros(layer.candidate.shape, np.float32) if value is None else value.numpy()
        return np.asarray(ops.to_view(array, layer.candidate.kind), np.float32)

    def priced(self, costs: Sequence[Sequence[float]]) -> Problem:
        """The same choices with other costs, one row a layer."""
        layers = [
            replace(
                layer, choices=tuple(replace(item, cost=cost) for item, cost in zip(layer.choices, row, strict=True))
            )
            for layer, row in zip(self.layers, costs, strict=True)
        ]
        return replace(self, layers=tuple(layers))

    @property
    def weights(self) -> int:
        """Number of weights of all entries, the fixed ones counted."""
        return sum(prod(layer.candidate.shape) for layer in self.layers) + sum(
            prod(entry.shape) for entry in self.fixed.values()
        )

    @property
    def fixed_bits(self) -> int:
        """Bits of the entries that have no choice."""
        return sum(weight_bits(entry) for entry in self.fixed.values())


def weight_bits(entry: PlanEntry) -> int:
    """Bits of a weight: codes, scales, zero points or offsets, or 32 a weight where it stays float."""
    if entry.scheme is None:
        return FLOAT_BITS * prod(entry.shape)
    return storage_bits(entry.shape, entry.scheme)


def stored_bytes(entry: PlanEntry) -> int:
    """Bytes of a quantized weight's arrays in weights.safetensors: tiles of 16 x 32 codes, each array on 64 bytes."""
    if entry.scheme is None:
        return round_up(4 * prod(entry.shape), ALIGNMENT)
    n, taps, channels = entry.shape
    blocked = entry.scheme.granularity is Granularity.BLOCK
    blocks = -(-channels // entry.scheme.block) if blocked else 1
    scales = round_up(n, LANES) * (taps if blocked else 1) * blocks
    if entry.op_type == "Conv" and entry.activation == FLOAT and not blocked:
        taps, channels = 1, taps * channels  # packed with its taps side by side
    codes = prod(packed_shape(n, taps, channels, entry.scheme.bits))
    floats = round_up(scales * SCALE_BITS[entry.scheme.scale_type.value] // 8, ALIGNMENT)
    size = round_up(codes, ALIGNMENT) + (2 * floats if entry.scheme.offset else floats)
    return size + (round_up(scales, ALIGNMENT) if entry.scheme.zero_point else 0)


def kernel_cost(entry: PlanEntry) -> int:
    """Relative time of a weight's kernels where no cost model knows them: the bits that they read."""
    bits = FLOAT_BITS if entry.scheme is None else entry.scheme.bits
    return bits * prod(entry.shape)


def make_problem(
    model: ir.Model,
    candidates: Sequence[Candidate],
    base: QuantPlan,
    pinned: Sequence[str],
    scheme: QuantScheme,
    activation: str,
    accepts: Accepts,
    feeds: Sequence[Mapping[str, npt.NDArray[np.generic]]],
    quantize: Quantize,
) -> Problem:
    """Every quantized weight of the base plan at each width that its format and the target have.

    Args:
        model: canonical graph.
        candidates: from `survey`.
        base: the plan without a budget: what it keeps float stays float.
        pinned: tensors whose entry of the base plan is kept.
        scheme: data type, granularity and scale type of the choices; its bits are not used.
        activation: "int8" or "float32".
        accepts: what the target can run.
        feeds: samples to measure on.
        quantize: the solver.
    """
    schemes = _schemes(scheme)
    entries = {entry.tensor: entry for entry in base.entries}
    layers = []
    for candidate in candidates:
        entry = entries[candidate.tensor]
        if entry.scheme is None or candidate.tensor in pinned:
            continue
        made = (decide(model, candidate, wanted, activation, None, accepts) for wanted in schemes)
        choices = tuple(_choice(item) for item in made if item.scheme is not None)
        if choices:
            layers.append(Layer(candidate, choices))
    chosen = {layer.candidate.tensor for layer in layers}
    fixed = {name: entry for name, entry in entries.items() if name not in chosen}
    order = tuple(entry.tensor for entry in base.entries)
    return Problem(model, feeds, tuple(layers), fixed, order, quantize)


def _schemes(scheme: QuantScheme) -> list[QuantScheme]:
    """The scheme at every width that its data type has."""
    found = []
    for bits in WIDTHS:
        try:
            found.append(scheme.with_bits(bits))
        except UsageError:
            continue
    return found


def _choice(entry: PlanEntry) -> Choice:
    return Choice(entry, weight_bits(entry), stored_bytes(entry), kernel_cost(entry))
