"""Tokens that lie along axes: where each one is, and which others lie in a window around it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hsgen.errors import ArgumentError
from hsgen.spec import GridWindow, Spec


def axis_lengths(spec: Spec, S: int) -> tuple[int, ...]:
    """Steps of every axis; the first one, where it is open, has as many as S tokens need.

    Raises:
        ArgumentError: another axis is open, or there is no place for S tokens.
    """
    assert spec.axes is not None, "something lies along `axes`"
    first, *rest = spec.axes
    inner = [n for n in rest if n != "any"]
    if len(inner) < len(rest):
        msg = (
            f"axes: expected all but the first to be bound, got [{', '.join(map(str, spec.axes))}]"
        )
        raise ArgumentError(msg, help="give `axes=` to Spec.bind")
    lengths = (-(-S // math.prod(inner)) if first == "any" else first, *inner)
    if math.prod(lengths) < S:
        msg = (
            f"axes: expected at most {math.prod(lengths)} tokens, those of {list(lengths)}, got {S}"
        )
        raise ArgumentError(msg)
    return lengths


def places(tokens: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """Where tokens are along every axis, the last axis fastest.  [...] -> one [...] an axis"""
    steps = [math.prod(lengths[a + 1 :]) for a in range(len(lengths))]
    return [
        tokens // step % length if a else tokens // step
        for a, (step, length) in enumerate(zip(steps, lengths, strict=True))
    ]


def grid_mask(spec: Spec, grid: GridWindow, p: Tensor, S: int) -> Tensor:
    """Tokens inside the window of every row, along all axes.  p: [T] -> bool[T, S]"""
    lengths = axis_lengths(spec, S)
    ones = (1,) * len(lengths)
    rows, keys = places(p, lengths), places(torch.arange(S, device=p.device), lengths)
    seen = torch.ones(len(p), S, dtype=torch.bool, device=p.device)
    for a, (n, window, stride, dilation, causal) in enumerate(
        zip(
            lengths,
            grid.window,
            grid.stride or ones,
            grid.dilation or ones,
            grid.causal or (False,) * len(lengths),
            strict=True,
        )
    ):
        i, j = rows[a][:, None], keys[a]
        steps = (n - i % dilation + dilation - 1) // dilation  # of the row's residue class
        start, end = _window(i // dilation, steps, window, stride, causal=causal)
        place = j // dilation
        seen &= (j % dilation == i % dilation) & (start <= place) & (place < end)
    return seen


def _window(
    i: Tensor, n: Tensor, window: int, stride: int, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """The first place, and the one after the last, that rows at i see, along an axis of n places."""
    leader = i // stride * stride + (stride - 1 if causal else stride // 2)
    leader = torch.minimum(leader, n - 1)
    if causal:
        return (leader - window + 1).clamp(min=0), i + 1
    start = torch.minimum((leader - window // 2).clamp(min=0), (n - window).clamp(min=0))
    return start, start + window


def tile_of(tokens: Tensor, lengths: tuple[int, ...], tile: tuple[int, ...]) -> Tensor:
    """The tile that each token is in, the last axis fastest.  [...] -> [...]"""
    found = torch.zeros_like(tokens)
    for at, n, size in zip(places(tokens, lengths), lengths, tile, strict=True):
        found = found * -(-n // size) + at // size
    return found


def tiles(lengths: tuple[int, ...], tile: tuple[int, ...]) -> int:
    """How many tiles there are, whether they have tokens or not."""
    return math.prod(-(-n // size) for n, size in zip(lengths, tile, strict=True))
