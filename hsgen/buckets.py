"""Attention block by block: the rows that chose a block are gathered to it, and each row's parts merged.

Where a block is long and every query head chooses for itself, neighbouring rows share little, and a tile of
them would walk many blocks for a few rows each.  Here each block's keys are read once for every tile of rows
that chose it (the loop order of MoBA, arXiv:2502.13189, and FlashMoBA, arXiv:2511.11571), a part of the
softmax for each choice of a row is kept, and the parts are merged.  Heads take turns, so that parts stay few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hsgen import rows
from hsgen.kernels import tunables
from hsgen.plan import Buffer, Config, Context, Kernel, Launch, Param, Step
from hsgen.rows import SEQ, Chunk, RowsContext, Shape, chunks, count, next_power, pointer

MOST_SLOTS = 16  # of a row: each is a part, written and read again
MOST_TURNS = 8  # of heads in a short call, to hold less
LEAST_BLOCK = 128  # tokens: a part of fewer keys costs more to merge than to compute


COUNTS = pointer("COUNTS", "i32", "[heads, buckets] rows of each block")
STARTS = pointer("STARTS", "i32", "[turn heads, buckets] where a block's list begins")
ENDS = pointer("ENDS", "i32", "[turn heads, buckets] where it ends")
TILES = pointer("TILES", "i32", "[turn heads, capacity, 2] block and first place of a tile")
TILE_COUNTS = pointer("TILE_COUNTS", "i32", "[turn heads] tiles")
LIST = pointer("LIST", "i32", "[turn heads, items] row * slots + slot, block by block")
PART_LSE = pointer("PART_LSE", "f32", "f32[turn heads, items]")
LENGTH = count("length", "blocks of one sequence; packed: 0")
BUCKETS = count("buckets", "blocks of all sequences")
ITEMS = count("items", "rows * slots")
CAPACITY = count("capacity", "most tiles of a head")
HEAD_FIRST = count("head_first", "the turn's first head")


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketsContext:
    """Everything `index.py.jinja` reads: count a block's rows, set offsets, or place rows in lists."""

    name: str
    how: Literal["count", "offsets", "place"]
    header: str = ""
    pieces: str = ""
    heads: int  # selection heads, one a query head
    width: int  # slots of a row of the selection
    stride: int
    causal: bool

    @property
    def summary(self) -> str:
        match self.how:
            case "count":
                return "how many rows chose each block."
            case "offsets":
                return "where the list of each block's rows begins, and the tiles that walk it."
            case "place":
                return "the rows that chose each block, block by block."

    @property
    def padded_width(self) -> int:
        """`width` as a tile."""
        return next_power(self.width)

    @property
    def params(self) -> tuple[Param, ...]:
        selection = pointer(
            "SELECTION", "i32", f"[rows, {self.heads}, {self.width}], each once, then -1"
        )
        match self.how:
            case "count":
                pointers, counts = (selection, COUNTS), (LENGTH, BUCKETS)
            case "offsets":
                pointers, counts = (COUNTS, STARTS, ENDS, TILES, TILE_COUNTS), (BUCKETS, CAPACITY)
                return (*pointers, *counts, HEAD_FIRST, *tunables("BLOCK_T", "BLOCK_N"))
            case "place":
                pointers = (selection, COUNTS, STARTS, LIST, PART_LSE)
                counts = (LENGTH, BUCKETS, ITEMS)
        return (*pointers, *counts, *SEQ, HEAD_FIRST, *tunables("BLOCK_T"))

    @property
    def jit(self) -> str:
        return rows.jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartsContext(rows.InTurn):
    """Everything `merge.py.jinja` reads to merge the parts of one softmax."""

    name: str
    header: str = ""
    pieces: str = ""
    width: int
    head_dim: int  # of a value
    how: Literal["parts"] = "parts"
    sink: bool = False
    turn: rows.Turn | None = None

    @property
    def summary(self) -> str:
        return "one softmax from the parts that each row's blocks gave."

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def params(self) -> tuple[Param, ...]:
        return (
            pointer("PART_O", "input", f"[turn heads, items, {self.head_dim}]"),
            PART_LSE,
            *((rows.SINK,) if self.sink else ()),
            *rows.gates_of(self.turn),
            rows.output_of(rows.OUTPUTS[0], self.turn),
            *rows.OUTPUTS[1:],
            ITEMS,
            *SEQ,
            HEAD_FIRST,
            *tunables("BLOCK_R"),
        )

    @property
    def jit(self) -> str:
        return rows.jit(self.params)


