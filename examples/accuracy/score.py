"""Score every task with every configuration: compile it with kbitc, run the bundle, compare with labels.

    python examples/accuracy/score.py                          what is missing of everything
    python examples/accuracy/score.py cls tagger --rows 'W4*'  these tasks, the rows that match
    python examples/accuracy/score.py cls --again              made anew
    python examples/accuracy/score.py smollm --onnxruntime     the quantized ONNX file in place of a bundle (quicker)
    python examples/accuracy/score.py --table                  only the tables of README.md

A row of OPTIONS is the arguments of kbitc.compile. A finished row is kept in results/TASK.json as long as the model and
the samples are the same. What kbitc refuses to compile is run as the quantized ONNX file in onnxruntime, which is the
file's meaning; that it was so, or why there is no row at all, is kept with the reason, and tried again the next time.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import confidence
import harness
import tables
from tasks import TASKS, Array, Task, percent, stream_onnx

import kbitc
from kbitc.budget import make_budget
from kbitc.errors import KbitcError, UnsupportedError
from kbitc.options import from_arguments

THREADS = 1
REFERENCE = "onnxruntime float"

# Name of the row -> arguments of kbitc.compile; None is the float model in onnxruntime. Two are taken out: `calibrated`
# says that the task's calibration batches are given, `tables` what the task's tables become instead. W: bits of a
# weight, A: bits of an activation. "mixed": widths by measured sensitivity, together as large as all weights alike.
OURS = ("calibrated", "tables")
# "apart": each layer on the float model's inputs, not in sequence.
APART = {"activations": "float", "solver": "gptq", "sequential": False, "calibrated": True}
OPTIONS: Mapping[str, Mapping[str, Any] | None] = {
    REFERENCE: None,
    "kbitc float": {"scheme": "float32", "activations": "float"},
    "W8": {"bits": 8, "activations": "float"},
    "W4": {"bits": 4, "activations": "float"},
    "W3": {"bits": 3, "activations": "float"},
    "W2": {"bits": 2, "activations": "float"},
    "W4 nf b64": {"scheme": "nf4:b64", "activations": "float"},
    "W4 fp b64": {"scheme": "fp4:b64", "activations": "float"},
    "W4 int b64": {"scheme": "int4:b64", "activations": "float"},
    "W3 nf b64": {"scheme": "nf3:b64", "activations": "float"},
    "W3 int b64": {"scheme": "int3:b64", "activations": "float"},
    "W8A8 dynamic": {"bits": 8, "activations": "dynamic"},
    "W4A8 dynamic": {"bits": 4, "activations": "dynamic"},
    "W4 mse_clip": {"bits": 4, "activations": "float", "solver": "mse_clip"},
    "W4 gptq": {"bits": 4, "activations": "float", "solver": "gptq", "calibrated": True},
    "W4 gptq apart": {"bits": 4, **APART},
    "W3 gptq apart": {"bits": 3, **APART},
    "W2 gptq apart": {"bits": 2, **APART},
    "W4 awq": {"bits": 4, "activations": "float", "solver": "awq", "calibrated": True},
    "W4 hqq": {"bits": 4, "activations": "float", "solver": "hqq"},
    "W3 gptq": {"bits": 3, "activations": "float", "solver": "gptq", "calibrated": True},
    "W3 awq": {"bits": 3, "activations": "float", "solver": "awq", "calibrated": True},
    "W3 hqq": {"bits": 3, "activations": "float", "solver": "hqq"},
    "W2 gptq": {"bits": 2, "activations": "float", "solver": "gptq", "calibrated": True},
    "W4 uint gptq": {"scheme": "uint4:b32:zp", "activations": "float", "solver": "gptq", "calibrated": True},
    "W3 uint gptq": {"scheme": "uint3:b32:zp", "activations": "float", "solver": "gptq", "calibrated": True},
    "W4 uint gptq apart": {"scheme": "uint4:b32:zp", **APART},
    "W4 min": {"scheme": "uint4:b32:min", "activations": "float"},
    "W4 min gptq": {"scheme": "uint4:b32:min", "activations": "float", "solver": "gptq", "calibrated": True},
    "W3 min hqq": {"scheme": "uint3:b32:min", "activations": "float", "solver": "hqq"},
    "W3 min gptq": {"scheme": "uint3:b32:min", "activations": "float", "solver": "gptq", "calibrated": True},
    "W3 min gptq apart": {"scheme": "uint3:b32:min", **APART},
    "W3 min gptq apart, tables W8": {"scheme": "uint3:b32:min", **APART, "tables": "int8:b32"},
    "W3 gptq apart, tables W8": {"bits": 3, **APART, "tables": "int8:b32"},
    "W4 mixed": {"scheme": "int4:b32", "target_bpw": 4.5, "activations": "float", "calibrated": True},
    "W3 mixed": {"scheme": "int3:b32", "target_bpw": 3.5, "activations": "float", "calibrated": True},
    "W2 mixed": {"scheme": "int2:b32", "target_bpw": 2.5, "activations": "float", "calibrated": True},
    "W4 uint, tables W8": {"scheme": "uint4:b32:zp", "activations": "float", "tables": "int8:b32"},
    "W4 min, tables W8": {"scheme": "uint4:b32:min", "activations": "float", "tables": "int8:b32"},
    "W3 min gptq, tables W8": {
        "scheme": "uint3:b32:min",
        "activations": "float",
        "solver": "gptq",
        "calibrated": True,
        "tables": "int8:b32",
    },  # fmt: skip
    "W3 gptq, tables W8": {
        "bits": 3,
        "activations": "float",
        "solver": "gptq",
        "calibrated": True,
        "tables": "int8:b32",
    },  # fmt: skip
    "W4A8 dynamic gptq": {"bits": 4, "activations": "dynamic", "solver": "gptq", "calibrated": True},
    "W8A8 static": {"scheme": "int8:c", "activations": "static", "calibrated": True},
    "W4A8 static": {"bits": 4, "activations": "static", "calibrated": True},
    "W8A8 integer-only": {"scheme": "int8:c", "integer_only": True, "calibrated": True},
}


def unknown_options(options: Mapping[str, Any]) -> list[str]:
    """Options of a row that this kbitc does not have."""
    calls = (kbitc.compile, from_arguments, make_budget)
    known = {name for call in calls for name in inspect.signature(call).parameters}
    return [name for name in options if name not in known and name not in OURS]


def fingerprint(task: Task, calibrated: bool) -> str:
    """SHA-256 over the model file, the samples and, where a row is `calibrated`, the samples that it is made with."""
    digest = hashlib.sha256(hashlib.sha256(task.model.read_bytes()).digest())
    for feeds in (*task.batches, *(task.calibration if calibrated else ())):
        for name, array in sorted(feeds.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def commit() -> str | None:
    """The commit that is checked out, with a + when files differ from it; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def loss(task: Task, rows: Array, reference: Array) -> float:
    """What a model loses against float: points of the score, or the factor where the task counts in factors."""
    score, before = task.statistic(rows), task.statistic(reference)
    if task.in_factors:
        return score / before
    return before - score if task.better == "higher" else score - before


