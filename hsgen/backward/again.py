"""Choices that a backward makes again, where what a selection says of rows is too long, or too little.

Where a prompt's last rows choose once for all, heads in one of two ways, or blocks of rows by estimates, a
list of every row would be as long as budgets are, or as a sequence is; tiers of a pyramid are in no
selection.  The same kernels make the same lists, with the same configurations, bit by bit.
"""

from __future__ import annotations

from dataclasses import replace

from hsgen import estimates, foretold, keeping, schedule, slashes, walks
from hsgen.graph import Attend, Graph, Node, Permute, Recall, Select, SelectSet
from hsgen.plan import Step
from hsgen.schedule import combining
from hsgen.schedule.draft import Draft


def chooses(graph: Graph) -> bool:
    """Whether some branch attends what rows have together, made again where no caller brings it."""
    return alone(graph) or any(estimates.shown_beside(graph, node) for node in graph.nodes())


def alone(graph: Graph) -> bool:
    """The same of what no caller can bring."""
    graph, _ = foretold.joined(graph)
    either = foretold.foretold(graph) is not None
    return either or any(any(slashes.lists_of(graph, node)) for node in graph.nodes())


def repeated(graph: Graph) -> frozenset[str]:
    """Selections whose lists of rows would be as long as the keys: of walks, and of heads that keep tokens.

    None where branches attend others beside them: a backward has lists of all of a call's choices, or none.
    """
    if combining.gates(graph) is not None:
        return frozenset()
    read = {
        selection.name: walks.walked(graph, selection) or keeping.attended(graph, node)
        for node in graph.nodes()
        if isinstance(node.op, Attend)
        for selection in graph.operands(node)[3:]
        if isinstance(selection.op, Select | SelectSet | Recall)
    }
    return frozenset(read) if all(read.values()) else frozenset()


def repeat(draft: Draft, chosen: frozenset[str]) -> tuple[str, ...]:
    """These, as the forward makes them, where no caller brings lists.  -> the kernels that do

    What branches have that are summed before is left to the gradient of all: their own outputs pass.
    """
    if not chosen:
        return ()
    turns, draft.turns = draft.turns, {}
    schedule.choose_again(draft, set(chosen), {node.name for node in draft.graph.nodes()})
    draft.turns = turns
    orders = {node.name for node in draft.graph.nodes() if isinstance(node.op, Permute)}
    draft.steps = [
        replace(
            step,
            of=None if orders.intersection(step.makes) else "own",
            buffers=tuple(
                replace(x, role="scratch") if x.role == "output" else x for x in step.buffers
            ),
        )
        for step in draft.steps
    ]
    return tuple(kernel.name for kernel in draft.kernels)


def choose(draft: Draft) -> tuple[str, ...]:
    """Every choice of a graph that is made again, as its forward makes it.  -> the kernels that do

    Of blocks of rows beside what the last rows chose for all, each row has its own list; else no row has.
    """
    graph = draft.graph
    attends = [node for node in graph.nodes() if isinstance(node.op, Attend)]
    together = {name for node in attends for name in _together(graph, node)}
    slanted = any(any(slashes.lists_of(graph, node)) for node in attends)
    by_row = {x.name for node in attends for x in graph.operands(node)[3:4]} if slanted else set()
    before, steps, turns = len(draft.kernels), len(draft.steps), draft.turns
    draft.turns = {}  # a branch whose sum decides comes before all others, and adds to nothing
    schedule.choose_again(draft, together | by_row, together)
    draft.turns = turns
    either = chooses(graph) and not alone(graph)
    made = [replace(step, of=None) for step in draft.steps[steps:]]
    draft.steps[steps:] = [_as_one(made)] if either else made
    return tuple(kernel.name for kernel in draft.kernels[before:])


def _as_one(steps: list[Step]) -> Step:
    """A choice that is made where no caller brings one: what it needs on the way passes."""
    assert not any(step.chunk for step in steps), "each goes once over all rows"
    made = tuple(name for step in steps for name in step.makes)
    needs = dict.fromkeys(name for step in steps for name in step.needs if name not in made)
    buffers = (buffer for step in steps for buffer in step.buffers)
    return Step(
        title=", ".join(step.title for step in steps),
        needs=tuple(needs),
        makes=made,
        of="own",
        sizes=tuple(size for step in steps for size in step.sizes),
        buffers=tuple(x if x.role == "list" else replace(x, role="scratch") for x in buffers),
        launches=tuple(launch for step in steps for launch in step.launches),
    )


def _together(graph: Graph, node: Node) -> set[str]:
    """The choices of a branch that rows have together."""
    op = node.op
    assert isinstance(op, Attend)
    if op.over == "tiers":
        return {node.inputs[3]}
    if (found := foretold.foretold(graph)) and node.name == found.attend.name:
        lists = (found.columns, found.diagonals)
        return {*node.inputs[3:6], *(x.chain.selection.name for x in lists)}
    if estimates.shown_beside(graph, node):
        return {node.inputs[3]}
    return {x.name for x in slashes.lists_of(graph, node) if x}
