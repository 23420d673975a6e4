"""What entries are ordered by: form -> scale -> normalise -> reduce over heads -> map."""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import Tensor
from torch.nn import functional as F

from hsgen.reference.codes import code_matches
from hsgen.reference.entries import complete_entries, visible_entries
from hsgen.reference.inputs import named
from hsgen.reference.partitions import anchors
from hsgen.reference.pyramids import log_counts
from hsgen.reference.queries import Together, groups_of, pooled_queries, reduced
from hsgen.reference.rotations import rotated
from hsgen.reference.rounding import kept, stored
from hsgen.reference.rows import Rows, Scored, spread
from hsgen.reference.searches import halved
from hsgen.spec import Halving, Level, Ragged, Stripes


def raw_scores(level: Level, rows: Rows, groups: Together) -> Tensor:
    """Score every entry by every head, scaled, and add what asks no query.  -> [T or R, H, N]"""
    scores = _of_form(level, rows, groups)
    if rows.layouts[level.name].diagonal is not None:
        scores = _along_diagonals(scores, rows.p)
    match level.score.bias:
        case "learned":
            bias = _by_head(rows.pooled[level.name]["bias"])
        case "log_count":
            bias = log_counts(rows.layouts[level.name], scores).T[None]
        case None:
            return scores
    return scores + spread(bias, scores.shape[1])


def _along_diagonals(scores: Tensor, p: Tensor) -> Tensor:
    """Scores of tokens by how far they are before the row.  [T, H, S] -> [T, H, S]"""
    S = scores.shape[-1]
    token = p[:, None] - torch.arange(S, device=p.device)
    return scores.gather(-1, token.clamp(0, max(S - 1, 0))[:, None].expand_as(scores))


def _by_head(bias: Tensor) -> Tensor:
    """[N, Hkv, 1] -> [1, Hkv, N], which every row has alike"""
    return bias.permute(2, 1, 0)


def _of_form(level: Level, rows: Rows, groups: Together) -> Tensor:
    x, keys = rows.x, rows.pooled[level.name].get("key")
    if level.score.form == "given":
        entries = len(rows.layouts[level.name].starts)
        return x[f"{level.name}_score"][..., :entries] * _scale(level, 1)
    assert keys is not None, f"level {level.name} has nothing to score"
    match level.score.form:
        case "dot" | "cosine" as form:
            q = _turned(level, rows, groups, x[named("q", level.q)])
            keys = keys if q.shape[1] >= keys.shape[1] else keys.mean(1, keepdim=True)
            if level.score.dtype:
                q, keys = (stored(y, level.score.dtype) for y in (q, keys))
            if form == "cosine":
                q, keys = (F.normalize(y, dim=-1) for y in (q, keys))
                return _dots(level, rows, groups, q, keys) * _scale(level, 1)
            return _dots(level, rows, groups, q, keys) * _scale(level, x["q"].shape[-1])
        case "bound":
            low, high = keys.unbind(2)
            q = pooled_queries(level, x[named("q", level.q)], groups, rows.Hkv)
            # max(q low, q high) of each channel: q < 0 takes low, q > 0 takes high
            most = dot(q.clamp(max=0), low) + dot(q.clamp(min=0), high)
            return most * _scale(level, q.shape[-1])
        case "pooling_error":
            return _pooling_error(level, rows, groups)
        case "code_match":
            assert level.score.codes is not None, f"level {level.name} has no codes"
            codebook = x[f"{level.name}_codebook"]
            q = pooled_queries(level, x[named("q", level.q)], groups, rows.Hkv)
            return code_matches(level.score.codes, q, keys, codebook) * _scale(level, 1)
        case "index_dot" | "relu_weighted" | "relu_sum":
            q = pooled_queries(level, x["q_index"], groups, rows.Hkv)
            return _by_index(level, rows, q, keys[:, 0]) * _scale(level, 1)
        case "bias":
            return _by_head(keys).expand(len(rows.p), -1, -1) * _scale(level, 1)
        case None:
            raise AssertionError(f"level {level.name} has neither `form` nor `from`")
        case form:
            assert_never(form)