def judge(task: Task, rows: Array, reference: Array) -> dict[str, Any]:
    """Score and loss with their intervals, and the task's details."""
    if task.statistic is percent:
        interval = tuple(100 * bound for bound in confidence.wilson(int(rows.sum()), len(rows)))
    else:
        interval = confidence.bootstrap(task.statistic, rows)
    lost = confidence.bootstrap(lambda a, b: loss(task, a, b), rows, reference)
    return {
        "score": task.statistic(rows),
        "interval": list(interval),
        "lost": loss(task, rows, reference),
        "lost_interval": list(lost),
        "details": task.details(rows),
    }


def compile_and_run(task: Task, arguments: Mapping[str, Any], folder: Path) -> tuple[Array, dict[str, Any]]:
    """Rows of the compiled model, and what the compilation cost.

    Raises:
        KbitcError: the compiler refuses.
    """
    bundle = folder / "model.kbit"
    start = time.perf_counter()
    report = kbitc.compile(task.model, bundle, shapes=task.shapes, force=True, **arguments)
    built = time.perf_counter()
    module = kbitc.load(bundle, threads=THREADS)
    rows = task.rows(module(dict(feeds)) for feeds in task.batches)
    return rows, {
        "bits_per_weight": report.as_json()["bits_per_weight"],
        "weight_bytes": (bundle / "weights.safetensors").stat().st_size,
        "target": report.target,
        "compile_seconds": round(built - start, 1),
        "run_seconds": round(time.perf_counter() - built, 1),
    }


