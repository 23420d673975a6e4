"""Places for the boxes of a directed graph: layers from top to bottom, few crossings, short lines.

Sugiyama's method: longest-path layers, barycentres for the order in a layer, isotonic regression for
the places.  Deterministic; draws nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

GAP = 22.0  # between two boxes of a layer
THIN = 10.0  # what a line that passes a layer takes there
FLOOR = 44.0  # between two layers
SWEEPS = 12
STRAIGHT = 8.0  # how much more a passing line insists on its place than a box

Key = tuple[str, ...]  # (node,) or (from, to, layer): a line that passes a layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle, by its upper left corner."""

    x: float
    y: float
    wide: float
    high: float

    @property
    def centre(self) -> float:
        return self.x + self.wide / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where boxes are, and where a line from one to another bends on its way past layers."""

    boxes: Mapping[str, Box]
    bends: Mapping[tuple[str, str], tuple[Box, ...]]
    wide: float
    high: float


def layered(digraph: nx.DiGraph[str], sizes: Mapping[str, tuple[float, float]]) -> Layout:
    """Place the nodes of an acyclic graph.

    Args:
        digraph: Edges lead downwards.
        sizes: Width and height of each node; its order settles ties.
    """
    layer_of = _layers(digraph, list(sizes))
    wired, layers = _with_passing_lines(digraph, layer_of, list(sizes))
    layers = _ordered(wired, layers)
    wide = {key: sizes[key[0]][0] if len(key) == 1 else THIN for row in layers for key in row}
    centres = _places(wired, layers, wide)
    left = min(centres[key] - wide[key] / 2 for row in layers for key in row)
    placed: dict[Key, Box] = {}
    y = 0.0
    for row in layers:
        tallest = max((sizes[key[0]][1] for key in row if len(key) == 1), default=0.0)
        for key in row:
            high = sizes[key[0]][1] if len(key) == 1 else tallest
            # inputs hang low, results of one layer begin together
            top = y + tallest - high if len(key) == 1 and not wired.pred[key] else y
            x = centres[key] - wide[key] / 2 - left
            placed[key] = Box(x=x, y=top, wide=wide[key], high=high)
        y += tallest + FLOOR
    return Layout(
        boxes={node: placed[(node,)] for node in sizes},
        bends={edge: _bends(edge, layer_of, placed) for edge in digraph.edges},
        wide=max(box.x + box.wide for box in placed.values()),
        high=y - FLOOR,
    )


def _layers(digraph: nx.DiGraph[str], names: Sequence[str]) -> dict[str, int]:
    """As late as the readers allow; what nobody reads stands right below its operands."""
    place = {name: i for i, name in enumerate(names)}
    order = list(nx.lexicographical_topological_sort(digraph, place.__getitem__))
    found: dict[str, int] = {}
    for name in order:
        found[name] = max((found[other] + 1 for other in digraph.pred[name]), default=0)
    last = max(found.values())
    for name in reversed(order):
        readers = [x for x in digraph.succ[name] if digraph.succ[x] or found[x] == last]
        if readers:
            found[name] = min(found[other] for other in readers) - 1
    for name in order:
        if digraph.pred[name] and not digraph.succ[name]:
            found[name] = max(found[other] for other in digraph.pred[name]) + 1
    return found


def _with_passing_lines(
    digraph: nx.DiGraph[str], layer_of: Mapping[str, int], names: Sequence[str]
) -> tuple[nx.DiGraph[Key], list[list[Key]]]:
    """Edges between neighbouring layers only: a longer one gets a stop in each layer it passes."""
    layers: list[list[Key]] = [[] for _ in range(max(layer_of.values()) + 1)]
    wired: nx.DiGraph[Key] = nx.DiGraph()
    for name in names:
        layers[layer_of[name]].append((name,))
        wired.add_node((name,))
    place = {name: i for i, name in enumerate(names)}
    for a, b in sorted(digraph.edges, key=lambda edge: (place[edge[0]], place[edge[1]])):
        stops = _stops((a, b), layer_of)
        for stop in stops:
            layers[int(stop[2])].append(stop)
        wired.add_edges_from(pairwise([(a,), *stops, (b,)]))
    return wired, layers


def _stops(edge: tuple[str, str], layer_of: Mapping[str, int]) -> list[Key]:
    a, b = edge
    return [(a, b, str(layer)) for layer in range(layer_of[a] + 1, layer_of[b])]


def _bends(
    edge: tuple[str, str], layer_of: Mapping[str, int], placed: Mapping[Key, Box]
) -> tuple[Box, ...]:
    return tuple(placed[stop] for stop in _stops(edge, layer_of))


# --- the order in a layer


def _ordered(wired: nx.DiGraph[Key], layers: list[list[Key]]) -> list[list[Key]]:
    """Sort layer by layer by the mean place of the neighbours, down and up; keep the best."""
    best, fewest = layers, _crossings(wired, layers)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        layers = [list(row) for row in layers]
        rows = range(1, len(layers)) if down else range(len(layers) - 2, -1, -1)
        for i in rows:
            beside = layers[i - 1 if down else i + 1]
            place = {key: float(j) for j, key in enumerate(beside)}
            near = wired.pred if down else wired.succ
            layers[i] = _by_barycentre(
                layers[i], {key: list(near[key]) for key in layers[i]}, place
            )
        crossings = _crossings(wired, layers)
        if crossings < fewest:
            best, fewest = layers, crossings
    return best


def _by_barycentre(
    row: list[Key], near: Mapping[Key, list[Key]], place: Mapping[Key, float]
) -> list[Key]:
    """Those without neighbours keep their rank."""
    centre = {
        key: sum(place[other] for other in near[key]) / len(near[key]) if near[key] else float(i)
        for i, key in enumerate(row)
    }
    return sorted(row, key=centre.__getitem__)


def _crossings(wired: nx.DiGraph[Key], layers: Sequence[Sequence[Key]]) -> int:
    """Pairs of lines that cross."""
    place = {key: i for row in layers for i, key in enumerate(row)}
    total = 0
    for row in layers:
        ends = [
            place[other] for key in row for other in sorted(wired.succ[key], key=place.__getitem__)
        ]
        total += sum(ends[i] > after for i in range(len(ends)) for after in ends[i + 1 :])
    return total


# --- the places


def _places(
    wired: nx.DiGraph[Key], layers: Sequence[Sequence[Key]], wide: Mapping[Key, float]
) -> dict[Key, float]:
    """Centres: each as near to its neighbours' mean as the order and the widths allow."""
    centres: dict[Key, float] = {}
    for row in layers:
        packed = [0.0, *_distances(row, wide)]
        centres |= {key: sum(packed[: i + 1]) for i, key in enumerate(row)}
    for sweep in range(2 * SWEEPS):
        down = sweep % 2 == 0
        for row in layers if down else reversed(layers):
            wanted = [_wanted(wired, key, centres, down=down) for key in row]
            weights = [STRAIGHT if len(key) > 1 else 1.0 for key in row]
            found = _spread(wanted, weights, _distances(row, wide))
            centres |= dict(zip(row, found, strict=True))
    return centres


def _distances(row: Sequence[Key], wide: Mapping[Key, float]) -> list[float]:
    return [(wide[a] + wide[b]) / 2 + GAP for a, b in pairwise(row)]


def _wanted(wired: nx.DiGraph[Key], key: Key, centres: Mapping[Key, float], *, down: bool) -> float:
    """Where a box would go: the mean of its operands, or of its readers; else it stays."""
    near = wired.pred[key] if down else wired.succ[key]
    return sum(centres[other] for other in near) / len(near) if near else centres[key]


def _spread(
    wanted: Sequence[float], weights: Sequence[float], distances: Sequence[float]
) -> list[float]:
    """Least squares with distances that must be kept: pool adjacent violators."""
    offsets = [sum(distances[:i]) for i in range(len(wanted))]
    pools: list[tuple[float, float, int]] = []  # mean, weight, members
    for want, weight, offset in zip(wanted, weights, offsets, strict=True):
        pools.append((want - offset, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, u, n), (b, w, m) = pools[-2:]
            pools[-2:] = [((a * u + b * w) / (u + w), u + w, n + m)]
    level = [mean for mean, _, members in pools for _ in range(members)]
    return [mean + offset for mean, offset in zip(level, offsets, strict=True)]
