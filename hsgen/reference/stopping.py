"""Early stop: how far a tile of rows walks down a ranking."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hsgen.reference.attention import sum_of_branch
from hsgen.reference.choice import order
from hsgen.reference.rows import Rows
from hsgen.reference.scores import dot
from hsgen.spec import EarlyStop, Level


def walk(rows: Rows, level: Level, scores: Tensor, candidates: Tensor, forced: Tensor) -> Tensor:
    """The entries of a level that each row walks.  All [T, Hs, N]"""
    assert level.select is not None
    stop = level.select.early_stop
    assert stop is not None, f"{level.name} is no level to walk"
    q, k = rows.x["q"].detach(), rows.x["k"].detach()
    logits = dot(q, k) * q.shape[-1] ** -0.5  # [T, Hq, S]
    token = torch.arange(len(k), device=k.device)
    if rows.spec.causal:
        logits = logits.masked_fill((token > rows.p[:, None])[:, None], -math.inf)
    start = q.new_full(q.shape[:2], -math.inf)
    if stop.after is not None:
        start = sum_of_branch(rows, stop.after).detach()
    top = torch.cat((logits, start[..., None]), -1).amax(-1)
    top = top.masked_fill(top == -math.inf, 0.0)
    entry = rows.layouts[level.name].entry_of
    assert entry is not None, "entries that are walked do not overlap"
    weight = (logits - top[..., None]).exp().masked_fill((entry < 0).any(0), 0.0)
    adds = torch.zeros(*q.shape[:2], scores.shape[-1], dtype=q.dtype, device=q.device)
    spread = entry.clamp(min=0).repeat_interleave(q.shape[1] // len(entry), 0)
    adds.scatter_add_(-1, spread.expand(len(q), -1, -1), weight)
    heads = q.shape[1] // scores.shape[1]
    adds = adds.masked_fill(~candidates.repeat_interleave(heads, 1), 0.0)
    ranking = order(scores, candidates, forced & candidates)
    tile = rows.p // stop.rows
    taken = _walked(stop, ranking, heads, adds, (start - top).exp(), tile)
    return torch.zeros_like(candidates).scatter_(-1, ranking, taken) & candidates


def _walked(
    stop: EarlyStop, ranking: Tensor, heads: int, adds: Tensor, start: Tensor, tile: Tensor
) -> Tensor:
    """How much of the ranking is walked before a tile stops.  -> bool[T, Hs, N], by place

    Args:
        stop: What the spec says.
        ranking: Entries, best first, [T, Hs, N]; the same in every row of a tile.
        heads: Query heads of one head that chooses.
        adds: What an entry adds to the sum of each row and head, [T, Hq, N].
        start: That sum before the walk, [T, Hq].
        tile: The tile of every row, i64[T].
    """
    _, Hs, N = ranking.shape
    steps = -(-N // stop.entries)
    gain = adds.gather(-1, ranking.repeat_interleave(heads, 1))
    gain = F.pad(gain, (0, steps * stop.entries - N)).unflatten(-1, (steps, stop.entries)).sum(-1)
    left_with = start.unsqueeze(-1) + gain.cumsum(-1)  # [T, Hq, steps]
    little = (gain < stop.gain * left_with) | (gain == 0)
    little = little.unflatten(1, (Hs, heads)).all(2)
    for rows in (tile == i for i in tile.unique()):
        little[rows] = little[rows].all(0)
    stopped = little.int().cumsum(-1) - little.int() > 0  # by a step before
    return (~stopped).repeat_interleave(stop.entries, -1)[..., :N]
