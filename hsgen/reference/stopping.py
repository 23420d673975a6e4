"""Early stop: how far rows that choose together walk down a ranking."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hsgen.reference.attention import sum_of_branch
from hsgen.reference.choice import order
from hsgen.reference.inputs import named
from hsgen.reference.queries import Together, of_rows
from hsgen.reference.rows import Rows
from hsgen.reference.scores import dot
from hsgen.spec import EarlyStop, Level


def walk(
    rows: Rows,
    level: Level,
    scores: Tensor,
    candidates: Tensor,
    forced: Tensor,
    groups: Together,
) -> Tensor:
    """The entries of a level that each group of rows walks.  All [R, Hs, N]"""
    assert level.select is not None
    stop = level.select.early_stop
    assert stop is not None, f"{level.name} is no level to walk"
    q, k = rows.x["q"].detach(), rows.x[named("k", level.kv)].detach()
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
    of = entry.clamp(min=0).repeat_interleave(q.shape[1] // len(entry), 0)
    adds.scatter_add_(-1, of.expand(len(q), -1, -1), weight)
    heads = q.shape[1] // scores.shape[1]
    ranking = order(scores, candidates, forced & candidates)
    adds = adds.masked_fill(~of_rows(candidates, groups).repeat_interleave(heads, 1), 0.0)
    gains = adds.gather(-1, of_rows(ranking, groups).repeat_interleave(heads, 1))
    taken = _walked(stop, gains, (start - top).exp(), heads, groups.row, len(scores))
    return torch.zeros_like(candidates).scatter_(-1, ranking, taken) & candidates


def _walked(
    stop: EarlyStop, gains: Tensor, start: Tensor, heads: int, group: Tensor, groups: int
) -> Tensor:
    """How much of the ranking is walked before all rows of a group stop.  -> bool[R, Hs, N], by place

    Args:
        stop: What the spec says.
        gains: What each next entry of the ranking adds to the sum of each row and head, [T, Hq, N].
        start: That sum before the walk, [T, Hq].
        heads: Query heads of one head that chooses.
        group: The group of every row, i64[T].
        groups: How many groups there are, R.
    """
    N = gains.shape[-1]
    steps = -(-N // stop.entries)
    gain = F.pad(gains, (0, steps * stop.entries - N))
    gain = gain.unflatten(-1, (steps, stop.entries)).sum(-1)
    left_with = start.unsqueeze(-1) + gain.cumsum(-1)  # [T, Hq, steps]
    much = (gain >= stop.gain * left_with) & (gain > 0)
    much = much.unflatten(1, (-1, heads)).any(2)
    by_group = torch.zeros(groups, *much.shape[1:], dtype=torch.long, device=much.device)
    little = by_group.index_add_(0, group, much.long()) == 0
    stopped = little.int().cumsum(-1) - little.int() > 0  # by a step before
    return (~stopped).repeat_interleave(stop.entries, -1)[..., :N]
