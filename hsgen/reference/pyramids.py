"""Entries that are attended as means of a few of their tokens, tier by tier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hsgen.reference.layouts import Layout, tokens_of
from hsgen.reference.rounding import kept
from hsgen.reference.rows import Rows, spread
from hsgen.spec import Level


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Means:
    """Means of consecutive tokens: k [M, Hkv, D], v [M, Hkv, Dv], what rows see, and how many tokens.

    visible: bool[T, H, M].  count: i64[M, H], the tokens of each mean, H is 1 where heads agree.
    """

    k: Tensor
    v: Tensor
    visible: Tensor
    count: Tensor


def means_of(rows: Rows, level: Level, merge: int, chosen: Tensor, k: Tensor, v: Tensor) -> Means:
    """The chosen entries as means of `merge` tokens.  chosen: bool[T, Hs, N]

    A mean is seen once all of its tokens are; it is rounded once, as all that is pooled.
    """
    layout = rows.layouts[level.name]
    H, _, M = layout.slots.shape
    parts = -(-M // merge)
    padded = torch.nn.functional.pad(layout.slots, (0, parts * merge - M), value=-1)
    slots = padded.unflatten(-1, (parts, merge)).flatten(1, 2)  # [H, N * parts, merge]
    there = (slots >= 0).any(-1)
    if rows.spec.causal:
        seen = there & (slots.amax(-1) <= rows.p[:, None, None])  # [T, H, N * parts]
    else:
        seen = there.expand(len(rows.p), -1, -1)
    taken = chosen.repeat_interleave(parts, -1)
    heads = max(H, chosen.shape[1])
    return Means(
        k=kept(_mean(slots, k), rows.stored),
        v=kept(_mean(slots, v), rows.stored),
        visible=spread(taken, heads) & spread(seen, heads),
        count=(slots >= 0).sum(-1).T,
    )


def _mean(slots: Tensor, y: Tensor) -> Tensor:
    tokens, there = tokens_of(slots, y)
    return tokens.masked_fill(~there, 0.0).sum(1) / there.sum(1).clamp(min=1)


def log_counts(layout: Layout, like: Tensor) -> Tensor:
    """The natural logarithm of the tokens of every entry, 0 of none.  -> [N, H]"""
    return log_of((layout.slots >= 0).sum(-1).T, like)


def log_of(count: Tensor, like: Tensor) -> Tensor:
    return count.clamp(min=1).to(like.dtype).log()
