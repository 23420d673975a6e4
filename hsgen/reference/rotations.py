"""RoPE of what stands for several tokens, or for one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hsgen.spec import Rotate


def rotated(name: str, rotate: Rotate, y: Tensor, at: Tensor, x: Mapping[str, Tensor]) -> Tensor:
    """Turn pairs of channels by their positions.  y: [N, ..., D], at: [N]

    Tables have positions of keys: what lies behind the last one is turned as that is.
    """
    n = rotate.dims
    start = 0 if rotate.channels == "first" else y.shape[-1] - n
    if rotate.base is None:
        cos, sin = x[f"cos_{name}"], x[f"sin_{name}"]
        if not len(cos):  # no key, so nothing is scored
            return y
        cos, sin = (z[at.clamp(max=len(z) - 1)] for z in (cos, sin))
    else:
        pair = torch.arange(n // 2, device=y.device, dtype=y.dtype)
        angle = at.to(y.dtype)[:, None] * rotate.base ** (-2 * pair / n)
        cos, sin = angle.cos(), angle.sin()
    cos, sin = (z.view(len(z), *(1,) * (y.ndim - 2), n // 2) for z in (cos, sin))
    turned = y[..., start : start + n]
    if rotate.pairs == "halves":
        a, b = turned[..., : n // 2], turned[..., n // 2 :]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    else:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((y[..., :start], turned, y[..., start + n :]), -1)
