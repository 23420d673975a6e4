"""What a graph says about itself: causality, laws, costs, and the text that `show` prints.

Knows nothing of kernels: costs are of operators, one by one, before any share a launch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, assert_never

from hsgen.graph import (
    FIXED_SIZES,
    Assign,
    Attend,
    Carry,
    Cluster,
    Delta,
    Distance,
    Divergence,
    DType,
    Entropies,
    Gate,
    Graph,
    GraphError,
    Input,
    LogSumExp,
    Map,
    Node,
    Norm,
    Normalise,
    Op,
    OutputGate,
    Pattern,
    Permute,
    Pool,
    PoolHeads,
    PoolRows,
    Recall,
    Reduce,
    ReduceRows,
    Rotate,
    Round,
    Route,
    Runs,
    Score,
    Select,
    SelectSet,
    Switch,
    TensorType,
    Union,
    Unlike,
    align,
    anchors,
    assigned,
    befores,
    block_of,
    dump,
    partitions,
    tensor_inputs,
)

Causality = Literal["token", "query_block", "prompt", "none"]

# --- causality and laws


def causality(graph: Graph) -> Causality:
    """What row t depends on: the loosest of its operators."""
    found = {_op_causality(node, causal=graph.meta.causal) for node in graph.nodes()}
    loosest_first: tuple[Causality, ...] = ("none", "prompt", "query_block", "token")
    return next(each for each in loosest_first if each in found)


def _op_causality(node: Node, *, causal: bool) -> Causality:
    """`token` where the result of row t needs nothing after t, given operands that do not."""
    match op := node.op:
        case SelectSet() if causal and op.scope in ("head", "entry"):
            return "prompt"  # rows of a head, or of an entry, are ranked together
        case SelectSet() if causal and op.of == "all":
            return "prompt"  # budgets grow with the length of the whole sequence
        case Attend() if causal and op.pattern is not None and op.pattern.grows:
            return "prompt"  # windows grow with the length of the whole sequence
        case Attend() if op.pattern is not None and op.pattern.axes:
            return _axes_causality(op.pattern, causal=causal)
        case Permute() if causal and op.by == "mass":
            return "prompt"  # the last rows say which keys come first
        case PoolRows() | ReduceRows() | Score() | Unlike() if causal and (found := _of_rows(op)):
            return found
        case Assign() if causal and (op.capacity is not None or op.takes is not None):
            return "prompt"  # later tokens may be nearer, and take what room a node has
        case Runs() if causal and op.span is not None:
            return "prompt"  # keys after a token say whether a run begins there
        case Score() | Map() | Select() | SelectSet() | Attend():
            return "token" if causal else "none"  # entries count once complete, tokens once seen
        case Recall() | Carry() | Divergence() | Distance() | Entropies():
            return "token"  # what earlier calls say of a row is of that row; losses are no rows
        case (
            Input()
            | Cluster()
            | Permute()
            | Assign()
            | Runs()
            | Pool()
            | Norm()
            | Rotate()
            | Round()
            | Delta()
            | LogSumExp()
            | Normalise()
            | Reduce()
            | Route()
            | Switch()
            | Gate()
            | Union()
            | OutputGate()
        ):
            return "token"  # row by row, or entry by entry, of what the operators above have masked
        case PoolRows() | PoolHeads() | ReduceRows() | Unlike():
            return "token"
        case _:
            assert_never(op)


def _of_rows(op: PoolRows | ReduceRows | Score | Unlike) -> Causality | None:
    """What rows that ask together make of causality; None of rows that ask alone."""
    if isinstance(op, Unlike):
        return "prompt" if op.centred else "query_block"
    asks = (op.halves and op.halves.rows) if isinstance(op, Score) else op
    if asks is None:
        return None
    return "prompt" if asks.last is not None else "query_block"


def _axes_causality(pattern: Pattern, *, causal: bool) -> Causality:
    """Of windows along axes: an axis that is causal keeps out all that lies after its step."""
    first = pattern.axes[0]
    if first.length is None and (first.stride > 1 if first.causal else causal):
        return "prompt"  # where the axis ends decides where the windows of its last rows begin
    if causal:
        return "token"
    if not pattern.without_units or not first.causal:
        return "none"
    return "token" if all(axis.causal for axis in pattern.axes) else "query_block"


def query_block(graph: Graph) -> int | None:
    """Rows of a block that see to the end of it, where causality is `query_block`; None: not bound.

    What a block of rows chooses by is tokens up to the end of the entries that begin in it.  Windows
    along axes see a whole step of the first one.
    """
    known, sizes = partitions(graph), [1]
    for node in graph.nodes():
        rows = block_of(node.type.dims[1]) if len(node.type.dims) == 4 else None
        entries = node.type.dims[-1].partition("_")[2] if node.type.dims else ""
        sizes += [rows or 1, (known[entries][0] or 1) if rows and entries in known else 1]
        if isinstance(node.op, Attend) and node.op.pattern is not None:
            steps = [axis.length for axis in node.op.pattern.axes[1:]]
            if None in steps:
                return None
            sizes.append(math.prod(step or 1 for step in steps))
    return math.lcm(*sizes)


def causality_text(graph: Graph) -> str:
    """Causality as it prints: a block of queries with its size."""
    found = causality(graph)
    rows = query_block(graph) if found == "query_block" else None
    return f"query_block({rows})" if rows else found


@dataclass(frozen=True, slots=True, kw_only=True)
class Laws:
    """Which laws hold for a graph; a test of a law asks here first."""

    dense_when_all_selected: bool
    unselected_values_have_no_effect: bool
    future_never_changes_the_past: bool
    decode_equals_prefill_row: bool


def laws(graph: Graph) -> Laws:
    """The preconditions of the laws, derived."""
    by_token = causality(graph) == "token"
    return Laws(
        dense_when_all_selected=not_dense_because(graph) is None,
        unselected_values_have_no_effect=not _pooled_attends(graph),
        future_never_changes_the_past=by_token,
        decode_equals_prefill_row=by_token and not _recalls(graph, over="steps"),
    )


def _recalls(graph: Graph, *, over: Literal["layers", "steps"]) -> bool:
    """Whether a call takes over what earlier ones, layers or steps, have chosen."""
    ops = (node.op for node in graph.nodes())
    return any(isinstance(op, Recall | Carry) and op.turns.over == over for op in ops)


def _attends(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes() if isinstance(node.op, Attend)]


def _pooled_attends(graph: Graph) -> list[str]:
    return [
        node.op.branch
        for node in graph.nodes()
        if isinstance(node.op, Attend) and node.op.over == "pooled"
    ]


def not_dense_because(graph: Graph) -> str | None:
    """Why selecting every entry does not give dense attention; None where it does."""
    if any(isinstance(node.op, Gate) for node in graph.nodes()):
        return "branches have softmaxes of their own, and gates"
    if any(isinstance(node.op, OutputGate) for node in graph.nodes()):
        return "the output is gated"
    if any(isinstance(node.op, Attend | Union) and node.op.sink for node in graph.nodes()):
        return "a sink takes part of every softmax"
    if pooled := _pooled_attends(graph):
        return f"branch {pooled[0]} attends pooled values"
    attends = _attends(graph)
    if biased := [x.op.branch for x in attends if isinstance(x.op, Attend) and x.op.biased]:
        return f"branch {biased[0]} adds a learned bias to its logits"
    if far := [x.op.branch for x in attends if isinstance(x.op, Attend) and x.op.near is not None]:
        return f"branch {far[0]} reads far keys from their changes"
    if spans := [x.op.branch for x in attends if isinstance(x.op, Attend) and x.op.spans]:
        return f"branch {spans[0]} has a softmax of its own for every span"
    if each := [x.op.branch for x in attends if isinstance(x.op, Attend) and x.op.softmax]:
        return f"branch {each[0]} has a softmax of its own for every entry"
    if len({node.inputs[:3] for node in attends}) > 1:
        return "branches have keys and values of their own"
    for way in _ways(graph):
        reasons = [_unreachable_because(graph, attend) for attend in _attends_on(attends, way)]
        if None not in reasons:
            return reasons[0] if reasons else f"nothing is attended on the way {way}"
    return None


def _ways(graph: Graph) -> tuple[str | None, ...]:
    """The ways of the route; one without a name where there is none."""
    routes = [node.op for node in graph.nodes() if isinstance(node.op, Route)]
    return routes[0].ways if routes else (None,)


def _attends_on(attends: list[Node], way: str | None) -> list[Node]:
    """The attends that are there on a way."""
    return [node for node in attends if isinstance(node.op, Attend) and node.op.when in (None, way)]


def _left_out(op: Assign) -> str | None:
    """The tokens that may be in no node."""
    if op.takes is not None:
        return "none of them takes"
    return "they have no room for" if op.capacity is not None else None


def _unreachable_because(graph: Graph, attend: Node) -> str | None:
    """Why some visible token cannot be attended, however much is selected."""
    assert isinstance(attend.op, Attend)
    match attend.op.over:
        case "all":
            return None
        case "window":
            return f"branch {attend.op.branch} attends a window only"
        case "static":
            return f"branch {attend.op.branch} attends a static pattern only"
        case "tiers":
            return f"branch {attend.op.branch} attends means of tokens"
        case "blocks" | "tokens" | "spans" | "pooled":
            pass
    selection = graph[attend.inputs[3]]
    owners = assigned(graph)
    if any(isinstance(x.op, Permute) and x.op.by == "given" for x in graph.operands(attend)):
        return f"the order that branch {attend.op.branch} is given may leave tokens out"
    while True:
        select = selection.op
        if isinstance(select, Recall):
            return f"level {select.level} takes over what other calls chose"
        assert isinstance(select, Select | SelectSet)
        if select.size != select.stride:
            return f"entries of level {select.level} overlap or leave gaps"
        owner = owners[select.level].op if select.level in owners else None
        if isinstance(owner, Assign) and (left := _left_out(owner)):
            return f"nodes of level {select.level} leave out what {left}"
        alone = selection.type.dims[1] == "T"  # blocks of rows may choose their own entries
        long = alone and (select.size > 1 or isinstance(owner, Runs))
        if graph.meta.causal and long and not (select.last or select.tail):
            return f"level {select.level} does not force the own {'run' if owner else 'block'}"
        if isinstance(select, SelectSet) or select.within is None:
            return None
        selection = graph[selection.inputs[1]]


# --- costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Polynomial:
    """t2 * T^2 + t1 * T + t0, and terms of other powers: (power, factor)."""

    t2: float = 0.0
    t1: float = 0.0
    t0: float = 0.0
    others: tuple[tuple[float, float], ...] = ()

    def __add__(self, other: Polynomial) -> Polynomial:
        powers = sorted({power for power, _ in (*self.others, *other.others)})
        sums = [
            sum(factor for at, factor in (*self.others, *other.others) if at == power)
            for power in powers
        ]
        return Polynomial(
            t2=self.t2 + other.t2,
            t1=self.t1 + other.t1,
            t0=self.t0 + other.t0,
            others=tuple(zip(powers, sums, strict=True)),
        )

    def __mul__(self, factor: float) -> Polynomial:
        return Polynomial(
            t2=self.t2 * factor,
            t1=self.t1 * factor,
            t0=self.t0 * factor,
            others=tuple((power, one * factor) for power, one in self.others),
        )

    def evaluate(self, tokens: int) -> float:
        whole = (self.t2 * tokens + self.t1) * tokens + self.t0
        return whole + sum(factor * tokens**power for power, factor in self.others)

    def __str__(self) -> str:
        powers = {2.0: self.t2, 1.0: self.t1, 0.0: self.t0} | dict(self.others)
        names = {2.0: " T^2", 1.0: " T", 0.0: ""}
        terms = [
            (factor, names.get(power, f" T^{power:.4g}"))
            for power, factor in sorted(powers.items(), reverse=True)
        ]
        shown = [
            f"{value:+}"[0] + f" {quantity(abs(value))}{power}" for value, power in terms if value
        ]
        text = " ".join(shown)
        return text.removeprefix("+ ") or "0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A count as a function of T: each piece holds from its start on, to the start of the next."""

    pieces: tuple[tuple[int, Polynomial], ...] = ((0, Polynomial()),)

    def __add__(self, other: Cost) -> Cost:
        starts = sorted({start for start, _ in (*self.pieces, *other.pieces)})
        return Cost(pieces=tuple((start, self._at(start) + other._at(start)) for start in starts))

    def __mul__(self, factor: float) -> Cost:
        return Cost(pieces=tuple((start, piece * factor) for start, piece in self.pieces))

    def _at(self, tokens: int) -> Polynomial:
        return [piece for start, piece in self.pieces if start <= tokens][-1]

    @property
    def start(self) -> int:
        """The T from which on the count is the polynomial that prints."""
        return self.pieces[-1][0]

    def evaluate(self, tokens: int) -> float:
        return self._at(tokens).evaluate(tokens)

    def __str__(self) -> str:
        return str(self.pieces[-1][1])


