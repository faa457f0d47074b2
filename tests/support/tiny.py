"""A small model compiled straight with relax: y = x @ w + b (n rows), z = max(y, 0). For tests of bundles."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kbitc.bundle.manifest import ValueInfo
from kbitc.bundle.writer import Compiled, write_bundle
from kbitc.targets.link import export_library
from kbitc.targets.target import parse_target

K, N = 8, 16
INPUTS = (ValueInfo("x", "float32", ("n", K)),)
OUTPUTS = (ValueInfo("y", "float32", ("n", N)), ValueInfo("z", "float32", ("n", N)))


@dataclass(frozen=True)
class Tiny(Compiled):
    """A compiled tiny model and its weights."""

    negated: bool = False

    def write(self, out: Path, **options: Any) -> Path:
        """Write it as a bundle."""
        return write([self], out, **options)

    def expected(self, x: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Outputs for x f32 [n, K] of small integers, exact."""
        return expected(x, self.negated)


def write(made: Sequence[Compiled], out: Path, **options: Any) -> Path:
    """Write variants of the tiny model as a bundle."""
    write_bundle(out, made, INPUTS, OUTPUTS, kbitc_version="0", report={"tiny": True}, **options)
    return out


def feeds(rows: int = 5) -> dict[str, npt.NDArray[Any]]:
    """Integers in float32, so that every result is exact."""
    return {"x": np.random.default_rng(rows).integers(-8, 9, (rows, K)).astype(np.float32)}


def weights() -> dict[str, npt.NDArray[Any]]:
    """Small integers, so that float32 sums are exact."""
    rng = np.random.default_rng(0)
    return {
        "w": rng.integers(-8, 9, (K, N)).astype(np.float32),
        "b": rng.integers(-8, 9, N).astype(np.float16),  # 32 bytes: stored flat with padding
    }


def expected(x: npt.NDArray[Any], negated: bool = False) -> dict[str, npt.NDArray[Any]]:
    """Outputs for x f32 [n, K] of small integers, exact."""
    made = weights()
    y = x @ made["w"] + made["b"].astype(np.float32)
    y = -y if negated else y
    return {"y": y, "z": np.maximum(y, 0)}


@functools.cache
def compile_tiny(target_name: str, negated: bool = False) -> Tiny:
    """The tiny model for a target; `negated` is another model with the same signature."""
    import tvm
    from tvm import relax

    from kbitc.targets.build import relax_pipeline

    target = parse_target(target_name)
    built = relax.build(module(negated), tvm.target.Target(target.tvm), relax_pipeline=relax_pipeline())
    return Tiny(target, export_library(built, target), weights(), negated)


def module(negated: bool = False) -> Any:
    """The relax module, not scheduled."""
    from tvm import relax, te, tirx

    builder = relax.BlockBuilder()
    rows = tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType((rows, K), "float32"))
    w = relax.Var("w", relax.TensorType((K, N), "float32"))
    b = relax.Var("b", relax.TensorType((N,), "float16"))

    def product(x: Any, w: Any, b: Any) -> Any:
        k = te.reduce_axis((0, K), "k")
        total = te.compute((x.shape[0], N), lambda i, j: te.sum(x[i, k] * w[k, j], axis=k), name="total")
        sign = tirx.const(-1.0 if negated else 1.0, "float32")
        return te.compute((x.shape[0], N), lambda i, j: sign * (total[i, j] + b[j].astype("float32")), name="y")

    def positive(y: Any) -> Any:
        return te.compute(y.shape, lambda i, j: tirx.max(y[i, j], tirx.const(0.0, "float32")), name="z")

    with builder.function("main", [x, w, b]):
        with builder.dataflow():
            y = builder.emit_te(product, x, w, b, primfunc_name_hint="product")
            z = builder.emit_te(positive, y, primfunc_name_hint="positive")
            result = builder.emit_output(relax.Tuple([y, z]))
        builder.emit_func_output(result)
    return builder.get()
