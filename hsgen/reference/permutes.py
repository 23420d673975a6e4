"""Orders of tokens: sorted inside segments, clustered, or given.  Nothing here has a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

import torch
from torch import Tensor

from hsgen.spec import Gather, KMeans, Order, SortInSegment, Spec, Tile


def order_of(order: Order, y: Tensor, judges: Tensor, group: int, given: Tensor | None) -> Tensor:
    """The token in every slot, -1 of none.  -> i64[H, S]

    Args:
        order: What it is that `permute` says.
        y: What is ordered, [S, H, D].
        judges: Queries that give masses, [T, H * group, D].
        group: Judges of one head.
        given: What the caller says instead, [S, H].
    """
    y, judges = y.detach().transpose(0, 1), judges.detach()
    match order:
        case SortInSegment():
            return _sorted(order, y, judges, group)
        case KMeans():
            return cluster_of(order, y.transpose(0, 1)).argsort(dim=-1, stable=True)
        case Gather():
            assert given is not None, "a gather needs its order"
            return _said(given.detach().T.round().long(), y.shape[1])
        case Tile():
            raise AssertionError("tiles are of axes, not of keys: see layouts")
        case _:
            assert_never(order)


def _sorted(order: SortInSegment, y: Tensor, judges: Tensor, group: int) -> Tensor:
    """Inside whole segments, greatest first.  y: [H, S, D]"""
    H, S, D = y.shape
    place = torch.arange(S, device=y.device).expand(H, S)
    whole = S // order.segment * order.segment
    segments = y[:, :whole].unflatten(1, (-1, order.segment))  # [H, segments, segment, D]
    if not whole:
        return place
    if order.by == "mean":
        weights = (segments @ segments.mean(2).unsqueeze(-1)).squeeze(-1)
    else:
        assert order.last is not None, "masses are those of the last rows"
        last = judges[-order.last :].unflatten(1, (H, group))  # [n, H, group, D]
        logits = torch.einsum("nhgd,hsd->hgns", last, y[:, :whole]) * D**-0.5
        weights = logits.softmax(-1).mean((1, 2)).unflatten(1, (-1, order.segment))
    best = weights.argsort(dim=-1, descending=True, stable=True)
    starts = torch.arange(best.shape[1], device=y.device)[:, None] * order.segment
    return torch.cat(((best + starts).flatten(1), place[:, whole:]), 1)


def clusters_of_rows(spec: Spec, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By level whose queries are clustered: the cluster of every row.  i64[Hq, T]"""
    said = ((level, level.permute.queries) for level in spec.levels if level.permute)
    return {
        level.name: cluster_of(order, x[f"q_{level.q}" if level.q else "q"])
        for level, order in said
        if order is not None
    }


def cluster_of(order: KMeans, y: Tensor) -> Tensor:
    """The cluster of every token.  [S, H, D] -> i64[H, S]"""
    y = y.detach().transpose(0, 1)
    H, S, D = y.shape
    if not S:
        return torch.zeros(H, 0, dtype=torch.long, device=y.device)
    first = torch.arange(order.clusters, device=y.device) * S // order.clusters
    centroids = y[:, first]
    cluster = torch.full((H, S), -1, dtype=torch.long, device=y.device)
    for _ in range(order.iterations):
        before, cluster = cluster, _nearest(y, centroids)
        if not y.is_meta and torch.equal(before, cluster):
            break  # nor would anything change later
        sums = torch.zeros_like(centroids).scatter_add_(1, cluster[..., None].expand(H, S, D), y)
        counts = torch.zeros_like(centroids[..., :1])
        counts.scatter_add_(1, cluster[..., None], torch.ones_like(y[..., :1]))
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    return cluster


def _nearest(y: Tensor, centroids: Tensor) -> Tensor:
    """The centroid nearest to every token, ties to the first.  [H, S, D], [H, C, D] -> i64[H, S]"""
    best = torch.zeros(y.shape[:2], dtype=torch.long, device=y.device)
    least = y.new_full(y.shape[:2], torch.inf)
    for i in range(centroids.shape[1]):  # one by one: all differences at once would not fit
        distance = (y - centroids[:, i, None]).square().sum(-1)
        nearer = distance < least
        best, least = best.masked_fill(nearer, i), torch.where(nearer, distance, least)
    return best


def _said(given: Tensor, S: int) -> Tensor:
    """Slots as the caller says: a token only once, and none that does not exist.  i64[H, S]"""
    nowhere = (given < 0) | (given >= S)
    slot = torch.arange(given.shape[1], device=given.device).expand_as(given)
    first = given.new_full((len(given), S + 1), given.shape[1])
    first.scatter_reduce_(1, given.masked_fill(nowhere, S), slot, "amin")
    again = first.gather(1, given.masked_fill(nowhere, S)) != slot
    return given.masked_fill(nowhere | again, -1)
