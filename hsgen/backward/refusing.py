"""What has no gradient of kernels yet: one place, which names the branch and the line."""

from __future__ import annotations

from hsgen import axes, clusters, foretold, keeping, slashes
from hsgen.errors import PlanError
from hsgen.graph import (
    Attend,
    Gate,
    Graph,
    Node,
    Norm,
    Op,
    OutputGate,
    Pool,
    PoolRows,
    Recall,
    Rotate,
    Round,
    Select,
    SelectSet,
    block_of,
    left_to_window,
)
from hsgen.schedule import combining
from hsgen.unpool import DERIVED


def refuse(graph: Graph) -> None:
    """Nothing, where kernels make the gradients of all branches.

    Raises:
        PlanError: a branch of which they do not.
    """
    for node in graph.nodes():
        if words := lacking(graph, node):
            raise PlanError(words, span=node.span)


def lacking(graph: Graph, node: Node) -> str | None:
    """What of one operator has no gradient yet; None where it has."""
    graph, gone = foretold.joined(graph)
    node = graph[gone.get(node.name, node.name)]
    match node.op:
        case Attend(branch=branch) as op:
            words = _of_attend(graph, node, op)
            return words and f"branch {branch}: no kernel has the gradient of {words} yet"
        case Gate(each="channel") if axes.tiling_of(graph) is None:
            return "no kernel has the gradient of gates by channel yet"
        case OutputGate() if axes.tiling_of(graph) is not None:
            return "no kernel has the gradient of an output's gate behind tiles yet"
        case _:
            return None


def _of_attend(graph: Graph, node: Node, op: Attend) -> str | None:
    if axes.tiling_of(graph) is not None:
        return _of_tiles(graph, op)
    if clusters.clustering_of(graph) is not None:
        return None
    lacks = (
        (op.cut == "clusters", "attention by clusters"),
        (op.softmax is not None, "a softmax for every entry"),
        (
            op.over not in ("blocks", "tokens", "window", "static", "all", "pooled", "tiers"),
            f"attention over {op.over}",
        ),
        (op.over == "tiers" and not _by_block(graph, node, op), "tiers of single rows"),
        (op.over == "tiers" and combining.gates(graph) is not None, "tiers under gates"),
        (op.over == "pooled" and _keeps(graph, node, by_row=False), "entries that rows share"),
        (bool(op.latent) and op.over == "static", "latents that a pattern shows"),
        (bool(op.latent) and _apart(graph, node), "latents of which heads chose tokens apart"),
        (op.softcap is not None and op.biased, "capped logits with a learned bias"),
        (bool(op.sink) and combining.gates(graph) is not None, "a sink under gates"),
        (op.biased and _several_biased(graph), "several branches with a learned bias"),
        (op.size != op.stride and op.over == "blocks", "overlapping blocks"),
        (
            op.over in ("blocks", "tokens")
            and not any(slashes.lists_of(graph, node))
            and not keeping.attended(graph, node)
            and not _by_row(graph, node)
            and not _by_block(graph, node, op),
            "lists that rows share",
        ),
        (
            left_to_window(graph, node) > 0 and (op.over == "tokens" or not graph.meta.causal),
            "what a window beside it leaves",
        ),
    )
    words = next((words for lacking, words in lacks if lacking), None)
    return words or (_of_pools(graph, node) if op.over == "pooled" else None)


def _keeps(graph: Graph, node: Node, *, by_row: bool) -> bool:
    """Whether a branch over pooled entries is kept to what every row chose, or to what several did."""
    chosen = [x for x in graph.operands(node) if isinstance(x.op, Select | SelectSet | Recall)]
    alone = all(isinstance(x.op, Select) and x.type.dims[1] == "T" for x in chosen)
    return bool(chosen) and alone is by_row


def _several_biased(graph: Graph) -> bool:
    attends = [node.op for node in graph.nodes() if isinstance(node.op, Attend)]
    return sum(bool(op.biased) for op in attends) > 1


def _of_tiles(graph: Graph, op: Attend) -> str | None:
    """Of branches of tiles: one over what rows chose, and perhaps one over means, under gates of channels."""
    attends = [node for node in graph.nodes() if isinstance(node.op, Attend)]
    coarse = [x for x in attends if isinstance(graph.operands(x)[0].op, PoolRows)]
    if len(attends) - len(coarse) != 1 or len(coarse) > 1:
        return "several branches of tiles"
    if len(attends) > 1 and not coarse:
        return "several branches of tiles"
    return "capped logits" if op.softcap is not None else "a sink" if op.sink else None


def _apart(graph: Graph, node: Node) -> bool:
    """Whether query heads of a group chose tokens, or entries, each for itself."""
    assert isinstance(node.op, Attend)
    each = node.op.over == "tokens" or (
        node.op.over == "pooled" and _keeps(graph, node, by_row=True)
    )
    return each and graph[node.inputs[3]].type.dims[2] == "Hq"


def _of_pools(graph: Graph, node: Node) -> str | None:
    """Of entries that are attended: sums and maps of tokens, as they are, and what gates weigh."""
    for made in graph.operands(node)[1:3]:
        pool, behind = made, list[Op]()
        while isinstance(pool.op, Norm | Rotate | Round):
            behind.append(pool.op)
            pool = graph[pool.inputs[0]]
        match pool.op:
            case Pool(how="gated", softmax="token"):
                return "entries whose tokens have one gate each"
            case Pool(how="gated") if any(isinstance(op, Round) for op in behind):
                return "entries that are kept in fewer bits"
            case Pool(how="gated"):
                continue
            case Pool() if behind:
                return "entries that are normed or rotated"
            case Pool(how=how) if how in DERIVED:
                continue
            case Pool(how=how):
                return f"entries pooled by {how}"
            case _:
                raise AssertionError("pooled entries come of a pool")
    return None


def _by_block(graph: Graph, node: Node, op: Attend) -> bool:
    """Whether blocks of rows have chosen blocks of keys, or as many tokens as a number says."""
    selection = graph[node.inputs[3]]
    chosen = Select if op.over == "tokens" else Select | SelectSet
    return isinstance(selection.op, chosen) and bool(block_of(selection.type.dims[1]))


def _by_row(graph: Graph, node: Node) -> bool:
    """Whether every row has chosen for itself, as many entries as a number says."""
    selection = graph[node.inputs[3]]
    brought = isinstance(selection.op, Recall) and selection.op.width and not selection.op.block
    return (isinstance(selection.op, Select) or bool(brought)) and selection.type.dims[1] == "T"
