"""What vectors become when they are kept in fewer bits; scores are then of these, exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from hsgen.spec import Stored

_GREATEST = 448.0  # of float8 e4m3
_LEAST = 1e-4  # no vector's greatest number counts as less: its scale stays a normal number


def stored(x: Tensor, dtype: Stored) -> Tensor:
    """The numbers that are kept of vectors [..., D], in the dtype that they came in.

    `fp8`: e4m3 times a power of two for each vector.  Gradients pass as if nothing were rounded.
    """
    if dtype == "input":
        return x
    kept = x.detach().to(torch.bfloat16).to(x.dtype)
    if dtype == "fp8":
        scale = _power_of_two(kept.abs().amax(-1, keepdim=True).clamp(min=_LEAST) / _GREATEST)
        kept = _e4m3(kept / scale) * scale
    elif dtype == "fp8_unscaled":
        kept = _e4m3(kept)
    return x + (kept - x).detach()


def _power_of_two(x: Tensor) -> Tensor:
    """The least power of two that is at least x > 0."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2^exponent, 0.5 <= mantissa < 1
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).to(exponent.dtype))


def _e4m3(x: Tensor) -> Tensor:
    """To the nearest e4m3 number, ties to even; what is too great becomes the greatest."""
    clamped = x.clamp(-_GREATEST, _GREATEST).float()  # exact: what comes here is a bf16 number
    return clamped.to(torch.float8_e4m3fn).to(x.dtype)
