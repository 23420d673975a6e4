"""What makes heads agree on a score, and how scores are carried to another level."""

import triton
import triton.language as tl


@triton.jit
def sum_heads(x, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """[TOKENS * HEADS, N] -> [TOKENS, N]"""
    return tl.sum(tl.reshape(x, [TOKENS, HEADS, x.shape[1]]), 1)


@triton.jit
def max_heads(x, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """[TOKENS * HEADS, N] -> [TOKENS, N]"""
    return tl.max(tl.reshape(x, [TOKENS, HEADS, x.shape[1]]), 1)


@triton.jit
def overlap_weight(offset, SOURCE: tl.constexpr, TARGET: tl.constexpr):
    """How often source entry j * TARGET + offset counts in target entry j (NSA, eq. 9).

    The convolution of SOURCE ones (source size / stride) with TARGET ones (target size / stride),
    starting at offset 1 - SOURCE: a trapezoid.
    """
    rise = offset + SOURCE
    fall = TARGET - offset
    return tl.minimum(tl.minimum(rise, fall), min(SOURCE, TARGET)).to(tl.float32)