ZERO = Cost()
LENGTHS = (8192, 32768, 131072)  # tokens at which totals are told


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCost:
    """One operator alone: its arithmetic, and its operands and result moved once each."""

    flops: Cost
    bytes: Cost

    def __add__(self, other: NodeCost) -> NodeCost:
        return NodeCost(flops=self.flops + other.flops, bytes=self.bytes + other.bytes)

    def __mul__(self, factor: float) -> NodeCost:
        return NodeCost(flops=self.flops * factor, bytes=self.bytes * factor)


def costs(graph: Graph) -> Mapping[str, NodeCost]:
    """What each node costs at batch 1 and S = T, were it alone.

    A multiplication and an addition count one each; softmax inside an attend, comparisons and
    scaling count nothing.  Inputs are taken as 16 bits wide.  Causal specs count visible pairs.
    """
    if unbound := unbound_sizes(graph):
        raise GraphError(f"costs need {', '.join(unbound)}: the spec leaves heads or head_dim open")
    counts = _Counts(graph=graph, partitions=partitions(graph), asked=_asked(graph))
    return {
        node.name: NodeCost(flops=_flops(counts, node), bytes=_bytes(counts, node))
        for node in graph.nodes()
    }


def total(graph: Graph) -> NodeCost:
    """What all nodes cost together, each alone: bytes of what passes between two count twice.

    Of ways that a table gives to layers or heads, the mean; of others, the one that costs most.
    """
    found = costs(graph)
    shares = _shares_of_ways(graph)
    sums = {
        way: _sum(found[node.name] for node in graph.nodes() if _way_of(node) == way)
        for way in (None, *shares)
    }
    if all(share is None for share in shares.values()):
        most = max(shares, key=lambda way: sums[way].flops.evaluate(LENGTHS[-1]), default=None)
        shares = {way: float(way == most) for way in shares}
    return sums[None] + _sum(sums[way] * (share or 0.0) for way, share in shares.items())


