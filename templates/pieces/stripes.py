"""Anchors behind a row, at distances that grow by a power, and the spans of tokens that end at them.

A row at position p has the anchors p + 1 - i ** POWER; entry 0 is the oldest, of the greatest i.
"""

import triton
import triton.language as tl


@triton.jit
def whole_power(i, POWER: tl.constexpr):
    """i ** POWER.  i32 -> i64"""
    x = i.to(tl.int64)
    found = x
    for _ in tl.static_range(POWER - 1):
        found = found * x
    return found


@triton.jit
def whole_root(x, POWER: tl.constexpr):
    """The greatest i with i ** POWER <= x, 0 where x is below 1.  i32 -> i32"""
    x = tl.maximum(x, 0)
    i = tl.exp2(tl.log2(x.to(tl.float32)) / POWER).to(tl.int32)
    # which is one off at most
    i = i - (whole_power(i, POWER) > x).to(tl.int32)
    return i + (whole_power(i + 1, POWER) <= x).to(tl.int32)


@triton.jit
def anchors_limit(p, k_len, POWER: tl.constexpr, FIRST: tl.constexpr):
    """How many anchors a row has: those from i = FIRST on that are keys."""
    beyond = tl.maximum(whole_root(p + 1 - k_len, POWER), FIRST - 1)
    return tl.maximum(whole_root(p + 1, POWER) - beyond, 0)


@triton.jit
def anchor_of(e, p, POWER: tl.constexpr):
    """The token of an anchor.  -> i32"""
    return p + 1 - whole_power(whole_root(p + 1, POWER) - e, POWER).to(tl.int32)


@triton.jit
def span_reach(p, FACTOR: tl.constexpr, POWER: tl.constexpr):
    """How far spans reach before their anchors: FACTOR * (p + 1) ** POWER to the nearest 2^-20, rounded up.

    In float64.  The least whole number n with n + 2^-21 no less: n is even in units of 2^-20, so a half way
    to the next is rounded down to it.
    """
    x = tl.log2(tl.maximum(p + 1, 1).to(tl.float64)) * POWER
    return tl.ceil(tl.exp2(x) * FACTOR - 4.76837158203125e-07).to(tl.int32)


@triton.jit
def part_beside(lse, other):
    """What a part of a softmax weighs in it, by its log-sum-exp and that of the rest; 0 of no key."""
    return tl.where(lse == float("-inf"), 0.0, 1.0 / (1.0 + tl.exp(other - lse)))
