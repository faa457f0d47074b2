"""Time k-bit matrix products on a GPU against torch float16: bundles compiled for CUDA, run from the bundle.

    python examples/benchmarks/cuda_gemv.py --n 4096 --k 4096 --rows 1 8 64 --schemes int4:b32 nf4:b32 int3:b32

Each round runs every contestant once, in turn; the figures are medians over rounds. The weights of a contestant are
as many copies as exceed --rotate MiB, used in turn, so that the second-level cache does not answer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kbitc.errors import KbitcError
from kbitc.quant.scheme import QuantScheme
from kbitc.targets import machine


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; a bad scheme or size ends the program with exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--n", type=_positive, default=4096, help="output channels")
    parser.add_argument("--k", type=_positive, default=4096, help="reduction length")
    parser.add_argument("--rows", type=_positive, nargs="+", default=[1, 8, 64], help="rows of the activation")
    parser.add_argument("--schemes", type=_scheme, nargs="+", default=["int4:b32", "nf4:b32"], help="weight schemes")
    parser.add_argument("--rounds", type=_positive, default=50)
    parser.add_argument("--rotate", type=_positive, default=256, help="MiB of weights in turn")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _scheme(text: str) -> str:
    try:
        return str(QuantScheme.parse(text))
    except KbitcError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def no_gpu() -> str | None:
    """Why nothing can be timed here; None when there is a GPU."""
    found = machine.cuda_capability()
    return found if isinstance(found, str) else None


def make_model(n: int, k: int, rows: int, copies: int, path: Path) -> None:
    """A model with `copies` independent products of one input; the outputs are y0, y1, ..."""
    rng = np.random.default_rng(0)
    nodes, weights, outputs = [], [], []
    for i in range(copies):
        weight = (rng.standard_normal((k, n), np.float32) / np.float32(k**0.5)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{i}"))
        nodes.append(helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [rows, n]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, k])
    graph = helper.make_graph(nodes, "products", [x], outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path, save_as_external_data=copies * n * k * 4 > 2**30)


def bundle_runner(model: Path, scheme: str, copies: int, folder: Path) -> Callable[[], float]:
    """Compile, load; a call gives microseconds a product."""
    import kbitc

    bundle = folder / f"{scheme.replace(':', '_')}.kbit"
    kbitc.compile(str(model), output=str(bundle), scheme=scheme, target="cuda")
    loaded: Any = kbitc.load(str(bundle))
    shape = tuple(int(dim) for dim in loaded.inputs[0].shape)
    given = loaded.device_arguments([np.ones(shape, np.float32)])

    def run() -> float:
        start = time.perf_counter()
        loaded.run_raw(given)
        return (time.perf_counter() - start) * 1e6 / copies

    return run


def torch_runner(n: int, k: int, rows: int, copies: int) -> Callable[[], float] | None:
    """torch.matmul in float16 on the GPU; None where torch has no CUDA."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    x = torch.ones((rows, k), dtype=torch.float16, device="cuda")
    weights = [torch.randn((k, n), dtype=torch.float16, device="cuda") for _ in range(copies)]

    def run() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for weight in weights:
            torch.matmul(x, weight)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e6 / copies

    return run


def measure(runners: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median microseconds a product of each contestant, rounds interleaved."""
    for run in runners.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            times[name].append(run())
    return {name: statistics.median(values) for name, values in times.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 7 where there is no GPU."""
    options = arguments(argv)
    reason = no_gpu()
    if reason is not None:
        print(f"nothing to time here: {reason}", file=sys.stderr)
        return 7
    results = []
    for rows in options.rows:
        bits = min(QuantScheme.parse(scheme).bits for scheme in options.schemes)
        copies = max(1, -(-options.rotate * 2**20 * 8 // (options.n * options.k * bits)))
        with tempfile.TemporaryDirectory(prefix="kbitc-gemv-") as name:
            folder = Path(name)
            make_model(options.n, options.k, rows, copies, folder / "model.onnx")
            runners = {s: bundle_runner(folder / "model.onnx", s, copies, folder) for s in options.schemes}
            float16 = torch_runner(options.n, options.k, rows, copies)
            if float16 is not None:
                runners["torch float16"] = float16
            medians = measure(runners, options.rounds)
        results.append({"rows": rows, "n": options.n, "k": options.k, "copies": copies, "microseconds": medians})
        if not options.json:
            text = ", ".join(f"{key} {value:.2f} us" for key, value in medians.items())
            print(f"{rows} x {options.k} by {options.k} x {options.n}: {text}")
    if options.json:
        print(json.dumps({"results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
