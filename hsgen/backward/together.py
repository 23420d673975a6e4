"""Lists that blocks of rows chose: for rows their block's own, for keys the blocks of rows that chose them.

A call brings what single rows chose, so a block of rows has a bit for each of its rows by entry.  Both loops
read these: of rows that share a list all bits are set, up to what each may see.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from hsgen import cols, together, walks
from hsgen.backward import tiles
from hsgen.backward.tokens import Lists
from hsgen.estimates import Shown
from hsgen.plan import Buffer, Config, Launch
from hsgen.rows import Entries, RowsContext, Shape, next_power
from hsgen.schedule import laid, text
from hsgen.schedule.draft import Draft

MARKING = 4096  # slots of rows that a program looks at at a time
LEAST_ROOM = 1 << 20  # bytes of parts of dk and dv
SHARE = Fraction(1, 2)  # of what a call is given, that a turn's lists and parts may have


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Entries of a branch, and who chose them.

    selection: the tensor and its strides.  keys: the tensor of keys.
    left: tokens of a window beside it, which has those of its rows.
    order: of keys that are sorted inside segments of so many, and its strides.
    aside: tokens of blocks of which each row has its own in another branch.
    own: a row that did not choose its own token sees nothing.
    bits: what each block of rows chose, where all of its rows chose the same, and words of one.
    shown: what a pattern beside it shows each row, which is left to that.
    shared: the buffer of the bits that blocks of rows have, and how many words, where these choose again.
    """

    branch: str
    node: str
    selection: tuple[str, ...]
    heads: int
    share: str
    block: int  # of rows
    entries: Entries
    keys: str
    left: int
    order: tuple[str, ...] = ()
    segment: int = 0
    aside: int = 0
    own: bool = False
    bits: tuple[str, str] | None = None
    shown: Shown | None = None
    shared: tuple[str, str] | None = None

    def of(self, *names: str) -> tuple[str, ...]:
        """Names in the driver."""
        return tuple(f"{name}_{self.branch}" for name in names)


def forward(shape: Shape, chosen: Chosen, *, scale: float) -> RowsContext:
    """The loops over the list of a block of rows."""
    name = f"attend_{chosen.branch}"
    if chosen.aside:
        context = walks.attend(shape, name=name, scale=scale, block=chosen.block, own=chosen.aside)
    else:
        context = together.attend(
            shape,
            name=name,
            scale=scale,
            entries=chosen.entries,
            share=chosen.share,
            block=chosen.block,
            left=chosen.left,
            ordered=bool(chosen.order),
        )
    return together.of_whole(
        context, block=chosen.block, heads=chosen.heads, of_tiles=chosen.shared is not None
    )


def listed(draft: Draft, chosen: Chosen, leader: str) -> Lists:
    """The same as tiles of a leader's walk it."""
    lists = members(draft, chosen)
    blocks, tokens, parts, tiled = chosen.of("row_blocks", "tokens", "parts", "tiles")
    return replace(
        lists,
        sizes=(
            *lists.sizes,
            (tokens, f'config["{leader}"]["BLOCK_T"]'),
            (parts, f"({chosen.block} + {tokens} - 1) // {tokens}"),
            (tiled, f"{blocks} * {parts}"),
        ),
    )


