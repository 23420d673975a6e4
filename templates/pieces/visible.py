"""Which entries of a level a row may use: the complete ones, and the ones it is forced to take.

Entry e covers tokens [e * STRIDE, e * STRIDE + SIZE).  p is the row's position, negative before its keys.
"""

import triton
import triton.language as tl


@triton.jit
def entry_limit(p, k_len, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """Entries that hold at least one key at all, up to the row's own when causal."""
    limit = (k_len + STRIDE - 1) // STRIDE
    if CAUSAL:
        limit = tl.minimum(limit, tl.maximum(p + STRIDE, 0) // STRIDE)
    return limit


@triton.jit
def complete_limit(
    p, k_len, SIZE: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, SHORT: tl.constexpr
):
    """Complete entries are those below this.  SHORT: the last one may be short, if not causal."""
    whole = tl.maximum(k_len + STRIDE - SIZE, 0) // STRIDE
    if CAUSAL:
        return tl.minimum(whole, tl.maximum(p + 1 + STRIDE - SIZE, 0) // STRIDE)
    elif SHORT:
        return (k_len + STRIDE - 1) // STRIDE
    else:
        return whole


@triton.jit
def is_forced(
    e,
    p,
    k_len,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The FIRST entries, and the LAST ones that end with the row's own."""
    own = tl.maximum(p + STRIDE, 0) // STRIDE - 1
    forced = (e < FIRST) | ((e > own - LAST) & (e <= own))
    return forced & (e >= 0) & (e < entry_limit(p, k_len, STRIDE, CAUSAL))


@triton.jit
def forced_group(
    e,
    p,
    k_len,
    GROUP: tl.constexpr,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Whether one of the GROUP entries from e on is forced: the first, or the nearest to the LAST ones."""
    oldest = tl.maximum(p + STRIDE, 0) // STRIDE - LAST
    near = tl.minimum(tl.maximum(e, oldest), e + GROUP - 1)
    forced = is_forced(e, p, k_len, STRIDE, FIRST, LAST, CAUSAL)
    return forced | is_forced(near, p, k_len, STRIDE, FIRST, LAST, CAUSAL)


@triton.jit
def own_tail(p, k_len, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """The entry that a row stands in, as long as it is incomplete; else -1."""
    own = tl.maximum(p + STRIDE, 0) // STRIDE - 1
    complete = own < complete_limit(p, k_len, SIZE, STRIDE, True, False)
    return tl.where(complete | (own >= entry_limit(p, k_len, STRIDE, True)), -1, own)


@triton.jit
def count_tails(p, k_len, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Whether each row has such an entry, 1 or 0.  p: [R, 1] -> [R]"""
    return tl.sum((own_tail(p, k_len, SIZE, STRIDE) >= 0).to(tl.int32), 1)
