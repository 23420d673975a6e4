"""What fills the `trees` skeleton: tokens by leaf of a learned tree, and rows that find their best by it.

Centroids at unit length are entries and judges alike.  Keys go down level by level; then it is counted how
many tokens each leaf has before each chunk of them, and where its first one is.  Rows go down by scores of
all nodes of a level, as trees are small beside texts.  At the bottom neighbouring rows look together: they
choose nearly the same leaves, and a tile of them walks the tokens that any row's leaves have, in order, each
with a bit a row.  Where no row has more tokens than it keeps, as the counts say, it keeps them unscored.
Otherwise the tokens meet the rows in a dot, and each row has room for some more than it keeps; when it is
full the best stay, and of those that come later only what is better enters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hsgen.graph import Assign, Graph, Input, Node, Pool, Reduce, Score, Select
from hsgen.kernels import tunables
from hsgen.plan import Param
from hsgen.rows import (
    QUERY,
    SEQ,
    Chunk,
    chunks,
    count,
    jit,
    next_power,
    number,
    pointer,
    tensor,
)

CHUNK = 128  # tokens whose leaves are counted together
MOST_NODES = 4096  # of a level, whose scores are a row's in registers

MOST_ROOM = 8192  # tokens of a row that keeps the best of them, whose keys are in registers
WORD = 32  # rows of a tile, each a bit
SLICE = 32  # columns that rows and all nodes of a level meet in at a time
MOST_STEP = 128  # tokens of a step

How = Literal["unit", "assign", "tally", "before", "descend", "keep", "sift"]
SUMMARIES: dict[How, str] = {
    "unit": "centroids at unit length.",
    "assign": "the node of every token: of its own node's children the nearest by cosine.",
    "tally": "how many tokens of a chunk are in each leaf.",
    "before": "how many are before each chunk.",
    "descend": "the best nodes of each row, of those that have a token it sees.",
    "keep": "the tokens in each row's leaves, of tiles of rows that keep all of them.",
    "sift": "the best tokens in each row's leaves, of all other tiles of rows.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TreesContext:
    """Everything `trees.py.jinja` reads.

    `nodes` are those of the level, `leaves` those of the last one; `beam` is the width of the parents' list,
    0 where there are none.
    """

    name: str
    how: How
    header: str = ""
    pieces: str = ""
    heads: int  # of keys
    group: int  # query heads of a key head
    head_dim: int
    nodes: int
    branching: int
    leaves: int
    scale: float = 1.0
    k: int = 0
    width: int = 0  # slots of a row of the selection
    first: int = 0  # tokens that a row takes where they are in its leaves
    last: int = 0
    counted: bool = True
    beam: int = 0
    causal: bool = True
    above: bool = False  # nodes have parents
    precision: str = "tf32x3"
    cuts: int = 3  # numbers of the keys' type that make one of 32 bits; 0: it may be beyond them

    @property
    def summary(self) -> str:
        return SUMMARIES[self.how]

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    def slice(self, chunk: Chunk) -> int:
        """Columns in which rows and all nodes of a level meet at a time."""
        return min(SLICE, chunk.width)

    @property
    def chunk(self) -> int:
        """Tokens that are counted together."""
        return CHUNK

    @property
    def padded_nodes(self) -> int:
        """`nodes` as a tile of a dot."""
        return max(16, next_power(self.nodes))

    @property
    def padded_leaves(self) -> int:
        """`leaves` as a tile."""
        return max(16, next_power(self.leaves))

    @property
    def padded_width(self) -> int:
        """`width` as a tile."""
        return next_power(self.width)

    @property
    def forces(self) -> bool:
        return bool(self.first or self.last)

    @property
    def wanted(self) -> str:
        """How many tokens a row keeps."""
        return str(self.k) if self.counted else f"{self.k} + forced"

    @property
    def by_head(self) -> bool:
        """Whether keys meet each head's query: no more of them than a sum of them is cut into."""
        return not self.cuts or self.group <= self.cuts

    @property
    def parts(self) -> range:
        """Of the queries of a token, which meet keys one after the other."""
        return range(self.group if self.by_head else self.cuts)

    @property
    def room(self) -> int:
        """Tokens that a row has room for, of which it keeps the best."""
        return room_of(self.width)

    @property
    def some_leaves(self) -> int:
        """Leaves whose words are made together."""
        return min(self.padded_leaves, 64)

    @property
    def best_rows(self) -> int:
        """Rows whose best are kept together, as a start."""
        return max(1, min(16, 2048 // self.room))

    @property
    def ratio(self) -> int:
        """Leaves of a node."""
        return self.leaves // self.nodes

    @property
    def scaled(self) -> str:
        """A score of all heads of a group."""
        return "s" if self.scale == 1.0 else f"s * {number(self.scale)}"

    @property
    def params(self) -> tuple[Param, ...]:
        heads, dim = self.heads, self.head_dim
        unit = pointer("UNIT", "f32", f"f32[{heads}, {self.nodes}, {dim}] centroids at unit length")
        keys = tensor("K", "k", "[B, S, Hkv, Dqk]", "bth")
        key_rows = count("key_rows", "of all sequences")
        nodes = pointer("NODES", "i32", f"[{heads}, key rows] the node of each token")
        counts = pointer(
            "COUNTS", "i32", f"[Z, {heads}, chunks + 1, {self.padded_leaves}] tokens of leaves"
        )
        first = pointer(
            "FIRST",
            "i32",
            f"[Z, {heads}, {self.padded_leaves}] the first of each, from 2^31 - 1 down",
        )
        chunked = count("chunks", f"of {CHUNK} tokens, of the longest sequence")
        length = count("length", "rows of keys from one sequence to the next; packed: 0")
        parents = pointer("PARENT", "i32", f"[rows, {heads}, {self.beam}] surviving parents")
        chosen = pointer("SELECTION", "i32", f"[rows, {heads}, {self.width}]")
        match self.how:
            case "unit":
                centroids = (
                    pointer("CENTROIDS", "input", f"[{heads}, {self.nodes}, {dim}]"),
                    Param(name="c_h", kind="stride", comment="CENTROIDS: head stride"),
                    Param(name="c_n", kind="stride", comment="CENTROIDS: node stride"),
                )
                return (*centroids, unit, *tunables("BLOCK_E"))
            case "assign":
                above = pointer("ABOVE", "i32", f"[{heads}, key rows] the parent of each")
                more = (above,) if self.above else ()
                return (
                    *keys,
                    unit,
                    *more,
                    nodes,
                    key_rows,
                    length,
                    *SEQ[:1],
                    *tunables("BLOCK_N", "BLOCK_E"),
                )
            case "tally":
                return (nodes, counts, first, key_rows, chunked, length, *SEQ[:1])
            case "before":
                return (counts, chunked, *SEQ[:1])
            case "descend":
                more = (parents,) if self.beam else ()
                return (*QUERY, unit, *more, first, chosen, *SEQ, *tunables("BLOCK_T"))
            case "keep" | "sift":
                vectors, rows = ((*QUERY, *keys), ("BLOCK_R",)) if self.how == "sift" else ((), ())
                return (
                    *vectors,
                    parents,
                    nodes,
                    counts,
                    key_rows,
                    length,
                    chunked,
                    pointer("SCRATCH", "i32", "[programs, room]"),
                    count("room", "of a program's words"),
                    chosen,
                    count("tiles", "of rows of all sequences"),
                    *SEQ,
                    *tunables("BLOCK_T", "BLOCK_N", "BLOCK_K", *rows),
                )

    @property
    def jit(self) -> str:
        return jit(self.params)


def room_of(width: int) -> int:
    """Tokens that a row has room for: as many as it keeps, and those of the widest step."""
    return next_power(width + MOST_STEP)


# --- which trees kernels go down


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One level of a tree: the nodes of a graph that make, fill and choose its nodes."""

    keys: Node
    assign: Node
    score: Node
    reduce: Node
    select: Node


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A learned tree, and the choice of tokens below it."""

    stages: tuple[Stage, ...]
    score: Node
    reduce: Node
    select: Node

    @property
    def names(self) -> frozenset[str]:
        """Of all nodes of the graph that it is."""
        own = (self.score, self.reduce, self.select)
        found = {x.name for x in own}
        for stage in self.stages:
            of = (stage.keys, stage.assign, stage.score, stage.reduce, stage.select)
            found |= {x.name for x in of}
        return frozenset(found)


def tree_of(graph: Graph, node: Node) -> Tree | None:
    """The tree that a node is part of, if kernels go down it.

    Every level is scored by dots with its centroids, all heads of a group together, and keeps a few nodes;
    below the last one tokens are scored so too.
    """
    for last in graph.nodes():
        if isinstance(last.op, Assign) and not any(
            isinstance(user.op, Assign) for user in graph.users(last.name)
        ):
            tree = _ending(graph, last)
            if tree is not None and node.name in tree.names:
                return tree
    return None


def _ending(graph: Graph, last: Node) -> Tree | None:
    """The tree whose leaves a node of the graph assigns."""
    assigns = [last]
    while len(assigns[0].inputs) > 2:
        assigns.insert(0, graph[assigns[0].inputs[2]])
    stages: list[Stage] = []
    parent: str | None = None
    for assign in assigns:
        stage = _stage(graph, assign, parent)
        if stage is None:
            return None
        stages.append(stage)
        parent = stage.select.name
    assert isinstance(last.op, Assign)
    below = [
        user
        for user in graph.users(last.name)
        if isinstance(user.op, Score) and user.op.level != last.op.level
    ]
    found = [_chosen(graph, score, parent) for score in below]
    if len(found) != 1 or found[0] is None:
        return None
    score, reduce, select = found[0]
    assert isinstance(score.op, Score)
    tokens = score.op.size == 1 and isinstance(graph[score.inputs[1]].op, Input)
    if not tokens or score.inputs[1] != last.inputs[0]:
        return None
    assert isinstance(select.op, Select)
    if select.op.width is None or room_of(select.op.width) > MOST_ROOM:
        return None
    return Tree(stages=tuple(stages), score=score, reduce=reduce, select=select)


def _stage(graph: Graph, assign: Node, parent: str | None) -> Stage | None:
    """A level of nodes, if that is all that is asked of them."""
    op = assign.op
    assert isinstance(op, Assign)
    if op.capacity is not None or op.takes is not None or op.nodes > MOST_NODES:
        return None
    scores = [
        user
        for user in graph.users(assign.name)
        if isinstance(user.op, Score) and user.op.level == op.level
    ]
    if len(scores) != 1:
        return None
    found = _chosen(graph, scores[0], parent)
    keys = graph[scores[0].inputs[1]]
    if found is None or not isinstance(keys.op, Pool) or keys.op.how != "centroid":
        return None
    if keys.inputs[0] != assign.inputs[1]:
        return None
    return Stage(keys=keys, assign=assign, score=found[0], reduce=found[1], select=found[2])


def _chosen(graph: Graph, score: Node, parent: str | None) -> tuple[Node, Node, Node] | None:
    """A score by attention's queries, what agrees on it, and the plain choice that is made of it."""
    op = score.op
    assert isinstance(op, Score)
    plain = Score(
        level=op.level,
        form="dot",
        scale=op.scale,
        size=op.size,
        stride=op.stride,
        within=op.within,
        cut="nodes",
    )
    users = graph.users(score.name)
    if op != plain or score.inputs[0] != "q" or len(users) != 1:
        return None
    (reduce,) = users
    agreed = graph.users(reduce.name)
    if not isinstance(reduce.op, Reduce) or len(agreed) != 1:
        return None
    if reduce.op.share != "group" or reduce.op.how == "max":
        return None
    (select,) = agreed
    if not isinstance(select.op, Select) or (parent is not None and parent not in select.inputs):
        return None
    chosen = Select(
        level=select.op.level,
        size=select.op.size,
        stride=select.op.stride,
        k=select.op.k,
        width=select.op.width,
        first=select.op.first,
        last=select.op.last,
        counted=select.op.counted,
        final=select.op.final,
        within=select.op.within,
        cut="nodes",
    )
    return (score, reduce, select) if select.op == chosen else None
