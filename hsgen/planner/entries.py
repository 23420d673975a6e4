"""Queries, and keys and values of entries."""

from __future__ import annotations

from typing import Literal

from hsgen import spec as language
from hsgen.graph import Node, Norm, Pool, PoolHeads, PoolRows, Rotate
from hsgen.planner.builder import Builder
from hsgen.planner.orders import axis_tiles, centroids, cut_of, order, row_cut_of, row_order


def score_query(builder: Builder, level: language.Level) -> Node:
    """What scores: each row, or one query for rows that choose together; heads apart or pooled."""
    made = (
        builder.input("q_index", "index_query", "B", "T", "Hi", "Di")
        if level.score.by_index
        else builder.query(level.q, "Hkv" if level.one_query_a_group else "Hq")
    )
    query = level.query
    if query is not None and query.rotate == "token":
        made = _turned(builder, level, made)
    if query is not None and query.heads is not None:
        made = _agreeing(builder, level, made, f"{level.name}.query_heads")
    if query is not None and query.pool is not None:
        at = builder.place(level, "query", "pool")
        clusters = level.permute and level.permute.queries
        op = PoolRows(
            level=level.name,
            how=query.pool,
            block=query.block,
            last=query.last,
            tiles=axis_tiles(builder, query.tile, at) if query.tile else None,
            clusters=clusters.clusters if clusters else None,
            cut=row_cut_of(level),
        )
        made = builder.add(f"{level.name}.queries", op, made, *row_order(builder, level), at=at)
    if query is not None and query.rotate in ("first", "centre"):
        made = _turned(builder, level, made)
    return made


def _turned(builder: Builder, level: language.Level, made: Node) -> Node:
    """Queries turned as keys are."""
    turn, query = level.pool and level.pool.rotate, level.query
    assert turn is not None, f"level {level.name} turns no keys"
    assert query is not None, f"level {level.name} turns no queries"
    assert query.rotate is not None, f"level {level.name} turns no queries"
    place, rows = turn.model_copy(update={"at": query.rotate}), query.block or 1
    return _rotated(builder, level, place, f"{level.name}.queries", made, rows=rows)


def _agreeing(builder: Builder, level: language.Level, made: Node, name: str) -> Node:
    """Heads that agree as one; key heads of one group are one already."""
    share = level.score.share
    if share == "head" or made.type.dims[2] in ("1", "Hkv" if share == "group" else "1"):
        return made
    at = builder.place(level, "query", "heads")
    return builder.add(name, PoolHeads(level=level.name, share=share), made, at=at)


def score_keys(builder: Builder, level: language.Level) -> Node:
    searched = language.Tokens | language.Halving | language.Stripes | language.Diagonals
    tokens = isinstance(level.partition, searched)
    keys = raw_keys(builder, level) if tokens else pooled(builder, level, "key")
    if level.query is None or level.query.heads is None:
        return keys
    return _agreeing(builder, level, keys, f"{level.name}.key_heads")


def score_given(builder: Builder, level: language.Level) -> Node:
    """Scores that the caller has of every entry."""
    heads = {"head": "Hq", "group": "Hkv", "all": "1"}[level.score.share]
    dims = ("B", "T", heads, f"N_{level.name}")
    return builder.input(f"{level.name}_score", "scores", *dims)


def score_bias(builder: Builder, level: language.Level) -> Node:
    """The mean bias of every entry."""
    raw = builder.bias()
    if isinstance(level.partition, language.Tokens):
        return raw
    size, stride = level.partition.size, level.partition.stride
    op = Pool(level=level.name, how="mean", size=size, stride=stride, position=False)
    return builder.add(f"{level.name}.biases", op, raw, at=builder.place(level, "score", "bias"))


def raw_keys(builder: Builder, level: language.Level) -> Node:
    """What a level scores, or pools to score."""
    if level.score.form == "bias":
        return builder.bias()
    many = (str(level.pool.series),) if level.pool and level.pool.series else ()
    if level.score.by_index:
        return builder.input("k_index", "index_keys", "B", "S", *many, "Di")
    if many:
        return builder.input(named("k", level.kv), "keys", "B", "S", "Hkv", *many, "Dqk")
    return builder.keys(level.kv)


def named(kind: str, kv: str | None) -> str:
    return f"{kind}_{kv}" if kv else kind


