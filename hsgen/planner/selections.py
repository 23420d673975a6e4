"""Selections of a level."""

from __future__ import annotations

from hsgen import spec as language
from hsgen.graph import Select, SelectSet
from hsgen.planner.entries import before_of, parts_of


def select(spec: language.Spec, level: language.Level, select: language.Select) -> Select:
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
    )


def select_set(level: language.Level, select: language.Select) -> SelectSet:
    rule = select.rules[0]
    assert rule != "beam", "a beam is a list"
    top_p = select.top_p
    value = None if rule == "top_p" else getattr(select, rule)
    return SelectSet(
        level=level.name,
        size=level.partition.size,
        stride=level.partition.stride,
        rule=rule,
        value=float((top_p.mass if top_p else value) or 0.0),
        first=select.force.first,
        last=select.force.last,
        counted=select.force.counted,
        boundary=top_p.boundary if top_p else None,
        scope=top_p.scope if top_p else select.scope,
        least=top_p.min if top_p else None,
        most=top_p.max if top_p else None,
        tail=True if select.force.tail else None,
        when=level.when,
        of=select.of,
        before=before_of(level),
        parts=parts_of(level),
    )
