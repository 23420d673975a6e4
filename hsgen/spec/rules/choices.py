"""Nesting and selections."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import SELECT_RULES, Clusters, Level, Path, Select, Spec
from hsgen.spec.rules.names import uses
from hsgen.spec.rules.problem import Problem
from hsgen.spec.rules.trees import nesting_of_assigned

COARSENESS = {"all": 0, "group": 1, "head": 2}


def nesting(spec: Spec) -> Iterator[Problem]:
    levels = {level.name: (j, level) for j, level in enumerate(spec.levels)}
    for i, level in enumerate(spec.levels):
        if level.within not in levels:
            continue
        j, parent = levels[level.within]
        rests = (("levels", i, "partition"), ("levels", j, "partition"), ("levels", j, "select"))
        wrong = _nesting_problem(spec, parent, level)
        if wrong:
            code, message, help = wrong
            shares = (("levels", i, "score"), ("levels", j, "score"))
            also = (*rests, *shares) if code == "HS083" else rests
            yield Problem(
                code=code, path=("levels", i, "within"), message=message, help=help, also=also
            )


def _nesting_problem(spec: Spec, parent: Level, child: Level) -> tuple[str, str, str] | None:
    """Code, message and help."""
    p, c = parent.partition, child.partition
    if parent.select is None or parent.select.beam is None:
        got = _kept(parent)
        expected = (
            f"expected '{parent.name}' to have a beam, whose entries are expanded here, got {got}"
        )
        return "HS066", expected, f"write 'select: {{beam: 64}}' in '{parent.name}'"
    if assigned := nesting_of_assigned(parent, child):
        return assigned if assigned[0] else _shares_problem(spec, parent, child)
    for level in (parent, child):
        blocks = level.partition
        if isinstance(blocks, Clusters):
            return None  # of no size; `orders` says so
        if blocks.size != blocks.stride:
            expected = (
                f"expected levels without overlap, got '{level.name}' with stride {blocks.stride}"
            )
            return "HS067", expected, f"write '{{blocks: {blocks.size}}}' in '{level.name}'"
    if p.size % c.size:
        expected = f"expected blocks that divide those of '{parent.name}', {p.size}, got {c.size}"
        nearer = min(
            (n for n in range(1, min(p.size, 4096) + 1) if p.size % n == 0),
            key=lambda n: abs(n - c.size),
        )
        return "HS067", expected, f"write '{{blocks: {nearer}}}'"
    return _shares_problem(spec, parent, child)


def _shares_problem(spec: Spec, parent: Level, child: Level) -> tuple[str, str, str] | None:
    shares = [share_of(spec, level) for level in (parent, child)]
    if COARSENESS[shares[0]] > COARSENESS[shares[1]]:
        expected = f"expected '{parent.name}' to be shared by all heads that share '{child.name}'"
        got = f"got 'share: {shares[0]}' there and 'share: {shares[1]}' here"
        return "HS083", f"{expected}, {got}", f"write 'share: {shares[1]}' in '{parent.name}'"
    return None


def share_of(spec: Spec, level: Level) -> str:
    """Who agrees on a level's scores, its own or those that it takes over."""
    levels = {other.name: other for other in spec.levels}
    for _ in spec.levels:  # a chain of `from` is no longer than that
        if level.score.source not in levels:
            break
        level = levels[level.score.source]
    return level.score.share


def selects(spec: Spec) -> Iterator[Problem]:
    for i, level in enumerate(spec.levels):
        select = level.select
        if select is None:
            continue
        path: Path = ("levels", i, "select")
        if len(select.rules) != 1:
            got = " and ".join(select.rules) or "none"
            yield Problem(
                code="HS070",
                path=path,
                message=f"expected one of {', '.join(SELECT_RULES)} in 'select', got {got}",
                help="write 'top_k: 16' for what is attended, 'beam: 64' for what is expanded",
                also=_select_keys(path),
            )
            continue
        yield from _forced(spec, level, path)
        yield from _joined(spec, i, level, path)
        yield from _of(select, path)
        yield from _top_p(spec, i, level, path)
        yield from _select_use(spec, level, path)


def _select_keys(path: Path) -> tuple[Path, ...]:
    return tuple((*path, rule) for rule in SELECT_RULES)


def _kept(level: Level) -> str:
    """How a level selects, for the end of a message."""
    return f"a {level.select.rules[0]}" if level.select and level.select.rules else "no select"


def _forces(level: Level) -> str | None:
    """The level whose selection is forced here."""
    return level.select and level.select.force.level


def _counts_by(level: Level) -> str | None:
    """The level that says how many are kept here."""
    return level.select and level.select.budget_from


