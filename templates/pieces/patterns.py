"""Distances between units of tokens that a pattern shows, and steps that are left out."""

import triton
import triton.language as tl


@triton.jit
def powers_below(x):
    """How many powers of two, from 1 on, are less than x."""
    count = x * 0
    while (count < 30) & ((1 << count) < x):
        count += 1
    return count


@triton.jit
def power_of(n):
    """2^n, of n from 0 to 30."""
    return 1 << tl.minimum(tl.maximum(n, 0), 30)


@triton.jit
def is_power(d):
    """Whether a distance, which is not negative, is 0 or a power of two."""
    return (d & (d - 1)) == 0


@triton.jit
def past(step, first, left_out):
    """Which of all steps it is of those without `left_out` steps after the first ones."""
    return step + tl.where(step < first, 0, left_out)
