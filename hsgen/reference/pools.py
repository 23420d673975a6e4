"""One vector an entry."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hsgen.reference.inputs import gates_of, named
from hsgen.reference.layouts import Layout, tokens_of
from hsgen.reference.partitions import centroids, drawn
from hsgen.reference.rotations import rotated
from hsgen.reference.rounding import kept
from hsgen.reference.scores import softmax
from hsgen.spec import LearnedTree, Level, Rotate

NORM_EPS = 1e-6  # what is added to the mean of squares


def pooled_entries(
    level: Level, layout: Layout, x: dict[str, Tensor], stored: torch.dtype
) -> dict[str, Tensor]:
    """One vector an entry of what is scored, and of values: key [N, H, D], value [N, Hkv, Dv].

    Keys are pooled, then normed, then rotated; or rotated token by token, and then pooled.  What is
    left is rounded once, to `stored`.
    """
    pool = level.pool
    by_index = level.score.by_index
    keys = x["k_index"].unsqueeze(1) if by_index else x.get(named("k", level.kv))
    if level.score.form == "bias":
        keys = x["bias"].unsqueeze(-1)  # one channel
    if pool is None or keys is None:
        pooled = {} if keys is None else {"key": keys}
        return pooled | ({"bias": x["bias"].unsqueeze(-1)} if level.score.bias == "learned" else {})
    if isinstance(level.partition, LearnedTree):
        return {"key": centroids(level, x).transpose(0, 1)}
    pooled = {}
    if level.score.bias == "learned":
        pooled["bias"] = _pool(level, layout, "mean", x["bias"].unsqueeze(-1), x, "key")
    if pool.keys:
        if pool.rotate and pool.rotate.at == "token":
            at = torch.arange(len(keys), device=keys.device)
            keys = rotated(level.name, pool.rotate, keys, at, x)
        key = _pool(level, layout, pool.keys, keys, x, "key")
        key = _normed(key, x[f"{level.name}_key_norm"]) if pool.then else key
        if pool.rotate and pool.rotate.at != "token":
            key = rotated(level.name, pool.rotate, key, _place(level, pool.rotate, layout), x)
        pooled["key"] = key if level.score.form == "bias" else kept(key, stored)
    if pool.values:
        value = _pool(level, layout, pool.values, x[named("v", level.kv)], x, "value")
        pooled["value"] = kept(value, stored)
    return pooled


def _place(level: Level, rotate: Rotate, layout: Layout) -> Tensor:
    """The position by which each entry's key is turned.  -> [N], also halves"""
    if rotate.at == "first":
        return layout.starts
    return layout.ends - (level.partition.size + 1) / 2


