"""Routes: ways that levels and branches ask for, and who takes them."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.errors import nearest
from hsgen.spec.model import Path, Route, Spec
from hsgen.spec.rules.problem import Problem

_SOURCES = ("table", "input", "statistic")
_EXAMPLE = "route: {by: layer, table: [full, near]}"


def routes(spec: Spec) -> Iterator[Problem]:
    """What a route says of itself."""
    route = spec.route
    if route is None:
        return
    said = [key for key in _SOURCES if getattr(route, key)]
    if len(said) != 1:
        yield Problem(
            code="HS120",
            path=("route", said[1]) if said else ("route",),
            message=f"expected one of {', '.join(_SOURCES)} in 'route', got"
            f" {' and '.join(said) or 'none'}",
            help=f"write '{_EXAMPLE}'",
            also=_ways_of(),
            at_key=bool(said),
        )
    elif route.table and route.by.startswith("sample"):
        yield Problem(
            code="HS121",
            path=("route", "by"),
            message=f"expected 'by: layer' or 'by: head' with 'table', got '{route.by}':"
            " sequences have no numbers of their own",
            help="write 'by: head', or 'input' in place of 'table'",
            also=(("route", "table"),),
        )
    elif route.by == "head" and spec.heads and route.table:
        yield from _heads_of_table(route, spec.heads.query)


def _heads_of_table(route: Route, heads: int) -> Iterator[Problem]:
    """A table that ends in the middle of a round is one of a model with other heads."""
    if heads % len(route.table):
        yield Problem(
            code="HS123",
            path=("route", "table"),
            message=f"expected a number of ways that divides the query heads, {heads}, got"
            f" {len(route.table)}",
            help="write one way for each query head, or a pattern that they repeat",
            also=(("heads",), ("route", "by")),
        )


def _ways_of() -> tuple[Path, ...]:
    """All that says which ways there are."""
    return (("route",), *(("route", key) for key in _SOURCES))


def _asked(spec: Spec) -> Iterator[tuple[Path, str]]:
    """Every `when`."""
    for field, items in (("levels", spec.levels), ("attend", spec.attend)):
        for i, item in enumerate(items):
            if item.when is not None:
                yield (field, i, "when"), item.when


def ways(spec: Spec) -> Iterator[Problem]:
    """Whether the ways that are asked for and the ways that are taken are the same."""
    known = spec.route.ways if spec.route else ()
    asked = [*_asked(spec)]
    for path, way in asked:
        if way not in known:
            close = nearest(way, known)
            listed = f"ways: {', '.join(known)}" if known else f"write '{_EXAMPLE}' at the top"
            yield Problem(
                code="HS122",
                path=path,
                message=f"unknown way '{way}'" if known else f"way '{way}' of no route",
                help=f"did you mean '{close}'? {listed}" if close else listed,
                also=_ways_of(),
            )
    if spec.route is None or not known:
        return
    whens = tuple(("attend", i, "when") for i in range(-1, len(spec.attend)))
    taken = {branch.when for branch in spec.attend}
    missing = [way for way in known if way not in taken]
    if taken == {None}:
        yield Problem(
            code="HS124",
            path=("route",),
            message="expected a branch with 'when', got none: every way is the same",
            help=f"write 'when: {known[0]}' in a branch, or remove 'route'",
            also=whens,
            at_key=True,
        )
    elif missing and None not in taken:
        yield Problem(
            code="HS124",
            path=("route",),
            message=f"expected a branch on the way '{missing[0]}', got none",
            help=f"write 'when: {missing[0]}' in a branch, or leave that way out",
            also=(*whens, *_ways_of()),
        )


def on_ways(spec: Spec) -> Iterator[Problem]:
    """Whether what is there on some ways fits what it is used by."""
    levels = {level.name: (j, level) for j, level in enumerate(spec.levels)}
    if spec.combine and spec.combine.gates and any(branch.when for branch in spec.attend):
        i = next(i for i, branch in enumerate(spec.attend) if branch.when)
        yield Problem(
            code="HS125",
            path=("attend", i, "when"),
            message="expected the same branches on every way with 'gates', which has one gate for"
            " each, got 'when'",
            help="write 'combine: {softmax: union}', or one spec for each way",
            also=(("combine",),),
            at_key=True,
        )
    users = [(("attend", i), branch.over, branch.when) for i, branch in enumerate(spec.attend)]
    users += [(("levels", i), level.within, level.when) for i, level in enumerate(spec.levels)]
    for user, name, when in users:
        if name not in levels:
            continue
        j, level = levels[name]
        if level.when not in (None, when):
            got = f"'when: {when}'" if when else "none"
            yield Problem(
                code="HS126",
                path=(*user, "when") if when else user,
                message=f"expected 'when: {level.when}' as in '{level.name}', which is used here,"
                f" got {got}",
                help=f"write 'when: {level.when}', or remove 'when' in '{level.name}'",
                also=(
                    ("levels", j, "when"),
                    *((*user, key) for key in ("when", "over", "within")),
                ),
            )
    yield from _shared_by_heads(spec)


def _shared_by_heads(spec: Spec) -> Iterator[Problem]:
    """A selection of several heads, of which each may be on a way of its own."""
    if spec.route is None or not spec.route.by.endswith("head"):
        return
    for i, level in enumerate(spec.levels):
        if level.when is not None and (level.score.share != "head" or level.score.by_index):
            yield Problem(
                code="HS126",
                path=("levels", i, "when"),
                message=f"expected a selection of each head with 'by: {spec.route.by}', got one of"
                f" '{level.name}' that heads share",
                help="remove 'when' here, and write it in the branch alone",
                also=(("route", "by"), ("levels", i, "score")),
                at_key=True,
            )


def needs_combine(spec: Spec) -> bool:
    """Whether on some way there are several branches."""
    ways: tuple[str | None, ...] = spec.route.ways if spec.route else (None,)
    return any(sum(branch.when in (None, way) for branch in spec.attend) > 1 for way in ways)
