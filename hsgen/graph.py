"""The operators as small frozen classes in a closed union, and the Graph that holds them.

Knows what each value's shape is; knows neither schedules nor GPUs nor templates.

Dimensions are names: B batch, T query rows, S key rows, Hq and Hkv heads, G = Hq / Hkv, Dqk and Dv
head dims, Hi and Di heads and dim of the index, N_x entries of level x, K_x slots of its selection,
W_x words of it where rows are bitmaps, C_x candidates of x inside another level's beam; a dimension
that is a number is written as one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Literal, assert_never, get_args

import networkx as nx

from hsgen.errors import HsgenError, Span

DType = Literal["input", "f32", "i32"]  # input: the dtype of the query tensor
Role = Literal[
    "query", "keys", "values", "index_query", "index_keys", "index_weights", "gates", "parameter"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """A tensor the caller passes, by name."""

    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Summarise each entry by one float32 vector.  x, [weight, [position]] -> [B, N, H, D]

    `minmax` makes two, the least and the greatest of every channel: [B, N, H, 2, D].
    """

    level: str
    how: Literal["mean", "max", "minmax", "sum_rsqrt", "linear"]
    size: int
    stride: int
    position: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Score entries of a level.

    query, entry keys, [index weights], [parent selection] -> f32[B, T, H, N]

    `relu_weighted` sums its index heads itself, so it has one head.  `bound` reads minmax keys.  With
    `within`, only children of the parent selection are scored: f32[B, T, H, C].
    """

    level: str
    form: Literal["dot", "bound", "relu_weighted"]
    scale: float | None  # None: 1/sqrt(qk dim), not bound yet
    size: int
    stride: int
    within: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSumExp:
    """Natural log of the sum of exp over visible entries.  f32[B, H, T]

    Of a score it is a pass of its own; of an attend or a union, a by-product.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalise:
    """exp(score - lse): the softmax mass of each entry.  score, lse -> f32[B, T, H, N]

    With the log-sum-exp of another level's scores, masses are 0 where that level has no entry.
    """

    level: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduce:
    """Make heads agree.  f32[B, T, H, N] -> f32[B, T, H', N]"""

    share: Literal["group", "all"]
    how: Literal["sum", "mean", "max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """Carry scores to another level: entry j gathers source entries j * ratio + offset.

    `taps` are (offset, weight) pairs; sources that do not exist or are incomplete count nothing.
    `size` and `stride` are of the entries that are made.
    """

    level: str
    how: Literal["overlap_sum", "sum", "max"]
    size: int
    stride: int
    ratio: int
    taps: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Select:
    """Keep the best entries of each row, ascending, -1 padded.  f32[B, T, H, N] -> i32[B, T, H, K]

    With `within`, only children of the parent selection (second input) are candidates.
    """

    level: str
    size: int
    stride: int
    k: int
    width: int
    first: int
    last: int
    counted: bool
    final: bool  # attended (top_k), or only expanded (beam)
    within: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectSet:
    """Keep entries by a rule that lets counts vary.  f32[B, T, H, N] -> i32[B, T, H, W], bitmap rows

    `fraction` of the candidates, rounded up; scores above a `threshold`; the best until their mass
    reaches a part of the total, `top_p`, where `boundary`, `least`, `most` and `scope` count.
    """

    level: str
    size: int
    stride: int
    rule: Literal["fraction", "threshold", "top_p"]
    value: float
    first: int
    last: int
    counted: bool
    boundary: Literal["keep", "drop"] | None = None
    scope: Literal["row", "head"] | None = None
    least: int | None = None
    most: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """What a static attend shows, in units of `size` tokens; see the language's `static`.

    `spans` are (window, growth, sink) of heads, over and over; growth is in units of 2^-30.
    """

    spans: tuple[tuple[int, int, int], ...]
    dilation: int
    stride: int | None
    shift: int
    power_of_two: bool

    def __str__(self) -> str:
        spans = " ".join(f"{window}+{growth}N/{sink}" for window, growth, sink in self.spans)
        strided = f" stride={self.stride} shift={self.shift}" if self.stride else ""
        powers = " power_of_two" if self.power_of_two else ""
        return f"[{spans} dilation={self.dilation}{strided}{powers}]"

    @property
    def grows(self) -> bool:
        """Whether windows depend on the length of the whole sequence."""
        return any(growth for _, growth, _ in self.spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attend:
    """One softmax over one branch's keys.  query, keys, values, [selection] -> [B, T, Hq, Dv]

    `over`: blocks of a selection, tokens of a selection, every pooled entry that is complete, the
    last `window` tokens, what a static `pattern` of units of `size` tokens shows, or all tokens.
    """

    branch: str
    over: Literal["blocks", "tokens", "pooled", "window", "static", "all"]
    scale: float | None  # None: 1/sqrt(qk dim), not bound yet
    size: int
    stride: int
    window: int | None
    pattern: Pattern | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """o = sum over c of gates[..., c] * branch c.  gates, branches... -> [B, T, Hq, Dv]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Union:
    """One softmax over the union of the branches' keys, a raw token counted once."""


Op = (
    Input
    | Pool
    | Score
    | LogSumExp
    | Normalise
    | Reduce
    | Map
    | Select
    | SelectSet
    | Attend
    | Gate
    | Union
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorType:
    """dtype and symbolic dimensions, as in f32[B, T, Hkv, N_block]."""

    dtype: DType
    dims: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(self.dims)}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One operator applied: its name, operands and result type."""

    name: str
    op: Op
    inputs: tuple[str, ...]
    type: TensorType
    span: Span | None = field(default=None, compare=False, repr=False)  # where the text asks for it


class GraphError(HsgenError):
    """The graph is not well formed: a mistake in a pass, or in a graph edited by hand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """What the graph keeps of its spec besides the operators."""

    name: str
    source: str | None = None
    causal: bool = True
    digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Names of the nodes that the caller gets: o, lse per branch, selection per selecting level."""

    o: str
    lse: Mapping[str, str]
    selection: Mapping[str, str]

    def names(self) -> tuple[str, ...]:
        return (self.o, *self.lse.values(), *self.selection.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """The operators of one spec, frozen; passes make new ones.  The order is deterministic."""

    order: tuple[Node, ...]  # topological; inputs first, as in a signature, else ties by name
    outputs: Outputs
    sizes: Mapping[str, int]  # the dimensions that the spec fixes
    meta: Meta
    digraph: nx.DiGraph[str] = field(compare=False, repr=False)

    @staticmethod
    def build(
        nodes: Iterable[Node], *, outputs: Outputs, sizes: Mapping[str, int], meta: Meta
    ) -> Graph:
        """Wire nodes by the names of their operands.  Sizes of selections follow from the nodes."""
        digraph: nx.DiGraph[str] = nx.DiGraph()
        by_name: dict[str, Node] = {}
        for node in nodes:
            if node.name in by_name:
                raise GraphError(f"%{node.name} is defined twice")
            by_name[node.name] = node
            digraph.add_node(node.name, node=node)
        for node in by_name.values():
            for operand in node.inputs:
                if operand not in by_name:
                    raise GraphError(f"%{node.name} reads %{operand}, which is not defined")
                digraph.add_edge(operand, node.name)
        try:
            names = list(
                nx.lexicographical_topological_sort(digraph, lambda name: _rank(by_name[name]))
            )
        except nx.NetworkXUnfeasible:
            cycle = " -> ".join(f"%{edge[0]}" for edge in nx.find_cycle(digraph))
            raise GraphError(f"the graph has a cycle: {cycle}") from None
        order = tuple(by_name[name] for name in names)
        return Graph(
            order=order,
            outputs=outputs,
            sizes=MappingProxyType(_known_sizes(order, sizes)),
            meta=meta,
            digraph=nx.freeze(digraph),
        )

    def with_nodes(self, nodes: Iterable[Node], *, outputs: Outputs | None = None) -> Graph:
        """The same spec with other nodes (all of them, in any order)."""
        return Graph.build(nodes, outputs=outputs or self.outputs, sizes=self.sizes, meta=self.meta)

    def replacing(self, *changed: Node) -> Graph:
        """The same graph with some nodes exchanged, by name."""
        by_name = {node.name: node for node in changed}
        for name in by_name:
            self[name]  # an unknown name is an error
        return self.with_nodes(by_name.get(node.name, node) for node in self.order)

    def nodes(self) -> tuple[Node, ...]:
        """Every node: inputs as in a signature, then operands before users, ties by name."""
        return self.order

    def operands(self, node: Node) -> tuple[Node, ...]:
        return tuple(self[name] for name in node.inputs)

    def users(self, name: str) -> tuple[Node, ...]:
        """The nodes that read `name`, in order."""
        readers = set(self.digraph.successors(name))
        return tuple(node for node in self.order if node.name in readers)

    def __getitem__(self, name: str) -> Node:
        if name not in self.digraph:
            raise GraphError(f"no node %{name}")
        return self.digraph.nodes[name]["node"]

    def __contains__(self, name: str) -> bool:
        return name in self.digraph

    def __str__(self) -> str:
        return dump(self)


def _rank(node: Node) -> tuple[bool, bool, int, str]:
    """Order of nodes that are ready: q, k, v, other inputs by role and name, then by name."""
    if not isinstance(node.op, Input):
        return True, False, 0, node.name
    return False, node.name not in ("q", "k", "v"), get_args(Role).index(node.op.role), node.name


FIXED_SIZES = ("Hq", "Hkv", "G", "Dqk", "Dv", "Hi", "Di")  # fixed by the spec, not by a call


def _known_sizes(order: Sequence[Node], sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes given, and those that follow from them and from the selections."""
    known = {name: sizes[name] for name in FIXED_SIZES if name in sizes}
    if "Hq" in known and "Hkv" in known:
        known["G"] = known["Hq"] // known["Hkv"]
    selects = {node.op.level: node.op for node in order if isinstance(node.op, Select)}
    for select in selects.values():
        known[f"K_{select.level}"] = select.width
    for node in order:
        if isinstance(node.op, Score) and node.op.within in selects:
            parent = selects[node.op.within]
            known[f"C_{node.op.level}"] = parent.width * (parent.size // node.op.size)
    return known


# --- types: what an operator makes of its operands


def result_type(op: Op, operands: Sequence[Node]) -> TensorType:
    """The type of `op` applied to `operands`; GraphError where they do not fit."""
    types = [operand.type for operand in operands]
    match op:
        case Input():
            raise GraphError("an input has the type it is given")
        case Pool():
            return _pool_type(op, types)
        case Score():
            return _score_type(op, operands)
        case LogSumExp():
            return _log_sum_exp_type(operands)
        case Normalise():
            return _normalise_type(op, operands)
        case Reduce():
            return _reduce_type(op, types)
        case Map():
            return _map_type(op, types)
        case Select() | SelectSet():
            return _selection_type(op, operands)
        case Attend():
            return _attend_type(op, operands)
        case Gate():
            _need(len(types) >= 2, "gates need a tensor of gates and at least one branch")
            _need_dims(types[0], ("B", "T", "Hq", str(len(types) - 1)))
            return _agree(types[1:])
        case Union():
            _need(len(types) >= 1, "a union needs at least one branch")
            for operand in operands:
                _need(isinstance(operand.op, Attend), f"%{operand.name} is not an attend")
            return _agree(types)
        case _:
            assert_never(op)


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise GraphError(message)


def _need_dims(actual: TensorType, dims: tuple[str, ...]) -> None:
    _need(actual.dims == dims, f"expected [{', '.join(dims)}], got {actual}")


def _need_count(operands: Sequence[object], *counts: int) -> None:
    expected = " or ".join(str(count) for count in counts)
    _need(len(operands) in counts, f"expected {expected} operands, got {len(operands)}")


def _agree(types: Sequence[TensorType]) -> TensorType:
    for other in types[1:]:
        _need(other == types[0], f"branches differ: {types[0]} and {other}")
    return types[0]


def _pool_type(op: Pool, types: Sequence[TensorType]) -> TensorType:
    """x [B, S, H, D], weight [H, size, D, D], position [H, size, D] -> f32[B, N, H, D]

    An index has no head dimension: x [B, S, D] -> f32[B, N, D], H = 1 in its parameters.
    """
    _need_count(types, 1 if op.how != "linear" else 3 if op.position else 2)
    _need(op.position is False or op.how == "linear", "only linear pooling has positions")
    dims = types[0].dims
    _need(dims[:2] == ("B", "S"), f"expected [B, S, ...], got {types[0]}")
    heads, dim = (dims[2] if len(dims) == 4 else "1"), dims[-1]
    for learned, expected in zip(
        types[1:], ((heads, str(op.size), dim, dim), (heads, str(op.size), dim)), strict=False
    ):
        _need_dims(learned, expected)
    rows = ("2",) if op.how == "minmax" else ()
    return TensorType(dtype="f32", dims=("B", f"N_{op.level}", *dims[2:-1], *rows, dim))


def _entry_dim(op: Score, keys: Node) -> str:
    """N_x or C_x; checked against the keys, which are pooled entries or, for tokens, raw."""
    tokens = op.size == op.stride == 1 and keys.type.dims[1] == "S"
    _need(
        tokens or keys.type.dims[1] == f"N_{op.level}",
        f"keys {keys.type} are not of level {op.level}",
    )
    return f"N_{op.level}" if op.within is None else f"C_{op.level}"


def _score_type(op: Score, operands: Sequence[Node]) -> TensorType:
    weighted = op.form == "relu_weighted"
    _need_count(operands, 2 + weighted + (op.within is not None))
    query, keys = operands[0].type, operands[1]
    if weighted:
        _need_dims(query, ("B", "T", "Hi", "Di"))
        _need(keys.type.dims[2:] == ("Di",), f"expected [B, N, Di], got {keys.type}")
        _need_dims(operands[2].type, ("B", "T", "Hi"))
    else:
        _need_dims(query, ("B", "T", "Hq", "Dqk"))
        vectors = ("Hkv", "2", "Dqk") if op.form == "bound" else ("Hkv", "Dqk")
        expected = ", ".join(("B", "N", *vectors))
        _need(keys.type.dims[2:] == vectors, f"expected [{expected}], got {keys.type}")
    if op.within is not None:
        _need_parent(op.within, operands[-1], size=op.size, stride=op.stride)
    heads = "1" if weighted else "Hq"
    return TensorType(dtype="f32", dims=("B", "T", heads, _entry_dim(op, keys)))


def _need_parent(within: str, parent: Node, *, size: int, stride: int) -> None:
    select = parent.op
    _need(
        isinstance(select, Select) and select.level == within,
        f"%{parent.name} is not the selection of level {within}",
    )
    assert isinstance(select, Select)
    _need(
        select.size == select.stride and size == stride and select.size % size == 0,
        f"entries of {size} do not nest in entries of {select.size} of level {within}",
    )


def _log_sum_exp_type(operands: Sequence[Node]) -> TensorType:
    _need_count(operands, 1)
    operand = operands[0]
    _need(
        isinstance(operand.op, Score | Attend | Union),
        f"%{operand.name} has no log-sum-exp: it is neither a score nor an attend",
    )
    return TensorType(dtype="f32", dims=("B", operand.type.dims[2], "T"))


def _normalise_type(op: Normalise, operands: Sequence[Node]) -> TensorType:
    _need_count(operands, 2)
    score, lse = operands
    _need(
        isinstance(score.op, Score) and score.op.level == op.level,
        f"%{score.name} is not the score of level {op.level}",
    )
    _need(isinstance(lse.op, LogSumExp), f"%{lse.name} is not a log-sum-exp")
    _need_dims(lse.type, ("B", score.type.dims[2], "T"))
    return score.type


def _reduce_type(op: Reduce, types: Sequence[TensorType]) -> TensorType:
    _need_count(types, 1)
    batch, rows, heads, entries = _score_dims(types[0])
    _need(COARSENESS[heads] < COARSENESS[SHARE_HEADS[op.share]], f"{types[0]} already agrees")
    return TensorType(dtype="f32", dims=(batch, rows, SHARE_HEADS[op.share], entries))


SHARE_HEADS: Mapping[str, str] = MappingProxyType({"head": "Hq", "group": "Hkv", "all": "1"})
COARSENESS: Mapping[str, int] = MappingProxyType({"Hq": 0, "Hkv": 1, "1": 2})


def _score_dims(score: TensorType) -> tuple[str, str, str, str]:
    _need(
        score.dtype == "f32" and score.dims[:2] == ("B", "T") and len(score.dims) == 4,
        f"expected f32[B, T, H, N], got {score}",
    )
    batch, rows, heads, entries = score.dims
    return batch, rows, heads, entries


def _map_type(op: Map, types: Sequence[TensorType]) -> TensorType:
    _need_count(types, 1)
    batch, rows, heads, entries = _score_dims(types[0])
    _need(entries.startswith("N_"), f"scores of a beam's children cannot be mapped: {types[0]}")
    _need(bool(op.taps) and all(weight > 0 for _, weight in op.taps), "a map needs taps")
    return TensorType(dtype="f32", dims=(batch, rows, heads, f"N_{op.level}"))


def _selection_type(op: Select | SelectSet, operands: Sequence[Node]) -> TensorType:
    lists = isinstance(op, Select)
    return _select_type(op, operands) if lists else _select_set_type(op, operands)


def _select_type(op: Select, operands: Sequence[Node]) -> TensorType:
    _need_count(operands, 1 if op.within is None else 2)
    batch, rows, heads, entries = _score_dims(operands[0].type)
    of_level = (f"N_{op.level}",) if op.within is None else (f"N_{op.level}", f"C_{op.level}")
    _need(entries in of_level, f"scores {operands[0].type} are not of level {op.level}")
    if op.within is not None:
        parent = operands[1]
        _need_parent(op.within, parent, size=op.size, stride=op.stride)
        _need(
            COARSENESS[parent.type.dims[2]] >= COARSENESS[heads],
            f"heads that share a selection of {op.level} have different beams of {op.within}",
        )
    forced = op.first + op.last
    _need(op.k >= 1, "a selection of nothing")
    _need(not op.counted or op.k >= forced, f"{forced} entries are forced into {op.k}")
    _need(op.width == op.k + (0 if op.counted else forced), f"width {op.width} does not fit")
    return TensorType(dtype="i32", dims=(batch, rows, heads, f"K_{op.level}"))


def _select_set_type(op: SelectSet, operands: Sequence[Node]) -> TensorType:
    _need_count(operands, 1)
    batch, rows, heads, entries = _score_dims(operands[0].type)
    _need(entries == f"N_{op.level}", f"scores {operands[0].type} are not of level {op.level}")
    by_mass = op.rule == "top_p"
    _need((op.scope is not None) == by_mass, "a scope is one of masses")
    _need((op.boundary is not None) == by_mass, "a boundary is one of masses")
    _need(op.most is None or op.most >= (op.least or 0), f"at least {op.least} of {op.most}")
    return TensorType(dtype="i32", dims=(batch, rows, heads, f"W_{op.level}"))


def _attend_type(op: Attend, operands: Sequence[Node]) -> TensorType:
    selected = op.over in ("blocks", "tokens")
    _need_count(operands, 4 if selected else 3)
    query, keys, values = (operand.type for operand in operands[:3])
    _need_dims(query, ("B", "T", "Hq", "Dqk"))
    _need(keys.dims[1] == values.dims[1], f"keys {keys} and values {values} differ in length")
    rows = keys.dims[1]
    _need((rows != "S") == (op.over == "pooled"), f"keys {keys} do not fit over={op.over}")
    _need_dims(keys, ("B", rows, "Hkv", "Dqk"))
    _need_dims(values, ("B", rows, "Hkv", "Dv"))
    _need((op.window is not None) == (op.over == "window"), "a window is attended with over=window")
    _need(
        (op.pattern is not None) == (op.over == "static"), "a pattern is attended with over=static"
    )
    _need(op.over != "tokens" or op.size == 1, f"tokens have size 1, not {op.size}")
    if selected:
        select = operands[3].op
        _need(
            isinstance(select, Select | SelectSet)
            and (select.size, select.stride) == (op.size, op.stride),
            f"%{operands[3].name} is not a selection of entries of {op.size}",
        )
    return TensorType(dtype="input", dims=("B", "T", "Hq", "Dv"))


def verify(graph: Graph) -> Graph:
    """The same graph; GraphError, naming the node, unless each type follows from its operands."""
    for node in graph.nodes():
        try:
            _verify_node(graph, node)
        except GraphError as error:
            raise GraphError(f"%{node.name}: {error}") from None
    _verify_partitions(graph)
    _verify_unique(graph)
    _verify_outputs(graph)
    heads, kv_heads = graph.sizes.get("Hq", 0), graph.sizes.get("Hkv", 1)
    _need(heads % kv_heads == 0, f"{heads} query heads do not divide among {kv_heads}")
    return graph


def _verify_node(graph: Graph, node: Node) -> None:
    if isinstance(node.op, Input):
        _need(not node.inputs, "an input has no operands")
        return
    expected = result_type(node.op, graph.operands(node))
    _need(node.type == expected, f"expected {expected}, got {node.type}")


def _verify_partitions(graph: Graph) -> None:
    """Operators of one level agree on its entries, and so do maps and pooled branches."""
    known = partitions(graph)
    for node in graph.nodes():
        if isinstance(node.op, Map):
            source = graph[node.inputs[0]].type.dims[-1].removeprefix("N_")
            _need(
                node.op.stride == node.op.ratio * known[source][1],
                f"%{node.name}: ratio {node.op.ratio} does not carry stride {known[source][1]}"
                f" to {node.op.stride}",
            )
        if isinstance(node.op, Attend) and node.op.over == "pooled":
            level = graph[node.inputs[1]].type.dims[1].removeprefix("N_")
            _need(
                known[level] == (node.op.size, node.op.stride),
                f"%{node.name}: level {level} has entries of {_entry_text(known[level])}",
            )


def _entry_text(partition: tuple[int, int]) -> str:
    return f"size {partition[0]}, stride {partition[1]}"


def partitions(graph: Graph) -> Mapping[str, tuple[int, int]]:
    """Size and stride of every level's entries; GraphError where operators disagree."""
    found: dict[str, tuple[int, int]] = {}
    for node in graph.nodes():
        if isinstance(node.op, Pool | Score | Map | Select | SelectSet):
            own = (node.op.size, node.op.stride)
            _need(
                found.setdefault(node.op.level, own) == own,
                f"%{node.name}: level {node.op.level} has entries of"
                f" {_entry_text(found[node.op.level])}",
            )
    return found


def short_last(graph: Graph, level: str) -> bool:
    """Whether the level's last entry may be short: pooled over its true length, never if causal."""
    size, stride = partitions(graph)[level]
    linear = any(
        isinstance(node.op, Pool) and node.op.level == level and node.op.how == "linear"
        for node in graph.nodes()
    )
    return not graph.meta.causal and size == stride and not linear


def _verify_unique(graph: Graph) -> None:
    owners = [
        f"level {node.op.level} selects"
        if isinstance(node.op, Select | SelectSet)
        else f"branch {node.op.branch}"
        for node in graph.nodes()
        if isinstance(node.op, Select | SelectSet | Attend)
    ]
    for owner in owners:
        _need(owners.count(owner) == 1, f"{owner} more than once")


def _verify_outputs(graph: Graph) -> None:
    outputs = graph.outputs
    _need_dims(graph[outputs.o].type, ("B", "T", "Hq", "Dv"))
    for name in outputs.lse.values():
        _need(isinstance(graph[name].op, LogSumExp), f"%{name} is not a log-sum-exp")
        _need_dims(graph[name].type, ("B", "Hq", "T"))
    for level, name in outputs.selection.items():
        op = graph[name].op
        _need(
            isinstance(op, Select | SelectSet) and op.level == level,
            f"%{name} is not a selection of {level}",
        )


# --- the inputs, in the order of a signature


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInput:
    """A tensor that the caller passes: `str()` is a line of a docstring."""

    name: str
    type: TensorType
    role: Role
    about: str

    def __str__(self) -> str:
        return f"{self.name} [{', '.join(self.type.dims)}]: {self.about}"


def tensor_inputs(graph: Graph) -> tuple[TensorInput, ...]:
    """Every input: q, k, v first, then keys and values of branches, index, gates, parameters."""
    return tuple(
        TensorInput(name=node.name, type=node.type, role=node.op.role, about=_about(graph, node))
        for node in graph.nodes()
        if isinstance(node.op, Input)
    )


def _about(graph: Graph, node: Node) -> str:
    assert isinstance(node.op, Input)
    users = graph.users(node.name)
    whose = sorted({_owner(user.op) for user in users} - {""})
    of = f" of {', '.join(whose)}" if whose else ""
    match node.op.role:
        case "query":
            return "queries"
        case "keys":
            return f"keys{of}"
        case "values":
            return f"values{of}"
        case "index_query":
            return "queries of the index"
        case "index_keys":
            return "keys of the index, shared by its heads"
        case "index_weights":
            return "weight of each head of the index"
        case "gates":
            gated = [graph[name].op for user in users for name in user.inputs[1:]]
            names = [op.branch for op in gated if isinstance(op, Attend)]
            return f"gate of each branch: {', '.join(names)}"
        case "parameter":
            return f"learned pooling{of}"
        case _:
            assert_never(node.op.role)


def _owner(op: Op) -> str:
    """The level or branch that an operator belongs to, in words."""
    match op:
        case Pool() | Score() | Normalise() | Map() | Select() | SelectSet():
            return f"level {op.level}"
        case Attend():
            return f"branch {op.branch}"
        case Input() | LogSumExp() | Reduce() | Gate() | Union():
            return ""
        case _:
            assert_never(op)


# --- text


def dump(graph: Graph) -> str:
    """The graph as text, one line a node, aligned.  Equal graphs give equal text."""
    inputs = [
        (f"%{node.name}", f"= {op_text(node.op)}", f": {node.type}")
        for node in graph.nodes()
        if isinstance(node.op, Input)
    ]
    operators = [
        (
            f"%{node.name}",
            f"= {op_text(node.op)}",
            f": {node.type}",
            f"<- {', '.join(f'%{name}' for name in node.inputs)}",
        )
        for node in graph.nodes()
        if not isinstance(node.op, Input)
    ]
    sizes = "".join(f", {name}={size}" for name, size in graph.sizes.items())
    head = f"graph {graph.meta.name}(causal={graph.meta.causal}{sizes})"
    outputs = graph.outputs
    tail = [f"return o=%{outputs.o}"]
    tail += [f"lse.{branch}=%{name}" for branch, name in outputs.lse.items()]
    tail += [f"selection.{level}=%{name}" for level, name in outputs.selection.items()]
    return "\n".join([head, *align(inputs), *align(operators), ", ".join(tail)]) + "\n"


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column), default=0) for column in zip(*rows, strict=True)]
    return [
        " ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def op_text(op: Op) -> str:
    """An operator as `name(field=value, ...)`, fields that are None left out."""
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(op).__name__).lower()
    shown = ((each.name, getattr(op, each.name)) for each in fields(op))
    attributes = [f"{name}={_value_text(value)}" for name, value in shown if value is not None]
    return f"{name}({', '.join(attributes)})"


def _value_text(value: object) -> str:
    if isinstance(value, tuple):  # taps
        return "[" + " ".join(f"{offset:+d}:{weight}" for offset, weight in value) + "]"
    return str(value)
