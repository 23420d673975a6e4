"""Partitions whose entries are not blocks: trees, runs, halved intervals and stripes."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import (
    Blocks,
    Halving,
    LearnedTree,
    Level,
    Path,
    Ragged,
    Spec,
    Stripes,
    Tokens,
)
from hsgen.spec.rules.problem import Problem

NAMES = {
    Blocks: "blocks",
    Halving: "halved intervals",
    Ragged: "runs",
    Stripes: "stripes",
    Tokens: "tokens",
    LearnedTree: "a tree",
}
_POOLS = {
    Blocks: ("mean", "max", "minmax", "sum_rsqrt", "linear", "sample"),
    Ragged: ("mean", "max", "minmax", "sum_rsqrt", "sample"),
    LearnedTree: ("centroid",),
}


def named(level: Level) -> str:
    """What a level's entries are, in words."""
    return NAMES.get(type(level.partition), "others")


def nesting_of_assigned(parent: Level, child: Level) -> tuple[str, str, str] | None:
    """Of levels one of which is no blocks: code, message, help; all empty where they nest."""
    p, c = parent.partition, child.partition
    if isinstance(p, Tokens | Blocks | Halving) and isinstance(c, Tokens | Blocks | Halving):
        return None
    if isinstance(p, LearnedTree) and isinstance(c, LearnedTree | Tokens):
        return "", "", ""
    if isinstance(p, Ragged) and isinstance(c, Tokens):
        return "", "", ""
    expected = f"expected entries that lie in those of '{parent.name}', {named(parent)}"
    inside = {
        LearnedTree: "'partition: {tree: 16}' or 'partition: tokens'",
        Ragged: "'partition: tokens'",
    }
    help = inside.get(type(p))
    return (
        "HS151",
        f"{expected}, got {named(child)}",
        f"write {help}" if help else "remove 'within'",
    )


def assigned(spec: Spec) -> Iterator[Problem]:
    """What each kind of partition must have beside it."""
    for i, level in enumerate(spec.levels):
        partition, path = level.partition, ("levels", i)
        pooled = level.pool and level.pool.keys
        allowed = _POOLS.get(type(partition))
        if allowed and pooled and pooled not in allowed and pooled in _ALL:
            yield Problem(
                code="HS150",
                path=(*path, "pool", "keys"),
                message=f"expected one of {', '.join(allowed)} for keys of {named(level)},"
                f" got {pooled}",
                help=f"write 'keys: {allowed[0]}'",
                also=((*path, "partition"),),
            )
        if isinstance(partition, Ragged):
            yield from _ragged(partition, (*path, "partition"))
        if isinstance(partition, Halving):
            yield from _halving(partition, (*path, "partition"))
        if isinstance(partition, LearnedTree | Stripes | Halving):
            yield from _scored_by_keys(i, level)
        if isinstance(partition, LearnedTree):
            yield from _by_key_head(spec, i, level)
        if isinstance(partition, LearnedTree | Stripes) and level.select:
            yield from _unordered(level, (*path, "select", "force"))


_ALL = {pool for pools in _POOLS.values() for pool in pools}


def _ragged(ragged: Ragged, path: Path) -> Iterator[Problem]:
    found = ragged.boundaries == "similarity"
    for key in ("span", "threshold"):
        if (getattr(ragged, key) is not None) != found:
            got = "none" if found else "it"
            yield Problem(
                code="HS154",
                path=(*path, "boundaries" if found else key),
                message=f"expected '{key}' with 'ragged: similarity' only, got {got}"
                + (" with it" if found else f" with 'ragged: {ragged.boundaries}'"),
                help="write '{ragged: similarity, span: 8, threshold: 0.5}', or '{ragged: given}'",
                also=((*path, "boundaries"), (*path, key)),
                at_key=not found,
            )


def _halving(halving: Halving, path: Path) -> Iterator[Problem]:
    interval = halving.interval
    while interval > halving.until and interval % 2 == 0:
        interval //= 2
    if interval != halving.until:
        power = halving.until
        while power * 2 <= halving.interval:
            power *= 2
        yield Problem(
            code="HS155",
            path=(*path, "interval"),
            message=f"expected {halving.until} times a power of two, got {halving.interval}:"
            " an interval is halved until it is that long",
            help=f"write 'halving: {power}'",
            also=((*path, "until"),),
        )


def _scored_by_keys(i: int, level: Level) -> Iterator[Problem]:
    """Nodes, anchors and halves are scored by the keys of attention."""
    path: Path = ("levels", i, "score")
    if level.score.form in ("dot", None) and level.score.source is None:
        return
    got = f"form '{level.score.form}'" if level.score.form else f"'from: {level.score.source}'"
    yield Problem(
        code="HS152",
        path=(*path, "form" if level.score.form else "source"),
        message=f"expected 'form: dot' for {named(level)}, got {got}",
        help="write 'form: dot'",
        also=(("levels", i, "partition"),),
    )


def _by_key_head(spec: Spec, i: int, level: Level) -> Iterator[Problem]:
    """Each key head has a tree of its own, so heads of several cannot agree on nodes or members."""
    names = {level.name}
    for j, other in enumerate(spec.levels):
        inside = j == i or other.within in names
        if inside:
            names.add(other.name)
        if inside and other.score.share == "all":
            yield Problem(
                code="HS153",
                path=("levels", j, "score", "share"),
                message=f"expected heads that share to have one key head in the tree"
                f" '{level.name}', got 'share: all'",
                help="write 'share: group', or 'share: head'",
                also=(("levels", i, "partition"), ("levels", j, "within")),
            )


def _unordered(level: Level, path: Path) -> Iterator[Problem]:
    assert level.select is not None
    force = level.select.force
    if force.first or force.last:
        why = (
            "no node is the first, and none the row's own"
            if isinstance(level.partition, LearnedTree)
            else "near tokens are for the window of 'spans'"
        )
        yield Problem(
            code="HS156",
            path=path,
            message=f"expected nothing forced among {named(level)}, got"
            f" first {force.first} + last {force.last}: {why}",
            help="remove 'force', or force tokens below",
            also=(("levels", path[1], "partition"),),
        )


def spans(spec: Spec) -> Iterator[Problem]:
    """Spans and stripes come together; what else is attended raw has tokens of its own."""
    levels = {level.name: (j, level) for j, level in enumerate(spec.levels)}
    for i, branch in enumerate(spec.attend):
        j, level = levels.get(branch.over or "", (-1, None))
        striped = level is not None and isinstance(level.partition, Stripes)
        path: Path = ("attend", i)
        if striped != (branch.spans is not None):
            what = f"'over: {branch.over}', {named(level)}" if level else "no level of stripes"
            yield Problem(
                code="HS157",
                path=(*path, "over" if striped else "spans"),
                message=f"expected 'spans' with stripes only, got {'none' if striped else 'it'}"
                f" with {what}",
                help="write 'spans: {factor: 2.0, power: 0.5}' in this branch"
                if striped
                else "remove 'spans'",
                also=((*path, "over"), ("levels", j, "partition")),
                at_key=not striped,
            )
        elif level and branch.values == "pooled" and not isinstance(level.partition, Blocks):
            yield Problem(
                code="HS158",
                path=(*path, "values"),
                message=f"expected pooled values of blocks, got '{level.name}', {named(level)}",
                help="remove 'values'",
                also=((*path, "over"), ("levels", j, "partition")),
            )
