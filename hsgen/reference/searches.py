"""Entries that every query searches anew: halved intervals."""

from __future__ import annotations

import torch
from torch import Tensor

from hsgen.spec import Halving


def halved(halving: Halving, dots: Tensor) -> Tensor:
    """Score every interval by halving it.  dots: [R, H, S], -inf where unseen -> [R, H, N]

    Each interval loses the half whose middle scores less, the earlier one of equals, until it is
    `until` tokens long; its score is the best that was seen.
    """
    S = dots.shape[-1]
    N = -(-S // halving.interval)
    padded = torch.nn.functional.pad(dots, (0, N * halving.interval - S), value=-torch.inf)
    left = (torch.arange(N, device=dots.device) * halving.interval).expand(*dots.shape[:-1], N)
    best = torch.full_like(padded[..., :N], -torch.inf)
    width = halving.interval
    while width > halving.until:
        width //= 2
        earlier = padded.gather(-1, left + width // 2)
        later = padded.gather(-1, left + width + width // 2)
        best = torch.maximum(best, torch.maximum(earlier, later))
        left = torch.where(earlier > later, left, left + width)
    return best
