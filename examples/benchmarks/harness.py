"""How speed is measured here: interleaved rounds in one process, medians, ratios within a round.

Milliseconds differ from machine to machine and from minute to minute; the ratio of two engines that take turns differs
much less. So every benchmark script gives this module all its contestants at once:

    timing = interleave({"kbitc": run_kbitc, "onnxruntime": run_onnxruntime}, rounds=30)
    print_table("GEMV 4096x4096", timing, against="onnxruntime")
    save("gemv", [timing.as_json("GEMV 4096x4096", against="onnxruntime")], threads=1)

`python examples/benchmarks/harness.py` writes all results as tables into results/README.md, and the best of each case
into the project's README.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

RESULTS = Path(__file__).with_name("results")
README = Path(__file__).resolve().parents[2] / "README.md"
TABLES = "README.md"
OURS = "kbitc"
README_BEGIN, README_END = "<!-- results: begin -->\n", "<!-- results: end -->\n"
PACKAGES = ("kbitc", "apache-tvm", "apache-tvm-ffi", "onnxruntime", "numpy", "openvino", "llama-cpp-python")
# Of the many CPU flags, those that decide which kernels run.
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512vbmi", "avx_vnni", "amx_int8", "asimddp", "i8mm")
MINIMUM_SAMPLE = 2e-3  # seconds; a faster callable is repeated until one sample takes this long
ESTIMATES = 3  # calls timed one by one to see how long a call takes


@dataclass(frozen=True)
class Timing:
    """Seconds a call of each contestant, one value a round: seconds[name][round]."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """Median over the rounds, in seconds a call."""
        return median(self.seconds[name])

    def speed(self, name: str, against: str) -> float:
        """How many times as fast as `against`: the median over the rounds of the ratio within the round."""
        return median(b / a for a, b in zip(self.seconds[name], self.seconds[against], strict=True))

    def as_json(self, case: str, against: str, **facts: Any) -> dict[str, Any]:
        """One row of a results file: milliseconds and speed by contestant, beside whatever facts the caller adds."""
        return {
            "case": case,
            **facts,
            "rounds": len(self.seconds[against]),
            "against": against,
            "milliseconds": {name: round(1e3 * self.median(name), 5) for name in self.seconds},
            "speed": {name: round(self.speed(name, against), 3) for name in self.seconds},
        }


def interleave(
    contestants: Mapping[str, Callable[[], Any]],
    rounds: int = 30,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time the contestants in turns; each round starts with another one, so that none always follows the same.

    contestants: functions without arguments; what they return is thrown away. Each is called at least warmup + 3
    times before the first round, and so often a sample that a sample takes at least 2 ms.
    clock: gives seconds. `time.thread_time` leaves out what other processes take of a busy machine; only for
    contestants that do all their work in the thread that calls them.
    """
    names = list(contestants)
    repeats = {name: _repeats(contestants[name], warmup, clock) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(_sample(contestants[name], repeats[name], clock))
    return Timing(seconds)


def _sample(function: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        function()
    return (clock() - start) / repeats


def _repeats(function: Callable[[], Any], warmup: int, clock: Callable[[], float]) -> int:
    for _ in range(warmup):
        function()
    shortest = min(_sample(function, 1, clock) for _ in range(ESTIMATES))
    return max(1, round(MINIMUM_SAMPLE / max(shortest, 1e-9)))


def pin(threads: int = 1) -> None:
    """Keep this process on its first `threads` CPUs, where the system can do it. Call it before engines start."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def machine(threads: int) -> dict[str, Any]:
    """What the numbers belong to: CPU, its flags that matter, library versions, threads."""
    text = ""
    if Path("/proc/cpuinfo").is_file():
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    present = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "cpu_family_model": "/".join(fields.get(key, "?") for key in ("vendor_id", "cpu family", "model")),
        "flags": [flag for flag in FLAGS if flag in present],
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def save(
    name: str, rows: Sequence[Mapping[str, Any]], threads: int, folder: Path = RESULTS, **facts: Mapping[str, Any]
) -> Path:
    """Write results/NAME.json: date (UTC), machine, whatever facts the caller adds, rows. Returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(threads),
        **facts,
        "rows": list(rows),
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def print_table(title: str, timing: Timing, against: str) -> None:
    """One table on standard output: contestant, milliseconds, speed against `against`."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("engine")
    table.add_column("ms", justify="right")
    table.add_column(f"speed ({against} = 1)", justify="right")
    for name in timing.seconds:
        table.add_row(name, f"{1e3 * timing.median(name):.3f}", f"{timing.speed(name, against):.2f}")
    Console().print(table)


def models() -> ModuleType:
    """The module examples/fetch.py: `models().fetch("ocr")` is the folder of a model."""
    if "fetch" in sys.modules:
        return sys.modules["fetch"]
    spec = importlib.util.spec_from_file_location("fetch", Path(__file__).parent.parent / "fetch.py")
    if spec is None or spec.loader is None:
        raise ImportError("examples/fetch.py is missing")
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def markdown(folder: Path = RESULTS) -> str:
    """Every row of every results file as Markdown tables, one a file, with the machine and the date above it."""
    texts = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        where = content["machine"]
        flags = ", ".join(where["flags"])
        versions = f"onnxruntime {where['versions']['onnxruntime']}"
        head = f"`{path.stem}`, {content['date']}, {where['cpu']} ({flags}), {where['threads']} thread(s), {versions}:"
        lines = ["| case | engine | ms | speed | result |", "|---|---|---:|---:|---|"]
        lines += [line for row in content["rows"] for line in _markdown_rows(row)]
        texts.append("\n".join([head, "", *lines]) + "\n")
    return "\n".join(texts)


def best_of_each(folder: Path = RESULTS) -> str:
    """Of every case with several engines the fastest of kbitc and the fastest other, as one Markdown table."""
    lines = ["| results | case | fastest of kbitc | speed | fastest other | speed |", "|---|---|---|---:|---|---:|"]
    for path in sorted(folder.glob("*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            speeds: dict[str, float] = row["speed"]
            sides = [[name for name in speeds if name.startswith(OURS) == ours] for ours in (True, False)]
            if all(sides):
                found = [max(side, key=speeds.__getitem__) for side in sides]
                cells = [path.stem, row["case"]]
                for name in found:
                    cells += [name.removeprefix(f"{OURS} "), f"{speeds[name]:.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _markdown_rows(row: Mapping[str, Any]) -> list[str]:
    def line(name: str, result: str) -> str:
        return f"| {row['case']} | {name} | {row['milliseconds'][name]:.3g} | {row['speed'][name]:.2f} | {result} |"

    return [
        line(name, row.get("float_value" if name == row["against"] else "value", "")) for name in row["milliseconds"]
    ]


def write_tables(folder: Path = RESULTS) -> None:
    """All results as tables beside them."""
    about = "Written by `harness.py` from the JSON files here; speed is the ratio to the first row of a case."
    (folder / TABLES).write_text(f"# Results\n\n{about}\n\n{markdown(folder)}", encoding="utf-8")


def update_readme(readme: Path = README, folder: Path = RESULTS) -> None:
    """Replace what stands between the two marks of the README by the best of each case."""
    text = readme.read_text(encoding="utf-8")
    head, _, rest = text.partition(README_BEGIN)
    _, _, tail = rest.partition(README_END)
    readme.write_text(head + README_BEGIN + "\n" + best_of_each(folder) + "\n" + README_END + tail, encoding="utf-8")


if __name__ == "__main__":
    write_tables()
    update_readme()
