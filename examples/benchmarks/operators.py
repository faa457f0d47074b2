"""What the benchmarks of single float operators share: both contestants of a case, and the race over all cases."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import harness
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


class Named(Protocol):
    """A case; `--only` looks at its name."""

    @property
    def name(self) -> str:
        """For the table and the results."""


T = TypeVar("T", bound=Named)


@dataclass(frozen=True)
class Made:
    """The two contestants of a case, and both results for the comparison before the race."""

    kbitc: Callable[[], Any]
    onnxruntime: Callable[[], Any]
    results: tuple[FloatArray, FloatArray]


def in_kbitc(module: Any, arrays: Sequence[npt.NDArray[Any]], target: Any) -> Callable[[], Any]:
    """A call of a relax module on its arguments; the result is a tensor, or the first of several."""
    import tvm
    from tvm import relax

    from kbitc.targets.build import relax_pipeline

    with tvm.target.Target(target.tvm):
        built = relax.build(module, tvm.target.Target(target.tvm), relax_pipeline=relax_pipeline())
    main = relax.VirtualMachine(built, tvm.cpu())["main"]
    arguments = [tvm.runtime.tensor(array) for array in arrays]
    return lambda: main(*arguments)


def in_onnxruntime(model: Any, inputs: dict[str, FloatArray]) -> Callable[[], Any]:
    """A call of onnxruntime with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    made = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda: made.run(None, inputs)[0]


def race(name: str, description: str, cases: Sequence[T], make: Callable[[T, Any], Made], close: float) -> None:
    """Command line: run the cases, print a table each, and save the results where asked.

    Args:
        name: of the results file.
        description: what --help says.
        cases: in order.
        make: the contestants of a case for a target.
        close: absolute and relative tolerance of the comparison before the race.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="host")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--save", action="store_true", help=f"write results/{name}.json")
    given = parser.parse_args()
    harness.pin()
    from kbitc.targets.target import parse_target

    target = parse_target(given.target)
    rows = []
    for case in cases:
        if given.only not in case.name:
            continue
        made = make(case, target)
        np.testing.assert_allclose(*made.results, rtol=close, atol=close)
        timing = harness.interleave({"kbitc": made.kbitc, "onnxruntime": made.onnxruntime}, given.rounds)
        harness.print_table(case.name, timing, against="onnxruntime")
        rows.append(timing.as_json(case.name, against="onnxruntime", target=target.name))
    if given.save:
        harness.save(name, rows, threads=1)
