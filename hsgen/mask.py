"""What each query row takes on a capture, as a picture: chosen blocks over the attention mass beneath.

A panel a choice and query head: query rows down, keys across.  Blue is mass that the choice holds, red
is mass that it misses, grey blue is what it takes without need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hsgen import captures, metrics, quality, svg
from hsgen.captures import Group
from hsgen.errors import HsgenError
from hsgen.quality import Subject
from hsgen.spec import Spec

PIXELS = 256  # a side of a panel, at most
TOKENS = 2048
ROWS = 256  # alive at once
FULL = 4.0  # times what a token has where a row attends to all alike: drawn darkest
SHADES = 15  # so that a picture stays small
PAGE = (255, 255, 255)
HIDDEN = (234, 238, 242)  # later than the row
TAKEN = (205, 224, 247)  # chosen, no mass
HELD = (5, 64, 160)  # chosen, all mass
MISSED = (207, 34, 46)  # not chosen, all mass
MARGIN, GAP = 20.0, 24.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Panel:
    """One choice on one query head.

    Attributes:
        subject: What chose.
        head: The model's number of the query head.
        mass: f32[P, P], attention probability in a pixel, mean over its rows.
        chosen: f32[P, P], share of the pixel's visible pairs that are chosen.
        visible: f32[P, P], share of the pixel's pairs that are visible.
        density: Chosen pairs over visible ones.
        recalled: Mean mass held.
    """

    subject: Subject
    head: int
    mass: Tensor
    chosen: Tensor
    visible: Tensor
    density: float
    recalled: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mask:
    """Every panel of a spec on one captured group."""

    spec: Spec
    capture: str
    layer: int
    tokens: int
    panels: tuple[Panel, ...]

    def __str__(self) -> str:
        lines = [_title(self)]
        lines += [f"  {x.subject.name} ({x.subject.about}), {_caption(x)}" for x in self.panels]
        return "\n".join(lines) + "\n"

    def record(self) -> dict[str, object]:
        """The same for machines, without the pixels."""
        return {
            "spec": self.spec.name,
            "capture": self.capture,
            "layer": self.layer,
            "tokens": self.tokens,
            "panels": [
                {
                    "subject": x.subject.name,
                    "head": x.head,
                    "density": x.density,
                    "mass": x.recalled,
                }
                for x in self.panels
            ],
        }


def mask(spec: Spec, path: Path, *, layer: int | None = None, tokens: int = TOKENS) -> Mask:
    """Choose on the first captured group of a layer.

    Args:
        spec: The attention; its heads are exchanged for the captured ones.
        path: The capture.
        layer: None takes the first.
        tokens: A prefix of the capture.

    Raises:
        HsgenError: the capture does not do, or the spec makes no choice of tokens.
    """
    group = captures.load(path, [] if layer is None else [layer])[0].prefix(tokens)
    if not quality.subjects(spec):
        raise HsgenError(f"spec {spec.name}: no level selects and no branch reads tokens")
    if len(group.q) < 1:
        raise HsgenError(f"tokens: expected at least 1, got {tokens}")
    spec = quality.bound(spec, group)
    return Mask(
        spec=spec,
        capture=path.name,
        layer=group.layer,
        tokens=len(group.q),
        panels=tuple(_panels(spec, group)),
    )


def _panels(spec: Spec, group: Group) -> Iterator[Panel]:
    """Every choice on every head; rows are taken some at a time."""
    tokens, heads = group.q.shape[:2]
    side = -(-tokens // -(-tokens // PIXELS))
    subjects = quality.subjects(spec)
    sums = {each.name: torch.zeros(2, heads, side, side) for each in subjects}  # chosen, held
    mass, visible = torch.zeros(heads, side, side), torch.zeros(side, side)
    choices = _choices(spec, group)
    for a in range(0, tokens, ROWS):
        position = torch.arange(a, min(a + ROWS, tokens))
        full = metrics.dense(group.q[position], group.k, group.v, position, causal=spec.causal)
        sees = full.sees(torch.arange(tokens))
        mass += _binned(full.probs, position, side, tokens)
        visible += _binned(sees[None].float(), position, side, tokens)[0]
        found = choices(position)
        for each in subjects:
            taken = metrics.tokens_of(found[each.name], each.size, each.stride, tokens) & sees
            taken = taken.repeat_interleave(heads // len(taken), 0).float()
            sums[each.name][0] += _binned(taken, position, side, tokens)
            sums[each.name][1] += _binned(taken * full.probs, position, side, tokens)
    pairs = _binned(torch.ones(1, tokens, tokens), torch.arange(tokens), side, tokens)[0]
    rows = torch.bincount(torch.arange(tokens) * side // tokens, minlength=side)[:, None]
    for each in subjects:
        for h in range(heads):
            chosen, held = sums[each.name][:, h]
            yield Panel(
                subject=each,
                head=group.query_head(h),
                mass=mass[h] / rows,
                chosen=chosen / visible.clamp(min=1),
                visible=visible / pairs,
                density=float(chosen.sum() / visible.sum()),
                recalled=float(held.sum()) / tokens,
            )


def _choices(spec: Spec, group: Group) -> Callable[[Tensor], dict[str, Tensor]]:
    """What `quality.choices` says of some rows; for all at once where they need the whole text."""
    if not quality.looks_ahead(spec):
        return lambda position: quality.choices(spec, group, position)
    whole = quality.choices(spec, group, torch.arange(len(group.q)))
    return lambda position: {name: chosen[:, position] for name, chosen in whole.items()}


def _binned(x: Tensor, position: Tensor, side: int, tokens: int) -> Tensor:
    """Sums over pixels.  f32[H, R, S] -> f32[H, P, P]"""
    column = torch.arange(tokens) * side // tokens
    across = torch.zeros(*x.shape[:2], side).index_add_(2, column, x)
    return torch.zeros(len(x), side, side).index_add_(1, position * side // tokens, across)


# --- pixels


def pixels(panel: Panel) -> Tensor:
    """A panel in colour.  -> u8[P, P, 3]"""
    colors = {
        name: torch.tensor(color, dtype=torch.float32)
        for name, color in (("page", PAGE), ("hidden", HIDDEN), ("taken", TAKEN), ("held", HELD))
    }
    missed = torch.tensor(MISSED, dtype=torch.float32)
    visible = panel.visible.sum(-1, keepdim=True)
    level = panel.mass * visible / panel.visible.clamp(min=1e-6)  # 1: as a uniform row would have
    dark = (level / FULL).clamp(max=1).sqrt()[..., None]
    dark = (dark * SHADES).round() / SHADES
    share = panel.chosen[..., None]
    taken = colors["taken"] + (colors["held"] - colors["taken"]) * dark
    left = colors["page"] + (missed - colors["page"]) * dark
    color = taken * share + left * (1 - share)
    seen = panel.visible[..., None].clamp(max=1)
    return (color * seen + colors["hidden"] * (1 - seen)).round().to(torch.uint8)


def _grid(found: Mask) -> list[list[Panel]]:
    """A row a choice, a column a head."""
    names = dict.fromkeys(panel.subject.name for panel in found.panels)
    return [[x for x in found.panels if x.subject.name == name] for name in names]


def png(found: Mask) -> bytes:
    """All panels without words: a row a choice, a column a head, in the order in which they print."""
    rows = []
    for row in _grid(found):
        images = [pixels(panel) for panel in row]
        gap = torch.full((len(images[0]), 4, 3), 255, dtype=torch.uint8)
        parts = [part for image in images for part in (image, gap)][:-1]
        line = torch.cat(parts, 1)
        rows += [line, torch.full((4, line.shape[1], 3), 255, dtype=torch.uint8)]
    whole = torch.cat(rows[:-1])
    return svg.png(whole.shape[1], whole.shape[0], whole.numpy().tobytes())


# --- SVG


def draw(found: Mask) -> str:
    """All panels with words and a legend."""
    grid = _grid(found)
    title = _title(found)
    elements = [svg.text(MARGIN, MARGIN + svg.SIZE, title, "bold")]
    elements += [svg.text(MARGIN, MARGIN + svg.SIZE + svg.LINE, AXES, "dim")]
    y, wide = MARGIN + 3 * svg.LINE, max(svg.width(title), svg.width(AXES), _legend_width())
    for row in grid:
        name = f"{row[0].subject.name}: {row[0].subject.about}"
        elements.append(svg.text(MARGIN, y + svg.SIZE, name))
        wide = max(wide, svg.width(name), len(row) * (PIXELS + GAP) - GAP)
        for i, panel in enumerate(row):
            x, top = MARGIN + i * (PIXELS + GAP), y + 2.5 * svg.LINE
            elements.append(svg.text(x, top - 6, _caption(panel), "dim"))
            image = pixels(panel)
            content = svg.png(image.shape[1], image.shape[0], image.numpy().tobytes())
            elements.append(svg.image(x, top, PIXELS, PIXELS, content))
            elements.append(svg.rect(x, top, PIXELS, PIXELS, "frame"))
        y += 2.5 * svg.LINE + PIXELS + svg.LINE
    elements += _legend(y)
    name = f"{found.spec.name}: what each row takes"
    light = [".frame { fill: none; stroke: #8c959f; }"]
    light += [f".{kind} {{ fill: {_hex(color)}; stroke: #8c959f; }}" for kind, color, _ in LEGEND]
    return svg.document(wide + 2 * MARGIN, y + svg.LINE + MARGIN, name, elements, "\n".join(light))


AXES = "query rows down, keys across; darker is more attention mass"
LEGEND = (
    ("held", HELD, "taken, with mass"),
    ("taken", TAKEN, "taken, little mass"),
    ("missed", MISSED, "mass not taken"),
    ("left", PAGE, "not taken, little mass"),
    ("hidden", HIDDEN, "not visible"),
)


def _legend(y: float) -> list[str]:
    elements: list[str] = []
    x = MARGIN
    for kind, _, words in LEGEND:
        elements.append(svg.rect(x, y, 14, 14, kind, 2))
        elements.append(svg.text(x + 20, y + svg.SIZE, words))
        x += 20 + svg.width(words) + 12
    return elements


def _legend_width() -> float:
    return sum(32 + svg.width(words) for _, _, words in LEGEND)


def _hex(color: tuple[int, int, int]) -> str:
    return "#" + "".join(f"{part:02x}" for part in color)


def _title(found: Mask) -> str:
    return f"{found.spec.name} on {found.capture}, layer {found.layer}, {found.tokens} tokens"


def _caption(panel: Panel) -> str:
    return f"head {panel.head}: density {panel.density:.2f}, mass {panel.recalled:.2f}"
