"""Nodes that take their tokens, entries that take their rows, and a softmax for each of them."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import Attend, Force, LearnedTree, Level, Path, Spec
from hsgen.spec.rules.problem import Problem


def nodes_take(spec: Spec) -> Iterator[Problem]:
    """A token that is in several nodes, or in none, goes down no tree."""
    for i, level in enumerate(spec.levels):
        tree, path = level.partition, ("levels", i, "partition", "takes")
        if not isinstance(tree, LearnedTree) or tree.takes is None:
            continue
        inside = next((x for x in spec.levels if x.within == level.name), None)
        loss = spec.loss and spec.loss.dual_entropy
        why = (
            "a node with room for its own has 'capacity'"
            if tree.capacity is not None
            else f"its tokens are those of a node of '{level.within}'"
            if level.within
            else f"'{inside.name}' lies inside, and a token is in several nodes"
            if inside
            else "a loss of assignments has one node for each token"
            if loss and loss.tree == level.name
            else None
        )
        if why:
            yield Problem(
                code="HS192",
                path=path,
                message=f"'takes' has no meaning here: {why}",
                help="remove 'takes'",
                also=((*path[:-1], "capacity"), ("levels", i, "within"), ("levels",), ("loss",)),
                at_key=True,
            )


def rows_taken(spec: Spec) -> Iterator[Problem]:
    """Entries that take rows ask nothing of a row alone."""
    for i, level in enumerate(spec.levels):
        select, path = level.select, ("levels", i, "select", "scope")
        if select is None or select.scope != "entry" or select.rules != ("top_k",):
            continue
        if why := _no_rows(spec, level):
            yield Problem(
                code="HS193",
                path=path,
                message=f"'scope: entry' has no meaning here: {why}",
                help="remove 'scope'",
                also=(
                    *((*path[:-1], key) for key in ("force", "apart")),
                    *(("levels", i, key) for key in ("query", "within")),
                    ("reuse",),
                ),
                at_key=True,
            )


def _no_rows(spec: Spec, level: Level) -> str | None:
    select = level.select
    assert select is not None
    if select.force.model_copy(update={"counted": True}) != Force():
        return "what is forced is forced for every row"
    if spec.rows_of(level) is not None:
        return "rows that choose together are not ranked one by one"
    if level.within is not None:
        return f"each row has its own entries inside those of '{level.within}'"
    if select.apart is not None:
        return "it is the entries of a row that are chosen apart"
    if spec.reuse_of(level.name) is not None:
        return "the rows of another call are others"
    return None


def softmaxes_of_entries(spec: Spec) -> Iterator[Problem]:
    """A softmax for each entry, where entries are selected and their tokens attended."""
    levels = {level.name: level for level in spec.levels}
    for i, branch in enumerate(spec.attend):
        if branch.softmax is None:
            continue
        path: Path = ("attend", i, "softmax")
        if why := _no_entries(spec, branch, levels.get(branch.over or "")):
            yield Problem(
                code="HS194",
                path=path,
                message=f"'softmax: entry' has no meaning here: {why}",
                help="remove 'softmax'",
                also=(
                    *((*path[:-1], key) for key in ("over", "values", "spans")),
                    ("combine",),
                    ("levels",),
                    ("reuse",),
                ),
                at_key=True,
            )


def _no_entries(spec: Spec, branch: Attend, level: Level | None) -> str | None:
    if level is None or level.select is None:
        return f"branch '{branch.name}' attends no entries of a selection"
    if branch.values != "raw":
        return f"entries are attended as '{branch.values}' values, not token by token"
    if branch.spans is not None:
        return "spans have softmaxes of their own"
    if spec.combine and spec.combine.softmax:
        return "a union has one softmax"
    if spec.reuse_of(level.name) is not None:
        return f"calls that take over '{level.name}' may attend all tokens"
    return None