def members(draft: Draft, chosen: Chosen) -> Lists:
    """The entries of each block of rows, and which of its rows chose them."""
    name, heads = chosen.branch, str(chosen.heads)
    context = together.ListsContext(
        name=f"members_{name}",
        how="members",
        heads=chosen.heads,
        rows=chosen.block,
        size=chosen.entries.size,
        stride=chosen.entries.stride,
        causal=draft.shape.causal,
        left=chosen.left,
        segment=chosen.segment,
        apart=chosen.aside > 0,
        own=chosen.own,
        shown=chosen.shown,
    )
    tile, words = next_power(chosen.block), cols.words_of(chosen.block)
    values = (("BLOCK_T", tile), ("BLOCK_K", max(16, MARKING // tile)), ("BLOCK_N", 512))
    config = Config(constexprs=values, num_warps=4, num_stages=1)
    draft.kernel("index", context, config, chosen.node)
    made = chosen.of("counts", "entries", "words")
    blocks, capacity = chosen.of("row_blocks", "capacity")
    shapes = (("2",), (capacity,), (capacity, str(words)))
    selection = chosen.selection
    return Lists(
        buffers=tuple(
            Buffer(name=x, dtype="i32", dims=(blocks, heads, *dims), role="list")
            for x, dims in zip(made, shapes, strict=True)
        ),
        sizes=(
            (blocks, f"batch.rows // {chosen.block} + 3 * {text.SEQ[1]}"),
            (
                capacity,
                f"max(1, (batch.keys + {chosen.entries.stride - 1}) // {chosen.entries.stride})",
            ),
        ),
        launches=(
            Launch(
                kernel=context.name,
                grid=(blocks, heads),
                arguments=(
                    *selection,
                    *made,
                    f"{selection[0]}.shape[3]",
                    capacity,
                    *text.SEQ,
                    "0",
                ),
            ),
        ),
        arguments=(*made, capacity, str(words)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heads:
    """How many key heads there is room for, how many a launch has, and which is the first."""

    held: str
    count: str
    first: tuple[str, ...] = ()


def _heads(draft: Draft, chosen: Chosen) -> _Heads:
    """All of them; where all have lists of their own, which are bits, a turn's."""
    heads = str(draft.shape.kv_heads)
    if chosen.bits is None:
        return _Heads(held=heads, count=heads)
    return _Heads(held=chosen.of("turn_heads")[0], count="count", first=("tile_first",))


def listed_again(draft: Draft, chosen: Chosen, leader: str) -> Lists:
    """The entries of each block of rows of a turn, by bits that it chose again; tiles are the leader's."""
    name, heads, block = chosen.branch, str(chosen.heads), chosen.block
    assert chosen.shared is not None, "of rows that share lists"
    unfold = walks.BitsContext(name=f"unfold_{name}", how="unfold", heads=chosen.heads, rows=block)
    values = (("BLOCK_T", next_power(block)), ("BLOCK_N", 512))
    config = Config(constexprs=values, num_warps=4, num_stages=1)
    draft.kernel("index", unfold, config, chosen.node)
    made = chosen.of("counts", "entries")
    blocks, capacity, tokens, parts, tiled, turn = chosen.of(
        "blocks_at_once", "capacity", "tokens", "parts", "tiles", "chunk"
    )
    bits, words = chosen.shared
    return Lists(
        buffers=(
            Buffer(name=made[0], dtype="i32", dims=(f"{turn} // {parts}", heads, "2"), role="list"),
            Buffer(
                name=made[1], dtype="i32", dims=(f"{turn} // {parts}", heads, capacity), role="list"
            ),
        ),
        sizes=(
            (capacity, "max(1, batch.keys)"),
            (tokens, f'config["{leader}"]["BLOCK_T"]'),
            (parts, f"({block} + {tokens} - 1) // {tokens}"),
            (tiled, f"(batch.rows // {block} + 3 * {text.SEQ[1]}) * {parts}"),
            (f"bytes_{name}", f"{4 * chosen.heads} * {capacity}"),
            (f"most_{name}", f"max(SCRATCH_BYTES // 16, batch.rows * {draft.held // 16})"),
            (blocks, f"max(1, most_{name} // bytes_{name})"),
            (turn, f"min({tiled}, {blocks} * {parts})"),
        ),
        launches=(
            Launch(
                kernel=unfold.name,
                grid=(f"count // {parts}", heads),
                arguments=(bits, *made, words, capacity, *text.SEQ, f"tile_first // {parts}"),
            ),
        ),
        arguments=(*made, made[1], capacity, "0"),
        turns=(tiled, turn),
    )


def _planned(draft: Draft, name: str) -> bool:
    """Whether a kernel is there: lists that are chosen again and a caller's have the same ones."""
    return any(kernel.name == name for kernel in draft.kernels)


def takers(draft: Draft, chosen: Chosen, context: cols.ColsContext, *, again: bool) -> Lists:
    """The blocks of rows that chose any entry of each block of keys; again: as their bits say."""
    name, lists, heads = chosen.branch, chosen.heads // context.lists, _heads(draft, chosen)
    held, count = (heads.held, heads.count) if chosen.bits else (str(lists), str(lists))
    made = cols.TakersContext(
        name=f"takers_{name}",
        heads=chosen.heads,
        lists=context.lists,
        rows=chosen.block,
        size=chosen.entries.size,
        several=context.several,
        causal=draft.shape.causal,
        segment=chosen.segment,
        bits=chosen.bits is not None,
        shown=chosen.shown,
        shared=chosen.shared is not None,
    )
    stepping = Config(constexprs=(("BLOCK_N", 256),), num_warps=4, num_stages=1)
    if not _planned(draft, made.name):
        draft.kernel("index", made, stepping, chosen.node)
    words, counts, listed, length, buckets, most, capacity = chosen.of(
        "words", "row_counts", "row_lists", "length", "buckets", "most", "capacity"
    )
    words, capacity = chosen.bits or (words, capacity)
    of = f"{chosen.keys}.shape[1] // {context.stride}"
    sizes = (length, buckets, most, capacity)
    if chosen.shared is not None:
        sizes += (str(context.words),)
    if again:
        assert chosen.shared is not None, "of rows that share lists"
        words, sizes = chosen.shared[0], (*sizes[:3], chosen.shared[1], "0")
    return Lists(
        buffers=(
            Buffer(name=counts, dtype="i32", dims=(held, buckets), role="list"),
            Buffer(name=listed, dtype="i32", dims=(held, buckets, most), role="list"),
        ),
        sizes=(
            (f"packed_{name}", f"{of} if batch.packed else 0"),
            (length, f"0 if batch.packed else {of}"),
            (buckets, f"{text.SEQ[1]} * ({length} + 1) + packed_{name}"),
            (most, f"(in_q.shape[1] // {chosen.block} + 2) * {context.lists}"),
        ),
        launches=(
            Launch(
                kernel=made.name,
                grid=(buckets, count),
                arguments=(words, counts, listed, *sizes, *text.SEQ, *heads.first),
            ),
        ),
        arguments=(counts, listed, words, *sizes),
    )


def parts(
    draft: Draft,
    chosen: Chosen,
    context: cols.ColsContext,
    read: tuple[str, ...],
    grads: tuple[str, ...],
    *,
    again: bool = False,
) -> Lists:
    """dk and dv over these, the rows of a sequence's first keys in parts, and the sums of all parts.

    Of bits heads have turns, for which lists and parts are made.
    """
    name, shape = chosen.branch, draft.shape
    total = cols.SumContext(name=f"sum_{name}", of=context)
    if not _planned(draft, total.name):
        draft.kernel("merge", total, tiles.sums(), chosen.node, follows=context.name)
    heads, dims = _heads(draft, chosen), (shape.qk, shape.v)
    block_n, of_block, programs, heavy, room, number = chosen.of(
        "block_n", "block_tiles", "key_tiles", "heavy_tiles", "room", "key_parts"
    )
    made, each = chosen.of("part_k", "part_v"), f"{programs} + {heavy} * ({number} - 1)"
    lists = takers(draft, chosen, context, again=again)
    turns = tuple[tuple[str, str], ...]()
    if chosen.bits:
        buckets, most = chosen.of("buckets", "most")
        held = f"4 * {buckets} * ({most} + 1) + {4 * sum(dims)} * {block_n} * ({each})"
        turns = laid.of_heads(draft, f"heads_{name}", held, SHARE)
    return Lists(
        buffers=(
            *lists.buffers,
            *(
                Buffer(
                    name=part,
                    dtype="f32",
                    dims=(f"{heads.held} * ({each})", block_n, str(dim)),
                    role="scratch",
                )
                for part, dim in zip(made, dims, strict=True)
            ),
        ),
        sizes=(
            *lists.sizes,
            (block_n, f'config["{context.name}"]["BLOCK_N"]'),
            (of_block, f"({context.size - 1} + {block_n}) // {block_n}"),
            (programs, f"buckets_{name} * {of_block}"),
            (heavy, f"{text.SEQ[1]} * {context.heavy} * {of_block}"),
            (f"bytes_{name}", f"{heavy} * {block_n} * {4 * shape.kv_heads * sum(dims)}"),
            (room, f"max({LEAST_ROOM}, min(SCRATCH_BYTES // 4, batch.rows * {draft.held // 8}))"),
            (number, f"1 + min({cols.PARTS - 1}, {room} // bytes_{name})"),
            *turns,
        ),
        launches=(
            *lists.launches,
            Launch(
                kernel=context.name,
                grid=(programs, heads.count, number),
                arguments=(*read, *made, *lists.arguments, *chosen.order, *text.SEQ, *heads.first),
            ),
            Launch(
                kernel=total.name,
                grid=(programs, heads.count),
                arguments=(
                    *(*made, *grads, f"length_{name}", number, *chosen.order, *text.SEQ),
                    *heads.first,
                ),
            ),
        ),
        arguments=(),
        turns=(str(shape.kv_heads), heads.held) if chosen.bits else (None, None),
    )
