"""Branches under one softmax that may reach the same tokens, and which of them leaves these to the other."""

from __future__ import annotations

from hsgen.graph.nodes import Graph, Node
from hsgen.graph.ops import Attend, Union


def left_to_window(graph: Graph, branch: Node) -> int:
    """The window beside a chosen branch, of the same tokens; 0: there is none.

    One softmax counts them once, as those of the window.
    """
    if not isinstance(branch.op, Attend) or branch.op.over not in ("blocks", "tokens"):
        return 0
    beside = [
        other.op.window or 0
        for union in graph.users(branch.name)
        if isinstance(union.op, Union)
        for other in graph.operands(union)
        if isinstance(other.op, Attend) and other.op.over == "window" and _alike(branch, other)
    ]
    return max(beside, default=0)


def coincide(graph: Graph, one: Node, other: Node) -> bool:
    """Whether two branches of a union may reach the same keys, and neither leaves them to the other."""
    if not _alike(one, other) or _on_other_ways(one, other):
        return False
    pair = [x.op.over for x in (one, other) if isinstance(x.op, Attend)]
    chosen = [x for x in (one, other) if left_to_window(graph, x)]
    return not ("window" in pair and len(chosen) == 1)


def _alike(one: Node, other: Node) -> bool:
    """Whether two branches read the same keys and values."""
    return one.inputs[1:3] == other.inputs[1:3]


def _on_other_ways(one: Node, other: Node) -> bool:
    """Whether no head is on the ways of both."""
    ways = [x.op.when for x in (one, other) if isinstance(x.op, Attend)]
    return None not in ways and len({*ways}) == len(ways) == 2
