"""What a selection is worth on real attention: mass recalled, output error, and what to hold it against.

Plain dense PyTorch over one GQA group, sharing nothing with what chooses.  Shapes: R measured rows, H
query heads on one kv head, Hs heads that select (H or 1), S keys, N entries of `size` tokens, one every
`stride` tokens (None: entries do not overlap).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SINK_TOKENS = 16  # what "recent + sink" keeps at the start when single tokens are selected
CHUNK = 256  # rows alive at once


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dense:
    """Attention of some rows to all that they may see.

    Attributes:
        position: i64[R].
        probs: f32[H, R, S].
        v: f32[S, Dv].
        o: f32[H, R, Dv].
        causal: Whether a row sees no later token.
    """

    position: Tensor
    probs: Tensor
    v: Tensor
    o: Tensor
    causal: bool = True

    def sees(self, tokens: Tensor, rows: slice = slice(None)) -> Tensor:
        """Which tokens each row may see.  i64[N] -> bool[R, N]"""
        seen = tokens <= self.position[rows, None]
        return seen if self.causal else torch.ones_like(seen)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Quality:
    """Of one way to choose, by head and row: f32[H, R].

    Attributes:
        kept: Tokens attended.
        mass: Share of the dense attention probability that they hold.
        error: |o - dense| / |dense|, 2-norms over the head's vector.
        o: [H, R, Dv], attention over what was kept.
    """

    kept: Tensor
    mass: Tensor
    error: Tensor
    o: Tensor


def dense(q: Tensor, k: Tensor, v: Tensor, position: Tensor, *, causal: bool = True) -> Dense:
    """Attend from rows to every visible key.  q: [R, H, D], k: [S, D], v: [S, Dv], position: i64[R]"""
    q, k, v = q.float(), k.float(), v.float()
    probs = torch.empty(q.shape[1], len(q), len(k), device=q.device)
    for a in range(0, len(q), CHUNK):
        rows = slice(a, a + CHUNK)
        logits = torch.einsum("rhd,sd->hrs", q[rows], k) * q.shape[-1] ** -0.5
        if causal:
            hidden = torch.arange(len(k), device=q.device) > position[rows, None]
            logits.masked_fill_(hidden, -math.inf)
        probs[:, rows] = logits.softmax(-1)
    return Dense(position=position, probs=probs, v=v, o=probs @ v, causal=causal)


def entry_mass(probs: Tensor, size: int, stride: int | None = None) -> Tensor:
    """Attention mass of every entry.  f32[H, R, S] -> f32[H, R, N]"""
    stride = stride or size
    entries = -(-probs.shape[-1] // stride)
    padded = torch.nn.functional.pad(probs, (0, entries * stride - probs.shape[-1] + size - stride))
    return padded.unfold(-1, size, stride).sum(-1) if size > 1 else padded


def tokens_of(chosen: Tensor, size: int, stride: int | None, tokens: int) -> Tensor:
    """Tokens of chosen entries, each once.  bool[..., N] -> bool[..., S]"""
    stride = stride or size
    if size == stride:
        return chosen.repeat_interleave(size, -1)[..., :tokens]
    token = torch.arange(tokens, device=chosen.device)
    found = torch.zeros(*chosen.shape[:-1], tokens, dtype=torch.bool, device=chosen.device)
    for back in range(-(-size // stride)):
        entry = token // stride - back
        covers = (entry >= 0) & (token - entry * stride < size)
        found = found | (chosen[..., entry.clamp(min=0)] & covers)
    return found


def keep_best(scores: Tensor, visible: Tensor, count: Tensor) -> Tensor:
    """The `count` best visible entries.  f32[Hs, R, N], bool[R, N], i64[Hs, R] -> bool[Hs, R, N]"""
    order = scores.masked_fill(~visible, -math.inf).argsort(dim=-1, descending=True, stable=True)
    early = torch.arange(scores.shape[-1], device=scores.device) < count.unsqueeze(-1)
    return torch.zeros_like(early).scatter_(-1, order, early) & visible


def keep_recent(position: Tensor, size: int, entries: int, count: Tensor) -> Tensor:
    """The sink and the latest entries, `count` in all.  i64[R], i64[Hs, R] -> bool[Hs, R, N]"""
    sink = torch.full_like(count, 1 if size > 1 else SINK_TOKENS).minimum((count - 1).clamp(min=0))
    own = position // size
    e = torch.arange(entries, device=position.device)
    recent = e > (own - (count - sink)).unsqueeze(-1)
    return (recent | (e < sink.unsqueeze(-1))) & (e <= own.unsqueeze(-1))


def keep_near(position: Tensor, size: int, entries: int, count: Tensor) -> Tensor:
    """Without causality: the sink and the entries nearest to the own one.  -> bool[Hs, R, N]"""
    e = torch.arange(entries, device=position.device)
    near = -(e - (position // size)[:, None]).abs().float()
    near = near.masked_fill(e < (1 if size > 1 else SINK_TOKENS), 1.0)
    visible = torch.ones_like(near, dtype=torch.bool)
    return keep_best(near.expand(len(count), -1, -1), visible, count)


def members(indices: Tensor, entries: int) -> Tensor:
    """A selection as sets.  i32[R, Hs, K], -1 padded -> bool[Hs, R, N]"""
    slots = torch.where(indices < 0, entries, indices).long().transpose(0, 1)
    chosen = torch.zeros(*slots.shape[:-1], entries + 1, dtype=torch.bool, device=indices.device)
    return chosen.scatter_(-1, slots, value=True)[..., :entries]


def judge(dense: Dense, chosen: Tensor, size: int, stride: int | None = None) -> Quality:
    """Compare attention over chosen entries with all of it.  chosen: bool[Hs, R, N]"""
    starts = range(0, len(dense.position), CHUNK)
    parts = [_judge_rows(dense, chosen, (size, stride), a) for a in starts]
    kept, mass, error, o = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    return Quality(kept=kept, mass=mass, error=error, o=o)


def _judge_rows(
    dense: Dense, chosen: Tensor, entry: tuple[int, int | None], a: int
) -> tuple[Tensor, ...]:
    """Kept tokens, mass and error [H, r] and output [H, r, Dv] of the rows from `a`."""
    rows = slice(a, a + CHUNK)
    probs, full = dense.probs[:, rows], dense.o[:, rows]
    S = probs.shape[-1]
    tokens = tokens_of(chosen[:, rows], *entry, S)
    tokens = tokens & dense.sees(torch.arange(S, device=probs.device), rows)
    kept = probs * tokens
    mass = kept.sum(-1)
    o = (kept @ dense.v) / mass.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    error = (o - full).norm(dim=-1) / full.norm(dim=-1)
    return tokens.sum(-1).float().expand_as(mass), mass, error, o


def overlap(chosen: Tensor, best: Tensor) -> Tensor:
    """Entries in both sets over entries in either.  bool[Hs, R, N], twice -> f32[Hs, R]"""
    return (chosen & best).sum(-1) / (chosen | best).sum(-1).clamp(min=1)


def choices(
    dense: Dense, chosen: Tensor, size: int, noise: Tensor, stride: int | None = None
) -> dict[str, Tensor]:
    """A selection beside others of the same budget, row by row, and shared by the same heads.

    Args:
        dense: The attention that it is held against.
        chosen: bool[Hs, R, N], the selection under test.
        size: Tokens an entry.
        noise: f32[R, N], what the random choice is made of.
        stride: Tokens from entry to entry.

    Returns:
        By name, bool[Hs, R, N]: `selected`; `oracle`, the entries of largest true mass, summed over
        the heads that share; `random`; `recent_sink`.
    """
    entries, count = chosen.shape[-1], chosen.sum(-1)
    mass = entry_mass(dense.probs, size, stride).unflatten(0, (len(chosen), -1)).sum(1)
    starts = torch.arange(entries, device=chosen.device) * (stride or size)
    visible = dense.sees(starts)
    recent = (
        keep_recent(dense.position, stride or size, entries, count)
        if dense.causal
        else keep_near(dense.position, stride or size, entries, count)
    )
    return {
        "selected": chosen,
        "oracle": keep_best(mass, visible, count),
        "random": keep_best(noise.expand_as(mass), visible, count),
        "recent_sink": recent,
    }
