"""Queries, and keys and values of entries."""

from __future__ import annotations

from typing import Literal

from hsgen import spec as language
from hsgen.graph import Node, Pool, PoolHeads, PoolRows
from hsgen.planner.builder import Builder
from hsgen.planner.orders import cut_of, order


def score_query(builder: Builder, level: language.Level) -> Node:
    """What scores: each row, or one query for rows that choose together; heads apart or pooled."""
    made = (
        builder.input("q_index", "index_query", "B", "T", "Hi", "Di")
        if level.score.by_index
        else builder.query()
    )
    query = level.query
    if query is not None and query.heads is not None:
        made = _agreeing(builder, level, made, f"{level.name}.query_heads")
    if query is not None and query.pool is not None:
        op = PoolRows(level=level.name, how=query.pool, block=query.block, last=query.last)
        at = builder.place(level, "query", "pool")
        made = builder.add(f"{level.name}.queries", op, made, at=at)
    return made


def _agreeing(builder: Builder, level: language.Level, made: Node, name: str) -> Node:
    """Heads that agree as one; key heads of one group are one already."""
    share = level.score.share
    if share == "head" or made.type.dims[2] in ("1", "Hkv" if share == "group" else "1"):
        return made
    at = builder.place(level, "query", "heads")
    return builder.add(name, PoolHeads(level=level.name, share=share), made, at=at)


def score_keys(builder: Builder, level: language.Level) -> Node:
    if level.score.by_index:
        raw = builder.input("k_index", "index_keys", "B", "S", "Di")
    else:
        raw = builder.keys(level.kv)
    tokens = isinstance(level.partition, language.Tokens)
    keys = raw if tokens else pooled(builder, level, raw, "key")
    if level.query is None or level.query.heads is None:
        return keys
    return _agreeing(builder, level, keys, f"{level.name}.key_heads")


def pooled(
    builder: Builder, level: language.Level, raw: Node, which: Literal["key", "value"]
) -> Node:
    """One vector an entry: level.keys or level.values, pooled once however often it is used."""
    assert level.pool is not None
    how = level.pool.keys if which == "key" else level.pool.values
    assert how is not None
    position = how == "linear" and level.pool.position is not None
    op = Pool(
        level=level.name,
        how=how,
        size=level.partition.size,
        stride=level.partition.stride,
        position=position,
        cut=cut_of(level),
    )
    heads, dim = raw.type.dims[2] if len(raw.type.dims) == 4 else "1", raw.type.dims[-1]
    slots = str(level.partition.size)
    operands = [raw]
    if how == "linear":
        name = f"{level.name}_{which}_weight"
        operands.append(builder.input(name, "parameter", heads, slots, dim, dim))
    if position:
        name = f"{level.name}_{which}_position"
        operands.append(builder.input(name, "parameter", heads, slots, dim))
    operands += order(builder, level)
    at = builder.place(level, "pool", "keys" if which == "key" else "values")
    return builder.add(f"{level.name}.{which}s", op, *operands, at=at)
