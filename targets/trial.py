"""Contractions on their own, compiled into one module and timed in interleaved rounds: for tuning and costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from tvm import relax

from kbitc.bundle.profile import Clock, LayerTimes, clock_of, profile
from kbitc.bundle.runtime import load_built
from kbitc.quant.levels import WHOLE_BYTES, LevelTensor
from kbitc.quant.scales import store_scales
from kbitc.quant.scheme import QuantScheme
from kbitc.quant.tensor import QTensor, scale_shape
from kbitc.targets.build import Built, compile_module
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.contraction import Contraction, ConvAttributes, Requantization
from kbitc.targets.lower.emitter import Signature
from kbitc.targets.lower.offer import offer
from kbitc.targets.rules.base import schedule
from kbitc.targets.target import Target
from kbitc.targets.tuning import Schedule

Array = npt.NDArray[Any]
SEED = 0
THREADS = 1


@dataclass(frozen=True, eq=False)
class Trial:
    """One kernel to time.

    Attributes:
        name: unique among the trials of a module.
        contraction: what it computes, all dims known.
        schedule: of its product; None for the usual one.
        open_rows: the kernel learns the number of rows when it runs; for matrix products only.
    """

    name: str
    contraction: Contraction
    schedule: Schedule | None = None
    open_rows: bool = False

    @property
    def rows(self) -> int:
        """Rows of the product."""
        return prod(int(dim) for dim in self.contraction.out_shape[:-1])


def build_trials(trials: Sequence[Trial], target: Target) -> Built:
    """One module `main(inputs..., weights...) -> (a result a trial)`.

    Trials of the same contraction share its weight and have inputs of their own.

    Raises:
        UnsupportedError: no rule of the target takes one.
    """
    ctx = Context(target)
    inputs, outputs, described, results = [], [], [], []
    with ctx.builder.function("main"):
        for i, trial in enumerate(trials):
            given = with_open_rows(trial.contraction, ctx.symbol(f"rows{i}")) if trial.open_rows else trial.contraction
            shapes = [given.x_shape] if given.b_shape is None else [given.x_shape, given.b_shape]
            own = [relax.Var(f"x{i}_{j}", relax.TensorType(shape, _dtype(given))) for j, shape in enumerate(shapes)]
            inputs += own
            described += [_signature(f"x{i}_{j}", _dtype(given), shape) for j, shape in enumerate(shapes)]
            ctx.target = target.with_schedule(trial.schedule).with_tuning(None)
            node = ir.Node("", given.kind, [], name=trial.name)
            outputs.append(offer(ctx, node, named(given, trial.name), own).var)
            results.append(_signature(trial.name, given.out_dtype, given.out_shape))
        ctx.builder.emit_func_output(relax.Tuple(outputs), params=[*inputs, *ctx.weight_parameters()])
    module, kernels = schedule(ctx.builder.finalize(), target, target.schedule_rules())
    return Built(
        target, compile_module(module, target), ctx.weights, tuple(described), tuple(results), tuple(ctx.layers),
        tuple(kernels), tuple(call.as_json() for call in ctx.calls.records),
    )  # fmt: skip


def with_open_rows(contraction: Contraction, rows: Any) -> Contraction:
    """A matrix product of a number of rows that is not known yet."""
    shapes = {"x_shape": (rows, contraction.x_shape[-1]), "out_shape": (rows, contraction.out_shape[-1])}
    return Contraction(**{**vars(contraction), **shapes})


def _signature(name: str, dtype: str, shape: Sequence[Any]) -> Signature:
    return Signature(name, dtype, tuple(dim if isinstance(dim, int) else str(dim) for dim in shape))


def _dtype(contraction: Contraction) -> str:
    if contraction.kind == "embedding":
        return contraction.index_dtype
    return "uint8" if contraction.activation == "uint8" else "float32"


def time_trials(built: Built, rounds: int, rows: int = 1, clock: Clock | None = None) -> dict[str, LayerTimes]:
    """Times of every trial, by its name: one run of each a round. `rows` is what open rows are."""
    random = np.random.default_rng(SEED)
    model = load_built(built.library, built.weights, built.inputs, built.outputs, threads=THREADS)
    arrays = [_made_up(item, random, rows) for item in built.inputs]
    report = {"layers": built.layers, "calls": built.calls}
    found = profile({"trials": (model, model.device_arguments(arrays), report)}, rounds, clock or clock_of(THREADS))
    return {layer.name: layer for layer in found["trials"] if layer.contraction}


def results_of(built: Built, rows: int = 1) -> dict[str, Array]:
    """What every trial computes, of the inputs of `time_trials`; those of one shape are equal here."""
    model = load_built(built.library, built.weights, built.inputs, built.outputs, threads=THREADS)
    return model({item.name: _made_up(item, np.random.default_rng(SEED), rows) for item in built.inputs})


def _made_up(item: Signature, random: np.random.Generator, rows: int) -> Array:
    shape = tuple(dim if isinstance(dim, int) else rows for dim in item.shape)
    if item.dtype == "float32":
        return random.normal(size=shape).astype(np.float32)
    return random.integers(0, 2, shape).astype(item.dtype)


def named(contraction: Contraction, name: str) -> Contraction:
    """The same contraction under another name; `dataclasses.replace` would compare arrays."""
    return Contraction(**{**vars(contraction), "name": name})


def made_up_weight(scheme: str | None, shape: tuple[int, int, int]) -> QTensor | npt.NDArray[np.float32]:
    """A weight [N, T, C] of random codes and scales near 1, or of random floats: times do not depend on values."""
    random = np.random.default_rng(SEED)
    if scheme is None:
        return random.normal(size=shape).astype(np.float32)
    parsed = QuantScheme.parse(scheme)
    data_type = parsed.data_type()
    codes = random.integers(0, 2**data_type.bits, shape).astype(np.uint8)
    drawn = (random.random(scale_shape(shape, parsed)) + 0.5).astype(np.float32)
    scales, steps = store_scales(drawn, parsed)
    zeros = random.integers(0, 2**data_type.bits, scales.shape).astype(np.uint8) if parsed.zero_point else None
    offsets = scales if parsed.offset else None
    return QTensor(codes, scales, zeros, data_type, parsed, steps, offsets)


def made_up_levels(bits: int, shape: tuple[int, int, int]) -> LevelTensor:
    """A weight [N, T, C] of random levels of k bits."""
    half = 1 << (bits - 1)
    codes = np.random.default_rng(SEED).integers(0, 2 * half, shape).astype(np.uint8)
    return LevelTensor(codes, bits, () if bits == WHOLE_BYTES else tuple(range(-half, half)))


def made_up_requantization(outputs: int) -> Requantization:
    """One of half a code for every step of the accumulator, a number a channel."""
    return Requantization(np.full(outputs, 1 << 30, np.int32), np.full(outputs, 40, np.int32), 0, 0, 255)


def from_facts(facts: Mapping[str, Any], sizes: Mapping[str, int]) -> Contraction | None:
    """The contraction that a layer of a report describes, with made-up weights.

    Args:
        facts: an entry of `layers` of report.json.
        sizes: of symbolic dims.

    Returns:
        None for layers that are no products by a weight, or whose weight, factors of blocks or shape is not known.
    """
    shapes = [known(facts[key], sizes) for key in ("x_shape", "out_shape")]
    if facts["kind"] not in ("matmul", "conv") or facts["weight"] is None or None in shapes:
        return None
    codes, (n, taps, channels) = facts["activation"] == "uint8", facts["weight_shape"]
    if codes and "blocks" in facts["weight"]:
        return None
    weight: QTensor | LevelTensor | npt.NDArray[np.float32]
    if codes:
        weight = made_up_levels(facts["bits"], (n, taps, channels))
    else:
        weight = made_up_weight(None if facts["weight"] == "float32" else facts["weight"], (n, taps, channels))
    block = 0
    if isinstance(weight, QTensor) and facts["activation"] == "int8":
        block = weight.block if weight.block < weight.shape[2] else 0
    conv = facts["conv"]
    geometry: ConvAttributes | None = None
    if conv is not None:
        kernel, strides, pads, dilations = (tuple(conv[key]) for key in ("kernel", "strides", "pads", "dilations"))
        geometry = ConvAttributes(kernel, strides, pads, dilations, conv["group"])
    return Contraction(
        facts["name"], facts["kind"], weight, facts["activation"], shapes[0] or (), shapes[1] or (),
        activation_block=block, conv=geometry,
        requantize=made_up_requantization(n) if facts.get("result") == "uint8" else None,
    )  # fmt: skip


def known(shape: Sequence[int | str], sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """A shape in numbers; None when a dim is neither a number nor one of `sizes`."""
    found = [dim if isinstance(dim, int) else sizes.get(dim) for dim in shape]
    return None if None in found else tuple(size for size in found if size is not None)
