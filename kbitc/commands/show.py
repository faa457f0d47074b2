"""What people see: tables on standard output, progress on standard error when that is a terminal."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kbitc.passes.carried import REASON
from kbitc.passes.verify.score import Score
from kbitc.report import Report

MEGABYTE = 1e6
WORST_SHOWN = 5
FILE_WIDTH = 200


def emit(data: Mapping[str, Any], as_json: bool, human: Callable[[], None]) -> None:
    """Print the data as one JSON object, or call the function that prints it for people."""
    if as_json:
        print(json.dumps(data))
    else:
        human()


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A status line with the current stage; silent unless standard error is a terminal."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda name: None
        return
    with console.status("start") as status:
        yield lambda name: status.update(name)


def _console() -> Console:
    """Standard output: as wide as the terminal, or wide enough for any table when it goes into a file."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    return console


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _row(table: Table, *cells: str) -> None:
    """Add a row of plain text: names of a model may hold brackets, which rich would take for styles."""
    table.add_row(*(escape(cell) for cell in cells))


def _megabytes(count: float) -> str:
    return f"{count / MEGABYTE:.2f} MB"


def report(result: Report) -> None:
    """After compile and quantize: where it is, how close, how large, what stayed float and why."""
    console = _console()
    target = f" for {result.target}" if result.target else ""
    console.print(f"[bold]{escape(result.output)}[/bold]  {result.scheme}{target}")
    quantized = [item for item in result.weights if item.entry.scheme is not None]
    total = sum(item.weights for item in result.weights)
    console.print(
        f"{len(quantized)} of {len(result.weights)} weights quantized, {result.bits_per_weight:.2f} bits a weight "
        f"over {total:,}; " + ", ".join(f"{name} {_megabytes(size)}" for name, size in result.bytes.items())
    )
    _given(console, result)
    _accuracy(console, result.accuracy)
    _planning(console, result.planning)
    _left_float(console, result)
    worst = sorted(quantized, key=lambda item: item.sqnr_db or 0.0)[:WORST_SHOWN]
    if worst:
        table = _table("hardest weights", "scheme", "bits a weight", "SQNR dB", right=("bits a weight", "SQNR dB"))
        for item in worst:
            _row(
                table,
                item.entry.tensor,
                str(item.entry.scheme),
                f"{item.bits_per_weight:.2f}",
                f"{item.sqnr_db or 0:.1f}",
            )
        console.print(table)
    spent = ", ".join(f"{name} {value:.1f} s" for name, value in result.seconds.items())
    console.print(f"[dim]{spent}[/dim]")


def _given(console: Console, result: Report) -> None:
    """What the model came with: codes of activations and the levels that meet them, and weights in few bits alone.

    The latter have no entry in the plan.
    """
    own = Counter(str(item.entry.scheme) for item in result.weights if item.entry.reason == REASON)
    if own:
        kinds = ", ".join(f"{count} {scheme}" for scheme, count in own.most_common())
        console.print(f"activation ranges are the model's own, on the levels that it has: {kinds}")
    planned = {node for item in result.weights for node in item.entry.nodes}
    # Parts of a split product are called after it.
    names = {layer["name"]: layer["weight"] for layer in result.layers if layer["weight"] not in (None, "float32")}
    given = [name for name in names if not any(name == node or name.startswith(f"{node}.") for node in planned)]
    found = Counter(names[name] for name in given)
    if found:
        kinds = ", ".join(f"{count} {scheme}" for scheme, count in found.most_common())
        console.print(f"quantized in the model already, and kept as they are: {kinds}")


def _accuracy(console: Console, accuracy: Mapping[str, Any]) -> None:
    outputs = accuracy.get("module") or accuracy.get("quantized") or {}
    judged = "compiled module" if accuracy.get("module") else "quantized ONNX"
    table = _table(f"{judged} against the float model", "SQNR dB", "cosine", "max error", "top-1", "from ONNX dB",
                   right=("SQNR dB", "cosine", "max error", "top-1", "from ONNX dB"))  # fmt: skip
    for name, item in outputs.items():
        top1 = item["top1_agreement"]
        lowering = (accuracy.get("lowering") or {}).get(name)
        _row(
            table,
            name, f"{item['sqnr_db']:.2f}", f"{item['cosine']:.6f}", f"{item['max_error']:.3g}",
            "-" if top1 is None else f"{100 * top1:.1f} %", "-" if lowering is None else f"{lowering['sqnr_db']:.1f}",
        )  # fmt: skip
    console.print(table)
    console.print(f"[dim]samples: {accuracy.get('data')}[/dim]")


