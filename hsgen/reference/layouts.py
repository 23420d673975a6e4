"""Where the entries of a level lie: the tokens that each has, and the span that each may fill."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hsgen.reference.grids import axis_lengths, tile_of, tiles
from hsgen.reference.inputs import named
from hsgen.reference.partitions import begins, nodes, taken_by_nodes
from hsgen.reference.permutes import cluster_of, order_of
from hsgen.spec import (
    Blocks,
    Clusters,
    Diagonals,
    KMeans,
    LearnedTree,
    Level,
    Parts,
    Ragged,
    SortInSegment,
    Spec,
    Tile,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """The entries of a level in one sequence.

    slots: i64[H, N, M], the tokens of every entry in its order, -1 where it has no more; H is 1
        where heads agree.
    entry_of: i64[H, S], the entry of every token, -1 of none; None where entries overlap.
    starts, ends: i64[N], the first token that an entry may hold, whatever the data are, and the end.
    units: i64[U], ascending: where entries may start, each place once.  What may lie in one place
        is one unit: forced together, and complete together.
    step: Tokens from one unit to the next, where that is one number; rows after the last key then
        stand in units that do not exist.
    parts: How many equal parts of what a row sees entries are; no row has the others' entries then,
        and slots say nothing.
    first: i64[H, N], the token from which on an entry exists for a row; None where it always does.
    diagonal: Tokens of an entry, where entries are counted back from a row's own; slots are those of
        no row in particular, and starts and ends say how far back an entry reaches.
    """

    slots: Tensor
    entry_of: Tensor | None
    starts: Tensor
    ends: Tensor
    units: Tensor
    step: int | None = None
    parts: int | None = None
    first: Tensor | None = None
    diagonal: int | None = None

    @property
    def there(self) -> Tensor:
        """Entries that have a token, or may have one.  bool[H, N]"""
        if self.parts is not None:
            return torch.ones_like(self.starts, dtype=torch.bool)[None]
        return (self.slots >= 0).any(-1)


def layouts_of(
    spec: Spec, names: Collection[str], x: Mapping[str, Tensor], S: int, group: int
) -> dict[str, Layout]:
    """The entries of the named levels, by name."""
    found: dict[str, Layout] = {}
    for level in (level for level in spec.levels if level.name in names):
        above = found.get(level.within or "")
        tiled = level.permute is not None and isinstance(level.permute.keys, Tile)
        made = _tiled(spec, level, x, S) if tiled else _layout_of(level, x, S, group, above)
        found[level.name] = made
    return found


def _tiled(spec: Spec, level: Level, x: Mapping[str, Tensor], S: int) -> Layout:
    """Tiles of axes, or blocks of their order; all heads have the same."""
    order = level.permute and level.permute.keys
    assert isinstance(order, Tile)
    lengths = axis_lengths(spec, S)
    tile = tile_of(torch.arange(S, device=x["q"].device)[None], lengths, order.tile)
    if isinstance(level.partition, Clusters):
        return _clusters(tile, tiles(lengths, order.tile))
    return _permuted(tile.argsort(stable=True), level.partition.size, max(S, 1))


def _layout_of(
    level: Level, x: Mapping[str, Tensor], S: int, group: int, above: Layout | None
) -> Layout:
    """The entries of a level for S keys.  `group`: query heads of a key head."""
    if isinstance(level.partition, Ragged):
        return _runs(begins(level, level.partition, x))
    if isinstance(level.partition, LearnedTree):
        parents = above.entry_of if above is not None and above.first is not None else None
        if level.partition.takes is not None:
            return _taken(taken_by_nodes(level, level.partition.takes, x), S)
        return _nodes(*nodes(level, level.partition, x, parents))
    order = level.permute and level.permute.keys
    if order is None:
        if isinstance(level.partition, Parts):
            return _parts(level.partition.count, x["q"])
        if isinstance(level.partition, Diagonals):
            size = level.partition.size
            return replace(_in_place(size, size, 0, S, x["q"]), diagonal=size)
        before = level.partition.before if isinstance(level.partition, Blocks) else None
        return _in_place(level.partition.size, level.partition.stride, before or 0, S, x["q"])
    keys = x[named("k", level.kv)]
    if isinstance(level.partition, Clusters):
        assert isinstance(order, KMeans), "clusters are those of a k-means order"
        return _clusters(cluster_of(order, keys), order.clusters)
    at = order_of(order, keys, x["q"], group, x.get(f"{level.name}_key_order"))  # [H, S]
    segment = order.segment if isinstance(order, SortInSegment) else max(S, 1)
    return _permuted(at, level.partition.size, segment)


def _in_place(size: int, stride: int, before: int, S: int, like: Tensor) -> Layout:
    """Entry i covers tokens [i * stride - before, i * stride - before + size) and starts at its place.

    What lies before its place belongs to entries that are forced before it.
    """
    starts = torch.arange(-(-S // stride), device=like.device) * stride
    slots = starts[:, None] - before + torch.arange(size, device=like.device)
    slots = slots.masked_fill((slots >= S) | (slots < 0), -1)[None]
    entry_of = torch.arange(S, device=like.device)[None] // size if size == stride else None
    ends = starts - before + size
    return Layout(
        slots=slots, entry_of=entry_of, starts=starts, ends=ends, units=starts, step=stride
    )


def _runs(begins: Tensor) -> Layout:
    """Runs of tokens; that one has ended is known once the next has begun.  begins: bool[S]"""
    S = len(begins)
    entry_of = (begins.long().cumsum(0) - 1)[None]
    starts = begins.nonzero().squeeze(1)
    following = torch.cat((starts[1:], starts.new_full((min(len(starts), 1),), S)))
    return Layout(
        slots=_slots_of(entry_of, len(starts)),
        entry_of=entry_of,
        starts=starts,
        ends=following + 1,
        units=starts,
    )


def _nodes(node: Tensor, N: int) -> Layout:
    """Tokens of nodes, which are there once a token is.  node: i64[H, S], -1 of none"""
    H, S = node.shape
    token = torch.arange(S, device=node.device).expand(H, S)
    first = node.new_full((H, N + 1), S)
    first = first.scatter_reduce(1, node.masked_fill(node < 0, N), token, "amin")[:, :N]
    starts = torch.zeros(N, dtype=torch.long, device=node.device)
    return Layout(
        slots=_slots_of(node, N),
        entry_of=node,
        starts=starts,
        ends=starts,
        units=starts[:1],
        first=first,
    )


def _taken(slots: Tensor, S: int) -> Layout:
    """Tokens that nodes have taken, whichever others have them.  slots: i64[H, N, M], ascending"""
    H, N, M = slots.shape
    starts = torch.zeros(N, dtype=torch.long, device=slots.device)
    return Layout(
        slots=slots,
        entry_of=None,
        starts=starts,
        ends=starts,
        units=starts[:1],
        first=slots[..., 0] if M else slots.new_full((H, N), S),
    )


def _slots_of(entry_of: Tensor, N: int) -> Tensor:
    """The tokens of every entry, in order.  i64[H, S] -> i64[H, N, M]"""
    H, S = entry_of.shape
    of = entry_of.masked_fill(entry_of < 0, N)
    at = of.argsort(dim=-1, stable=True)
    sorted_of = of.gather(-1, at)
    counts = torch.zeros(H, N + 1, dtype=torch.long, device=at.device)
    counts.scatter_add_(-1, of, torch.ones_like(of))
    before = counts.cumsum(-1) - counts
    slot = torch.arange(S, device=at.device) - before.gather(-1, sorted_of)
    slots = at.new_full((H, N + 1, int(counts.max()) if S else 0), -1)
    head = torch.arange(H, device=at.device)[:, None].expand(H, S)
    slots[head, sorted_of, slot] = at
    return slots[:, :N]


def _permuted(at: Tensor, size: int, segment: int) -> Layout:
    """Blocks of `size` slots; a segment's tokens may lie in each of its blocks."""
    H, S = at.shape
    N = -(-S // size)
    slots = torch.cat((at, at.new_full((H, N * size - S), -1)), 1).unflatten(1, (N, size))
    starts = torch.arange(N, device=at.device) * size // segment * segment
    return Layout(
        slots=slots,
        entry_of=_entry_of(slots, S),
        starts=starts,
        ends=starts + segment,
        units=starts.unique(),
        step=segment,
    )


def _clusters(cluster: Tensor, N: int) -> Layout:
    """Entry i has the tokens of cluster i, in order.  cluster: [H, S]"""
    S = cluster.shape[1]
    starts = torch.zeros(N, dtype=torch.long, device=cluster.device)
    slots = _slots_of(cluster, N)
    return Layout(slots=slots, entry_of=cluster, starts=starts, ends=starts + S, units=starts[:1])


def _parts(count: int, like: Tensor) -> Layout:
    """Parts that every row has of its own, all of them from its first token on."""
    starts = torch.zeros(count, dtype=torch.long, device=like.device)
    return Layout(
        slots=starts.new_full((1, count, 0), -1),
        entry_of=None,
        starts=starts,
        ends=starts,
        units=starts[:1],
        parts=count,
    )


def part_of(parts: int, seen: Tensor, S: int) -> Tensor:
    """The part of every token, of the first `seen` ones of S, for each row.  i64[T] -> i64[T, S]"""
    n = seen.clamp(min=1)[:, None]
    token = torch.arange(S, device=seen.device)
    return (((2 * token + 1) * parts - 1) // (2 * n)).clamp(max=parts - 1)


def back(size: int, p: Tensor, S: int) -> Tensor:
    """The entry that each token is in of a row's diagonals, negative after its own.  -> i64[T, S]"""
    return (p // size)[:, None] - torch.arange(S, device=p.device) // size


def _entry_of(slots: Tensor, S: int) -> Tensor:
    """The entry that has each token.  i64[H, N, M] -> i64[H, S]"""
    H, N, M = slots.shape
    entry = torch.arange(N, device=slots.device).repeat_interleave(M).expand(H, -1)
    flat = slots.flatten(1)
    found = slots.new_full((H, S + 1), -1)  # the last takes what is no token
    return found.scatter_(1, flat.masked_fill(flat < 0, S), entry)[:, :S]


def tokens_of(slots: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens in slots, and where there are any.

    i64[H, N, M], [S, H, D] -> [N, M, H, D], bool[N, M, H, 1]
    """
    there, slots = slots >= 0, slots.clamp(min=0)
    if len(slots) == 1:
        return y[slots[0]], there[0, ..., None, None]
    head = torch.arange(len(slots), device=y.device)[:, None, None]
    return y[slots, head].permute(1, 2, 0, 3), there.permute(1, 2, 0).unsqueeze(-1)
