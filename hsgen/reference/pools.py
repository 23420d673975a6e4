"""One vector an entry."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hsgen.reference.inputs import named
from hsgen.reference.layouts import Layout, tokens_of
from hsgen.spec import Level


def pooled_entries(level: Level, layout: Layout, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """One vector an entry of what is scored, and of values: key [N, H, D], value [N, Hkv, Dv]."""
    pool = level.pool
    by_index = level.score.by_index
    keys = x["k_index"].unsqueeze(1) if by_index else x.get(named("k", level.kv))
    if pool is None or keys is None:
        return {} if keys is None else {"key": keys}
    pooled = {}
    if pool.keys:
        pooled["key"] = _pool(level, layout, pool.keys, keys, x, "key")
    if pool.values:
        pooled["value"] = _pool(level, layout, pool.values, x[named("v", level.kv)], x, "value")
    return pooled


def _pool(
    level: Level, layout: Layout, how: str, y: Tensor, x: dict[str, Tensor], side: str
) -> Tensor:
    """Summarise every entry.  [S, H, D] -> [N, H, D]; what a linear map lacks tokens for is 0.

    minmax: [N, H, 2, D], the least and the greatest of every channel.
    """
    tokens, there = tokens_of(layout.slots, y)
    match how:
        case "mean":
            return tokens.masked_fill(~there, 0.0).sum(1) / there.sum(1).clamp(min=1)
        case "max":
            return tokens.masked_fill(~there, -math.inf).amax(1)
        case "minmax":
            low = tokens.masked_fill(~there, math.inf).amin(1)
            return torch.stack((low, tokens.masked_fill(~there, -math.inf).amax(1)), 2)
        case "sum_rsqrt":
            return (
                tokens.masked_fill(~there, 0.0).sum(1)
                / there.sum(1).clamp(min=1).to(y.dtype).sqrt()
            )
        case "linear":
            weight = x[f"{level.name}_{side}_weight"]  # [H, size, D, D]
            position = x.get(f"{level.name}_{side}_position")  # [H, size, D]
            if position is not None:
                tokens = tokens + position.transpose(0, 1)
            whole = there.all(1)
            return torch.einsum("nshd,hsde->nhe", tokens, weight).masked_fill(~whole, 0.0)
        case _:
            raise AssertionError(f"unknown pooling {how!r}")
