"""One sequence, some rows at a time: score and narrow level by level, attend, combine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hsgen.reference.attention import attend_all, what_is_seen
from hsgen.reference.choice import choose, tiers_of
from hsgen.reference.entries import (
    begun_entries,
    complete_entries,
    forced_entries,
    inside_beam,
    sink_entries,
    tail_entries,
)
from hsgen.reference.inputs import some_keys, tensor_kinds
from hsgen.reference.layouts import layout_of
from hsgen.reference.pools import pooled_entries
from hsgen.reference.routes import on_way, ways_taken
from hsgen.reference.rows import Rows, Scored, spread
from hsgen.reference.scores import mapped, masses_by, over_heads, raw_scores, softmax
from hsgen.reference.stopping import walk
from hsgen.selection import (
    BitmapSelection,
    ListSelection,
    Selection,
    bitmap_from_members,
    from_members,
    members,
)
from hsgen.spec import Level, Spec

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
    """

    o: Tensor
    lse: dict[str, Tensor]
    selection: dict[str, Selection]
    scores: dict[str, Tensor]
    candidates: dict[str, Tensor]
    forced: dict[str, Tensor]
    seen: dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """What of a sequence is worth its memory."""

    scores: bool = True  # also candidates and forced
    seen: bool = False


def one_sequence(
    spec: Spec, x: dict[str, Tensor], p: Tensor, given: dict[str, Tensor], *, keep: Keep
) -> Result:
    """All rows of one sequence, some at a time.  x: [T, H, D] and [S, H, D]; p: positions [T]."""
    keys = some_keys(spec, x)
    group = x["q"].shape[1] // keys.shape[1]
    layouts = {level.name: layout_of(level, x, len(keys), group) for level in spec.levels}
    pooled = {level.name: pooled_entries(level, layouts[level.name], x) for level in spec.levels}
    kinds = tensor_kinds(spec)
    taken = ways_taken(spec, x)
    step = max(1, CHUNK_ELEMENTS // (x["q"].shape[1] * max(len(keys), 1)))
    if any(_ranks_rows_together(level) for level in spec.levels):
        step = max(len(p), 1)
    parts = []
    for t in range(0, max(len(p), 1), step):
        rows = Rows(
            spec=spec,
            x={n: y[t : t + step] if kinds[n] == "query" else y for n, y in x.items()},
            pooled=pooled,
            layouts=layouts,
            p=p[t : t + step],
            taken=taken,
            given={name: indices[t : t + step] for name, indices in given.items()},
        )
        parts.append(_compute(rows, keep=keep))
    return concatenate(parts)


def _ranks_rows_together(level: Level) -> bool:
    select = level.select
    if select is None:
        return False
    by_head = "head" in (select.scope, select.top_p and select.top_p.scope)
    return by_head or bool(select.early_stop and select.early_stop.rows > 1)


def _compute(rows: Rows, *, keep: Keep) -> Result:
    """Score and narrow level by level, attend, combine."""
    levels: dict[str, Scored] = {}
    for level in rows.spec.levels:
        levels[level.name] = _level(rows, level, levels)
    branches = what_is_seen(rows, levels)
    o, lse = attend_all(rows, branches)
    kept = levels if keep.scores else {}
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
        seen={name: keys.visible for name, keys in branches.items() if keep.seen and keys.raw},
    )


def _level(rows: Rows, level: Level, levels: dict[str, Scored]) -> Scored:
    """One level: form -> scale -> normalise -> reduce over heads -> map -> force -> select."""
    complete = complete_entries(rows, level)  # [T, N]
    allowed = inside_beam(rows, level, levels)  # [T, Hp, N]
    lse = None
    if level.score.source:
        scores = mapped(rows, level, levels[level.score.source], complete.shape[-1])
    else:
        scores = raw_scores(level, rows)
        seen = complete[:, None] & spread(allowed, scores.shape[1])
        if any(other.score.lse_from == level.name for other in rows.spec.levels):
            lse = softmax(scores, seen)[1]
        if level.score.lse_from:
            scores = masses_by(scores, seen, levels[level.score.lse_from].lse)
        elif level.score.normalise:
            scores = softmax(scores, seen)[0]
        scores = over_heads(level, scores, rows.Hkv)
    allowed = spread(allowed, scores.shape[1])
    forced = forced_entries(rows, level)[:, None] & allowed
    forced = forced | (spread(sink_entries(rows, level), allowed.shape[1]) & allowed)
    scored = complete[:, None] & allowed
    scores = scores.masked_fill(~scored, -math.inf)
    candidates = scored | forced
    chosen = tiers = None
    if level.select and level.select.quota:
        tiers = tiers_of(level.select, scores.detach(), candidates, forced)
    if level.name in rows.given:
        chosen = members(
            ListSelection(level=level.name, indices=rows.given[level.name]), scores.shape[-1]
        )
        chosen = chosen & begun_entries(rows, level)[:, None]
        tiers = tiers if tiers is None else _tiers_of_given(level, tiers, chosen)
    elif level.select and level.select.early_stop:
        chosen = walk(rows, level, scores.detach(), candidates, forced)
    elif level.select:
        tail = tail_entries(rows, level)[:, None] if level.select.force.tail else None
        chosen = choose(level.select, scores.detach(), candidates, forced, tail=tail)
    way = on_way(rows.spec, rows.taken, level.when)
    if way is not None and chosen is not None:
        chosen = chosen & (way if chosen.shape[1] == len(way) else way[:1])[:, None]
        tiers = tiers if tiers is None else tiers.masked_fill(~chosen, -1)
    return Scored(
        complete=complete,
        candidates=candidates,
        forced=forced,
        scores=scores,
        lse=lse,
        chosen=chosen,
        tiers=tiers,
    )


def _tiers_of_given(level: Level, tiers: Tensor, chosen: Tensor) -> Tensor:
    """The tiers of what a caller chose: as the scores say, or the last one where they leave it out."""
    assert level.select is not None
    last = len(level.select.quota or ()) - 1
    return torch.where(tiers < 0, last, tiers).masked_fill(~chosen, -1)


def _listed(rows: Rows, level: Level, chosen: Tensor | None) -> Selection:
    """A level's choice: a list, as wide as the spec says or as the list that was given; or bits."""
    assert level.select is not None
    assert chosen is not None
    if level.select.counts_vary:
        return bitmap_from_members(level.name, chosen)
    given = rows.given.get(level.name)
    width = level.select.width if given is None else given.shape[-1]
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
