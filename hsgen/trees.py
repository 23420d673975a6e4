"""What fills the `trees` skeleton: tokens by leaf of a learned tree, and rows that find their best by it.

Centroids at unit length are entries and judges alike.  Keys go down level by level; a counting sort then
lists the tokens of each leaf, in order, so that a row's candidates are a few runs of its key head's list.
Rows go down by scores of all nodes of a level, as trees are small beside texts.  At the bottom a program
scores the tokens of a row's leaves and keeps the best: how many there are is known on the device alone, so it
has a scratch for as many as there are keys, and takes one row after the other.
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
    least_rows,
    next_power,
    number,
    pointer,
    tensor,
)

CHUNK = 128  # tokens whose leaves are counted together
MOST_NODES = 4096  # of a level, whose scores are a row's in registers

How = Literal["unit", "assign", "tally", "before", "place", "descend", "sift"]
SUMMARIES: dict[How, str] = {
    "unit": "centroids at unit length.",
    "assign": "the node of every token: of its own node's children the nearest by cosine.",
    "tally": "how many tokens of a chunk are in each leaf.",
    "before": "how many are before each chunk, and where each leaf's list begins.",
    "place": "the tokens of each leaf, ascending.",
    "descend": "the best nodes of each row, of those that have a token it sees.",
    "sift": "the best tokens of each row, of those in its leaves.",
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

    @property
    def summary(self) -> str:
        return SUMMARIES[self.how]

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

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
    def padded_group(self) -> int:
        """Rows of a tile that has a group's heads."""
        return least_rows(self.group)

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
        nodes = pointer("NODES", "i32", f"[key rows, {heads}] the node of each token")
        counts = pointer("COUNTS", "i32", f"[Z, {heads}, chunks, {self.padded_leaves}]")
        chunked = count("chunks", f"of {CHUNK} tokens, of the longest sequence")
        length = count("length", "rows of keys from one sequence to the next; packed: 0")
        offsets = pointer("OFFSETS", "i32", f"[Z, {heads}, {self.padded_leaves + 1}]")
        listed = pointer("LIST", "i32", f"[{heads}, key rows] tokens of leaves, one after another")
        key_rows = count("key_rows", "of all sequences")
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
                above = pointer("ABOVE", "i32", f"[key rows, {heads}] the parent of each")
                more = (above,) if self.above else ()
                return (
                    *keys,
                    unit,
                    *more,
                    nodes,
                    length,
                    *SEQ[:1],
                    *tunables("BLOCK_N", "BLOCK_E"),
                )
            case "tally":
                return (nodes, counts, chunked, length, *SEQ[:1])
            case "before":
                return (counts, offsets, chunked, *SEQ[:1])
            case "place":
                return (nodes, counts, offsets, listed, key_rows, chunked, length, *SEQ[:1])
            case "descend":
                more = (parents,) if self.beam else ()
                lists = (offsets, listed, key_rows, length)
                return (*QUERY, unit, *more, *lists, chosen, *SEQ, *tunables("BLOCK_T"))
            case "sift":
                scratch = pointer("SCRATCH", "i32", "[programs, 2, room] keys, and their tokens")
                return (
                    *QUERY,
                    *keys,
                    parents,
                    offsets,
                    listed,
                    key_rows,
                    length,
                    scratch,
                    count("room", "keys of the longest sequence, at least"),
                    chosen,
                    count("items", "rows of all sequences and one more each, times heads"),
                    *SEQ,
                    *tunables("BLOCK_N", "BLOCK_K"),
                )

    @property
    def jit(self) -> str:
        return jit(self.params)


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
