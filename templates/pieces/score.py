"""What makes heads agree on a score, and how scores are carried to another level."""

import triton
import triton.language as tl

# Where heads are reduced, the (token, head) pairs of a tile lie so that in scores [keys, rows],
# as a dot leaves them, all heads of a token are one thread's: of every 8 columns, the thread c of
# four has 2c and 2c + 1.


@triton.jit
def token_of(row, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """The token of a row of the tile.  row: [M] -> [M]"""
    if TOKENS % 4 == 0 and HEADS % 2 == 0:
        token = row % 8 // 2 * (TOKENS // 4) + row // 8 // (HEADS // 2)
    else:
        token = row // HEADS
    return token


@triton.jit
def head_of(row, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """The head of a row of the tile.  row: [M] -> [M]"""
    if TOKENS % 4 == 0 and HEADS % 2 == 0:
        head = row // 8 % (HEADS // 2) * 2 + row % 2
    else:
        head = row % HEADS
    return head


@triton.jit
def token_at(column, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """The token of a column of reduced scores.  column: [TOKENS] -> [TOKENS]"""
    if TOKENS % 4 == 0 and HEADS % 2 == 0:
        token = column % 4 * (TOKENS // 4) + column // 4
    else:
        token = column
    return token


@triton.jit
def sum_heads(x, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """[N, TOKENS * HEADS] -> [N, TOKENS], whose columns `token_at` names"""
    if TOKENS % 4 == 0 and HEADS % 2 == 0:
        pairs = tl.reshape(x, [x.shape[0], TOKENS // 4, HEADS // 2, 4, 2])
        found = tl.reshape(tl.sum(tl.sum(pairs, 4), 2), [x.shape[0], TOKENS])
    else:
        found = tl.sum(tl.reshape(x, [x.shape[0], TOKENS, HEADS]), 2)
    return found


@triton.jit
def max_heads(x, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """As sum_heads, the greatest"""
    if TOKENS % 4 == 0 and HEADS % 2 == 0:
        pairs = tl.reshape(x, [x.shape[0], TOKENS // 4, HEADS // 2, 4, 2])
        found = tl.reshape(tl.max(tl.max(pairs, 4), 2), [x.shape[0], TOKENS])
    else:
        found = tl.max(tl.reshape(x, [x.shape[0], TOKENS, HEADS]), 2)
    return found


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


@triton.jit
def fold_log(p, m, weight):
    """Logarithms in base 2 of weighted sums of neighbours, p times 2^m.

    p: [M, N * R], m: [M], weight: [R] -> [M, N], -inf of a sum that is 0
    """
    ratio: tl.constexpr = weight.shape[0]
    parts = tl.reshape(p, [p.shape[0], p.shape[1] // ratio, ratio])
    return log_of(tl.sum(parts * weight[None, None, :], 2), m)


@triton.jit
def log_sum_of(x, WIDTH: tl.constexpr):
    """Base-2 logarithms of sums of 2^x over WIDTH neighbours, -inf of none.  [M, N] -> [M, N // WIDTH]"""
    parts = tl.reshape(x, [x.shape[0], x.shape[1] // WIDTH, WIDTH])
    m = tl.max(parts, 2)
    m_safe = tl.where(m == float("-inf"), 0.0, m)
    return m + tl.log2(tl.sum(tl.exp2(parts - m_safe[:, :, None]), 2))


@triton.jit
def greatest_of(x, WIDTH: tl.constexpr):
    """The greatest of WIDTH neighbours.  [M, N] -> [M, N // WIDTH]"""
    return tl.max(tl.reshape(x, [x.shape[0], x.shape[1] // WIDTH, WIDTH]), 2)


@triton.jit
def log_of(total, m):
    """Base-2 logarithms of sums [M, N], times 2^m; -inf of 0, where m may be that too.  m: [M]"""
    return tl.log2(total) + m[:, None]


@triton.jit
def fold_pairs(p, m, own, handed):
    """As fold_log, by two weights, whose results lie side by side.  -> [M, 2 * N]"""
    ratio: tl.constexpr = own.shape[0]
    parts = tl.reshape(p, [p.shape[0], p.shape[1] // ratio, ratio])
    both = tl.join(tl.sum(parts * own[None, None, :], 2), tl.sum(parts * handed[None, None, :], 2))
    return log_of(tl.reshape(both, [p.shape[0], p.shape[1] // ratio * 2]), m)


@triton.jit
def summed_heads(logits, lse, at, mask, ROWS: tl.constexpr):
    """Weights, 2^(logits - lse), summed over the heads of a row.

    logits: [ROWS * H, 1] where rows begin, lse: [ROWS * H] in base 2, at: [1, N] -> [ROWS, N]
    """
    x = tl.load(logits + at, mask=mask, other=float("-inf"))
    weight = tl.exp2(x - lse[:, None])
    return tl.sum(tl.reshape(weight, [ROWS, weight.shape[0] // ROWS, weight.shape[1]]), 1)


@triton.jit
def dot_parts(q, keys, s, PRECISION: tl.constexpr):
    """s + float32 queries . keys.  q: [M, D], keys: [D, N], s: [M, N]

    Beside keys of bfloat16 a query is three such numbers: their products are exact, and only the sums of
    channels are rounded; of other keys dots are those of float32.
    """
    if keys.dtype == tl.bfloat16:
        high = q.to(tl.bfloat16)
        rest = q - high.to(tl.float32)
        rest = tl.where(rest == rest, rest, 0.0)  # of an infinite one
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        s = tl.dot(low, keys, s, input_precision=PRECISION)
        s = tl.dot(middle, keys, s, input_precision=PRECISION)
        s = tl.dot(high, keys, s, input_precision=PRECISION)
    else:
        s = tl.dot(q, keys.to(tl.float32), s, input_precision=PRECISION)
    return s
