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
    Attend,
    Graph,
    Input,
    LogSumExp,
    Map,
    Node,
    Normalise,
    Pool,
    PoolHeads,
    PoolRows,
    ReduceRows,
    Score,
    SelectSet,
)
from hsgen.kernels import tunables
from hsgen.plan import Param
from hsgen.rows import LOG2_E, SEQ, Chunk, chunks, count, jit, number, pointer, tensor

LEAST_DOT = 16  # rows of a dot
TILE_FIRST = count("tile_first", "the turn's first tile")
CAPACITY = count("capacity", "row length of the scratch")
MOST_OF_TILE = 64  # last rows
PART = 4096  # keys of a part of a softmax: of no call's size, so that sums do not depend on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """From queries and keys to scores of blocks: the operators that two launches do together."""

    asking: Node | None = None  # the mean of heads that agree
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
        asking = (self.asking.name,) if self.asking else ()
        made = [x.name for x in (self.queries, self.keys) if not isinstance(x.op, Input)]
        return *asking, *made, self.score.name, *lse, self.normalised.name, self.mapped.name

    @property
    def last(self) -> int:
        """Rows at the end of a sequence that choose for all; 0: blocks of rows choose."""
        return (isinstance(self.together.op, ReduceRows) and self.together.op.last) or 0

    @property
    def of_tokens(self) -> bool:
        """Whether each row of a block scores tokens."""
        return isinstance(self.queries.op, Input) and not self.last

    @property
    def names(self) -> tuple[str, ...]:
        return *self.tiles, self.together.name


def way_to(graph: Graph, name: str) -> Way | None:
    """The way that an operator is on; None where it is on no such way, or one that no kernel goes."""
    ways = (_way(graph, node) for node in graph.nodes() if isinstance(node.op, ReduceRows))
    return next((way for way in ways if way and name in way.names), None)


def _way(graph: Graph, together: Node) -> Way | None:
    """Back from scores of blocks."""
    if isinstance(together.op, ReduceRows) and together.op.last is not None:
        return _way_of_last(graph, together)
    if isinstance(graph[together.inputs[0]].op, Normalise):
        return _way_of_tokens(graph, together)
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
    agree = graph[queries.inputs[0]] if queries.inputs else None
    way = Way(
        asking=agree if agree and isinstance(agree.op, PoolHeads) else None,
        queries=queries,
        keys=keys,
        score=score,
        lse=lse,
        normalised=normalised,
        mapped=mapped,
        together=together,
    )
    return way if _goes(graph, way) else None


def _way_of_last(graph: Graph, together: Node) -> Way | None:
    """The same of tokens that a prompt's last rows score: the mean of their masses, then sums over blocks."""
    normalised, users = graph[together.inputs[0]], graph.users(together.name)
    score = graph[normalised.inputs[0]] if normalised.inputs else None
    if (
        len(users) != 1
        or score is None
        or not isinstance(score.op, Score)
        or len(score.inputs) != 2
    ):
        return None
    queries, keys = (graph[name] for name in score.inputs)
    lse = graph[normalised.inputs[1]] if len(normalised.inputs) > 1 else None
    mapped, op = users[0], together.op
    assert isinstance(op, ReduceRows)
    if not isinstance(mapped.op, Map):
        return None
    way = Way(
        queries=queries,
        keys=keys,
        score=score,
        lse=lse,
        normalised=normalised,
        mapped=mapped,
        together=together,
    )
    size = mapped.op.size
    plain = (
        Score(
            level=score.op.level, form="dot", scale=score.op.scale, size=1, stride=1, within=None
        ),
        Normalise(level=score.op.level),
        Map(
            level=mapped.op.level,
            how="sum",
            size=size,
            stride=size,
            ratio=size,
            taps=tuple((i, 1) for i in range(size)),
        ),
        ReduceRows(level=op.level, how="mean", block=None, last=op.last),
    )
    found = (score.op, normalised.op, mapped.op, op)
    given = isinstance(queries.op, Input) and isinstance(keys.op, Input)
    own = lse is not None and isinstance(lse.op, LogSumExp) and lse.inputs == (score.name,)
    goes = given and own and found == plain and _is_power(size) and _is_power(op.last or 0)
    return way if goes and _alone(graph, way, mapped) else None


