"""Keys as thresholded changes from one token to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from hsgen.spec import Delta


def from_changes(delta: Delta, k: Tensor) -> Tensor:
    """The keys that come back.  [S, H, D] -> the same; differentiable but for what is kept."""
    if not len(k):
        return k
    if delta.against == "previous":
        change = k[1:] - k[:-1]
        kept = change.masked_fill(change.detach().abs() <= delta.threshold, 0.0)
        return torch.cat((k[:1], k[:1] + kept.cumsum(0)))
    token = torch.zeros_like(k, dtype=torch.long)  # the token that each channel comes from
    values, held = k.detach(), k.detach()[0]
    for s in range(1, len(k)):
        moved = (values[s] - held).abs() > delta.threshold
        held = torch.where(moved, values[s], held)
        token[s] = torch.where(moved, s, token[s - 1])
    return k.gather(0, token)