def attend(
    shape: Shape, *, name: str, scale: float, entries: rows.Entries, width: int
) -> RowsContext:
    """One block's keys for a tile of the rows that chose it."""
    size, stride = entries.size, entries.stride
    heads = rows.heads_of(shape, per_head=True)
    heads["rows_comment"] = "rows that chose one block, of one query head"
    own = "tl.minimum(position + 1, k_len)" if shape.causal else "k_len + rows * 0"
    return RowsContext(
        name=name,
        summary="attention of rows to one block that they chose, a part of each row's softmax.",
        params=(
            *rows.QUERY,
            *rows.keys_and_values(shape),
            TILES,
            TILE_COUNTS,
            ENDS,
            LIST,
            *rows.tensor("O", "o", "[turn heads, items, Dv]", "bth"),
            *rows.lse(comment="f32[turn heads, items]"),
            LENGTH,
            BUCKETS,
            ITEMS,
            CAPACITY,
            *SEQ,
            HEAD_FIRST,
            *rows.BLOCKS,
        ),
        acc="softmax",
        width_of_list=width,
        **heads,
        key_row="k_first",
        setup=(
            f"first_key = entry * {stride}",
            f"seen = tl.minimum({own}, first_key + {size})",
            f"everyone = tl.min(tl.where(alive, seen, first_key + {size}), 0)",
            "stop = tl.max(tl.where(alive, seen, first_key), 0)",
            "full = first_key + tl.maximum(everyone - first_key, 0) // BLOCK_N * BLOCK_N",
        ),
        phases=(
            rows.Phase(
                kind="range", comment="keys that every row sees", start="first_key", stop="full"
            ),
            rows.Phase(
                kind="range",
                comment="keys up to a row's own, or to the end of the block",
                start="full",
                stop="stop",
                inside="n < stop",
                visible=("n[None, :] < seen[:, None]",),
            ),
        ),
        stride=stride,
        scale_log2=rows.number(scale * rows.LOG2_E),
        precision=shape.precision,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """What the step needs to know of a branch: names in the driver, arguments, numbers of the spec."""

    name: str
    needs: tuple[str, ...]
    makes: tuple[str, ...]
    selection: str
    keys: str  # a tensor whose second dimension is the keys'
    tensors: tuple[str, ...]  # q, k, v and their strides
    outputs: tuple[str, ...]  # the sink and the gates if there are any, o and lse and their strides
    buffers: tuple[Buffer, ...]
    width: int
    entries: rows.Entries
    scale: float
    softcap: float | None
    sink: bool
    turn: rows.Turn | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What kernels read and write beside their blocks' lists and parts, by the driver's names.

    `listed`: by what attends, behind its list; `sums`: by what attends behind its log-sum-exps, and by what
    merges behind them; `merged`: by what merges alone, behind those.  `items`: how many slots there are, one
    at least.
    """

    listed: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    items: str = ""


NOTHING = Beside()


def plan(
    shape: Shape, branch: Branch, tiles: Callable[[RowsContext], Config]
) -> tuple[tuple[Kernel, ...], Step]:
    """The kernels of one branch and the step that launches them, heads in turns."""
    context = attend(
        shape,
        name=f"attend_{branch.name}",
        scale=branch.scale,
        entries=branch.entries,
        width=branch.width,
    )
    context = rows.with_logits(context, scale=branch.scale, softcap=branch.softcap, sink=False)
    merge = PartsContext(
        name=f"merge_{branch.name}",
        width=branch.width,
        head_dim=shape.v,
        sink=branch.sink,
        turn=branch.turn,
    )
    return planned(shape, branch, context, tiles(context), merge)


def planned(
    shape: Shape,
    branch: Branch,
    context: RowsContext,
    config: Config,
    merge: Context,
    beside: Beside = NOTHING,
) -> tuple[tuple[Kernel, ...], Step]:
    """The same, of any loop over a block's rows and any merge of their parts."""

    def index(how: Literal["count", "offsets", "place"]) -> BucketsContext:
        return BucketsContext(
            name=f"{how}_{branch.name}",
            how=how,
            heads=shape.query_heads,
            width=branch.width,
            stride=branch.entries.stride,
            causal=shape.causal,
        )

    rows_of = max(1, 256 // next_power(branch.width))
    listing = Config(constexprs=(("BLOCK_T", rows_of),), num_warps=4, num_stages=1)
    scan = Config(constexprs=(("BLOCK_N", 256),), num_warps=4, num_stages=1)
    merging = Config(constexprs=(("BLOCK_R", 32),), num_warps=4, num_stages=1)
    node = branch.makes[:1]
    kernels = (
        Kernel(
            name=f"count_{branch.name}",
            skeleton="index",
            context=index("count"),
            config=listing,
            operators=node,
            by_slot=True,
        ),
        Kernel(
            name=f"offsets_{branch.name}",
            skeleton="index",
            context=index("offsets"),
            config=scan,
            operators=node,
            follows=context.name,
        ),
        Kernel(
            name=f"place_{branch.name}",
            skeleton="index",
            context=index("place"),
            config=listing,
            operators=node,
            by_slot=True,
        ),
        Kernel(
            name=context.name,
            skeleton="rows",
            context=context,
            config=config,
            operators=branch.makes,
        ),
        Kernel(
            name=merge.name,
            skeleton="merge",
            context=merge,
            config=merging,
            operators=branch.makes,
            follows=context.name,
        ),
    )
    return kernels, _step(shape, branch, context.name, beside)


def turns(name: str, heads: str, short: str) -> tuple[tuple[str, str], ...]:
    """The sizes that say how many heads have a turn, about as many in each: `turn_NAME`.

    A scratch holds their parts, `bytes_NAME` of each.  Those of a short call have `short` bytes, or a quarter
    of a scratch, but no more than MOST_TURNS turns for that.
    """
    bytes_, room, least = f"bytes_{name}", f"short_{name}", f"least_{name}"
    fit, number = f"fit_{name}", f"turns_{name}"
    return (
        (room, f"max(SCRATCH_BYTES // 4, {short})"),
        (least, f"max({room} // {bytes_}, ({heads} + {MOST_TURNS - 1}) // {MOST_TURNS})"),
        (fit, f"max(1, min(SCRATCH_BYTES // {bytes_}, {least}))"),
        (number, f"({heads} + {fit} - 1) // {fit}"),
        (f"turn_{name}", f"({heads} + {number} - 1) // {number}"),
    )


def _step(shape: Shape, branch: Branch, attending: str, beside: Beside) -> Step:
    name, heads, stride = branch.name, str(shape.query_heads), branch.entries.stride
    length, buckets, items = f"length_{name}", f"buckets_{name}", f"items_{name}"
    capacity, turn = f"capacity_{name}", f"turn_{name}"
    counts, starts, ends = f"counts_{name}", f"starts_{name}", f"ends_{name}"
    tiles, tile_counts, listed = f"tiles_{name}", f"tile_counts_{name}", f"list_{name}"
    part_o, part_lse = f"part_o_{name}", f"part_lse_{name}"
    packed = f"packed_{name}"
    row_tiles = "batch.rows // {BLOCK_T} + batch.sequences"
    block_t = f'config["{attending}"]["BLOCK_T"]'
    held = shape.query_heads * (shape.qk + shape.v) * 2  # bytes of a row of queries and outputs
    # of a slot: an output, as if of 16 bits, its sums and its place
    part_bytes = 2 * shape.v + 12 + 4 * len(beside.sums)
    sizes = (
        (packed, f"{branch.keys}.shape[1] // {stride} if batch.packed else 0"),
        (length, f"0 if batch.packed else {branch.keys}.shape[1] // {stride}"),
        (buckets, f"batch.sequences * ({length} + 1) + {packed}"),
        (items, f"batch.rows * {branch.width}"),
        (capacity, f"{items} // {block_t} + {buckets}"),
        (f"heads_{name}", heads),
        (f"bytes_{name}", f"{beside.items or items} * {part_bytes}"),
        *turns(name, heads, f"batch.rows * {held * 2} // 5"),
    )
    buffers = (
        Buffer(name=counts, dtype="i32", dims=(heads, buckets), role="list", zeros=True),
        Buffer(name=starts, dtype="i32", dims=(turn, buckets), role="list"),
        Buffer(name=ends, dtype="i32", dims=(turn, buckets), role="list"),
        Buffer(name=tiles, dtype="i32", dims=(turn, capacity, "2"), role="list"),
        Buffer(name=tile_counts, dtype="i32", dims=(turn, "1"), role="list"),
        Buffer(name=listed, dtype="i32", dims=(turn, items), role="list"),
        Buffer(name=part_o, dtype="input", dims=(turn, items, str(shape.v)), role="list"),
        Buffer(name=part_lse, dtype="f32", dims=(turn, items), role="list"),
        *(Buffer(name=x, dtype="f32", dims=(turn, items), role="list") for x in beside.sums),
        *branch.buffers,
    )
    seq = ("batch.table", "batch.sequences", "tile_first")
    launches = (
        Launch(
            kernel=f"count_{name}",
            grid=(row_tiles, "count"),
            arguments=(branch.selection, counts, length, buckets, *seq),
        ),
        Launch(
            kernel=f"offsets_{name}",
            grid=("count", "1"),
            arguments=(counts, starts, ends, tiles, tile_counts, buckets, capacity, "tile_first"),
        ),
        Launch(
            kernel=f"place_{name}",
            grid=(row_tiles, "count"),
            arguments=(
                branch.selection,
                counts,
                starts,
                listed,
                part_lse,
                length,
                buckets,
                items,
                *seq,
            ),
        ),
        Launch(
            kernel=attending,
            grid=(capacity, "count"),
            arguments=(
                *branch.tensors,
                tiles,
                tile_counts,
                ends,
                listed,
                *beside.listed,
                *(part_o, "0", str(shape.v), f"{items} * {shape.v}"),
                *(part_lse, "0", items, "1"),
                *beside.sums,
                *(length, buckets, items, capacity),
                *seq,
            ),
        ),
        Launch(
            kernel=f"merge_{name}",
            grid=("batch.rows // {BLOCK_R} + batch.sequences", "count"),
            arguments=(
                *(part_o, part_lse, *beside.sums, *beside.merged),
                *branch.outputs,
                items,
                *seq,
            ),
        ),
    )
    return Step(
        title=f"attend: {name}, block by block",
        needs=branch.needs,
        makes=branch.makes,
        buffers=buffers,
        launches=launches,
        sizes=sizes,
        tiles=f"heads_{name}",
        chunk=turn,
    )
