"""The arithmetic of each operator, and the bytes that it reads and writes."""

from __future__ import annotations

import math
from typing import assert_never

from hsgen.analysis.counts import (
    BYTES,
    Counts,
    complete_pairs,
    selected_pairs,
    selection_of,
    window_pairs,
)
from hsgen.analysis.polynomials import ZERO, Cost, Polynomial, piece_from
from hsgen.graph import (
    Assign,
    Attend,
    Carry,
    Cluster,
    Delta,
    Distance,
    Divergence,
    Entropies,
    Gate,
    Input,
    LogSumExp,
    Map,
    Node,
    Norm,
    Normalise,
    Op,
    OutputGate,
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
)


def flops_of(counts: Counts, node: Node) -> Cost:
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


def _choice_flops(counts: Counts, op: Op, operands: list[TensorType]) -> Cost:
    """Comparisons count nothing; a walk has logits, a divergence quotients, logarithms and products."""
    match op:
        case SelectSet(rule="early_stop"):
            pairs = complete_pairs(1, 1, causal=counts.graph.meta.causal)  # at most all, once
            return pairs * (2 * counts.product(("Hq", "Dqk")))
        case Unlike():  # lengths, unit vectors and their sums
            return sum((counts.elements(each) * 4 for each in operands), ZERO)
        case Route(divergence=float()):
            return sum((counts.elements(each) * 4 for each in operands), ZERO)
        case _:
            return ZERO


def _calls_flops(
    counts: Counts, op: Carry | Distance | Divergence | Entropies, operands: list[TensorType]
) -> Cost:
    """Sums over numbers; of attention that is learned from, its logits; of a tree, its cosines."""
    if isinstance(op, Entropies):
        sides = [*operands[0::3], *operands[1::3]]
        each = zip(sides, (*op.branching, *op.branching), strict=True)
        return sum((counts.elements(x) * (2 * n + 3) for x, n in each), ZERO)
    dense = 2 * counts.product(("Hq", "Dqk")) if isinstance(op, Divergence) else 0
    pairs = complete_pairs(1, 1, causal=counts.graph.meta.causal)  # what is learned from
    return pairs * dense + counts.elements(operands[0])


def _score_flops(counts: Counts, node: Node, op: Score, operands: list[TensorType]) -> Cost:
    """Dots of pairs.  Of codes a comparison and an addition a run, once both are encoded."""
    if op.form in ("bias", "given"):
        return piece_from(0, Polynomial())  # what a key has already
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
    counts: Counts, node: Node, op: OutputGate | Round | Norm | Rotate | Delta
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


def _pool_flops(counts: Counts, node: Node, op: Pool) -> Cost:
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
    counts: Counts, op: Cluster | Permute | Assign | Runs, operands: list[TensorType]
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
        return piece_from(0, Polynomial(t1=2 * counts.product(("Hq", "Dqk")) * (op.last or 0)))
    return counts.elements(operands[0]) * (3 if op.by == "mean" else 0)


def _attended_pairs(counts: Counts, node: Node, op: Attend) -> Cost:
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
            chosen = selection_of(counts.graph, node)
            if chosen is None or op.which is not None:  # at most
                rows = counts.graph[node.inputs[0]].type.dims[1]  # several may attend as one
                return counts.complete(level, rows)
            return counts.kept(level, chosen)
        case "window":
            assert op.window is not None
            return window_pairs(op.window, causal=counts.graph.meta.causal)
        case "static" if op.pattern and op.pattern.axes and op.pattern.without_units:
            slots = math.prod(axis.window for axis in op.pattern.axes)
            return selected_pairs(slots, own=1, causal=counts.graph.meta.causal)
        case "static" if op.pattern and (units := op.pattern.most_units) is not None:
            slots = units * op.size
            return selected_pairs(slots, own=op.size, causal=counts.graph.meta.causal)
        case "static" | "all":  # of a pattern what it may be at most: all that is visible
            return complete_pairs(1, 1, causal=counts.graph.meta.causal)
        case _:
            assert_never(op.over)


def _span_pairs(counts: Counts, node: Node, op: Attend) -> Cost:
    """Spans as long as they may be, of as many anchors as there is room for, and its window in each."""
    spans, select = op.spans, counts.graph[node.inputs[3]].op
    assert spans is not None
    if not isinstance(select, Select):
        return complete_pairs(1, 1, causal=True)
    long = (1 + spans.power, select.width * spans.factor / (1 + spans.power))
    return piece_from(0, Polynomial(t1=select.width * (1 + spans.window), others=(long,)))


def bytes_of(counts: Counts, node: Node) -> Cost:
    """Operands read once and the result written once."""
    match node.op:
        case Input():
            return piece_from(0, Polynomial())
        case LogSumExp() if not isinstance(counts.graph[node.inputs[0]].op, Score):
            return counts.moved(node.type)  # a by-product of what writes its operand
        case _:
            moved = [*counts.graph.operands(node), node]
            return sum((counts.of(each) * BYTES[each.type.dtype] for each in moved), ZERO)