def _by_index(level: Level, rows: Rows, q: Tensor, keys: Tensor) -> Tensor:
    """Scores of the index's heads, each or summed for those who share.  keys: [N, Di] -> [T, H, N]"""
    assert rows.spec.index is not None, "a level that scores by the index needs one"
    dtype = rows.spec.index.dtype
    q, k = stored(q, dtype), stored(keys, dtype)
    scores = torch.einsum("thd,nd->thn", q, k)
    if not level.score.sums_index:
        return scores
    scores = scores.relu()
    if level.score.form == "relu_weighted":
        scores = scores * rows.x["w_index"].unsqueeze(-1)
    heads = rows.Hkv if level.score.share == "group" else 1
    return scores.unflatten(1, (heads, -1)).sum(2)


def _pooling_error(level: Level, rows: Rows, groups: Together) -> Tensor:
    """What pooled entries get wrong, a token on average.  -> [T or R, H, N]"""
    k, pooled = rows.x[named("k", level.kv)], rows.pooled[level.name]
    q = pooled_queries(level, rows.x["q"], groups, rows.Hkv)
    layout, scale = rows.layouts[level.name], _scale(level, q.shape[-1])
    entry = layout.entry_of
    assert entry is not None, "entries that are pooled in place of tokens do not overlap"
    H, N = q.shape[1], layout.slots.shape[1]
    entry = entry.repeat_interleave(H // len(entry), 0)  # [H, S]
    of = entry.clamp(min=0).expand(len(q), -1, -1)
    alone = level.query is None or level.query.pool is None
    complete = complete_entries(rows, level) if alone else visible_entries(rows, level, groups)
    seen = complete[:, None] & spread(layout.there[None], H)  # [R, H, N]
    by_token = seen.gather(-1, of) & (entry >= 0)
    exact = (dot(q, k) * scale).masked_fill(~by_token, -math.inf)
    whole = (dot(q, pooled["key"]) * scale).masked_fill(~seen, -math.inf)
    top = torch.cat((exact, whole), -1).amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    exact, whole = (exact - top).exp(), (whole - top).exp().gather(-1, of)
    wrong = (whole - exact).square()
    if "value" in pooled:
        v, mean = rows.x[named("v", level.kv)], pooled["value"]
        v, mean = (y.transpose(0, 1).repeat_interleave(H // y.shape[1], 0) for y in (v, mean))
        mean = mean.gather(1, entry.clamp(min=0)[..., None].expand_as(v))  # [H, S, Dv]
        wrong = whole**2 * mean.square().sum(-1) - 2 * whole * exact * (v * mean).sum(-1)
        wrong = (wrong + exact**2 * v.square().sum(-1)).clamp(min=0)
    total = torch.zeros(len(q), H, N, dtype=q.dtype, device=q.device)
    total = total.scatter_add(-1, of, wrong.masked_fill(~by_token, 0.0))
    return total / spread((layout.slots >= 0).sum(-1).clamp(min=1)[None], H)


def _turned(level: Level, rows: Rows, groups: Together, q: Tensor) -> Tensor:
    """Queries that score, each row's turned before or each group's after they are pooled."""
    at = level.query.rotate if level.query else None
    turn = level.pool.rotate if level.pool else None
    if at is None or turn is None:
        return pooled_queries(level, q, groups, rows.Hkv)
    if at == "token":
        q = kept(rotated(level.name, turn, q, rows.p.clamp(min=0), rows.x), rows.stored)
        return pooled_queries(level, q, groups, rows.Hkv)
    q = pooled_queries(level, q, groups, rows.Hkv)
    place = groups.first if at == "first" else (groups.first + groups.last) / 2
    return rotated(level.name, turn, q, place.clamp(min=0), rows.x)


def _dots(level: Level, rows: Rows, groups: Together, q: Tensor, keys: Tensor) -> Tensor:
    """Dot products with entries: with their keys, or with those of tokens that are searched."""
    dots = dot(q, keys)
    match level.partition:
        case Halving():
            return halved(level.partition, _asked(level, rows, groups, dots))
        case Stripes():
            return _at(dots, anchors(level.partition, rows.p, rows.S)[0])
        case _:
            return dots


def _asked(level: Level, rows: Rows, groups: Together, dots: Tensor) -> Tensor:
    """Logits of tokens as they are searched by, -inf of what nobody sees.  [T or R, H, S] -> [R, H, S]"""
    token = torch.arange(rows.S, device=dots.device)
    if level.query is not None and level.query.reduce is not None:
        seen = (token <= rows.p[:, None]) | (not rows.spec.causal)
        dots = reduced(level.query.reduce, dots, seen[:, None], groups.members)
    hidden = (token > groups.last[:, None]) & rows.spec.causal
    return dots.masked_fill(hidden[:, None], -math.inf)


def _at(scores: Tensor, token: Tensor) -> Tensor:
    """Scores of each row's own tokens.  [T, H, S], i64[T, N] -> [T, H, N]"""
    if not scores.shape[-1]:
        return scores.new_zeros(*scores.shape[:-1], token.shape[-1])
    return scores.gather(-1, token[:, None].expand(-1, scores.shape[1], -1))


def _scale(level: Level, width: int) -> float:
    """1/sqrt(width) unless the spec says otherwise."""
    scale = level.score.scale
    if scale is None:
        return width**-0.5
    return 1.0 if scale == "none" else scale


def dot(q: Tensor, k: Tensor) -> Tensor:
    """Query head h against key head h // G.  [T, Hq, D], [S, Hkv, D] -> [T, Hq, S]"""
    grouped = q.unflatten(1, (k.shape[1], -1))
    return torch.einsum("tkgd,skd->tkgs", grouped, k).flatten(1, 2)


def over_heads(level: Level, scores: Tensor, Hkv: int) -> Tensor:
    """Make heads agree.  [T, H, N] -> [T, Hs, N]; consecutive heads share."""
    H, how = scores.shape[1], level.score.reduce
    heads = {"head": H, "group": min(Hkv, H), "all": 1}[level.score.share]
    single = level.score.sums_index or level.score.form == "given"  # as many as choose already
    if (level.score.source or single) and how is None:
        return scores
    if heads == H:
        return scores
    grouped = scores.unflatten(1, (heads, -1))
    match how:
        case "sum":
            return grouped.sum(2)
        case "mean":
            return grouped.mean(2)
        case "max":
            return grouped.amax(2)
        case None:
            raise AssertionError(f"level {level.name}: heads that share need `reduce`")


def mapped(rows: Rows, level: Level, source: Scored, groups: Together, N: int) -> Tensor:
    """Carry the scores of another level's complete entries over, and of its rows.  -> [R, Hs, N]

    `overlap_sum` is eq. 9 of NSA (arXiv:2502.11089), counted from 0: entry j gathers the sources
    (l'/d) j + m - n for every m < l'/d, n < l/d; `overlap_max` takes those that share a token with
    j.  `sum` and `max` take those that lie inside j; `around` those on both sides of it as well.
    """
    upsampled = level.score.map == "upsample"
    carried = (_upsampled if upsampled else _gathered)(rows, level, source, N)
    if level.query is None or level.query.reduce is None:
        return carried
    everywhere = torch.ones_like(carried, dtype=torch.bool)
    return reduced(level.query.reduce, carried, everywhere, groups_of(source.groups, groups))


def _gathered(rows: Rows, level: Level, source: Scored, N: int) -> Tensor:
    """What lies in an entry, or touches it, put together."""
    assert level.score.source is not None
    partition = rows.spec.level(level.score.source).partition
    l, d = partition.size, partition.stride
    target, ratio = level.partition.size, level.partition.stride // d
    greatest = level.score.map in ("max", "overlap_max")
    empty = -math.inf if greatest else 0.0
    scores = over_heads(level, source.scores, rows.Hkv)
    scores = scores.masked_fill(~source.complete[:, None], empty)
    if level.score.map == "overlap_sum":
        offsets = [m - n for m in range(target // d) for n in range(l // d)]
    elif level.score.map == "around":
        assert level.score.width is not None, f"{level.name} maps what is around"
        side = level.score.width // 2
        offsets = list(range(-side, side + 1))
    elif level.score.map == "overlap_max":
        offsets = list(range(1 - -(-l // d), target // d))
    else:
        offsets = list(range((target - l) // d + 1))
    gathered = torch.stack([_shifted(scores, ratio, o, N, empty) for o in offsets])
    carried = gathered.amax(0) if greatest else gathered.sum(0)
    if level.score.map == "avg_pool":
        there = source.complete[:, None].expand_as(scores).to(scores.dtype)
        count = torch.stack([_shifted(there, ratio, o, N, 0.0) for o in offsets]).sum(0)
        carried = carried / count.clamp(min=1)
    return carried


def _upsampled(rows: Rows, level: Level, source: Scored, N: int) -> Tensor:
    """The score of the source entry that holds an entry's first token, -inf where it is incomplete."""
    above = rows.spec.level(level.score.source or "")
    scores = over_heads(level, source.scores, rows.Hkv)
    scores = scores.masked_fill(~source.complete[:, None], -math.inf)
    if isinstance(above.partition, Ragged):
        entry_of = rows.layouts[above.name].entry_of
        assert entry_of is not None
        holder = entry_of[0]
    else:
        first = torch.arange(N, device=scores.device) * level.partition.stride
        holder = first // above.partition.stride
    return scores[..., holder] if N else scores[..., :0]


def _shifted(scores: Tensor, ratio: int, offset: int, N: int, empty: float) -> Tensor:
    """scores[..., j * ratio + offset] for j < N, and `empty` where there is no such source."""
    index = torch.arange(N, device=scores.device) * ratio + offset
    outside = (index < 0) | (index >= scores.shape[-1])
    padded = F.pad(scores, (0, 1), value=empty)
    return padded[..., index.masked_fill(outside, scores.shape[-1])]


def softmax(logits: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over what is visible.  [..., N], bool[..., N] -> weights [..., N], lse [...]

    A row that sees nothing has weights 0 and lse -inf, and no gradient is NaN.
    """
    logits = logits.masked_fill(~visible, -math.inf)
    if not logits.shape[-1]:
        return logits, logits.new_full(logits.shape[:-1], -math.inf)
    top = logits.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (top + total.log()).masked_fill(empty, -math.inf)
    return weights / total, lse.squeeze(-1)


def peaks(scores: Tensor, seen: Tensor) -> Tensor:
    """exp(score - the greatest of the row) of what is seen, 0 elsewhere.  [T, H, N] -> [T, H, N]"""
    scores = scores.masked_fill(~seen, -math.inf)
    if not scores.shape[-1]:
        return scores
    top = scores.amax(-1, keepdim=True)
    return (scores - top.masked_fill(top == -math.inf, 0.0)).exp()


def masses_by(scores: Tensor, seen: Tensor, lse: Tensor | None) -> Tensor:
    """exp(score - lse) of what is seen, 0 where the sum is of nothing.  [T, H, N], [T, H] -> [T, H, N]"""
    assert lse is not None, "the level of `lse_from` comes first and keeps its sum"
    lse = lse.unsqueeze(-1)
    empty = lse == -math.inf
    return (scores - lse.masked_fill(empty, 0.0)).masked_fill(~seen | empty, -math.inf).exp()