def _joined(spec: Spec, i: int, level: Level, path: Path) -> Iterator[Problem]:
    """A selection forced into another one, where that has no meaning."""
    levels = {other.name: (j, other) for j, other in enumerate(spec.levels)}
    if _forces(level) not in levels or level.select is None:
        return
    j, source = levels[_forces(level) or ""]
    shares = [share_of(spec, each) for each in (source, level)]
    wrong = (
        (f"'{source.name}' selects nothing", f"write 'select: {{top_k: 16}}' in '{source.name}'")
        if source.select is None
        else ("counts vary", "write 'top_k' in both levels, or remove 'from'")
        if source.select.counts_vary or level.select.counts_vary
        else (
            f"the entries of '{source.name}' are others",
            f"write the partition of '{source.name}' here",
        )
        if source.partition != level.partition or level.within != source.within
        else (
            f"'{source.name}' is selected by heads that share '{level.name}' one by one",
            f"write 'share: {shares[1]}' in '{source.name}'",
        )
        if COARSENESS[shares[0]] > COARSENESS[shares[1]]
        else ("it is always counted", "remove 'counted: false'")
        if not level.select.force.counted
        else None
    )
    if wrong:
        yield Problem(
            code="HS147",
            path=(*path, "force", "level"),
            message=f"'from' has no meaning here: {wrong[0]}",
            help=wrong[1],
            also=(
                *_select_keys(path),
                (*path, "force", "counted"),
                *(("levels", at, key) for at in (i, j) for key in ("partition", "select", "score")),
            ),
            at_key=True,
        )


def _forced(spec: Spec, level: Level, path: Path) -> Iterator[Problem]:
    """More forced entries than there is room for."""
    select, forced = level.select, spec.most_forced(level)
    assert select is not None
    of_rows = spec.own_entries(level) - 1 if select.force.last else 0
    of_sinks = forced - select.force.first - select.force.last - of_rows
    more = next((x.select for x in spec.levels if x.name == select.force.level and x.select), None)
    joined = more.width if more else 0
    keys: tuple[Path, ...] = ((*path, "top_k"), (*path, "beam"))
    key, most = ("top_k" if select.top_k else "beam"), select.budget
    if select.top_p is not None:
        key, most, keys = "max", select.top_p.max or forced, ((*path, "top_p", "max"),)
    if select.force.counted and forced + joined > most > 0:
        shown = f" + {of_rows} of the other rows of a block" if of_rows else ""
        shown += f" + {of_sinks} of first tokens" if of_sinks else ""
        shown += f" + {joined} of '{select.force.level}'" if joined else ""
        yield Problem(
            code="HS071",
            path=(*path, "force"),
            message=f"expected at most {key} = {most} forced entries, got"
            f" first {select.force.first} + last {select.force.last}{shown} = {forced + joined}",
            help=f"write '{key}: {forced + joined}'"
            + ("" if joined else ", or 'counted: false' to select them on top"),
            also=(*keys, *((("levels",),) if joined else ())),
        )


def _of(select: Select, path: Path) -> Iterator[Problem]:
    if select.of is not None and select.fraction is None:
        yield Problem(
            code="HS182",
            path=(*path, "of"),
            message=f"expected 'of' with 'fraction' only, got it with '{select.rules[0]}'",
            help="remove 'of', or write 'fraction: 0.125'",
            also=_select_keys(path),
            at_key=True,
        )


def _top_p(spec: Spec, i: int, level: Level, path: Path) -> Iterator[Problem]:
    """Masses that are none, and bounds that exclude each other."""
    top_p = level.select and level.select.top_p
    if not top_p:
        return
    if top_p.max is not None and top_p.min > top_p.max:
        yield Problem(
            code="HS100",
            path=(*path, "top_p", "min"),
            message=f"expected at most max = {top_p.max} entries, got min {top_p.min}",
            help=f"write 'max: {top_p.min}', or leave one of the two out",
            also=((*path, "top_p", "max"),),
        )
    j = scored_by(spec, i)
    if spec.levels[j].score.normalise is None:
        name = spec.levels[j].name
        yield Problem(
            code="HS101",
            path=(*path, "top_p"),
            message=f"expected masses for 'top_p', got scores of '{name}' that are not normalised",
            help=f"write 'normalise: softmax' in the score of '{name}', or 'fraction: 0.1' here",
            also=(
                *(("levels", at, "score", key) for at in {i, j} for key in ("source", "form")),
                ("levels", j, "score", "normalise"),
            ),
        )


def scored_by(spec: Spec, i: int) -> int:
    """The level whose scores a level selects by: itself, or the one that it takes them from."""
    names = [level.name for level in spec.levels]
    for _ in names:  # a chain of `from` is no longer than that
        source = spec.levels[i].score.source
        if source not in names:
            break
        i = names.index(source)
    return i


def _select_use(spec: Spec, level: Level, path: Path) -> Iterator[Problem]:
    """A selection that nothing attends or expands."""
    assert level.select is not None
    expanded = any(
        level.name in (other.within, _forces(other), _counts_by(other)) for other in spec.levels
    )
    attended = any(b.over == level.name for b in spec.attend)
    raw = any(b.over == level.name and b.values == "raw" for b in spec.attend)
    also = (*uses(spec), *_select_keys(path))
    if level.select.beam is not None and not expanded and not raw:
        yield Problem(
            code="HS068",
            path=(*path, "beam"),
            message=f"expected a level within '{level.name}' that expands its beam, got none",
            help=f"write 'within: {level.name}' in a level below, or attend it with 'top_k'",
            also=also,
            at_key=True,
        )
    (rule,) = level.select.rules
    if rule != "beam" and not attended and not expanded:
        yield Problem(
            code="HS069",
            path=(*path, rule),
            message=f"expected a branch that attends the {rule} of '{level.name}', got none",
            help=f"write '{{name: selected, over: {level.name}}}' in 'attend'",
            also=also,
            at_key=True,
        )
