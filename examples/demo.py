"""The demonstration: real models to k bits by the command line, run on real input, compared with float.

    python examples/demo.py [--bits 4] [--models cls rec minilm] [--out demo-out]

The models and what is measured on them are in tasks.py. Every model is compiled with `kbitc compile` for this machine,
calibrated on samples that are not among the measured ones.
Speed is measured in interleaved rounds in this process on one thread: the bundle, and onnxruntime on the float model.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).with_name("benchmarks")))
import fetch
import harness
from tasks import TASKS, Task, run_onnx

ROUNDS = 20
DEFAULT_MODELS = ("cls", "rec", "minilm")
console = Console()


def save_samples(task: Task, folder: Path) -> Path:
    """The calibration samples as files, one a batch, for `--calibration`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, feeds in enumerate(task.calibration):
        np.savez(folder / f"{number:03}.npz", **{name: np.asarray(array) for name, array in feeds.items()})
    return folder


def compile_model(task: Task, bundle: Path, bits: int) -> dict[str, Any]:
    """Run `kbitc compile`, show the command, return its report; a failure ends with kbitc's own message and code."""
    shapes = [part for shape in task.shapes for part in ("--shape", shape)]
    samples = save_samples(task, bundle.with_suffix(".samples"))
    command = ["compile", str(task.model), "-o", str(bundle), "--bits", str(bits), "--calibration", str(samples)]
    command += [*shapes, "--force"]
    console.print(f"[dim]$ kbitc {shlex.join(command)}[/dim]", soft_wrap=True, highlight=False)
    done = subprocess.run(
        [sys.executable, "-m", "kbitc", *command, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    report: dict[str, Any] = json.loads(done.stdout)
    console.print(
        f"  {report['quantized_weights']} of {len(report['weights'])} weights quantized, "
        f"{report['bits_per_weight']:.2f} bits a weight, {sum(report['seconds'].values()):.0f} s",
        highlight=False,
    )
    return report


def demonstrate(task: Task, bundle: Path, bits: int) -> list[str]:
    """Compile one model, run it, and give its row of the table."""
    import onnxruntime

    import kbitc

    report = compile_model(task, bundle, bits)
    module = kbitc.load(bundle, threads=1)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(task.model), options, providers=["CPUExecutionProvider"])
    timing = harness.interleave(
        {"float": lambda: session.run(None, dict(task.timed)), "kbitc": lambda: module(dict(task.timed))}, ROUNDS
    )
    return [
        task.title,
        f"{task.model.stat().st_size / 1e6:.1f} → {report['bytes']['weights.safetensors'] / 1e6:.1f}",
        " " + task.describe(task.measure(run_onnx(task.model, task.batches))),
        " " + task.describe(task.measure(module(dict(feeds)) for feeds in task.batches)),
        f"{1e3 * timing.median('float'):.1f} → {1e3 * timing.median('kbitc'):.1f}",
        f"{timing.speed('kbitc', 'float'):.2f}x",
    ]


def default_models() -> list[str]:
    """What can run here: MiniLM only where torch can export it, or where that was done before."""
    exported = (fetch.models_folder() / "minilm" / "minilm.onnx").exists()
    has_torch = importlib.util.find_spec("torch") is not None
    return [name for name in DEFAULT_MODELS if name != "minilm" or exported or has_torch]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Compile real models to k bits, run them, compare with float.")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--models", nargs="+", choices=list(TASKS), help="default: cls, rec, and minilm if it can")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where the bundles go (default %(default)s)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = options.models or default_models()

    title = f"{options.bits}-bit weights against float in onnxruntime, one thread"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, collapse_padding=True)
    table.add_column("model ", no_wrap=True)
    table.add_column("megabytes ", justify="right", no_wrap=True)
    for heading in ("float", f"{options.bits} bits"):
        table.add_column(f" {heading}", no_wrap=True)
    for heading in (" ms", " speed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in chosen:
        try:
            task = TASKS[name]()
        except fetch.FetchError as error:
            raise SystemExit(f"demo: {error}") from None
        table.add_row(*demonstrate(task, options.out / f"{name}-{options.bits}bit.kbit", options.bits))
    console.print(table)
    console.print("megabytes: the model file, and the packed weights; ms: median of a call.")
    console.print(f"The bundles are in {options.out}", highlight=False, soft_wrap=True)
    if options.models is None and "minilm" not in chosen:
        console.print("MiniLM was left out: its export needs torch (pip install torch==2.13.0; the CPU build will do).")


if __name__ == "__main__":
    main()
