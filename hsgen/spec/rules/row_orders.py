"""Orders of queries: what they need of the rows that choose together."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import Level, Path, Spec
from hsgen.spec.rules.problem import Problem


def row_orders(spec: Spec) -> Iterator[Problem]:
    names = [(x.within, x.score.source) for x in spec.levels]
    for i, level in enumerate(spec.levels):
        order, path = level.permute and level.permute.queries, ("levels", i)
        wrong: tuple[str, str, Path] | None = None
        other = next((x for x in spec.levels if x.name in level.named and _differ(x, level)), None)
        if other is not None:
            said = f"the clusters and the rows of '{other.name}', which is named here, got others"
            wrong = said, "write the same 'permute: {queries}' and 'query' in both", path
        elif order is not None:
            wrong = _wrong(spec, level, path)
            if wrong is None and any(level.name in pair for pair in names):
                said = "rows that no other level narrows or takes scores of, got another"
                wrong = said, "name another level there", (*path, "permute", "queries")
        elif level.query is not None and level.query.by is not None:
            said = "'permute: {queries: {kmeans: ...}}' with 'by: cluster', got none"
            wrong = said, "write 'queries: {kmeans: 300, iterations: 50}'", (*path, "query", "by")
        if wrong is not None:
            yield Problem(
                code="HS135",
                path=wrong[2],
                message=f"expected {wrong[0]}",
                help=wrong[1],
                also=tuple((*path, field) for field in ("permute", "query", "score", "select")),
            )


def _differ(one: Level, other: Level) -> bool:
    """Whether rows that one of them puts together are apart in the other."""
    orders = [level.permute and level.permute.queries for level in (one, other)]
    return orders != [None, None] and (orders[0] != orders[1] or one.query != other.query)


def _wrong(spec: Spec, level: Level, path: Path) -> tuple[str, str, Path] | None:
    """Expected and got, what to type, and where."""
    assert level.permute is not None
    query, select = level.query, level.select
    at: Path = (*path, "permute", "queries")
    if spec.causal:
        return "'causal: false' with an order of queries, got true", "write 'causal: false'", at
    if query is None or query.pool is None or query.by is None:
        help = "write 'query: {by: cluster, pool: mean}'"
        return "clusters of queries that are pooled, got none", help, at
    if query.block is not None or query.last is not None or query.tile is not None:
        return "rows of a cluster, got others as well", "remove them", (*path, "query")
    agree = level.score.share != "head" or query.heads is not None
    if agree:
        help = "write 'share: head' without 'heads'"
        return (
            "heads that choose for themselves, as clusters are a head's own, got others",
            help,
            at,
        )
    if level.within is not None or level.score.source is not None:
        return "scores of their own in every entry, got those of another level", "use 'form'", at
    if select is not None and select.early_stop is not None:
        return "rows in place that walk, got an order", "remove 'queries'", at
    return None
