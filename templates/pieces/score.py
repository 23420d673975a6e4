"""What makes heads agree on a score, and how scores are carried to another level."""

import triton
import triton.language as tl


@triton.jit
def sum_heads(x, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """[N, TOKENS * HEADS] -> [N, TOKENS]"""
    return tl.sum(tl.reshape(x, [x.shape[0], TOKENS, HEADS]), 2)


@triton.jit
def max_heads(x, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """[N, TOKENS * HEADS] -> [N, TOKENS]"""
    return tl.max(tl.reshape(x, [x.shape[0], TOKENS, HEADS]), 2)


@triton.jit
def overlap_weight(offset, SOURCE: tl.constexpr, TARGET: tl.constexpr):
    """How often source entry j * TARGET + offset counts in target entry j (NSA, eq. 9).

    The convolution of SOURCE ones (source size / stride) with TARGET ones (target size / stride),
    starting at offset 1 - SOURCE: a trapezoid, 0 beside it.
    """
    rise = offset + SOURCE
    fall = TARGET - offset
    return tl.maximum(tl.minimum(tl.minimum(rise, fall), min(SOURCE, TARGET)), 0).to(tl.float32)


@triton.jit
def tap_weight(offset, FIRST: tl.constexpr, END: tl.constexpr):
    """1 for the source entries FIRST to END - 1 after j * ratio, which count in target entry j."""
    return tl.where((offset >= FIRST) & (offset < END), 1.0, 0.0)


@triton.jit
def fold_sum(x, weight):
    """Weighted sums of neighbours.  x: [N * R, TOKENS], weight: [R] -> [N, TOKENS]"""
    ratio: tl.constexpr = weight.shape[0]
    parts = tl.reshape(x, [x.shape[0] // ratio, ratio, x.shape[1]])
    return tl.sum(parts * weight[None, :, None], 1)


@triton.jit
def fold_max(x, weight):
    """The greatest of the neighbours whose weight is not 0, -inf if none.  As fold_sum"""
    ratio: tl.constexpr = weight.shape[0]
    parts = tl.reshape(x, [x.shape[0] // ratio, ratio, x.shape[1]])
    return tl.max(tl.where(weight[None, :, None] > 0.0, parts, float("-inf")), 1)
