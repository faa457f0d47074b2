"""The results of score.py as Markdown: a summary of losses, a table a task, and the entity tagger's report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "results", HERE / "README.md"
BEGIN, END = "<!-- results begin -->", "<!-- results end -->"
ENTITY_ROWS = ("onnxruntime float", "W4", "W4 gptq", "W8A8 static")  # whose report by type is printed

LONGEST_REASON = 120  # characters

Row = Mapping[str, Any]


def summary(row: Row, words: str) -> str:
    """One line for the terminal."""
    if "score" not in row:
        return f"refused: {row['refused']}"
    low, high = row["interval"]
    return f"{words.format(row['score'])} [{low:.2f}, {high:.2f}], lost {row['lost']:.3f}"


def shortened(reason: str) -> str:
    """The beginning of a refusal, in a form that a table takes."""
    text = reason.replace("|", "/")
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + " …"


def numbers(value: float, interval: tuple[float, float]) -> str:
    """A number with its 95 % interval."""
    low, high = interval
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def task_table(content: Mapping[str, Any]) -> list[str]:
    """Score, loss and size of every row of one task."""
    rows: Mapping[str, Row] = content["rows"]
    unit = content["words"].replace("{:.1f}", "…").replace("{:.2f}", "…")
    lost = "times float" if content["in_factors"] else "points lost"
    lines = [
        f"### {content['task']}",
        "",
        f"{content['samples']} samples; {content['better']} is better.",
        "",
        f"| configuration | {unit} | {lost} | bits/weight | MB | notes |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name, row in rows.items():
        refusal = f"not compiled: {shortened(row['refused'])}" if "refused" in row else ""
        if "score" not in row:
            lines.append(f"| {name} | | | | | {refusal} |")
            continue
        bits = f"{row['bits_per_weight']:.2f}" if "bits_per_weight" in row else "32"
        size = row.get("weight_bytes", row.get("model_bytes"))
        notes = [f"{key} {value:.2f}" for key, value in row["details"].items() if isinstance(value, float)]
        notes += [f"in onnxruntime; {refusal}"] if refusal else []
        megabytes = f"{size / 1e6:.2f}" if size else ""
        score, loss = numbers(row["score"], row["interval"]), numbers(row["lost"], row["lost_interval"])
        lines.append(f"| {name} | {score} | {loss} | {bits} | {megabytes} | {', '.join(notes)} |")
    return [*lines, ""]


def entity_report(rows: Mapping[str, Row]) -> list[str]:
    """Precision, recall and F1 in percent by type of entity, a group of columns a row of results."""
    shown = [name for name in ENTITY_ROWS if "entities" in rows.get(name, {}).get("details", {})]
    if not shown:
        return []
    reports = [rows[name]["details"]["entities"] for name in shown]
    head = " | ".join(f"{name} P | R | F1" for name in shown)
    lines = ["Precision, recall and F1 in percent by type of entity:", "", f"| entity | labelled | {head} |"]
    lines.append("|---|---:|" + "---:|" * (3 * len(shown)))
    for kind in reports[0]:
        cells = [f"{100 * report[kind][part]:.1f}" for report in reports for part in ("precision", "recall", "f1")]
        lines.append(f"| {kind} | {reports[0][kind]['support']} | {' | '.join(cells)} |")
    return [*lines, ""]


def summary_table(contents: list[Mapping[str, Any]]) -> list[str]:
    """What every configuration loses on every task; empty where it was refused or not run."""
    names = list(dict.fromkeys(name for content in contents for name in content["rows"]))
    heads = [content["task"] + (", times float" if content["in_factors"] else "") for content in contents]
    lines = ["| lost against float | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(contents)]
    for name in names[1:]:
        cells = []
        for content in contents:
            row = content["rows"].get(name, {})
            form = "{:.3f}" if content["in_factors"] else "{:+.2f}"
            cells.append(form.format(row["lost"]) if "lost" in row else "refused" if row else "")
        if any(cell not in ("", "refused") for cell in cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def markdown(folder: Path = RESULTS) -> str:
    """All results of score.py in one text; files of other scripts in the folder are left alone."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    contents = [content for content in contents if "task" in content]
    if not contents:
        return ""
    where = contents[0]["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [f"{where['cpu']} ({', '.join(where['flags'])}), Python {where['python']}, {versions}.", ""]
    lines += summary_table(contents)
    for content in contents:
        lines += task_table(content)
        lines += entity_report(content["rows"])
    return "\n".join(lines)


def update_readme(readme: Path = README, folder: Path = RESULTS) -> None:
    """Replace what stands between the two marks of the README by the tables."""
    head, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(f"{head}{BEGIN}\n{markdown(folder)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
