"""One sequence, some rows at a time: score and narrow level by level, attend, combine."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hsgen.reference.attention import attend_all, sum_of_branch, what_is_seen
from hsgen.reference.choice import choose, tiers_of
from hsgen.reference.entries import (
    begun_entries,
    complete_entries,
    entries_that_fill,
    forced_entries,
    inside_beam,
    kept_entries,
    own_seen,
    sink_entries,
    tail_entries,
    token_mask,
    visible_entries,
)
from hsgen.reference.inputs import some_keys, tensor_kinds
from hsgen.reference.layouts import layouts_of
from hsgen.reference.likeness import unlike_entries
from hsgen.reference.losses import terms
from hsgen.reference.permutes import clusters_of_rows
from hsgen.reference.pools import pooled_entries
from hsgen.reference.queries import Together, asked_of, of_rows, reduced, together
from hsgen.reference.reuse import Kept, Taken, kept_scores, reached, rows_of
from hsgen.reference.routes import computed_ways, on_way, ways_taken
from hsgen.reference.rows import Rows, Scored, row_by_row, spread
from hsgen.reference.scores import mapped, masses_by, over_heads, peaks, raw_scores, softmax
from hsgen.reference.stopping import walk
from hsgen.selection import (
    BitmapSelection,
    ListSelection,
    Selection,
    bitmap_from_members,
    from_members,
    members,
)
from hsgen.spec import Attend, Halving, Level, Spec

CHUNK_ELEMENTS = 1 << 23  # float64 logits that are alive at once, about


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
        seen: By branch over raw tokens: bool[B, T, H, S], the tokens that a row attends to, where
            H divides Hq.
        streams: By branch, as o, where the spec says that branches are outputs of their own.
        loss: By name, a number each.
        state: By reused level: what the next call takes over.  A level that this call has nothing
            to do with is in none of the others.
    """

    o: Tensor
    lse: dict[str, Tensor]
    selection: dict[str, Selection]
    scores: dict[str, Tensor]
    candidates: dict[str, Tensor]
    forced: dict[str, Tensor]
    seen: dict[str, Tensor]
    streams: dict[str, Tensor]
    loss: dict[str, Tensor]
    state: dict[str, Kept]


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """What of a sequence is worth its memory."""

    scores: bool = True  # also candidates and forced
    carried: frozenset[str] = frozenset()  # levels whose scores later calls need
    seen: bool = False


def one_sequence(
    spec: Spec,
    x: dict[str, Tensor],
    p: Tensor,
    given: dict[str, Tensor],
    *,
    reused: dict[str, Taken],
    keep: Keep,
    stored: torch.dtype,
) -> Result:
    """All rows of one sequence, some at a time.

    x: [T, H, D] and [S, H, D]; p: positions [T]; stored: what pooled entries and turned queries are kept in.
    """
    keys = some_keys(spec, x)
    group = x["q"].shape[1] // keys.shape[1]
    here = reached(spec, reused)
    layouts = layouts_of(spec, here, x, len(keys), group)
    pooled = {
        n: pooled_entries(spec.level(n), layouts[n], x, stored)
        if _reads_entries(spec, n, reused)
        else {}
        for n in here
    }
    kinds = tensor_kinds(spec)
    taken = ways_taken(spec, x)
    parts = []
    for a, b in _chunks(spec, x, p):
        rows = Rows(
            spec=spec,
            x={n: y[a:b] if kinds[n] == "query" else y for n, y in x.items()},
            pooled=pooled,
            layouts=layouts,
            clusters=clusters_of_rows(spec, x),
            p=p[a:b],
            taken=taken,
            given={name: indices[a:b] for name, indices in given.items()},
            reused={name: rows_of(each, a, b) for name, each in reused.items()},
            stored=stored,
        )
        parts.append(_compute(rows, keep=keep))
    return concatenate(parts)


def _reads_entries(spec: Spec, level: str, reused: dict[str, Taken]) -> bool:
    """Whether a call scores the entries of a level, or attends them pooled."""
    pooled = any(branch.over == level and branch.values == "pooled" for branch in spec.attend)
    return pooled or level not in reused or reused[level].scored


