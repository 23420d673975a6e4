"""Entries that tokens are assigned to: runs of any length, and nodes of learned trees; and anchors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from hsgen.reference.choice import ONE, fixed, order
from hsgen.reference.inputs import named
from hsgen.spec import LearnedTree, Level, Ragged, Stripes

# Runs ---------------------------------------------------------------------------------------------


def begins(level: Level, ragged: Ragged, x: Mapping[str, Tensor]) -> Tensor:
    """Whether a run begins at each token.  -> bool[S]"""
    if ragged.boundaries == "given":
        found = x[f"{level.name}_starts"] != 0
    else:
        assert ragged.span is not None
        assert ragged.threshold is not None
        alike = _likeness(x[named("k", level.kv)], ragged.span)
        found = (alike < ragged.threshold) & _least(alike, ragged.span)
    found[:1] = True
    return found


def _likeness(keys: Tensor, span: int) -> Tensor:
    """Cosine of the mean keys before and after each token, mean over heads; inf at 0.  -> [S]"""
    S = len(keys)
    alike = keys.new_full((S,), torch.inf)
    for s in range(1, S):
        before, after = keys[max(0, s - span) : s].mean(0), keys[s : s + span].mean(0)
        alike[s] = F.cosine_similarity(before, after, dim=-1).mean()
    return alike


def _least(alike: Tensor, span: int) -> Tensor:
    """Whether none within less than `span` tokens is less, or as little and earlier.  -> bool[S]"""
    S = len(alike)
    token = torch.arange(S, device=alike.device)
    near = (token[:, None] - token).abs() < span
    earlier = token[None, :] < token[:, None]
    beaten = (alike[None, :] < alike[:, None]) | ((alike[None, :] == alike[:, None]) & earlier)
    return ~(near & beaten).any(1)


# Trees --------------------------------------------------------------------------------------------


def centroids(level: Level, x: Mapping[str, Tensor]) -> Tensor:
    """Of every node, at unit length.  -> [Hkv, N, D]"""
    return F.normalize(x[f"{level.name}_centroids"], dim=-1)


def nodes(
    level: Level, tree: LearnedTree, x: Mapping[str, Tensor], parents: Tensor | None
) -> tuple[Tensor, int]:
    """The node of every token, -1 of none, and how many nodes there are.  -> i64[Hkv, S], N

    parents: i64[Hkv, S], the nodes of the level above.
    """
    keys = F.normalize(x[named("k", level.kv)].detach(), dim=-1)
    alike = torch.einsum("shd,hnd->hsn", keys, centroids(level, x).detach())
    N = alike.shape[-1]
    parent = torch.arange(N, device=alike.device) // tree.branching
    siblings = alike
    if parents is not None:
        siblings = alike.masked_fill(parents[:, :, None] != parent, -torch.inf)
    node = siblings.argmax(-1)
    if parents is not None:
        node = node.masked_fill(parents < 0, -1)
    if tree.capacity is not None and len(keys):
        node = _within_capacity(node, alike, tree.capacity)
    return node, N


def taken_by_nodes(level: Level, most: int, x: Mapping[str, Tensor]) -> Tensor:
    """The tokens that every node takes, ascending.  -> i64[Hkv, N, min(most, S)]"""
    keys = F.normalize(x[named("k", level.kv)].detach(), dim=-1)
    alike = torch.einsum("shd,hnd->hns", keys, centroids(level, x).detach())
    there = torch.ones_like(alike, dtype=torch.bool)
    return order(alike, there, ~there)[..., :most].sort(-1).values


def _within_capacity(owner: Tensor, alike: Tensor, capacity: float) -> Tensor:
    """The members of largest cosine, of equals the earlier; the others lose their node."""
    S, N = alike.shape[1:]
    most = -(-fixed(capacity, up=False) * S // (ONE * N))
    member = owner[:, :, None] == torch.arange(N, device=owner.device)  # [H, S, N]
    by_node = alike.transpose(1, 2)
    ranking = order(by_node, member.transpose(1, 2), torch.zeros_like(member.transpose(1, 2)))
    early = torch.arange(S, device=owner.device) < most
    kept = torch.zeros_like(ranking, dtype=torch.bool)
    kept = kept.scatter_(-1, ranking, early.expand_as(ranking)) & member.transpose(1, 2)
    return owner.masked_fill(~kept.any(1), -1)


# Drawing one token of an entry --------------------------------------------------------------------

_MASK = (1 << 32) - 1


def drawn(seed: int, head: Tensor, entry: Tensor, count: Tensor) -> Tensor:
    """The slot of an entry of `count` tokens that stands for it; docs/decisions.md has the hash."""
    h = (seed * 0x9E3779B1 + head * 0x85EBCA6B + entry * 0xC2B2AE35) & _MASK
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK
    h = h ^ (h >> 16)
    return (h * count) >> 32


# Anchors ------------------------------------------------------------------------------------------


def anchors(stripes: Stripes, p: Tensor, S: int) -> tuple[Tensor, Tensor]:
    """The token of every entry of a row, and whether it is one.  -> i64[T, N], bool[T, N]"""
    most = int(p.max()) + 1 if len(p) else 0
    steps = [i for i in range(stripes.first, most + 1) if i**stripes.power <= most]
    back = torch.tensor([i**stripes.power for i in steps], dtype=torch.long, device=p.device)
    reach = p[:, None] + 1 - back  # nearest first
    many = (reach >= 0).sum(1, keepdim=True)
    entry = torch.arange(len(steps), device=p.device)
    token = reach.gather(1, (many - 1 - entry).clamp(min=0)) if steps else reach
    return token.clamp(0, max(S - 1, 0)), (entry < many) & (token < S)
