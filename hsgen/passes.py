"""Graph -> Graph: small rewrites, each of which keeps the meaning, run in order.

Decides nothing about kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import networkx as nx

from hsgen.graph import (
    Attend,
    Graph,
    GraphError,
    LogSumExp,
    Node,
    Normalise,
    Op,
    Score,
    Select,
    SelectSet,
    verify,
)

Pass = Callable[[Graph], Graph]


def run(graph: Graph) -> Graph:
    """Apply every pass; a graph that does not verify names the pass that broke it."""
    for each in PASSES:
        try:
            graph = verify(each(graph))
        except GraphError as error:
            raise GraphError(f"after {each.__name__}: {error}") from None
    return graph


def share_log_sum_exp(graph: Graph) -> Graph:
    """Take the log-sum-exp of a branch where it is that of the scores.

    A branch that attends a level's pooled entries sums exp over the same entries, the complete
    ones, as the softmax of the level's scores; one that attends every token over those of a level of
    tokens.  Same query, keys and scale: the same number, and one pass over all entries is saved.
    """
    changed = [
        replace(node, inputs=(node.inputs[0], shared.name))
        for node in graph.nodes()
        if _by_own_sum(graph, node)
        and (shared := _log_sum_exp_of_branch(graph, graph[node.inputs[0]])) is not None
    ]
    return graph.replacing(*changed)


def _by_own_sum(graph: Graph, node: Node) -> bool:
    """Whether it is a softmax of scores: they are normalised by their own sum."""
    softmax = isinstance(node.op, Normalise) and node.op.by is None
    return softmax and graph[node.inputs[1]].inputs == node.inputs[:1]


def _log_sum_exp_of_branch(graph: Graph, score: Node) -> Node | None:
    """The log-sum-exp of an attend over the pooled entries, or over the tokens, that `score` scores."""
    if not isinstance(score.op, Score) or score.op.form != "dot" or score.op.within is not None:
        return None
    for attend in graph.users(score.inputs[1]):
        if (
            isinstance(attend.op, Attend)
            and _attends_all(graph, attend, attend.op, score.op)
            and attend.op.scale == score.op.scale
            and attend.op.counted == score.op.counted
            and attend.inputs[:2] == score.inputs
        ):
            found = [user for user in graph.users(attend.name) if isinstance(user.op, LogSumExp)]
            return found[0] if found else None
    return None


def _attends_all(graph: Graph, attend: Node, op: Attend, score: Score) -> bool:
    """Whether a branch attends every entry that is complete, by its logits as they are."""
    chosen = any(isinstance(x.op, Select | SelectSet) for x in graph.operands(attend))
    changed = op.softcap is not None or op.biased or op.when is not None or op.near is not None
    tokens = op.over == "all" and score.size == score.stride == 1 and not score.diagonal
    return (op.over == "pooled" or tokens) and not (chosen or changed)


def rank_logits(graph: Graph) -> Graph:
    """Rank the logits where their softmax would only be ranked: a row's sum changes no order.

    Logits that are too far below the greatest for their masses to be told apart keep their order.
    """
    changed = [
        replace(node, inputs=(graph[node.inputs[0]].inputs[0], *node.inputs[1:]))
        for node in graph.nodes()
        if _ranks(node.op) and _by_own_sum(graph, graph[node.inputs[0]])
    ]
    return graph.replacing(*changed)


def _ranks(op: Op) -> bool:
    """Whether each row keeps a number of its best entries, or a part of all."""
    if isinstance(op, SelectSet):
        return op.rule == "fraction" and op.scope is None
    return isinstance(op, Select)


def drop_dead(graph: Graph) -> Graph:
    """Drop what no output reads, directly or not."""
    live: set[str] = set(graph.outputs.names())
    for name in graph.outputs.names():
        live |= nx.ancestors(graph.digraph, name)
    return graph.with_nodes(node for node in graph.nodes() if node.name in live)


def without_losses(graph: Graph) -> Graph:
    """What attends and chooses, as if there were no loss: losses are calls of their own."""
    if not graph.outputs.loss:
        return graph
    return drop_dead(graph.with_nodes(graph.nodes(), outputs=replace(graph.outputs, loss={})))


PASSES: tuple[Pass, ...] = (rank_logits, share_log_sum_exp, drop_dead)
