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
# What a call of tiles has for every kernel: by slot, and by tile.
ORDER = pointer("ORDER", "i32", "[row slots] the row of each slot, -1 of none")
TOKENS = pointer("TOKENS", "i32", "[tiles] how many tokens each tile of keys has")
ARGUMENTS = ("made_order", "made_tokens")


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
        copied = pointer("COPIED", "input", f"[1, key slots, {shape}")
        means = f"[blocks, {shape}" if self.rows else f"[1, tiles, {shape}"
        pooled = pointer("POOLED", "f32" if self.rows else "input", means)
        return (
            *rows.tensor("X", "x", f"[B, {'T' if self.rows else 'S'}, {shape}", "bth"),
            *((copied,) if self.copies else ()),
            *((pooled,) if self.pools else ()),
            pointer("ORDER", "i32", "[slots] the token of each slot, -1 of none"),
            *rows.SEQ[:1],
        )

    @property
    def jit(self) -> str:
        return jit(self.params)
