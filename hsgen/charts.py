"""Curves as SVG: of a quality report, mass recalled against density, one panel a subject; and any shares
against a width that doubles, as `benchmarks.beams` has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hsgen import svg
from hsgen.quality import WAYS, Curves, Report

WIDE, HIGH = 300.0, 220.0
LEFT, BETWEEN, MARGIN = 56.0, 76.0, 20.0
TITLES = {
    "selected": "the spec",
    "oracle": "oracle",
    "random": "random",
    "recent_sink": "recent + sink",
}
LIGHT = {"selected": "#0969da", "oracle": "#1a7f37", "random": "#6e7781", "recent_sink": "#bc4c00"}
DARK = {"selected": "#58a6ff", "oracle": "#3fb950", "random": "#9198a1", "recent_sink": "#f0883e"}
DASHES = {"selected": "", "oracle": "6 3", "random": "2 3", "recent_sink": "8 3 2 3"}


def draw(report: Report) -> str:
    """Mass recalled against density, for every subject at all budgets; a ring marks the spec's own."""
    about = _about(report)
    elements = [
        svg.text(MARGIN, MARGIN + svg.SIZE + i * svg.LINE, line, "dim" if i else "bold")
        for i, line in enumerate(about)
    ]
    top = MARGIN + (len(about) + 2) * svg.LINE
    for i, curves in enumerate(report.curves):
        x = MARGIN + LEFT + i * (WIDE + BETWEEN)
        elements += [
            f'<g transform="translate({svg.number(x)} {svg.number(top)})">',
            *_panel(curves),
            "</g>",
        ]
    y = top + HIGH + 3.5 * svg.LINE
    elements += _legend(y)
    panels = LEFT + len(report.curves) * (WIDE + BETWEEN)
    wide = MARGIN + max(panels, _legend_width(), max(map(svg.width, about)) + MARGIN)
    title = f"{report.spec.name}: mass recalled against density"
    return svg.document(wide, y + svg.LINE + MARGIN, title, elements, *_style())


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Shares from `least` to 1 against widths; by line, one share a width, and one that they tend to."""

    title: str
    widths: Sequence[float]
    lines: dict[str, Sequence[float]]
    limits: dict[str, float]
    least: float = 0.0


def plot(title: str, about: Sequence[str], axis: str, columns: Sequence[Sequence[Panel]]) -> str:
    """Panels in columns, each over a legend of its own; a grey line is what a curve tends to."""
    elements = [
        svg.text(MARGIN, MARGIN + svg.SIZE + i * svg.LINE, line, "dim" if i else "bold")
        for i, line in enumerate((title, *about))
    ]
    top = MARGIN + (len(about) + 3) * svg.LINE
    below = HIGH + 5 * svg.LINE  # of a panel, its axis and the next one's title
    deep = max(map(len, columns))
    for i, column in enumerate(columns):
        x = MARGIN + LEFT + i * (WIDE + BETWEEN)
        for j, panel in enumerate(column):
            y = svg.number(top + j * below)
            elements += [f'<g transform="translate({svg.number(x)} {y})">', *_shares(panel, axis)]
            elements.append("</g>")
        names = dict.fromkeys(name for panel in column for name in panel.lines)
        for j, (way, name) in enumerate(zip(WAYS, names, strict=False)):
            y = top + deep * below - svg.LINE + j * svg.LINE
            elements.append(svg.path(f"M{svg.number(x)} {svg.number(y - 4)}h28", f"curve {way}"))
            elements.append(svg.text(x + 34, y, name))
    lines = max(len(panel.lines) for column in columns for panel in column)
    high = top + deep * below + (lines - 1) * svg.LINE
    wide = MARGIN + max(LEFT + len(columns) * (WIDE + BETWEEN), *map(svg.width, about))
    return svg.document(wide, high + MARGIN, title, elements, *_style())


def _shares(panel: Panel, axis: str) -> list[str]:
    """One panel: widths on a logarithmic axis, and a grey line for each limit."""
    first, last = math.log2(panel.widths[0]), math.log2(panel.widths[-1])

    def high(share: float) -> float:
        return HIGH * (1 - share) / (1 - panel.least)

    elements = [svg.text(0, -svg.LINE / 2, panel.title, "bold")]
    for quarter in range(5):
        share = panel.least + (1 - panel.least) * quarter / 4
        y = svg.number(high(share))
        elements.append(svg.path(f"M0 {y}h{svg.number(WIDE)}", "axis"))
        elements.append(svg.text(-8, high(share) + 4, f"{share:.2f}", "dim", "end"))
    xs = [WIDE * (math.log2(width) - first) / (last - first) for width in panel.widths]
    for x, width in zip(xs, panel.widths, strict=True):
        elements.append(svg.path(f"M{svg.number(x)} 0v{svg.number(HIGH)}", "axis"))
        elements.append(svg.text(x, HIGH + svg.LINE, f"{width:g}", "dim", "middle"))
    elements.append(svg.text(WIDE / 2, HIGH + 2 * svg.LINE, axis, "dim", "middle"))
    for way, (name, shares) in zip(WAYS, panel.lines.items(), strict=False):
        if name in panel.limits:
            y = svg.number(high(panel.limits[name]))
            elements.append(svg.path(f"M0 {y}h{svg.number(WIDE)}", "line"))
        elements += _curve([(x, high(y)) for x, y in zip(xs, shares, strict=True)], way)
    return elements


def _style() -> tuple[str, str]:
    light = [".axis { fill: none; stroke: #d1d9e0; }", ".curve { fill: none; stroke-width: 2; }"]
    dark = [".axis { stroke: #3d444d; }"]
    for way in WAYS:
        dash = f" stroke-dasharray: {DASHES[way]};" if DASHES[way] else ""
        light.append(f".{way} {{ stroke: {LIGHT[way]};{dash} }}")
        light.append(f".dot_{way} {{ fill: {LIGHT[way]}; }}")
        dark.append(f".{way} {{ stroke: {DARK[way]}; }}")
        dark.append(f".dot_{way} {{ fill: {DARK[way]}; }}")
    light.append(".ring { fill: none; stroke: #1f2328; stroke-width: 1.5; }")
    dark.append(".ring { stroke: #e6edf3; }")
    return "\n".join(light), "\n".join(dark)


def _about(report: Report) -> tuple[str, ...]:
    layers = ", ".join(str(layer) for layer in sorted({each.layer for each in report.measured}))
    factors = (
        ", ".join(f"{factor:g}" for factor in report.curves[0].factors) if report.curves else ""
    )
    lines = (
        f"{report.spec.name} on {report.capture}, {report.tokens} tokens, means over layers {layers} "
        "and heads",
        f"budgets of the spec times {factors}; the ring is the spec as it is",
    )
    return lines if report.curves else (f"{report.spec.name}: nothing to measure",)


def _legend(y: float) -> list[str]:
    elements: list[str] = []
    x = MARGIN
    for way in WAYS:
        elements.append(svg.path(f"M{svg.number(x)} {svg.number(y - 4)}h28", f"curve {way}"))
        elements.append(svg.text(x + 34, y, TITLES[way]))
        x += 34 + svg.width(TITLES[way]) + 20
    return elements


def _legend_width() -> float:
    return sum(54 + svg.width(title) for title in TITLES.values()) + MARGIN


def _panel(curves: Curves) -> list[str]:
    """One subject: a logarithmic axis of density down to the smallest, mass from 0 to 1."""
    least = min((x for x in curves.density if x > 0), default=1.0)
    octaves = max(1, math.ceil(-math.log2(least) - 1e-9))

    def place(density: float, mass: float) -> tuple[float, float]:
        return WIDE * (1 + max(math.log2(max(density, least)), -octaves) / octaves), HIGH * (
            1 - mass
        )

    elements = [svg.text(0, -svg.LINE / 2, curves.subject, "bold")]
    for quarter in range(5):
        y = HIGH * (1 - quarter / 4)
        elements.append(svg.path(f"M0 {svg.number(y)}h{svg.number(WIDE)}", "axis"))
        elements.append(svg.text(-8, y + 4, f"{quarter / 4:.2f}", "dim", "end"))
    step = max(1, math.ceil(octaves / 5))
    for octave in range(0, octaves + 1, step):
        x = WIDE * (1 - octave / octaves)
        elements.append(svg.path(f"M{svg.number(x)} 0v{svg.number(HIGH)}", "axis"))
        words = "1" if octave == 0 else f"1/{2**octave}"
        elements.append(svg.text(x, HIGH + svg.LINE, words, "dim", "middle"))
    elements.append(svg.text(WIDE / 2, HIGH + 2 * svg.LINE, "density", "dim", "middle"))
    elements.append(svg.text(-LEFT + 8, -svg.LINE / 2, "mass", "dim"))
    for way in reversed(WAYS):
        points = [place(*point) for point in zip(curves.density, curves.mass[way], strict=True)]
        elements += _curve(points, way)
    own = curves.factors.index(1.0)
    x, y = place(curves.density[own], curves.mass["selected"][own])
    elements.append(f'<circle cx="{svg.number(x)}" cy="{svg.number(y)}" r="7" class="ring"/>')
    return elements


def _curve(points: Sequence[tuple[float, float]], way: str) -> list[str]:
    line = "L".join(f"{svg.number(x)} {svg.number(y)}" for x, y in points)
    dots = [
        f'<circle cx="{svg.number(x)}" cy="{svg.number(y)}" r="3" class="dot_{way}"/>'
        for x, y in points
    ]
    return [svg.path(f"M{line}", f"curve {way}"), *dots]
