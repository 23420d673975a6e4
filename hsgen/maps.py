"""What fills the `maps` skeleton: what blocks of rows give blocks of entries, put together of smaller ones.

Small blocks of rows, each with one query, score small entries: tiles of products, of which nothing is kept
but a number for each block of entries, the logarithm of their sum or their greatest.  These say what a
row's scores are normalised by too, so no product is made twice.  Rows and entries that are pooled by laying
their tokens side by side, or by their first one, are read where they are: nothing is pooled beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hsgen.graph import (
    Graph,
    Input,
    LogSumExp,
    Map,
    Node,
    Normalise,
    Pool,
    PoolRows,
    ReduceRows,
    Score,
)
from hsgen.kernels import tunables
from hsgen.plan import Param
from hsgen.rows import LOG2_E, SEQ, count, jit, number, pointer, tensor

TILE_FIRST = count("tile_first", "the turn's first tile")
CAPACITY = count("capacity", "row length of the scratch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """From queries and keys to scores of blocks: the operators that two launches do together."""

    queries: Node
    keys: Node
    score: Node
    lse: Node | None
    normalised: Node
    mapped: Node
    together: Node

    @property
    def tiles(self) -> tuple[str, ...]:
        """What tiles of products do, but for what rows are normalised by."""
        lse = (self.lse.name,) if self.lse else ()
        first = (self.queries.name, self.keys.name, self.score.name)
        return *first, *lse, self.normalised.name, self.mapped.name

    @property
    def names(self) -> tuple[str, ...]:
        return *self.tiles, self.together.name


def way_to(graph: Graph, name: str) -> Way | None:
    """The way that an operator is on; None where it is on no such way, or one that no kernel goes."""
    ways = (_way(graph, node) for node in graph.nodes() if isinstance(node.op, ReduceRows))
    return next((way for way in ways if way and name in way.names), None)


def _way(graph: Graph, together: Node) -> Way | None:
    """Back from scores of blocks."""
    mapped = graph[together.inputs[0]]
    if not isinstance(mapped.op, Map):
        return None
    normalised = graph[mapped.inputs[0]]
    if not isinstance(normalised.op, Normalise):
        return None
    score = graph[normalised.inputs[0]]
    if not isinstance(score.op, Score) or len(score.inputs) != 2:
        return None
    queries, keys = (graph[name] for name in score.inputs)
    lse = graph[normalised.inputs[1]] if len(normalised.inputs) > 1 else None
    way = Way(
        queries=queries,
        keys=keys,
        score=score,
        lse=lse,
        normalised=normalised,
        mapped=mapped,
        together=together,
    )
    return way if _goes(graph, way) else None


def _goes(graph: Graph, way: Way) -> bool:
    """Whether kernels do all of it, and nothing else reads what is on the way."""
    queries, keys, score = way.queries.op, way.keys.op, way.score.op
    mapped, together = way.mapped.op, way.together.op
    if not (
        isinstance(queries, PoolRows)
        and isinstance(keys, Pool)
        and isinstance(score, Score)
        and isinstance(mapped, Map)
        and isinstance(together, ReduceRows)
    ):
        return False
    inner = [graph[name] for name in way.names[:-1]]
    if any(user.name not in way.names for node in inner for user in graph.users(node.name)):
        return False
    side_by_side = queries.how == keys.how == "antidiagonal" and queries.block == keys.size
    first = queries.how == keys.how == "first"
    given = way.queries.inputs == ("q",) and isinstance(graph[way.keys.inputs[0]].op, Input)
    plain = (
        PoolRows(level=queries.level, how=queries.how, block=queries.block, last=None),
        Pool(level=keys.level, how=keys.how, size=keys.size, stride=keys.size, position=False),
        Score(
            level=score.level,
            form="dot",
            scale=score.scale,
            size=keys.size,
            stride=keys.size,
            within=None,
        ),
        Map(
            level=mapped.level,
            how=mapped.how,
            size=mapped.stride,
            stride=mapped.ratio * keys.size,
            ratio=mapped.ratio,
            taps=tuple((i, 1) for i in range(mapped.ratio)),
        ),
        ReduceRows(level=together.level, how=together.how, block=together.block, last=None),
    )
    return (
        given
        and (side_by_side or first)
        and (queries, keys, score, mapped, together) == plain
        and together.how == mapped.how
        and _normalises(way, mapped)
        and _parts(together.block, queries.block)
        and _parts(mapped.stride, keys.size)
    )


def _normalises(way: Way, mapped: Map) -> bool:
    """By a sum of the row's own, entries summed; or by its greatest, of entries the greatest."""
    assert isinstance(way.normalised.op, Normalise)
    if way.normalised.op.by == "max":
        return mapped.how == "max"
    lse = way.lse
    own = lse is not None and isinstance(lse.op, LogSumExp) and lse.inputs == (way.score.name,)
    return own and mapped.how == "sum"


def _parts(block: int | None, part: int | None) -> bool:
    """Whether a block has a power of two of parts."""
    if not block or not part or block % part:
        return False
    return (block // part) & (block // part - 1) == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MapsContext:
    """Everything `maps.py.jinja` reads.

    `part` rows and `entry` tokens have one number, `rows` rows and `size` tokens are blocks.  `slots` dots
    of `dim` channels make it: of tokens side by side, the first one of the rows with the last one of the
    entry, or of first tokens alone.
    """

    name: str
    how: Literal["tiles", "sums"]
    header: str = ""
    pieces: str = ""
    heads: int  # query heads
    group: int
    dim: int
    slots: int
    part: int
    entry: int
    rows: int
    size: int
    causal: bool
    greatest: bool  # of entries and rows, by a row's greatest; else sums of both, by a row's sum
    scale: float
    precision: str

    @property
    def summary(self) -> str:
        if self.how == "tiles":
            kept = "the greatest score" if self.greatest else "the logarithm of the sum"
            return f"{kept} of every {self.per_entry} entries, of every {self.part} rows."
        if self.greatest:
            return "the greatest of each block, relative to that of each row."
        return "the mass of each block, every row's of 1."

    @property
    def per_row(self) -> int:
        """Small blocks of rows of one."""
        return self.rows // self.part

    @property
    def per_entry(self) -> int:
        return self.size // self.entry

    @property
    def scale_log2(self) -> str:
        return number(self.scale / self.slots * LOG2_E)

    @property
    def most_channels(self) -> int:
        """That a dot may take at a time: a power of two that divides all."""
        return min(128, self.dim & -self.dim)

    @property
    def params(self) -> tuple[Param, ...]:
        shape = f"f32[chunk rows, {self.heads}, {self.per_row}, capacity]"
        parts = pointer("PARTS", "f32", f"{shape} of blocks of entries, in base 2")
        if self.how == "tiles":
            return (
                *tensor("Q", "q", "[B, T, Hq, Dqk]", "bth"),
                *tensor("K", "k", "[B, S, Hkv, Dqk]", "bth"),
                parts,
                CAPACITY,
                *SEQ,
                TILE_FIRST,
                *tunables("BLOCK_T", "BLOCK_N", "BLOCK_D"),
            )
        return (
            parts,
            pointer("SCORES", "f32", f"f32[chunk rows, {self.heads}, capacity]"),
            CAPACITY,
            *SEQ,
            TILE_FIRST,
            *tunables("BLOCK_T", "BLOCK_N"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)
