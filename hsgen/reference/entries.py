"""Which entries a level has, which of them a row may see, and which tokens they are."""

from __future__ import annotations

import torch
from torch import Tensor

from hsgen.reference.inputs import linear_sides
from hsgen.reference.rows import Rows, Scored
from hsgen.spec import Level


def first_tokens(level: Level, S: int, like: Tensor) -> Tensor:
    """First token of every entry that has a token at all.  -> [N]"""
    stride = level.partition.stride
    return torch.arange(-(-S // stride), device=like.device) * stride


def complete_entries(rows: Rows, level: Level) -> Tensor:
    """Entries whose nominal end the row has reached.  -> bool[T, N]

    Without causality all that exist: also a short last one, unless entries overlap or a linear map
    needs all of its tokens.
    """
    size, stride = level.partition.size, level.partition.stride
    starts = first_tokens(level, rows.S, rows.p)
    whole = starts + size <= rows.S
    if rows.spec.causal:
        return whole & (starts + size - 1 <= rows.p[:, None])
    short_too = size == stride and not linear_sides(level)
    return (whole | short_too).expand(len(rows.p), -1)


def begun_entries(rows: Rows, level: Level) -> Tensor:
    """Entries that have a token which the row may see.  -> bool[T, N]"""
    starts = first_tokens(level, rows.S, rows.p)
    seen = starts <= rows.p[:, None]
    return seen if rows.spec.causal else torch.ones_like(seen)


def forced_entries(rows: Rows, level: Level) -> Tensor:
    """The first entries, and the last ones up to the row's own.  -> bool[T, N]"""
    begun = begun_entries(rows, level)
    if not level.select:
        return torch.zeros_like(begun)
    force = level.select.force
    entry = torch.arange(begun.shape[-1], device=begun.device)
    own = (rows.p // level.partition.stride)[:, None]
    return ((entry < force.first) & begun) | ((entry > own - force.last) & (entry <= own))


def inside_beam(rows: Rows, level: Level, levels: dict[str, Scored]) -> Tensor:
    """Entries whose parent was selected; all where nothing narrows.  -> bool[T, Hp, N]"""
    starts = first_tokens(level, rows.S, rows.p)
    if level.within is None:
        return torch.ones(len(rows.p), 1, len(starts), dtype=torch.bool, device=starts.device)
    parent, chosen = rows.spec.level(level.within).partition, levels[level.within].chosen
    assert chosen is not None, f"{level.within} is named by `within` and must select"
    assert parent.size == parent.stride, "parents must not overlap"
    return chosen[..., starts // parent.stride]


def token_mask(level: Level, chosen: Tensor, S: int) -> Tensor:
    """Tokens of chosen entries, each once.  bool[T, Hs, N] -> bool[T, Hs, S]"""
    size, stride = level.partition.size, level.partition.stride
    token = torch.arange(S, device=chosen.device)
    mask = torch.zeros(*chosen.shape[:-1], S, dtype=torch.bool, device=chosen.device)
    for back in range(-(-size // stride)):
        entry = token // stride - back
        covers = (entry >= 0) & (token - entry * stride < size)
        mask = mask | (chosen[..., entry.clamp(min=0)] & covers)
    return mask
