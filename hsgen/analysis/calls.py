"""Calls that choose and calls that take over: how many there are of each, and what a call computes."""

from __future__ import annotations

from collections.abc import Mapping

from hsgen.graph import Carry, Graph, Node, Recall, Score, Turns

FRESH, SHARED = 1, 2  # places in `Recall.takes`: a call that chooses, and one that takes over


def shares(graph: Graph) -> Mapping[int, float]:
    """What part of all calls is of which kind, in the long run.

    A call that chooses is the only kind where nothing is taken over, or nothing says how often.
    Scores among kept entries are none of a pattern: how many those are is not known.
    """
    turns = _turns(graph)
    among = any(isinstance(node.op, Score) and node.op.among for node in graph.nodes())
    pattern = _pattern(turns.pop()) if len(turns) == 1 and not among else ""
    if not pattern:
        return {FRESH: 1.0}
    fresh = pattern.count("F") / len(pattern)
    return {FRESH: fresh, SHARED: 1 - fresh}


def calls_text(graph: Graph) -> str:
    """What costs are of, where calls differ; empty where they do not."""
    turns = _turns(graph)
    if not turns:
        return ""
    if len(shares(graph)) == 1:
        return "a call that chooses"
    pattern = _pattern(turns.pop())
    fresh = pattern.count("F")
    return f"mean of {len(pattern)} calls, {fresh} of which choose{'s' * (fresh == 1)}"


def computed(graph: Graph, turn: int) -> frozenset[str]:
    """The operators that a call of this kind needs."""
    if not _turns(graph):
        return frozenset(node.name for node in graph.nodes())
    found: set[str] = set()
    waiting = [*graph.outputs.names()]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _read(graph[name], turn)
    return frozenset(found)


def _read(node: Node, turn: int) -> tuple[str, ...]:
    """The operands that are read: of a recall, and of kept scores, the one that the turn takes."""
    match node.op:
        case Recall(takes=takes):
            calls = node.inputs[-1]
            own = node.inputs[:1] if "own" in takes else ()
            kept = node.inputs[-2:-1] if "kept" in takes else ()
            return {"own": (*own, calls), "kept": (*kept, calls), "all": (calls,)}[takes[turn]]
        case Carry(how=how):
            score, kept, calls = node.inputs
            if turn == FRESH:
                return score, calls
            return (kept, calls) if how == "keep" else node.inputs
        case _:
            return node.inputs


def _turns(graph: Graph) -> set[Turns]:
    """Of calls that differ: one that is brought a selection is like all others."""
    return {
        node.op.turns
        for node in graph.nodes()
        if isinstance(node.op, Carry) or (isinstance(node.op, Recall) and node.op.width is None)
    }


def _pattern(turns: Turns) -> str:
    """The letters that repeat; empty where one fresh call serves all that follow."""
    return turns.pattern or ("F" + "S" * (turns.every - 1) if turns.every else "")
