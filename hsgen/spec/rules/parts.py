"""Scores that are given, parts of what a row sees, and budgets of several heads or of tokens."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import Clusters, LearnedTree, Level, Parts, Path, Ragged, Select, Spec
from hsgen.spec.rules.names import uses
from hsgen.spec.rules.problem import Problem


def given_scores(spec: Spec) -> Iterator[Problem]:
    """There is one score for each head that chooses: none are left to put together."""
    for i, level in enumerate(spec.levels):
        score, path = level.score, ("levels", i, "score")
        if score.form == "given" and score.reduce is not None:
            yield Problem(
                code="HS183",
                path=(*path, "reduce"),
                message="'reduce' has no meaning with form 'given': the input has a score for each"
                " head that chooses",
                help="remove 'reduce'",
                also=((*path, "form"), (*path, "share")),
                at_key=True,
            )


def parts(spec: Spec) -> Iterator[Problem]:
    """What is a part of a row differs from row to row: nothing can stand for it, or be inside it."""
    for i, level in enumerate(spec.levels):
        if not isinstance(level.partition, Parts):
            continue
        wrong = _wrong_with_parts(spec, level)
        if wrong:
            got, help, *keys = wrong
            yield Problem(
                code="HS184",
                path=("levels", i, "partition"),
                message=f"expected nothing but given scores of 'parts', got {got}",
                help=help,
                also=(
                    *(("levels", i, key) for key in keys),
                    *(("levels", i, "score", key) for key in ("form", "source")),
                    *uses(spec),
                ),
            )


def _wrong_with_parts(spec: Spec, level: Level) -> tuple[str, ...] | None:
    """What there is, what to type, and where."""
    force = level.select and level.select.force
    within = [x.name for x in spec.levels if level.name in (x.within, x.score.source)]
    if level.score.form != "given":
        got = f"form '{level.score.form}'" if level.score.form else f"'from: {level.score.source}'"
        return got, "write 'score: {form: given}', or 'partition: {blocks: 64}'"
    if level.within or within:
        return (
            f"'{within[0] if within else level.name}', which nests in others",
            "use blocks",
            "within",
        )
    if level.query is not None:
        return "rows that choose together", "remove 'query'", "query"
    if level.permute is not None:
        return "an order of keys", "remove 'permute'", "permute"
    if force and (force.first or force.last or force.tail or force.level or force.sink):
        return "forced entries", "remove 'force'", "select"
    if any(branch.over == level.name and branch.values == "pooled" for branch in spec.attend):
        return "a branch that attends them pooled", "remove 'values: pooled'"
    if spec.loss and spec.loss.kl and spec.loss.kl.level == level.name:
        return "a loss that they learn by", "remove 'kl'"
    return None


def budgets(spec: Spec) -> Iterator[Problem]:
    """Heads that rank their entries together, and entries that tokens fill."""
    for i, level in enumerate(spec.levels):
        select, path = level.select, ("levels", i, "select")
        if select is None or len(select.rules) != 1:
            continue
        (rule,) = select.rules
        if select.scope is not None:
            yield from _scope(level, select, rule, path)
        if select.apart is not None:
            yield from _apart(level, rule, path)
        uneven = isinstance(level.partition, Clusters | LearnedTree | Ragged)
        if select.tokens is not None and uneven:
            yield Problem(
                code="HS186",
                path=(*path, "tokens"),
                message=f"expected entries of one size with 'tokens', got '{level.partition.kind}'",
                help="write 'top_k: 16'",
                also=(("levels", i, "partition"),),
                at_key=True,
            )


def _scope(level: Level, select: Select, rule: str, path: Path) -> Iterator[Problem]:
    why = (
        f"'{rule}' keeps every entry for itself"
        if rule == "threshold"
        else "'top_p' has a scope of its own"
        if rule == "top_p"
        else "another level says how many each head keeps"
        if rule == "budget_from"
        else "a beam is as wide for every head"
        if rule == "beam"
        else "tiers are those of a row"
        if rule == "quota"
        else "a walk has a ranking of its own"
        if rule == "early_stop"
        else f"rows of a head share a 'fraction', not '{rule}'"
        if select.scope == "head" and rule != "fraction"
        else f"an entry takes a number of rows, 'top_k', not '{rule}'"
        if select.scope == "entry" and rule != "top_k"
        else None
        if select.scope in ("head", "entry")
        else "all heads choose as one: 'share: all'"
        if level.score.form
        and (level.score.share == "all" or level.score.form == "relu_weighted")
        and level.score.share != "group"
        else None
    )
    if why:
        yield Problem(
            code="HS185",
            path=(*path, "scope"),
            message=f"'scope' has no meaning here: {why}",
            help="remove 'scope'",
            also=((*path, rule), (*path[:2], "score")),
            at_key=True,
        )


def _apart(level: Level, rule: str, path: Path) -> Iterator[Problem]:
    """Two choices of one row, where the rule is said of a choice."""
    select = level.select
    why = (
        f"'{rule}' keeps every entry for itself"
        if rule == "threshold"
        else "a beam is expanded as a whole"
        if rule == "beam"
        else "another level says how many are kept together"
        if rule == "budget_from"
        else "tiers are those of a row as a whole"
        if rule == "quota"
        else "a walk goes over all entries"
        if rule == "early_stop"
        else "it is of all entries, on whichever side, that a fraction is taken"
        if select and select.of
        else "rows of a head are ranked together"
        if select and select.top_p and select.top_p.scope == "head"
        else "parts of a row begin where the row does"
        if isinstance(level.partition, Parts)
        else None
    )
    if why:
        yield Problem(
            code="HS149",
            path=(*path, "apart"),
            message=f"'apart' has no meaning here: {why}",
            help="remove 'apart'",
            also=((*path, rule), (*path, "of"), (*path[:2], "partition")),
            at_key=True,
        )
