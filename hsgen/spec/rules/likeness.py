"""Entries that are forced by what their tokens are."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import Blocks, Level, Path, Spec
from hsgen.spec.rules.problem import Problem

_RULES = ("top_p", "threshold", "fraction")  # that any number of forced entries leaves room


def likeness(spec: Spec) -> Iterator[Problem]:
    """Blocks of keys and of rows that one vector stands for, and room for those that none does."""
    for i, level in enumerate(spec.levels):
        select = level.select
        if select is None or select.force.where is None:
            continue
        path: Path = ("levels", i, "select", "force")
        wrong = _not_blocks(level)
        if wrong:
            yield Problem(
                code="HS226",
                path=(*path, "where"),
                message=f"expected blocks of keys and of queries for 'where', got {wrong[0]}",
                help=wrong[1],
                also=tuple(
                    ("levels", i, key)
                    for key in ("partition", "query", "score", "permute", "within", "pool")
                ),
                at_key=True,
            )
        elif len(select.rules) == 1 and (select.rules[0] not in _RULES or select.force.counted):
            rule = select.rules[0]
            free = select.top_p is not None and select.top_p.of == "rest"
            if (rule == "threshold" or free) and rule in _RULES:
                continue
            yield Problem(
                code="HS227",
                path=(*path, "where"),
                message="expected room for any number of entries that 'where' forces, got"
                f" '{rule}' of which they are a part",
                help="write 'top_p: {mass: 0.98, of: rest}', or 'counted: false' with 'fraction'",
                also=(
                    *(("levels", i, "select", key) for key in (rule, "scope")),
                    (*path, "counted"),
                ),
                at_key=True,
            )


def _not_blocks(level: Level) -> tuple[str, str] | None:
    """What there is instead, and what to type."""
    blocks, query, score = level.partition, level.query, level.score
    if not isinstance(blocks, Blocks) or blocks.size != blocks.stride or blocks.before:
        return f"'{blocks.kind}'", "write 'partition: {blocks: 64}' without 'stride'"
    if level.permute is not None or level.within is not None:
        key = "permute" if level.permute else "within"
        return f"'{key}'", f"remove '{key}'"
    if query is None or query.block is None or query.heads is not None:
        return "other rows or heads together", "write 'query: {block: 128, pool: mean}'"
    if score.form != "dot" or score.share != "head":
        return "scores of others", "write 'score: {form: dot}', each head for itself"
    return None
