"""Which laws hold for a graph, and why one does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hsgen.analysis.causality import causality
from hsgen.graph import (
    Assign,
    Attend,
    Carry,
    Gate,
    Graph,
    Node,
    OutputGate,
    Permute,
    Recall,
    Route,
    Runs,
    Select,
    SelectSet,
    Union,
    assigned,
)


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
        unselected_values_have_no_effect=not pooled_attends(graph),
        future_never_changes_the_past=by_token,
        decode_equals_prefill_row=by_token and not recalls(graph, over="steps"),
    )


def recalls(graph: Graph, *, over: Literal["layers", "steps"]) -> bool:
    """Whether a call takes over what earlier ones, layers or steps, have chosen."""
    ops = (node.op for node in graph.nodes())
    return any(isinstance(op, Recall | Carry) and op.turns.over == over for op in ops)


def _attends(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes() if isinstance(node.op, Attend)]


def pooled_attends(graph: Graph) -> list[str]:
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
    if pooled := pooled_attends(graph):
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
