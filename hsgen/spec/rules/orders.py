"""Orders that entries are cut from: what they lack, and what cannot be cut from them."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import Blocks, Clusters, KMeans, Level, Path, SortInSegment, Spec, Tile
from hsgen.spec.rules.problem import Problem


def orders(spec: Spec) -> Iterator[Problem]:
    for i, level in enumerate(spec.levels):
        path: Path = ("levels", i)
        if level.permute is not None:
            yield from _complete(level, (*path, "permute"))
            yield from _spans_the_sequence(spec, level, path)
            yield from _heads(level, path)
        yield from _cut(level, path)
    yield from _between(spec)


def _complete(level: Level, path: Path) -> Iterator[Problem]:
    """An order of nothing, and one whose masses nobody gives."""
    order = level.permute and level.permute.keys
    if level.permute and order is None and level.permute.queries is None:
        yield Problem(
            code="HS130",
            path=path,
            message="expected 'keys' or 'queries' in 'permute', got none",
            help="write 'permute: {keys: {sort_in_segment: 256, by: mass, last: 128}}'",
            also=((*path, "keys"),),
        )
    elif isinstance(order, SortInSegment) and (order.last is None) == (order.by == "mass"):
        got = "none" if order.last is None else f"last: {order.last}"
        yield Problem(
            code="HS130",
            path=(*path, "keys", "by" if order.last is None else "last"),
            message=f"expected 'last' with 'by: mass' and without 'by: mean', got {got}"
            f" with 'by: {order.by}'",
            help="write 'by: mass, last: 128': the last 128 rows say which keys have mass",
            also=((*path, "keys"),),
        )


def _cut(level: Level, path: Path) -> Iterator[Problem]:
    """Entries that cannot be cut from the order, or that need one."""
    order = level.permute and level.permute.keys
    partition = level.partition
    wrong = help = ""
    if isinstance(partition, Clusters):
        if not isinstance(order, KMeans | Tile):
            wrong = (
                "expected 'kmeans' or 'tile' in 'permute: {keys: ...}' with 'partition: clusters',"
                " got none"
            )
            help = "write 'permute: {keys: {kmeans: 1000, iterations: 50}}', or blocks"
        elif level.pool is not None and "linear" in (level.pool.keys, level.pool.values):
            wrong = "expected entries of one size for linear pooling, got clusters"
            help = "write 'pool: {keys: mean}'"
    elif order is not None and not isinstance(partition, Blocks):
        wrong = f"expected blocks of the order, or its clusters, got '{partition.kind}'"
        help = "write 'partition: {blocks: 128}', or leave 'permute' out: its order has no effect"
    elif order is not None and partition.size != partition.stride:
        wrong = f"expected blocks without overlap in an order, got stride {partition.stride}"
        help = f"write '{{blocks: {partition.size}}}'"
    elif isinstance(order, SortInSegment) and order.segment % partition.size:
        nearer = max(1, round(order.segment / partition.size)) * partition.size
        wrong = (
            f"expected a segment of a multiple of the blocks, {partition.size}, got {order.segment}"
        )
        help = f"write 'sort_in_segment: {nearer}'"
    if wrong:
        yield Problem(
            code="HS131",
            path=(*path, "partition"),
            message=wrong,
            help=help,
            also=((*path, "permute"), (*path, "pool")),
        )


def _spans_the_sequence(spec: Spec, level: Level, path: Path) -> Iterator[Problem]:
    """Without segments an entry may hold any token, so that none is ever complete before the end."""
    order = level.permute and level.permute.keys
    if order is not None and not isinstance(order, SortInSegment) and spec.causal:
        yield Problem(
            code="HS132",
            path=(*path, "permute", "keys"),
            message=f"expected 'causal: false' with '{order.kind}', whose entries may hold any token,"
            " got true",
            help="write 'causal: false', or 'sort_in_segment', which keeps tokens in their segment",
            also=(("causal",),),
        )
    force = level.select and level.select.force
    if force and (force.first or force.last) and order and not isinstance(order, SortInSegment):
        yield Problem(
            code="HS132",
            path=(*path, "select", "force"),
            message=f"expected no first and no last entries with '{order.kind}', whose entries are"
            " nowhere in particular, got some",
            help="remove 'first', 'last' and 'own'",
            also=((*path, "permute", "keys"),),
        )


def _heads(level: Level, path: Path) -> Iterator[Problem]:
    """Every key head has an order of its own, so that entries of two are different tokens."""
    if level.score.by_index:
        yield Problem(
            code="HS133",
            path=(*path, "permute"),
            message=f"expected keys of the heads to permute, got form '{level.score.form}', whose"
            " keys are those of the index",
            help="remove 'permute', or write 'form: dot'",
            also=((*path, "score", "form"),),
            at_key=True,
        )
    elif level.score.share == "all" and not isinstance(level.permute and level.permute.keys, Tile):
        yield Problem(
            code="HS133",
            path=(*path, "score", "share"),
            message="expected 'share: head' or 'share: group' with 'permute', which orders the keys"
            " of each key head, got 'all'",
            help="write 'share: group'",
            also=((*path, "permute"),),
        )


def _between(spec: Spec) -> Iterator[Problem]:
    """Levels that name each other and are cut from different orders."""
    levels = {level.name: (j, level) for j, level in enumerate(spec.levels)}
    for i, level in enumerate(spec.levels):
        for key, path, name in (
            ("within", ("levels", i, "within"), level.within),
            ("from", ("levels", i, "score", "source"), level.score.source),
        ):
            if name not in levels:
                continue
            j, other = levels[name]
            clusters = any(isinstance(x.partition, Clusters) for x in (level, other))
            if (level.permute, level.kv) == (other.permute, other.kv) and not clusters:
                continue
            if level.permute is None and other.permute is None:
                continue
            yield Problem(
                code="HS134",
                path=path,
                message=f"expected blocks of one order here and in '{name}', which '{key}' names,"
                f" got {'clusters' if clusters else 'two orders'}",
                help=f"write the same 'permute' in both, or remove '{key}'",
                also=tuple(
                    ("levels", at, field) for at in (i, j) for field in ("permute", "partition")
                ),
            )
