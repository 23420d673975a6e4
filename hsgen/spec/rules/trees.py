"""Partitions whose entries are not blocks: trees, runs, halved intervals and stripes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hsgen.spec.model import (
    Blocks,
    Clusters,
    Halving,
    LearnedTree,
    Level,
    Node,
    Path,
    Ragged,
    Spec,
    Stripes,
    Tokens,
)
from hsgen.spec.rules.problem import Problem

NAMES: Mapping[type[Node], str] = {
    Blocks: "blocks",
    Clusters: "clusters",
    Halving: "halved intervals",
    Ragged: "runs",
    Stripes: "stripes",
    Tokens: "tokens",
    LearnedTree: "nodes of a tree",
}
# what keys of entries without one number of tokens can be made of
_POOLS: Mapping[type[Node], tuple[str, ...]] = {
    Ragged: ("mean", "max", "minmax", "sum_rsqrt", "first", "sample"),
    LearnedTree: ("centroid",),
}
_OF_TOKENS = ("rotate", "series", "position")  # keys of a pool about an entry's slots, or its place


def named(level: Level) -> str:
    """What a level's entries are, in words."""
    return NAMES.get(type(level.partition), "others")


def nesting_of_assigned(parent: Level, child: Level) -> tuple[str, str, str] | None:
    """Of levels one of which is no blocks: code, message, help; all empty where they nest."""
    p, c = parent.partition, child.partition
    plain = Tokens | Blocks | Halving | Clusters
    if isinstance(p, plain) and isinstance(c, plain):
        return None
    if isinstance(p, LearnedTree) and isinstance(c, LearnedTree | Tokens):
        return "", "", ""
    if isinstance(p, Ragged) and isinstance(c, Tokens):
        return "", "", ""
    expected = f"expected entries that lie in those of '{parent.name}', {named(parent)}"
    inside: Mapping[type[Node], str] = {
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
        yield from _pooled(level, (*path, "pool"))
        if isinstance(partition, Ragged):
            yield from _ragged(partition, (*path, "partition"))
        if isinstance(partition, Halving):
            yield from _halving(partition, (*path, "partition"))
        if isinstance(partition, LearnedTree | Stripes | Halving) or (
            isinstance(partition, Ragged) and level.score.form == "given"
        ):
            yield from _scored_by_keys(level, (*path, "score"))
        if isinstance(partition, LearnedTree):
            yield from _by_key_head(spec, i, level)
        if isinstance(partition, LearnedTree | Stripes):
            yield from _unordered(level, path)


def _pooled(level: Level, path: Path) -> Iterator[Problem]:
    """Pools of what no number of tokens, or no token, is in."""
    pool = level.pool
    if pool is None or isinstance(level.partition, Tokens | Halving | Stripes):
        return  # it has no use there, whatever it is
    allowed = _POOLS.get(type(level.partition))
    if pool.keys and (pool.keys not in allowed if allowed else pool.keys == "centroid"):
        names = ", ".join(allowed) if allowed else "another pool"
        yield Problem(
            code="HS150",
            path=(*path, "keys"),
            message=f"expected {'one of ' if len(allowed or ()) > 1 else ''}{names} for keys of"
            f" {named(level)}, got {pool.keys}",
            help=f"write 'keys: {allowed[0] if allowed else 'mean'}'",
            also=((*path[:2], "partition"),),
        )
    elif allowed:
        keys = (*_OF_TOKENS, "then") if isinstance(level.partition, LearnedTree) else _OF_TOKENS
        for key in keys:
            if getattr(pool, key) is not None:
                yield Problem(
                    code="HS150",
                    path=(*path, key),
                    message=f"'{key}' has no meaning for keys of {named(level)}",
                    help=f"remove '{key}'",
                    also=((*path[:2], "partition"), (*path, "keys")),
                    at_key=True,
                )


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
    if interval == halving.until < halving.interval:
        return
    power = halving.until * 2
    while power * 2 <= halving.interval:
        power *= 2
    many = f"{halving.until} times " if halving.until > 1 else ""
    yield Problem(
        code="HS155",
        path=(*path, "interval"),
        message=f"expected {many}a power of two from 2 on, got {halving.interval}: an interval is"
        f" halved until it is {halving.until} long",
        help=f"write 'halving: {power}'",
        also=((*path, "until"),),
    )


def _scored_by_keys(level: Level, path: Path) -> Iterator[Problem]:
    """Nodes, anchors and halves have keys of attention alone, and no caller knows how many runs there are."""
    score, form = level.score, level.score.form
    allowed = ("dot", "cosine", None) if isinstance(level.partition, LearnedTree) else ("dot", None)
    if form not in allowed or score.source is not None:
        got = f"form '{form}'" if form else f"'from: {score.source}'"
        yield Problem(
            code="HS152",
            path=(*path, "form" if form else "source"),
            message=f"expected 'form: dot' for {named(level)}, got {got}",
            help="write 'form: dot'",
            also=((*path[:2], "partition"),),
        )
    elif score.bias is not None:
        yield Problem(
            code="HS152",
            path=(*path, "bias"),
            message=f"expected scores of queries alone for {named(level)}, got a bias of tokens",
            help="remove 'bias'",
            also=((*path[:2], "partition"), (*path, "form")),
            at_key=True,
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
    """Nodes have no order, and anchors are those of one row."""
    force = level.select and level.select.force
    if force and (force.first or force.last or force.sink):
        why = (
            "no node is the first, and none the row's own"
            if isinstance(level.partition, LearnedTree)
            else "near tokens are for the window of 'spans'"
        )
        yield Problem(
            code="HS156",
            path=(*path, "select", "force"),
            message=f"expected nothing forced among {named(level)}, got"
            f" first {force.first} + last {force.last}: {why}",
            help="remove 'force', or force tokens below",
            also=((*path, "partition"),),
        )
    if isinstance(level.partition, Stripes) and level.query and level.query.together:
        yield Problem(
            code="HS156",
            path=(*path, "query"),
            message="expected rows that choose for themselves among stripes, which lie behind each"
            " row, got rows that choose together",
            help="remove 'query'",
            also=((*path, "partition"),),
        )


def dual_entropies(spec: Spec) -> Iterator[Problem]:
    """A loss of a tree is one of nodes."""
    dual = spec.loss and spec.loss.dual_entropy
    levels = {level.name: (j, level) for j, level in enumerate(spec.levels)}
    if not dual or dual.tree not in levels:
        return
    j, level = levels[dual.tree]
    if not isinstance(level.partition, LearnedTree):
        yield Problem(
            code="HS151",
            path=("loss", "dual_entropy", "tree"),
            message=f"expected a level of a learned tree, got '{level.name}', {named(level)}",
            help="name the lowest level of 'partition: {tree: 16}'",
            also=(("levels", j, "partition"),),
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
        elif (
            level
            and branch.values == "pooled"
            and not isinstance(level.partition, Blocks | Clusters)
        ):
            yield Problem(
                code="HS158",
                path=(*path, "values"),
                message=f"expected pooled values of blocks or clusters, got '{level.name}', {named(level)}",
                help="remove 'values'",
                also=((*path, "over"), ("levels", j, "partition")),
            )


def apart(spec: Spec) -> Iterator[Problem]:
    """Spans have softmaxes of their own, so that there is no one softmax over them and others."""
    if spec.combine is None or spec.combine.softmax is None:
        return
    for i, branch in enumerate(spec.attend):
        if branch.spans is not None:
            yield Problem(
                code="HS159",
                path=("attend", i, "spans"),
                message="expected one softmax over all branches with 'softmax: union', got spans,"
                " each of which has a softmax of its own",
                help="write 'combine: {gates: input}', or leave 'combine' out",
                also=(("combine", "softmax"),),
                at_key=True,
            )
