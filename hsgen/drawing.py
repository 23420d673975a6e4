"""A spec's graph and plan as one SVG: a box an operator, coloured by the launch that computes it."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from itertools import pairwise

from hsgen import analysis, layout, svg
from hsgen.graph import Graph, Input, Node, op_text
from hsgen.layout import Box
from hsgen.plan import Plan
from hsgen.report import Shown

COLUMNS = 34  # characters of a line of attributes
PAD = 9.0
BADGE = 22.0
MARGIN = 24.0
# Fills of the launches, light and dark; from the thirteenth launch on they come again, numbered.
LIGHT = (
    *("#cfe8ff", "#ffe0c2", "#d3f2d3", "#f6d0e4", "#e3dcff", "#fff1b3"),
    *("#c9f1ee", "#ffd3cf", "#e6edc4", "#dfe3ea", "#f0d9ff", "#f3dfc9"),
)
DARK = (
    *("#15456e", "#6b3d0f", "#1d5228", "#6a2148", "#43357f", "#5c4a06"),
    *("#0d524d", "#6e2621", "#475114", "#3b444f", "#592a75", "#5b4125"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """One launch as the legend says it."""

    number: int
    kernel: str
    lines: tuple[str, ...]
    operators: tuple[str, ...]

    @property
    def fill(self) -> str:
        return f"launch{(self.number - 1) % len(LIGHT)}"


def draw(shown: Shown) -> str:
    """The graph, and beside it the launches in order; without a plan, why there is none."""
    graph = shown.graph
    launches = _launches(shown.plan) if shown.plan else ()
    words = {node.name: _words(graph, node) for node in graph.nodes()}
    numbers = {name: [x for x in launches if name in x.operators] for name in words}
    sizes = {name: _size(lines, len(numbers[name])) for name, lines in words.items()}
    placed = layout.layered(graph.digraph, sizes)
    legend, wide, high = _legend(shown, launches)
    top = MARGIN + 3 * svg.LINE
    elements = _title(shown)
    origin = f"translate({svg.number(MARGIN)} {svg.number(top)})"
    elements += [f'<g transform="{origin}">', *_lines(graph, placed)]
    for node in graph.nodes():
        elements += _box(placed.boxes[node.name], node, words[node.name], numbers[node.name])
    beside = placed.wide + 2 * MARGIN
    elements += ["</g>", f'<g transform="translate({svg.number(beside)} {svg.number(top)})">']
    elements += [*legend, "</g>"]
    title_wide = max(svg.width(line) for line in _title_words(shown))
    return svg.document(
        max(beside + wide, MARGIN + title_wide) + MARGIN,
        top + max(placed.high, high) + MARGIN,
        f"{graph.meta.name}: operators and launches",
        elements,
        *_style(),
    )


def _style() -> tuple[str, str]:
    """Rules for light and dark."""
    light = [
        ".box { stroke: #59636e; stroke-width: 1; }",
        ".input { fill: #f6f8fa; stroke: #8c959f; stroke-dasharray: 4 3; }",
        ".none { fill: #ffffff; }",
        *(f".launch{i} {{ fill: {color}; }}" for i, color in enumerate(LIGHT)),
    ]
    dark = [
        ".box { stroke: #9198a1; }",
        ".input { fill: #151b23; stroke: #767e88; }",
        ".none { fill: #0d1117; }",
        *(f".launch{i} {{ fill: {color}; }}" for i, color in enumerate(DARK)),
    ]
    return "\n".join(light), "\n".join(dark)


def _title_words(shown: Shown) -> tuple[str, str]:
    meta = shown.graph.meta
    name = f"{meta.name}, {meta.source}" if meta.source else meta.name
    plan = shown.plan
    said = (
        f"{plan.target}, {plan.dtype}: {sum(len(step.launches) for step in plan.usual)} launches"
        if plan
        else "no plan"
    )
    about = f"causality: {analysis.causality_text(shown.graph)}"
    if unbound := analysis.unbound_sizes(shown.graph):
        return f"{name}: {said}", f"{about}; costs are known once {', '.join(unbound)} are bound"
    start = max(cost.flops.start for cost in analysis.costs(shown.graph).values())
    costs = "FLOPs and bytes of each operator alone, batch 1"
    return f"{name}: {said}", f"{about}; {costs}, S = T >= {start}, 16-bit inputs"


def _title(shown: Shown) -> list[str]:
    name, about = _title_words(shown)
    y = MARGIN + svg.SIZE
    return [svg.text(MARGIN, y, name, "bold"), svg.text(MARGIN, y + svg.LINE, about, "dim")]


# --- launches


def _launches(plan: Plan) -> tuple[Launched, ...]:
    """Every launch of the plan, in order."""
    found: list[Launched] = []
    for step in plan.usual:
        for launch in step.launches:
            kernel = plan.kernel(launch.kernel)
            lines = [f"{kernel.skeleton}, {step.title}", str(kernel.config)]
            found.append(
                Launched(
                    number=len(found) + 1,
                    kernel=kernel.name,
                    lines=tuple(part for line in lines for part in textwrap.wrap(line, 46)),
                    operators=kernel.operators,
                )
            )
    return tuple(found)


def _legend(shown: Shown, launches: tuple[Launched, ...]) -> tuple[list[str], float, float]:
    """Elements, width and height."""
    if not launches:
        lines = ["no plan", *textwrap.wrap(shown.problem, 46)]
        elements = [
            svg.text(0, svg.SIZE + i * svg.LINE, line, "" if i else "bold")
            for i, line in enumerate(lines)
        ]
        return elements, max(map(svg.width, lines)), len(lines) * svg.LINE
    elements = [svg.text(0, svg.SIZE, "launches in order", "bold")]
    y, wide = 1.5 * svg.LINE, svg.width("launches in order")
    for launch in launches:
        elements += _badge(0, y, launch)
        lines = (launch.kernel, *launch.lines)
        for i, line in enumerate(lines):
            kind = "dim" if i else "bold"
            elements.append(svg.text(BADGE + PAD, y + svg.SIZE + i * svg.LINE, line, kind))
        wide = max(wide, BADGE + PAD + max(map(svg.width, lines)))
        y += (len(lines) + 0.5) * svg.LINE
    return elements, wide, y


def _badge(x: float, y: float, launch: Launched) -> list[str]:
    number = svg.text(x + BADGE / 2, y + svg.SIZE, str(launch.number), "", "middle")
    return [svg.rect(x, y, BADGE, svg.LINE, f"box {launch.fill}", 3), number]


# --- boxes


def _words(graph: Graph, node: Node) -> tuple[str, ...]:
    """What stands in a box, line by line."""
    dims = ", ".join(str(graph.sizes.get(dim, dim)) for dim in node.type.dims)
    kind = f"{node.type.dtype}[{dims}]"
    if isinstance(node.op, Input):
        return f"%{node.name}", kind
    name, _, attributes = op_text(node.op).partition("(")
    short = re.sub(r"\d+\.\d{5,}", lambda found: f"{float(found[0]):.4g}", attributes[:-1])
    operator = textwrap.wrap(f"{name}({short})", COLUMNS, subsequent_indent="  ")
    return f"%{node.name}", *operator, *textwrap.wrap(kind, COLUMNS), *_costs(graph, node)


def _costs(graph: Graph, node: Node) -> tuple[str, ...]:
    """As `hsgen show` prints them; nothing while heads or head dims are open."""
    if analysis.unbound_sizes(graph):
        return ()
    cost = analysis.costs(graph)[node.name]
    lines = (f"FLOPs {cost.flops}", f"bytes {cost.bytes}")
    return tuple(
        part for line in lines for part in textwrap.wrap(line, COLUMNS, subsequent_indent="  ")
    )


def _size(words: tuple[str, ...], badges: int) -> tuple[float, float]:
    first = svg.width(words[0]) + badges * (BADGE + 4)
    return max(first, *map(svg.width, words)) + 2 * PAD, len(words) * svg.LINE + PAD


def _box(box: Box, node: Node, words: tuple[str, ...], launches: list[Launched]) -> list[str]:
    """A box with its words and, in its corner, the numbers of its launches."""
    fill = "input" if isinstance(node.op, Input) else launches[-1].fill if launches else "none"
    radius = box.high / 4 if isinstance(node.op, Input) else 4
    elements = [svg.rect(box.x, box.y, box.wide, box.high, f"box {fill}", radius)]
    for i, line in enumerate(words):
        look = "bold" if i == 0 else ""
        y = box.y + PAD / 2 + svg.SIZE + i * svg.LINE
        elements.append(svg.text(box.x + PAD, y, line, look))
    x = box.x + box.wide - PAD / 2
    for launch in reversed(launches):
        x -= BADGE
        elements += _badge(x, box.y + PAD / 2, launch)
        x -= 4
    return elements


# --- lines


def _lines(graph: Graph, placed: layout.Layout) -> list[str]:
    """A curve an edge, past the boxes of the layers between, with a tip at its end."""
    elements: list[str] = []
    for node in graph.nodes():
        for operand in dict.fromkeys(node.inputs):
            start, end = placed.boxes[operand], placed.boxes[node.name]
            stops = placed.bends[(operand, node.name)]
            points = [(start.centre, start.y + start.high)]
            for stop in stops:
                points += [(stop.centre, stop.y), (stop.centre, stop.y + stop.high)]
            points.append((end.centre, end.y - 5))
            elements.append(svg.path(_curve(points), "line"))
            x, y = svg.number(end.centre), svg.number(end.y)
            elements.append(svg.path(f"M{x} {y}l-4 -7h8z", "tip"))
    return elements


def _curve(points: list[tuple[float, float]]) -> str:
    """Straight where a line passes a layer, an S between layers."""
    x, y = points[0]
    commands = [f"M{svg.number(x)} {svg.number(y)}"]
    for (a, b), (c, d) in pairwise(points):
        half = svg.number((b + d) / 2)
        ends = f"{svg.number(a)} {half} {svg.number(c)} {half} {svg.number(c)} {svg.number(d)}"
        commands.append(f"V{svg.number(d)}" if a == c else f"C{ends}")
    return "".join(commands)
