"""Compare kbitc's solvers with each other and with other quantizers: same model, same weights, same data.

    python examples/accuracy/solvers.py minilm cls rec          3 and 4 bits, blocks of 32, float activations
    python examples/accuracy/solvers.py minilm --peers          the quantizers of peers.py too, where they import
    python examples/accuracy/solvers.py minilm --peers 'neural-*' --peer-python nc/bin/python --rows   these alone
    python examples/accuracy/solvers.py minilm cls --schemes int4:b64 nf4:b64 fp4:b64 --rows rtn
    python examples/accuracy/solvers.py --table                 print results/solvers.json

Everybody calibrates on `task.calibration` and is judged on `task.batches`, which hold other samples: the ratio of
signal to noise of the first output against the float model, and the score on labels. Look-up tables of MiniLM stay
float, because the peers leave them; peers quantize MatMul only, so compare with them on a model that has no Conv.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from peers import BLOCK, PEERS
from tasks import TASKS, Task, stream_onnx

from kbitc import driver
from kbitc.importer import load_model
from kbitc.importer.files import write_model
from kbitc.importer.signature import parse_shape
from kbitc.options import from_arguments
from kbitc.passes.canonicalize import canonicalize
from kbitc.passes.rewrite.pipeline import rewrite
from kbitc.passes.solve import solve_weights
from kbitc.quant.moments import InputMoments
from kbitc.targets.target import parse_target

RESULTS = Path(__file__).with_name("results") / "solvers.json"
#: Name of the row -> options of `kbitc quantize`; "data": whether calibration data are given.
ROWS: dict[str, dict[str, Any]] = {
    "rtn": {"solver": "rtn"},
    "four_scales": {"solver": "four_scales"},
    "mse_clip": {"solver": "mse_clip"},
    "hqq": {"solver": "hqq"},
    "rtn, bias": {"solver": "rtn", "data": True},
    "awq": {"solver": "awq", "equalize": "none", "data": True},
    "adaround": {"solver": "adaround", "equalize": "none", "data": True},
    "gptq": {"solver": "gptq", "equalize": "none", "data": True},
    "gptq, bias": {"solver": "gptq", "data": True},
}
Outputs = list[npt.NDArray[np.float64]]


def first_outputs(outputs: Sequence[dict[str, npt.NDArray[Any]]]) -> Outputs:
    """The first output of every batch."""
    return [np.asarray(next(iter(each.values())), np.float64) for each in outputs]


def sqnr_db(reference: Outputs, found: Outputs) -> float:
    """Signal over noise of all batches, dB."""
    signal = sum(float((array**2).sum()) for array in reference)
    noise = sum(float(((one - other) ** 2).sum()) for one, other in zip(reference, found, strict=True))
    return 10 * math.log10(signal / noise) if noise else math.inf


class Kbitc:
    """A task's model in canonical form and the moments of its layers' inputs, made once for all rows."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model = canonicalize(load_model(str(task.model), shapes=dict(map(parse_shape, task.shapes))))
        self.exclude = ("type:Gather",) if task.title.startswith("MiniLM") else ()
        self.memo: dict[str, InputMoments] = {}

    def write(self, out: Path, *, scheme: str, row: dict[str, Any]) -> None:
        """Quantize the weights and write the model, as `kbitc quantize` does."""
        calibrated = bool(row.get("data"))
        options = from_arguments(
            scheme=scheme, activations="float", target="reference", exclude=self.exclude,
            solver=row["solver"], equalize=row.get("equalize"),
        )  # fmt: skip
        plan, kinds = driver.make_plan(self.model, options, parse_target(options.target))
        feeds = self.task.calibration if calibrated else ()
        solved = solve_weights(self.model, plan, kinds, options.method(calibrated), feeds, memo=self.memo)
        write_model(rewrite(solved.model, plan, solved.tensors, kinds), out)


