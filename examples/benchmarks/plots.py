"""Draws the results of the benchmarks as results/NAME.svg; needs matplotlib (`pip install kbitc[plots]`).

    python examples/benchmarks/plots.py

gemv.svg: time of a matrix-vector product over the bits of a weight, beside the least time that its bytes take.
gemm.svg: share of the integer peak over the rows of activations.
whole.svg: speed of whole networks, engine by engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from harness import RESULTS
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BITS = range(1, 9)
# A scale of 16 bits for every 32 weights.
SCALE_BITS = 0.5
OURS = re.compile(r"kbitc int(\d):b32")
THEIRS = re.compile(r"(\d) bits|int(\d)|q(\d)_")
Content = Mapping[str, Any]


def read(name: str) -> Content:
    """A results file."""
    content: Content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def gemv(content: Content) -> Figure:
    """One panel where weights lie in the third-level cache, one where they come from memory."""
    rows = [row for row in content["rows"] if "4096x4096" in row["case"]]
    figure = Figure(figsize=(5 * len(rows), 4), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        _time_over_bits(axes, row, content.get("limits", {}).get("read_gb_per_s", {}))
    return figure


def _time_over_bits(axes: Axes, row: Content, reads: Mapping[str, float]) -> None:
    layers = row["layers"]
    per_layer = {name: 1e3 * value / layers for name, value in row["milliseconds"].items()}
    level = "L3" if layers == 1 else "memory"
    axes.plot(BITS, [per_layer[f"kbitc int{k}:b32"] for k in BITS], "o-", label="kbitc, blocks of 32")
    for name, value in per_layer.items():
        if name.startswith("kbitc") and not OURS.fullmatch(name):
            axes.plot(4, value, "x", label=name)
    for marker, (peer, times) in zip("s^vD", _peers(per_layer).items(), strict=False):
        axes.plot(list(times), list(times.values()), marker, label=f"{peer}, its fastest")
    if level in reads:
        least = [4096 * 4096 * (k + SCALE_BITS) / 8 / (reads[level] * 1e3) for k in BITS]
        axes.plot(BITS, least, "k--", linewidth=1, label=f"bytes at {reads[level]:.0f} GB/s ({level})")
    axes.set_title(f"4096 x 4096, weights in {level}; onnxruntime fp32: {per_layer[row['against']]:.0f} µs", fontsize=9)
    _finish(axes, "bits of a weight", "µs")


def _peers(times: Mapping[str, float]) -> dict[str, dict[int, float]]:
    """The least time of every other engine by the bits of its weights."""
    found: dict[str, dict[int, float]] = {}
    for name, value in times.items():
        bits = THEIRS.search(name)
        if bits is None or name.startswith("kbitc"):
            continue
        own = found.setdefault(name.split()[0], {})
        width = int(next(group for group in bits.groups() if group))
        own[width] = min(value, own.get(width, value))
    return found


def gemm(content: Content) -> Figure:
    """Share of the probed integer peak: of kbitc, and of the fastest of each other engine."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    rows = content["rows"]
    peak = content["limits"]["integer_gop_per_s"]
    columns: list[dict[str, float]] = []
    for row in rows:
        least: dict[str, float] = {}
        for name, value in row["milliseconds"].items():
            if name != row["against"]:
                label = name if name.startswith("kbitc") else f"{name.split()[0]}, its fastest"
                least[label] = min(value, least.get(label, value))
        columns.append(least)
    for name in columns[0]:
        shares = [
            2 * row["rows"] * 4096**2 / (least[name] * 1e6) / peak for row, least in zip(rows, columns, strict=True)
        ]
        axes.plot([row["rows"] for row in rows], shares, "o-" if name.startswith("kbitc") else "s--", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["rows"] for row in rows], [str(row["rows"]) for row in rows])
    axes.set_title(f"4096 x 4096: share of {peak:.0f} Gop/s (int8)", fontsize=9)
    _finish(axes, "rows of activations", "share of the peak")
    return figure


def whole(content: Content) -> Figure:
    """A group of bars a network."""
    rows = content["rows"]
    figure = Figure(figsize=(8, 0.4 * sum(len(row["speed"]) for row in rows)), layout="constrained")
    axes = figure.subplots()
    place, ticks = 0, []
    for row in rows:
        for name, speed in sorted(row["speed"].items(), key=lambda item: item[1]):
            axes.barh(place, speed, color="tab:blue" if name.startswith("kbitc") else "tab:gray")
            ticks.append((place, name))
            place += 1
        axes.text(0.05, place - 0.3, row["case"], fontweight="bold", fontsize=8)
        place += 1
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=7)
    axes.set_xlabel("speed, onnxruntime fp32 = 1")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _finish(axes: Axes, across: str, up: str) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def draw(names: Sequence[str] = ("gemv", "gemm", "whole")) -> list[Path]:
    """Write a picture for each results file that is there."""
    # The same file for the same numbers.
    mpl.rcParams["svg.hashsalt"] = "kbitc"
    makers: dict[str, Callable[[Content], Figure]] = {"gemv": gemv, "gemm": gemm, "whole": whole}
    written = []
    for name in names:
        if (RESULTS / f"{name}.json").is_file():
            path = RESULTS / f"{name}.svg"
            makers[name](read(name)).savefig(path, metadata={"Date": None})
            written.append(path)
    return written


if __name__ == "__main__":
    print(*draw(), sep="\n")
