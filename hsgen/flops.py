"""What PyTorch's FlopCounterMode counts of a call: multiplications and additions, no exponentials.

As of its own attention, a backward counts two products for each of the forward, and nothing that is
computed again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from hsgen import analysis
from hsgen.graph import Attend, Gate, Graph, Norm, Pool, Rotate

Work = Literal["forward", "select", "backward", "losses", "losses_backward"]


class Span(NamedTuple):
    """One sequence of a call: its rows stand at `first` and after it, on `keys` keys."""

    first: int
    rows: int
    keys: int


def of_call(graph: Graph, work: Work, brought: Collection[str], spans: Sequence[Span]) -> float:
    """Operations of a call.

    Args:
        graph: heads and head dims bound.
        work: which operator.
        brought: levels of which the caller brings the selection.
        spans: the sequences.
    """
    times = _of_gradients(graph) if work == "backward" else _needed(graph, work, brought)
    cost = analysis.total(graph, times).flops * (2 if work == "losses_backward" else 1)
    total = 0.0
    for first, rows, keys in spans:
        end = min(max(first + rows, 0), keys)
        if graph.meta.causal:
            total += cost.evaluate(end) - cost.evaluate(max(min(first, end), 0))
        elif keys:
            total += cost.evaluate(keys) * rows / keys
    return total


def _needed(graph: Graph, work: Work, brought: Collection[str]) -> dict[str, float]:
    """The operators of a call, each once: those behind outputs, up to what the caller brings."""
    outputs = graph.outputs
    given = {name for level, name in outputs.selection.items() if level in brought}
    chosen = outputs.selection.values()
    losses = outputs.loss.values()
    every = (outputs.o, *outputs.lse.values(), *chosen)
    waiting = list({"select": chosen, "forward": every}.get(work, losses))
    found: dict[str, float] = {}
    while waiting:
        name = waiting.pop()
        if name not in found and not (brought and name in chosen and name not in given):
            found[name] = 1.0
            waiting += [] if name in given else graph[name].inputs
    return found


def _of_gradients(graph: Graph) -> dict[str, float]:
    """What has a gradient: what attends, what weighs branches, and entries that are attended."""
    waiting: list[str] = []
    for node in graph.nodes():
        if isinstance(node.op, Attend):
            waiting += [node.name, *node.inputs[1:3]]
        elif isinstance(node.op, Gate):
            waiting.append(node.name)
    found: dict[str, float] = {}
    while waiting:
        name = waiting.pop()
        found[name] = 2.0
        if isinstance(graph[name].op, Pool | Norm | Rotate):
            waiting += graph[name].inputs
    return found
