"""Launches of orders of keys that branches read: again as the forward had them.

An order is of weights, which round as tiles do: these are the forward's kernels, and a call gives them the
values that its forward had, so that a slot is the token that was attended.
"""

from __future__ import annotations

from hsgen import sorting
from hsgen.graph import Attend, Permute
from hsgen.schedule import sorted_keys
from hsgen.schedule.draft import Draft


def sort_again(draft: Draft) -> tuple[str, ...]:
    """Sort what branches read through an order, unless it was.  -> the kernels that do"""
    graph, before = draft.graph, len(draft.kernels)
    attends = [node for node in graph.nodes() if isinstance(node.op, Attend)]
    found = {order.name for node in attends if (order := sorting.order_of(graph, node))}
    there = {name for step in draft.steps for name in step.makes}
    for node in graph.nodes():
        if node.name in found - there:
            assert isinstance(node.op, Permute), "an order is one of keys"
            sorted_keys.sort(draft, node, node.op)
    return tuple(kernel.name for kernel in draft.kernels[before:])
