"""Branches, how they are combined, and what nothing uses."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import Level, Path, Spec, Static, Tokens
from hsgen.spec.rules.names import uses
from hsgen.spec.rules.problem import Problem
from hsgen.spec.rules.routes import needs_combine


def branches(spec: Spec) -> Iterator[Problem]:
    levels = {level.name: (j, level) for j, level in enumerate(spec.levels)}
    for i, branch in enumerate(spec.attend):
        path: Path = ("attend", i)
        keys = ("over", "window", "static")
        said = [key for key in keys if getattr(branch, key) is not None]
        also: tuple[Path, ...] = tuple((*path, key) for key in keys)
        if len(said) != 1:
            yield Problem(
                code="HS073",
                path=(*path, said[1]) if said else path,
                message="expected one of over, window, static in a branch, got"
                f" {' and '.join(said) or 'none'}",
                help="write 'over: LEVEL', 'window: 512' or 'static: {blocks: 64, window: 16}'",
                also=also,
                at_key=bool(said),
            )
        elif branch.over is None and branch.values != "raw":
            yield Problem(
                code="HS082",
                path=(*path, "values"),
                message=f"expected 'values: {branch.values}' with 'over' only, got it with '{said[0]}'",
                help="remove 'values'",
                also=also,
            )
        if branch.static is not None:
            yield from _static(spec, branch.static, (*path, "static"))
        if branch.over in levels:
            j, level = levels[branch.over]
            sides = ("keys",) if branch.storage else ("keys", "values")
            pooled = branch.values == "pooled"
            yield from _pooled(i, j, level, sides) if pooled else _raw(i, j, level)


def _static(spec: Spec, static: Static, path: Path) -> Iterator[Problem]:
    """A pattern of nothing, keys that need another one, and heads that it does not come out for."""
    rules = ("window", "sink", "stride", "power_of_two", "per_head", "grid")
    if not any(getattr(static, rule) for rule in rules):
        yield Problem(
            code="HS102",
            path=path,
            message=f"expected at least one of {', '.join(rules)} in 'static', got none",
            help="write 'static: {blocks: 64, window: 16}', or 'window: all' for every token",
            also=tuple((*path, rule) for rule in rules),
        )
    per_head = bool(static.per_head)
    for key, wrong, why, others in (
        ("shift", static.shift and not static.stride, "there is no 'stride'", ("stride",)),
        (
            "dilation",
            static.dilation > 1 and not (static.window or per_head),
            "there is no window",
            ("window", "per_head"),
        ),
        ("window", per_head and static.window, "'per_head' has windows of its own", ("per_head",)),
        ("sink", per_head and static.sink, "'per_head' has sinks of its own", ("per_head",)),
    ):
        if wrong:
            yield Problem(
                code="HS103",
                path=(*path, key),
                message=f"'{key}' has no meaning here: {why}",
                help=f"remove '{key}'",
                also=tuple((*path, other) for other in others),
                at_key=True,
            )
    if per_head and spec.heads and spec.heads.query % len(static.per_head):
        yield Problem(
            code="HS104",
            path=(*path, "per_head"),
            message=f"expected a number of heads that divides the query heads, {spec.heads.query},"
            f" got {len(static.per_head)}",
            help="write one entry for each query head, or a pattern that they repeat",
            also=(("heads",),),
        )


def _pooled(i: int, j: int, level: Level, sides: tuple[str, ...]) -> Iterator[Problem]:
    pool = level.pool
    lacking = [key for key in sides if pool is None or getattr(pool, key) is None]
    if isinstance(level.partition, Tokens):
        wrong = "a token is not pooled"
        help = "remove 'values'"
    elif level.score.by_index or level.score.form == "bias":
        what = "biases" if level.score.form == "bias" else "those of the index"
        wrong = f"its pooled keys are {what}, which a query cannot attend"
        help = "attend a level with 'form: dot'"
    elif pool is not None and pool.keys == "minmax":
        wrong = "its pooled keys are bounds, which a query cannot attend"
        help = "attend a level with 'keys: mean'"
    elif lacking:
        wrong = f"its pool has no {' and no '.join(lacking)}"
        help = f"write 'pool: {{keys: mean, values: mean}}' in '{level.name}'"
    else:
        return
    yield Problem(
        code="HS074",
        path=("attend", i, "values"),
        message=f"expected a level with pooled keys and values, got '{level.name}': {wrong}",
        help=help,
        also=tuple(("levels", j, *rest) for rest in (("pool",), ("partition",), ("score", "form"))),
    )


def _raw(i: int, j: int, level: Level) -> Iterator[Problem]:
    if level.select is None or level.select.rules == ("beam",):
        got = "a beam, which is expanded and not attended" if level.select else "no select"
        yield Problem(
            code="HS075",
            path=("attend", i, "over"),
            message=f"expected a level with a top_k to attend, got '{level.name}' with {got}",
            help=f"write 'select: {{top_k: 16}}' in '{level.name}', or 'values: pooled' here",
            also=(("levels", j, "select"), ("attend", i, "values")),
        )


def combines(spec: Spec) -> Iterator[Problem]:
    combine = spec.combine
    if combine is None:
        if needs_combine(spec):
            yield Problem(
                code="HS076",
                path=("attend",),
                message=f"expected 'combine' with {len(spec.attend)} branches, got none",
                help="write 'combine: {gates: input}' or 'combine: {softmax: union}' at the top",
                also=(
                    ("combine",),
                    ("route",),
                    *(("attend", i, "when") for i in range(len(spec.attend))),
                ),
            )
        return
    said = [key for key in ("gates", "softmax", "streams") if getattr(combine, key) is not None]
    alone = combine.output_gate is not None and len(spec.attend) == 1
    if said not in (["gates"], ["softmax"], ["streams"], ["gates", "streams"], *([[]] * alone)):
        got = " and ".join(said) or "neither"
        yield Problem(
            code="HS077",
            path=("combine",),
            message=f"expected 'gates' or 'softmax' in 'combine', got {got}",
            help="write 'combine: {gates: input}' or 'combine: {softmax: union}'",
        )


def unused(spec: Spec) -> Iterator[Problem]:
    if spec.index is not None and not any(level.score.by_index for level in spec.levels):
        yield Problem(
            code="HS078",
            path=("index",),
            message="expected a level that scores with the index, got none",
            help="remove 'index', or write 'score: {form: relu_weighted, share: all}' in a level",
            also=tuple(("levels", i, "score", "form") for i in range(-1, len(spec.levels))),
            at_key=True,
        )
    used = {branch.over for branch in spec.attend}
    used |= {name for level in spec.levels for name in level.named}
    used |= {*spec.route.statistic.levels} if spec.route and spec.route.statistic else set()
    for i, level in enumerate(spec.levels):
        if level.name not in used and level.select is None:
            yield Problem(
                code="HS079",
                path=("levels", i, "name"),
                message=f"expected a branch or a level that uses '{level.name}', got none",
                help=f"write 'over: {level.name}' in 'attend', or remove the level",
                also=(*uses(spec), ("levels", i, "select"), ("route", "statistic")),
            )


def kvs(spec: Spec) -> Iterator[Problem]:
    for i, level in enumerate(spec.levels):
        if level.q is not None and (
            level.score.by_index or level.score.source or level.score.form == "bias"
        ):
            yield Problem(
                code="HS081",
                path=("levels", i, "q"),
                message="'q' has no use here: this level scores by no queries of attention",
                help="remove 'q'",
                also=(("levels", i, "score"),),
                at_key=True,
            )
        if (
            level.kv is not None
            and level.score.form not in ("dot", "code_match")
            and level.pool is None
        ):
            yield _idle_kv(("levels", i), "this level neither scores nor pools keys")
        elif level.kv is not None and level.score.by_index:
            yield _idle_kv(("levels", i), "the index has keys of its own")
    for i, branch in enumerate(spec.attend):
        if branch.kv is not None and branch.values == "pooled":
            why = f"the pooled entries are those of the level '{branch.over}'"
            yield _idle_kv(("attend", i), why)


def _idle_kv(path: Path, why: str) -> Problem:
    return Problem(
        code="HS081",
        path=(*path, "kv"),
        message=f"'kv' has no use here: {why}",
        help="remove 'kv'",
        also=((*path, "score"), (*path, "pool"), (*path, "values")),
        at_key=True,
    )