def quantize_and_run(task: Task, arguments: Mapping[str, Any], folder: Path) -> tuple[Array, dict[str, Any]]:
    """Rows of the quantized ONNX file in onnxruntime.

    Raises:
        KbitcError: the model cannot be quantized so either.
    """
    path = folder / "model.onnx"
    report = kbitc.quantize(task.model, path, shapes=task.shapes, force=True, **arguments)
    rows = task.rows(stream_onnx(path, task.batches, THREADS, fused=False))
    return rows, {"bits_per_weight": report.as_json()["bits_per_weight"]}


def make_row(task: Task, name: str, reference: Array, folder: Path, *, bundles: bool) -> dict[str, Any]:
    """One finished row, or the reason why there is none; without `bundles` the ONNX file is run in onnxruntime."""
    options = OPTIONS[name]
    if options is None:
        return {"model_bytes": task.model.stat().st_size, **judge(task, reference, reference)}
    unknown = unknown_options(options)
    if unknown:
        return {"options": options, "refused": f"this build of kbitc has no option {', '.join(unknown)}"}
    arguments = {name: value for name, value in options.items() if name not in OURS}
    if options.get("calibrated"):
        arguments["calibration"] = task.calibration
    if "tables" in options:
        arguments["plan"] = folder / "plan.json"
        entries = [{"tensor": name, "scheme": options["tables"]} for name in task.tables]
        arguments["plan"].write_text(json.dumps({"version": 1, "tensors": entries}), encoding="utf-8")
    made: dict[str, Any] = {"options": options, "run": "bundle" if bundles else "onnxruntime"}
    try:
        try:
            rows, facts = (compile_and_run if bundles else quantize_and_run)(task, arguments, folder)
        except UnsupportedError as error:
            made |= {"refused": str(error), "run": "onnxruntime"}
            rows, facts = quantize_and_run(task, arguments, folder)
    except KbitcError as error:
        return {**made, "refused": str(error)}
    return {**made, **facts, **judge(task, rows, reference)}


def is_finished(row: Mapping[str, Any] | None, name: str, mark: str) -> bool:
    """Whether a kept row can stay."""
    return bool(row and "refused" not in row and row["fingerprint"] == mark and row.get("options") == OPTIONS[name])


def score_task(name: str, chosen: list[str], again: bool, bundles: bool) -> None:
    """Make the rows of one task that are missing; the results file is written after each."""
    path = tables.RESULTS / f"{name}.json"
    task = TASKS[name]()
    marks = {True: fingerprint(task, True), False: fingerprint(task, False)}

    def mark(row: str) -> str:
        return marks[bool((OPTIONS[row] or {}).get("calibrated"))]

    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}
    there = [row for row in chosen if task.tables or "tables" not in (OPTIONS[row] or {})]
    missing = [row for row in there if again or not is_finished(kept.get(row), row, mark(row))]
    if not missing:
        return
    machine = harness.machine(THREADS)
    machine["versions"]["kbitc"] = kbitc.__version__  # a checkout need not be installed
    reference = task.rows(stream_onnx(task.model, task.batches, THREADS))
    with tempfile.TemporaryDirectory() as folder:
        for row in missing:
            made = make_row(task, row, reference, Path(folder), bundles=bundles)
            kept[row] = {
                **made,
                "fingerprint": mark(row),
                "commit": commit(),
                "date": time.strftime("%F", time.gmtime()),
            }
            print(f"{task.title}, {row}: {tables.summary(made, task.words)}", flush=True)
            content = {
                "task": task.title, "words": task.words, "better": task.better, "in_factors": task.in_factors,
                "samples": len(reference), "machine": machine,
                "rows": {row: kept[row] for row in OPTIONS if row in kept},
            }  # fmt: skip
            tables.RESULTS.mkdir(exist_ok=True)
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Score tasks with real labels, before and after quantization.")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"default: all of {', '.join(TASKS)}")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN", help="rows whose name matches one")
    parser.add_argument("--again", action="store_true", help="make finished rows anew")
    parser.add_argument("--onnxruntime", action="store_true", help="run the quantized ONNX files, build no bundles")
    parser.add_argument("--table", action="store_true", help="only write the tables into README.md")
    options = parser.parse_args()
    for name in options.tasks:
        if name not in TASKS:
            parser.error(f"no task is called {name!r}; there are: {', '.join(TASKS)}")
    chosen = [row for row in OPTIONS if any(fnmatchcase(row, pattern) for pattern in options.rows)]
    if not chosen:
        parser.error(f"no row matches; there are: {', '.join(OPTIONS)}")
    if not options.table:
        for name in options.tasks or TASKS:
            score_task(name, chosen, options.again, not options.onnxruntime)
    tables.update_readme()


if __name__ == "__main__":
    main()
