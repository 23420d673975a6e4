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
def power_fp8(x):
    """The bits of the power of two that a vector is kept by: the least that keeps its greatest number
    at most 448.

    No vector's greatest number counts as less than 1e-4, so that the power is a normal number.
    x: f32[V, D], bf16 numbers -> i32[V]
    """
    greatest = tl.maximum(tl.max(tl.abs(x), 1), 1e-4)
    # up to the next power of two
    bits = tl.div_rn(greatest, 448.0).to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFFF) >> 23) << 23


@triton.jit
def e4m3_of(x, power):
    """The e4m3 numbers that are kept of vectors, without their power: f32[V, D], i32[V] -> f32[V, D]"""
    down = (254 << 23) - power  # its reciprocal, exact
    return round_e4m3(x * down.to(tl.float32, bitcast=True)[:, None])


@triton.jit
def byte_of_e4m3(x):
    """How e4m3 numbers are kept.  x: f32 -> u8"""
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    # three bits of the fraction; the exponent's bias is 7, not 127
    normal = (bits >> 20) - (120 << 3)
    small = (size * 512.0).to(tl.int32)
    kept = tl.where(size < 0.015625, small, normal)
    kept |= tl.where(x < 0.0, 0x80, 0)
    return tl.where(x == x, kept, 0x7F).to(tl.uint8)


@triton.jit
def whole_of(x, greatest, MOST: tl.constexpr):
    """The whole numbers that are kept of vectors, up to MOST: the nearest, ties to even; without their scale.

    x: f32[V, D], greatest: f32[V], of each vector's numbers -> f32[V, D]
    """
    steps = tl.div_rn(x * MOST, tl.where(greatest == 0.0, 1.0, greatest)[:, None])
    return (steps + 12582912.0) - 12582912.0  # whole numbers are what float32 has from 2^23 on
