"""Plots as inline SVG. Colours come from the style sheet's variables, so that they follow the light and dark themes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

GRID_LINES = 5
#: Levels of a grid that are still drawn one by one.
MOST_LEVELS = 33


def ticks(low: float, high: float, wanted: int = GRID_LINES) -> list[float]:
    """Round numbers that cover low..high: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    raw = span / max(1, wanted)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * index for index in range(first, math.floor(high / step + 1e-9) + 1)]


class Frame:
    """A plot area with axes: maps values to pixels.

    Args:
        width, height: of the whole picture in pixels.
        x, y: (low, high) of the values.
        left, bottom: room for the labels of the axes, in pixels.
    """

    def __init__(
        self,
        width: int,
        height: int,
        x: tuple[float, float],
        y: tuple[float, float],
        left: int = 44,
        bottom: int = 34,
    ) -> None:
        self.width, self.height = width, height
        self._x, self._y = _open(x), _open(y)
        self._left, self._bottom, self._top, self._right = left, bottom, 12, 14
        self.parts: list[str] = []

    def px(self, value: float) -> float:
        """Pixels from the left of a value of the x axis."""
        share = (value - self._x[0]) / (self._x[1] - self._x[0])
        return self._left + share * (self.width - self._left - self._right)

    def py(self, value: float) -> float:
        """Pixels from the top of a value of the y axis."""
        share = (value - self._y[0]) / (self._y[1] - self._y[0])
        return self.height - self._bottom - share * (self.height - self._bottom - self._top)

    def axes(self, x_label: str, y_label: str, x_ticks: Sequence[float] | None = None) -> None:
        """Grid lines, numbers and the names of both axes."""
        end = self.width - self._right
        for value in ticks(*self._y):
            y = self.py(value)
            self.parts.append(f'<line class="grid" x1="{self._left}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
            self._text("tick", self._left - 7, y + 4, f"{value:g}", "end")
        for value in ticks(*self._x, 7) if x_ticks is None else x_ticks:
            x, y = self.px(value), self.height - self._bottom + 16
            self._text("tick", x, y, f"{value:g}", "middle")
        self._text("axis", (self._left + end) / 2, self.height - 3, x_label, "middle")
        self._text("axis", 2, 10, y_label, "start")

    def line(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """A line through the points."""
        path = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)
        self.parts.append(f'<polyline class="{style}" points="{path}"/>')

    def area(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """The area between the points and the lower end of the y axis."""
        if points:
            base = self.py(self._y[0])
            path = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)
            first, last = self.px(points[0][0]), self.px(points[-1][0])
            self.parts.append(
                f'<polygon class="{style}" points="{first:.1f},{base:.1f} {path} {last:.1f},{base:.1f}"/>'
            )

    def dot(self, x: float, y: float, style: str, title: str, radius: float = 4) -> None:
        """A dot with a text that appears under the pointer."""
        self.parts.append(
            f'<circle class="{style}" cx="{self.px(x):.1f}" cy="{self.py(y):.1f}" r="{radius:g}">'
            f"<title>{escape(title)}</title></circle>"
        )

    def label(self, x: float, y: float, text: str, style: str = "note", dx: float = 8, dy: float = -8) -> None:
        """A word beside a point; on its left where there is no room on its right."""
        place = self.px(x) + dx
        anchor = "start"
        if place + 7 * len(text) > self.width:
            place, anchor = self.px(x) - dx, "end"
        self._text(style, place, self.py(y) + dy, text, anchor)

    def _text(self, style: str, x: float, y: float, text: str, anchor: str) -> None:
        self.parts.append(f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def rule(self, y: float, style: str = "rule") -> None:
        """A horizontal line across the plot."""
        at, end = self.py(y), self.width - self._right
        self.parts.append(f'<line class="{style}" x1="{self._left}" x2="{end}" y1="{at:.1f}" y2="{at:.1f}"/>')

    def svg(self, title: str) -> str:
        """The picture."""
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(title, quote=True)}">'
            + "".join(self.parts)
            + "</svg>"
        )


def _open(span: tuple[float, float]) -> tuple[float, float]:
    low, high = span
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def histogram(
    counts: Sequence[int], low: float, high: float, levels: Sequence[float] = (), size: tuple[int, int] = (430, 150)
) -> str:
    """Counts as an area, on the scale of their square root so that tails show; with the levels of a grid as marks."""
    heights = [math.sqrt(count) for count in counts]
    top = max(heights, default=0.0) or 1.0
    frame = Frame(*size, (low, high), (0.0, top * 1.05), left=8, bottom=20)
    width = (high - low) / max(1, len(counts))
    points = [(low + (index + side) * width, height) for index, height in enumerate(heights) for side in (0.0, 1.0)]
    frame.area(points, "hist")
    bottom, over = frame.py(0.0), frame.py(top * 1.05)
    for level in levels if len(levels) <= MOST_LEVELS else levels[:: -(-len(levels) // MOST_LEVELS)]:
        x = frame.px(level)
        frame.parts.append(f'<line class="level" x1="{x:.1f}" x2="{x:.1f}" y1="{over:.1f}" y2="{bottom + 4:.1f}"/>')
    for value in ticks(low, high, 8):
        frame.parts.append(
            f'<text class="tick" x="{frame.px(value):.1f}" y="{size[1] - 4}" text-anchor="middle">{value:g}</text>'
        )
    return frame.svg("histogram")


def spark(counts: Sequence[int], width: int = 72, height: int = 20) -> str:
    """A histogram without axes, for a cell of a table."""
    heights = [math.sqrt(count) for count in counts]
    top = max(heights, default=0.0) or 1.0
    step = width / max(1, len(heights))
    path = " ".join(f"{index * step:.1f},{height - height * value / top:.1f}" for index, value in enumerate(heights))
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f'<polygon class="hist" points="0,{height} {path} {width},{height}"/></svg>'
    )