def _sum(found: Iterable[NodeCost]) -> NodeCost:
    return sum(found, NodeCost(flops=ZERO, bytes=ZERO))


def _way_of(node: Node) -> str | None:
    """The way on which an operator is there; None: on all."""
    return node.op.when if isinstance(node.op, Select | SelectSet | Attend) else None


def _shares_of_ways(graph: Graph) -> dict[str, float | None]:
    """What part of all layers or heads takes each way; None where the call decides."""
    routes = [node.op for node in graph.nodes() if isinstance(node.op, Route)]
    return {
        way: route.places.count(i) / len(route.places) if route.repeats else None
        for route in routes
        for i, way in enumerate(route.ways)
    }


def unbound_sizes(graph: Graph) -> tuple[str, ...]:
    """The heads and head dims that the graph uses and nobody has bound yet."""
    used = {dim for node in graph.nodes() for dim in node.type.dims}
    return tuple(dim for dim in FIXED_SIZES if dim in used and dim not in graph.sizes)


def dense(graph: Graph) -> NodeCost:
    """Dense attention of the same heads and causality: q, k, v read once, o written once."""
    sizes = graph.sizes
    per_pair = 2 * sizes["Hq"] * (sizes["Dqk"] + sizes["Dv"])
    moved = (sizes["Hq"] + sizes["Hkv"]) * (sizes["Dqk"] + sizes["Dv"])
    return NodeCost(
        flops=_complete_pairs(1, 1, causal=graph.meta.causal) * per_pair,
        bytes=_from(0, Polynomial(t1=BYTES["input"] * moved)),
    )


