"""What a call takes over from earlier ones, and losses."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.errors import nearest
from hsgen.spec.model import Distill, Kl, Level, Path, Reuse, Spec
from hsgen.spec.rules.names import uses
from hsgen.spec.rules.problem import Problem


def reuses(spec: Spec) -> Iterator[Problem]:
    levels = {level.name: (j, level) for j, level in enumerate(spec.levels)}
    seen: set[str] = set()
    for i, reuse in enumerate(spec.reuse):
        path: Path = ("reuse", i)
        if reuse.level in seen:
            yield Problem(
                code="HS161",
                path=(*path, "level"),
                message=f"expected one 'reuse' of the level '{reuse.level}', got another",
                help="remove one of the two",
            )
        seen.add(reuse.level)
        if reuse.every is not None and reuse.pattern is not None:
            yield Problem(
                code="HS163",
                path=(*path, "every"),
                message="expected 'every' or 'pattern' in 'reuse', got both",
                help=f"remove 'every', or 'pattern': 'every: {reuse.every}' is F and"
                f" {reuse.every - 1} times S",
                also=((*path, "pattern"),),
                at_key=True,
            )
        if reuse.accumulate and reuse.role == "final":
            yield Problem(
                code="HS164",
                path=(*path, "accumulate"),
                message="'accumulate' has no meaning with 'as: final': a shared call scores nothing",
                help="remove 'accumulate', or write 'as: candidates'",
                also=((*path, "role"),),
                at_key=True,
            )
        yield from _brought(spec, path, reuse)
        if reuse.level in levels:
            yield from _reused_level(spec, path, reuse, *levels[reuse.level])


def _brought(spec: Spec, path: Path, reuse: Reuse) -> Iterator[Problem]:
    """Where no call chooses, what is said of calls that do has no meaning."""
    if not reuse.brought:
        return
    kl = spec.loss and spec.loss.kl
    why = (
        "'as: candidates' has the call choose"
        if reuse.role == "candidates"
        else "'dense' and 'lead' are of calls before the pattern"
        if reuse.dense or reuse.lead
        else "'attend: given' is of calls that choose"
        if reuse.attend == "given"
        else f"the loss reads the scores of '{reuse.level}'"
        if kl and kl.level == reuse.level
        else None
    )
    if why:
        yield Problem(
            code="HS164",
            path=(*path, "pattern"),
            message=f"'pattern: S' has no meaning here, no call chooses: {why}",
            help="write 'pattern: FS', one call that chooses and one that does not",
            also=(*((*path, key) for key in ("role", "dense", "lead", "attend")), ("loss",)),
            at_key=True,
        )


def _reused_level(spec: Spec, path: Path, reuse: Reuse, j: int, level: Level) -> Iterator[Problem]:
    """Whether the level has a set to keep, and whether others do without what shared calls lack."""
    here: Path = ("levels", j)
    if level.select is None:
        yield Problem(
            code="HS162",
            path=(*path, "level"),
            message=f"expected a level that selects, got '{level.name}' with no select",
            help=f"write 'select: {{top_k: 16}}' in '{level.name}'",
            also=((*here, "select"),),
        )
    readers = [o.name for o in spec.levels if level.name in (o.score.source, o.score.lse_from)]
    if readers and reuse.role == "final":
        yield Problem(
            code="HS165",
            path=(*path, "level"),
            message=f"expected a level whose scores no other reads, got '{level.name}', which"
            f" '{readers[0]}' reads: a shared call does not score it",
            help=f"write 'level: {readers[0]}'",
            also=uses(spec),
        )
    if reuse.role == "candidates" and (level.within or level.score.form is None):
        why = "'within' narrows it already" if level.within else "its scores are mapped"
        yield Problem(
            code="HS166",
            path=(*path, "role"),
            message=f"expected 'as: final' for '{level.name}', got candidates: {why}",
            help="write 'as: final', or reuse another level",
            also=((*here, "within"), (*here, "score")),
        )
    yield from _opened(spec, path, reuse, level)


def _opened(spec: Spec, path: Path, reuse: Reuse, level: Level) -> Iterator[Problem]:
    """Calls that attend every token: only a branch over the level itself can do so."""
    key = "dense" if reuse.dense else "attend" if reuse.attend == "given" else None
    attended = any(b.over == level.name and b.values == "raw" for b in spec.attend)
    expanded = [other.name for other in spec.levels if other.within == level.name]
    if key and (expanded or not attended):
        why = f"'{expanded[0]}' expands it" if expanded else "no branch attends its tokens"
        yield Problem(
            code="HS164",
            path=(*path, key),
            message=f"'{key}' has no meaning for the level '{level.name}': {why}",
            help=f"remove '{key}', or reuse a level that a branch attends",
            also=((*path, "level"), *uses(spec)),
            at_key=True,
        )


def losses(spec: Spec) -> Iterator[Problem]:
    loss = spec.loss
    if loss is None:
        return
    if not any(getattr(loss, name) for name in type(loss).model_fields):
        yield Problem(
            code="HS168",
            path=("loss",),
            message=f"expected one of {', '.join(type(loss).model_fields)} in 'loss', got none",
            help="write 'loss: {kl: {level: token}}', or remove 'loss'",
            also=tuple(("loss", name) for name in type(loss).model_fields),
        )
    if loss.kl:
        yield from _kl(spec, loss.kl)
    if loss.distill:
        yield from _distill(spec, loss.distill)


def _kl(spec: Spec, kl: Kl) -> Iterator[Problem]:
    levels = {level.name: (j, level) for j, level in enumerate(spec.levels)}
    if kl.over == "selected" and kl.level in levels:
        j, level = levels[kl.level]
        if level.select is None:
            yield Problem(
                code="HS169",
                path=("loss", "kl", "over"),
                message=f"expected 'over: all' for '{level.name}', which selects nothing,"
                " got selected",
                help=f"write 'over: all', or a select in '{level.name}'",
                also=(("loss", "kl", "level"), ("levels", j, "select")),
            )


def _distill(spec: Spec, distill: Distill) -> Iterator[Problem]:
    """Two branches, each with an output of its own."""
    names = [branch.name for branch in spec.attend]
    also: tuple[Path, ...] = tuple(("attend", i, "name") for i in range(-1, len(names)))
    where: Path = ("loss", "distill")
    for key in ("student", "teacher"):
        target = getattr(distill, key)
        if target not in names:
            close = nearest(target, names)
            listed = f"branches: {', '.join(names)}"
            yield Problem(
                code="HS160",
                path=(*where, key),
                message=f"unknown branch '{target}'",
                help=f"did you mean '{close}'? {listed}" if close else listed,
                also=also,
            )
    wrong = None
    if distill.student == distill.teacher:
        wrong = "student and teacher are one branch", "name another branch"
    elif spec.combine and spec.combine.softmax:
        wrong = (
            "branches of one softmax have no outputs of their own",
            "write 'combine: {streams: branches}' or 'combine: {gates: input}'",
        )
    if wrong:
        yield Problem(
            code="HS167",
            path=(*where, "student"),
            message=f"expected outputs of two branches, got one: {wrong[0]}",
            help=wrong[1],
            also=((*where, "teacher"), ("combine",), *also),
        )
