"""Choices by estimates: logits of vectors in few bits, held against an exact sum that a branch makes anyway.

A block of rows keeps a block of keys where one logit of theirs, of vectors kept as whole numbers times a
scale, is above a part of what the row's own window and the first keys give it.  Nothing is sorted and no sum
is made, so a program goes through the keys once and writes a bit for each of their blocks.  Whole numbers of
so few bits are the caller's dtype exactly, and so are sums of their products in float32.  What the pattern
shows a row stays the pattern's, chosen or not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hsgen import rows
from hsgen.graph import (
    Attend,
    Graph,
    Input,
    LogSumExp,
    Map,
    Node,
    Normalise,
    ReduceRows,
    Round,
    Score,
    SelectSet,
    Union,
    left_to_window,
)
from hsgen.kernels import WHOLE, tunables
from hsgen.plan import Param
from hsgen.rows import LOG2_E, SEQ, Chunk, chunks, jit, next_power, number, tensor

LEAST_DOT = 16  # rows and keys of a dot
MOST_ROWS = 128  # of a block, all of which a program has
MOST_KEYS = 64  # of a block, of which a step has two at least


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """From queries and keys in few bits to a choice: the operators that two launches do together."""

    queries: Node
    keys: Node
    score: Node
    lse: Node
    normalised: Node
    mapped: Node
    together: Node
    selection: Node

    @property
    def inside(self) -> tuple[str, ...]:
        """What a choice makes on the way, of keys that are kept in few bits."""
        found = (self.queries, self.score, self.normalised, self.mapped, self.together)
        return tuple(node.name for node in found)

    @property
    def names(self) -> tuple[str, ...]:
        return *self.inside, self.keys.name, self.selection.name

    @property
    def rows(self) -> int:
        """Rows of a block."""
        assert isinstance(self.together.op, ReduceRows)
        return self.together.op.block or 1

    @property
    def levels(self) -> int:
        """The greatest whole number of a vector."""
        assert isinstance(self.keys.op, Round)
        return WHOLE[self.keys.op.dtype]


def way_to(graph: Graph, name: str) -> Way | None:
    """The way that an operator is on; None where it is on none, or on one that no kernel goes."""
    ways = (_way(graph, node) for node in graph.nodes() if isinstance(node.op, SelectSet))
    return next((way for way in ways if way and name in way.names), None)


def _way(graph: Graph, selection: Node) -> Way | None:
    """Back from a choice."""
    together = graph[selection.inputs[0]]
    if len(selection.inputs) != 1 or not isinstance(together.op, ReduceRows):
        return None
    mapped = graph[together.inputs[0]]
    if not isinstance(mapped.op, Map):
        return None
    normalised = graph[mapped.inputs[0]]
    if not isinstance(normalised.op, Normalise) or len(normalised.inputs) != 2:
        return None
    score, lse = graph.operands(normalised)
    if not isinstance(score.op, Score) or len(score.inputs) != 2:
        return None
    queries, keys = graph.operands(score)
    way = Way(
        queries=queries,
        keys=keys,
        score=score,
        lse=lse,
        normalised=normalised,
        mapped=mapped,
        together=together,
        selection=selection,
    )
    return way if _goes(graph, way) else None


def _goes(graph: Graph, way: Way) -> bool:
    """Whether kernels do all of it, and nothing else reads what is on the way."""
    op, mapped, together, score = (
        x.op for x in (way.selection, way.mapped, way.together, way.score)
    )
    assert isinstance(op, SelectSet)
    assert isinstance(mapped, Map)
    assert isinstance(together, ReduceRows)
    assert isinstance(score, Score)
    size = mapped.size
    plain = (
        SelectSet(
            level=op.level,
            size=size,
            stride=size,
            rule="threshold",
            value=op.value,
            first=0,
            last=0,
            counted=op.counted,
        ),
        Normalise(level=score.level),
        Map(
            level=mapped.level,
            how="max",
            size=size,
            stride=size,
            ratio=size,
            taps=tuple((i, 1) for i in range(size)),
        ),
        ReduceRows(level=together.level, how="max", block=together.block, last=None),
        Score(level=score.level, form="dot", scale=score.scale, size=1, stride=1, within=None),
    )
    inner = [graph[name] for name in way.inside]
    alone = all(user.name in way.names for node in inner for user in graph.users(node.name))
    return (
        graph.meta.causal
        and (op, way.normalised.op, mapped, together, score) == plain
        and op.value > 0
        and way.selection.type.dims[2] == "Hq"
        and 2 <= size <= MOST_KEYS
        and 1 <= (together.block or 0) <= MOST_ROWS
        and _whole(graph, way)
        and alone
        and _sum_of_pattern(graph, way.lse)
        and all(_reads_bits(graph, user) for user in graph.users(way.selection.name))
    )


def _reads_bits(graph: Graph, user: Node) -> bool:
    """Whether blocks of rows attend what they chose, and no window beside it has a part of that."""
    op = user.op
    return isinstance(op, Attend) and op.over == "blocks" and not left_to_window(graph, user)


def _whole(graph: Graph, way: Way) -> bool:
    """Whether the caller's queries and keys are kept as whole numbers times a scale, of as many bits."""
    queries, keys = way.queries.op, way.keys.op
    if not isinstance(queries, Round) or queries != keys or queries.dtype not in WHOLE:
        return False
    made = (graph[way.queries.inputs[0]], graph[way.keys.inputs[0]])
    given = all(isinstance(x.op, Input) for x in made) and made[0].name == "q"
    return given and len(way.keys.type.dims) == 4 and len(graph.users(way.keys.name)) == 1


