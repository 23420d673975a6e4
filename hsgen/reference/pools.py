"""One vector an entry."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hsgen.reference.inputs import named
from hsgen.reference.layouts import Layout
from hsgen.reference.partitions import centroids, drawn
from hsgen.spec import LearnedTree, Level


def pooled_entries(level: Level, layout: Layout, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """One vector an entry of what is scored, and of values: key [N, H, D], value [N, Hkv, Dv]."""
    pool = level.pool
    by_index = level.score.by_index
    keys = x["k_index"].unsqueeze(1) if by_index else x.get(named("k", level.kv))
    if level.score.form == "bias":
        keys = x["bias"].unsqueeze(-1)  # one channel
    if pool is None or keys is None:
        pooled = {} if keys is None else {"key": keys}
        return pooled | ({"bias": x["bias"].unsqueeze(-1)} if level.score.bias else {})
    if isinstance(level.partition, LearnedTree):
        return {"key": centroids(level, x).transpose(0, 1)}
    pooled = {}
    if level.score.bias:
        pooled["bias"] = _pool(level, layout, "mean", x["bias"].unsqueeze(-1), x, "key")
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
    tokens, there = _tokens(layout, y)
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
        case "sample":
            assert level.pool is not None
            return _drawn(tokens, there, level.pool.seed or 0)
        case "linear":
            weight = x[f"{level.name}_{side}_weight"]  # [H, size, D, D]
            position = x.get(f"{level.name}_{side}_position")  # [H, size, D]
            if position is not None:
                tokens = tokens + position.transpose(0, 1)
            whole = there.all(1)
            return torch.einsum("nshd,hsde->nhe", tokens, weight).masked_fill(~whole, 0.0)
        case _:
            raise AssertionError(f"unknown pooling {how!r}")


def _drawn(tokens: Tensor, there: Tensor, seed: int) -> Tensor:
    """One token of each entry, head by head; 0 of an entry without any.  -> [N, H, D]"""
    N, _, H, D = tokens.shape
    count = there.sum(1).squeeze(-1).expand(N, H)
    head = torch.arange(H, device=tokens.device)
    entry = torch.arange(N, device=tokens.device)[:, None]
    slot = drawn(seed, head, entry, count)[:, None, :, None].expand(-1, -1, -1, D)
    return tokens.gather(1, slot).squeeze(1) if tokens.shape[1] else tokens.sum(1)


def _tokens(layout: Layout, y: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of entries, and where there are any.  [S, H, D] -> [N, M, H, D], bool[N, M, H, 1]"""
    there, slots = layout.slots >= 0, layout.slots.clamp(min=0)  # [H, N, M]
    if len(slots) == 1:
        return y[slots[0]], there[0, ..., None, None]
    head = torch.arange(len(slots), device=y.device)[:, None, None]
    return y[slots, head].permute(1, 2, 0, 3), there.permute(1, 2, 0).unsqueeze(-1)
