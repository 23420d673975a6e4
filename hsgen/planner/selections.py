"""Selections of a level."""

from __future__ import annotations

import math

from hsgen import spec as language
from hsgen.graph import Node, Select, SelectSet, Tiers, Unlike
from hsgen.planner.builder import Builder
from hsgen.planner.entries import before_of, diagonal, parts_of
from hsgen.planner.orders import Assigned, cut_of, order


def select(
    spec: language.Spec, level: language.Level, select: language.Select, cut: Assigned | None
) -> Select:
    return Select(
        level=level.name,
        size=level.partition.size,
        stride=level.partition.stride,
        k=select.budget,
        width=spec.width(level),
        first=select.force.first,
        last=select.force.last,
        counted=select.force.counted,
        final=select.top_k is not None,
        within=level.within,
        tail=True if select.force.tail else None,
        when=level.when,
        joined=select.force.level,
        before=before_of(level),
        sink=select.force.sink,
        cut=cut or (cut_of(level) if select.force.sink else None),
        diagonal=diagonal(level),
    )


def select_set(level: language.Level, select: language.Select, cut: Assigned | None) -> SelectSet:
    rule = select.rules[0]
    assert rule != "beam", "a beam is a list"
    top_p, stop = select.top_p, select.early_stop
    said = {"top_p": top_p and top_p.mass, "early_stop": stop and stop.gain}
    said |= {"quota": None, "budget_from": None}
    value = said[rule] if rule in said else getattr(select, rule)
    return SelectSet(
        level=level.name,
        size=level.partition.size,
        stride=level.partition.stride,
        rule=rule,
        value=float(value or 0.0),
        first=select.force.first,
        last=select.force.last,
        counted=select.force.counted,
        boundary=top_p.boundary if top_p else None,
        scope=top_p.scope if top_p else select.scope,
        least=top_p.min if top_p else select.min,
        most=top_p.max if top_p else None,
        tail=True if select.force.tail else None,
        when=level.when,
        of=top_p.of if top_p else select.of,
        budget_from=select.budget_from,
        budget_in=select.budget_in,
        where=True if select.force.where else None,
        apart=select.apart,
        before=before_of(level),
        parts=parts_of(level),
        tiers=tiers_of(select.quota) if select.quota else None,
        step=stop.entries if stop else None,
        sink=select.force.sink,
        cut=cut or (cut_of(level) if select.force.sink or stop else None),
        diagonal=diagonal(level),
    )


def select_operands(
    builder: Builder, level: language.Level, held: tuple[Node, ...]
) -> tuple[Node, ...]:
    """What a selection reads besides scores and a beam: what it walks, and the order of entries.

    held: what says in which node or run a token is.
    """
    assert level.select is not None
    stop = level.select.early_stop
    ordered = held
    if not held and (stop or level.select.force.sink):
        ordered = order(builder, level)
    if stop is None:
        return ordered
    after = (builder.nodes[f"{stop.after}.lse"],) if stop.after else ()
    return (builder.query(), builder.keys(level.kv), *after, *ordered)


def unlike(builder: Builder, level: language.Level) -> tuple[Node, ...]:
    """Which entries are forced by what their tokens are; none where that is not asked."""
    where = level.select and level.select.force.where
    if not where:
        return ()
    assert level.query is not None, "it is blocks of queries that are compared"
    assert level.query.block is not None
    op = Unlike(
        level=level.name,
        similarity=where.similarity,
        centred=where.centred,
        block=level.query.block,
        size=level.partition.size,
        stride=level.partition.stride,
    )
    at = builder.place(level, "select", "force", "where")
    operands = (builder.query(level.q), builder.keys(level.kv))
    return (builder.add(f"{level.name}.unlike", op, *operands, at=at),)


def tiers_of(quota: tuple[language.Tier, ...]) -> Tiers:
    """Parts of all tiers up to each, in units of 2^-30."""
    fraction = mass = least = 0.0
    steps: list[tuple[int, int, int]] = []
    for tier in quota:
        fraction, mass = fraction + (tier.fraction or 0.0), mass + (tier.mass or 0.0)
        least = max(least, tier.least or 0.0)
        part = mass if tier.fraction is None else fraction
        steps.append((tier.merge, math.floor(part * (1 << 30)), math.floor(least * (1 << 30))))
    return Tiers(by="mass" if quota[0].fraction is None else "fraction", steps=tuple(steps))
