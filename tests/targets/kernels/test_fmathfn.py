"""Float functions against float64 numpy, over the whole range of float32, with bounds in units in the last place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm.script import ir_builder
from tvm.script.ir_builder import tirx as T

from kbitc.targets.kernels import mathfn
from kbitc.targets.kernels.lets import lower_lets

HOST = {"kind": "llvm", "mcpu": "haswell"}
NEON = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76", "mattr": ["+neon", "+dotprod"]}
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 0.5, 2.0, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38,
           88.722, 88.7229, -87.33, -87.34, -103.9, -104.1, 0.625, 0.92, 4.0, 10.0, math.pi, 1e15]  # fmt: skip


def compile_function(function: Callable[..., Any], size: int, arguments: int, target: dict[str, Any]) -> Any:
    with ir_builder.IRBuilder() as builder:
        with T.prim_func():
            T.func_name("main")
            T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
            sources = [T.arg(f"x{i}", T.buffer((size,), "float32")) for i in range(arguments)]
            out = T.arg("y", T.buffer((size,), "float32"))
            with T.serial(0, size // 16) as row, T.vectorized(0, 16) as lane:
                T.buffer_store(out, function(*[x[row * 16 + lane] for x in sources]), [row * 16 + lane])
    return tvm.compile(tvm.IRModule({"main": lower_lets(builder.get())}), target=tvm.target.Target(target))


def run(function: Callable[..., Any], *arguments: np.ndarray) -> np.ndarray:
    size = arguments[0].size
    out = tvm.runtime.tensor(np.zeros(size, np.float32))
    compile_function(function, size, len(arguments), HOST)(*map(tvm.runtime.tensor, arguments), out)
    return out.numpy()


def dense_grid() -> np.ndarray:
    """Every 2^14th bit pattern of float32, the range where functions bend, and the special values."""
    patterns = np.arange(0, 2**32, 2**14, dtype=np.uint64).astype(np.uint32).view(np.float32)
    random = np.random.default_rng(3)
    near = random.uniform(-110, 110, 100_000).astype(np.float32)
    small = random.normal(size=100_000).astype(np.float32)
    grid = np.concatenate([patterns, near, small, np.array(SPECIAL, np.float32)])
    return np.resize(grid, -(-grid.size // 16) * 16)


def ulp_error(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """|got - want| in units in the last place of want; 0 for equal infinities and NaN pairs."""
    with np.errstate(all="ignore"):
        rounded = want.astype(np.float32)
        unit = np.spacing(np.minimum(np.abs(rounded), np.finfo(np.float32).max)).astype(np.float64)
        error = np.abs(got.astype(np.float64) - want) / unit
    same = (got == rounded) | (np.isnan(got) & np.isnan(want))
    return np.where(same, 0.0, np.where(np.isnan(error), np.inf, error))


def sigmoid64(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


erf64 = np.vectorize(math.erf, otypes=[np.float64])


@pytest.mark.parametrize(
    ("function", "reference", "bound"),
    [
        (mathfn.exp, np.exp, 1.0),
        (mathfn.expm1, np.expm1, 2.0),
        (mathfn.log, np.log, 2.0),
        (mathfn.log1p, np.log1p, 3.0),
        (mathfn.tanh, np.tanh, 2.0),
        (mathfn.erf, erf64, 2.0),
        (mathfn.softplus, lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))), 4.0),
        (mathfn.atan, np.arctan, 3.0),
        (mathfn.asin, np.arcsin, 4.0),
        (mathfn.acos, np.arccos, 4.0),
        (mathfn.sinh, np.sinh, 4.0),
        (mathfn.cosh, np.cosh, 4.0),
        (mathfn.asinh, np.arcsinh, 5.0),
        (mathfn.acosh, np.arccosh, 5.0),
        (mathfn.atanh, np.arctanh, 5.0),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_function_stays_within_its_bound(function: Any, reference: Any, bound: float) -> None:
    x = dense_grid()
    with np.errstate(all="ignore"):
        want = reference(x.astype(np.float64))
    got = run(function, x)
    error = ulp_error(got, want)
    worst = int(np.argmax(error))
    assert error[worst] <= bound, f"x = {x[worst]!r}: got {got[worst]!r}, want {want[worst]!r}"
    zero = (x == 0) & ~np.isnan(want)
    assert np.array_equal(np.signbit(got[zero]), np.signbit(want[zero])), "the sign of zero"


def test_exp_below_has_the_bits_of_exp_down_to_the_normal_numbers_and_then_zero() -> None:
    x = dense_grid()
    x = x[~(x > 0)]
    want = run(mathfn.exp, x)
    np.testing.assert_array_equal(run(mathfn.exp_below, x), np.where(want < 2.0**-126, np.float32(0), want))


@pytest.mark.parametrize(("function", "reference"), [(mathfn.sin, np.sin), (mathfn.cos, np.cos), (mathfn.tan, np.tan)])
def test_trigonometry_inside_its_range(function: Any, reference: Any) -> None:
    x = dense_grid()
    inside = np.abs(x) < 2.0**50
    with np.errstate(invalid="ignore"):
        want = np.where(inside, reference(x.astype(np.float64)), np.nan)
    assert ulp_error(run(function, x), want).max() <= (4.0 if function is mathfn.tan else 2.0)


def test_sigmoid_and_silu() -> None:
    x = dense_grid()
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64)
        want, want_silu = sigmoid64(wide), wide * sigmoid64(wide)
    got, got_silu = run(mathfn.sigmoid, x), run(mathfn.silu, x)
    above = ~(x < -87.0)  # below, e^-x overflows and the true value is under 1.7e-38
    assert ulp_error(got[above], want[above]).max() <= 3.0
    assert np.all((got[~above] >= 0) & (got[~above] < 1.7e-38))
    finite = above & np.isfinite(x)
    assert ulp_error(got_silu[finite], want_silu[finite]).max() <= 4.0


@pytest.mark.parametrize("function", [mathfn.gelu, mathfn.gelu_tanh], ids=["gelu", "gelu_tanh"])
def test_gelu_error_is_small_against_x(function: Any) -> None:
    """Phi(x) = (1 + erf) / 2 is right to 2 ulp of 1 (erf) and one rounding; so gelu is, times |x|."""
    x = dense_grid()
    x = np.where(np.isfinite(x), x, np.float32(0))
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        inner = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
        phi = 0.5 * (1 + (erf64(wide * np.sqrt(0.5)) if function is mathfn.gelu else np.tanh(inner)))
    # The argument of erf carries up to 3 roundings: relative error 3 eps times max of |z erf'(z)| = 0.42 < 1/2.
    bound = np.abs(wide) * 4 * np.finfo(np.float32).eps + 1e-45
    assert np.all(np.abs(run(function, x) - wide * phi) <= bound)


def test_pow_matches_the_standard_over_special_and_random_pairs() -> None:
    random = np.random.default_rng(4)
    special = np.array([*SPECIAL, -2.0, 3.0, -3.0, 1.5, -0.5, 16777217.0, 1e9, -1e9], np.float32)
    pairs = np.array(np.meshgrid(special, special)).reshape(2, -1).T
    bases = np.exp(random.normal(size=80_000)) * random.choice([-1, 1], 80_000)
    exponents = np.where(random.random(80_000) < 0.5, random.integers(-40, 40, 80_000), random.normal(size=80_000) * 9)
    both = np.concatenate([pairs, np.stack([bases, exponents], 1).astype(np.float32)])
    both = np.resize(both, (-(-len(both) // 16) * 16, 2)).astype(np.float32)
    x, y = np.ascontiguousarray(both[:, 0]), np.ascontiguousarray(both[:, 1])
    with np.errstate(all="ignore"):
        want = np.power(x.astype(np.float64), y.astype(np.float64))
    got = run(mathfn.pow, x, y)
    error = ulp_error(got, want)
    worst = int(np.argmax(error))
    assert error[worst] <= 1.0, f"{x[worst]!r} ** {y[worst]!r}: got {got[worst]!r}, want {want[worst]!r}"


@pytest.mark.parametrize("name", ["exp", "log", "tanh", "erf", "gelu", "sigmoid", "expm1", "sin"])
def test_vectorised_code_calls_no_library(name: str) -> None:
    function = getattr(mathfn, name)
    x86 = compile_function(function, 160, 1, HOST).mod.inspect_source("s")
    assert "ymm" in x86 and "expf" not in x86 and "@PLT" not in x86.replace("TVMFFIErrorSetRaisedFromCStrParts@PLT", "")
    neon = compile_function(function, 160, 1, NEON).mod.inspect_source("s")
    calls = [line.split()[1] for line in neon.splitlines() if line.strip().startswith("bl\t")]
    assert "fmla" in neon and not [call for call in calls if "tvm" not in call.lower() and "main" not in call]


def test_lanes_of_the_argument_are_kept() -> None:
    vector = tvm.tirx.Var("v", "float32x16")
    assert str(mathfn.gelu(vector).ty) == "float32x16"
    assert str(mathfn.pow(vector, vector).ty) == "float32x16"
