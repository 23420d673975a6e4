"""The meaning of a spec: (Spec, tensors) -> outputs in plain PyTorch, sequence after sequence.

Dense masks, no tiles, no online softmax; differentiable, in float64 if you like.  Knows nothing
of graphs, plans or kernels: all else is an optimisation of this file and is tested against it.

Shapes, for one sequence: T query rows, S keys, N entries of a level, Hq query heads, Hkv key heads,
G = Hq / Hkv, Hs heads that select (Hq, Hkv or 1), D and Dv head sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, assert_never

import torch
from torch import Tensor
from torch.nn import functional as F

from hsgen.selection import (
    BitmapSelection,
    ListSelection,
    Selection,
    bitmap_from_members,
    from_members,
    members,
    to_list,
)
from hsgen.spec import Attend, Level, Select, Spec, Static, TopP

ONE = 1 << 30  # masses and parts are whole numbers of 2^-30, so that their sums know no order
MOST_MASS = 1 << 44  # of one entry: far above every sum of softmaxes, far below what a sum can hold
CHUNK_ELEMENTS = 1 << 23  # float64 logits that are alive at once, about

TensorKind = Literal["query", "key", "parameter"]
_TensorInput = tuple[TensorKind, tuple[str | int, ...]]  # what follows batch and time


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """What a spec makes of its tensors; packed results have `total` for B, T (lse: [Hq, total]).

    Attributes:
        o: [B, T, Hq, Dv].
        lse: By branch, or "o" where one softmax spans all: [B, Hq, T], natural logarithm, -inf for
            an empty row.
        selection: By selecting level: a list, ascending, -1 padded; bitmap rows where the spec's rule
            lets counts vary.
        scores: By level: [B, T, Hs, N], what entries are ordered by; -inf where an entry is
            incomplete or no candidate.  An incomplete entry can still be selected by force.
        candidates: By level: bool[B, T, Hs, N], complete or forced, and child of a selected parent.
        forced: By level: bool[B, T, Hs, N], the candidates that are taken whatever their score.
    """

    o: Tensor
    lse: dict[str, Tensor]
    selection: dict[str, Selection]
    scores: dict[str, Tensor]
    candidates: dict[str, Tensor]
    forced: dict[str, Tensor]


def reference(
    spec: Spec,
    tensors: Mapping[str, Tensor],
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    kv_lens: Tensor | None = None,
    selection: Mapping[str, Selection | Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
    keep_scores: bool = True,
) -> Result:
    """Compute what `spec` means.

    Args:
        spec: The attention.
        tensors: By name, as `tensor_shapes` lists them: [B, T, H, D], or packed [total, H, D].
        cu_seqlens_q: i32[Z + 1], first row of every packed sequence.
        cu_seqlens_k: The same for keys; the default is `cu_seqlens_q`.
        q_offset: Position of each sequence's query row 0, one number or [Z]; the default aligns the
            last query with the last key.
        kv_lens: [Z], how many keys each sequence really has.
        selection: By level: taken instead of the level's own choice.
        dtype: What everything is computed in.
        keep_scores: False leaves `scores`, `candidates` and `forced` empty, and memory in peace.
    """
    packed = tensors["q"].ndim == 3
    kinds = tensor_kinds(spec)
    spans = _spans(spec, tensors, cu_seqlens_q, cu_seqlens_k)
    given = {name: _indices(chosen) for name, chosen in (selection or {}).items()}
    parts = []
    for z, (rows, keys) in enumerate(spans):
        k_len = len(keys) if kv_lens is None else min(len(keys), int(kv_lens[z]))
        where = {"query": _at(rows, z, packed), "key": _at(keys[:k_len], z, packed)}
        x = {
            name: (tensors[name] if kind == "parameter" else tensors[name][where[kind]]).to(dtype)
            for name, kind in kinds.items()
        }
        first = k_len - len(rows) if q_offset is None else _number(q_offset, z)
        p = torch.arange(first, first + len(rows), device=x["q"].device)
        chosen = {name: indices[where["query"]] for name, indices in given.items()}
        parts.append(_sequence(spec, x, p, chosen, keep_scores=keep_scores))
    return _join(parts, packed=packed)


def tensor_shapes(spec: Spec, B: int, T: int, S: int) -> dict[str, tuple[int, ...]]:
    """Every tensor that `spec` needs, by name: shapes for B sequences of T queries and S keys."""
    assert spec.heads is not None, "heads must be bound"
    assert spec.head_dim is not None, "head_dim must be bound"
    sizes = {
        "Hq": spec.heads.query,
        "Hkv": spec.heads.kv,
        "D": spec.head_dim.qk,
        "Dv": spec.head_dim.v,
    }
    if spec.index:
        sizes |= {"Hi": spec.index.heads, "Di": spec.index.dim}
    lead = {"query": (B, T), "key": (B, S), "parameter": ()}
    return {
        name: (*lead[kind], *(sizes[n] if isinstance(n, str) else n for n in dims))
        for name, (kind, dims) in _inputs(spec).items()
    }


def tensor_kinds(spec: Spec) -> dict[str, TensorKind]:
    """Whether each tensor has one row a query, one a key, or is a learned parameter."""
    return {name: kind for name, (kind, _) in _inputs(spec).items()}


def _inputs(spec: Spec) -> dict[str, _TensorInput]:
    """Every tensor by name: its kind, and what follows batch and time."""
    found: dict[str, _TensorInput] = {"q": ("query", ("Hq", "D"))}
    keys: _TensorInput = ("key", ("Hkv", "D"))
    values: _TensorInput = ("key", ("Hkv", "Dv"))
    for level in spec.levels:
        by_index = level.score.form == "relu_weighted"
        if by_index:
            found["q_index"] = ("query", ("Hi", "Di"))
            found["k_index"] = ("key", ("Di",))
            found["w_index"] = ("query", ("Hi",))
        elif level.score.form == "dot" or (level.pool and level.pool.keys):
            found[_own("k", level.kv)] = keys
        if level.pool and level.pool.values:
            found[_own("v", level.kv)] = values
        for side in _linear_sides(level):
            heads, width = (
                ("Hkv", "Dv") if side == "value" else (1, "Di") if by_index else ("Hkv", "D")
            )
            size = level.partition.size
            found[f"{level.name}_{side}_weight"] = ("parameter", (heads, size, width, width))
            if level.pool and level.pool.position:
                found[f"{level.name}_{side}_position"] = ("parameter", (heads, size, width))
    for branch in spec.attend:
        if branch.values == "raw":
            found[_own("k", branch.kv)] = keys
            found[_own("v", branch.kv)] = values
    if spec.combine and spec.combine.gates:
        found["gates"] = ("query", ("Hq", len(spec.attend)))
    return found


def order(scores: Tensor, candidates: Tensor, forced: Tensor) -> Tensor:
    """Rank entries, best first.  f[..., N], bool[..., N], bool[..., N] -> int64[..., N]

    Forced candidates come first, then numbers in descending order (-0 = +0; subnormal float32
    numbers are 0), then NaN; last what is no candidate.  Ties go to the lower position.
    """
    if scores.dtype == torch.float32:
        tiny = scores.abs() < torch.finfo(torch.float32).tiny
        scores = scores.masked_fill(tiny, 0.0)
    numbers = scores.masked_fill(scores.isnan(), -math.inf)
    by_score = numbers.argsort(dim=-1, descending=True, stable=True)
    rank = torch.where(scores.isnan(), 2, 1)
    rank = rank.masked_fill(forced, 0).masked_fill(~candidates, 3)
    by_rank = rank.gather(-1, by_score).argsort(dim=-1, stable=True)
    return by_score.gather(-1, by_rank)


def choose(select: Select, scores: Tensor, candidates: Tensor, forced: Tensor) -> Tensor:
    """Keep the best candidates.  f[T, Hs, N], bool[T, Hs, N], bool[T, Hs, N] -> bool[T, Hs, N]"""
    forced = forced & candidates
    if select.threshold is not None:
        return ((scores > select.threshold) & candidates) | forced
    if select.top_p is not None:
        return _choose_mass(select.top_p, select.force.counted, scores, candidates, forced)
    if select.fraction is not None:
        keep = _part(select.fraction, candidates.sum(-1, keepdim=True))
    else:
        keep = torch.full_like(forced.sum(-1, keepdim=True), select.budget)
    if not select.force.counted:
        keep = keep + forced.sum(-1, keepdim=True)
    chosen = _early(order(scores, candidates, forced), keep) & candidates
    return chosen | forced if select.fraction is not None else chosen


def _early(ranking: Tensor, keep: Tensor) -> Tensor:
    """Entries among the first `keep` of a ranking.  i64[..., N], i64[..., 1] -> bool[..., N]"""
    early = torch.arange(ranking.shape[-1], device=ranking.device) < keep
    return torch.zeros_like(ranking, dtype=torch.bool).scatter_(-1, ranking, early)


def fixed(value: float) -> int:
    """A part of a whole as a number of 2^-30, the nearest."""
    return round(value * ONE)


def _part(part: float, whole: Tensor, *, up: bool = True) -> Tensor:
    """part * whole, rounded up or down, in integers that do not overflow below 2^62 / part."""
    units = fixed(part)
    high, low = whole // ONE, whole % ONE
    return units * high + (units * low + (ONE - 1 if up else 0)) // ONE


def masses(scores: Tensor) -> Tensor:
    """Scores as whole numbers of 2^-30, the nearest, ties to even; none below 0, NaN is 0.  -> i64"""
    scaled = (scores.double() * ONE).round()
    return scaled.nan_to_num(nan=0.0, posinf=MOST_MASS, neginf=0.0).clamp(0, MOST_MASS).long()


def _choose_mass(
    top_p: TopP, counted: bool, scores: Tensor, candidates: Tensor, forced: Tensor
) -> Tensor:
    """Best first until the masses reach a part of the total.  Shapes as in `choose`.

    Forced entries come first and their masses count, or, not counted, the choice is made as if
    nothing were forced.  Complete entries alone have masses: an entry that is forced before it is
    complete weighs nothing.
    """
    if counted:
        first = forced
    else:
        candidates, first = candidates & (scores > -math.inf), torch.zeros_like(forced)
    if top_p.scope == "row":
        reached = _until_mass(top_p, scores, candidates, first)
    else:  # all rows of a head together; ties go to the earlier row
        flat = [y.transpose(0, 1).flatten(1) for y in (scores, candidates, first)]
        reached = _until_mass(top_p, *flat).unflatten(1, scores.shape[::2]).transpose(0, 1)
    ranking = order(scores, candidates, first)
    chosen = (reached | _early(ranking, _count(top_p.min, scores))) & candidates
    if top_p.max is not None:
        chosen = chosen & _early(ranking, _count(top_p.max, scores))
    return chosen | forced


def _count(number: int, like: Tensor) -> Tensor:
    return torch.full((*like.shape[:-1], 1), number, device=like.device)


def _until_mass(top_p: TopP, scores: Tensor, candidates: Tensor, first: Tensor) -> Tensor:
    """Candidates before their masses reach, or as long as they do not exceed, the part asked for."""
    ranking = order(scores, candidates, first)
    mass = masses(scores).masked_fill(~candidates, 0)
    total = mass.sum(-1, keepdim=True)
    sums = mass.gather(-1, ranking).cumsum(-1)
    if top_p.boundary == "keep":
        taken = sums - mass.gather(-1, ranking) < _part(top_p.mass, total)
    else:
        taken = sums <= _part(top_p.mass, total, up=False)
    return torch.zeros_like(candidates).scatter_(-1, ranking, taken) & candidates


# --- One sequence


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rows:
    """Some rows of one sequence, and all of its keys.

    Attributes:
        x: Tensors by name: [T, H, D], [S, H, D], and learned parameters.
        pooled: By level: "key" [N, H, D] and "value" [N, Hkv, Dv], where it has them; minmax keys
            are [N, H, 2, D].
        p: Position of every row, [T].
        given: By level: the selection to take instead of the level's own, [T, Hs, K].
    """

    spec: Spec
    x: dict[str, Tensor]
    pooled: dict[str, dict[str, Tensor]]
    p: Tensor
    given: dict[str, Tensor]

    @property
    def S(self) -> int:
        return _keys(self.spec, self.x).shape[0]

    @property
    def Hkv(self) -> int:
        return _keys(self.spec, self.x).shape[1]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Scored:
    """One level for some rows: complete: bool[T, N], the rest [T, Hs, N]; see Result.

    lse: of its scores by head, [T, H], where another level normalises by it.
    chosen: bool, None where the level does not select.
    """

    complete: Tensor
    candidates: Tensor
    forced: Tensor
    scores: Tensor
    lse: Tensor | None
    chosen: Tensor | None


def _sequence(
    spec: Spec, x: dict[str, Tensor], p: Tensor, given: dict[str, Tensor], *, keep_scores: bool
) -> Result:
    """All rows of one sequence, some at a time.  x: [T, H, D] and [S, H, D]; p: positions [T]."""
    pooled = {level.name: _pooled(level, x) for level in spec.levels}
    kinds = tensor_kinds(spec)
    step = max(1, CHUNK_ELEMENTS // (x["q"].shape[1] * max(len(_keys(spec, x)), 1)))
    if any(_ranks_rows_together(level) for level in spec.levels):
        step = max(len(p), 1)
    parts = []
    for t in range(0, max(len(p), 1), step):
        rows = _Rows(
            spec=spec,
            x={n: y[t : t + step] if kinds[n] == "query" else y for n, y in x.items()},
            pooled=pooled,
            p=p[t : t + step],
            given={name: indices[t : t + step] for name, indices in given.items()},
        )
        parts.append(_compute(rows, keep_scores=keep_scores))
    return _concatenate(parts)


def _ranks_rows_together(level: Level) -> bool:
    top_p = level.select and level.select.top_p
    return bool(top_p) and top_p.scope == "head"


def _compute(rows: _Rows, *, keep_scores: bool) -> Result:
    """Score and narrow level by level, attend, combine."""
    levels: dict[str, _Scored] = {}
    for level in rows.spec.levels:
        levels[level.name] = _level(rows, level, levels)
    o, lse = _attend(rows, levels)
    kept = levels if keep_scores else {}
    return Result(
        o=o,
        lse=lse,
        selection={
            level.name: _listed(rows, level, levels[level.name].chosen)
            for level in rows.spec.levels
            if level.select
        },
        scores={name: level.scores for name, level in kept.items()},
        candidates={name: level.candidates for name, level in kept.items()},
        forced={name: level.forced for name, level in kept.items()},
    )


def _level(rows: _Rows, level: Level, levels: dict[str, _Scored]) -> _Scored:
    """One level: form -> scale -> normalise -> reduce over heads -> map -> force -> select."""
    complete = _complete(rows, level)  # [T, N]
    allowed = _children(rows, level, levels)  # [T, Hp, N]
    lse = None
    if level.score.source:
        scores = _mapped(rows, level, levels[level.score.source], complete.shape[-1])
    else:
        scores = _form(level, rows)
        seen = complete[:, None] & _spread(allowed, scores.shape[1])
        if any(other.score.lse_from == level.name for other in rows.spec.levels):
            lse = _softmax(scores, seen)[1]
        if level.score.lse_from:
            scores = _mass(scores, seen, levels[level.score.lse_from].lse)
        elif level.score.normalise:
            scores = _softmax(scores, seen)[0]
        scores = _reduce(level, scores, rows.Hkv)
    allowed = _spread(allowed, scores.shape[1])
    forced = _forced(rows, level)[:, None] & allowed
    scored = complete[:, None] & allowed
    scores = scores.masked_fill(~scored, -math.inf)
    candidates = scored | forced
    chosen = None
    if level.name in rows.given:
        chosen = members(
            ListSelection(level=level.name, indices=rows.given[level.name]), scores.shape[-1]
        )
        chosen = chosen & _begun(rows, level)[:, None]
    elif level.select:
        chosen = choose(level.select, scores.detach(), candidates, forced)
    return _Scored(
        complete=complete,
        candidates=candidates,
        forced=forced,
        scores=scores,
        lse=lse,
        chosen=chosen,
    )


def _listed(rows: _Rows, level: Level, chosen: Tensor | None) -> Selection:
    """A level's choice: a list, as wide as the spec says or as the list that was given; or bits."""
    assert level.select is not None
    assert chosen is not None
    if level.select.counts_vary:
        return bitmap_from_members(level.name, chosen)
    given = rows.given.get(level.name)
    width = level.select.width if given is None else given.shape[-1]
    return from_members(level.name, chosen, width=width)


