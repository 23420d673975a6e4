"""Tokens along three axes in the order of tiles: the token of a slot, how many tiles have one, whose one is.

A tile has T0 by T1 by T2 steps, and as many slots; its tokens come in their order.  The last tiles of the
second and third axis, of L1 and L2 steps, are cut off; the first axis has no end here, the sequence has.
"""

import triton
import triton.language as tl


@triton.jit
def slot_token(
    tile,
    slot,
    L1: tl.constexpr,
    L2: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    T2: tl.constexpr,
):
    """The token of a tile's slot, -1 of none, whatever the length of the sequence."""
    across: tl.constexpr = (L2 + T2 - 1) // T2
    slab: tl.constexpr = (L1 + T1 - 1) // T1 * across
    b = tile % slab // across * T1
    c = tile % across * T2
    high = tl.minimum(T1, L1 - b)
    wide = tl.minimum(T2, L2 - c)
    i = slot // (high * wide)
    j = slot // wide % high
    token = ((tile // slab * T0 + i) * L1 + b + j) * L2 + c + slot % wide
    return tl.where(i < T0, token, -1)


@triton.jit
def tiles_begun(
    tokens,
    L1: tl.constexpr,
    L2: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    T2: tl.constexpr,
):
    """How many tiles have one of the first tokens: they come before the others."""
    across: tl.constexpr = (L2 + T2 - 1) // T2
    slab: tl.constexpr = (L1 + T1 - 1) // T1 * across
    plane = tokens // (L1 * L2)
    line = tokens % (L1 * L2) // L2
    rest = tokens % L2
    begun = line // T1 * across
    begun += tl.where(line % T1 > 0, across, (rest + T2 - 1) // T2)
    return plane // T0 * slab + tl.where(plane % T0 > 0, slab, begun)


@triton.jit
def find_tile(SLOTS, num_sequences, tile, COLUMN: tl.constexpr, SIZE: tl.constexpr):
    """The sequence of one of the tiles of SIZE slots that lie one behind another, and its number within it.

    SLOTS is int32[Z, 6], of which COLUMN says where slots of each begin.  A tile behind all is the last's.
    """
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(SLOTS + middle * 6 + COLUMN) <= tile * SIZE
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low, tile - tl.load(SLOTS + low * 6 + COLUMN) // SIZE
