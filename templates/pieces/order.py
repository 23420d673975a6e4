"""The order of scores as an order of integers: forced, then by value, then NaN, then no candidate.

-0 equals +0, a subnormal equals 0.  Only integer arithmetic: no flush or fast-math mode changes it.
"""

import triton
import triton.language as tl


@triton.jit
def order_key(score):
    """float32 -> int32 that compares as the score does; NaN below -inf."""
    bits = score.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    key = tl.where(bits < 0, -magnitude, magnitude)
    key = tl.where(magnitude < 0x00800000, 0, key)
    return tl.where(magnitude > 0x7F800000, -0x7FFFFFFF, key)


@triton.jit
def rank_key(score, complete, forced):
    """The key of a candidate: forced ones above every score; no candidate: the least int32."""
    key = tl.where(complete, order_key(score), -0x7FFFFFFF - 1)
    return tl.where(forced, 0x7FFFFFFF, key)


@triton.jit
def sorted_keys(key, inside):
    """The places of keys, greatest first, of equals the earlier; those outside last.  [N] -> i32[N]"""
    N: tl.constexpr = key.shape[0]
    packed = tl.arange(0, N) - tl.where(inside, key, -0x7FFFFFFF - 1).to(tl.int64) * N
    return (tl.sort(packed) & (N - 1)).to(tl.int32)


@triton.jit
def sorted_places(weight, inside):
    """The same of weights."""
    return sorted_keys(order_key(weight), inside)


@triton.jit
def place_in(tokens, many, x):
    """How many of a list's `many` ascending tokens are less than x, one or several."""
    place = x * 0
    span = many
    while span > 0:
        half = (span + 1) // 2
        at = place + half - 1
        less = tl.load(tokens + at, mask=at < many, other=0x7FFFFFFF) < x
        place = tl.where(less, place + half, place)
        span -= half
    return place
