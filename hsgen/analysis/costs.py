"""What operators cost, one by one and together, and of which that is only a bound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hsgen.analysis.calls import FRESH, computed, shares
from hsgen.analysis.counts import BYTES, Counts, asked, chosen_of, complete_pairs
from hsgen.analysis.polynomials import ZERO, Cost, Polynomial, piece_from
from hsgen.analysis.work import bytes_of, flops_of
from hsgen.graph import (
    FIXED_SIZES,
    Attend,
    Graph,
    GraphError,
    Input,
    Node,
    Recall,
    Route,
    Score,
    Select,
    SelectSet,
    partitions,
)

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
    """What each node costs at batch 1 and S = T, were it alone; where calls differ, of one that chooses.

    A multiplication and an addition count one each; softmax inside an attend, comparisons and
    scaling count nothing.  Inputs are taken as 16 bits wide.  Causal specs count visible pairs.
    """
    return _costs(graph, FRESH)


def _costs(graph: Graph, turn: int) -> Mapping[str, NodeCost]:
    if unbound := unbound_sizes(graph):
        raise GraphError(f"costs need {', '.join(unbound)}: the spec leaves heads or head_dim open")
    counts = Counts(graph=graph, partitions=partitions(graph), asked=asked(graph), turn=turn)
    return {
        node.name: NodeCost(flops=flops_of(counts, node), bytes=bytes_of(counts, node))
        for node in graph.nodes()
    }


def total(graph: Graph, times: Mapping[str, float] | None = None) -> NodeCost:
    """What all nodes cost together, each alone: bytes of what passes between two count twice.

    times: How often a node counts; without a word of it, not at all.  None: each once.

    Of calls that choose or take over by a pattern, the mean; without a pattern, of one that chooses.
    Of ways that a table gives to layers or heads, the mean; of others, the one that costs most.
    """
    every = dict.fromkeys((node.name for node in graph.nodes()), 1.0) if times is None else times
    return _sum(_total_of(graph, turn, every) * share for turn, share in shares(graph).items())


def _total_of(graph: Graph, turn: int, times: Mapping[str, float]) -> NodeCost:
    """Of a call of one kind."""
    found, names = _costs(graph, turn), computed(graph, turn)
    nodes = [node for node in graph.nodes() if node.name in names and node.name in times]
    parts = _shares_of_ways(graph)
    sums = {
        way: _sum(found[node.name] * times[node.name] for node in nodes if _way_of(node) == way)
        for way in (None, *parts)
    }
    if all(part is None for part in parts.values()):
        most = max(parts, key=lambda way: sums[way].flops.evaluate(LENGTHS[-1]), default=None)
        parts = {way: float(way == most) for way in parts}
    return sums[None] + _sum(sums[way] * (part or 0.0) for way, part in parts.items())


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
        flops=complete_pairs(1, 1, causal=graph.meta.causal) * per_pair,
        bytes=piece_from(0, Polynomial(t1=BYTES["input"] * moved)),
    )


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
                or any(_varies(graph, x) for x in graph.operands(node))
            )
        case _:
            return False


def _pattern_varies(op: Attend) -> bool:
    """Whether rows of a pattern see more or less than their windows' lengths say."""
    pattern = op.pattern
    if pattern is None or not (pattern.axes and pattern.without_units):
        return pattern is not None
    return any(axis.causal for axis in pattern.axes)


def _varies(graph: Graph, node: Node) -> bool:
    if isinstance(node.op, Select):
        return node.op.size == 0  # clusters have any number of tokens
    if isinstance(node.op, Recall) and node.op.width is not None:
        return node.op.width == 0 and node.op.part is None
    if isinstance(node.op, Recall):  # all that is visible is no bound
        takes = {node.op.takes[turn] for turn in shares(graph)}
        return takes != {"all"} and _varies(graph, chosen_of(graph, node.op))
    if isinstance(node.op, SelectSet) and node.op.tiers is not None:
        return node.op.tiers.by == "mass"
    if isinstance(node.op, SelectSet) and node.op.scope == "entry":
        return True
    varying = ("threshold", "top_p", "early_stop", "budget_from")
    return isinstance(node.op, SelectSet) and node.op.rule in varying


def must_move(graph: Graph) -> Cost:
    """Bytes that no fusion avoids: the caller's tensors read once, the outputs written once.

    Of calls as in `total`.
    """
    inputs = [node.name for node in graph.nodes() if isinstance(node.op, Input)]
    found = ZERO
    for turn, share in shares(graph).items():
        names = computed(graph, turn)
        read = [name for name in inputs if name in names]
        found += moved(graph, dict.fromkeys((*read, *graph.outputs.names()))) * share
    return found


def moved(graph: Graph, names: Iterable[str], *, input_bytes: int = BYTES["input"]) -> Cost:
    """Bytes of some values, each moved once; `input_bytes` of a number in the caller's dtype."""
    counts = Counts(graph=graph, partitions=partitions(graph), asked={})
    types = [graph[name].type for name in names]
    sizes = {**BYTES, "input": input_bytes}
    return sum((counts.elements(type_) * sizes[type_.dtype] for type_ in types), ZERO)
