"""Builds one float contraction through a kernel rule, runs it, and bounds its rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from kbitc.bundle.manifest import ValueInfo
from kbitc.targets import machine
from kbitc.targets.build import relax_pipeline
from kbitc.targets.link import export_library
from kbitc.targets.lower.context import Context
from kbitc.targets.lower.contraction import Contraction, ConvAttributes, PostFunction
from kbitc.targets.runner.execute import run_library
from kbitc.targets.target import Target

Array = npt.NDArray[Any]
# Rounding of one float32 operation, relative: half a unit in the last place.
UNIT_ROUNDOFF = 2.0**-24


class Compiled:
    """A contraction built for a target by one rule."""

    def __init__(self, rule: Any, contraction: Contraction, target: Target) -> None:
        reason = rule.match(contraction, target)
        if reason is not None:
            raise ValueError(reason)
        ctx = Context(target)
        shapes = [contraction.x_shape, *([] if contraction.b_shape is None else [contraction.b_shape])]
        if contraction.attention is not None:
            shapes.append(contraction.attention.v.shape)
            shapes += [] if contraction.attention.mask is None else [contraction.attention.mask.shape]
        inputs = [relax.Var(f"x{i}", relax.TensorType(tuple(shape), "float32")) for i, shape in enumerate(shapes)]
        with ctx.builder.function("main"):
            with ctx.builder.dataflow():
                result = ctx.builder.emit_output(rule.emit(ctx, contraction, inputs))
            ctx.builder.emit_func_output(result, params=[*inputs, *ctx.weight_parameters()])
        self.module = relax.build(ctx.builder.get(), tvm.target.Target(target.tvm), relax_pipeline=relax_pipeline())
        self.target = target
        self.weights = ctx.weights
        self.out_shape = contraction.out_shape

    def __call__(self, *inputs: Array) -> Array:
        """Run it, under qemu where this machine is another; then the shape of the result must be static."""
        if self.target.machine != machine.architecture():
            return self._emulated(inputs)
        given = [tvm.runtime.tensor(array) for array in (*inputs, *self.weights.values())]
        result: Array = relax.VirtualMachine(self.module, tvm.cpu())["main"](*given).numpy()
        return result

    def _emulated(self, inputs: tuple[Array, ...]) -> Array:
        feeds = {f"x{i}": x for i, x in enumerate(inputs)}
        described = [ValueInfo(name, str(x.dtype), x.shape) for name, x in feeds.items()]
        results = [ValueInfo("out", "float32", tuple(int(d) for d in self.out_shape))]
        library = export_library(self.module, self.target)
        return run_library(self.target, library, self.weights, described, results, feeds).outputs["out"]

    def assembly(self) -> str:
        """Text of the machine code."""
        modules = [self.module.mod, *self.module.mod.imports]
        return "\n".join(module.inspect_source("s") for module in modules if module.kind == "llvm")


def uniform(seed: int, *shape: int) -> Array:
    """float32 in [-1, 1)."""
    return np.asarray(np.random.default_rng(seed).random(shape, np.float32) * 2 - 1, np.float32)


def convolution(weight: Array, image: tuple[int, int, int], geometry: ConvAttributes, **more: Any) -> Contraction:
    """x [B, H, W, C * group] by a float32 weight [N, T, C]; `more` are further fields."""
    n, _, c = weight.shape
    batch, *size = image
    out = [
        (size[i] + geometry.pads[i] + geometry.pads[i + 2] - geometry.dilations[i] * (geometry.kernel[i] - 1) - 1)
        // geometry.strides[i]
        + 1
        for i in range(2)
    ]
    x_shape = (batch, *size, c * geometry.group)
    return Contraction("node", "conv", weight, "float32", x_shape, (batch, *out, n), conv=geometry, **more)


def check_sum(
    got: Array, product: Callable[[Array, Array], Array], x: Array, w: Array, terms: int, **more: Any
) -> None:
    """Compare with the float64 product within the bound of a recursive sum (Higham 2002, eq. 3.5).

    |error| <= g * (sum of |x| |w| + |bias|), g = n u / (1 - n u), n = terms + 1 for the bias, u = 2^-24. The clamp
    rounds nothing and is monotone with slope at most 1.

    Args:
        got: float32 result.
        product: linear in both arguments; gives [..., N].
        x, w: operands.
        terms: products in a sum.
        more: bias (float32 [N] or None) and post (PostFunction or None).
    """
    bias, post = more.get("bias"), more.get("post")
    exact = product(x.astype(np.float64), w.astype(np.float64))
    size = product(np.abs(x).astype(np.float64), np.abs(w).astype(np.float64))
    if bias is not None:
        exact, size = exact + bias.astype(np.float64), size + np.abs(bias)
    exact = clamped(exact, post)
    n = terms + 1
    bound = n * UNIT_ROUNDOFF / (1 - n * UNIT_ROUNDOFF) * size
    assert got.dtype == np.float32 and got.shape == exact.shape
    assert (np.abs(got - exact) <= bound).all(), float((np.abs(got - exact) / np.maximum(bound, 1e-30)).max())


def clamped(values: Array, post: PostFunction | None) -> Array:
    """The clamp of a contraction."""
    if post is not None and post.low is not None:
        values = np.maximum(values, post.low)
    if post is not None and post.high is not None:
        values = np.minimum(values, post.high)
    return values
