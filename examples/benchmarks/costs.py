"""Measures the table of the cost model for the targets that this machine runs, and puts it into targets/costs.json.

    python examples/benchmarks/costs.py                    all targets that run here
    python examples/benchmarks/costs.py x86:avx2           one of them

Targets that are not measured keep what the file says of them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import harness

from kbitc.targets.costs import SHIPPED, as_row
from kbitc.targets.target import all_targets, host_runs, parse_target


def main(names: list[str]) -> None:
    """Measure, and write the file."""
    from kbitc.targets.measure_costs import measure

    targets = [parse_target(name) for name in names] or [
        target for target in all_targets() if target.kind in ("x86", "arm-neon") and host_runs(target) is None
    ]
    data = json.loads(SHIPPED.read_text(encoding="utf-8"))
    harness.pin()
    for target in targets:
        rows = [as_row(row) for row in measure(target, print)]
        data["targets"][target.name] = {"machine": harness.machine(1)["cpu"], "rows": rows}
    SHIPPED.write_text(text_of(data), encoding="utf-8")


def text_of(data: dict[str, Any]) -> str:
    """JSON with a row of a table on a line."""
    tables = []
    for name, table in data["targets"].items():
        rest = {key: value for key, value in table.items() if key != "rows"}
        rows = ",\n".join("   " + json.dumps(row) for row in table.get("rows", ()))
        held = json.dumps(rest)[:-1] + (f', "rows": [\n{rows}\n  ]' if rows else "") + "}"
        tables.append(f"  {json.dumps(name)}: {held}")
    return f'{{\n "version": {data["version"]},\n "targets": {{\n' + ",\n".join(tables) + "\n }\n}\n"


if __name__ == "__main__":
    main(sys.argv[1:])