def _way_of_tokens(graph: Graph, together: Node) -> Way | None:
    """The same of tokens that all rows of a block score: the mean of their masses, then sums over blocks,
    of which each block of rows keeps a part alone; its rows are as many for every block of keys.
    """
    normalised, users = graph[together.inputs[0]], graph.users(together.name)
    score, op = graph[normalised.inputs[0]], together.op
    if len(users) != 1 or not isinstance(score.op, Score) or len(score.inputs) != 2:
        return None
    queries, keys = (graph[name] for name in score.inputs)
    mapped, lse = users[0], graph[normalised.inputs[1]] if len(normalised.inputs) > 1 else None
    if not isinstance(mapped.op, Map) or lse is None or not isinstance(lse.op, LogSumExp):
        return None
    assert isinstance(op, ReduceRows)
    summed = graph[lse.inputs[0]]  # a branch's over every token is the same number as the scores'
    over = isinstance(summed.op, Attend) and summed.op.over == "all"
    own = summed.name == score.name
    way = Way(
        queries=queries,
        keys=keys,
        score=score,
        lse=lse if own else None,
        normalised=normalised,
        mapped=mapped,
        together=together,
    )
    size = mapped.op.size
    plain = (
        Score(
            level=score.op.level, form="dot", scale=score.op.scale, size=1, stride=1, within=None
        ),
        Normalise(level=score.op.level),
        Map(
            level=mapped.op.level,
            how="sum",
            size=size,
            stride=size,
            ratio=size,
            taps=tuple((i, 1) for i in range(size)),
        ),
        ReduceRows(level=op.level, how=op.how, block=op.block, last=None),
    )
    of_all = over and summed.inputs[:2] == score.inputs
    given = queries.name == "q" and isinstance(keys.op, Input) and len(keys.type.dims) == 4
    rules = [user.op for user in graph.users(mapped.name)]
    parts = all(isinstance(rule, SelectSet) and rule.rule == "fraction" for rule in rules)
    goes = given and parts and (own or of_all) and op.how in ("mean", "sum")
    goes = goes and (score.op, normalised.op, mapped.op, op) == plain
    goes = goes and _is_power(size) and _parts(op.block, 1)
    return way if goes and _alone(graph, way, mapped) else None


def _alone(graph: Graph, way: Way, end: Node) -> bool:
    """Whether nothing else reads what is on the way to its end."""
    inner = [graph[name] for name in way.names if name != end.name]
    return all(user.name in way.names for node in inner for user in graph.users(node.name))


