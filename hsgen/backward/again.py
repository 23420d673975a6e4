"""Choices that a backward makes again, where what a selection says of rows is too long, or too little.

Where a prompt's last rows choose once for all, or heads in one of two ways, a list of every row would be as
long as budgets are; tiers of a pyramid are in no selection.  The same kernels make the same lists, with the
same configurations, bit by bit.
"""

from __future__ import annotations

from dataclasses import replace

from hsgen import foretold, schedule, slashes
from hsgen.graph import Attend, Graph, Node
from hsgen.schedule.draft import Draft


def chooses(graph: Graph) -> bool:
    """Whether some branch attends lists that all rows, or those of a block, have together, made again."""
    graph, _ = foretold.joined(graph)
    return _foretold(graph) or any(any(slashes.lists_of(graph, node)) for node in graph.nodes())


def choose(draft: Draft) -> tuple[str, ...]:
    """Every choice of a graph that is made again, as its forward makes it.  -> the kernels that do

    Of blocks of rows beside what the last rows chose for all, each row has its own list; else no row has.
    """
    graph = draft.graph
    attends = [node for node in graph.nodes() if isinstance(node.op, Attend)]
    together = {name for node in attends for name in _together(graph, node)}
    slanted = any(any(slashes.lists_of(graph, node)) for node in attends)
    by_row = {x.name for node in attends for x in graph.operands(node)[3:4]} if slanted else set()
    before, steps = len(draft.kernels), len(draft.steps)
    schedule.choose_again(draft, together | by_row, together)
    draft.steps[steps:] = [replace(step, of=None) for step in draft.steps[steps:]]
    return tuple(kernel.name for kernel in draft.kernels[before:])


def _foretold(graph: Graph) -> bool:
    return foretold.foretold(graph) is not None


def _together(graph: Graph, node: Node) -> set[str]:
    """The choices of a branch that rows have together."""
    op = node.op
    assert isinstance(op, Attend)
    if op.over == "tiers":
        return {node.inputs[3]}
    if (found := foretold.foretold(graph)) and node.name == found.attend.name:
        lists = (found.columns, found.diagonals)
        return {*node.inputs[3:6], *(x.chain.selection.name for x in lists)}
    return {x.name for x in slashes.lists_of(graph, node) if x}
