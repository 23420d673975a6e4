"""Order entries and keep the best by a level's rule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hsgen.spec import Select, Tier, TopP

ONE = 1 << 30  # masses and parts are whole numbers of 2^-30, so that their sums know no order


MOST_MASS = 1 << 44  # of one entry: far above every sum of softmaxes, far below what a sum can hold


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


def choose(
    select: Select,
    scores: Tensor,
    candidates: Tensor,
    forced: Tensor,
    *,
    tail: Tensor | None = None,
    fill: tuple[Tensor, Tensor] | None = None,
    budget: Tensor | None = None,
    late: Tensor | None = None,
) -> Tensor:
    """Keep the best candidates.  f[T, Hs, N], bool[T, Hs, N], bool[T, Hs, N] -> bool[T, Hs, N]

    tail: bool[T, 1, N], of the forced those that are on top of whatever the rule keeps.
    fill: i64[T, 1, 1] twice, entries that so many tokens fill, for a budget of tokens.
    budget: i64[T, Hs, 1], how many entries, where another level says it.
    late: bool[N], the entries that are chosen apart from the others.
    """
    if late is not None:
        sides = (late, ~late)
        ways = {"tail": tail, "fill": fill, "budget": budget}
        one, other = (
            choose(select, scores, candidates & side, forced & side, **ways) for side in sides
        )
        return one | other
    if tail is not None:
        tail = tail & candidates
        rest = candidates & ~tail
        return choose(select, scores, rest, forced & ~tail, fill=fill, budget=budget) | tail
    if select.scope == "heads":
        flat = [y.flatten(1).unsqueeze(1) for y in (scores, candidates, forced)]
        chosen = _choose(select, *flat, fill=fill, heads=scores.shape[1])
        return chosen.view_as(candidates)
    if select.scope == "head":
        flat = [y.transpose(0, 1).flatten(1) for y in (scores, candidates, forced)]
        chosen = _choose(select, *flat, fill=fill)
        return chosen.unflatten(1, scores.shape[::2]).transpose(0, 1)
    if select.scope == "entry":
        flat = [y.transpose(0, 2) for y in (scores, candidates, forced)]
        return _choose(select, *flat, fill=fill).transpose(0, 2)
    return _choose(select, scores, candidates, forced, fill=fill, budget=budget)


def _choose(
    select: Select,
    scores: Tensor,
    candidates: Tensor,
    forced: Tensor,
    *,
    fill: tuple[Tensor, Tensor] | None,
    budget: Tensor | None = None,
    heads: int = 1,
) -> Tensor:
    """The same for what is ranked together.  heads: how many that is, each with a budget"""
    forced = forced & candidates
    if select.threshold is not None:
        return ((scores > select.threshold) & candidates) | forced
    if select.top_p is not None:
        return _choose_mass(select.top_p, select.force.counted, scores, candidates, forced)
    if select.quota is not None:
        return tiers_of(select, scores, candidates, forced) >= 0
    if select.fraction is not None:
        whole = candidates.sum(-1, keepdim=True)
        if select.of == "all":
            whole = torch.full_like(whole, candidates.shape[-1])
        keep = share_of(select.fraction, whole)
    elif select.budget_from is not None:
        assert budget is not None, "another level says how many"
        keep = budget
    elif select.tokens is not None:
        assert fill is not None, "a budget of tokens needs to know what they fill"
        entries, tokens = fill
        keep = nearest(heads * select.tokens * entries, tokens).clamp(min=1)
        keep = keep.expand(*forced.shape[:-1], 1)
    else:
        keep = torch.full_like(forced.sum(-1, keepdim=True), heads * select.budget)
    if not select.force.counted:
        keep = keep + forced.sum(-1, keepdim=True)
    chosen = _early(order(scores, candidates, forced), keep) & candidates
    return chosen | forced if select.fraction is not None else chosen


def _early(ranking: Tensor, keep: Tensor) -> Tensor:
    """Entries among the first `keep` of a ranking.  i64[..., N], i64[..., 1] -> bool[..., N]"""
    early = torch.arange(ranking.shape[-1], device=ranking.device) < keep
    return torch.zeros_like(ranking, dtype=torch.bool).scatter_(-1, ranking, early)


def fixed(value: float, *, up: bool) -> int:
    """A part of a whole as a number of 2^-30, the next one up or down.

    Against the way in which its product is rounded, or 0.4 of 10 would be 5.
    """
    return math.ceil(value * ONE) if up else math.floor(value * ONE)


def share_of(part: float, whole: Tensor, *, up: bool = True) -> Tensor:
    """part * whole, rounded up or down, in integers that do not overflow below 2^62 / part."""
    units = fixed(part, up=not up)
    high, low = whole // ONE, whole % ONE
    return units * high + (units * low + (ONE - 1 if up else 0)) // ONE


def nearest(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, to the nearest whole number, halves to the even one."""
    twice = 2 * part + whole
    up = twice // (2 * whole)
    half = twice % (2 * whole) == 0
    return up - (half & (up % 2 == 1)).long()


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
    if top_p.of == "rest":
        candidates, first = candidates & ~forced, torch.zeros_like(forced)
    elif counted:
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
        taken = sums - mass.gather(-1, ranking) < share_of(top_p.mass, total)
    else:
        taken = sums <= share_of(top_p.mass, total, up=False)
    return torch.zeros_like(candidates).scatter_(-1, ranking, taken) & candidates


def tiers_of(select: Select, scores: Tensor, candidates: Tensor, forced: Tensor) -> Tensor:
    """The tier of every entry, -1 of what is left out.  f[T, Hs, N], bool, bool -> i64[T, Hs, N]

    Forced entries come first, or, not counted, the others are ranked as if nothing were forced.
    """
    assert select.quota is not None, "there are tiers only where there are quotas"
    forced = forced & candidates
    ranked = candidates if select.force.counted else candidates & ~forced
    ranking = order(scores, ranked, forced & ranked)
    place = torch.zeros_like(ranking).scatter_(
        -1, ranking, torch.arange(ranking.shape[-1], device=ranking.device).expand_as(ranking)
    )
    weight = masses(scores).masked_fill(~ranked, 0)
    before = torch.zeros_like(weight).scatter_(
        -1, ranking, weight.gather(-1, ranking).cumsum(-1) - weight.gather(-1, ranking)
    )
    count, total = ranked.sum(-1, keepdim=True), weight.sum(-1, keepdim=True)
    tier = torch.full_like(place, -1)
    for i, (least, part) in reversed([*enumerate(_sums(select.quota))]):
        inside = place < share_of(least, count)
        if select.quota[i].fraction is None:
            inside = inside | (before < share_of(part, total))
        tier = tier.masked_fill(inside & ranked, i)
    return tier.masked_fill(forced, 0)


def _sums(tiers: tuple[Tier, ...]) -> list[tuple[float, float]]:
    """Up to each tier: the part of the entries, and of the mass."""
    found: list[tuple[float, float]] = []
    fraction = mass = least = 0.0
    for tier in tiers:
        fraction, mass = fraction + (tier.fraction or 0.0), mass + (tier.mass or 0.0)
        least = max(least, tier.least or 0.0)
        found.append((max(fraction, least), mass))
    return found
