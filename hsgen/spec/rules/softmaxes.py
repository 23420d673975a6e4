"""What a branch's softmax is over: latent keys, sinks, caps and scales, and the query's own tail."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import Attend, LearnedTree, Level, Path, Spec
from hsgen.spec.rules.problem import Problem


def latents(spec: Spec) -> Iterator[Problem]:
    """Values that are prefixes of keys, where there is such a prefix and nothing else is a value."""
    levels = {level.name: level for level in spec.levels}
    for i, branch in enumerate(spec.attend):
        if branch.storage is None:
            continue
        path: Path = ("attend", i, "storage")
        if spec.head_dim and spec.head_dim.v > spec.head_dim.qk:
            yield Problem(
                code="HS170",
                path=path,
                message=f"expected values to be a part of keys of {spec.head_dim.qk} channels with"
                f" 'storage: latent', got {spec.head_dim.v}",
                help=f"write 'head_dim: {{qk: {spec.head_dim.v}, v: {spec.head_dim.v}}}', or remove"
                " 'storage'",
                also=(("head_dim",),),
            )
        level = levels.get(branch.over or "") if branch.values == "pooled" else None
        if level and level.pool and level.pool.values:
            yield Problem(
                code="HS170",
                path=path,
                message="'storage: latent' takes values from pooled keys, but the pool of"
                f" '{level.name}' has values",
                help="remove 'storage', or 'values' in that pool",
                also=(("levels", spec.levels.index(level), "pool"), ("attend", i, "values")),
                at_key=True,
            )


def one_softmax(spec: Spec) -> Iterator[Problem]:
    """A union has one sink, and takes every key the same way."""
    combine = spec.combine
    union = combine is not None and combine.softmax is not None
    if combine and combine.sink and not union:
        yield Problem(
            code="HS171",
            path=("combine", "sink"),
            message="expected 'sink' with 'softmax: union' in 'combine', got it without",
            help="write 'sink: learned' in a branch, or 'softmax: union'",
            also=(("combine", "softmax"),),
            at_key=True,
        )
    for i, branch in enumerate(spec.attend if union else ()):
        if branch.sink:
            yield Problem(
                code="HS171",
                path=("attend", i, "sink"),
                message="expected the sink of a union in 'combine', got one of a branch",
                help="write 'combine: {softmax: union, sink: learned}'",
                also=(("combine",),),
                at_key=True,
            )
        for key in ("scale", "softcap", "storage"):
            yield from _agrees(spec.attend[0], branch, i, key)


def _agrees(first: Attend, branch: Attend, i: int, key: str) -> Iterator[Problem]:
    one, other = getattr(first, key), getattr(branch, key)
    if one != other:
        yield Problem(
            code="HS171",
            path=("attend", i, key),
            message=f"expected '{key}' to be the same in all branches of a union, got"
            f" {one or 'none'} in '{first.name}' and {other or 'none'} in '{branch.name}'",
            help=f"write one '{key}' in all of them, or 'combine: {{gates: input}}'",
            also=(("attend", 0, key), ("combine",)),
        )


def tails(spec: Spec) -> Iterator[Problem]:
    """A tail where there is one incomplete entry a row, and nothing else takes it."""
    for i, level in enumerate(spec.levels):
        if level.select is None or not level.select.force.tail:
            continue
        path: Path = ("levels", i, "select", "force", "tail")
        if why := _no_tail(spec, level):
            yield Problem(
                code="HS172",
                path=path,
                message=f"'tail' has no meaning here: {why}",
                help="remove 'tail'",
                also=(("causal",), (*path[:-1], "last"), (*path[:2], "partition")),
                at_key=True,
            )


def _no_tail(spec: Spec, level: Level) -> str | None:
    assert level.select is not None
    if not spec.causal:
        return "without causality every entry is complete"
    if level.select.force.last:
        return "'last' takes the query's own entry already, complete or not"
    if isinstance(level.partition, LearnedTree):
        return "no node is the query's own"
    if level.partition.size == 1:
        return "an entry of one token is never incomplete"
    if level.permute is not None:
        return "entries cut from an order are incomplete in numbers"
    if spec.rows_of(level) is not None:
        return "rows that choose together stand in several"
    if level.partition.size != level.partition.stride:
        return "overlapping entries are incomplete in numbers"
    return None