def _peer(python: str, name: str, peer: str, bits: int, out: Path) -> None:
    """Run one quantizer of peers.py by an interpreter whose environment has it."""
    script = str(Path(__file__).with_name("peers.py"))
    subprocess.run(
        [python, script, name, peer, "--bits", str(bits), "--out", str(out)],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def measure(task: Task, reference: Outputs, make: Callable[[Path], None]) -> dict[str, Any]:
    """Make a file, run it, and give what it is worth."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "quantized.onnx"
        start = time.perf_counter()
        make(out)
        seconds = time.perf_counter() - start
        outputs = list(stream_onnx(out, task.batches, fused=False))
    return {
        "sqnr_db": round(sqnr_db(reference, first_outputs(outputs)), 2),
        "score": round(task.measure(outputs), 4),
        "seconds": round(seconds, 1),
    }


def compare(
    name: str, schemes: Sequence[str], bits: Sequence[int], rows: Sequence[str], peers: Sequence[str], python: str
) -> None:
    """Measure our `rows` of every scheme and `peers` at so many bits; every result is written as it is there.

    `python` is the interpreter that runs the peers.
    """
    task = TASKS[name]()
    floats = list(stream_onnx(task.model, task.batches))
    reference = first_outputs(floats)
    keep(name, "float", {"score": round(task.measure(floats), 4)})
    ours = Kbitc(task)
    jobs: dict[str, Callable[[Path], None]] = {}
    for scheme in schemes:
        for row in rows:
            jobs[f"{scheme} {row}"] = partial(ours.write, scheme=scheme, row=ROWS[row])
    for width in bits:
        for peer in peers:
            jobs[f"{peer}, {width} bits"] = partial(_peer, python, name, peer, width)
    for label, make in jobs.items():
        try:
            keep(name, label, measure(task, reference, make))
        except Exception as error:
            if label.startswith(tuple(schemes)):
                raise
            keep(name, label, {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"})


def keep(task: str, row: str, result: dict[str, Any]) -> None:
    """Write one result into the results file and print it."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results.setdefault(task, {})[row] = result
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(task, row, result, flush=True)


def table() -> None:
    """Print the results as a Markdown table."""
    for task, rows in json.loads(RESULTS.read_text(encoding="utf-8")).items():
        print(f"\n**{task}**, float {rows['float']['score']}\n\n| | SQNR dB | score | seconds |\n|---|---|---|---|")
        for row, result in rows.items():
            if "sqnr_db" in result:
                print(f"| {row} | {result['sqnr_db']} | {result['score']} | {result['seconds']} |")
            elif "failed" in result:
                print(f"| {row} | {result['failed']} | | |")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Compare solvers on real models.")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--schemes", nargs="+", metavar="SCHEME", help="in place of int at these bits, blocks of 32")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument(
        "--peers", nargs="*", metavar="PATTERN", help="other quantizers (default: all), and ours with zero points too"
    )
    parser.add_argument("--peer-python", default=sys.executable, metavar="FILE", help="interpreter that has the peers")
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    arguments = parser.parse_args()
    for name in arguments.tasks:
        if name not in TASKS:
            parser.error(f"unknown task {name!r}")
    for row in arguments.rows:
        if row not in ROWS:
            parser.error(f"unknown row {row!r}")
    patterns = ["*"] if arguments.peers == [] else arguments.peers or []
    peers = [peer for peer in PEERS if any(fnmatchcase(peer, pattern) for pattern in patterns)]
    forms = ("int{}:b{}", "uint{}:b{}:zp") if peers else ("int{}:b{}",)
    schemes = arguments.schemes or [form.format(width, BLOCK) for width in arguments.bits for form in forms]
    for name in arguments.tasks:
        compare(name, schemes, arguments.bits, arguments.rows, peers, arguments.peer_python)
    if arguments.table or not arguments.tasks:
        table()


if __name__ == "__main__":
    main()
