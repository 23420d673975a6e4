"""Heads, partitions and pools."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import (
    Diagonals,
    Halving,
    LearnedTree,
    Level,
    Parts,
    Path,
    Spec,
    Stripes,
    Tokens,
)
from hsgen.spec.rules.names import uses
from hsgen.spec.rules.problem import Problem


def heads(spec: Spec) -> Iterator[Problem]:
    heads = spec.heads
    if heads and heads.query % heads.kv:
        close = max(1, round(heads.query / heads.kv)) * heads.kv
        yield Problem(
            code="HS050",
            path=("heads", "query"),
            message=f"expected a multiple of the kv heads, {heads.kv}, got {heads.query}",
            help=f"write 'query: {close}'",
            also=(("heads", "kv"),),
        )


def partitions(spec: Spec) -> Iterator[Problem]:
    for i, level in enumerate(spec.levels):
        blocks = level.partition
        if blocks.stride > blocks.size:
            yield Problem(
                code="HS080",
                path=("levels", i, "partition", "stride"),
                message=f"expected a stride of at most the block's size, {blocks.size},"
                f" got {blocks.stride}: tokens between blocks would be in none",
                help=f"write 'stride: {blocks.size}', or leave it out",
                also=(("levels", i, "partition", "size"),),
            )


def pools(spec: Spec) -> Iterator[Problem]:
    for i, level in enumerate(spec.levels):
        here: Path = ("levels", i)
        pool, score = level.pool, level.score
        keys = pool.keys if pool is not None else None
        scored = score.form is not None and score.form != "given"  # by keys
        # parts are never scored by keys, diagonals by those of tokens
        single = Tokens | Halving | Stripes | Parts | Diagonals
        alone = isinstance(level.partition, single)
        if not alone and scored and not (keys or score.source):
            yield Problem(
                code="HS063",
                path=(*here, "score", "form"),
                message=f"expected pooled keys that form '{score.form}' scores, got none",
                help=f"write 'pool: {{keys: {_pool_of(level)}}}' in this level",
                also=((*here, "pool", "keys"), (*here, "partition")),
            )
        elif score.form and keys and (score.form == "bound") != (keys == "minmax"):
            yield _bound_without_minmax(i, keys, score.form)
        if pool is not None:
            yield from _pool(spec, i, level)


def _pool_of(level: Level) -> str:
    return "centroid" if isinstance(level.partition, LearnedTree) else "mean"


def _bound_without_minmax(i: int, keys: str | None, form: str) -> Problem:
    """The two bounds of an entry and the score that reads them come together."""
    wanted, got = ("minmax", keys) if form == "bound" else ("one vector an entry", "minmax")
    return Problem(
        code="HS090",
        path=("levels", i, "pool", "keys"),
        message=f"expected {wanted} for form '{form}', got {got}",
        help="write 'keys: minmax'" if form == "bound" else "write 'keys: mean', or 'form: bound'",
        also=(("levels", i, "score", "form"),),
    )


def _pool(spec: Spec, i: int, level: Level) -> Iterator[Problem]:
    """A pool that nothing needs, or that lacks what it needs itself."""
    assert level.pool is not None
    path: Path = ("levels", i, "pool")
    pool = level.pool
    pooled = [b for b in spec.attend if b.over == level.name and b.values == "pooled"]
    where, why = path, ""
    if isinstance(level.partition, Tokens):
        why = "a token is an entry of its own"
    elif isinstance(level.partition, Stripes):
        why = "an anchor is a token"
    elif isinstance(level.partition, Halving):
        why = "an entry is scored by its own tokens"
    elif isinstance(level.partition, Diagonals):
        why = "diagonals are scored token by token"
    elif pool.keys is None and pool.values is None:
        why = "it pools neither keys nor values"
    elif pool.keys is not None and level.score.form == "given" and not pooled:
        why, where = "this level's scores are given, not computed from keys", (*path, "keys")
    elif pool.values is not None and level.score.by_index:
        why, where = "an index has no values", (*path, "values")
    elif pool.values is not None and not pooled and level.score.form != "pooling_error":
        why, where = (
            f"no branch attends 'over: {level.name}' with 'values: pooled'",
            (*path, "values"),
        )
    elif pool.keys is not None and level.score.source and not pooled:
        why, where = "this level's scores are mapped, not computed from keys", (*path, "keys")
    if why:
        yield Problem(
            code="HS064",
            path=where,
            message=f"'{where[-1]}' has no use here: {why}",
            help=f"remove '{where[-1]}'",
            also=((*path, "keys"), (*path, "values"), (*path[:2], "partition"), *uses(spec)),
            at_key=True,
        )
    if pool.seed is not None and pool.keys != "sample":
        yield Problem(
            code="HS065",
            path=(*path, "seed"),
            message="expected 'seed' with 'keys: sample' only, got it without",
            help="remove 'seed', or write 'keys: sample'",
            also=((*path, "keys"),),
            at_key=True,
        )
    if pool.position and not {"linear", "mlp", "gated"} & {pool.keys, pool.values}:
        yield Problem(
            code="HS065",
            path=(*path, "position"),
            message="expected 'position' with linear, mlp or gated pooling only, got it without",
            help="remove 'position', or write 'keys: linear'",
            also=((*path, "keys"), (*path, "values")),
            at_key=True,
        )
