"""Cheap estimates: vectors in fewer bits, and masses measured by what a branch attends anyway."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import Attend, Level, Path, Spec
from hsgen.spec.rules.problem import Problem


def branch_sums(spec: Spec) -> Iterator[Problem]:
    """A branch whose log-sum-exp normalises: its keys are known, and a row and head has one sum."""
    for i, level in enumerate(spec.levels):
        branch = spec.summed(level)
        path: Path = ("levels", i, "score", "lse_from")
        if not isinstance(branch, Attend) or level.score.source is not None:
            continue
        j = spec.attend.index(branch)
        if why := _not_known(branch):
            yield Problem(
                code="HS200",
                path=path,
                message="expected a branch whose keys are known before anything is chosen, got"
                f" '{branch.name}': {why}",
                help="name a branch with 'window' or 'static', or a level",
                also=tuple(("attend", j, key) for key in ("name", "over", "when")),
            )
        elif why := _no_row(level):
            yield Problem(
                code="HS201",
                path=path,
                message=f"expected scores of each row and query head, of which '{branch.name}' has"
                f" one sum each, got {why}",
                help="remove 'lse_from'",
                also=(
                    ("levels", i, "score", "form"),
                    *(("levels", i, "query", key) for key in ("pool", "heads")),
                    ("levels", i, "q"),
                ),
            )


def _not_known(branch: Attend) -> str | None:
    if branch.over is not None:
        return f"it attends the level '{branch.over}'"
    return f"it is there on the way '{branch.when}' only" if branch.when else None


def _no_row(level: Level) -> str | None:
    """Whose scores there are instead."""
    query = level.query
    if level.one_query_a_group:
        return f"queries 'q_{level.q}' of groups"
    if level.score.form not in ("dot", "bound"):
        return f"form '{level.score.form}'"
    if query is not None and query.pool is not None:
        return "queries that are pooled"
    return "heads that are pooled" if query is not None and query.heads is not None else None


def score_dtypes(spec: Spec) -> Iterator[Problem]:
    """Vectors are rounded where there are two that are multiplied."""
    for i, level in enumerate(spec.levels):
        score = level.score
        if score.dtype is None or score.form == "dot":
            continue
        why = (
            f"scores of '{score.source}' are taken"
            if score.form is None
            else "it is the index's own: 'index: {dtype}'"
            if score.by_index
            else f"form '{score.form}' multiplies no queries and keys"
            if score.form != "bound"
            else "a bound of rounded keys bounds nothing"
        )
        yield Problem(
            code="HS202",
            path=("levels", i, "score", "dtype"),
            message=f"'dtype' has no meaning here: {why}",
            help="remove 'dtype'",
            also=tuple(("levels", i, "score", key) for key in ("form", "source")),
            at_key=True,
        )