def _sum_of_pattern(graph: Graph, lse: Node) -> bool:
    """Whether a sum is what a window of units and the first ones give each row."""
    if not isinstance(lse.op, LogSumExp):
        return False
    branch = graph[lse.inputs[0]]
    return isinstance(branch.op, Attend) and shown_by(branch.op) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a pattern shows each row: so many units of `size` tokens up to its own, and `sink` first ones."""

    size: int
    window: int
    sink: int

    @property
    def left(self) -> int:
        """From where a row's own unit begins back to its window's first token."""
        return (self.window - 1) * self.size

    def entries(self, size: int) -> int:
        """First entries of `size` tokens, which are the pattern's."""
        return self.sink * self.size // size

    def before(self, position: str) -> str:
        """The end of the tokens before the window of a row at that position."""
        return f"{position} // {self.size} * {self.size} - {self.left}"


def shown_by(op: Attend) -> Shown | None:
    """The window and the first units of a static pattern, where that is all it shows, to all heads alike."""
    pattern = op.pattern
    if op.over != "static" or pattern is None or pattern.axes or pattern.by_way or pattern.by_head:
        return None
    if pattern.stride or pattern.power_of_two or pattern.dilation != 1 or len(pattern.spans) != 1:
        return None
    ((window, growth, sink),) = pattern.spans
    if growth or window < 1 or op.size != op.stride:
        return None
    return Shown(size=op.size, window=window, sink=sink)


def shown_beside(graph: Graph, branch: Node) -> Shown | None:
    """What a pattern has of a branch over blocks that were chosen by its sum, under one softmax with it."""
    if not isinstance(branch.op, Attend) or branch.op.over != "blocks" or len(branch.inputs) < 4:
        return None
    way = way_to(graph, branch.inputs[3])
    if way is None:
        return None
    own = graph[way.lse.inputs[0]]
    assert isinstance(own.op, Attend)
    shown = shown_by(own.op)
    unions = [x for x in graph.users(own.name) if isinstance(x.op, Union)]
    beside = any(branch.name in union.inputs for union in unions)
    alike = own.inputs[1:3] == branch.inputs[1:3]
    size = branch.op.size
    fits = shown is not None and branch.op.stride == size and shown.sink * shown.size % size == 0
    return shown if beside and alike and fits else None


def beside(graph: Graph, one: Node, other: Node) -> bool:
    """Whether one of two branches leaves the other, a pattern, what that shows."""
    for branch, own in ((one, other), (other, one)):
        if shown_beside(graph, branch) is not None:
            way = way_to(graph, branch.inputs[3])
            if way is not None and way.lse.inputs == (own.name,):
                return True
    return False


def sums_of_estimates(graph: Graph, branch: Node) -> bool:
    """Whether all that reads a branch's log-sum-exp are choices by estimates."""
    sums = [x for x in graph.users(branch.name) if isinstance(x.op, LogSumExp)]
    return all(
        (way := way_to(graph, user.name)) is not None and way.lse.name == x.name
        for x in sums
        for user in graph.users(x.name)
    )


# --- kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateContext:
    """Everything `_maps_estimate.jinja` reads: each block of rows marks the blocks of keys that it keeps."""

    name: str
    header: str = ""
    pieces: str = ""
    heads: int  # query heads
    group: int
    head_dim: int
    rows: int  # of a block
    size: int  # tokens of a block of keys
    levels: int  # the greatest whole number of a vector
    threshold: float
    scale: float
    precision: str
    how: str = "estimate"

    @property
    def summary(self) -> str:
        return "which blocks of keys each block of rows keeps: of one logit above a part of a sum."

    @property
    def padded_rows(self) -> int:
        """`rows` as a tile of a dot."""
        return max(LEAST_DOT, next_power(self.rows))

    @property
    def padded_size(self) -> int:
        """Keys of a tile that a block has."""
        return next_power(self.size)

    @property
    def least(self) -> int:
        """Keys of a step: those of a dot, and of two blocks."""
        return max(LEAST_DOT, 2 * self.padded_size)

    @property
    def scale_log2(self) -> str:
        return number(self.scale * LOG2_E)

    @property
    def edge(self) -> str:
        """The threshold as the logarithm that logits are held against."""
        return number(math.log2(self.threshold))

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def params(self) -> tuple[Param, ...]:
        return (
            *rows.QUERY,
            *tensor("K", "k", "[B, S, Hkv, Dqk] whole numbers", "bth"),
            *tensor("K_SCALE", "ks", "f32[B, S, Hkv] that keys are times", "bth", "f32"),
            *rows.lse(comment="f32[B, Hq, T] of what is attended anyway"),
            rows.bits_of(self.heads),
            rows.BIT_WORDS,
            *SEQ,
            *tunables("BLOCK_N"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)