def _normed(y: Tensor, weight: Tensor) -> Tensor:
    """RMS norm.  [N, H, D], [D] -> [N, H, D]"""
    return y * (y.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt() * weight


def _pool(
    level: Level, layout: Layout, how: str, y: Tensor, x: dict[str, Tensor], side: str
) -> Tensor:
    """Summarise every entry.  [S, H, D] -> [N, H, D]; what a linear map lacks tokens for is 0.

    minmax: [N, H, 2, D], the least and the greatest of every channel.  antidiagonal: [N, H, size D].
    """
    tokens, there = tokens_of(layout.slots, y)
    if level.pool and level.pool.series and side == "key":
        tokens = _own_series(level, tokens)
    match how:
        case "minmax":
            low = tokens.masked_fill(~there, math.inf).amin(1)
            return torch.stack((low, _greatest(tokens, there)), 2)
        case "linear" | "mlp":
            return _mapped(level, tokens, there, x, side)
        case "sample":
            return _drawn(tokens, there, (level.pool and level.pool.seed) or 0)
        case "gated":
            return (tokens.masked_fill(~there, 0.0) * _weights(level, layout, x)).sum(1)
        case "max_min_mean":
            least = -_greatest(-tokens, there)
            parts = torch.stack((_greatest(tokens, there), least, _mean(tokens, there)), 1)
            return torch.einsum("nshd,hsde->nhe", parts, x[f"{level.name}_{side}_weight"])
        case _:
            return _plain(how, tokens, there)


def _plain(how: str, tokens: Tensor, there: Tensor) -> Tensor:
    """Of tokens alone.  [N, M, H, D], bool[N, M, H, 1] -> [N, H, D]"""
    match how:
        case "mean":
            return _mean(tokens, there)
        case "max":
            return _greatest(tokens, there)
        case "sum_rsqrt":
            count = there.sum(1).clamp(min=1).to(tokens.dtype)
            return tokens.masked_fill(~there, 0.0).sum(1) / count.sqrt()
        case "first":
            return tokens[:, 0]
        case "antidiagonal":
            return tokens.masked_fill(~there, 0.0).transpose(1, 2).flatten(2)
        case _:
            raise AssertionError(f"unknown pooling {how!r}")


def _mean(tokens: Tensor, there: Tensor) -> Tensor:
    return tokens.masked_fill(~there, 0.0).sum(1) / there.sum(1).clamp(min=1)


def _greatest(tokens: Tensor, there: Tensor) -> Tensor:
    return tokens.masked_fill(~there, -math.inf).amax(1)


def _mapped(level: Level, tokens: Tensor, there: Tensor, x: dict[str, Tensor], side: str) -> Tensor:
    """A learned map of an entry's slots, or two with relu between."""
    weight = x[f"{level.name}_{side}_weight"]  # [H, size, D, D]
    position = x.get(f"{level.name}_{side}_position")  # [H, size, D]
    out = x.get(f"{level.name}_{side}_out")  # [H, hidden, D]
    if position is not None:
        tokens = tokens + position.transpose(0, 1)
    made = torch.einsum("nshd,hsde->nhe", tokens, weight)
    if out is not None:
        made = torch.einsum("nhm,hmd->nhd", made.relu(), out)
    return made.masked_fill(~there.all(1), 0.0)


def _own_series(level: Level, tokens: Tensor) -> Tensor:
    """Of every slot the series that it takes.  [N, M, H, series, ...] -> [N, M, H, ...]"""
    stride = level.partition.stride
    slots = tokens.split(stride, 1)
    return torch.cat([part[:, :, :, i] for i, part in enumerate(slots)], 1)


def _weights(level: Level, layout: Layout, x: dict[str, Tensor]) -> Tensor:
    """Softmax over an entry's tokens, of each channel or one.  -> [N, M, H, D or 1]"""
    pool = level.pool
    assert pool is not None
    gates = x[gates_of(level)]
    gates = gates.unsqueeze(1) if level.score.by_index else gates  # [S, H, (series), (D)]
    gates = gates.unsqueeze(-1) if pool.softmax == "token" else gates
    chosen, there = tokens_of(layout.slots, gates)
    if pool.series:
        chosen = _own_series(level, chosen)
    position = x.get(f"{level.name}_key_position")  # [H, size, (D)]
    if position is not None:
        position = position.unsqueeze(-1) if pool.softmax == "token" else position
        chosen = chosen + position.transpose(0, 1)
    return softmax(chosen.transpose(1, -1), there.transpose(1, -1))[0].transpose(1, -1)


def _drawn(tokens: Tensor, there: Tensor, seed: int) -> Tensor:
    """One token of each entry, head by head; 0 of an entry without any.  -> [N, H, D]"""
    N, _, H, D = tokens.shape
    count = there.sum(1).squeeze(-1).expand(N, H)
    head = torch.arange(H, device=tokens.device)
    entry = torch.arange(N, device=tokens.device)[:, None]
    slot = drawn(seed, head, entry, count)[:, None, :, None].expand(-1, -1, -1, D)
    return tokens.gather(1, slot).squeeze(1) if tokens.shape[1] else tokens.sum(1)
