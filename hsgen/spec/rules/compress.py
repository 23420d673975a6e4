"""Fewer rows and keys: scores of what is around, budgets of other levels, rows that see themselves."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import SELECT_RULES, Level, Path, Spec, Tokens
from hsgen.spec.rules.choices import COARSENESS, share_of
from hsgen.spec.rules.problem import Problem


def around(spec: Spec) -> Iterator[Problem]:
    """An odd number of entries around one and the same."""
    for i, level in enumerate(spec.levels):
        score, path = level.score, ("levels", i, "score")
        if (score.map == "around") != (score.width is not None):
            yield Problem(
                code="HS188",
                path=(*path, "width") if score.width else (*path, "map"),
                message="expected 'map: around' and 'width' together, got one of the two",
                help="write '{from: LEVEL, map: around, width: 7}'",
                also=((*path, "map"), (*path, "width"), (*path, "source")),
                at_key=score.width is not None,
            )
        elif score.width is not None and score.width % 2 == 0:
            yield Problem(
                code="HS188",
                path=(*path, "width"),
                message="expected an odd number of entries, with one in their middle,"
                f" got {score.width}",
                help=f"write 'width: {score.width + 1}'",
            )


def borrowed_budgets(spec: Spec) -> Iterator[Problem]:
    """A number of entries that another level has for the same rows and heads."""
    levels = {level.name: level for level in spec.levels}
    for i, level in enumerate(spec.levels):
        other = levels.get((level.select and level.select.budget_from) or "")
        in_tokens = _in_tokens(level, other) and not spec.part_of(level)
        if level.select and level.select.budget_in and not in_tokens:
            yield Problem(
                code="HS225",
                path=("levels", i, "select", "budget_in"),
                message="expected 'budget_in' with 'budget_from' a level, both of entries of one size,"
                " got it without",
                help="remove 'budget_in', or write 'budget_from' and blocks",
                also=(
                    ("levels", i, "partition"),
                    *(("levels", i, "select", rule) for rule in SELECT_RULES),
                    *(("levels", j, "name") for j in range(-1, len(spec.levels))),
                ),
                at_key=True,
            )
        if other is None:
            continue
        wrong = _no_budget(spec, level, other)
        if wrong:
            yield Problem(
                code="HS148",
                path=("levels", i, "select", "budget_from"),
                message=f"'budget_from: {other.name}' has no meaning here: {wrong[0]}",
                help=wrong[1],
                also=tuple(
                    ("levels", at, *key)
                    for at in (i, [*levels].index(other.name))
                    for key in (("select",), ("query",), ("score",), ("within",))
                ),
            )


_SAME_SHARE = "write the same 'share'"


def _reader(spec: Spec, level: Level) -> str | None:
    """What reads a level's scores besides its selection."""
    kl = spec.loss and spec.loss.kl
    if kl and kl.level == level.name:
        return "kl"
    return next((x.name for x in spec.levels if x.score.source == level.name), None)


def least_parts(spec: Spec) -> Iterator[Problem]:
    """A least number of what is no part of a row's entries."""
    for i, level in enumerate(spec.levels):
        select = level.select
        if select is None or select.min is None or spec.part_of(level):
            continue
        rule = select.rules[0] if select.rules else "none"
        yield Problem(
            code="HS203",
            path=("levels", i, "select", "min"),
            message="expected 'min' with 'budget_from' a level of the prompt's last rows, got"
            + (" one of these rows" if select.budget_from else f" '{rule}'"),
            help="remove 'min'" + (", or write it in 'top_p'" if select.top_p else ""),
            also=(("levels", i, "query"), *(("levels", i, "select", x) for x in SELECT_RULES)),
            at_key=True,
        )


def _in_tokens(level: Level, other: Level | None) -> bool:
    return other is not None and level.partition.size > 0 and other.partition.size > 0


def _no_budget(spec: Spec, level: Level, other: Level) -> tuple[str, str] | None:
    if other.select is None:
        return f"'{other.name}' selects nothing", f"write 'select: {{top_k: 16}}' in '{other.name}'"
    part = spec.part_of(level)
    if part is None and spec.rows_of(level) != spec.rows_of(other):
        return "other rows choose together there", "write the same 'query' in both levels"
    if COARSENESS[share_of(spec, other)] > COARSENESS[share_of(spec, level)]:
        if part is None:
            return "heads that choose as one here have several numbers there", _SAME_SHARE
        if reader := _reader(spec, level):
            why = f"'{reader}' reads scores of heads that keep numbers of their own"
            return why, "take them from another level"
    if part is not None and part.within is not None:
        return f"'{part.name}' keeps a part of some entries", f"remove 'within' in '{part.name}'"
    if level.within is not None:
        return f"only children of '{level.within}' can be kept", "write 'top_k: 16'"
    return None


def rows_chosen(spec: Spec) -> Iterator[Problem]:
    """Rows that may be left out, where a row may fail to see its own token."""
    levels = {level.name: level for level in spec.levels}
    for i, branch in enumerate(spec.attend):
        if branch.rows is None:
            continue
        path: Path = ("attend", i)
        level = levels.get(branch.over or "")
        force = level.select.force if level and level.select else None
        single = level is not None and isinstance(level.partition, Tokens)
        own = (
            force is not None and force.last > 0 and spec.rows_of(level) is None if level else False
        )
        why = (
            "it is pooled entries that are attended"
            if branch.values == "pooled"
            else "every row sees its own token"
            if branch.over is None and branch.static is None
            else "every row's own entry is forced"
            if own or (force is not None and force.tail and not single)
            else None
        )
        if why:
            yield Problem(
                code="HS189",
                path=(*path, "rows"),
                message=f"'rows' has no meaning here: {why}",
                help="remove 'rows'",
                also=(
                    ("levels",),
                    *((*path, key) for key in ("over", "window", "static", "values")),
                ),
                at_key=True,
            )
