"""What `kbitc bench --layers` and `kbitc tune` print for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from kbitc.commands.show import _console, _row, _table

NUMBERS = ("ms", "share", "kB", "Mop", "limit", "predicted", "float ms", "float / this")


def layers(result: Mapping[str, Any]) -> None:
    """One line a layer, the longest last; warnings at the end."""
    console = _console()
    machine = result["machine"]
    console.print(f"{machine['cpu']}, {result['threads']} thread(s), {result['rounds']} interleaved rounds")
    if "read_gb_per_s" in machine:
        reads = ", ".join(f"{name} {speed:.0f} GB/s" for name, speed in machine["read_gb_per_s"].items())
        peaks = f"{machine['float_gop_per_s']:.0f} Gop/s float32, {machine['integer_gop_per_s']:.0f} Gop/s int8"
        console.print(f"limits, probed now: {reads}; {peaks}")
    table = _table("layer", "rule", "weight", *NUMBERS, right=NUMBERS)
    for row in sorted(result["layers"], key=lambda row: row["milliseconds"]):
        _row(table, row["name"], row["rule"], row["weight"] or "", *_numbers(row))
    console.print(table)
    by_rule = _table("rule", "layers", "ms", "share", right=("layers", "ms", "share"))
    for rule in result["rules"]:
        share = f"{100 * rule['share']:.1f} %"
        _row(by_rule, rule["rule"], str(rule["layers"]), f"{rule['milliseconds']:.4f}", share)
    console.print(by_rule)
    sums = ", ".join(f"{name} {value:.3f} ms" for name, value in result["milliseconds"].items())
    console.print(f"sum of the layers: {sums}")
    for warning in result["warnings"]:
        console.print(f"[yellow]warning: {escape(warning)}[/yellow]")


def _numbers(row: Mapping[str, Any]) -> list[str]:
    base = row["float_milliseconds"]
    predicted = row["predicted_milliseconds"]
    limit = "-" if "limited_by" not in row else f"{100 * row['fraction_of_limit']:.0f} % of {row['limited_by']}"
    return [
        f"{row['milliseconds']:.4f}", f"{100 * row['share']:.1f} %", f"{row['bytes'] / 1e3:.1f}",
        f"{row['operations'] / 1e6:.2f}" if row["operations"] else "", limit,
        "" if predicted is None else f"{predicted:.4f}",
        "" if base is None else f"{base:.4f}",
        "" if base is None or not row["milliseconds"] else f"{base / row['milliseconds']:.2f}x",
    ]  # fmt: skip


def tune(result: Mapping[str, Any]) -> None:
    """One line a class of shapes."""
    console = _console()
    table = _table("rule", "shape", "layers", "tried", "schedule", "speed", right=("layers", "tried", "speed"))
    for item in result["classes"]:
        entry = item["entry"]
        chosen, speed = "usual", ""
        if entry is not None:
            chosen = ", ".join(f"{name} {value}" for name, value in entry["schedule"].items())
            speed = f"{entry['speed']:.2f}x"
        _row(table, item["rule"], item["shape"], str(len(item["layers"])), str(item["tried"]), chosen, speed)
    console.print(table)
    console.print(f"[dim]{escape(result['output'])} for {result['target']}[/dim]")