def pooled(builder: Builder, level: language.Level, which: Literal["key", "value"]) -> Node:
    """One vector an entry: level.keys or level.values, pooled once however often it is used."""
    pool = level.pool
    assert pool is not None
    how = pool.keys if which == "key" else pool.values
    assert how is not None
    if isinstance(level.partition, language.LearnedTree):
        return _centroids(builder, level)
    raw = raw_keys(builder, level) if which == "key" else builder.values(level.kv)
    if which == "key" and pool.rotate and pool.rotate.at == "token":
        raw = _rotated(builder, level, pool.rotate, f"{level.name}.tokens", raw)
    position = pool.position is not None and how in ("linear", "mlp", "gated")
    op = Pool(
        level=level.name,
        how=how,
        size=level.partition.size,
        stride=level.partition.stride,
        position=position,
        cut=cut_of(level),
        before=before_of(level),
        softmax=pool.softmax if how == "gated" else None,
        series=pool.series if which == "key" else None,
        seed=pool.seed or 0 if how == "sample" else None,
    )
    operands = [raw, *_learned(builder, level, op, which, raw), *order(builder, level)]
    at = builder.place(level, "pool", "keys" if which == "key" else "values")
    made = builder.add(f"{level.name}.{which}s", op, *operands, at=at)
    return _finished(builder, level, made) if which == "key" else made


def _centroids(builder: Builder, level: language.Level) -> Node:
    """Keys of nodes."""
    op = Pool(level=level.name, how="centroid", size=0, stride=0, position=False)
    at = builder.place(level, "pool", "keys")
    return builder.add(f"{level.name}.keys", op, centroids(builder, level), at=at)


def _finished(builder: Builder, level: language.Level, made: Node) -> Node:
    """Pooled keys, normed and rotated."""
    pool = level.pool
    assert pool is not None
    if pool.then is not None:
        weight = builder.input(f"{level.name}_key_norm", "parameter", made.type.dims[-1])
        at = builder.place(level, "pool", "then")
        made = builder.add(f"{level.name}.normed", Norm(level=level.name), made, weight, at=at)
    if pool.rotate is not None and pool.rotate.at != "token":
        made = _rotated(builder, level, pool.rotate, f"{level.name}", made)
    return made


def _rotated(
    builder: Builder,
    level: language.Level,
    rotate: language.Rotate,
    name: str,
    raw: Node,
    *,
    rows: int | None = None,
) -> Node:
    op = Rotate(
        level=level.name,
        at=rotate.at,
        dims=rotate.dims,
        base=rotate.base,
        channels=rotate.channels,
        pairs=rotate.pairs,
        size=rows or level.partition.size,
        stride=rows or level.partition.stride,
        before=None if rows else before_of(level),
        rows=rows,
    )
    half = str(rotate.dims // 2)
    tables = ("cos", "sin") if rotate.base is None else ()
    angles = [builder.input(f"{table}_{level.name}", "angles", "B", "S", half) for table in tables]
    at = builder.place(level, "pool", "rotate")
    return builder.add(f"{name}.rotated", op, raw, *angles, at=at)


def _learned(
    builder: Builder, level: language.Level, op: Pool, which: str, raw: Node
) -> list[Node]:
    """Gates and parameters of a pool, in the order in which it reads them."""
    pool = level.pool
    assert pool is not None
    many = () if op.series is None else (str(op.series),)
    dims = raw.type.dims
    heads, dim = dims[2 : len(dims) - 1 - len(many)], dims[-1]
    own, slots, name = heads or ("1",), str(op.size), f"{level.name}_{which}"
    if op.how == "gated":
        channels = (dim,) if op.softmax == "channel" else ()
        gates = "z_index" if level.score.by_index else named("z", level.kv)
        many = () if pool.series is None else (str(pool.series),)
        found = [builder.input(gates, "pool_gates", "B", "S", *heads, *many, *channels)]
        if op.position:
            name = f"{level.name}_key_position"
            found.append(builder.input(name, "parameter", *own, slots, *channels))
        return found
    if op.how not in ("linear", "mlp", "max_min_mean"):
        return []
    rows = "3" if op.how == "max_min_mean" else slots
    hidden = str(pool.hidden or dim)
    out = hidden if op.how == "mlp" else dim
    found = [builder.input(f"{name}_weight", "parameter", *own, rows, dim, out)]
    if op.how == "mlp":
        found.append(builder.input(f"{name}_out", "parameter", *own, hidden, dim))
    if op.position:
        found.append(builder.input(f"{name}_position", "parameter", *own, slots, dim))
    return found


def before_of(level: language.Level) -> int | None:
    """How many tokens of an entry lie before its place."""
    return level.partition.before if isinstance(level.partition, language.Blocks) else None


def parts_of(level: language.Level) -> int | None:
    """How many equal parts of what a row sees the entries are, if that is what they are."""
    return level.partition.count if isinstance(level.partition, language.Parts) else None


def diagonal(level: language.Level) -> Literal[True] | None:
    """Whether entries are counted back from a row's own."""
    return True if isinstance(level.partition, language.Diagonals) else None
