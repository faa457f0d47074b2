"""The sentences at the top of the page: what the numbers say, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CLOSE_DB, FAIR_DB = 30.0, 20.0
#: Weights that together make this share of the noise are named.
MOST = 0.7
#: A suggestion has to win more than this to be one.
WORTH_DB = 0.3
NEAREST = "rtn"
SCORE = "A signal-to-noise ratio is not a score: measure yours with --max-drop before you rely on it."


def limits(data: Mapping[str, Any]) -> str:
    """What the page does not say."""
    solver = data["model"]["solver"]
    rounding = "Weights are rounded to nearest here: with calibration data gptq loses less (--solver gptq shows it). "
    if solver != NEAREST:
        rounding = f"Weights are rounded by {solver} here, but for each width of a weight alone, which is to nearest. "
    return rounding + SCORE


def headline(data: Mapping[str, Any]) -> str:
    """One line about the analysed plan."""
    found = data["noise"]["together_db"]
    amplitude = 100 * 10 ** (-found / 20)
    words = {"good": "stays close to the float model", "fair": "departs a little", "bad": "departs visibly"}
    name = data["model"]["name"].removesuffix(".onnx")
    return f"At {data['model']['scheme']}, {name} {words[grade(found)]}: its outputs are off by {amplitude:.2g} %."


def grade(sqnr_db: float) -> str:
    """good, fair or bad."""
    return "good" if sqnr_db >= CLOSE_DB else ("fair" if sqnr_db >= FAIR_DB else "bad")


def findings(data: Mapping[str, Any]) -> list[str]:
    """What is worth knowing, most useful first."""
    sentences = [_where(data["layers"]), _source(data["noise"]), _mixed(data), _departs(data["matching"])]
    return [sentence for sentence in sentences if sentence]


def leading(layers: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], float]:
    """The fewest weights that together make `MOST` of the noise, and the share that they make."""
    total = sum(layer["noise"] for layer in layers)
    chosen: list[Mapping[str, Any]] = []
    reached = 0.0
    for layer in sorted(layers, key=lambda item: -item["noise"]):
        if total == 0 or reached >= MOST * total:
            break
        chosen.append(layer)
        reached += layer["noise"]
    return chosen, reached / total if total else 0.0


def _where(layers: Sequence[Mapping[str, Any]]) -> str:
    chosen, share = leading(layers)
    if not chosen:
        return "No weight makes noise that reaches the outputs."
    best = max(layers, key=lambda item: item["exclusion_db"])
    weights = sum(layer["weights"] for layer in layers)
    text = f"{len(chosen)} of {len(layers)} weights make {share:.0%} of the noise."
    if best["exclusion_db"] > WORTH_DB:
        size = best["weights"] / weights
        text += f" Keeping {best['tensor']} float ({size:.1%} of all) wins {best['exclusion_db']:.1f} dB."
    return text


def _source(noise: Mapping[str, float]) -> str:
    weights, activations = noise["weights_db"], noise["activations_db"]
    if activations >= 190:
        return ""
    if abs(weights - activations) < 3:
        return f"Weights ({weights:.1f} dB) and int8 activations ({activations:.1f} dB) cost about the same."
    if weights < activations:
        return f"Weights are what costs: {weights:.1f} dB; rounding activations alone leaves {activations:.1f} dB."
    return f"Activations are what costs: {activations:.1f} dB; rounding weights alone leaves {weights:.1f} dB."


def _mixed(data: Mapping[str, Any]) -> str:
    gain = data["suggested"]["sqnr_db"] - data["noise"]["together_db"]
    bits = data["suggested"]["bits_per_weight"]
    if gain <= WORTH_DB:
        return f"Mixing widths at the same size ({bits:.2f} bits a weight) wins nothing here ({gain:+.1f} dB measured)."
    return f"Mixing widths at the same size ({bits:.2f} bits a weight) wins {gain:.1f} dB, measured."


def _departs(matching: Mapping[str, Any]) -> str:
    first, limit = matching["first"], matching["departs_db"]
    if first is None:
        return f"No value along the graph falls below {limit:g} dB."
    return f"The first value below {limit:g} dB is that of {first['node'] or first['value']} ({first['op_type']})."


def times_smaller(data: Mapping[str, Any]) -> float:
    """Size of the float weights over that of the analysed plan."""
    return float(data["model"]["float_bytes"] / max(1, data["suggested"]["bytes"]))
