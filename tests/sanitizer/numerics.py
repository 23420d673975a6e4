"""Honest arithmetic on formats that numpy lacks: bf16 (kept as uint16) and fp8 (kept as uint8).

The stock interpreter multiplies and adds the bit patterns and truncates on the way down.  Here values
are widened to fp32, computed there and rounded to nearest even, as the hardware does.  Narrowing to
fp8 saturates at the largest finite value, as `cvt.rn.satfinite` does.
"""

import numpy as np
import torch
import triton.language as tl

FLOAT8 = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
EMULATED = frozenset(dtype.name for dtype in (tl.bfloat16, *FLOAT8))
BF16_NAN = np.uint16(0x7FC0)


def is_emulated(dtype):
    """Whether `dtype` is a format whose numpy data are bit patterns rather than values."""
    return dtype.name in EMULATED


def decode(data, dtype):
    """Bit patterns of `dtype` -> the values as fp32; other formats pass through."""
    if dtype.name not in EMULATED:
        return data
    if dtype == tl.bfloat16:
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    bits = torch.from_numpy(np.array(data, dtype=np.uint8, order="C"))
    return bits.view(FLOAT8[dtype]).float().numpy()


def encode(values, dtype):
    """Numbers of any numpy dtype -> bit patterns of `dtype`, rounded to nearest even."""
    values = np.array(values, dtype=np.float32, order="C")
    if dtype == tl.bfloat16:
        bits = values.view(np.uint32)
        half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
        return np.where(np.isnan(values), BF16_NAN, rounded)
    kind = FLOAT8[dtype]
    limit = torch.finfo(kind).max
    return torch.from_numpy(values).clamp(-limit, limit).to(kind).view(torch.uint8).numpy()


def round_tf32(values):
    """fp32 -> what a tensor core keeps of it in TF32: 10 bits of mantissa."""
    bits = np.array(values, dtype=np.float32, order="C").view(np.uint32)
    half = np.uint32(0x0FFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    rounded = ((bits + half) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)
