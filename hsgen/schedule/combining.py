"""How branches become one output: in turn, each adds its own, times its gate, to the same buffer.

A program owns its rows and launches follow one another, so the sum has one order, in every run.
"""

from __future__ import annotations

from collections.abc import Mapping

import networkx as nx

from hsgen import rows
from hsgen.graph import (
    Gate,
    Graph,
    Select,
    SelectSet,
    block_of,
)
from hsgen.plan import Step
from hsgen.schedule.draft import Draft, Turn


def turns(graph: Graph) -> Mapping[str, Turn]:
    """By branch, its turn in the sum; empty where no gates combine."""
    gate = next((node for node in graph.nodes() if isinstance(node.op, Gate)), None)
    if gate is None:
        return {}
    gates, branches = gate.inputs[0], gate.inputs[1:]
    known = [node.name for node in graph.nodes() if node.name in branches]
    order = sorted(known, key=lambda name: _stage(graph, name))
    return {
        name: Turn(
            gates=gates,
            total=gate.name,
            before=order[i - 1] if i else None,
            last=name == order[-1],
            gate=rows.Gated(
                column=branches.index(name), branches=len(branches), first=name == order[0]
            ),
        )
        for i, name in enumerate(order)
    }


def in_turn(draft: Draft) -> list[Step]:
    """The steps, branches in the order of their turns."""

    def stage(step: Step) -> int:
        return max((_stage(draft.graph, x) for x in step.makes if x in draft.turns), default=0)

    return sorted(draft.steps, key=stage)


def _stage(graph: Graph, branch: str) -> int:
    """When a branch can run: before a choice that reads its log-sum-exp, with the choice of blocks of rows,
    for which a caller's selection has another step, or behind all choices.
    """
    if any(
        isinstance(graph[name].op, Select | SelectSet)
        for name in nx.descendants(graph.digraph, branch)
    ):
        return 0
    chosen = [x for x in graph.operands(graph[branch]) if isinstance(x.op, Select | SelectSet)]
    return 1 if any(block_of(x.type.dims[1]) for x in chosen) else 2
