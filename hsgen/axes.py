"""Tokens that lie along axes, in the order of tiles: where these are, and a graph whose entries are tiles.

Every tile has as many slots as a whole one has tokens, and its tokens there in their own order.  So entries
are blocks of slots, and rows that choose together are blocks of them too, as where nothing is laid out:
kernels look a row's token up in a list, and read keys that were copied into slots.  The last tiles of an axis
have fewer tokens than slots; the tiles that have any come before those that have none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hsgen import rows
from hsgen.graph import (
    Attend,
    AxisTile,
    Cluster,
    Graph,
    Node,
    Permute,
    Pool,
    PoolRows,
    Score,
    Select,
    SelectSet,
)
from hsgen.plan import Param
from hsgen.rows import Chunk, chunks, count, jit, next_power, pointer

MOST_AXES = 3
# What a call of tiles has for kernels: by slot, and by tile.
ORDER = pointer("ORDER", "i32", "[row slots] the row of each slot, -1 of none")
TOKENS = pointer("TOKENS", "i32", "[tiles] how many tokens each tile of keys has")
MADE_ORDER, MADE_TOKENS = "made_order", "made_tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """The tiles of up to three axes.  A slab is what has a tile's length along the first axis."""

    axes: tuple[AxisTile, ...]

    @property
    def _three(self) -> tuple[AxisTile, AxisTile, AxisTile]:
        """The same as three axes, of which the middle ones may have one step."""
        alone = AxisTile(length=1, tile=1)
        first, *rest = self.axes
        return (first, *[alone] * (MOST_AXES - len(self.axes)), *rest)  # pyright: ignore[reportReturnType]

    @property
    def slots(self) -> int:
        """Of a tile."""
        return math.prod(axis.tile for axis in self.axes)

    @property
    def across(self) -> int:
        """Tiles of a slab."""
        return math.prod(-(-axis.length // axis.tile) for axis in self.axes[1:])

    @property
    def slab(self) -> int:
        """Tokens of a slab."""
        return self.axes[0].tile * math.prod(axis.length for axis in self.axes[1:])

    @property
    def slab_slots(self) -> int:
        return self.across * self.slots

    @property
    def places(self) -> int:
        """Tokens that there is a place for."""
        return math.prod(axis.length for axis in self.axes)

    @property
    def tiles(self) -> int:
        """With a token or without."""
        return math.prod(-(-axis.length // axis.tile) for axis in self.axes)

    @property
    def numbers(self) -> str:
        """What pieces are told: lengths of the axes but the first, and steps of a tile."""
        first, *rest = self._three
        lengths = (str(axis.length) for axis in rest)
        return ", ".join((*lengths, *(str(axis.tile) for axis in (first, *rest))))

    def begun(self, keys: int) -> int:
        """How many tiles have one of so many keys: they come before the others."""
        _, second, third = self._three
        lines = -(-third.length // third.tile)
        planes, rest = divmod(keys, second.length * third.length)
        line, rest = divmod(rest, third.length)
        of_slab = line // second.tile * lines
        of_slab += lines if line % second.tile else -(-rest // third.tile)
        slab, some = divmod(planes, self.axes[0].tile)
        return slab * self.across + (self.across if some else of_slab)

    def held(self, keys: int) -> int:
        """Slots that so many keys are given: those of whole slabs."""
        return -(-keys // self.slab) * self.slab_slots

    def __str__(self) -> str:
        return " x ".join(map(str, self.axes))


def tiling_of(graph: Graph) -> Tiling | None:
    """The tiles that a graph's entries are, where they are tiles."""
    found = (node.op for node in graph.nodes() if isinstance(node.op, Cluster))
    tiles = next((op.tiles for op in found if op.tiles is not None), None)
    return Tiling(axes=tiles) if tiles else None


def lacking(graph: Graph) -> str | None:
    """What of tiles no kernel does yet; None where all of it is done, or there are none."""
    tiling = tiling_of(graph)
    if tiling is None:
        return None
    ops = [node.op for node in graph.nodes()]
    all_tiles = [op.tiles for op in ops if isinstance(op, Cluster | PoolRows)]
    lacks = (
        (len(tiling.axes) > MOST_AXES, f"tiles more than {MOST_AXES} axes"),
        (
            any(tiles != tiling.axes for tiles in all_tiles),
            "has tiles beside other entries or rows",
        ),
        (graph.meta.causal, "has tiles of a causal order"),
        (any(isinstance(op, Permute) for op in ops), "cuts blocks of the order of tiles"),
        (any(_in_place(node) for node in graph.nodes()), "has tiles beside entries in place"),
        (
            any(isinstance(op, Pool) and op.how != "mean" for op in ops),
            "pools tiles other than by their mean",
        ),
        (
            any(isinstance(op, PoolRows) and op.how != "mean" for op in ops),
            "pools rows of tiles other than by their mean",
        ),
    )
    return next((words for missing, words in lacks if missing), None)


def _in_place(node: Node) -> bool:
    """Whether an operator has entries that are no tiles: those of these say no size."""
    op = node.op
    if isinstance(op, Attend):
        return op.over not in ("blocks", "pooled") or op.size != 0
    return isinstance(op, Pool | Score | Select | SelectSet) and op.size != 0


def in_slots(graph: Graph) -> tuple[Graph, Mapping[str, str]]:
    """The same graph, for schedules: tiles are blocks of slots.  And which node each left out is done by.

    One node says where tokens are, for all that ask; keys and values that are attended are copied into slots
    by nodes of their own; what several levels pool alike is pooled once.
    """
    tiling = tiling_of(graph)
    assert tiling is not None, "asked of tiles"
    first = next(node.name for node in graph.nodes() if isinstance(node.op, Cluster))
    named: dict[str, str] = {}
    alike: dict[object, str] = {}
    nodes: list[Node] = []
    attended = (x for x in graph.nodes() if isinstance(x.op, Attend) and x.op.over == "blocks")
    copied = {name: _copy(graph[name], first) for x in attended for name in x.inputs[1:3]}
    for node in graph.nodes():
        op, inputs = node.op, tuple(named.get(name, name) for name in node.inputs)
        match op:
            case Cluster():
                if node.name != first:
                    named[node.name] = first
                    continue
            case Pool() | PoolRows():
                same = (replace(op, level=""), node.inputs[0])
                if same in alike:
                    named[node.name] = alike[same]
                    continue
                alike[same] = node.name
                if isinstance(op, Pool):
                    op = replace(op, size=tiling.slots, stride=tiling.slots)
                    copy = copied.get(inputs[0])
                    inputs = (inputs[0], copy.name if copy else first)
                else:
                    op, inputs = replace(op, block=tiling.slots), (*inputs, first)
            case Score() | Select() | SelectSet():
                op = replace(op, size=tiling.slots, stride=tiling.slots)
            case Attend():
                op = replace(op, size=tiling.slots, stride=tiling.slots)
                if op.over == "blocks":
                    inputs = (inputs[0], *(copied[x].name for x in inputs[1:3]), *inputs[3:])
            case _:
                pass
        nodes.append(replace(node, op=op, inputs=inputs))
    return graph.with_nodes((*nodes, *copied.values())), named


def _copy(source: Node, tiles: str) -> Node:
    """The node that copies a tensor of keys into slots."""
    op = Permute(level="", by="clusters", segment=None, last=None)
    return Node(name=f"{source.name}.slots", op=op, inputs=(source.name, tiles), type=source.type)


# --- kernels


def with_slots(context: rows.RowsContext) -> rows.RowsContext:
    """The same loops whose rows are slots of tiles."""
    at = [p.name for p in context.params].index("SEQ")
    params = (*context.params[:at], ORDER, TOKENS, *context.params[at:])
    return replace(context, params=params, slotted=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderContext:
    """Everything `index.py.jinja` reads to tell where the tokens of every tile are."""

    name: str
    header: str = ""
    pieces: str = ""
    tiling: Tiling
    whole: bool = False  # sequences of tiles are told as well
    how: str = "order"

    @property
    def summary(self) -> str:
        return f"the row and the key of every slot, of tiles of {self.tiling}."

    @property
    def padded_slots(self) -> int:
        return next_power(self.tiling.slots)

    @property
    def params(self) -> tuple[Param, ...]:
        return (
            ORDER,
            pointer("KEY_ORDER", "i32", "[key slots] the same of keys"),
            TOKENS,
            pointer("SLOTS", "i32", "[Z, 6] sequences as their slots lie"),
            *((pointer("TILES", "i32", "[Z, 6] and as their tiles do"),) if self.whole else ()),
            *rows.SEQ,
            count("slabs", "of keys, from one sequence to the next; 1 where they lie in one"),
            Param(name="BLOCK_E", kind="constexpr", comment="tiles a program"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyContext:
    """Everything `segments.py.jinja` reads to put the tokens of tiles into their slots, or to pool them.

    `rows`: they are queries, of which each tile gets the mean in float32.
    """

    name: str
    header: str = ""
    pieces: str = ""
    tiling: Tiling
    heads: int
    head_dim: int
    copies: bool = False
    pools: bool = False
    rows: bool = False
    wide: bool = False  # means of keys are in float32 too, rounded all the same
    group: int = 1  # heads of X whose means are added
    how: str = "copy"

    @property
    def summary(self) -> str:
        done = ["copied into their slots"] * self.copies + ["as one mean a tile"] * self.pools
        return f"{'queries' if self.rows else 'tokens'} of tiles, {' and '.join(done)}."

    @property
    def padded_slots(self) -> int:
        return next_power(self.tiling.slots)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def params(self) -> tuple[Param, ...]:
        shape = f"{self.heads}, {self.head_dim}]"
        of_x = f"{self.heads * self.group}, {self.head_dim}]"
        copied = pointer("COPIED", "input", f"[1, slots, {shape}")
        means = f"[blocks, {shape}" if self.rows else f"[1, tiles, {shape}"
        pooled = pointer("POOLED", "f32" if self.rows or self.wide else "input", means)
        return (
            *rows.tensor("X", "x", f"[B, {'T' if self.rows else 'S'}, {of_x}", "bth"),
            *((copied,) if self.copies else ()),
            *((pooled,) if self.pools else ()),
            pointer("ORDER", "i32", "[slots] the token of each slot, -1 of none"),
            *rows.SEQ[:1],
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceContext:
    """Everything `segments.py.jinja` reads to give tokens gradients: those of slots, and of a tile's mean.

    `group`: gradients of a slot and head, which are added: those that each query head gave.
    """

    name: str
    header: str = ""
    pieces: str = ""
    tiling: Tiling
    heads: int
    head_dim: int
    group: int = 1
    slots: bool = False
    means: bool = False
    rows: bool = False
    how: str = "place"

    @property
    def summary(self) -> str:
        found = ["of their slots"] * self.slots + ["of their tile's mean"] * self.means
        return f"gradients of {'queries' if self.rows else 'tokens'}: {' and '.join(found)}."

    @property
    def padded_slots(self) -> int:
        return next_power(self.tiling.slots)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def params(self) -> tuple[Param, ...]:
        slots = pointer("GRADS", "input", f"[slots, {self.heads * self.group}, {self.head_dim}]")
        means = pointer("MEANS", "f32", f"f32[tiles, {self.heads}, {self.head_dim}]")
        return (
            *((slots,) if self.slots else ()),
            *((means,) if self.means else ()),
            *rows.tensor("DX", "dx", f"[B, T, {self.heads}, {self.head_dim}]", "bth"),
            pointer("ORDER", "i32", "[slots] the token of each slot, -1 of none"),
            *rows.SEQ[:1],
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoContext:
    """Everything `merge.py.jinja` reads to go back from an output's gradient to those of branches, in slots.

    `fine`, `coarse`: columns of gates; -1: without gates, or no such branch.
    """

    name: str
    header: str = ""
    pieces: str = ""
    tiling: Tiling
    heads: int
    head_dim: int  # of a value
    branches: int = 0  # under gates of channels; 0: one without
    fine: int = -1
    coarse: int = -1
    again: bool = False  # the branch's output was made again, in slots
    how: str = "undo"

    @property
    def summary(self) -> str:
        return "the output's gradient as branches of tiles have it, in slots, and delta."

    @property
    def padded_slots(self) -> int:
        return next_power(self.tiling.slots)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def params(self) -> tuple[Param, ...]:
        kept = "f32" if self.branches else "input"
        gates = f"[B, T, Hq, {self.branches}, Dv]"
        of = "[1, slots, Hq, Dv]" if self.again else "[B, T, Hq, Dv] of the branch"
        by_tile, by_head = f"f32[tiles, {self.heads}, Dv]", f"f32[{self.heads}, tiles]"
        return (
            *rows.tensor("O", "o", of, "bth", kept),
            *rows.tensor("DO", "do", "[B, T, Hq, Dv]", "bth"),
            *rows.lse(),
            pointer("DLSE", "f32", "f32[B, Hq, T], as LSE"),
            pointer("SLOT_DO", "input", f"[slots, {self.heads}, Dv]"),
            pointer("SLOT_LSE", "f32", f"f32[{self.heads}, slots]"),
            pointer("SLOT_DELTA", "f32", "f32, as SLOT_LSE"),
            count("slots", "from one head to the next"),
            *(rows.tensor("GATES", "g", gates, "bthc") if self.branches else ()),
            *(rows.tensor("DGATES", "dg", gates, "bthc") if self.branches else ()),
            *(
                (
                    pointer("TILE_O", "f32", by_tile),
                    pointer("COARSE_LSE", "f32", "f32[B, Hq, T], as LSE"),
                    pointer("COARSE_DLSE", "f32", "f32[B, Hq, T], as LSE"),
                    pointer("TILE_DO", "f32", by_tile),
                    pointer("TILE_LSE", "f32", by_head),
                    pointer("TILE_DELTA", "f32", by_head),
                    count("tiles", "from one head to the next"),
                )
                if self.coarse >= 0
                else ()
            ),
            ORDER,
            *rows.SEQ[:1],
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoosersContext:
    """Everything `index.py.jinja` reads to list the tiles of rows of which any chose each tile of keys."""

    name: str
    header: str = ""
    pieces: str = ""
    tiling: Tiling
    heads: int  # selection heads
    how: str = "choosers"

    @property
    def summary(self) -> str:
        return "the tiles of rows of which any chose each tile of keys."

    @property
    def words(self) -> int:
        """Of a tile's rows, as bits."""
        return words_of(self.tiling)

    @property
    def params(self) -> tuple[Param, ...]:
        words = f"[tiles of rows, {self.heads}, capacity, {self.words}] rows as bits, by entry"
        return (
            pointer("WORDS", "i32", words),
            pointer("COUNTS", "i32", f"[{self.heads}, tiles] tiles of rows"),
            pointer("LIST", "i32", f"[{self.heads}, tiles, most] these, ascending"),
            CAPACITY,
            count("tiles", "of keys, of all sequences"),
            MOST,
            *rows.SEQ[:1],
            Param(name="BLOCK_N", kind="constexpr", comment="tiles of rows a step"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


CAPACITY = count("capacity", "entries of a tile of rows")
MOST = count("most", "tiles of rows of a list")


def words_of(tiling: Tiling) -> int:
    """Words that have a bit for each row of a tile."""
    return (next_power(tiling.slots) + 31) // 32
