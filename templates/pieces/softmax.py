"""The online softmax, in base 2: scores are multiplied by log2(e)."""

import triton
import triton.language as tl


@triton.jit
def softmax_step(s, m, l, SCALE: tl.constexpr):
    """One tile of scores.  s: [M, N], m, l: [M] -> p: [M, N], new m, new l, rescale of old sums.

    SCALE > 0 is log2(e) times that of the logits: s is as the dot left it, m in base 2.

    A row whose keys are all masked so far keeps m = -inf; its rescale and weights are 0, not NaN.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * SCALE)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * SCALE - m_safe[:, None])
    rescale = tl.exp2(m - m_safe)
    return p, m_new, l * rescale + tl.sum(p, 1), rescale


@triton.jit
def softmax_of(lse):
    """m in base 2 and l of an output that is normalised, by its natural log-sum-exp; -inf: no key."""
    return lse * 1.4426950408889634, tl.where(lse == float("-inf"), 0.0, 1.0)


@triton.jit
def natural_lse(m, l):
    """Natural log-sum-exp from a base-2 maximum and sum; -inf where no key was seen."""
    empty = l == 0.0
    return tl.where(
        empty, float("-inf"), (m + tl.log2(tl.where(empty, 1.0, l))) * 0.6931471805599453
    )


@triton.jit
def reciprocal_or_zero(l):
    """1 / l, and 0 for an empty row: its output is 0."""
    return tl.where(l == 0.0, 0.0, 1.0 / tl.where(l == 0.0, 1.0, l))


@triton.jit
def reciprocal_beside(m, l, sink):
    """1 / (l + the sink's own part), and 0 for an empty row.  m and sink in base 2"""
    empty = l == 0.0
    part = tl.exp2(sink - tl.where(empty, 0.0, m))
    return tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, l + part))


@triton.jit
def capped(s, SCALE: tl.constexpr, CAP: tl.constexpr):
    """Logits bounded by CAP: CAP * tanh(s * SCALE / CAP), by its series where 1 - e would cancel."""
    x = s * (SCALE / CAP)
    size = tl.abs(x)
    e = tl.exp2(size * -2.8853900817779268)
    far = tl.where(x < 0.0, e - 1.0, 1.0 - e) / (1.0 + e)
    square = x * x
    near = x * (
        1.0
        - square
        * (0.3333333333333333 - square * (0.13333333333333333 - square * 0.05396825396825397))
    )
    return CAP * tl.where(size < 0.125, near, far)


@triton.jit
def cap_slope(s, CAP: tl.constexpr):
    """How a capped logit goes with the logit that it was: 1 - (s / CAP) ** 2."""
    x = s / CAP
    return 1.0 - x * x


@triton.jit
def counted_logits(s, n, k_len, MERGE: tl.constexpr, SCALE: tl.constexpr):
    """Logits of means of MERGE tokens, and the logarithm of how many each stands for: the last has fewer.

    s: [M, N], as `softmax_step` takes it, n: [N]
    """
    count = tl.minimum(tl.maximum(k_len - n * MERGE, 1), MERGE)
    return s + (tl.log2(count.to(tl.float32)) / SCALE)[None, :]


@triton.jit
def counted_keys(s, n, k_len, MERGE: tl.constexpr, SCALE: tl.constexpr):
    """As counted_logits, of s: [N, M]."""
    count = tl.minimum(tl.maximum(k_len - n * MERGE, 1), MERGE)
    return s + (tl.log2(count.to(tl.float32)) / SCALE)[:, None]


@triton.jit
def load_lse(address, mask):
    """Log-sum-exps in base 2; of a row that saw no key, or is none, +inf: its weights are 0."""
    lse = tl.load(address, mask=mask, other=float("-inf")) * 1.4426950408889634
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def merged_lse(PART_LSE, item, splits, mask, PARTS: tl.constexpr):
    """The log-sum-exp of rows whose parts lie side by side.  item, mask: [M] -> f32[M], inf where masked"""
    part = tl.arange(0, PARTS)[None, :]
    there = mask[:, None] & (part < splits)
    each = tl.load(PART_LSE + item[:, None] + part, mask=there, other=float("-inf"))
    m = tl.max(each, 1)
    m_safe = tl.where(m == float("-inf"), 0.0, m)
    l = tl.sum(tl.exp(each - m_safe[:, None]), 1)
    lse = tl.where(l == 0.0, float("-inf"), m_safe + tl.log(tl.where(l == 0.0, 1.0, l)))
    return tl.where(mask, lse, float("inf"))


@triton.jit
def logit_step(s, m, l):
    """One tile of natural logits.  s: [M, N], m, l: [M] -> new m, new l; a count where all are alike"""
    m_new = tl.maximum(m, tl.max(s, 1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    rescale = tl.exp2((m - m_safe) * 1.4426950408889634)
    return m_new, l * rescale + tl.sum(tl.exp2((s - m_safe[:, None]) * 1.4426950408889634), 1)


@triton.jit
def softmax_mass(s, m, l):
    """What logits weigh, by the greatest and the sum that steps gave; NaN of a row without any.  -> [M, N]"""
    m_safe = tl.where(m == float("-inf"), 0.0, m)
    return tl.div_rn(tl.exp2((s - m_safe[:, None]) * 1.4426950408889634), l[:, None])


@triton.jit
def own_lse(m, l):
    """The log-sum-exp of some of a softmax's keys in base 2, by its maximum and their sum; -inf of none."""
    return tl.where(l == 0.0, float("-inf"), m + tl.log2(tl.where(l == 0.0, 1.0, l)))


@triton.jit
def merged_step(m, l, m_part, l_part):
    """A softmax's greatest logit and its sum, with those of one more part of its keys.  All [M], base 2"""
    m_new = tl.maximum(m, m_part)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, l * tl.exp2(m - m_safe) + l_part * tl.exp2(m_part - m_safe)
