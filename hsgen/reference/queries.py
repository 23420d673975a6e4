"""Rows that choose together: who they are, the query that stands for them, and their scores as one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hsgen.reference.grids import tile_of
from hsgen.spec import Level, Query


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Together:
    """Which rows choose together: R groups of the T rows of a chunk.

    row: i64[T], the group of each row.  first, last: i64[R], nominal positions of a group's rows,
    whether the chunk has these or not; of the prompt's last rows, the last one's.
    members: i64[R, M], the rows that are asked, in order, -1 where there is none.
    by_head: The same two where every head has groups of its own: i64[H, T], i64[H, R, M].
    """

    row: Tensor
    first: Tensor
    last: Tensor
    members: Tensor
    by_head: tuple[Tensor, Tensor] | None = None


def together(
    query: Query | None,
    p: Tensor,
    lengths: tuple[int, ...] | None = None,
    clusters: Tensor | None = None,
) -> Together:
    """The groups of rows at positions p: [T]; every row alone where nothing is said.

    lengths: Of the axes, for rows of tiles.  clusters: Of every row and head, i64[H, T].
    """
    if query is not None and clusters is not None:
        return _clusters(clusters)
    if query is not None and query.tile is not None:
        assert lengths is not None, "tiles are of axes"
        return _tiles(tile_of(p, lengths, query.tile), p)
    each = torch.arange(len(p), device=p.device)
    if query is not None and query.block is not None:
        blocks, row = torch.unique_consecutive(p // query.block, return_inverse=True)
        members = torch.full((len(blocks), query.block), -1, device=p.device)
        members[row, p % query.block] = each
        first = blocks * query.block
        return Together(row=row, first=first, last=first + query.block - 1, members=members)
    if query is not None and query.last is not None:
        last = p[-1:]
        asked = each[-query.last :].expand(len(last), -1)
        return Together(row=torch.zeros_like(each), first=last, last=last, members=asked)
    return Together(row=each, first=p, last=p, members=each[:, None])


def _tiles(tile: Tensor, p: Tensor) -> Together:
    """The rows of every tile that has one.  tile: [T]"""
    found, row, counts = tile.unique(return_inverse=True, return_counts=True)
    at = row.argsort(stable=True)
    slot = torch.arange(len(p), device=p.device) - (counts.cumsum(0) - counts)[row[at]]
    width = int(counts.max()) if len(p) else 0
    members = torch.full((len(found), width), -1, device=p.device)
    members[row[at], slot] = at
    first, last = (p[members[:, :1].flatten()], p[members.amax(1)]) if len(p) else (p, p)
    return Together(row=row, first=first, last=last, members=members)


def _clusters(cluster: Tensor) -> Together:
    """Rows of one cluster, head by head, which lie anywhere: nothing here is causal.  [H, T]"""
    H, T = cluster.shape
    found = cluster.unique()  # those that have a row of some head
    row = torch.searchsorted(found, cluster)
    at = row.argsort(dim=-1, stable=True)
    of = row.gather(-1, at)
    counts = torch.zeros(H, len(found), dtype=torch.long, device=cluster.device)
    counts.scatter_add_(-1, of, torch.ones_like(of))
    place = torch.arange(T, device=cluster.device) - (counts.cumsum(-1) - counts).gather(-1, of)
    members = cluster.new_full((H, len(found), int(counts.max()) if T else 0), -1)
    head = torch.arange(H, device=cluster.device)[:, None].expand(H, T)
    members[head, of, place] = at
    where = torch.zeros_like(found)
    return Together(row=row[0], first=where, last=where, members=members[0], by_head=(row, members))


def of_rows(y: Tensor, groups: Together) -> Tensor:
    """Every row with what is its group's.  [R, H, ...] -> [T, H, ...]"""
    if groups.by_head is None:
        return y[groups.row]
    row, _ = groups.by_head
    y = y.repeat_interleave(len(row) // y.shape[1], 1)
    return y[row.T, torch.arange(len(row), device=row.device)]


def asked_of(y: Tensor, chooser: Together, groups: Together) -> Tensor:
    """What groups have of rows that agree: any of theirs tells it.  [R', H, ...] -> [R, H, ...]"""
    if groups.by_head is None:
        asked = groups.members.amax(1) if len(groups.last) else groups.last
        return y[chooser.row[asked]]
    each = of_rows(y, chooser)  # [T, H, ...]
    _, members = groups.by_head
    each = each.repeat_interleave(len(members) // each.shape[1], 1)
    asked = members.amax(-1).clamp(min=0).T  # [R, H]
    return each[asked, torch.arange(len(members), device=asked.device)]


def pooled_queries(level: Level, q: Tensor, groups: Together, Hkv: int) -> Tensor:
    """The queries that score: those of rows, or one a group.  [T, Hq, D] -> [R or T, H, D]"""
    query = level.query
    if query is None:
        return q
    if query.heads is not None:
        heads = Hkv if level.score.share == "group" else 1
        q = q.unflatten(1, (heads, -1)).mean(2)
    return q if query.pool is None else _one_query(query.pool, q, groups)


def _one_query(how: str, q: Tensor, groups: Together) -> Tensor:
    members = groups.members
    there = (members >= 0)[..., None, None]
    rows = q[members.clamp(min=0)]  # [R, M, H, D]
    if groups.by_head is not None:
        members = groups.by_head[1].permute(1, 2, 0)  # [R, M, H]
        there = (members >= 0)[..., None]
        rows = q[members.clamp(min=0), torch.arange(q.shape[1], device=q.device)]
    zeroed = rows.masked_fill(~there, 0.0)
    match how:
        case "mean":
            return zeroed.sum(1) / there.sum(1).clamp(min=1)
        case "max":
            return rows.masked_fill(~there, -math.inf).amax(1)
        case "first" if groups.by_head is not None:  # a row there is, or none at all
            return rows[:, 0]
        case "first":
            first = (members >= 0).int().argmax(1)
            return rows[torch.arange(len(rows), device=q.device), first]
        case "antidiagonal":
            return zeroed.flip(1).transpose(1, 2).flatten(2) / members.shape[1]
        case _:
            raise AssertionError(f"unknown pooling of queries {how!r}")


def reduced(how: str, scores: Tensor, seen: Tensor, members: Tensor) -> Tensor:
    """Scores of rows as scores of groups.  [T, H, N], bool[T, 1 or H, N] -> [R, H, N]

    What a row does not see counts 0, or for the maximum -inf.
    """
    empty = -math.inf if how == "max" else 0.0
    there = (members >= 0)[..., None, None]
    rows = scores.masked_fill(~seen, empty)[members.clamp(min=0)].masked_fill(~there, empty)
    match how:
        case "sum":
            return rows.sum(1)
        case "mean":
            return rows.sum(1) / there.sum(1)
        case "max":
            return rows.amax(1) if rows.shape[1] else rows.sum(1)
        case _:
            raise AssertionError(f"unknown reduction of rows {how!r}")


def groups_of(fine: Together, coarse: Together) -> Tensor:
    """The groups of `fine` that each group of `coarse` asks, once each.  -> i64[R, M], -1 for none"""
    R, F = len(coarse.first), len(fine.first)
    if not R:  # no rows
        return coarse.members
    asks = torch.zeros(R, F + 1, dtype=torch.bool, device=fine.row.device)
    rows = torch.where(coarse.members >= 0, fine.row[coarse.members.clamp(min=0)], F)
    asks.scatter_(1, rows, torch.ones_like(rows, dtype=torch.bool))
    asked = asks[:, :F]
    most = int(asked.sum(1).max())
    groups = torch.arange(F, device=fine.row.device).expand(R, F)
    ordered = groups.masked_fill(~asked, F).sort(1).values[:, :most]
    return ordered.masked_fill(ordered == F, -1)
