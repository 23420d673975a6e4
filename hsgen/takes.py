"""Nodes of a learned tree that take their tokens, and rows that attend in them, in the `trees` skeleton.

Each node has the keys that lie nearest to its centroid and, of the rows that see one of these, those that
lie nearest; a token may be in several nodes, and in none.  Both are the best of a head's tokens by cosines
in scratch.  A program attends the keys of a node with some of the node's rows and leaves a part; each row
then has the mean of the parts it is in.  Its log-sum-exp counts a key once: of a node it leaves out what is
in an earlier node of the row too, which bits of keys and of rows say.

Where heads go one of two ways, a table says which; those of the other way see a window, a pattern of which
the heads of nodes see nothing, and are written first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from hsgen.graph import (
    Assign,
    Attend,
    Graph,
    Input,
    LogSumExp,
    Node,
    Pattern,
    Pool,
    Route,
    Score,
    SelectSet,
    Switch,
)
from hsgen.kernels import tunables
from hsgen.patterns import span_of
from hsgen.plan import Param
from hsgen.rows import (
    LOG2_E,
    OUTPUTS,
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

MOST_NODES = 2048  # whose bits are in registers, of some rows
MOST_TAKEN = 8192  # tokens of a node, whose list is in registers

How = Literal["near", "mark", "spread", "members", "attend", "mean", "given"]
DOTS: tuple[How, ...] = ("near", "attend", "given")
SUMMARIES: dict[How, str] = {
    "near": "cosines of tokens with the centroids of nodes.",
    "mark": "the nodes that have a token, as bits.",
    "spread": "the nodes of every row, of heads that are in any.",
    "members": "which nodes each row has chosen for itself, as bits.",
    "attend": "some rows of a node, over its keys.",
    "mean": "every row, the mean of what it has in its nodes.",
    "given": "rows over the keys of the nodes that each chose for itself, node by node.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TakesContext:
    """What `trees.py.jinja` reads where nodes take tokens.

    `rows`: tokens are those of queries.  Heads that are in nodes are counted apart from others, as `one`.
    """

    name: str
    how: How
    header: str = ""
    pieces: str = ""
    query_heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    nodes: int
    takes: int  # keys of a node
    width: int  # rows of a node
    table: tuple[bool, ...] = (True,)  # of head after head, over and over: whether it is in nodes
    rows: bool = False
    causal: bool = True
    scale: float = 1.0
    precision: str = "tf32x3"

    @property
    def summary(self) -> str:
        if self.how == "near" and self.rows:
            return "cosines of rows with the centroids of nodes, of which each sees a key."
        return SUMMARIES[self.how]

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def v_chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.v_dim)

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads

    @property
    def row_heads(self) -> int:
        """Query heads that are in nodes."""
        return sum(self.table[i % len(self.table)] for i in range(self.query_heads))

    @property
    def key_heads(self) -> int:
        """Heads whose keys are: those of the same numbers, or, where they have a group each, all."""
        return self.row_heads if self.group == 1 else self.kv_heads

    @property
    def heads(self) -> int:
        """Of the side whose tokens are asked: of rows where they attend."""
        return self.key_heads if self.how in ("near", "mark") and not self.rows else self.row_heads

    @property
    def taken(self) -> int:
        """Slots of the list of a node."""
        return self.width if self.rows else self.takes

    @property
    def words(self) -> int:
        """Of the bits of all nodes."""
        return -(-self.nodes // 32)

    @property
    def padded_nodes(self) -> int:
        return next_power(max(self.nodes, 2))

    @property
    def head(self) -> str:
        """The head of number `one` of those that are in nodes, on the side whose tokens are asked."""
        apart = self.rows or self.how not in ("near", "mark") or self.group == 1
        return self._spread_out("one") if apart else "one"

    @property
    def unit_head(self) -> str:
        """The head of centroids that tokens meet."""
        return self.key_head if self.rows else "head"

    @property
    def key_head(self) -> str:
        """The head of keys that `head` reads."""
        return f"(head // {self.group})" if self.group > 1 else "head"

    @property
    def key_one(self) -> str:
        """The number, of heads whose keys are in nodes, of that which `one` of the rows reads."""
        return "one" if self.group == 1 else f"({self.head}) // {self.group}"

    def _spread_out(self, one: str) -> str:
        places = [i for i, there in enumerate(self.table) if there]
        if len(places) == len(self.table):
            return one
        period, many = len(self.table), len(places)
        if many == 1:
            return f"{one} * {period} + {places[0]}" if places[0] else f"{one} * {period}"
        return f"{one} // {many} * {period} + {_picked(f'{one} % {many}', enumerate(places))}"

    @property
    def one(self) -> str:
        """The number of `head` among those that are in nodes."""
        places = [i for i, there in enumerate(self.table) if there]
        period, many = len(self.table), len(places)
        if many == period:
            return "head"
        if many == 1:
            return f"head // {period}"
        back = ((place, i) for i, place in enumerate(places))
        return f"head // {period} * {many} + {_picked(f'head % {period}', back)}"

    @property
    def routed(self) -> str:
        """Whether `head` is in any node; empty where all are."""
        places = [i for i, there in enumerate(self.table) if there]
        if len(places) == len(self.table):
            return ""
        each = [f"(head % {len(self.table)} == {place})" for place in places]
        return " | ".join(each) if len(each) > 1 else each[0][1:-1]

    @property
    def first(self) -> int:
        """The column of `SEQ` that says where the tokens of a sequence begin."""
        return 1 if self.rows else 4

    @property
    def length(self) -> int:
        """The column that says how many there are."""
        return 2 if self.rows else 5

    @property
    def scale_log2(self) -> str:
        return number(self.scale * LOG2_E)

    @property
    def params(self) -> tuple[Param, ...]:
        unit = pointer("UNIT", "f32", f"f32[{self.kv_heads}, {self.nodes}, {self.head_dim}]")
        taken = _lists(self, "TAKEN", rows=self.rows)
        match self.how:
            case "near":
                x = tensor("X", "x", "[B, S, H, Dqk]", "bth")
                of = f"f32[turn, {self.nodes}, capacity] of a turn's heads"
                scores = (pointer("SCORES", "f32", of), count("capacity", "tokens of a row of it"))
                begins = (_keys(self),) if self.rows else ()
                tiles = tunables("BLOCK_N", "BLOCK_E")
                return (*x, unit, *scores, *begins, _lengths(self), SEQ[0], _TURN, *tiles)
            case "mark":
                lengths = (_lengths(self),) if self.rows else (_KEY_LENGTH,)
                return (*taken, *lengths, _bits(self, rows=self.rows), SEQ[0], *tunables("BLOCK_N"))
            case "spread":
                made = f"[rows, {self.query_heads}, {self.nodes}]"
                of = (_bits(self, rows=True), pointer("SELECTION", "i32", made))
                return (*of, *SEQ, *tunables("BLOCK_T"))
            case "members":
                selection = tensor("SELECTION", "s", "[B, T, Hq, K]", "bths", "i32")
                of = (count("width", "K"), _bits(self, rows=True))
                return (*selection, *of, *SEQ, *tunables("BLOCK_T", "BLOCK_K"))
            case "mean":
                of = (*_lists(self, "ROWS", rows=True), _lengths(self), _bits(self, rows=True))
                return (*of, *_parts(self), *OUTPUTS, SEQ[0], _TURN, *tunables("BLOCK_T"))
            case "attend" | "given":
                tensors = (
                    *tensor("Q", "q", "[B, T, Hq, Dqk]", "bth"),
                    *tensor("K", "k", "[B, S, Hkv, Dqk]", "bth"),
                    *tensor("V", "v", "[B, S, Hkv, Dv]", "bth"),
                )
                keys = (*_lists(self, "KEYS", rows=False), _bits(self, rows=False), _KEY_LENGTH)
                bits = _bits(self, rows=True)
                if self.how == "given":
                    outputs = (*OUTPUTS, *SEQ)
                    return (*tensors, *keys, bits, *outputs, *tunables("BLOCK_T", "BLOCK_N"))
                listed = (*_lists(self, "ROWS", rows=True), _lengths(self), bits)
                made = (*_parts(self), SEQ[0], _TURN)
                return (*tensors, *keys, *listed, *made, *tunables("BLOCK_T", "BLOCK_N"))

    @property
    def jit(self) -> str:
        return jit(self.params)


_TURN = count("tile_first", "the turn's first head, of those of all sequences")
_KEY_LENGTH = count("length", "keys from one sequence to the next; packed: 0")


def _picked(of: str, values: Iterable[tuple[int, int]]) -> str:
    """A choice of numbers, as an expression."""
    (_, first), *others = values
    text = str(first)
    for at, value in others:
        text = f"tl.where({of} == {at}, {value}, {text})"
    return text


def _lists(k: TakesContext, name: str, *, rows: bool) -> tuple[Param, Param]:
    """What nodes have, and how many; rows are counted from the first that sees a key of the node."""
    heads, wide = (k.row_heads, k.width) if rows else (k.key_heads, k.takes)
    what = "rows of nodes, from the first that sees a key" if rows else "keys of nodes, ascending"
    return (
        pointer(name, "i32", f"[Z, {heads}, {k.nodes}, {wide}] {what}"),
        pointer(f"{name}_COUNTS", "i32", f"[Z, {heads}, {k.nodes}, 2] how many a node has"),
    )


def _keys(k: TakesContext) -> Param:
    return _lists(k, "KEYS", rows=False)[0]


def _lengths(k: TakesContext) -> Param:
    """How many tokens a node may take."""
    if k.how == "near" and not k.rows:
        return pointer("LENGTHS", "i32", f"[Z, {k.heads}, {k.nodes}] keys there are")
    dims = f"[Z, {k.row_heads}, {k.nodes}]"
    return pointer("LENGTHS", "i32", f"{dims} rows that see a key of the node, the last ones")


def _bits(k: TakesContext, *, rows: bool) -> Param:
    name, heads = ("ROW_BITS", k.row_heads) if rows else ("KEY_BITS", k.key_heads)
    whose = "nodes that a row is in" if rows else "nodes that a key is in"
    return pointer(name, "i32", f"[{'rows' if rows else 'keys'}, {heads}, {k.words}] {whose}")


def _parts(k: TakesContext) -> tuple[Param, ...]:
    dims = f"turn, {k.nodes}, slots"
    return (
        pointer("PART_O", "f32", f"f32[{dims}, {k.v_dim}] of each row of a node"),
        pointer("PART_LSE", "f32", f"f32[{dims}] of keys in no earlier node of the row; base 2"),
        count("slots", "rows of a node, at most"),
    )


# --- which nodes kernels attend by


@dataclass(frozen=True, slots=True, kw_only=True)
class Taking:
    """All that a graph does, where nodes take keys and rows; `other`: the branch of heads on another way."""

    keys: Node
    assign: Node
    score: Node
    select: Node
    attend: Node
    other: Node | None
    route: Node | None
    table: tuple[bool, ...]

    @property
    def names(self) -> frozenset[str]:
        """Of the nodes that are done here."""
        own = (self.keys, self.assign, self.score, self.select, self.attend, self.route)
        return frozenset(node.name for node in own if node)


def joined(graph: Graph) -> tuple[Graph, Mapping[str, str]]:
    """The same graph, for schedules, where some heads attend in nodes and others another branch: this is a
    pattern of which the former see nothing, and nodes attend last, into the same output; as it is where it is
    no such graph.

    And by which node each that is gone is done.
    """
    switch = next((node for node in graph.nodes() if isinstance(node.op, Switch)), None)
    if switch is None:
        return graph, {}
    branches = graph.operands(switch)
    own = [x for x in branches if isinstance(x.op, Attend) and x.op.softmax == "entry"]
    others = [x for x in branches if x not in own]
    if len(own) != 1 or len(others) != 1:
        return graph, {}
    (attend,), (other,) = own, others
    assert isinstance(attend.op, Attend)
    route = graph[attend.inputs[-1]]
    table = table_of(route, attend.op.when)
    if table is None or not isinstance(other.op, Attend):
        return graph, {}
    rest = tuple(not there for there in table)
    seen = _of_heads(other, rest)
    if seen is None or table_of(route, other.op.when) != rest:
        return graph, {}
    last = replace(switch, op=attend.op, inputs=(*attend.inputs, other.name))
    changed = {
        switch.name: last,
        other.name: replace(other, op=seen, inputs=other.inputs[:3]),
    }
    sums = {
        x.name for x in graph.nodes() if _sums(x) & {attend.name, other.name}
    }  # that none asks for
    gone = {attend.name, *(sums - {*graph.outputs.lse.values()})}
    nodes = [changed.get(x.name, x) for x in graph.nodes() if x.name not in gone]
    return graph.with_nodes(nodes), {attend.name: switch.name}


def _sums(node: Node) -> set[str]:
    """Of which branches it is a log-sum-exp."""
    return {*node.inputs} if isinstance(node.op, LogSumExp) else set[str]()


def table_of(route: Node, way: str | None) -> tuple[bool, ...] | None:
    """Of head after head, over and over, whether it goes that way; None where no table says it."""
    op = route.op
    if not isinstance(op, Route) or op.by != "head" or not op.repeats or op.divergence is not None:
        return None
    return tuple(op.ways[place] == way for place in op.places)


def _of_heads(node: Node, table: tuple[bool, ...]) -> Attend | None:
    """A branch as a pattern of head after head; None where it is no window and sink."""
    op = node.op
    assert isinstance(op, Attend)
    if len(node.inputs) != 4 or op.latent or op.softcap:  # a sink, a bias, other keys
        return None
    found = _spans(op)
    if found is None:
        return None
    size, spans = found
    many = math.lcm(len(spans), len(table))
    nothing = (0, 0, 0)
    of = tuple(spans[i % len(spans)] if table[i % len(table)] else nothing for i in range(many))
    pattern = Pattern(spans=of, dilation=1, stride=None, shift=0, power_of_two=False)
    return replace(
        op, over="static", window=None, when=None, size=size, stride=size, pattern=pattern
    )


def _spans(op: Attend) -> tuple[int, tuple[tuple[int, int, int], ...]] | None:
    """Tokens of a unit, and windows and sinks of heads."""
    if op.over == "static" and op.pattern is not None:
        spans = op.pattern.spans
        plain = Pattern(spans=spans, dilation=1, stride=None, shift=0, power_of_two=False)
        return (op.size, spans) if op.pattern == plain else None
    span = span_of(op)
    return None if span is None else (1, (span,))


def taking_of(graph: Graph) -> Taking | None:
    """What kernels do as a whole, of a graph that is joined; None of any other."""
    attends = [x for x in graph.nodes() if isinstance(x.op, Attend) and x.op.softmax == "entry"]
    if len(attends) != 1 or graph.outputs.o != attends[0].name:
        return None
    (attend,) = attends
    if len(attend.inputs) < 5 or attend.inputs[:3] != ("q", "k", "v"):
        return None
    select, assign = graph[attend.inputs[3]], graph[attend.inputs[4]]
    if not isinstance(select.op, SelectSet) or not isinstance(assign.op, Assign):
        return None
    score = graph[select.inputs[0]]
    if not isinstance(score.op, Score):
        return None
    keys = graph[score.inputs[1]]
    rest = [graph[name] for name in attend.inputs[5:]]
    route = next((x for x in rest if isinstance(x.op, Route)), None)
    other = next((x for x in rest if isinstance(x.op, Attend)), None)
    op = attend.op
    assert isinstance(op, Attend)
    if len(rest) != bool(route) + bool(other) or bool(op.when) != bool(route):
        return None
    table = table_of(route, op.when) if route else (True,)
    if table is None or all(table) != (other is None) or not any(table):
        return None
    found = Taking(
        keys=keys,
        assign=assign,
        score=score,
        select=select,
        attend=attend,
        other=other,
        route=route,
        table=table,
    )
    return found if _plain(graph, found) else None


def slots_of(graph: Graph, name: str) -> int | None:
    """Slots of a row of a choice of nodes, of which there may be all; None of any other choice."""
    found = taking_of(joined(graph)[0])
    if found is None or found.select.name != name:
        return None
    assert isinstance(found.assign.op, Assign)
    return found.assign.op.nodes


def _plain(graph: Graph, found: Taking) -> bool:
    """Whether no operator is more than kernels do, and there are no others."""
    keys, assign, score = found.keys.op, found.assign.op, found.score.op
    select, attend = found.select.op, found.attend.op
    assert isinstance(assign, Assign)
    assert isinstance(score, Score)
    assert isinstance(select, SelectSet)
    assert isinstance(attend, Attend)
    if assign.takes is None:
        return False
    level = assign.level
    cut = {"size": 0, "stride": 0, "cut": "nodes"}
    wanted = (
        (keys, Pool(level=level, how="centroid", position=False, size=0, stride=0)),
        (
            assign,
            Assign(
                level=level,
                nodes=assign.nodes,
                branching=assign.branching,
                capacity=None,
                takes=assign.takes,
            ),
        ),
        (score, Score(level=level, form="cosine", scale=score.scale, within=None, **cut)),
        (
            select,
            SelectSet(
                level=level,
                rule="top_k",
                value=select.value,
                first=0,
                last=0,
                counted=select.counted,
                scope="entry",
                when=attend.when,
                **cut,
            ),
        ),
        (
            attend,
            Attend(
                branch=attend.branch,
                over="blocks",
                scale=attend.scale,
                window=None,
                when=attend.when,
                softmax="entry",
                **cut,
            ),
        ),
    )
    way = (found.route.name,) if found.route else ()
    other = (found.other.name,) if found.other else ()
    centroids = found.assign.inputs[1:]
    inputs = (
        (found.assign.inputs[:1], ("k",)),
        (found.keys.inputs, centroids),
        (found.score.inputs, ("q", found.keys.name, found.assign.name)),
        (found.select.inputs, (found.score.name, found.assign.name, *way)),
        (found.attend.inputs[3:], (found.select.name, found.assign.name, *way, *other)),
    )
    done = found.names.union(other)
    last = {x.name for x in graph.nodes() if isinstance(x.op, LogSumExp) and x.inputs[0] in done}
    rest = [x for x in graph.nodes() if x.name not in done | last and not isinstance(x.op, Input)]
    up = score.scale is None or score.scale > 0
    alike = all(a == b for a, b in (*wanted, *inputs))
    return alike and up and not rest and len(centroids) == 1