def _planning(console: Console, planning: Mapping[str, Any]) -> None:
    """How widths were chosen, and what the score is worth."""
    if not planning:
        return
    predicted = planning.get("predicted_sqnr_db")
    said = "" if predicted is None else f", weights alone predicted to leave {predicted:.1f} dB"
    console.print(f"widths by {planning['allocator']}{said}, at most {100 * planning['gap']:.2g} % from optimal")
    if "predicted_microseconds" in planning:
        time, asked = planning["predicted_microseconds"], planning["time_budget_microseconds"]
        console.print(f"products with weights predicted to take {time:g} us of {asked:g}")
    if "score" in planning:
        console.print(escape(f"{Score(**planning['score'])}; {100 * planning['max_drop']:g} % were allowed"))


def _left_float(console: Console, result: Report) -> None:
    left = [item for item in result.weights if item.entry.scheme is None and result.scheme != "float32"]
    if not left:
        return
    table = _table("weights left float", "operator", "bytes", "why", right=("bytes",))
    for item in left:
        _row(table, item.entry.tensor, item.entry.op_type, f"{4 * item.weights:,}", item.entry.reason)
    console.print(table)


def analyze(result: Mapping[str, Any], output: Path) -> None:
    """After analyze: the verdict and where the page is."""
    from kbitc.page import verdict

    console = _console()
    console.print(f"[bold]{escape(verdict.headline(result))}[/bold]")
    for sentence in verdict.findings(result):
        console.print(escape(sentence))
    console.print(f"[dim]{escape(str(output))}; samples: {escape(str(result['data']))}[/dim]")


def run(result: Mapping[str, Any]) -> None:
    """After run: one line an output."""
    console = _console()
    table = _table("output", "dtype", "shape", "min", "max", "mean", right=("min", "max", "mean"))
    for item in result["outputs"]:
        numbers = ["-" if item[key] is None else f"{item[key]:.6g}" for key in ("min", "max", "mean")]
        _row(table, item["name"], item["dtype"], "x".join(map(str, item["shape"])), *numbers)
    console.print(table)
    written = f", written to {result['output_file']}" if result["output_file"] else ""
    console.print(f"[dim]{result['target']}: {result['milliseconds']:.2f} ms (first call){written}[/dim]")


def bench(result: Mapping[str, Any]) -> None:
    """After bench: one line an engine."""
    console = _console()
    rounds = f"{result['threads']} thread(s), {result['rounds']} interleaved rounds"
    console.print(f"{result['target']} on {result['machine']['cpu']}, {rounds}")
    table = _table("engine", "median ms", "min ms", "time / bundle", right=("median ms", "min ms", "time / bundle"))
    for item in result["engines"]:
        times = item["milliseconds"]
        _row(table, item["name"], f"{times['median']:.3f}", f"{times['min']:.3f}", f"{item['ratio_to_bundle']:.2f}x")
    console.print(table)
    if result["warning"]:
        console.print(f"[yellow]warning: {result['warning']}[/yellow]")


def verify(result: Mapping[str, Any]) -> None:
    """After verify."""
    console = _console()
    console.print(f"[bold]{escape(result['bundle'])}[/bold]: {result['integrity']}; runs as {result['target']}")
    for name, item in result.get("lowering", {}).items():
        console.print(escape(f"{name}: {item['sqnr_db']:.1f} dB from the quantized ONNX, on {result['data']}"))
    if "outputs" in result:
        _accuracy(console, {"module": result["outputs"], "data": result["data"]})


def targets(result: Mapping[str, Any]) -> None:
    """After targets."""
    console = _console()
    table = _table("target", "compiles here", "runs here", "to compile for it")
    for item in result["targets"]:
        needs = [need for need in item["missing"] if need["purpose"] == "compile"]
        missing = "; ".join(f"{need['what']}: {need['install']}" for need in needs)
        name = item["target"] + (" (host)" if item["host"] else "")
        _row(table, name, "yes" if item["compiles"] else "no", item["runs"] or "yes", missing)
    console.print(table)


def _type(item: Mapping[str, Any]) -> str:
    return f"{item['dtype']}[{', '.join(map(str, item['shape']))}]"


def inspect(result: Mapping[str, Any]) -> None:
    """After inspect."""
    console = _console()
    console.print(f"[bold]{escape(result['path'])}[/bold] ({result['kind']})")
    for item in result.get("variants", ()):
        console.print(f"variant {item['target']} in {item['library']}: {item['runs'] or 'runs here'}")
    for side in ("inputs", "outputs"):
        for item in result[side]:
            console.print(f"{side[:-1]:7} " + escape(f"{item['name']}  {_type(item)}"))
    for key in ("operators", "canonical_operators"):
        if key in result:
            counts = ", ".join(f"{name} {count}" for name, count in result[key].items())
            console.print(f"{key.replace('_', ' ')}: {counts}")
    table = _table("weight", "operator", "N x T x C", "scheme", "activation", "bits a weight", "why",
                   right=("bits a weight",))  # fmt: skip
    for item in result["weights"]:
        shape = "x".join(map(str, item["shape"]))
        _row(
            table,
            item["tensor"], item["op_type"], shape, item["scheme"] or "float32", item["activation"],
            f"{item['bits_per_weight']:.2f}", item["reason"],
        )  # fmt: skip
    console.print(table)
