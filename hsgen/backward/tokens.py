"""Lists of tokens that rows chose: for rows the union of a tile, for keys the rows of a block of 64 tokens.
The same of pooled entries.

Both have room for the worst of choices, so they are made in turns: of tiles, or of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hsgen.cols import ColsContext
from hsgen.kernels import MarksContext
from hsgen.plan import Buffer, Config, ElementType, Launch
from hsgen.rows import MARKED, Entries, RowsContext, next_power
from hsgen.schedule import text
from hsgen.schedule.draft import Draft
from hsgen.transposed import TransposedContext

MARKING = 4096  # slots that a program looks at at a time
LISTING = 1024  # rows, likewise
STEP = 64  # keys that a walk writes whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Tokens of a branch, or pooled entries, and who chose them.

    selection: the tensor and its strides.  keys: the tensor of keys, of entries that of their tokens.
    entries: these, and what sizes of their level are called.
    """

    branch: str
    node: str
    selection: tuple[str, ...]
    heads: int
    width: int
    keys: str
    entries: Entries | None = None
    level: str = ""

    @property
    def stride(self) -> int:
        """Tokens from one of them to the next."""
        return self.entries.stride if self.entries else 1

    @property
    def most(self) -> str:
        """How many a sequence has."""
        return f"batch.keys // {self.stride} + 1" if self.entries else "max(1, batch.keys)"

    @property
    def number(self) -> str:
        """How many the tensors of all sequences have room for."""
        of = self.keys
        return f"rows_{self.level}" if self.entries else f"{of}.shape[0] * {of}.shape[1]"

    @property
    def length(self) -> str:
        """From one sequence's in these to the next one's."""
        return (
            f"count_{self.level}"
            if self.entries
            else f"0 if batch.packed else {self.keys}.shape[1]"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """What makes lists of a branch, and what its kernels read of them.

    left: what tells where rows leave what they give keys.
    turns: the sizes that count what there is to do, and what is done at a time.
    """

    buffers: tuple[Buffer, ...]
    sizes: tuple[tuple[str, str], ...]
    launches: tuple[Launch, ...]
    arguments: tuple[str, ...]
    left: tuple[str, ...] = ()
    turns: tuple[str | None, str | None] = (None, None)


def unions(draft: Draft, chosen: Chosen, leader: str, config: Config) -> Lists:
    """The tokens that the rows of a tile chose, and which rows chose each; tiles are the leader's."""
    name, heads = chosen.branch, str(chosen.heads)
    index = MarksContext(
        name=f"index_{name}",
        heads=chosen.heads,
        width=chosen.width,
        causal=draft.shape.causal,
        how="picked",
        alone=True,
        entries=chosen.entries,
    )
    step = max(16, MARKING // config["BLOCK_T"])
    values = (("BLOCK_K", min(step, next_power(chosen.width))), ("BLOCK_N", step))
    marking = Config(constexprs=values, num_warps=8, num_stages=1)
    draft.kernel("index", index, marking, chosen.node, follows=leader)
    tiles, turn, capacity = f"tiles_{name}", f"tiles_at_once_{name}", f"capacity_{name}"
    arguments = (f"counts_{name}", f"entries_{name}", f"members_{name}", capacity)
    dims = ((turn, heads), (turn, heads, capacity), (turn, heads, capacity))
    return Lists(
        buffers=tuple(
            Buffer(name=list_, dtype="i32", dims=of, role="list")
            for list_, of in zip(arguments, dims, strict=False)
        ),
        sizes=(
            (capacity, chosen.most),
            (tiles, text.tiles_of(leader)),
            *_at_once(draft, name, f"{8 * chosen.heads} * {capacity}", tiles, turn),
        ),
        launches=(
            Launch(
                kernel=index.name,
                grid=("count", heads),
                arguments=(*chosen.selection, *arguments, *text.SEQ, "tile_first"),
            ),
        ),
        arguments=arguments,
        turns=(tiles, turn),
    )


def given(
    draft: Draft, chosen: Chosen, dq: RowsContext, config: Config, *, leaves: ElementType
) -> Lists:
    """The same lists where tiles leave, of each token, what they give it: as many at a time as have room.

    Room is a third of the bytes of queries and outputs, and what a row of 128 heads leaves is 17 times
    its own.  In a turn each of the GPU's processors has as many programs as any other.
    """
    name, shape = chosen.branch, draft.shape
    lists = unions(draft, chosen, dq.name, config)
    tiles, turn = lists.turns
    assert tiles is not None
    assert turn is not None
    capacity, slots, keys = f"capacity_{name}", f"slots_{name}", f"keys_{name}"
    length, listed, room = f"length_{name}", f"listed_{name}", f"room_{name}"
    round_ = f"round_{name}"
    parts, heads = f"parts_{dq.name}", shape.kv_heads
    size = 2 if leaves == "input" else 4
    block_t = f'config["{dq.name}"]["BLOCK_T"]'
    made = (f"part_k_{name}", f"slot_of_{name}")
    sizes = (
        (capacity, chosen.most),
        (tiles, text.tiles_of(dq.name)),
        *text.parts(dq),
        (listed, f"min({block_t} * {chosen.width}, {capacity})"),
        (slots, f"({listed} + {STEP - 1}) // {STEP} * {STEP}"),
        (keys, chosen.number),
        (length, chosen.length),
        (f"left_{name}", f"{heads * size * shape.qk} * {parts} * {slots}"),
        (f"lists_{name}", f"{8 * chosen.heads} * {capacity} + {4 * heads} * {keys}"),
        (f"bytes_{name}", f"left_{name} + lists_{name}"),
        (f"most_{name}", f"max(SCRATCH_BYTES, batch.rows * {draft.held // 3})"),
        (room, f"max(1, most_{name} // bytes_{name})"),
        (round_, f"min({room}, max(1, batch.processors // ({heads} * {parts})))"),
        (turn, f"min({tiles}, {room} // {round_} * {round_})"),
    )
    buffers = (
        Buffer(
            name=made[0],
            dtype=leaves,
            dims=(f"{heads} * {parts}", turn, slots, str(shape.qk)),
            role="scratch",
        ),
        Buffer(
            name=made[1], dtype="i32", dims=(str(heads), keys, turn), role="scratch", zeros=True
        ),
    )
    return replace(
        lists,
        buffers=(*lists.buffers, *buffers),
        sizes=sizes,
        left=(*made, turn, slots, keys, length),
    )


def by_block(draft: Draft, chosen: Chosen, context: ColsContext) -> Lists:
    """The rows that chose any token of each block of 64, and which tokens."""
    name, own, lists = chosen.branch, context.marked, context.list_heads

    def kernel(how: Literal["mark", "front"], config: Config) -> str:
        made = TransposedContext(
            name=f"{how}_rows_{name}",
            how=how,
            heads=chosen.heads,
            own=own,
            width=chosen.width,
            causal=draft.shape.causal,
            entries=chosen.entries,
        )
        return draft.kernel("index", made, config, chosen.node)

    slots = min(256, next_power(chosen.width))
    values = (("BLOCK_T", max(1, MARKING // slots)), ("BLOCK_K", slots))
    mark = kernel("mark", Config(constexprs=values, num_warps=8, num_stages=1))
    values = (("BLOCK_N", LISTING),)
    front = kernel("front", Config(constexprs=values, num_warps=4, num_stages=1))
    length, rows = f"length_{name}", f"rows_{name}"
    blocks, turn = f"blocks_{name}", f"blocks_at_once_{name}"
    of = f"{chosen.keys}.shape[1] // {MARKED * chosen.stride}"
    marks = (turn, rows, str(own)) if own > 1 else (turn, rows)
    bits, arguments = f"bits_{name}", tuple(f"{x}_{name}" for x in ("counts", "list", "marks"))
    sizes = (length, turn, rows)
    return Lists(
        buffers=(
            Buffer(
                name=bits,
                dtype="i64",
                dims=(str(chosen.heads), turn, rows),
                role="scratch",
                zeros=True,
            ),
            Buffer(name=arguments[0], dtype="i32", dims=(str(lists), turn), role="list"),
            Buffer(name=arguments[1], dtype="i32", dims=(str(lists), turn, rows), role="list"),
            Buffer(name=arguments[2], dtype="i64", dims=(str(lists), *marks), role="list"),
        ),
        sizes=(
            (length, f"0 if batch.packed else {of}"),
            (f"packed_{name}", f"{of} if batch.packed else 0"),
            (blocks, f"batch.sequences * ({length} + 1) + packed_{name}"),
            (rows, "in_q.shape[1]"),
            *_at_once(draft, name, f"{16 * chosen.heads + 4 * lists} * {rows}", blocks, turn),
        ),
        launches=(
            Launch(
                kernel=mark,
                grid=(text.TILES, str(chosen.heads)),
                arguments=(*chosen.selection, bits, *sizes, *text.SEQ, "tile_first"),
            ),
            Launch(
                kernel=front,
                grid=("count", str(lists)),
                arguments=(bits, *arguments, *sizes, *text.SEQ, "tile_first"),
            ),
        ),
        arguments=(*arguments, *sizes),
        turns=(blocks, turn),
    )


def _at_once(
    draft: Draft, name: str, each: str, whole: str, turn: str
) -> tuple[tuple[str, str], ...]:
    """How many there is room for: long calls have lists of an eighth of the bytes of queries and outputs."""
    return (
        (f"bytes_{name}", each),
        (f"most_{name}", f"max(SCRATCH_BYTES, batch.rows * {draft.held // 8})"),
        (turn, f"min({whole}, max(1, most_{name} // bytes_{name}))"),
    )
