"""What vectors become when they are kept in fewer bits; scores are then of these, exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from hsgen.spec import Stored

_GREATEST = 448.0  # of float8 e4m3
_LEVELS = {"int8": 127, "int4": 7}  # the greatest whole number of each
_LEAST = 1e-4  # no vector's greatest number counts as less: its scale stays a normal number


def stored(x: Tensor, dtype: Stored) -> Tensor:
    """The numbers that are kept of vectors [..., D], in the dtype that they came in.

    `fp8`: e4m3 times a power of two for each vector.  `int8` and `int4`: whole numbers times a scale
    for each vector.  Gradients pass as if nothing were rounded.
    """
    if dtype == "input":
        return x
    if dtype in _LEVELS:
        return _passing(_whole(x.detach(), _LEVELS[dtype]), x)
    kept = x.detach().to(torch.bfloat16).to(x.dtype)
    if dtype == "fp8":
        scale = _power_of_two(kept.abs().amax(-1, keepdim=True).clamp(min=_LEAST) / _GREATEST)
        kept = _e4m3(kept / scale) * scale
    elif dtype == "fp8_unscaled":
        kept = _e4m3(kept)
    return _passing(kept, x)


def _whole(x: Tensor, most: int) -> Tensor:
    """To the nearest of 2 * most + 1 multiples that reach as far as a vector does, ties to even."""
    greatest = x.abs().amax(-1, keepdim=True)
    steps = (x * most / greatest.masked_fill(greatest == 0, 1.0)).round()
    return steps * (greatest / most)


def kept(entries: Tensor, dtype: torch.dtype) -> Tensor:
    """Pooled entries in the dtype of what they are pooled from, as far as that has fewer bits.

    What is beyond its range becomes its greatest number.
    """
    if torch.finfo(dtype).bits >= torch.finfo(entries.dtype).bits:
        return entries
    most = torch.finfo(dtype).max
    return _passing(entries.detach().clamp(-most, most).to(dtype).to(entries.dtype), entries)


def _passing(rounded: Tensor, x: Tensor) -> Tensor:
    """The rounded numbers themselves; gradients are those of x."""
    return rounded + (x - x.detach())


def _power_of_two(x: Tensor) -> Tensor:
    """The least power of two that is at least x > 0."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2^exponent, 0.5 <= mantissa < 1
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).to(exponent.dtype))


def _e4m3(x: Tensor) -> Tensor:
    """To the nearest e4m3 number, ties to even; what is too great becomes the greatest."""
    clamped = x.clamp(-_GREATEST, _GREATEST).float()  # exact: what comes here is a bf16 number
    return clamped.to(torch.float8_e4m3fn).to(x.dtype)
