"""`kbitc targets`: what this machine can compile for and run, what is missing and how to get it."""

from __future__ import annotations

from typing import Any

from kbitc.targets.target import all_targets, host_runs, host_target, requirements


def list_targets() -> dict[str, Any]:
    """One entry a target, the host's marked."""
    host = host_target().name
    rows = []
    for target in all_targets():
        missing = [item for item in requirements(target) if not item.present]
        rows.append(
            {
                "target": target.name,
                "host": target.name == host,
                "compiles": not any(item.purpose == "compile" for item in missing),
                "runs": host_runs(target),
                "missing": [{"what": item.what, "purpose": item.purpose, "install": item.install} for item in missing],
            }
        )
    return {"host": host, "targets": rows}
