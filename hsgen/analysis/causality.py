"""What row t depends on, derived from the operators."""

from __future__ import annotations

import math
from typing import Literal, assert_never

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
    Graph,
    Input,
    LogSumExp,
    Map,
    Node,
    Norm,
    Normalise,
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
    Union,
    Unlike,
    block_of,
    partitions,
)

Causality = Literal["token", "query_block", "prompt", "none"]


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
