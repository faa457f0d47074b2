"""Whole models: the bundle for this machine against onnxruntime on the float model, one thread, batch 1.

    python examples/benchmarks/models.py [--models cls rec magika minilm] [--bits 8 4 3]

Writes results/models.json: speed, size and what the outputs are worth (examples/tasks.py says how that is measured).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import harness
import onnxruntime
from tasks import FAST, TASKS, Task, run_onnx

import kbitc

ROUNDS = 30
BASELINE = "onnxruntime fp32"


def weight_bytes(bundle: Path) -> int:
    """Bytes of the weights file of a bundle."""
    return (bundle / "weights.safetensors").stat().st_size


def measure(name: str, task: Task, bits: list[int], folder: Path) -> list[dict[str, Any]]:
    """Rows of one model, a row a bit width; all of them and the float model take turns."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(task.model), options, providers=["CPUExecutionProvider"])
    contestants: dict[str, Any] = {BASELINE: lambda: session.run(None, dict(task.timed))}
    facts: dict[str, dict[str, Any]] = {}
    float_value = task.describe(task.measure(run_onnx(task.model, task.batches)))
    for k in bits:
        bundle, label = folder / f"{name}-{k}.kbit", f"kbitc {k} bits"
        start = time.perf_counter()
        report = kbitc.compile(task.model, bundle, bits=k, shapes=task.shapes, calibration=task.calibration)
        seconds = time.perf_counter() - start
        module = kbitc.load(bundle, threads=1)
        contestants[label] = lambda module=module: module(dict(task.timed))
        facts[label] = {
            "model": name,
            "bits": k,
            "target": report.target,
            "compile_seconds": round(seconds, 1),
            "model_bytes": task.model.stat().st_size,
            "weight_bytes": weight_bytes(bundle),
            "float_value": float_value,
            "value": task.describe(task.measure(module(dict(feeds)) for feeds in task.batches)),
        }
    timing = harness.interleave(contestants, ROUNDS)
    harness.print_table(task.title, timing, BASELINE)
    return [
        harness.Timing({n: timing.seconds[n] for n in (BASELINE, label)}).as_json(
            f"{task.title}, {fact['bits']} bits", BASELINE, **fact
        )
        for label, fact in facts.items()
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Speed of whole models against onnxruntime fp32.")
    parser.add_argument(
        "--models", nargs="+", choices=list(TASKS), help="default: the fast ones (minilm where torch is)"
    )
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 3])
    options = parser.parse_args()
    has_torch = importlib.util.find_spec("torch") is not None
    chosen = options.models or [name for name in FAST if name != "minilm" or has_torch]
    harness.pin(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            rows += measure(name, TASKS[name](), options.bits, Path(folder))
    print(harness.save("models", rows, threads=1))


if __name__ == "__main__":
    main()