WORD = 32  # entries that one word of a bitmap row holds
BYTES: Mapping[DType, int] = {"input": 2, "f32": 4, "i32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counts:
    """How many of each thing a graph has, as functions of T."""

    graph: Graph
    partitions: Mapping[str, tuple[int, int]]  # level -> size, stride
    asked: Mapping[str, int]  # node -> of how many rows it is wanted, where it is not all

    def of(self, node: Node) -> Cost:
        """Numbers in the result of a node, of the rows of which it is wanted; at most."""
        if node.name not in self.asked:
            return self.elements(node.type)
        one = ["1" if dim == "T" else dim for dim in node.type.dims]
        return self.elements(replace(node.type, dims=tuple(one))) * self.asked[node.name]

    def reach(self, level: str) -> tuple[int, int]:
        """Tokens from an entry's place to its end, by which it is complete, and the stride.

        Runs may be as short as one token, those that are found as the span that they are found by.
        """
        size, stride = self.partitions[level]
        owner = assigned(self.graph).get(level)
        if owner is not None and isinstance(owner.op, Runs):
            return owner.op.span or 1, owner.op.span or 1
        return size - befores(self.graph).get(level, 0), stride

    def entries(self, level: str) -> Cost:
        """Entries of a level, all whole."""
        size, stride = self.reach(level)
        if level in anchors(self.graph):
            return self.complete(level)  # every row has its own
        if stride == 0:
            return _from(0, Polynomial(t0=self.graph.sizes[f"N_{level}"]))
        return _from(size, Polynomial(t1=1 / stride, t0=1 - size / stride))

    def complete(self, level: str, rows: str = "T") -> Cost:
        """Pairs of a row, or of rows that choose together, and an entry that counts for it.

        About, where entries lie behind each row.
        """
        causal, (size, stride) = self.graph.meta.causal, self.reach(level)
        if behind := anchors(self.graph).get(level):
            power = 1 / behind.power  # sum over rows of the root, less a half, less those left out
            some = Polynomial(t1=0.5 - behind.first, others=((1 + power, 1 / (1 + power)),))
            return _from(behind.first**behind.power, some)
        if rows.isdecimal():
            return self.entries(level) * int(rows)
        block = block_of(rows)
        if stride == 0:
            return _from(0, Polynomial(t1=self.graph.sizes[f"N_{level}"] / (block or 1)))
        if block is None:
            return _complete_pairs(size, stride, causal=causal)
        part = 0.5 if causal else 1.0
        own = 0.5 / min(block, stride) if causal else 0.0
        return _from(0, Polynomial(t2=part / (block * stride), t1=own))

    def tokens(self, rows: str) -> Cost:
        """Pairs of a row, or of rows that choose together, and a token that counts for it."""
        causal, block = self.graph.meta.causal, block_of(rows) or 1
        if rows.isdecimal():
            return _from(0, Polynomial(t1=float(rows)))
        pairs = Polynomial(t2=0.5 / block, t1=0.5) if causal else Polynomial(t2=1.0 / block)
        return _from(0, pairs)

    def children(self, level: str, rows: str = "T") -> Cost:
        """Pairs of a row, or of rows that choose together, and a complete entry inside the beam."""
        beam = self.graph[_score_of(self.graph, level).inputs[-1]]
        assert isinstance(beam.op, Select)
        owner = assigned(self.graph).get(level)
        each = 1 / (block_of(rows) or 1)
        if owner is not None and isinstance(owner.op, Assign):
            return _from(0, Polynomial(t1=beam.op.width * owner.op.branching)) * each
        if beam.op.size == 0:
            return self.selected(beam) * each
        whole = 1 / self.partitions[level][0]
        begun = (1 - whole) / 2 if beam.op.last > 0 else 0.0  # the own entry's, on average
        return (self.selected(beam) * whole + _from(0, Polynomial(t1=-begun))) * each

    def selected(self, selection: Node) -> Cost:
        """Pairs of a row and a raw token of the entries it selects; at most, where they overlap.

        Of a selection whose counts the data decide, what it may be at most: all that is visible.
        """
        op = selection.op
        if isinstance(op, Recall) and "all" not in op.takes and "own" in op.takes:
            return self.selected(self.graph[selection.inputs[0]])
        if isinstance(op, Recall):
            return _complete_pairs(1, 1, causal=self.graph.meta.causal)
        if isinstance(op, SelectSet):
            if op.of == "all":
                return _pairs_of_part(op.value, causal=self.graph.meta.causal)
            if op.scope == "entry":
                return self._taken(op)
            if op.rule in ("top_k", "tokens"):  # of heads together: a head's share
                slots = int(op.value) * (op.size if op.rule == "top_k" else 1)
                return _selected_pairs(slots, own=1, causal=self.graph.meta.causal)
            part = op.value if op.rule == "fraction" else 1.0
            return _complete_pairs(1, 1, causal=self.graph.meta.causal) * part
        assert isinstance(op, Select)
        if op.size == 0:
            return self._assigned(op)
        block = block_of(selection.type.dims[1]) or 1
        own = max(op.size, block) if op.last > 0 else op.size + 2 if op.tail else block
        return _selected_pairs(op.width * op.size, own=own, causal=self.graph.meta.causal)

    def merged(self, selection: Node) -> Cost:
        """Pairs of a row and a mean that it attends, in tiers; at most, where masses decide."""
        op, pairs = selection.op, _complete_pairs(1, 1, causal=self.graph.meta.causal)
        assert isinstance(op, SelectSet)
        assert op.tiers is not None
        if op.tiers.by == "mass":
            return pairs
        parts = [0, *(part for _, part, _ in op.tiers.steps)]
        means = [(part - parts[i]) / merge for i, (merge, part, _) in enumerate(op.tiers.steps)]
        return pairs * (sum(means) / (1 << 30))

    def _assigned(self, op: Select) -> Cost:
        """Tokens of selected nodes with room for so many; of others all that is visible."""
        owner, causal = assigned(self.graph).get(op.level), self.graph.meta.causal
        if owner is None or not isinstance(owner.op, Assign) or owner.op.capacity is None:
            return _complete_pairs(1, 1, causal=causal)
        part = min(1.0, op.width * owner.op.capacity / owner.op.nodes)
        return _pairs_of_part(part, causal=causal)

    def _taken(self, op: SelectSet) -> Cost:
        """Each entry takes so many rows; a node that takes its tokens has no more of those."""
        owner, rows = assigned(self.graph).get(op.level), int(op.value)
        if owner is None or not isinstance(owner.op, Assign) or owner.op.takes is None:
            return _complete_pairs(1, 1, causal=self.graph.meta.causal)
        pairs = owner.op.nodes * rows * owner.op.takes
        return _from(max(rows, owner.op.takes), Polynomial(t0=pairs))

    def kept(self, level: str, selection: Node) -> Cost:
        """Pairs of a row and a complete entry of a level that it selects; at most."""
        op, complete = selection.op, self.complete(level)
        if isinstance(op, SelectSet):
            return complete * (op.value if op.rule == "fraction" else 1.0)
        assert isinstance(op, Select)
        if not self.graph.meta.causal:
            return _at_most_a_row(complete, op.width, full=0)
        size, stride = self.reach(level)
        return _at_most_a_row(complete, op.width, full=op.width * stride + size - stride)

    def elements(self, type_: TensorType) -> Cost:
        """Numbers in a value; of scores those that exist: visible, and inside a beam."""
        if len(type_.dims) < 2:  # a loss, the number of a call, a parameter of heads or channels
            known = tuple(dim for dim in type_.dims if dim not in ("B", "Z"))
            return _from(0, Polynomial(t0=1.0)) * self.product(known)
        dims, last = type_.dims, type_.dims[-1]
        if last.startswith("C_"):
            return self.children(last.removeprefix("C_"), dims[1]) * self.product(dims[2:-1])
        if last.startswith("W_"):
            _, stride = self.reach(last.removeprefix("W_"))
            block = block_of(dims[1]) or 1
            if stride == 0:
                words = -(-self.graph.sizes[f"N_{last.removeprefix('W_')}"] // WORD)
                fixed = dims[1].isdecimal()
                each = (
                    Polynomial(t0=words * int(dims[1])) if fixed else Polynomial(t1=words / block)
                )
            elif dims[1].isdecimal():
                each = Polynomial(t1=int(dims[1]) / (WORD * stride))
            else:
                each = Polynomial(t2=1 / (WORD * stride * block))
            return _from(0, each) * self.product(dims[2:-1])
        if last.startswith("N_"):
            return self.complete(last.removeprefix("N_"), dims[1]) * self.product(dims[2:-1])
        if len(dims) > 1 and dims[1].startswith("N_"):
            return self.entries(dims[1].removeprefix("N_")) * self.product(dims[2:])
        rows = [1 / (block_of(dim) or 1) for dim in dims if dim in ("T", "S") or block_of(dim)]
        unit = Polynomial(t1=rows[0]) if rows else Polynomial(t0=1.0)
        rest = tuple(dim for dim in dims if dim not in ("B", "T", "S", "Z") and not block_of(dim))
        return _from(0, unit) * self.product(rest)

    def product(self, dims: tuple[str, ...]) -> int:
        sizes = self.graph.sizes
        factors = [factor for dim in dims for factor in dim.split("*")]
        return math.prod(int(dim) if dim.isdecimal() else sizes[dim] for dim in factors)

    def moved(self, type_: TensorType) -> Cost:
        return self.elements(type_) * BYTES[type_.dtype]


def _asked(graph: Graph) -> Mapping[str, int]:
    """Of how many rows steps of a score are wanted, where the last rows of a prompt are all of them."""
    found: dict[str, int] = {}
    for node in reversed(graph.nodes()):
        op, wanted = node.op, {_wanted_by(user, found) for user in graph.users(node.name)}
        of_score = isinstance(op, Score | Normalise | Reduce) or (
            isinstance(op, LogSumExp) and isinstance(graph[node.inputs[0]].op, Score)
        )
        if of_score and len(wanted) == 1 and (rows := wanted.pop()) is not None:
            found[node.name] = rows
    return found


def _wanted_by(user: Node, found: Mapping[str, int]) -> int | None:
    return user.op.last if isinstance(user.op, ReduceRows) else found.get(user.name)


def _score_of(graph: Graph, level: str) -> Node:
    return next(x for x in graph.nodes() if isinstance(x.op, Score) and x.op.level == level)


def _from(start: int, piece: Polynomial) -> Cost:
    """Nothing below `start`."""
    return Cost(pieces=((0, piece),) if start == 0 else ((0, Polynomial()), (start, piece)))


def _complete_pairs(size: int, stride: int, *, causal: bool) -> Cost:
    """Row p has (p + 1 - size) // stride + 1 complete entries; exact where stride divides T."""
    if not causal:
        return _from(size, Polynomial(t2=1 / stride, t1=1 - size / stride))
    late, rest = size - 1, (1 - size) % stride
    # with m = T - late rows, m = rest mod stride as if stride divides T, the sum over rows is
    # (m^2 - rest^2) / (2 stride) + (m + rest) / 2
    return _from(
        late + rest,
        Polynomial(
            t2=1 / (2 * stride),
            t1=1 / 2 - late / stride,
            t0=(late * late - rest * rest) / (2 * stride) + (rest - late) / 2,
        ),
    )


def _selected_pairs(slots: int, *, own: int, causal: bool) -> Cost:
    """Tokens of a full selection; a row with fewer before it takes all.

    slots: tokens the selection has room for.  own: size of the own block where it is forced: only
    (own + 1) / 2 of its tokens are at or before the row, on average.
    """
    if not causal:
        return Cost(pieces=((0, Polynomial(t2=1.0)), (slots, Polynomial(t1=slots))))
    a_row = slots - (own - 1) / 2
    early = slots * (slots + 1) / 2
    return Cost(
        pieces=(
            (0, Polynomial(t2=0.5, t1=0.5)),
            (slots, Polynomial(t1=a_row, t0=early - slots * a_row)),
        )
    )


def _at_most_a_row(pairs: Cost, most: int, *, full: int) -> Cost:
    """The pairs of early rows, and `most` of each row from row `full` on."""
    early = pairs.evaluate(full)
    late = Polynomial(t1=most, t0=early - most * full)
    return Cost(pieces=(*(p for p in pairs.pieces if p[0] < full), (full, late)))


def _selection_of(graph: Graph, attend: Node) -> Node | None:
    """The selection that an attend reads, if it reads one."""
    chosen = (node for node in graph.operands(attend) if isinstance(node.op, Select | SelectSet))
    return next(chosen, None)


def _pairs_of_part(part: float, *, causal: bool) -> Cost:
    """Tokens of as many entries as are a part of all; a row with fewer before it takes all."""
    if not causal:
        return _from(0, Polynomial(t2=part))
    return _from(0, Polynomial(t2=part - part * part / 2, t1=part / 2))


def _window_pairs(window: int, *, causal: bool) -> Cost:
    if causal:
        return _selected_pairs(window, own=1, causal=True)
    both = Polynomial(t1=2 * window - 1, t0=-window * (window - 1))
    return Cost(pieces=((0, Polynomial(t2=1.0)), (window, both)))


def _flops(counts: _Counts, node: Node) -> Cost:
    graph, op = counts.graph, node.op
    operands = [operand.type for operand in graph.operands(node)]
    match op:
        case Input() | Select() | SelectSet() | Unlike() | Route() | Switch() | Union() | Recall():
            return _choice_flops(counts, op, operands)
        case Cluster() | Permute() | Assign() | Runs():
            return _order_flops(counts, op, operands)
        case Carry() | Distance() | Divergence() | Entropies():
            return _calls_flops(counts, op, operands)
        case Pool():
            if op.size == 0:  # every token is in one cluster or run, and centroids have a length
                return counts.elements(operands[0]) * (3 if op.how == "centroid" else 1)
            return _pool_flops(counts, node, op)
        case Score():
            return _score_flops(counts, node, op, operands)
        case LogSumExp():
            own_pass = isinstance(graph[node.inputs[0]].op, Score)  # else a by-product
            return counts.of(graph[node.inputs[0]]) * (2 if own_pass else 0)
        case Normalise() | Reduce() | ReduceRows() | PoolRows() | PoolHeads():
            return counts.of(graph[node.inputs[0]]) * (2 if isinstance(op, Normalise) else 1)
        case Map():
            return counts.elements(node.type) * (0 if op.how == "upsample" else 2 * len(op.taps))
        case Attend():
            per_pair = (
                2 * counts.product(("Hq",)) * (counts.product(("Dqk",)) + counts.product(("Dv",)))
            )
            return _attended_pairs(counts, node, op) * per_pair
        case Gate():
            return counts.elements(node.type) * (2 * max(1, len(operands) - 1))
        case OutputGate() | Round() | Norm() | Rotate() | Delta():
            return counts.elements(node.type) * _per_number(counts, node, op)
        case _:
            assert_never(op)


def _choice_flops(counts: _Counts, op: Op, operands: list[TensorType]) -> Cost:
    """Comparisons count nothing; a walk has logits, a divergence quotients, logarithms and products."""
    match op:
        case SelectSet(rule="early_stop"):
            pairs = _complete_pairs(1, 1, causal=counts.graph.meta.causal)  # at most all, once
            return pairs * (2 * counts.product(("Hq", "Dqk")))
        case Unlike():  # lengths, unit vectors and their sums
            return sum((counts.elements(each) * 4 for each in operands), ZERO)
        case Route(divergence=float()):
            return sum((counts.elements(each) * 4 for each in operands), ZERO)
        case _:
            return ZERO


def _calls_flops(
    counts: _Counts, op: Carry | Distance | Divergence | Entropies, operands: list[TensorType]
) -> Cost:
    """Sums over numbers; of attention that is learned from, its logits; of a tree, its cosines."""
    if isinstance(op, Entropies):
        sides = [*operands[0::3], *operands[1::3]]
        each = zip(sides, (*op.branching, *op.branching), strict=True)
        return sum((counts.elements(x) * (2 * n + 3) for x, n in each), ZERO)
    dense = 2 * counts.product(("Hq", "Dqk")) if isinstance(op, Divergence) else 0
    pairs = _complete_pairs(1, 1, causal=counts.graph.meta.causal)  # what is learned from
    return pairs * dense + counts.elements(operands[0])


def _score_flops(counts: _Counts, node: Node, op: Score, operands: list[TensorType]) -> Cost:
    """Dots of pairs.  Of codes a comparison and an addition a run, once both are encoded."""
    if op.form in ("bias", "given"):
        return _from(0, Polynomial())  # what a key has already
    rows, heads, dim = operands[0].dims[1:]
    asked = counts.asked.get(node.name)
    pairs = (
        counts.children(op.level, rows)
        if op.within is not None
        else counts.complete(op.level, "1" if asked else rows) * (asked or 1)
    )
    pairs = pairs * counts.product((heads,))
    if op.codes is not None:  # encoding is a distance to every codeword
        query, keys, codebook = operands[:3]
        encoded = (counts.elements(query) + counts.elements(keys)) * (3 * op.codes.words)
        return encoded + pairs * (2 * int(codebook.dims[0]))
    if op.form == "pooling_error":  # every visible token against its entry, values as well
        all_pairs = counts.tokens(rows)
        dims = ("Dqk", "Dv") if any("Dv" in x.dims for x in operands) else ("Dqk",)
        each = 2 * sum(counts.product((dim,)) for dim in dims)
        return all_pairs * counts.product((heads,)) * each
    halved = 2 * (op.size // op.halves.until).bit_length() - 2 if op.halves else 1  # two a time
    dots = 2 if op.form == "bound" else halved
    sums = {"relu_weighted": 2, "relu_sum": 1}.get(op.form, 0)
    return pairs * (dots * 2 * counts.product((dim,)) + sums)


def _per_number(
    counts: _Counts, node: Node, op: OutputGate | Round | Norm | Rotate | Delta
) -> float:
    """What is done to each number of a vector; only some channels are turned."""
    match op:
        case OutputGate() | Round():
            return 2
        case Delta():
            return 3  # a difference, a comparison, a sum
        case Norm():
            return 4
        case Rotate():
            return 3 * op.dims / counts.product(node.type.dims[-1:])
        case _:
            assert_never(op)


def _pool_flops(counts: _Counts, node: Node, op: Pool) -> Cost:
    """A gated token costs a weighted sum and the softmax's two sums, of exponents and of weights."""
    dim = counts.product(node.type.dims[-1:])
    first = counts.graph[node.inputs[1]].type if len(node.inputs) > 1 else None
    added = op.size * op.position
    match op.how:
        case "linear":
            a_number = 2 * op.size * dim + added
        case "mlp":
            assert first is not None
            hidden = counts.product(first.dims[-1:])
            a_number = (2 * op.size * hidden + 2 * hidden) + added
        case "max_min_mean":
            a_number = 3 * op.size + 6 * dim
        case "gated":
            a_number = 4 * op.size + added
        case "sample":
            a_number = 0  # a choice by position
        case _:
            a_number = op.size
    return counts.elements(node.type) * a_number


def _order_flops(
    counts: _Counts, op: Cluster | Permute | Assign | Runs, operands: list[TensorType]
) -> Cost:
    """Distances and means, over and over; masses of the last rows, or products with means.

    Of a node its length and the cosines with those among which it goes; of runs two running means a
    token and their cosine.
    """
    if isinstance(op, Assign):
        return counts.elements(operands[0]) * (2 * op.branching + 3)
    if isinstance(op, Runs):
        return counts.elements(operands[0]) * (10 if op.span else 0)
    if isinstance(op, Cluster):
        return counts.elements(operands[0]) * ((3 * op.clusters + 1) * (op.iterations or 0))
    if op.by == "mass":
        return _from(0, Polynomial(t1=2 * counts.product(("Hq", "Dqk")) * (op.last or 0)))
    return counts.elements(operands[0]) * (3 if op.by == "mean" else 0)


def _attended_pairs(counts: _Counts, node: Node, op: Attend) -> Cost:
    """Pairs of a row and a key it attends to."""
    match op.over:
        case "blocks" | "tokens":
            return counts.selected(counts.graph[node.inputs[3]])
        case "tiers":
            return counts.merged(counts.graph[node.inputs[3]])
        case "spans":
            return _span_pairs(counts, node, op)
        case "pooled":
            level = counts.graph[node.inputs[1]].type.dims[1].removeprefix("N_")
            chosen = _selection_of(counts.graph, node)
            if chosen is None or op.which is not None:  # at most
                rows = counts.graph[node.inputs[0]].type.dims[1]  # several may attend as one
                return counts.complete(level, rows)
            return counts.kept(level, chosen)
        case "window":
            assert op.window is not None
            return _window_pairs(op.window, causal=counts.graph.meta.causal)
        case "static" if op.pattern and op.pattern.axes and op.pattern.without_units:
            slots = math.prod(axis.window for axis in op.pattern.axes)
            return _selected_pairs(slots, own=1, causal=counts.graph.meta.causal)
        case "static" if op.pattern and (units := op.pattern.most_units) is not None:
            slots = units * op.size
            return _selected_pairs(slots, own=op.size, causal=counts.graph.meta.causal)
        case "static" | "all":  # of a pattern what it may be at most: all that is visible
            return _complete_pairs(1, 1, causal=counts.graph.meta.causal)
        case _:
            assert_never(op.over)


def _span_pairs(counts: _Counts, node: Node, op: Attend) -> Cost:
    """Spans as long as they may be, of as many anchors as there is room for, and its window in each."""
    spans, select = op.spans, counts.graph[node.inputs[3]].op
    assert spans is not None
    if not isinstance(select, Select):
        return _complete_pairs(1, 1, causal=True)
    long = (1 + spans.power, select.width * spans.factor / (1 + spans.power))
    return _from(0, Polynomial(t1=select.width * (1 + spans.window), others=(long,)))


def _bytes(counts: _Counts, node: Node) -> Cost:
    """Operands read once and the result written once."""
    match node.op:
        case Input():
            return _from(0, Polynomial())
        case LogSumExp() if not isinstance(counts.graph[node.inputs[0]].op, Score):
            return counts.moved(node.type)  # a by-product of what writes its operand
        case _:
            moved = [*counts.graph.operands(node), node]
            return sum((counts.of(each) * BYTES[each.type.dtype] for each in moved), ZERO)


# --- the text of `show`


def quantity(value: float) -> str:
    """Three digits and a unit prefix: 1.57M."""
    for prefix in ("", "K", "M", "G", "T", "P"):
        if abs(value) < 999.5:
            return f"{value:.3g}{prefix}"
        value /= 1000
    return f"{value:.3g}E"


def describe(graph: Graph) -> str:
    """Everything the graph says, as text: laws, inputs, operators, costs where sizes are bound."""
    sections = [
        _header(graph),
        _laws_text(graph),
        _inputs_text(graph),
        ["graph", *_indent_dump(graph)],
    ]
    unbound = unbound_sizes(graph)
    if unbound:
        sections.append([f"costs: known once {', '.join(unbound)} are bound (heads, head_dim)"])
    else:
        sections += [_costs_text(graph), _totals_text(graph)]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _header(graph: Graph) -> list[str]:
    meta = graph.meta
    means = {
        "token": "row t depends on tokens up to t",
        "query_block": "row t depends on tokens up to the end of its query block",
        "prompt": "row t depends on statistics of the whole prompt",
        "none": "row t depends on every token",
    }
    title = f"{meta.name}, {meta.source}" if meta.source else meta.name
    return [title, f"causality: {causality_text(graph)} ({means[causality(graph)]})"]


def _laws_text(graph: Graph) -> list[str]:
    found = laws(graph)
    pooled = _pooled_attends(graph)
    not_causal = f"causality is {causality_text(graph)}"
    rows = [
        ("every entry selected gives dense attention", not_dense_because(graph)),
        (
            "values that are not selected have no effect",
            f"branch {pooled[0]} attends pooled values" if pooled else None,
        ),
        (
            "tokens after t never change row t",
            None if found.future_never_changes_the_past else not_causal,
        ),
        (
            "decode step t equals row t of prefill",
            None
            if found.decode_equals_prefill_row
            else "a step takes over what earlier ones chose"
            if _recalls(graph, over="steps")
            else not_causal,
        ),
    ]
    cells = [
        ("  yes" if why is None else "  no", law, f"({why})" if why else "") for law, why in rows
    ]
    return ["laws", *align(cells)]


def _inputs_text(graph: Graph) -> list[str]:
    cells = [
        (f"  {x.name}", _bound_text(graph, x.type, named=True), x.about)
        for x in tensor_inputs(graph)
    ]
    return ["inputs", *align(cells)]


def _bound_text(graph: Graph, type_: TensorType, *, named: bool = False) -> str:
    """A type with the sizes that are known in place of their names."""
    dims = [str(graph.sizes.get(dim, dim)) for dim in type_.dims]
    if named and type_.dims != tuple(dims):
        return f"[{', '.join(type_.dims)}] = [{', '.join(dims)}]"
    return f"[{', '.join(dims)}]" if named else f"{type_.dtype}[{', '.join(dims)}]"


def _indent_dump(graph: Graph) -> list[str]:
    """The operators of the dump; the inputs have a section of their own."""
    lines = dump(graph).splitlines()[1:]
    return [f"  {line}" for line in lines if "= input(" not in line]


def _costs_text(graph: Graph) -> list[str]:
    cells = [("  operator", "result", "FLOPs", "bytes")]
    found = costs(graph)
    cells += [
        (
            f"  %{node.name}",
            _bound_text(graph, node.type),
            str(found[node.name].flops),
            str(found[node.name].bytes),
        )
        for node in graph.nodes()
        if not isinstance(node.op, Input)
    ]
    early = befores(graph)
    start = max(cost.flops.start for cost in found.values())
    head = f"costs of each operator alone, batch 1, S = T >= {start}, 16-bit inputs"
    entries = [
        f"N_{level} = {_entries_text(size - early.get(level, 0), stride, causal=graph.meta.causal)}"
        for level, (size, stride) in sorted(partitions(graph).items())
        if stride and level not in anchors(graph)
    ]
    entries += [
        f"N_{level} = floor(S^(1/{behind.power})) - {behind.first - 1}"
        for level, behind in sorted(anchors(graph).items())
    ]
    where = [f"  where {', '.join(entries)}"] if entries else []
    loose = ", ".join(f"%{name}" for name in at_most(graph))
    last = [f"  {loose}: at most, as if every token were kept"] if loose else []
    if any(isinstance(node.op, Route) for node in graph.nodes()):
        last.append(
            "  each way as if all took it; totals: the mean of a table, or the costliest way"
        )
    return [head, *align(cells), *where, *last]


def at_most(graph: Graph) -> tuple[str, ...]:
    """The operators whose costs are only bounded: what a rule, pattern or route leaves is not known.

    So are scores of runs, as short as they can be, and of tokens in nodes of any number of them.
    """
    return tuple(node.name for node in graph.nodes() if _only_bounded(graph, node))


def _only_bounded(graph: Graph, node: Node) -> bool:
    match node.op:
        case Score(cut=cut, size=size):
            return cut == "runs" or (cut is not None and size > 0)
        case Attend() as op:
            return (
                _pattern_varies(op)
                or (op.over == "pooled" and len(node.inputs) > 3)
                or _shares_of_ways(graph).get(op.when or "", 1.0) is None
                or op.spans is not None
                or any(_varies(x) for x in graph.operands(node))
            )
        case _:
            return False


def _pattern_varies(op: Attend) -> bool:
    """Whether rows of a pattern see more or less than their windows' lengths say."""
    pattern = op.pattern
    if pattern is None or not (pattern.axes and pattern.without_units):
        return pattern is not None
    return any(axis.causal for axis in pattern.axes)


def _varies(node: Node) -> bool:
    if isinstance(node.op, Select):
        return node.op.size == 0  # clusters have any number of tokens
    if isinstance(node.op, Recall):
        return "all" in node.op.takes
    if isinstance(node.op, SelectSet) and node.op.tiers is not None:
        return node.op.tiers.by == "mass"
    if isinstance(node.op, SelectSet) and node.op.scope == "entry":
        return True
    varying = ("threshold", "top_p", "early_stop", "budget_from")
    return isinstance(node.op, SelectSet) and node.op.rule in varying


def _entries_text(size: int, stride: int, *, causal: bool) -> str:
    if size == stride == 1:
        return "S"
    if size == stride:
        return f"S // {size}" if causal else f"ceil(S / {size})"
    return f"(S - {size}) // {stride} + 1"


def _totals_text(graph: Graph) -> list[str]:
    whole = total(graph)
    must, full = must_move(graph), dense(graph)
    cells = [
        ("  T", "FLOPs", "dense FLOPs", "dense / this", "bytes in and out", "bytes, each alone")
    ]
    for tokens in LENGTHS:
        flops, dense_flops = whole.flops.evaluate(tokens), full.flops.evaluate(tokens)
        cells.append(
            (
                f"  {tokens}",
                quantity(flops),
                quantity(dense_flops),
                f"{dense_flops / flops:.1f}x",
                quantity(must.evaluate(tokens)),
                quantity(whole.bytes.evaluate(tokens)),
            )
        )
    return ["totals against dense attention", *align(cells)]


def must_move(graph: Graph) -> Cost:
    """Bytes that no fusion avoids: the caller's tensors read once, the outputs written once."""
    inputs = [node.name for node in graph.nodes() if isinstance(node.op, Input)]
    return moved(graph, dict.fromkeys((*inputs, *graph.outputs.names())))


def moved(graph: Graph, names: Iterable[str], *, input_bytes: int = BYTES["input"]) -> Cost:
    """Bytes of some values, each moved once; `input_bytes` of a number in the caller's dtype."""
    counts = _Counts(graph=graph, partitions=partitions(graph), asked={})
    types = [graph[name].type for name in names]
    sizes = {**BYTES, "input": input_bytes}
    return sum((counts.elements(type_) * sizes[type_.dtype] for type_ in types), ZERO)
