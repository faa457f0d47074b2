"""The analysis as one HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from kbitc.page import charts, verdict

BARS = 12
Data = Mapping[str, Any]

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header class="top"><span><b>kbitc analyze</b> &nbsp; {title}</span><button id="theme">light / dark</button></header>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


def render(data: Data) -> str:
    """The page; `data` is what `kbitc.commands.analyze.analyze_model` gives."""
    body = "\n".join([_top(data), _plots(data), _table(data), _plan(data), _footer(data)])
    folder = files("kbitc.page")
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    return PAGE.format(title=escape(data["model"]["name"]), style=style, script=script, body=body)


def _top(data: Data) -> str:
    first, *others = verdict.findings(data)
    lines = [f"<h1>{escape(verdict.headline(data))}</h1>", f'<p class="lead">{escape(first)}</p>']
    lines += [f"<p>{escape(sentence)}</p>" for sentence in others]
    if data["made_up"]:
        lines.append(
            '<p class="warn">The inputs were made up: give <code>--calibration DATA</code> for numbers that mean '
            "something for your data.</p>"
        )
    found, suggested = data["noise"]["together_db"], data["suggested"]
    agreement = min(
        (item["top1_agreement"] for item in data["accuracy"].values() if item["top1_agreement"] is not None),
        default=None,
    )
    tiles = [
        _tile("Signal to noise, worst output", f"{found:.1f}", "dB", "of the plan that was analysed",
              verdict.grade(found)),
        _tile("Bits a weight", f"{suggested['bits_per_weight']:.2f}", "",
              f"{_bytes(suggested['bytes'])}, float {_bytes(data['model']['float_bytes'])}: "
              f"{verdict.times_smaller(data):.1f} times as large"),
        _tile("Same best answer", "-" if agreement is None else f"{100 * agreement:.1f}",
              "" if agreement is None else "%", "largest element of a row unchanged"),
        _tile("Mixed at this size", f"{suggested['sqnr_db']:.1f}", "dB",
              f"{suggested['sqnr_db'] - found:+.1f} dB, measured; the plan is below",
              verdict.grade(suggested["sqnr_db"])),
    ]  # fmt: skip
    return "\n".join(
        [*lines, f'<div class="tiles">{"".join(tiles)}</div>', f'<p class="soft">{verdict.limits(data)}</p>']
    )


def _tile(name: str, value: str, unit: str, more: str, style: str = "") -> str:
    return (
        f'<div class="tile"><div class="name">{escape(name)}</div><div class="value {style}">{escape(value)}'
        f'<span class="unit">{escape(unit)}</span></div><div class="more">{escape(more)}</div></div>'
    )


def _plots(data: Data) -> str:
    return (
        "<h2>Which bits to buy</h2><p>Every layer at one width, and the mixed plan. More is better; 6 dB halve the "
        f'error.</p><div class="row">{_widths(data)}{_shares(data["layers"])}</div>'
        "<h2>Where it departs</h2><p>Each value of the graph in the quantized model against the float model, in "
        f'order. Errors of earlier layers are in later ones.</p><div class="row">{_matching(data["matching"])}</div>'
    )


def _widths(data: Data) -> str:
    rows, mixed = data["widths"], data["suggested"]
    points = [(row["bits_per_weight"], row["sqnr_db"]) for row in rows]
    every = [*points, (mixed["bits_per_weight"], mixed["sqnr_db"])]
    low, high = min(y for _, y in every), max(y for _, y in every)
    frame = charts.Frame(
        520, 300, (min(x for x, _ in every) - 0.4, max(x for x, _ in every) + 0.6), (min(0, low), high + 4)
    )
    frame.axes("bits a weight, scales counted", "SQNR in dB, worst output")
    frame.line(points, "curve")
    for row, (x, y) in zip(rows, points, strict=True):
        frame.dot(x, y, "point", f"{row['bits']} bits: {y:.1f} dB, {_bytes(row['bytes'])}")
        frame.label(x, y, str(row["bits"]), dx=-3, dy=-9)
    frame.dot(*every[-1], "best", f"mixed: {mixed['sqnr_db']:.1f} dB", 5)
    frame.label(*every[-1], "mixed", "mark", dx=9, dy=4 if mixed["sqnr_db"] > _at(points, every[-1][0]) else 14)
    return _figure("Size against accuracy", "numbers are bits of a code", frame.svg("SQNR over bits a weight"))


def _at(points: Sequence[tuple[float, float]], x: float) -> float:
    return min(points, key=lambda point: abs(point[0] - x))[1]


def _shares(layers: Sequence[Data]) -> str:
    total = sum(layer["noise"] for layer in layers) or 1.0
    ranked = sorted(layers, key=lambda item: -item["noise"])[:BARS]
    top = ranked[0]["noise"] / total if ranked else 1.0
    rows = []
    for layer in ranked:
        share = layer["noise"] / total
        rows.append(
            f'<div class="name" title="{escape(layer["tensor"])}"><bdi>{escape(layer["tensor"])}</bdi></div>'
            f'<div class="track"><div class="bar" style="width:{100 * share / top if top else 0:.1f}%"></div></div>'
            f"<div>{share:.1%}</div>"
        )
    text = "share of the noise at the outputs, each weight alone at the width of the plan"
    return _figure("Weights that cost most", text, f'<div class="bars">{"".join(rows)}</div>')


def _matching(matching: Data) -> str:
    values = matching["values"]
    if not values:
        return _figure("Along the graph", "no value can be compared", "")
    heights = [min(item["sqnr_db"], 100.0) for item in values]
    frame = charts.Frame(1060, 300, (0, max(1, len(values) - 1)), (min(0.0, *heights), max(heights) + 5))
    frame.axes("values in graph order", "SQNR in dB")
    points = list(enumerate(heights))
    frame.area(points, "under")
    frame.line(points, "curve")
    frame.rule(matching["departs_db"])
    for index, item in enumerate(values):
        name = f"{item['node'] or item['value']} ({item['op_type']})"
        title = f"{name}: {item['sqnr_db']:.1f} dB, cosine {item['cosine']:.5f}"
        frame.dot(index, heights[index], "point", title, 3)
    first = matching["first"]
    if first is not None:
        place = next(index for index, item in enumerate(values) if item["value"] == first["value"])
        frame.dot(place, heights[place], "best", "first departure", 5)
        frame.label(place, heights[place], f"departs: {first['node'] or first['value']}", "mark", dx=9, dy=18)
    text = f"point at a dot for its name; the broken line is {matching['departs_db']:g} dB"
    return _figure("Along the graph", text, frame.svg("SQNR along the graph"))


def _figure(title: str, caption: str, content: str) -> str:
    return f"<figure><b>{escape(title)}</b><figcaption>{escape(caption)}</figcaption>{content}</figure>"


HEADS = (
    ("Weight", "text"), ("Shape", ""), ("Plan", "text"), ("Own SQNR<br>measured", ""), ("step&sup2;/12", ""),
    ("Alone, at<br>outputs dB", ""), ("Share of<br>noise", ""), ("Left float<br>wins dB", ""), ("Suggested", "text"),
    ("Histogram", "text"),
)  # fmt: skip


def _table(data: Data) -> str:
    heads = "".join(f'<th scope="col" class="{style}">{name}</th>' for name, style in HEADS)
    suggested = {entry["tensor"]: entry["scheme"] for entry in data["suggested"]["plan"]["tensors"]}
    total = sum(layer["noise"] for layer in data["layers"]) or 1.0
    rows = "".join(_layer(layer, suggested.get(layer["tensor"]), total) for layer in data["layers"])
    left = "".join(
        f"<li><code>{escape(item['tensor'])}</code> ({escape(item['op_type'])}): {escape(item['reason'])}</li>"
        for item in data["left_float"]
    )
    return (
        "<h2>Layer by layer</h2><p>A click on a head sorts, a click on a row opens its histograms. Where leaving a "
        "weight float loses, its error cancels with others.</p>"
        '<div class="controls"><input id="filter" type="search" placeholder="filter by name or operator"></div>'
        f'<div class="scroll"><table id="layers"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        + (f"<h2>Left float</h2><ul>{left}</ul>" if left else "")
    )


def _layer(layer: Data, suggested: str | None, total: float) -> str:
    bits = layer["scheme"].split(":")[0].lstrip("abcdefghijklmnopqrstuvwxyz_-")
    alone = layer["alone_db"].get(bits, 0.0)
    name = escape(layer["tensor"])
    changed = suggested != layer["scheme"]
    cells = [
        f'<td class="tensor" title="{name}">{name}<span>{escape(layer["op_type"])}</span></td>',
        _cell("&times;".join(map(str, layer["shape"])), layer["weights"]),
        f'<td class="text">{escape(layer["scheme"])}</td>',
        _cell(f"{layer['weight_db']:.1f}", layer["weight_db"]),
        _cell(f"{layer['theory_db']:.1f}", layer["theory_db"]),
        _cell(f"{alone:.1f}", alone, verdict.grade(alone)),
        _cell(f"{layer['noise'] / total:.1%}", layer["noise"]),
        _cell(f"{layer['exclusion_db']:+.2f}", layer["exclusion_db"]),
        f'<td class="text{" good" if changed else ""}">{escape(suggested or "float32")}</td>',
        f'<td class="text">{charts.spark(layer["histogram"]["counts"])}</td>',
    ]
    found = escape(f"{layer['tensor']} {layer['op_type']}".lower(), quote=True)
    return (
        f'<tr class="layer" tabindex="0" aria-expanded="false" data-name="{found}">{"".join(cells)}</tr>'
        f'<tr class="detail" hidden><td colspan="{len(HEADS)}">{_detail(layer)}</td></tr>'
    )


def _cell(text: str, value: float, style: str = "") -> str:
    return f'<td class="{style}" data-v="{value:.6g}">{text}</td>'


def _detail(layer: Data) -> str:
    weights, seen = layer["histogram"], layer["activation_histogram"]
    own = charts.histogram(weights["counts"], weights["low"], weights["high"], weights["levels"])
    figures = [
        _figure("Weights and the grid", "weights over their scale, square root of the count; marks are levels", own)
    ]
    if seen is not None:
        plain = layer["activation_is_float"]
        levels = () if plain else list(range(-127, 128))
        text = (
            "as it is: it stays float" if plain else "over its step, block by block; marks are every eighth int8 level"
        )
        drawn = charts.histogram(seen["counts"], seen["low"], seen["high"], levels)
        figures.append(_figure("Activation that it meets", text, drawn))
    points = [(int(bits), value) for bits, value in layer["alone_db"].items()]
    ends = [value for _, value in points]
    frame = charts.Frame(430, 170, (min(x for x, _ in points), max(x for x, _ in points)),
                         (min(0.0, *ends), min(max(ends), 120.0) + 5))  # fmt: skip
    frame.axes("bits", "dB at the outputs", [x for x, _ in points])
    frame.line([(x, min(y, 120.0)) for x, y in points], "curve")
    for x, y in points:
        frame.dot(x, min(y, 120.0), "point", f"{x} bits: {y:.1f} dB", 3)
    figures.append(_figure("This weight alone", "all others float", frame.svg("SQNR over bits")))
    gap = layer["weight_db"] - layer["theory_db"]
    reason = layer["reason"][:1].upper() + layer["reason"][1:]
    users = ", ".join(f"<code>{escape(node)}</code>" for node in layer["nodes"])
    words = (
        f"{layer['weights']:,} weights at {layer['bits_per_weight']:.2f} bits; the largest is "
        f"{layer['peak_to_rms']:.1f} times their rms. The error is {abs(gap):.1f} dB "
        f"{'below' if gap > 0 else 'above'} step&sup2;/12. {escape(reason)}. Used by {users}."
    )
    return f'<p class="soft">{words}</p><div class="row">{"".join(figures)}</div>'


def _plan(data: Data) -> str:
    suggested = data["suggested"]
    text = escape(json.dumps(suggested["plan"], indent=1))
    predicted = suggested["predicted_db"]
    said = "" if predicted is None else f" (weights alone were predicted to give {predicted:.1f} dB)"
    return (
        "<h2>Suggested plan</h2>"
        f"<p>{suggested['bits_per_weight']:.2f} bits a weight, {suggested['sqnr_db']:.1f} dB measured{said}. Save it, "
        f"edit it if you like, and give it back: <code>kbitc compile {escape(data['model']['name'])} -o model.kbit "
        f'--plan plan.json</code></p><div class="controls"><button id="save" class="main">Save plan.json</button></div>'
        f'<pre id="plan">{text}</pre>'
    )


def _footer(data: Data) -> str:
    model = data["model"]
    facts = f"{data['data']}; target {model['target']}; {model['weights']:,} weights in {model['layers']} layers"
    return (
        f"<footer>{escape(facts)}; model sha256 {escape((model['sha256'] or '')[:16])}. "
        "Layers alone and left out are measured with float activations.</footer>"
    )


def _bytes(count: float) -> str:
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f} B"
