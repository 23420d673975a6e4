"""What the graph's interpreter makes of trees, runs, anchors and halves: loops over plain numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hsgen.graph import Anchors, Assign, Entropies, Runs


def assign(op: Assign, keys: Tensor, centroids: Tensor, above: Tensor | None = None) -> Tensor:
    """[B, S, H, D], [H, N, D], [B, S, H] -> [B, S, H], token by token."""
    B, S, H, _ = keys.shape
    if op.takes is not None:
        return _taken(op, keys, centroids)
    found = torch.full((B, S, H), -1)
    for b, h in ((b, h) for b in range(B) for h in range(H)):
        cosines = []
        for s in range(S):
            parent = 0 if above is None else int(above[b, s, h])
            children = range(parent * op.branching, (parent + 1) * op.branching)
            near = {e: _cosine(keys[b, s, h], centroids[h, e]) for e in children if parent >= 0}
            best = max(near, key=lambda e: (near[e], -e)) if near else -1  # noqa: B023
            cosines.append(near.get(best, 0.0))
            found[b, s, h] = best
        if op.capacity is not None:
            room = math.ceil(op.capacity * S / op.nodes)
            for e in range(op.nodes):
                members = [s for s in range(S) if found[b, s, h] == e]
                nearest = sorted(members, key=lambda s: (-cosines[s], s))  # noqa: B023
                found[b, nearest[room:], h] = -1
    return found


def _taken(op: Assign, keys: Tensor, centroids: Tensor) -> Tensor:
    """Node by node the tokens that it takes.  -> [B, S, H, N]"""
    B, S, H, _ = keys.shape
    found = torch.zeros(B, S, H, op.nodes, dtype=torch.int64)
    for b, h, e in ((b, h, e) for b in range(B) for h in range(H) for e in range(op.nodes)):
        near = {s: _cosine(keys[b, s, h], centroids[h, e]) for s in range(S)}
        for s in sorted(near, key=lambda s: (-near[s], s))[: op.takes]:  # noqa: B023
            found[b, s, h, e] = 1
    return found


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / max(float(a @ a) ** 0.5, 1e-12) / max(float(b @ b) ** 0.5, 1e-12)


def runs(op: Runs, x: Tensor) -> Tensor:
    """Starts [B, S], or keys [B, S, H, D] -> the run of every token, [B, S]"""
    B, S = x.shape[:2]
    found = torch.zeros(B, S, dtype=torch.int64)
    for b in range(B):
        if op.span is None:
            begins = {s for s in range(S) if x[b, s] != 0}
        else:
            begins = _changes(op.span, op.threshold or 0.0, x[b])
        run = 0
        for s in range(S):
            run += s in begins and s > 0
            found[b, s] = run
    return found


def _changes(span: int, threshold: float, keys: Tensor) -> set[int]:
    """Where keys before and after are least alike.  [S, H, D]"""
    S, H, _ = keys.shape
    alike = {}
    for s in range(1, S):
        sides = keys[max(0, s - span) : s].mean(0), keys[s : s + span].mean(0)
        alike[s] = sum(_cosine(sides[0][h], sides[1][h]) for h in range(H)) / H
    near = {s: [u for u in alike if abs(u - s) < span] for s in alike}
    least = {s for s in alike if min(near[s], key=lambda u: (alike[u], u)) == s}
    return {s for s in least if alike[s] < threshold}


def anchors_behind(op: Anchors, p: int) -> list[int]:
    """The anchors of a row at position p, the oldest first."""
    found, i = [], op.first
    while p + 1 - i**op.power >= 0:
        found.insert(0, p + 1 - i**op.power)
        i += 1
    return found


def halved(dots: list[float], start: int, size: int, until: int) -> float:
    """The best logit that halving an interval comes upon; a token that is not there has -inf."""
    best, left, right = -math.inf, start, start + size
    while right - left > until:
        middle = (left + right) // 2
        probes = (left + middle) // 2, (middle + right) // 2
        earlier, later = (dots[s] if s < len(dots) else -math.inf for s in probes)
        best = max(best, earlier, later)
        left, right = (left, middle) if earlier > later else (middle, right)
    return best


def drawn(seed: int, head: int, entry: int, count: int) -> int:
    """The token that stands for an entry, as docs/decisions.md has it."""
    h = (seed * 0x9E3779B1 + head * 0x85EBCA6B + entry * 0xC2B2AE35) % 2**32
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return (h ^ h >> 16) * count // 2**32


def entropies(op: Entropies, operands: list[Tensor]) -> Tensor:
    """Key by key and query by query, down the tree; mean over sequences, all of one length."""
    parts = []
    for b in range(len(operands[0])):
        for side in (0, 1):
            heads = operands[1].shape[2]
            node = {}
            for at, branching in enumerate(op.branching):
                x = operands[3 * at + side][b].unflatten(1, (heads, -1))
                centroids = operands[3 * at + 2]
                by_head = [
                    _affinity(op, x[:, h], centroids[h], branching, node, h) for h in range(heads)
                ]
                parts.append(torch.stack(by_head).mean())
    return torch.stack(parts).mean()


def _affinity(
    op: Entropies,
    x: Tensor,
    centroids: Tensor,
    branching: int,
    node: dict[tuple[int, int, int], int],
    h: int,
) -> Tensor:
    """One level and head.  x: [M, G, D]; node: where each is, and then where it goes"""
    doubts, total = [], torch.zeros(len(centroids), dtype=torch.float64)
    for m, g in ((m, g) for m in range(x.shape[0]) for g in range(x.shape[1])):
        parent = node.get((h, m, g), 0)
        children = range(parent * branching, (parent + 1) * branching)
        cosines = torch.tensor(
            [_cosine(x[m, g], centroids[e]) for e in children], dtype=torch.float64
        )
        p = (cosines.double() / op.temperature).softmax(0)
        doubts.append(float(-(p * p.log()).sum()))
        total[list(children)] += p
        node[h, m, g] = children[int(cosines.argmax())]
    mean = total / len(doubts)
    balance = -sum(float(share) * math.log(share) for share in mean if share > 0)
    return torch.tensor(sum(doubts) / len(doubts) - op.balance * balance, dtype=torch.float64)