def _chunks(spec: Spec, x: dict[str, Tensor], p: Tensor) -> list[tuple[int, int]]:
    """Rows that are computed at a time; those that choose together are never apart."""
    T = len(p)
    of_all = spec.loss is not None and spec.loss.dual_entropy is not None
    if T == 0 or of_all or any(_asks_all_rows(spec, level) for level in spec.levels):
        return [(0, T)]
    step = CHUNK_ELEMENTS // (x["q"].shape[1] * max(len(some_keys(spec, x)), 1))
    blocks = [rows.block or 1 for level in spec.levels if (rows := spec.rows_of(level))]
    unit = math.lcm(*blocks)
    step = max(step // unit, 1) * unit
    # a chunk that starts inside a block ends where the block does; positions alone need no values
    first = int(p[0]) % unit if unit > 1 else 0
    starts = [0, *range(step - first, T, step)]
    return list(zip(starts, [*starts[1:], T], strict=True))


def _asks_all_rows(spec: Spec, level: Level) -> bool:
    select, rows = level.select, spec.rows_of(level)
    of_rows = select is not None and (
        select.scope in ("head", "entry") or bool(select.top_p and select.top_p.scope == "head")
    )
    return of_rows or bool(rows and (rows.last or rows.tile or rows.by))


def _compute(rows: Rows, *, keep: Keep) -> Result:
    """Score and narrow level by level, attend, combine."""
    levels: dict[str, Scored] = {}
    shown: dict[str, Scored] = {}
    for level in rows.spec.levels:
        if level.name in rows.pooled:
            levels[level.name] = _level(rows, level, levels)
            if rows.taken is None:
                scores = {name: scored.scores for name, scored in levels.items()}
                rows = replace(rows, taken=computed_ways(rows.spec, scores))
            shown[level.name] = row_by_row(levels[level.name])
    branches = what_is_seen(rows, shown)
    attended = attend_all(rows, branches)
    kept = {name: x for name, x in shown.items() if keep.scores or name in keep.carried}
    streams = rows.spec.combine is not None and rows.spec.combine.streams is not None
    return Result(
        o=attended.o,
        lse=attended.lse,
        selection={
            name: _listed(rows, rows.spec.level(name), scored.chosen)
            for name, scored in shown.items()
            if scored.chosen is not None
        },
        scores={name: level.scores for name, level in kept.items()},
        candidates={name: level.candidates for name, level in kept.items() if keep.scores},
        forced={name: level.forced for name, level in kept.items() if keep.scores},
        seen={name: keys.visible for name, keys in branches.items() if keep.seen and keys.raw},
        streams=attended.outputs if streams else {},
        loss=terms(rows, levels, attended.outputs),
        state={},
    )


def _level(rows: Rows, level: Level, levels: dict[str, Scored]) -> Scored:
    """One level: form -> scale -> normalise -> reduce over heads, rows -> map -> force -> select."""
    taken = rows.reused.get(level.name)
    if taken and not taken.scored:
        return _taken_over(rows, level, taken)
    clusters = rows.clusters.get(level.name)
    groups = together(rows.spec.rows_of(level), rows.p, rows.lengths, clusters)
    complete = visible_entries(rows, level, groups)  # [R, N]
    allowed = inside_beam(rows, level, levels, groups)  # [R, Hp, N]
    among = kept_entries(rows, level, groups) if taken and taken.narrowed else allowed
    lse = None
    if level.score.source:
        scores = mapped(rows, level, levels[level.score.source], groups, complete.shape[-1])
    else:
        scores, lse = _scored(rows, level, levels, groups)
    if taken and taken.narrowed and (earlier := kept_scores(taken, complete.shape[-1])) is not None:
        earlier = asked_of(earlier, together(None, rows.p), groups)
        scores = scores + earlier.masked_fill(earlier == -math.inf, 0.0)
    if rows.spec.part_of(level) is not None:  # heads of one ranking may have budgets of their own
        scores = spread(scores, _choosing_heads(rows, level, scores, levels))
    allowed, among = (spread(x, scores.shape[1]) for x in (allowed, among))
    forced = forced_entries(rows, level, groups)[:, None] & allowed
    if level.select and level.select.force.level:
        joined = levels[level.select.force.level].chosen
        assert joined is not None, f"level {level.name} forces what is not selected"
        forced = forced | (spread(joined, allowed.shape[1]) & allowed)
    forced = forced | (spread(sink_entries(rows, level, groups), allowed.shape[1]) & allowed)
    if level.select and level.select.force.where:
        forced = forced | (unlike_entries(rows, level, groups) & allowed & complete[:, None])
    scored = complete[:, None] & among
    scores = scores.masked_fill(~scored, -math.inf)
    candidates = scored | forced
    chosen, chooser, tiers = None, groups, None
    if level.select and level.select.quota:
        tiers = tiers_of(level.select, scores.detach(), candidates, forced)
    if level.name in rows.given:  # by a caller, who chooses for every row
        chosen, chooser = _given(rows, level, scores.shape[-1]), together(None, rows.p)
        tiers = tiers if tiers is None else _tiers_of_given(level, of_rows(tiers, groups), chosen)
    elif level.select and level.select.early_stop:
        chosen = walk(rows, level, scores.detach(), candidates, forced, groups)
    elif level.select:
        tail = tail_entries(rows, level)[:, None] if level.select.force.tail else None
        chosen = choose(
            level.select,
            scores.detach(),
            candidates,
            forced,
            tail=tail,
            fill=entries_that_fill(rows, level, groups) if level.select.tokens else None,
            budget=_part(rows, level, levels, candidates, forced)
            if rows.spec.part_of(level)
            else _budget(rows.spec, level, levels, groups, scores.shape[1]),
            late=_late(rows, level),
        )
    way = on_way(rows.spec, rows.taken, level.when)
    if way is not None and chosen is not None:
        chosen = chosen & (way if chosen.shape[1] == len(way) else way[:1])[:, None]
        tiers = tiers if tiers is None else tiers.masked_fill(~chosen, -1)
    return Scored(
        groups=groups,
        complete=complete,
        candidates=candidates,
        forced=forced,
        scores=scores,
        lse=lse,
        chosen=chosen,
        chooser=chooser,
        tiers=tiers,
    )


def _late(rows: Rows, level: Level) -> Tensor | None:
    """Entries that are chosen apart from those before them.  -> bool[N]"""
    if level.select is None or level.select.apart is None:
        return None
    split = rows.x[f"{level.name}_split"].round().long()
    return rows.layouts[level.name].starts >= split


def _budget(
    spec: Spec, level: Level, levels: dict[str, Scored], groups: Together, heads: int
) -> Tensor | None:
    """How many entries another level keeps in the same rows, or hold more tokens.  -> i64[R, Hs, 1]"""
    select = level.select
    if select is None or select.budget_from is None:
        return None
    other = levels[select.budget_from]
    assert other.chosen is not None, f"{select.budget_from} says how many and must select"
    if not len(groups.last):
        return other.chosen.new_zeros(0, heads, 1, dtype=torch.long)
    kept = asked_of(other.chosen.sum(-1, keepdim=True), other.chooser, groups)
    kept = spread(kept, heads)
    if select.budget_in is None:
        return kept
    return kept * spec.level(select.budget_from).partition.size // level.partition.size + 1


def _choosing_heads(rows: Rows, level: Level, scores: Tensor, levels: dict[str, Scored]) -> int:
    other = rows.spec.part_of(level)
    chosen = levels[other.name].chosen if other else None
    return scores.shape[1] if chosen is None else max(scores.shape[1], chosen.shape[1])


def _part(
    rows: Rows, level: Level, levels: dict[str, Scored], candidates: Tensor, forced: Tensor
) -> Tensor:
    """Of each row the part of candidates that the prompt's last rows keep there.  -> i64[R, Hs, 1]"""
    source = rows.spec.part_of(level)
    assert source is not None, f"{level.name} keeps no part"
    assert level.select is not None, f"{level.name} keeps a part"
    other = levels[source.name]
    assert other.chosen is not None, f"{source.name} says how many and must select"
    keep = candidates.sum(-1, keepdim=True)
    if not len(keep):
        return keep
    kept, whole = (y.sum(-1, keepdim=True) for y in (other.chosen, other.candidates))
    part = (spread(y, candidates.shape[1]) for y in (kept, whole.clamp(min=1)))
    keep = _rounded_up(keep, *part).clamp(min=level.select.min or 0)
    counted = level.select.force.counted
    return torch.maximum(keep, (forced & candidates).sum(-1, keepdim=True)) if counted else keep


def _rounded_up(number: Tensor, kept: Tensor, whole: Tensor) -> Tensor:
    """number * kept / whole"""
    return (number * kept + whole - 1) // whole


def _scored(
    rows: Rows, level: Level, levels: dict[str, Scored], groups: Together
) -> tuple[Tensor, Tensor | None]:
    """Scores of a level's own form, [R, Hs, N], and their log-sum-exp where another level wants it.

    Pooled queries score for their group, and so do rows that search together; else each row scores,
    by the entries that it sees itself.
    """
    query = level.query
    alone = together(None, rows.p)
    one = query is not None and (query.pool is not None or isinstance(level.partition, Halving))
    if one:  # pooled, or searching together
        seen = visible_entries(rows, level, groups)
    else:
        groups, seen = alone, complete_entries(rows, level)
    scores = raw_scores(level, rows, groups)
    taken = rows.reused.get(level.name)
    narrowed = taken is not None and taken.narrowed
    among = (
        kept_entries(rows, level, groups) if narrowed else inside_beam(rows, level, levels, groups)
    )
    if narrowed and query is not None and query.rows:
        among = among & own_seen(token_mask(rows, level, among), rows.p)
    seen = seen[:, None] & spread(among, scores.shape[1])
    lse = None
    if any(other.score.lse_from == level.name for other in rows.spec.levels):
        lse = softmax(scores, seen)[1]
    if level.score.lse_from:
        name, source = level.score.lse_from, rows.spec.summed(level)
        total = sum_of_branch(rows, name) if isinstance(source, Attend) else levels[name].lse
        scores = masses_by(scores, seen, total)
    elif level.score.normalise:
        scores = (
            softmax(scores, seen)[0] if level.score.normalise == "softmax" else peaks(scores, seen)
        )
    heads = scores.shape[1]
    scores = over_heads(level, scores, rows.Hkv)
    if query is not None and query.reduce is not None and not one:
        seen = seen[:, :: heads // scores.shape[1]]
        scores = reduced(query.reduce, scores, seen, together(query, rows.p, rows.lengths).members)
    return scores, lse


def _taken_over(rows: Rows, level: Level, taken: Taken) -> Scored:
    """A level that this call does not score: the kept entries are its choice, if it has one."""
    groups, complete = together(None, rows.p), complete_entries(rows, level)
    if taken.turn == "dense":
        chosen, candidates = None, torch.ones_like(complete[:, None])
    else:
        chosen = candidates = kept_entries(rows, level)
        if level.name in rows.given:
            chosen = candidates = _given(rows, level, complete.shape[-1])
    scores = kept_scores(taken, complete.shape[-1])
    if scores is None:
        scores = torch.full(candidates.shape, -math.inf, dtype=rows.x["q"].dtype).to(rows.p.device)
    return Scored(
        groups=groups,
        complete=complete,
        candidates=candidates,
        forced=torch.zeros_like(candidates),
        scores=scores,
        lse=None,
        chosen=chosen,
        chooser=groups,
    )


def _tiers_of_given(level: Level, tiers: Tensor, chosen: Tensor) -> Tensor:
    """The tiers of what a caller chose: as the scores say, or the last one where they leave it out."""
    assert level.select is not None
    last = len(level.select.quota or ()) - 1
    return torch.where(tiers < 0, last, tiers).masked_fill(~chosen, -1)


def _given(rows: Rows, level: Level, N: int) -> Tensor:
    """The caller's choice, as far as the row sees it.  -> bool[T, Hs, N]"""
    chosen = members(ListSelection(level=level.name, indices=rows.given[level.name]), N)
    return chosen & begun_entries(rows, level, together(None, rows.p))[:, None]


def _listed(rows: Rows, level: Level, chosen: Tensor | None) -> Selection:
    """A level's choice: a list, as wide as the spec says or as the list that was given; or bits."""
    assert level.select is not None
    assert chosen is not None
    if level.select.counts_vary:
        return bitmap_from_members(level.name, chosen)
    given = rows.given.get(level.name)
    width = rows.spec.width(level) if given is None else given.shape[-1]
    return from_members(level.name, chosen, width=width)


def concatenate(parts: list[Result]) -> Result:
    """Chunks or sequences one after another, along rows; entries are padded to the longest."""
    first = parts[0]
    pads = {"scores": -math.inf, "candidates": False, "forced": False, "seen": False}

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
        seen=rows("seen"),
        streams={name: torch.cat([p.streams[name] for p in parts]) for name in first.streams},
        loss={name: torch.cat([p.loss[name] for p in parts]) for name in first.loss},
        state={},
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
