"""Which way each head takes, and what is there on it."""

from __future__ import annotations

import torch
from torch import Tensor

from hsgen.spec import Spec

NOWHERE = -1  # a number that is of no way


def ways_taken(spec: Spec, x: dict[str, Tensor]) -> Tensor | None:
    """The place in `route.ways` of each query head's way, in one sequence.  -> i64[Hq]"""
    route = spec.route
    if route is None:
        return None
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


def on_way(spec: Spec, taken: Tensor | None, when: str | None) -> Tensor | None:
    """The query heads that are on a way; None where all are.  -> bool[Hq]"""
    if when is None:
        return None
    assert spec.route is not None, f"way '{when}' of no route"
    assert taken is not None
    return taken == spec.route.ways.index(when)
