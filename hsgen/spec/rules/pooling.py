"""Pools that gate, that have several series of keys, that norm and rotate; entries that begin early."""

from __future__ import annotations

from collections.abc import Iterator

from hsgen.spec.model import Blocks, Level, Path, Pool, Spec
from hsgen.spec.rules.problem import Problem

# a key of a pool, the pools that it is about, and what to do without
_OF: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("softmax", ("gated",)),
    ("hidden", ("mlp",)),
)


def pool_keys(spec: Spec) -> Iterator[Problem]:
    """Keys of a pool that say nothing of how it pools, and a gate without its softmax."""
    for i, level in enumerate(spec.levels):
        pool = level.pool
        if pool is None:
            continue
        path: Path = ("levels", i, "pool")
        hows = {pool.keys, pool.values}
        also: tuple[Path, ...] = ((*path, "keys"), (*path, "values"))
        for key, wanted in _OF:
            if getattr(pool, key) is not None and not hows & {*wanted}:
                yield _idle(path, key, f"it is one of {' and '.join(wanted)} pooling", also)
        for key in ("series", "then", "rotate"):
            if getattr(pool, key) is not None and (pool.keys is None or pool.keys == "minmax"):
                yield _idle(path, key, "it is about keys that are one vector an entry", also)
        if pool.keys == "gated" and pool.softmax is None:
            yield Problem(
                code="HS175",
                path=(*path, "keys"),
                message="expected 'softmax' with gated pooling, got none",
                help="write 'softmax: channel' for weights of each channel, or 'softmax: token'",
                also=((*path, "softmax"),),
            )
        if pool.values == "gated" and (pool.keys != "gated" or pool.softmax == "channel"):
            yield Problem(
                code="HS175",
                path=(*path, "values"),
                message="expected values to be weighted as keys are, by token, got"
                + (" weights of each channel of keys" if pool.keys == "gated" else " other keys"),
                help="write 'keys: gated, softmax: token', or 'storage: latent' in the branch",
                also=((*path, "keys"), (*path, "softmax")),
            )


def _idle(path: Path, key: str, why: str, also: tuple[Path, ...]) -> Problem:
    return Problem(
        code="HS174",
        path=(*path, key),
        message=f"'{key}' has no meaning here: {why}",
        help=f"remove '{key}'",
        also=also,
        at_key=True,
    )


def series(spec: Spec) -> Iterator[Problem]:
    """As many series as strides in an entry, and every reader of the keys knows of them."""
    for i, level in enumerate(spec.levels):
        pool = level.pool
        if pool is None or pool.series is None:
            continue
        path: Path = ("levels", i, "pool", "series")
        size, stride = level.partition.size, level.partition.stride
        if size != pool.series * stride or level.permute is not None:
            got = f"blocks of {size} by {stride}" if level.permute is None else "an order of keys"
            yield Problem(
                code="HS176",
                path=path,
                message=f"expected blocks of {pool.series} strides with {pool.series} series,"
                f" got {got}",
                help=f"write '{{blocks: {pool.series * stride}, stride: {stride}}}'",
                also=(("levels", i, "partition"), ("levels", i, "permute")),
            )
        if other := _other_reader(spec, level):
            yield Problem(
                code="HS176",
                path=path,
                message=f"expected keys in series to be read by '{level.name}' alone,"
                f" got '{other}' as well",
                help=f"write 'kv: {level.name}', which are keys of its own"
                if not level.score.by_index
                else "write the same 'series' in all levels of the index",
                also=(("levels",), ("attend",)),
            )


def _other_reader(spec: Spec, level: Level) -> str | None:
    """Another level or branch that reads the same keys, and not in the same series."""
    for other in spec.levels:
        same = other.score.by_index == level.score.by_index and (
            level.score.by_index or other.kv == level.kv
        )
        reads = other.pool is not None or other.score.form is not None
        if same and reads and (other.pool is None or other.pool.series != _series(level.pool)):
            return other.name
    if level.score.by_index:
        return None
    raw = (b.name for b in spec.attend if b.values == "raw" and b.kv == level.kv)
    return next(raw, None)


def _series(pool: Pool | None) -> int | None:
    return pool.series if pool else None


def rotations(spec: Spec) -> Iterator[Problem]:
    """An even number of channels that there are, at positions that a table has."""
    for i, level in enumerate(spec.levels):
        rotate = level.pool and level.pool.rotate
        if not rotate:
            continue
        path: Path = ("levels", i, "pool", "rotate")
        dim = spec.index.dim if level.score.by_index and spec.index else None
        if not level.score.by_index and spec.head_dim:
            dim = spec.head_dim.qk
        if rotate.dims % 2 or (dim is not None and rotate.dims > dim):
            most = dim or rotate.dims + 1
            limit = f" of at most {dim}" if dim else ""
            yield Problem(
                code="HS177",
                path=(*path, "dims"),
                message=f"expected an even number of channels{limit}, got {rotate.dims}",
                help=f"write 'dims: {max(2, min(rotate.dims, most) // 2 * 2)}'",
                also=(("head_dim",), ("index", "dim"), ("levels", i, "score")),
            )
        if rotate.at == "centre" and rotate.base is None:
            yield Problem(
                code="HS177",
                path=(*path, "at"),
                message="expected 'base' with 'at: centre', got none: a centre may lie between two"
                " positions, and a table has none in between",
                help="write 'base: 10000.0', or 'at: first'",
                also=((*path, "base"),),
            )


def early(spec: Spec) -> Iterator[Problem]:
    """Entries that begin before their place: some of their tokens follow it, and nothing nests."""
    for i, level in enumerate(spec.levels):
        blocks = level.partition
        if not isinstance(blocks, Blocks) or blocks.before is None:
            continue
        if why := _not_early(spec, level, blocks):
            yield Problem(
                code="HS178",
                path=("levels", i, "partition", "before"),
                message=f"'before' does not fit here: {why}",
                help="remove 'before'",
                also=(("levels",),),
                at_key=True,
            )


def _not_early(spec: Spec, level: Level, blocks: Blocks) -> str | None:
    assert blocks.before is not None
    if blocks.before > blocks.size - blocks.stride:
        return f"blocks of {blocks.size} by {blocks.stride} overlap by less"
    if level.permute is not None:
        return "an order of keys has no tokens before the first"
    if level.within or any(other.within == level.name for other in spec.levels):
        return "levels that nest begin at the same tokens"
    if level.pool and {"linear", "mlp"} & {level.pool.keys, level.pool.values}:
        return "a linear map needs all tokens of an entry, and the first entry lacks some"
    for other in spec.levels:
        pair = {level.name, other.name}
        mapped = {level.score.source, other.score.source} & pair
        if other is not level and mapped and other.partition != level.partition:
            return f"scores are mapped between it and '{other.name}', whose entries lie otherwise"
    return None
