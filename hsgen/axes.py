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
MADE_ORDER, MADE_TOKENS, MADE_SLOTS = "made_order", "made_tokens", "made_slots"
HEAD_FIRST = count("head_first", "the turn's first head")


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
    def strip(self) -> tuple[int, int]:
        """Tiles that lie side by side along the last axis, and tokens of which no fewer begin their like."""
        _, second, third = self._three
        strips = -(-second.length // second.tile)  # of a slab, whose first step has one of each
        tokens = min(second.tile * third.length, self.slab // strips)
        return tokens, -(-third.length // third.tile)

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

    def room(self, tokens: int, sequences: int = 1) -> int:
        """No fewer tiles than have one of so many tokens, of sequences that begin at the first place."""
        of = tokens - sequences
        (strip, line), slab = self.strip, self.slab
        room = (of // slab + sequences) * self.across
        return max(1, min(room, (of // strip + sequences) * line))

    def rooms(self, name: str, tokens: str, sequences: str) -> tuple[tuple[str, str], ...]:
        """The same as sizes: `NAME_tiles`, and what it follows from."""
        of, (strip, line) = f"({tokens} - {sequences})", self.strip
        slabs, strips = f"{name}_slabs", f"{name}_strips"
        return (
            (slabs, f"{of} // {self.slab} + {sequences}"),
            (strips, f"{of} // {strip} + {sequences}"),
            (f"{name}_tiles", f"max(1, min({slabs} * {self.across}, {strips} * {line}))"),
        )

    def held(self, keys: int) -> int:
        """Slots that so many keys of a sequence are given."""
        return self.room(keys) * self.slots

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
                    inputs = (inputs[0], first)
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


def in_turns(context: rows.RowsContext, shape: rows.Shape, *, per_head: bool) -> rows.RowsContext:
    """The same loops over slots for rows that are tokens, of a turn's heads, which keys and lists are of."""
    names = [p.name for p in context.params]
    before, after = names.index("TOKENS"), names.index("num_sequences") + 1
    params = context.params
    return replace(
        context,
        params=(*params[:before], ORDER, *params[before:after], HEAD_FIRST, *params[after:]),
        key_head=rows.kv_head("k_h", shape, per_head=per_head, head="turn_head"),
        value_head=rows.kv_head("v_h", shape, per_head=per_head, head="turn_head"),
        slotted=True,
        by_turns=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomsContext:
    """Everything `index.py.jinja` reads to tell where sequences lie among slots, one behind another."""

    name: str
    header: str = ""
    pieces: str = ""
    tiling: Tiling
    whole: bool = False  # among tiles as well
    how: str = "rooms"

    @property
    def summary(self) -> str:
        return f"where sequences lie among the slots of tiles of {self.tiling}."

    @property
    def params(self) -> tuple[Param, ...]:
        return (
            pointer("SLOTS", "i32", "[Z, 6] sequences as their slots lie"),
            *((pointer("TILES", "i32", "[Z, 6] and as their tiles do"),) if self.whole else ()),
            *rows.SEQ,
            Param(name="BLOCK_N", kind="constexpr", comment="sequences a step"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderContext:
    """Everything `index.py.jinja` reads to tell where the tokens of every tile are."""

    name: str
    header: str = ""
    pieces: str = ""
    tiling: Tiling
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
            *rows.SEQ,
            count("row_tiles", "that there is room for; behind them come tiles of keys"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyContext:
    """Everything `segments.py.jinja` reads to put the tokens of tiles into their slots, or to pool them.

    `copies`: into the slots of a turn of heads.  `pools`: each tile gets a mean.
    `rows`: they are queries, of which that is in float32.
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
        copied = (
            pointer("COPIED", "input", f"[1, slots, heads of a turn, {self.head_dim}]"),
            Param(name="copied_t", kind="stride", comment="COPIED: slot stride"),
        )
        means = f"[blocks, {shape}" if self.rows else f"[1, tiles, {shape}"
        pooled = pointer("POOLED", "f32" if self.rows or self.wide else "input", means)
        return (
            *rows.tensor("X", "x", f"[B, {'T' if self.rows else 'S'}, {of_x}", "bth"),
            *(copied if self.copies else ()),
            *((pooled,) if self.pools else ()),
            pointer("ORDER", "i32", "[slots] the token of each slot, -1 of none"),
            *rows.SEQ,
            *((HEAD_FIRST,) if self.copies else ()),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceContext:
    """Everything `segments.py.jinja` reads to give tokens gradients: those of slots, and of a tile's mean.

    Slots are those of a turn of heads.
    `group`: gradients of a slot and head, which are added: those that each query head gave.
    """

    name: str
    header: str = ""
    pieces: str = ""
    tiling: Tiling
    heads: int
    head_dim: int
    group: int = 1
    means: bool = False
    rows: bool = False
    how: str = "place"

    @property
    def summary(self) -> str:
        found = ["of their slots"] + ["of their tile's mean"] * self.means
        return f"gradients of {'queries' if self.rows else 'tokens'}: {' and '.join(found)}."

    @property
    def padded_slots(self) -> int:
        return next_power(self.tiling.slots)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def params(self) -> tuple[Param, ...]:
        of = f"{self.group} x heads of a turn" if self.group > 1 else "heads of a turn"
        means = pointer("MEANS", "f32", f"f32[tiles, {self.heads}, {self.head_dim}]")
        return (
            pointer("GRADS", "input", f"[slots, {of}, {self.head_dim}]"),
            Param(name="grads_t", kind="stride", comment="GRADS: slot stride"),
            *((means,) if self.means else ()),
            *rows.tensor("DX", "dx", f"[B, T, {self.heads}, {self.head_dim}]", "bth"),
            pointer("ORDER", "i32", "[slots] the token of each slot, -1 of none"),
            *rows.SEQ,
            HEAD_FIRST,
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoContext:
    """Everything `merge.py.jinja` reads to go back from an output's gradient to that of a branch of tiles: of
    a turn's heads in slots, or where its queries are those of tiles, of a tile.
    """

    name: str
    header: str = ""
    pieces: str = ""
    tiling: Tiling
    heads: int
    head_dim: int  # of a value
    branches: int = 0  # under gates of channels; 0: one without
    column: int = 0  # of its gates
    coarse: bool = False  # it has one output a tile
    again: bool = False  # its output was made again, in slots
    how: str = "undo"

    @property
    def summary(self) -> str:
        of = "a tile's branch has it" if self.coarse else "a branch of tiles has it, in slots"
        return f"the output's gradient as {of}, and delta."

    @property
    def padded_slots(self) -> int:
        return next_power(self.tiling.slots)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def params(self) -> tuple[Param, ...]:
        gates = f"[B, T, Hq, {self.branches}, Dv]"
        gated = (
            *rows.tensor("GATES", "g", gates, "bthc"),
            *rows.tensor("DGATES", "dg", gates, "bthc"),
        )
        return (
            *(self._of_tiles if self.coarse else self._in_slots),
            *rows.tensor("DO", "do", "[B, T, Hq, Dv]", "bth"),
            *rows.lse(),
            pointer("DLSE", "f32", "f32[B, Hq, T], as LSE"),
            *(gated if self.branches else ()),
            ORDER,
            *rows.SEQ,
            *(() if self.coarse else (HEAD_FIRST,)),
        )

    @property
    def _of_tiles(self) -> tuple[Param, ...]:
        by_tile, by_head = f"f32[tiles, {self.heads}, Dv]", f"f32[{self.heads}, tiles]"
        return (
            pointer("TILE_O", "f32", by_tile),
            pointer("TILE_DO", "f32", by_tile),
            pointer("TILE_LSE", "f32", by_head),
            pointer("TILE_DELTA", "f32", by_head),
            count("tiles", "from one head to the next"),
        )

    @property
    def _in_slots(self) -> tuple[Param, ...]:
        kept = "f32" if self.branches else "input"
        of = "[1, slots, heads of a turn, Dv]" if self.again else "[B, T, Hq, Dv] of the branch"
        return (
            *rows.tensor("O", "o", of, "bth", kept),
            pointer("SLOT_DO", "input", "[slots, heads of a turn, Dv]"),
            Param(name="slot_t", kind="stride", comment="SLOT_DO: slot stride"),
            pointer("SLOT_LSE", "f32", "f32[heads of a turn, slots]"),
            pointer("SLOT_DELTA", "f32", "f32, as SLOT_LSE"),
            count("slots", "from one head to the next"),
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
        words = f"[tiles of rows, lists, capacity, {self.words}] rows as bits, by entry"
        return (
            pointer("WORDS", "i32", words),
            pointer("COUNTS", "i32", "[lists, tiles] tiles of rows"),
            pointer("LIST", "i32", "[lists, tiles, most] these, ascending"),
            CAPACITY,
            count("tiles", "of keys, of all sequences"),
            MOST,
            *rows.SEQ,
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