def _is_power(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


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
    if not _alone(graph, way, way.together):
        return False
    side_by_side = queries.how == keys.how == "antidiagonal" and queries.block == keys.size
    first = queries.how == keys.how == "first"
    asking = way.asking or way.queries
    given = asking.inputs == ("q",) and isinstance(graph[way.keys.inputs[0]].op, Input)
    if way.asking and (way.asking.op != PoolHeads(level=queries.level, share="group") or not first):
        return False
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
    """By a sum of the row's own, entries summed, or of first tokens the greatest; or by its greatest, of
    entries the greatest.
    """
    assert isinstance(way.normalised.op, Normalise)
    if way.normalised.op.by == "max":
        return mapped.how == "max"
    lse, queries = way.lse, way.queries.op
    own = lse is not None and isinstance(lse.op, LogSumExp) and lse.inputs == (way.score.name,)
    first = isinstance(queries, PoolRows) and queries.how == "first"
    return own and (mapped.how == "sum" or (first and mapped.how == "max"))


def _parts(block: int | None, part: int | None) -> bool:
    """Whether a block has a power of two of parts."""
    if not block or not part or block % part:
        return False
    return _is_power(block // part)


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
    by_sum: bool = False  # the greatest of both, by a row's sum
    asking: int = 1  # query heads of which the mean asks, for one of `heads`
    last: int = 0  # > 0: so many rows at the end of a sequence, whose mean is one for all
    scale: float
    precision: str

    @property
    def summary(self) -> str:
        if self.how == "tiles" and self.by_sum:
            return f"the greatest score and the logarithm of the sum of every {self.per_entry} entries."
        if self.how == "sums" and self.by_sum:
            return "the greatest mass of each block, every row's of 1."
        if self.how == "sums" and self.last:
            return f"the mean mass of each block, of the last {self.last} rows."
        if self.how == "tiles":
            kept = "the greatest score" if self.greatest else "the logarithm of the sum"
            return f"{kept} of every {self.per_entry} entries, of every {self.part} rows."
        if self.greatest:
            return "the greatest of each block, relative to that of each row."
        return "the mass of each block, every row's of 1."

    @property
    def per_row(self) -> int:
        """Small blocks of rows of one; of last rows as many as a dot has at least."""
        return max(LEAST_DOT, self.last) if self.last else self.rows // self.part

    @property
    def per_entry(self) -> int:
        return self.size // self.entry

    @property
    def scale_log2(self) -> str:
        return number(self.scale / (self.slots * self.asking) * LOG2_E)

    @property
    def dots(self) -> str:
        """What a score is."""
        if self.last:
            return "a dot of tokens"
        if self.slots > 1:
            return "a dot of tokens side by side, rows from their last one on"
        return "a dot of first tokens" + ", those of the mean of heads" * (self.asking > 1)

    @property
    def most_channels(self) -> int:
        """That a dot may take at a time: a power of two that divides all."""
        return min(128, self.dim & -self.dim)

    @property
    def params(self) -> tuple[Param, ...]:
        planes = ", 2" * self.by_sum
        shape = f"f32[chunk rows, {self.heads}, {self.per_row}{planes}, capacity]"
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


@dataclass(frozen=True, slots=True, kw_only=True)
class LastContext:
    """Everything `_maps_last.jinja` reads: what the last rows of a sequence give each token of it.

    `totals`: what their softmaxes sum up to, of a part of the keys; `columns`: the mass that a key gets of
    them all; `diagonals`: the mass of the keys that lie as far before each of them.
    """

    name: str
    how: Literal["totals", "columns", "diagonals"]
    header: str = ""
    pieces: str = ""
    heads: int  # of queries
    group: int
    head_dim: int
    last: int
    slanted: bool  # entries are diagonals, as many as there are keys
    mean: bool  # of the rows, in place of their sum
    scale: float
    precision: str

    @property
    def summary(self) -> str:
        match self.how:
            case "totals":
                return (
                    f"what softmaxes of the last {self.last} rows sum up to, of a part of the keys."
                )
            case "columns":
                return f"the mass that each key gets of the last {self.last} rows."
            case "diagonals":
                return f"the mass that each diagonal gets of the last {self.last} rows."

    @property
    def per_row(self) -> int:
        """Rows: as many as a dot has at least."""
        return max(LEAST_DOT, self.last)

    @property
    def per_tile(self) -> int:
        """Of them those of a tile."""
        return min(self.per_row, MOST_OF_TILE)

    @property
    def tiles(self) -> int:
        """How many tiles rows have: a program each, where they are summed up, or one after the other."""
        return self.per_row // self.per_tile

    @property
    def least(self) -> int:
        """Keys of a step: of diagonals, whose keys begin one further on from row to row, as many as rows."""
        return self.per_tile if self.how == "diagonals" else LEAST_DOT

    @property
    def part(self) -> int:
        """Keys of a part of a softmax: more where rows are more, so that what parts hold is not."""
        return PART * self.tiles

    @property
    def scale_log2(self) -> str:
        return number(self.scale * LOG2_E)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def params(self) -> tuple[Param, ...]:
        of = "keys" if self.how == "columns" else "diagonals"
        totals = pointer("TOTALS", "f32", f"f32[Z, {self.heads}, parts, 2, {self.per_row}]")
        made = (
            pointer("WEIGHTS", "f32", f"f32[Z, {self.heads}, capacity] of {of}"),
            count("capacity", f"{of} of the longest sequence"),
        )
        return (
            *tensor("Q", "q", "[B, T, Hq, Dqk]", "bth"),
            *tensor("K", "k", "[B, S, Hkv, Dqk]", "bth"),
            totals,
            count("parts", f"of {self.part} keys"),
            *(() if self.how == "totals" else made),
            *SEQ,
            *tunables("BLOCK_N"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)
