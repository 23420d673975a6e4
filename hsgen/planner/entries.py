"""Queries, and keys and values of entries."""

from __future__ import annotations

from typing import Literal

from hsgen import spec as language
from hsgen.graph import Node, Pool
from hsgen.planner.builder import Builder
from hsgen.planner.orders import cut_of, order


def score_query(builder: Builder, level: language.Level) -> Node:
    if level.score.by_index:
        return builder.input("q_index", "index_query", "B", "T", "Hi", "Di")
    return builder.query()


def score_keys(builder: Builder, level: language.Level) -> Node:
    if level.score.by_index:
        raw = builder.input("k_index", "index_keys", "B", "S", "Di")
    elif level.score.form == "bias":
        raw = builder.bias()
    else:
        raw = builder.keys(level.kv)
    tokens = isinstance(level.partition, language.Tokens)
    return raw if tokens else pooled(builder, level, raw, "key")


def score_bias(builder: Builder, level: language.Level) -> Node:
    """The mean bias of every entry."""
    raw = builder.bias()
    if isinstance(level.partition, language.Tokens):
        return raw
    size, stride = level.partition.size, level.partition.stride
    op = Pool(level=level.name, how="mean", size=size, stride=stride, position=False)
    return builder.add(f"{level.name}.biases", op, raw, at=builder.place(level, "score", "bias"))


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
