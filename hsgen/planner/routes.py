"""The route, and what is there on one of its ways."""

from __future__ import annotations

from hsgen.graph import Node, Route
from hsgen.graph.types import ROUTE_DIMS
from hsgen.planner.builder import Builder


def taken(builder: Builder, when: str | None) -> tuple[Node, ...]:
    """The last operand of what is there on one way; none of what is there on all."""
    return () if when is None else (_route(builder),)


def _route(builder: Builder) -> Node:
    """The way that each takes, planned once."""
    route = builder.spec.route
    assert route is not None
    dims = ROUTE_DIMS[route.by]
    statistic = route.statistic
    op = Route(
        by=route.by,
        ways=route.ways,
        places=tuple(route.ways.index(way) for way in route.table or route.input or route.ways),
        repeats=bool(route.table),
        divergence=statistic.threshold if statistic else None,
    )
    operands: list[Node] = []
    if statistic:
        operands += [builder.scores[name] for name in statistic.levels]
    elif route.input:
        operands.append(builder.input("route", "route", *dims, dtype="i32"))
    elif route.by == "layer":
        operands.append(builder.input("layer", "route", *dims, dtype="i32"))
    return builder.add("route.taken", op, *operands, at=builder.spec.span("route"))
