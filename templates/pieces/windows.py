"""Windows along an axis of n steps: which steps a row sees, and which rows see a step.

Rows of STRIDE steps have one window, that of their leader, moved inside at the ends; with CAUSAL a window
ends with the row.
"""

import triton
import triton.language as tl


@triton.jit
def group_of(i, STRIDE: tl.constexpr):
    """The rows that share a leader with a row at i, which may be negative."""
    return (i - tl.where(i < 0, STRIDE - 1, 0)) // STRIDE


@triton.jit
def window_begin(i, n, WINDOW: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """The first step that a row at i sees."""
    own = group_of(i, STRIDE) * STRIDE
    if CAUSAL:
        return tl.maximum(tl.minimum(own + STRIDE - 1, n - 1) - WINDOW + 1, 0)
    else:
        leader = tl.minimum(own + STRIDE // 2, n - 1)
        return tl.maximum(tl.minimum(leader - WINDOW // 2, n - WINDOW), 0)


@triton.jit
def window_end(i, n, WINDOW: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """The step behind the last that a row at i sees."""
    if CAUSAL:
        return tl.minimum(i + 1, n)
    else:
        return tl.minimum(window_begin(i, n, WINDOW, STRIDE, CAUSAL) + WINDOW, n)


@triton.jit
def first_taker(j, n, WINDOW: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """The first row that sees step j, where any does."""
    if CAUSAL:
        return j
    else:
        begins = j - WINDOW + 1
        group = group_of(begins + WINDOW // 2 - STRIDE // 2 + STRIDE - 1, STRIDE)
        group = tl.minimum(group, (n - 1) // STRIDE)
        return tl.where(begins <= 0, 0, tl.maximum(group, 0) * STRIDE)


@triton.jit
def last_taker(j, n, WINDOW: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """The last row that sees step j, or more than there are; -1 where none does."""
    if CAUSAL:
        group = group_of(j + WINDOW - STRIDE, STRIDE)
    else:
        group = group_of(j + WINDOW // 2 - STRIDE // 2, STRIDE)
    return tl.where(j >= n - WINDOW, 0x3FFFFFFF, group * STRIDE + STRIDE - 1)
