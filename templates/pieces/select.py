"""The k greatest keys of each row: a bisection that counts, then places in ascending position.

Between passes a row is three numbers: every key >= high is taken, `above` of them, and of the keys
equal to low (none, once low == high) as many as are missing, the lower positions first.
"""

import triton
import triton.language as tl


@triton.jit
def count_keys(key):
    """Candidates, and the forced among them.  key: [R, N] -> [R], [R]"""
    candidates = tl.sum((key >= -0x7FFFFFFF).to(tl.int32), 1)
    return candidates, tl.sum((key == 0x7FFFFFFF).to(tl.int32), 1)


@triton.jit
def part_of(whole, UNITS: tl.constexpr):
    """UNITS / 2^30 of whole numbers, rounded up."""
    return ((whole.to(tl.int64) * UNITS + 0x3FFFFFFF) >> 30).to(tl.int32)


@triton.jit
def budget_of(candidates, kept, whole):
    """The part of the candidates that a number kept is of a whole, rounded up.  i32[R]"""
    return ((candidates.to(tl.int64) * kept + whole - 1) // whole).to(tl.int32)


@triton.jit
def mass_of(score):
    """Scores as whole numbers of 2^-30: the nearest, of two the even one; none below 0, NaN is 0.  -> i64"""
    units = score * 1073741824.0  # exact: a power of two
    units = tl.where(units > 0.0, tl.minimum(units, 17592186044416.0), 0.0)
    whole = units.to(tl.int64)
    rest = units - whole.to(tl.float32)
    up = (rest > 0.5) | ((rest == 0.5) & (whole % 2 == 1))
    return whole + up.to(tl.int64)


@triton.jit
def share_of(whole, UNITS: tl.constexpr):
    """UNITS / 2^30 of whole numbers, rounded up, also of those whose product has more than 64 bits.  i64"""
    return (whole >> 30) * UNITS + (((whole & 0x3FFFFFFF) * UNITS + 0x3FFFFFFF) >> 30)


@triton.jit
def share_below(whole, UNITS: tl.constexpr):
    """The same, rounded down.  i64"""
    return (whole >> 30) * UNITS + (((whole & 0x3FFFFFFF) * UNITS) >> 30)


@triton.jit
def mass_step(low, high, above, middle, reached, wanted):
    """Halve the interval, knowing what keys >= middle weigh: at low what is wanted, at high less.  All [R]"""
    unfinished = middle != low
    enough = reached >= wanted
    low = tl.where(unfinished & enough, middle, low)
    less = unfinished & (reached < wanted)
    return low, tl.where(less, middle, high), tl.where(less, reached, above)


@triton.jit
def mass_end(key, mass, UNITS: tl.constexpr):
    """Where the best entries of a row end whose masses reach UNITS / 2^30 of all.  [R, N] -> three [R]

    All keys >= high are taken, and so many of those that are low, see `inside_edge`.
    """
    R: tl.constexpr = key.shape[0]
    wanted = share_of(tl.sum(mass, 1), UNITS)
    above = tl.zeros([R], tl.int64)
    high = tl.full([R], 0x7FFFFFFF, tl.int32)
    low = -high
    middle = bisect_middle(low, high)
    while tl.max((middle != low).to(tl.int32), 0) > 0:
        reached = tl.sum(tl.where(key >= middle[:, None], mass, 0), 1)
        low, high, above = mass_step(low, high, above, middle, reached, wanted)
        middle = bisect_middle(low, high)
    # entries alike weigh alike
    each = tl.maximum(tl.max(tl.where(key == low[:, None], mass, 0), 1), 1)
    return low, high, ((wanted - above + each - 1) // each).to(tl.int32)


@triton.jit
def count_end(key, wanted, low, high, ties):
    """The same, or where `wanted` entries end, if these are more.  [R, N], [R] -> three [R]"""
    R: tl.constexpr = key.shape[0]
    candidates, _ = count_keys(key)
    wanted = tl.minimum(candidates, wanted)
    above = tl.zeros([R], tl.int32)
    other_high = tl.full([R], 0x7FFFFFFF, tl.int32)
    other_low = -other_high
    middle = bisect_middle(other_low, other_high)
    while tl.max((middle != other_low).to(tl.int32), 0) > 0:
        reached = tl.sum((key >= middle[:, None]).to(tl.int32), 1)
        other_low, other_high, above = mass_step(
            other_low, other_high, above, middle, reached, wanted
        )
        middle = bisect_middle(other_low, other_high)
    other_ties = wanted - above
    more = (other_low < low) | ((other_low == low) & (other_ties > ties))
    low = tl.where(more, other_low, low)
    high = tl.where(more, other_high, high)
    return low, high, tl.where(more, other_ties, ties)


@triton.jit
def inside_edge(key, low, high, ties, before):
    """Keys >= high, and of those that are low the first `ties`, `before` of them in steps before.

    key: [R, N], others: [R] -> bool[R, N], [R]
    """
    tie = (key == low[:, None]) & (key < high[:, None])
    place = before[:, None] + tl.cumsum(tie.to(tl.int32), 1)
    return (key >= high[:, None]) | (tie & (place <= ties[:, None])), tl.max(place, 1)


@triton.jit
def bisect_start(candidates, forced, k):
    """Candidates, forced among them, keys wanted: [R] -> low, high, above: [R]"""
    few = candidates <= k
    low = tl.zeros_like(candidates) - 0x7FFFFFFF
    high = tl.where(few, low, 0x7FFFFFFF)
    return low, high, tl.where(few, candidates, forced)


@triton.jit
def narrow(low, high, key):
    """The interval without what lies outside of the keys of candidates that are not forced.  -> low, high"""
    least = tl.min(tl.where(key < -0x7FFFFFFF, 0x7FFFFFFF, key), 1)
    greatest = tl.max(tl.where(key == 0x7FFFFFFF, -0x7FFFFFFF - 1, key), 1)
    least = tl.maximum(tl.minimum(least, greatest), -0x7FFFFFFF)
    done = low == high
    return tl.where(done, low, least), tl.where(done, high, greatest + 1)


@triton.jit
def narrow_unforced(low, high, key):
    """`narrow` where no candidate is forced: no candidate is the greatest of unsigned ones, less one."""
    least = tl.min(key.to(tl.uint32, bitcast=True) + 0x7FFFFFFF, 1)
    least = (least - 0x7FFFFFFF).to(tl.int32, bitcast=True)
    done = low == high
    return tl.where(done, low, least), tl.where(done, high, tl.max(key, 1) + 1)


@triton.jit
def bisect_middle(low, high):
    """Halfway, rounded down, without overflow; `low` itself: the row is done."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def between(low, high, below, above, k):
    """Where the k-th key is if keys lie evenly, `below` of them >= low and `above` >= high; as
    `bisect_middle` inside of the interval, or `low` itself.  0 <= low <= high.  All [R]
    """
    share = (below - k).to(tl.float32) / tl.maximum(below - above, 1).to(tl.float32)
    inside = ((high - low).to(tl.float32) * tl.minimum(share, 0.999)).to(tl.int32)
    return low + tl.minimum(tl.maximum(inside, 1), tl.maximum(high - low - 1, 0))


@triton.jit
def bisect_step(low, high, above, middle, count, k):
    """Halve the interval, knowing the count of keys >= middle.  All [R]"""
    unfinished = middle != low
    lower = unfinished & (count <= k)
    low = tl.where(unfinished & (count >= k), middle, low)
    high = tl.where(lower, middle, high)
    return low, high, tl.where(lower, count, above)


@triton.jit
def approach(low, high, middle, count, goal):
    """Halve the interval, or end it where the count of keys >= middle is near to the goal.  All [R]"""
    unfinished = middle != low
    near = unfinished & (tl.abs(count - goal) <= goal // 16)
    low = tl.where(unfinished & (near | (count >= goal)), middle, low)
    return low, tl.where(unfinished & (near | (count < goal)), middle, high)


@triton.jit
def quarters(low, high):
    """The middle of an interval and those of its halves: what two steps can ask for.  -> three [R]"""
    middle = bisect_middle(low, high)
    return bisect_middle(low, middle), middle, bisect_middle(middle, high)


@triton.jit
def quarter_step(low, high, above, first, middle, counts_first, counts_middle, counts_last, k):
    """Two steps of the bisection, from the counts of keys >= each of `quarters`.  All [R]"""
    low, high, above = bisect_step(low, high, above, middle, counts_middle, k)
    half = bisect_middle(low, high)
    count = tl.where(half == first, counts_first, counts_last)
    return bisect_step(low, high, above, half, count, k)


@triton.jit
def missing_ties(low, high, above, k):
    """How many keys equal to low are taken.  -> [R]"""
    return tl.where(low < high, tl.maximum(k - above, 0), 0)


@triton.jit
def place_keys(key, low, high, ties, above_before, ties_before):
    """Which keys are taken, and into which slot.  key: [R, N] -> taken, slot: [R, N], the two counts: [R]

    `ties`: keys equal to low that are taken.  One scan counts both kinds, 16 bits each: N < 32768.
    """
    above = (key >= high[:, None]).to(tl.int32)
    tie = (key == low[:, None]).to(tl.int32) * (1 - above)
    both = tl.cumsum(above + (tie << 16), 1)
    above_through = above_before[:, None] + (both & 0xFFFF)
    ties_through = ties_before[:, None] + (both >> 16)
    slot = above_through + tl.minimum(ties_through, ties[:, None]) - 1
    taken = (above + tie * (ties_through <= ties[:, None]).to(tl.int32)) > 0
    total = tl.max(both, 1)
    return taken, slot, above_before + (total & 0xFFFF), ties_before + (total >> 16)


@triton.jit
def bit_count(x):
    """How many bits of each word are 1.  u32 -> u32"""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def words_of(flags):
    """Flags as bits of words.  bool[R, N] -> u32[R, N // 32]"""
    R: tl.constexpr = flags.shape[0]
    N: tl.constexpr = flags.shape[1]
    bits = tl.reshape(flags.to(tl.uint32), [R, N // 32, 32])
    return tl.sum(bits << tl.arange(0, 32).to(tl.uint32)[None, None, :], 2)


@triton.jit
def first_bits(words, wanted):
    """Of the bits of a row of words the first ones, as many as are wanted.  u32[R, N], [R] -> u32[R, N]"""
    count = bit_count(words).to(tl.int32)
    left = wanted[:, None] - (tl.cumsum(count, 1) - count)
    # below which place of a word there are so many
    place = tl.zeros_like(words)
    for i in tl.static_range(5):
        more = place + (16 >> i)
        place = tl.where(bit_count(words & ((1 << more) - 1)).to(tl.int32) <= left, more, place)
    some = tl.where(left > 0, words & ((1 << place) - 1), 0)
    return tl.where(left >= count, words, some)
