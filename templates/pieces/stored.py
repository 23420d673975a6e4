"""Numbers as they are kept in fewer bits, held in float32.  By bits: every card has these, and none rounds
them its own way.
"""

import triton
import triton.language as tl


@triton.jit
def round_bf16(x):
    """To the nearest bf16 number, ties to even.  x: f32"""
    bits = x.to(tl.int32, bitcast=True)
    odd = (bits >> 16) & 1
    kept = ((bits + 0x7FFF + odd) >> 16) << 16
    return tl.where(x == x, kept.to(tl.float32, bitcast=True), x)


@triton.jit
def round_e4m3(x):
    """To the nearest e4m3 number, ties to even; what is too great becomes 448.  x: f32"""
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    odd = (bits >> 20) & 1
    normal = (((bits + 0x7FFFF + odd) >> 20) << 20).to(tl.float32, bitcast=True)
    # below 2^-6 numbers are multiples of 2^-9, as float32 is from 2^14 on
    small = (size + 16384.0) - 16384.0
    kept = tl.where(size < 0.015625, small, tl.where(size < 448.0, normal, 448.0))
    return tl.where(x == x, tl.where(x < 0.0, -kept, kept), x)


@triton.jit
def round_fp8(x):
    """To e4m3 times a power of two a vector: the least that keeps its greatest number at most 448.

    No vector's greatest number counts as less than 1e-4, so that the power is a normal number.
    x: f32[V, D], bf16 numbers
    """
    greatest = tl.maximum(tl.max(tl.abs(x), 1), 1e-4)
    # [V]; up to the next power of two, then its reciprocal, both exact
    bits = tl.div_rn(greatest, 448.0).to(tl.int32, bitcast=True)
    power = ((bits + 0x7FFFFF) >> 23) << 23
    down = (254 << 23) - power
    scaled = round_e4m3(x * down.to(tl.float32, bitcast=True)[:, None])
    return scaled * power.to(tl.float32, bitcast=True)[:, None]
