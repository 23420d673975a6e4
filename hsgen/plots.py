"""Curves and points on logarithmic axes as SVG.  Knows nothing of what is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hsgen import svg

WIDE, HIGH = 320.0, 260.0
LEFT, MARGIN, BETWEEN = 52.0, 20.0, 84.0
COLOURS = (
    ("#0969da", "#58a6ff"),
    ("#bc4c00", "#f0883e"),
    ("#1a7f37", "#3fb950"),
    ("#8250df", "#bc8cff"),
    ("#bf3989", "#f778ba"),
    ("#6e7781", "#9198a1"),
)  # in light, in dark


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A named line through points."""

    name: str
    points: tuple[tuple[float, float], ...]
    dashed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A point; `size` is its radius in pixels beyond the smallest."""

    x: float
    y: float
    size: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Lines, and marks by name, on axes of its own; all numbers above 0."""

    title: str
    lines: tuple[Line, ...]
    marks: Mapping[str, Sequence[Mark]]


@dataclass(frozen=True, slots=True)
class _Axis:
    """Powers of a base from the first at or below the least to the last at or above the most."""

    base: float
    first: int
    last: int
    length: float

    @classmethod
    def over(cls, values: Sequence[float], base: float, length: float) -> _Axis:
        first = math.floor(math.log(min(values), base) + 1e-9)
        last = math.ceil(math.log(max(values), base) - 1e-9)
        return cls(base, first, max(last, first + 1), length)

    def place(self, value: float) -> float:
        return self.length * (math.log(value, self.base) - self.first) / (self.last - self.first)

    def ticks(self, most: int) -> list[float]:
        step = max(1, math.ceil((self.last - self.first) / most))
        return [self.base**power for power in range(self.first, self.last + 1, step)]


def draw(title: str, about: Sequence[str], axes: tuple[str, str], panels: Sequence[Panel]) -> str:
    """Panels side by side, each over its own legend."""
    lines = [svg.text(MARGIN, MARGIN + svg.SIZE, title, "bold")]
    lines += [
        svg.text(MARGIN, MARGIN + svg.SIZE + (i + 1) * svg.LINE, words, "dim")
        for i, words in enumerate(about)
    ]
    top = MARGIN + (len(about) + 3) * svg.LINE
    for i, panel in enumerate(panels):
        x = svg.number(MARGIN + LEFT + i * (WIDE + BETWEEN))
        body = "\n".join(_panel(panel, axes))
        lines.append(f'<g transform="translate({x} {svg.number(top)})">\n{body}\n</g>')
    names = max((len(_names(panel)) for panel in panels), default=0)
    high = top + HIGH + (names + 3) * svg.LINE + MARGIN
    panels_wide = MARGIN + LEFT + len(panels) * (WIDE + BETWEEN)
    wide = max(panels_wide, *(2 * MARGIN + svg.width(words) for words in (title, *about)))
    return svg.document(wide, high, title, lines, *_style())


def _panel(panel: Panel, axes: tuple[str, str]) -> list[str]:
    points = [point for line in panel.lines for point in line.points]
    points += [(mark.x, mark.y) for marks in panel.marks.values() for mark in marks]
    across = _Axis.over([x for x, _ in points], 2, WIDE)
    up = _Axis.over([y for _, y in points], 10, HIGH)
    elements = [svg.text(0, -svg.LINE / 2, panel.title, "bold")]
    for value in across.ticks(7):
        x = across.place(value)
        elements.append(svg.path(f"M{svg.number(x)} 0v{svg.number(HIGH)}", "axis"))
        elements.append(svg.text(x, HIGH + svg.LINE, _short(value), "dim", "middle"))
    for value in up.ticks(8):
        y = HIGH - up.place(value)
        elements.append(svg.path(f"M0 {svg.number(y)}h{svg.number(WIDE)}", "axis"))
        elements.append(svg.text(-8, y + 4, f"{value:g}", "dim", "end"))
    elements.append(svg.text(WIDE / 2, HIGH + 2 * svg.LINE, axes[0], "dim", "middle"))
    elements.append(svg.text(WIDE, -svg.LINE / 2, axes[1], "dim", "end"))
    looks = {name: i % len(COLOURS) for i, name in enumerate(_names(panel))}
    for line in panel.lines:
        places = [
            f"{svg.number(across.place(x))} {svg.number(HIGH - up.place(y))}"
            for x, y in line.points
        ]
        dash = " dashed" if line.dashed else ""
        elements.append(svg.path("M" + "L".join(places), f"curve c{looks[line.name]}{dash}"))
    dots = {
        line.name: [Mark(x=x, y=y) for x, y in line.points]
        for line in panel.lines
        if not line.dashed
    }
    for name, marks in (dots | dict(panel.marks)).items():
        for mark in marks:
            x, y = svg.number(across.place(mark.x)), svg.number(HIGH - up.place(mark.y))
            radius = svg.number(2.5 + mark.size)
            elements.append(f'<circle cx="{x}" cy="{y}" r="{radius}" class="d{looks[name]}"/>')
    return elements + _legend(panel, looks)


def _names(panel: Panel) -> list[str]:
    return list(dict.fromkeys([*(line.name for line in panel.lines), *panel.marks]))


def _legend(panel: Panel, looks: Mapping[str, int]) -> list[str]:
    dashed = {line.name for line in panel.lines if line.dashed}
    drawn = {line.name for line in panel.lines}
    elements = []
    for i, (name, look) in enumerate(looks.items()):
        y = HIGH + (i + 3.5) * svg.LINE
        if name in drawn:
            dash = " dashed" if name in dashed else ""
            elements.append(svg.path(f"M0 {svg.number(y - 4)}h28", f"curve c{look}{dash}"))
        if name not in dashed:
            elements.append(f'<circle cx="14" cy="{svg.number(y - 4)}" r="3.5" class="d{look}"/>')
        elements.append(svg.text(36, y, name))
    return elements


def _short(value: float) -> str:
    """1024 -> 1K."""
    power = round(math.log2(value))
    if power >= 10:
        unit = min(power // 10, 2)
        return f"{2 ** (power - 10 * unit)}{' KM'[unit]}"
    return f"{value:g}"


def _style() -> tuple[str, str]:
    light = [".axis { fill: none; stroke: #d1d9e0; }", ".curve { fill: none; stroke-width: 2; }"]
    light.append(".dashed { stroke-dasharray: 6 3; }")
    dark = [".axis { stroke: #3d444d; }"]
    for i, (day, night) in enumerate(COLOURS):
        light += [f".c{i} {{ stroke: {day}; }}", f".d{i} {{ fill: {day}; }}"]
        dark += [f".c{i} {{ stroke: {night}; }}", f".d{i} {{ fill: {night}; }}"]
    return "\n".join(light), "\n".join(dark)
