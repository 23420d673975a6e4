"""Numbers that say which way is taken, and the levels that they are computed from."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import Level, Path, Spec
from hsgen.spec.rules.choices import scored_by, share_of
from hsgen.spec.rules.names import unknown_level
from hsgen.spec.rules.problem import Problem


def statistics(spec: Spec) -> Iterator[Problem]:
    """One number of each head, of the prompt's last rows, before any way is taken."""
    route, statistic = spec.route, spec.route and spec.route.statistic
    if route is None or statistic is None:
        return
    if route.by != "sample_head":
        yield Problem(
            code="HS223",
            path=("route", "by"),
            message="expected 'by: sample_head' with 'statistic', which is a number of each sequence"
            f" and head, got '{route.by}'",
            help="write 'by: sample_head'",
            also=(("route", "statistic"),),
        )
    names = [level.name for level in spec.levels]
    first = next((i for i, level in enumerate(spec.levels) if level.when), len(names))
    for key, name in zip(("divergence", "source"), statistic.levels, strict=True):
        path: Path = ("route", "statistic", key)
        if name not in names:
            yield unknown_level(name, names, path, spec)
            continue
        i = names.index(name)
        first_of_both = statistic.divergence if key == "source" else None
        other = next((level for level in spec.levels if level.name == first_of_both), None)
        wrong = _no_masses(spec, i, other, late=i > first)
        if wrong:
            yield Problem(
                code="HS224",
                path=path,
                message=f"expected {wrong[0]}, got '{name}'{wrong[1]}",
                help=wrong[2],
                also=tuple(("levels", j) for j in range(len(names))),
            )


def _no_masses(spec: Spec, i: int, other: Level | None, *, late: bool) -> tuple[str, ...] | None:
    """What was expected of a level that a statistic reads, what there is, and what to type."""
    level = spec.levels[i]
    rows, scored = spec.rows_of(level), spec.levels[scored_by(spec, i)].score
    same = other is None or level.partition == other.partition
    if level.when or late:
        return "levels before those with 'when'", " among them", "move it up, without 'when'"
    if rows is None or rows.last is None:
        rest = "", "write 'query: {last: 128, reduce: sum}' in it"
        return "levels whose last rows choose for all", *rest
    if share_of(spec, level) != "head":
        return "levels with 'share: head'", " with another", "write 'share: head' in it"
    if scored.normalise is None:
        rest = " of others", "write 'normalise: softmax' in its score"
        return "levels of masses", *rest
    if level.within or not same or not level.partition.size:
        rest = " of others", "write the same 'partition' in both"
        return "two levels of the same entries", *rest
    if spec.reuse_of(level.name):
        return "levels that every call scores", ", which is reused", "remove 'reuse'"
    return None
