"""Choices that a backward makes again: of a prompt's last rows, which choose once for all rows, and tiers.

The former costs next to nothing, where a list of every row would be as long as budgets are.  The same kernels
make the same lists of a sequence and head, with the same configurations, bit by bit.
"""

from __future__ import annotations

from dataclasses import replace

from hsgen import schedule, slashes
from hsgen.graph import Attend, Graph, Node, Pool, PoolRows, Select
from hsgen.schedule import choosing, slashing, vectors
from hsgen.schedule.draft import Draft


def chooses(graph: Graph) -> bool:
    """Whether some branch attends what the last rows chose for all."""
    return any(any(slashes.lists_of(graph, node)) for node in graph.nodes())


def choose(draft: Draft) -> tuple[str, ...]:
    """Every choice of a graph, as its forward makes it.  -> the kernels that do

    Of what blocks of rows chose each row has its own list; of what all rows have, none does.
    """
    for node in draft.graph.nodes():
        _choose(draft, node)
    attended = {
        name
        for node in draft.graph.nodes()
        if isinstance(node.op, Attend) and not any(slashes.lists_of(draft.graph, node))
        for name in node.inputs
    }
    kept = [step for step in draft.steps if step.of is None or attended.intersection(step.makes)]
    launched = {launch.kernel for step in kept for launch in step.launches}
    draft.steps = [replace(step, of=None) for step in kept]
    draft.kernels = [kernel for kernel in draft.kernels if kernel.name in launched]
    return tuple(kernel.name for kernel in draft.kernels)


def rank_tiers(draft: Draft) -> tuple[str, ...]:
    """The tiers of every entry, by block of rows, of which a selection says no more than who has any.
    -> the kernels that do
    """
    ranked = {
        node.inputs[3]
        for node in draft.graph.nodes()
        if isinstance(node.op, Attend) and node.op.over == "tiers"
    }
    before = {kernel.name for kernel in draft.kernels}
    schedule.choose_again(draft, ranked)
    return tuple(kernel.name for kernel in draft.kernels if kernel.name not in before)


def _choose(draft: Draft, node: Node) -> None:
    match node.op:
        case Attend():
            pass
        case _ if slashing.launched(draft, node):
            pass
        case Pool() | PoolRows() as op:
            vectors.make(draft, node, op)
        case Select() as op:
            choosing.select(draft, node, op)
        case _:
            pass  # fused into the launch that reads it
