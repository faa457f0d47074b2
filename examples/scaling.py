"""Scaling of accuracy with bits: the score of a task and the error of its outputs against the bits of its weights.

    python examples/scaling.py                            MNIST and MiniLM similarity, 2 to 8 bits, four types
    python examples/scaling.py --tasks cls --types int nf uint --bits 2 3 4

Dettmers & Zettlemoyer (arXiv 2212.09720) compare models and data types at equal total bits, that is all codes and
scales of the weights; so does the horizontal axis here. Weights are rounded to nearest in blocks, activations are
float. What is run is the quantized ONNX file, in onnxruntime: data types are compared here, not kernels. What kbitc
refuses is named and left out. Needs matplotlib: pip install -e ".[plots]"

Writes scaling.csv and scaling.png into examples/accuracy/results; points of other tasks stay in the file.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tasks import TASKS, Outputs, Task, stream_onnx

import kbitc
from kbitc.errors import KbitcError

RESULTS = Path(__file__).resolve().parent / "accuracy" / "results"
BLOCK = 64
COLUMNS = ("task", "type", "bits", "total_bits", "bits_per_weight", "score", "sqnr_db")
FLOAT_BITS = 32
LINEAR_POINTS = 0.1  # below this the axis of points is linear, so that it has a zero


def noise_ratio(reference: Outputs, outputs: Outputs) -> float:
    """Signal to noise in dB of the first output of all batches against the float model's."""
    signal = noise = 0.0
    for want, got in zip(reference, outputs, strict=True):
        name = next(iter(want))
        signal += float((want[name].astype(np.float64) ** 2).sum())
        noise += float(((want[name].astype(np.float64) - got[name]) ** 2).sum())
    return 10 * float(np.log10(signal / noise)) if noise else float("inf")


def point(name: str, task: Task, reference: Sequence[Any], scheme: str, folder: Path) -> dict[str, Any]:
    """Size, score and error of one task with one scheme, weights only.

    Raises:
        KbitcError: the compiler refuses the scheme.
    """
    model = folder / "quantized.onnx"
    report = kbitc.quantize(
        task.model, model, scheme=scheme, activations="float", shapes=task.shapes, force=True
    ).as_json()
    outputs = list(stream_onnx(model, task.batches, 1))
    weights = sum(weight["weights"] for weight in report["weights"])
    return {
        "task": name,
        "total_bits": round(weights * report["bits_per_weight"]),
        "bits_per_weight": report["bits_per_weight"],
        "score": task.measure(outputs),
        "sqnr_db": noise_ratio(reference, outputs),
    }


def measure(name: str, types: Sequence[str], widths: Sequence[int]) -> list[dict[str, Any]]:
    """Points of one task: the float model first, then every type at every width that kbitc has."""
    task = TASKS[name]()
    reference = list(stream_onnx(task.model, task.batches, 1))
    points: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in types:
            for bits in widths:
                scheme = f"{kind}{bits}:b{BLOCK}"
                try:
                    made = point(name, task, reference, scheme, Path(folder))
                except KbitcError as error:
                    print(f"{name}, {scheme}: {error}", file=sys.stderr)
                    continue
                points.append({**made, "type": kind, "bits": bits})
                print(f"{name}, {scheme}: {task.describe(made['score'])}, {made['sqnr_db']:.1f} dB", flush=True)
    if not points:
        return []
    total = round(points[0]["total_bits"] / points[0]["bits_per_weight"] * FLOAT_BITS)
    whole = {"task": name, "type": "float", "bits": FLOAT_BITS, "total_bits": total, "bits_per_weight": FLOAT_BITS}
    return [{**whole, "score": task.measure(reference), "sqnr_db": float("inf")}, *points]


def write_csv(points: Sequence[dict[str, Any]], path: Path) -> None:
    """One line a point."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(points)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The points of a file that write_csv wrote."""
    texts = ("task", "type")
    with path.open(newline="", encoding="utf-8") as file:
        return [{k: v if k in texts else float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def draw(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Two panels a task over the total megabits of the weights: points lost, and signal to noise of the outputs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(each["task"] for each in points))
    figure, grid = pyplot.subplots(len(names), 2, figsize=(11, 4 * len(names)), squeeze=False, layout="constrained")
    for (left, right), name in zip(grid, names, strict=True):
        mine = [each for each in points if each["task"] == name]
        whole = next(each for each in mine if each["type"] == "float")
        mine.remove(whole)
        for kind in dict.fromkeys(each["type"] for each in mine):
            line = [each for each in mine if each["type"] == kind]
            megabits = [each["total_bits"] / 1e6 for each in line]
            lost = [abs(each["score"] - whole["score"]) for each in line]
            left.plot(megabits, lost, marker="o", markersize=4, label=kind)
            right.plot(megabits, [each["sqnr_db"] for each in line], marker="o", markersize=4, label=kind)
        left.set_yscale("symlog", linthresh=LINEAR_POINTS)
        left.set_ylim(bottom=0)
        left.set(title=f"{name}: distance from the float score, {whole['score']:.2f}", ylabel="points (log above 0.1)")
        right.set(title=f"{name}: outputs against float", ylabel="SQNR, dB")
        for panel in (left, right):
            mark_widths(panel, mine)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def mark_widths(panel: Any, points: Sequence[dict[str, Any]]) -> None:
    """Logarithmic horizontal axis with a tick at each bit width, which says width and megabits; grid and legend."""
    sizes = {round(each["bits"]): each["total_bits"] / 1e6 for each in points}
    panel.set_xscale("log")
    panel.minorticks_off()
    panel.set_xticks(list(sizes.values()), [f"{size:.3g}\n{bits} bit" for bits, size in sizes.items()])
    panel.set_xlabel("total megabits of the weights")
    panel.grid(alpha=0.3)
    panel.legend()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Plot accuracy against the total bits of the weights.")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["digits", "minilm"])
    parser.add_argument(
        "--types", nargs="+", default=["int", "nf", "fp", "dynexp"], help="data types (default %(default)s)"
    )
    parser.add_argument("--bits", nargs="+", type=int, default=list(range(2, 9)), help="default: 2 to 8")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default %(default)s)")
    parser.add_argument("--draw-only", action="store_true", help="only draw scaling.csv again")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table, picture = options.out / "scaling.csv", options.out / "scaling.png"
    chosen = [] if options.draw_only else options.tasks
    points = [each for each in (read_csv(table) if table.exists() else []) if each["task"] not in chosen]
    for name in chosen:
        points += measure(name, options.types, options.bits)
        write_csv(points, table)
    draw(points, picture)
    print(picture)


if __name__ == "__main__":
    main()