# --- Which entries there are


def _starts(level: Level, S: int, like: Tensor) -> Tensor:
    """First token of every entry that has a token at all.  -> [N]"""
    stride = level.partition.stride
    return torch.arange(-(-S // stride), device=like.device) * stride


def _complete(rows: _Rows, level: Level) -> Tensor:
    """Entries whose nominal end the row has reached.  -> bool[T, N]

    Without causality all that exist: also a short last one, unless entries overlap or a linear map
    needs all of its tokens.
    """
    size, stride = level.partition.size, level.partition.stride
    starts = _starts(level, rows.S, rows.p)
    whole = starts + size <= rows.S
    if rows.spec.causal:
        return whole & (starts + size - 1 <= rows.p[:, None])
    short_too = size == stride and not _linear_sides(level)
    return (whole | short_too).expand(len(rows.p), -1)


def _begun(rows: _Rows, level: Level) -> Tensor:
    """Entries that have a token which the row may see.  -> bool[T, N]"""
    starts = _starts(level, rows.S, rows.p)
    seen = starts <= rows.p[:, None]
    return seen if rows.spec.causal else torch.ones_like(seen)


def _forced(rows: _Rows, level: Level) -> Tensor:
    """The first entries, and the last ones up to the row's own.  -> bool[T, N]"""
    begun = _begun(rows, level)
    if not level.select:
        return torch.zeros_like(begun)
    force = level.select.force
    entry = torch.arange(begun.shape[-1], device=begun.device)
    own = (rows.p // level.partition.stride)[:, None]
    return ((entry < force.first) & begun) | ((entry > own - force.last) & (entry <= own))


def _children(rows: _Rows, level: Level, levels: dict[str, _Scored]) -> Tensor:
    """Entries whose parent was selected; all where nothing narrows.  -> bool[T, Hp, N]"""
    starts = _starts(level, rows.S, rows.p)
    if level.within is None:
        return torch.ones(len(rows.p), 1, len(starts), dtype=torch.bool, device=starts.device)
    parent, chosen = rows.spec.level(level.within).partition, levels[level.within].chosen
    assert chosen is not None, f"{level.within} is named by `within` and must select"
    assert parent.size == parent.stride, "parents must not overlap"
    return chosen[..., starts // parent.stride]


def _token_mask(level: Level, chosen: Tensor, S: int) -> Tensor:
    """Tokens of chosen entries, each once.  bool[T, Hs, N] -> bool[T, Hs, S]"""
    size, stride = level.partition.size, level.partition.stride
    token = torch.arange(S, device=chosen.device)
    mask = torch.zeros(*chosen.shape[:-1], S, dtype=torch.bool, device=chosen.device)
    for back in range(-(-size // stride)):
        entry = token // stride - back
        covers = (entry >= 0) & (token - entry * stride < size)
        mask = mask | (chosen[..., entry.clamp(min=0)] & covers)
    return mask


# --- Scores


def _pooled(level: Level, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """One vector an entry of what is scored, and of values: key [N, H, D], value [N, Hkv, Dv]."""
    pool = level.pool
    by_index = level.score.form == "relu_weighted"
    keys = x["k_index"].unsqueeze(1) if by_index else x.get(_own("k", level.kv))
    if pool is None or keys is None:
        return {} if keys is None else {"key": keys}
    pooled = {}
    if pool.keys:
        pooled["key"] = _pool(level, pool.keys, keys, x, "key")
    if pool.values:
        pooled["value"] = _pool(level, pool.values, x[_own("v", level.kv)], x, "value")
    return pooled


def _pool(level: Level, how: str, y: Tensor, x: dict[str, Tensor], side: str) -> Tensor:
    """Summarise every entry.  [S, H, D] -> [N, H, D]; what a linear map lacks tokens for is 0.

    minmax: [N, H, 2, D], the least and the greatest of every channel.
    """
    S, size = len(y), level.partition.size
    slots = _starts(level, S, y)[:, None] + torch.arange(size, device=y.device)  # [N, size]
    there = (slots < S)[..., None, None]
    tokens = y[slots.clamp(max=max(S - 1, 0))]  # [N, size, H, D]
    match how:
        case "mean":
            return tokens.masked_fill(~there, 0.0).sum(1) / there.sum(1)
        case "max":
            return tokens.masked_fill(~there, -math.inf).amax(1)
        case "minmax":
            low = tokens.masked_fill(~there, math.inf).amin(1)
            return torch.stack((low, tokens.masked_fill(~there, -math.inf).amax(1)), 2)
        case "sum_rsqrt":
            return tokens.masked_fill(~there, 0.0).sum(1) / there.sum(1).to(y.dtype).sqrt()
        case "linear":
            weight = x[f"{level.name}_{side}_weight"]  # [H, size, D, D]
            position = x.get(f"{level.name}_{side}_position")  # [H, size, D]
            if position is not None:
                tokens = tokens + position.transpose(0, 1)
            whole = there.all(1)
            return torch.einsum("nshd,hsde->nhe", tokens, weight).masked_fill(~whole, 0.0)
        case _:
            raise AssertionError(f"unknown pooling {how!r}")


def _form(level: Level, rows: _Rows) -> Tensor:
    """Score every entry by every head, scaled.  -> [T, H, N]"""
    x, keys = rows.x, rows.pooled[level.name].get("key")
    assert keys is not None, f"level {level.name} has nothing to score"
    match level.score.form:
        case "dot":
            return _dot(x["q"], keys) * _scale(level, x["q"].shape[-1])
        case "bound":
            low, high = keys.unbind(2)
            q = x["q"]  # max(q low, q high) of each channel: q < 0 takes low, q > 0 takes high
            most = _dot(q.clamp(max=0), low) + _dot(q.clamp(min=0), high)
            return most * _scale(level, q.shape[-1])
        case "relu_weighted":
            heads = torch.einsum("thd,nd->thn", x["q_index"], keys[:, 0]).relu()
            total = torch.einsum("th,thn->tn", x["w_index"], heads)
            return total.unsqueeze(1) * _scale(level, 1)
        case None:
            raise AssertionError(f"level {level.name} has neither `form` nor `from`")
        case form:
            assert_never(form)


def _scale(level: Level, width: int) -> float:
    """1/sqrt(width) unless the spec says otherwise."""
    scale = level.score.scale
    if scale is None:
        return width**-0.5
    return 1.0 if scale == "none" else scale


def _dot(q: Tensor, k: Tensor) -> Tensor:
    """Query head h against key head h // G.  [T, Hq, D], [S, Hkv, D] -> [T, Hq, S]"""
    grouped = q.unflatten(1, (k.shape[1], -1))
    return torch.einsum("tkgd,skd->tkgs", grouped, k).flatten(1, 2)


def _reduce(level: Level, scores: Tensor, Hkv: int) -> Tensor:
    """Make heads agree.  [T, H, N] -> [T, Hs, N]; consecutive heads share."""
    H, how = scores.shape[1], level.score.reduce
    heads = {"head": H, "group": min(Hkv, H), "all": 1}[level.score.share]
    if level.score.source and how is None:
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


def _mapped(rows: _Rows, level: Level, source: _Scored, N: int) -> Tensor:
    """Carry the scores of another level's complete entries over.  -> [T, Hs, N]

    `overlap_sum` is eq. 9 of NSA (arXiv:2502.11089), counted from 0: entry j gathers the sources
    (l'/d) j + m - n for every m < l'/d, n < l/d; `overlap_max` takes those that share a token with
    j.  `sum` and `max` take those that lie inside j.
    """
    assert level.score.source is not None
    partition = rows.spec.level(level.score.source).partition
    l, d = partition.size, partition.stride
    target, ratio = level.partition.size, level.partition.stride // d
    greatest = level.score.map in ("max", "overlap_max")
    empty = -math.inf if greatest else 0.0
    scores = _reduce(level, source.scores, rows.Hkv)
    scores = scores.masked_fill(~source.complete[:, None], empty)
    if level.score.map == "overlap_sum":
        offsets = [m - n for m in range(target // d) for n in range(l // d)]
    elif level.score.map == "overlap_max":
        offsets = list(range(1 - -(-l // d), target // d))
    else:
        offsets = list(range((target - l) // d + 1))
    gathered = torch.stack([_shifted(scores, ratio, o, N, empty) for o in offsets])
    return gathered.amax(0) if greatest else gathered.sum(0)


def _shifted(scores: Tensor, ratio: int, offset: int, N: int, empty: float) -> Tensor:
    """scores[..., j * ratio + offset] for j < N, and `empty` where there is no such source."""
    index = torch.arange(N, device=scores.device) * ratio + offset
    outside = (index < 0) | (index >= scores.shape[-1])
    padded = F.pad(scores, (0, 1), value=empty)
    return padded[..., index.masked_fill(outside, scores.shape[-1])]


# --- Attention


def _attend(rows: _Rows, levels: dict[str, _Scored]) -> tuple[Tensor, dict[str, Tensor]]:
    """Every branch, combined.  -> o [T, Hq, Dv], lse {branch: [T, Hq]}"""
    combine, q = rows.spec.combine, rows.x["q"]
    branches = {branch.name: _branch(rows, branch, levels) for branch in rows.spec.attend}
    if combine and combine.softmax:
        o, lse = _attention(q, _union(list(branches.values())))
        return o, {"o": lse}
    outputs = {name: _attention(q, [keys]) for name, keys in branches.items()}
    parts = torch.stack([o for o, _ in outputs.values()], -1)  # [T, Hq, Dv, branches]
    lse = {name: lse for name, (_, lse) in outputs.items()}
    if combine and combine.gates:
        return (parts * rows.x["gates"].unsqueeze(2)).sum(-1), lse
    assert len(outputs) == 1, "several branches need `combine`"
    return parts[..., 0], lse


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Keys:
    """What a branch attends to: `source` names the keys, visible: bool[T, H, S]."""

    source: str
    k: Tensor
    v: Tensor
    visible: Tensor


def _branch(rows: _Rows, branch: Attend, levels: dict[str, _Scored]) -> _Keys:
    """The keys of one branch, and which of them each row sees."""
    if branch.over and branch.values == "pooled":
        level, keys = levels[branch.over], rows.pooled[branch.over]
        visible = level.complete[:, None] & level.candidates
        if level.chosen is not None:
            visible = visible & level.chosen
        return _Keys(source=branch.over, k=keys["key"], v=keys["value"], visible=visible)
    k, v = rows.x[_own("k", branch.kv)], rows.x[_own("v", branch.kv)]
    distance = (rows.p[:, None] - torch.arange(len(k), device=k.device)).unsqueeze(1)  # [T, 1, S]
    visible = distance >= 0 if rows.spec.causal else torch.ones_like(distance, dtype=torch.bool)
    if branch.static:
        near = _static_mask(branch.static, rows.p, len(k), rows.x["q"].shape[1], rows.spec.causal)
        visible = visible & near
    elif branch.window:
        visible = visible if branch.window == "all" else visible & (distance.abs() < branch.window)
    else:
        assert branch.over is not None, f"branch {branch.name} attends to nothing"
        chosen = levels[branch.over].chosen
        assert chosen is not None, f"{branch.over} is attended raw and must select"
        visible = visible & _token_mask(rows.spec.level(branch.over), chosen, len(k))
    return _Keys(source=f"raw {branch.kv or ''}", k=k, v=v, visible=visible)


def _static_mask(static: Static, p: Tensor, S: int, Hq: int, causal: bool) -> Tensor:
    """Which tokens a static pattern shows to each row and head.  p: [T] -> bool[T, Hq, S]"""
    unit = torch.arange(S, device=p.device) // static.blocks
    head = torch.arange(Hq, device=p.device)[:, None]
    d = (p // static.blocks)[:, None, None] - unit
    if not causal:
        d = d.abs()
    seen = torch.zeros(len(p), Hq, S, dtype=torch.bool, device=p.device)
    windows, sinks = _spans_of_heads(static, Hq, -(-S // static.blocks))
    for h, (window, sink) in enumerate(zip(windows, sinks, strict=True)):
        near = (
            (d[:, 0] >= 0) & (d[:, 0] < window * static.dilation) & (d[:, 0] % static.dilation == 0)
        )
        seen[:, h] = near | (unit < sink)
    if static.stride is not None:
        seen = seen | ((unit + 1 + static.shift * head) % static.stride == 0)
    if static.power_of_two:
        seen = seen | ((d >= 0) & (d & (d - 1) == 0))
    return seen


def _spans_of_heads(static: Static, Hq: int, N: int) -> tuple[list[int], list[int]]:
    """Window and sink of every head, in units, of which the sequence has N."""
    if not static.per_head:
        return [static.window or 0] * Hq, [static.sink] * Hq
    spans = [static.per_head[h % len(static.per_head)] for h in range(Hq)]
    grown = [fixed(span.grow) * max(0, N - span.window) // ONE for span in spans]
    windows = [span.window + more for span, more in zip(spans, grown, strict=True)]
    return windows, [span.sink for span in spans]


def _union(branches: list[_Keys]) -> list[_Keys]:
    """Merge branches over the same keys: a token counts once, however often it is reached."""
    merged: dict[str, _Keys] = {}
    for keys in branches:
        if (seen := merged.get(keys.source)) is None:
            merged[keys.source] = keys
        else:
            heads = max(seen.visible.shape[1], keys.visible.shape[1])
            either = _spread(seen.visible, heads) | _spread(keys.visible, heads)
            merged[keys.source] = _Keys(source=keys.source, k=keys.k, v=keys.v, visible=either)
    return list(merged.values())


def _attention(q: Tensor, parts: list[_Keys]) -> tuple[Tensor, Tensor]:
    """One softmax over all keys of all parts.  q: [T, Hq, D] -> o [T, Hq, Dv], lse [T, Hq]"""
    Hq = q.shape[1]
    logits = torch.cat([_dot(q, part.k) for part in parts], -1) * q.shape[-1] ** -0.5
    visible = torch.cat([_spread(part.visible, Hq) for part in parts], -1)
    weights, lse = _softmax(logits, visible)
    v = torch.cat([part.v for part in parts])  # [S, Hkv, Dv]
    grouped = weights.unflatten(1, (v.shape[1], -1))
    return torch.einsum("tkgs,skd->tkgd", grouped, v).flatten(1, 2), lse


def _softmax(logits: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
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


def _mass(scores: Tensor, seen: Tensor, lse: Tensor | None) -> Tensor:
    """exp(score - lse) of what is seen, 0 where the sum is of nothing.  [T, H, N], [T, H] -> [T, H, N]"""
    assert lse is not None, "the level of `lse_from` comes first and keeps its sum"
    lse = lse.unsqueeze(-1)
    empty = lse == -math.inf
    return (scores - lse.masked_fill(empty, 0.0)).masked_fill(~seen | empty, -math.inf).exp()


# --- Small change


def _own(kind: str, kv: str | None) -> str:
    return f"{kind}_{kv}" if kv else kind


def _linear_sides(level: Level) -> list[str]:
    """Which of key and value are pooled by a learned map."""
    if level.pool is None:
        return []
    sides = {"key": level.pool.keys, "value": level.pool.values}
    return [side for side, how in sides.items() if how == "linear"]


def _spread(y: Tensor, heads: int) -> Tensor:
    """Give every head its selection head's row.  [T, Hs, N] -> [T, heads, N]"""
    assert heads % y.shape[1] == 0, f"{y.shape[1]} selecting heads cannot serve {heads}"
    return y.repeat_interleave(heads // y.shape[1], 1)


def _keys(spec: Spec, x: Mapping[str, Tensor]) -> Tensor:
    """Some tensor of keys or values: [S, Hkv, D], or with a batch in front."""
    kinds = tensor_kinds(spec).items()
    return next(x[name] for name, kind in kinds if kind == "key" and name != "k_index")


def _indices(selection: Selection | Tensor) -> Tensor:
    """A caller's selection as indices [..., Hs, K]."""
    if isinstance(selection, BitmapSelection):
        selection = to_list(selection)
    return selection if isinstance(selection, Tensor) else selection.indices


def _spans(
    spec: Spec, tensors: Mapping[str, Tensor], cu_q: Tensor | None, cu_k: Tensor | None
) -> list[tuple[range, range]]:
    """Rows and keys of every sequence."""
    q, k = tensors["q"], _keys(spec, tensors)
    if q.ndim == 4:
        return [(range(q.shape[1]), range(k.shape[1]))] * q.shape[0]
    assert cu_q is not None, "packed tensors need cu_seqlens_q"
    ends_q = cu_q.tolist()
    ends_k = ends_q if cu_k is None else cu_k.tolist()
    pairs = zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
    return [(range(a, b), range(c, d)) for a, b, c, d in pairs]


def _at(items: range, z: int, packed: bool) -> slice | tuple[int, slice]:
    """Index of a sequence's items in a packed or a dense tensor."""
    where = slice(items.start, items.stop)
    return where if packed else (z, where)


def _number(value: int | Tensor, z: int) -> int:
    return (
        value if isinstance(value, int) else int(value.reshape(-1)[z if value.numel() > 1 else 0])
    )


def _concatenate(parts: list[Result]) -> Result:
    """Chunks or sequences one after another, along rows; entries are padded to the longest."""
    first = parts[0]
    pads = {"scores": -math.inf, "candidates": False, "forced": False}

    def rows(field: str) -> dict[str, Tensor]:
        values = {
            name: [getattr(part, field)[name] for part in parts] for name in getattr(first, field)
        }
        return {name: torch.cat(_padded(ys, pads[field])) for name, ys in values.items()}

    return Result(
        o=torch.cat([part.o for part in parts]),
        lse={name: torch.cat([part.lse[name] for part in parts]) for name in first.lse},
        selection={
            name: _one_after_another([part.selection[name] for part in parts])
            for name in first.selection
        },
        scores=rows("scores"),
        candidates=rows("candidates"),
        forced=rows("forced"),
    )


def _one_after_another(parts: list[Selection]) -> Selection:
    """Selections of one level along rows; bitmaps as wide as the longest sequence needs."""
    lists = [part.indices for part in parts if isinstance(part, ListSelection)]
    if lists:
        return ListSelection(level=parts[0].level, indices=torch.cat(lists))
    bitmaps = [part for part in parts if isinstance(part, BitmapSelection)]
    words = torch.cat(_padded([part.words for part in bitmaps], 0))
    entries = max(part.entries for part in bitmaps)
    return BitmapSelection(level=parts[0].level, words=words, entries=entries)


def _padded(ys: list[Tensor], fill: float | bool) -> list[Tensor]:
    N = max(y.shape[-1] for y in ys)
    return [F.pad(y, (0, N - y.shape[-1]), value=fill) for y in ys]


def _join(parts: list[Result], *, packed: bool) -> Result:
    """Sequences as the caller's layout has them; lse gets its head before its row."""
    result = _concatenate(parts)
    B = len(parts)

    def shape(y: Tensor) -> Tensor:
        return y if packed else y.unflatten(0, (B, len(y) // B))

    return Result(
        o=shape(result.o),
        lse={name: shape(y).transpose(-1, -2) for name, y in result.lse.items()},
        selection={
            name: replace(s, indices=shape(s.indices))
            if isinstance(s, ListSelection)
            else replace(s, words=shape(s.words))
            for name, s in result.selection.items()
        },
        scores={name: shape(y) for name, y in result.scores.items()},
        candidates={name: shape(y) for name, y in result.candidates.items()},
        forced={name: shape(y) for name, y in result.forced.items()},
    )
