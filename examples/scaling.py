"""Scaling of accuracy with bits: the score of a task and the error of its outputs against the bits of its weights.

    python examples/scaling.py                            MiniLM similarity and named entities, int and nf, 2 to 8 bits
    python examples/scaling.py --tasks cls --types int nf uint --bits 2 3 4

Dettmers & Zettlemoyer (arXiv 2212.09720) compare models and data types at equal total bits, that is all codes and
scales of the weights; so does the horizontal axis here. Weights are rounded to nearest in blocks, activations are
float. What is run is the quantized ONNX file, in onnxruntime: data types are compared here, not kernels. What kbitc
refuses is named and left out. Needs matplotlib: pip install -e ".[plots]"

Writes scaling.csv and scaling.png into examples/accuracy/results.
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
    """One row of two panels a task: score and signal to noise, both over the total megabits of the weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    names = list(dict.fromkeys(each["task"] for each in points))
    figure, grid = pyplot.subplots(len(names), 2, figsize=(11, 4 * len(names)), squeeze=False, layout="constrained")
    for panels, name in zip(grid, names, strict=True):
        mine = [each for each in points if each["task"] == name]
        for panel, column, label in zip(panels, ("score", "sqnr_db"), ("score", "output SQNR, dB"), strict=True):
            for kind in dict.fromkeys(each["type"] for each in mine if each["type"] != "float"):
                line = [each for each in mine if each["type"] == kind]
                x, y = [each["total_bits"] / 1e6 for each in line], [each[column] for each in line]
                panel.plot(x, y, marker="o", markersize=4, label=kind)
                if kind == mine[1]["type"]:
                    for each, left, height in zip(line, x, y, strict=True):
                        text = f"{each['bits']:.0f}"
                        panel.annotate(text, (left, height), (0, -13), textcoords="offset points", ha="center")
            if column == "score":
                panel.axhline(mine[0]["score"], color="grey", linestyle="--", linewidth=1, label="float32")
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter(ScalarFormatter())
            panel.xaxis.set_minor_formatter(NullFormatter())
            ticks = sorted({round(each["total_bits"] / 1e6) for each in mine[1:] if each["type"] == mine[1]["type"]})
            panel.set_xticks(ticks)
            panel.minorticks_off()
            panel.set(title=f"{name}: {label}", xlabel="total megabits of the weights (log)", ylabel=label)
            panel.grid(alpha=0.3)
            panel.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Plot accuracy against the total bits of the weights.")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["minilm", "tagger"])
    parser.add_argument("--types", nargs="+", default=["int", "nf"], help="data types (default %(default)s)")
    parser.add_argument("--bits", nargs="+", type=int, default=list(range(2, 9)), help="default: 2 to 8")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default %(default)s)")
    parser.add_argument("--draw-only", action="store_true", help="only draw scaling.csv again")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table, picture = options.out / "scaling.csv", options.out / "scaling.png"
    points = read_csv(table) if options.draw_only else []
    for name in [] if options.draw_only else options.tasks:
        points += measure(name, options.types, options.bits)
        write_csv(points, table)
    draw(points, picture)
    print(picture)


if __name__ == "__main__":
    main()
