"""Rows that choose together: how they do, and whether they fit the rows of other levels."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import Level, Path, Query, Spec
from hsgen.spec.rules.problem import Problem, either


def queries(spec: Spec) -> Iterator[Problem]:
    for i, level in enumerate(spec.levels):
        if level.query is None:
            continue
        path: Path = ("levels", i, "query")
        yield from _which_rows(level.query, path)
        yield from _how(level, level.query, path)
        yield from _heads(level, level.query, path)
        blocks = level.partition
        if level.query.block and blocks.size != blocks.stride:
            yield Problem(
                code="HS114",
                path=(*path, "block"),
                message="expected entries without overlap for blocks of queries, got stride"
                f" {blocks.stride} of {blocks.size}",
                help=f"write '{{blocks: {blocks.size}}}', or leave 'query' out",
                also=(("levels", i, "partition"),),
            )


def _which_rows(query: Query, path: Path) -> Iterator[Problem]:
    said = query.heads is not None or query.rotate is not None
    alone = said and query.pool is None and query.reduce is None
    if query.tile is not None:
        return  # `tiled_rows` says so
    said = [key for key in ("block", "last", "by") if getattr(query, key) is not None]
    if len(said) != 1 and not (alone and not said):
        yield Problem(
            code="HS110",
            path=path if query.block is None else (*path, "last"),
            message=f"expected 'block' or 'last' in 'query', got {' and '.join(said) or 'neither'}",
            help="write 'block: 128' for blocks of rows, or 'last: 64' for the prompt's last rows",
            also=((*path, "block"), (*path, "last"), (*path, "heads")),
            at_key=True,
        )


def _how(level: Level, query: Query, path: Path) -> Iterator[Problem]:
    """Pooled or reduced, where one has a meaning."""
    form = level.score.form
    no_pool = (
        f"scores of '{level.score.source}' are taken, no queries"
        if form is None
        else "the heads of an index are weighted row by row"
        if form == "relu_weighted"
        else "a bias asks no query"
        if form == "bias"
        else "scores are given, row by row"
        if form == "given"
        else None
    )
    if query.together and (query.pool is None) == (query.reduce is None):
        yield Problem(
            code="HS111",
            path=path if query.pool is None else (*path, "reduce"),
            message=f"expected 'pool' or 'reduce' in 'query', got {either(query.pool)}",
            help="write 'pool: mean' to score one query for all rows, or 'reduce: sum' to put"
            " the scores of each together",
            also=((*path, "pool"), (*path, "reduce")),
            at_key=True,
        )
    elif query.pool is not None and no_pool is not None:
        yield Problem(
            code="HS112",
            path=(*path, "pool"),
            message=f"'pool' has no meaning in 'query' here: {no_pool}",
            help="write 'reduce: sum'",
            also=(*((*path[:2], "score", key) for key in ("form", "source")), (*path, "reduce")),
            at_key=True,
        )
    elif (query.pool == "antidiagonal") != _keys_are_antidiagonal(level):
        yield _antidiagonal(path)
    elif query.pool == "antidiagonal" and query.block != level.partition.size:
        yield Problem(
            code="HS115",
            path=(*path, "block"),
            message="expected as many queries as keys for antidiagonals,"
            f" {level.partition.size}, got {query.block or 'the last ones'}",
            help=f"write 'block: {level.partition.size}'",
            also=((*path, "pool"), (*path, "last"), (*path[:2], "partition")),
        )


def _keys_are_antidiagonal(level: Level) -> bool:
    return bool(level.score.form and level.pool and level.pool.keys == "antidiagonal")


def _antidiagonal(path: Path) -> Problem:
    return Problem(
        code="HS115",
        path=path,
        message="expected 'antidiagonal' to pool keys and queries, got it for one of them",
        help="write 'pool: {keys: antidiagonal}' and 'query: {block: 8, pool: antidiagonal}'",
        also=(
            (*path, "pool"),
            (*path[:2], "pool", "keys"),
            (*path[:2], "score", "form"),
        ),
    )


def antidiagonal_keys(spec: Spec) -> Iterator[Problem]:
    """Keys that lie on antidiagonals of no queries."""
    for i, level in enumerate(spec.levels):
        if level.query is None and _keys_are_antidiagonal(level):
            yield _antidiagonal(("levels", i, "query"))
        elif level.score.form not in (None, "dot") and _keys_are_antidiagonal(level):
            yield Problem(
                code="HS115",
                path=("levels", i, "score", "form"),
                message=f"expected form 'dot' for antidiagonals, got '{level.score.form}'",
                help="write 'form: dot'",
                also=(("levels", i, "pool", "keys"),),
            )


def _heads(level: Level, query: Query, path: Path) -> Iterator[Problem]:
    if query.heads is None:
        return
    score = level.score
    why = ""
    if score.form is None:
        why = f"scores of '{score.source}' are taken, no queries"
    elif score.form != "dot":
        why = f"form '{score.form}' scores with heads of its own kind"
    elif score.share == "head":
        why = "every head chooses for itself: 'share: head'"
    elif score.reduce is not None:
        why = "heads whose queries are one have one score: nothing is left to 'reduce'"
    if why:
        yield Problem(
            code="HS116",
            path=(*path, "heads"),
            message=f"'heads' has no meaning in 'query' here: {why}",
            help="write 'share: group' without 'reduce', or remove 'heads'",
            also=tuple((*path[:2], "score", key) for key in ("form", "source", "share", "reduce")),
            at_key=True,
        )


def rows_fit(spec: Spec) -> Iterator[Problem]:
    """Rows that choose together must agree on what they take over, narrow or divide by."""
    levels = {level.name: level for level in spec.levels}
    for i, level in enumerate(spec.levels):
        for field, key in ((("score", "source"), "from"), (("within",), "within")):
            source = levels.get((level.score.source if key == "from" else level.within) or "")
            if source is None:
                continue
            mine, theirs = spec.rows_of(level), spec.rows_of(source)
            finer, coarser = (theirs, mine) if key == "from" else (mine, theirs)
            if _nests(finer, coarser):
                continue
            yield Problem(
                code="HS113",
                path=("levels", i, "query") if level.query else ("levels", i, *field),
                message=f"'{key}: {source.name}' does not fit: expected {_wanted(theirs, key)},"
                f" got {_rows_text(mine)}",
                help=_rows_help(theirs),
                also=_row_fields(i, levels, source),
            )
        source = levels.get(level.score.lse_from or "")
        if source is not None and level.score.form and not _same_rows(level, source):
            yield Problem(
                code="HS113",
                path=("levels", i, "score", "lse_from"),
                message=f"expected '{source.name}' to score the same rows, got"
                f" {_scored_text(source.query)} there and {_scored_text(level.query)} here",
                help="write the same 'query' in both levels, or remove 'lse_from'",
                also=_row_fields(i, levels, source),
            )


def _row_fields(i: int, levels: dict[str, Level], source: Level) -> tuple[Path, ...]:
    j = [*levels].index(source.name)
    return tuple(
        ("levels", at, *field)
        for at in (i, j)
        for field in (("query",), ("score", "source"), ("within",))
    )


def _nests(fine: Query | None, coarse: Query | None) -> bool:
    """Whether rows that choose together by `fine` are together by `coarse`."""
    if fine is None or (coarse is not None and coarse.last is not None and fine.last is None):
        return True
    if fine.tile is not None or (coarse is not None and coarse.tile is not None):
        return coarse is not None and fine.tile == coarse.tile
    if coarse is None or coarse.block is None:
        return coarse is not None and fine.last == coarse.last and fine.block is None
    return fine.block is not None and coarse.block % fine.block == 0


def _scored(query: Query | None) -> tuple[object, ...]:
    """The rows that score: those that are pooled, or each row for itself."""
    return (query.block, query.last, query.tile) if query and query.pool else (None, None, None)


def _same_rows(level: Level, source: Level) -> bool:
    heads = [one.query.heads if one.query else None for one in (level, source)]
    return _scored(level.query) == _scored(source.query) and heads[0] == heads[1]


def _rows_text(query: Query | None) -> str:
    if query is None:
        return "rows that choose for themselves"
    if query.tile is not None:
        return f"tiles of {' x '.join(map(str, query.tile))}"
    return f"blocks of {query.block}" if query.block else f"the last {query.last} rows"


def _scored_text(query: Query | None) -> str:
    pooled = query if query and query.pool else None
    heads = " of pooled heads" if query and query.heads else ""
    return ("single rows" if pooled is None else _rows_text(pooled)) + heads


def _wanted(theirs: Query | None, key: str) -> str:
    if theirs is None:
        return "rows that choose for themselves, as there"
    if theirs.last is not None or theirs.tile is not None:
        return f"{_rows_text(theirs)}, as there"
    which = "a multiple of" if key == "from" else "a divisor of"
    return f"blocks of {which} {theirs.block}"


def _rows_help(theirs: Query | None) -> str:
    if theirs is None:
        return "remove 'query', or write it in the other level too"
    if theirs.last is not None:
        return f"write 'query: {{last: {theirs.last}, reduce: sum}}'"
    if theirs.tile is not None:
        return "write the same 'query' here"
    return f"write 'query: {{block: {theirs.block}, reduce: sum}}'"


def rows_alone(spec: Spec) -> Iterator[Problem]:
    """What is said of single rows, and has no meaning for those that choose together."""
    kl = spec.loss and spec.loss.kl
    for i, level in enumerate(spec.levels):
        if spec.rows_of(level) is None:
            continue
        force = level.select and level.select.force
        joined = next((x for x in spec.levels if force and x.name == force.level), None)
        if joined is not None and spec.rows_of(joined) != spec.rows_of(level):
            yield Problem(
                code="HS117",
                path=("levels", i, "select", "force", "level"),
                message=f"expected '{joined.name}' to choose for the same rows, got"
                f" {_rows_text(spec.rows_of(joined))} there and {_rows_text(spec.rows_of(level))} here",
                help="write the same 'query' in both levels",
                also=_row_fields(i, {x.name: x for x in spec.levels}, joined),
                at_key=True,
            )
        reuse = spec.reuse_of(level.name)
        if reuse is not None and reuse.role == "candidates" and (level.query or Query()).by:
            yield Problem(
                code="HS118",
                path=("reuse", spec.reuse.index(reuse), "role"),
                message=f"expected 'as: final' for '{level.name}', of whose rows others are together"
                " in every call, got candidates",
                help="write 'as: final', or another 'query'",
                also=(("levels", i, "query"),),
            )
        block = (spec.rows_of(level) or Query()).block
        if kl is not None and kl.level == level.name and not (kl.rows and block):
            yield Problem(
                code="HS119",
                path=("loss", "kl", "level"),
                message=f"expected 'rows' in 'kl' with '{level.name}', whose rows choose together,"
                " got none"
                if block
                else f"expected rows for themselves or in blocks, got '{level.name}'",
                help="write 'rows: max', or name another level" if block else "name another level",
                also=(("levels", i, "query"), ("loss", "kl", "rows")),
            )


def rows_of_losses(spec: Spec) -> Iterator[Problem]:
    """Rows that are one in a loss, and choose apart."""
    kl = spec.loss and spec.loss.kl
    level = next((x for x in spec.levels if kl and x.name == kl.level), None)
    if kl and kl.rows and level and spec.rows_of(level) is None:
        yield Problem(
            code="HS205",
            path=("loss", "kl", "rows"),
            message=f"'rows' has no meaning here: rows of '{level.name}' choose for themselves",
            help="remove 'rows'",
            also=(("loss", "kl", "level"), ("levels",)),
            at_key=True,
        )


def turned_queries(spec: Spec) -> Iterator[Problem]:
    """Queries that are turned as keys are, at a place that there is."""
    for i, level in enumerate(spec.levels):
        query, turn = level.query, level.pool and level.pool.rotate
        if query is None or query.rotate is None:
            continue
        wrong = None
        if turn is None or level.score.form != "dot":
            wrong = "keys are not turned", "write 'rotate: {at: first, dims: 64}' in 'pool'"
        elif query.rotate != "token" and not (query.block and query.pool):
            wrong = "no block of rows is pooled", "write 'rotate: token'"
        elif query.rotate == "centre" and turn.base is None:
            wrong = "a table has no place between two rows", "write 'rotate: first'"
        if wrong:
            yield Problem(
                code="HS204",
                path=("levels", i, "query", "rotate"),
                message=f"'rotate: {query.rotate}' has no meaning here: {wrong[0]}",
                help=wrong[1],
                also=(
                    *(("levels", i, "query", key) for key in ("block", "pool")),
                    *(("levels", i, *keys) for keys in (("pool",), ("score", "form"))),
                ),
                at_key=True,
            )


def tiled_rows(spec: Spec) -> Iterator[Problem]:
    """Rows of a tile, which lie apart; and branches that attend by the query of rows together."""
    for i, level in enumerate(spec.levels):
        query, path = level.query, ("levels", i, "query")
        if query is None or query.tile is None:
            continue
        other = "block" if query.block is not None else "last" if query.last is not None else None
        if other or spec.causal:
            got = f"'{other}' as well" if other else "'causal: true'"
            yield Problem(
                code="HS190",
                path=(*path, "tile"),
                message="expected rows of a tile, which lie apart, without causality and without"
                f" another rule, got {got}",
                help=f"remove '{other}'" if other else "write 'causal: false'",
                also=(*((*path, key) for key in ("block", "last")), ("causal",)),
                at_key=True,
            )
    levels = {level.name: level for level in spec.levels}
    for i, branch in enumerate(spec.attend):
        if branch.query is not None and (why := _no_query(spec, levels.get(branch.over or ""))):
            yield Problem(
                code="HS191",
                path=("attend", i, "query"),
                message=f"'query: pooled' has no meaning here: {why}",
                help="remove 'query'",
                also=(("levels",), ("combine",), ("attend", i, "over")),
                at_key=True,
            )


def _no_query(spec: Spec, level: Level | None) -> str | None:
    """Why rows have no one query to attend by."""
    pool = level and level.query and level.query.pool
    if level is None or not pool:
        return "it is levels whose queries are pooled, and the branch attends none of them"
    if level.score.form != "dot" or pool == "antidiagonal" or (level.query and level.query.heads):
        return f"the queries of '{level.name}' are none that attend"
    if spec.combine and spec.combine.softmax:
        return "the branches of a union attend by one query"
    return None


def rows_with_a_say(spec: Spec) -> Iterator[Problem]:
    """Rows that have a say as long as their own tokens are kept, where something is kept."""
    for i, level in enumerate(spec.levels):
        query, path = level.query, ("levels", i, "query")
        if query is None or query.rows is None:
            continue
        reuse = spec.reuse_of(level.name)
        why = None
        if query.reduce is None or level.score.form is None:
            why = "no rows score each for itself"
        elif reuse is None or reuse.role != "candidates":
            why = "no call chooses among kept entries"
        if why:
            yield Problem(
                code="HS196",
                path=(*path, "rows"),
                message=f"'rows' has no meaning in 'query' here: {why}",
                help="write 'reduce: sum' here and 'as: candidates' in 'reuse', or remove 'rows'",
                also=((*path, "reduce"), (*path[:2], "score"), ("reuse",)),
                at_key=True,
            )
