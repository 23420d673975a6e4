"""Which way each head takes, and what is there on it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hsgen.spec import Spec

NOWHERE = -1  # a number that is of no way


def ways_taken(spec: Spec, x: dict[str, Tensor]) -> Tensor | None:
    """The place in `route.ways` of each query head's way, in one sequence.  -> i64[Hq]

    None without a route, and where `computed_ways` says it.
    """
    route = spec.route
    if route is None:
        return None
    if route.statistic:
        return None  # not yet: it is of levels
    heads, device = x["q"].shape[1], x["q"].device
    if route.input:
        given = x["route"].long().reshape(-1)
        known = (given >= 0) & (given < len(route.input))
        places = torch.tensor([route.ways.index(way) for way in route.input], device=device)
        taken = torch.where(known, places[given.clamp(0, len(route.input) - 1)], NOWHERE)
        return taken.expand(heads)
    places = [route.ways.index(way) for way in route.table]
    if route.by == "layer":
        return torch.full((heads,), places[int(x["layer"]) % len(places)], device=device)
    return torch.tensor([places[h % len(places)] for h in range(heads)], device=device)


def computed_ways(spec: Spec, scores: Mapping[str, Tensor]) -> Tensor | None:
    """The same of a statistic, once its levels are scored: [R, Hq, N] by level, of one group of rows."""
    statistic = spec.route and spec.route.statistic
    if not statistic or not {*statistic.levels} <= {*scores}:
        return None
    p, q = (_parts_of_one(scores[name]) for name in statistic.levels)
    if not len(p):  # no rows, so that nothing is attended
        return torch.full(p.shape[1:2], NOWHERE, device=p.device)
    middle = (p + q) / 2
    divergence = (_relative(p, middle) + _relative(q, middle)) / 2
    below = divergence[0].clamp(min=0).sqrt() < statistic.threshold
    assert spec.route is not None
    ways = [spec.route.ways.index(way) for way in (statistic.below, statistic.above)]
    return torch.where(below, *ways)


def _parts_of_one(scores: Tensor) -> Tensor:
    """Masses as parts of their sum; no candidate has a mass."""
    masses = scores.detach().masked_fill(scores == -torch.inf, 0.0)
    total = masses.sum(-1, keepdim=True)
    return masses / total.masked_fill(total == 0, 1.0)


def _relative(p: Tensor, q: Tensor) -> Tensor:
    """The sum of p log(p / q), where 0 log 0 is 0."""
    return torch.where(p > 0, p * (p / q.masked_fill(p == 0, 1.0)).log(), 0.0).sum(-1)


def on_way(spec: Spec, taken: Tensor | None, when: str | None) -> Tensor | None:
    """The query heads that are on a way; None where all are.  -> bool[Hq]"""
    if when is None:
        return None
    assert spec.route is not None, f"way '{when}' of no route"
    assert taken is not None
    return taken == spec.route.ways.index(when)
