"""Whether a graph is well formed."""

from __future__ import annotations

from collections.abc import Mapping

from hsgen.graph.nodes import Graph, GraphError, Node
from hsgen.graph.ops import (
    Anchors,
    Assign,
    Attend,
    Cluster,
    Input,
    LogSumExp,
    Map,
    Permute,
    Pool,
    Recall,
    Runs,
    Score,
    Select,
    SelectSet,
    Unlike,
)
from hsgen.graph.types import need, need_dims, result_type


def verify(graph: Graph) -> Graph:
    """The same graph; GraphError, naming the node, unless each type follows from its operands."""
    for node in graph.nodes():
        try:
            _verify_node(graph, node)
        except GraphError as error:
            raise GraphError(f"%{node.name}: {error}") from None
    _verify_partitions(graph)
    befores(graph)
    _verify_unique(graph)
    _verify_outputs(graph)
    heads, kv_heads = graph.sizes.get("Hq", 0), graph.sizes.get("Hkv", 1)
    need(heads % kv_heads == 0, f"{heads} query heads do not divide among {kv_heads}")
    if any(isinstance(node.op, Score) and node.op.form == "index_dot" for node in graph.nodes()):
        index_heads = graph.sizes.get("Hi", kv_heads)
        need("Hkv" not in graph.sizes or index_heads == kv_heads, f"{index_heads} index heads")
    if any(isinstance(node.op, Score) and node.op.grouped for node in graph.nodes()):
        index_heads = graph.sizes.get("Hi", kv_heads)
        need(index_heads % kv_heads == 0, f"{index_heads} index heads in {kv_heads} groups")
    return graph


def _verify_node(graph: Graph, node: Node) -> None:
    if isinstance(node.op, Input):
        need(not node.inputs, "an input has no operands")
        return
    expected = result_type(node.op, graph.operands(node))
    need(node.type == expected, f"expected {expected}, got {node.type}")


def _verify_partitions(graph: Graph) -> None:
    """Operators of one level agree on its entries, and so do maps and pooled branches."""
    known = partitions(graph)
    for node in graph.nodes():
        if isinstance(node.op, Map) and node.op.cut is None:
            source = graph[node.inputs[0]].type.dims[-1].removeprefix("N_")
            strides = known[source][1], node.op.stride
            fine, coarse = reversed(strides) if node.op.how == "upsample" else strides
            need(
                coarse == node.op.ratio * fine,
                f"%{node.name}: ratio {node.op.ratio} does not carry stride {strides[0]}"
                f" to {strides[1]}",
            )
        if isinstance(node.op, Attend) and node.op.over == "pooled":
            level = graph[node.inputs[1]].type.dims[1].removeprefix("N_")
            need(
                known[level] == (node.op.size, node.op.stride),
                f"%{node.name}: level {level} has entries of {_entry_text(known[level])}",
            )


def _entry_text(partition: tuple[int, int]) -> str:
    return f"size {partition[0]}, stride {partition[1]}"


def partitions(graph: Graph) -> Mapping[str, tuple[int, int]]:
    """Size and stride of every level's entries; GraphError where operators disagree."""
    found: dict[str, tuple[int, int]] = {}
    for node in graph.nodes():
        if isinstance(node.op, Pool | Score | Map | Select | SelectSet | Unlike | Recall):
            own = (node.op.size, node.op.stride)
            need(
                found.setdefault(node.op.level, own) == own,
                f"%{node.name}: level {node.op.level} has entries of"
                f" {_entry_text(found[node.op.level])}",
            )
    return found


def befores(graph: Graph) -> Mapping[str, int]:
    """Of every level: the tokens of an entry that lie before its place."""
    found: dict[str, int] = {}
    for node in graph.nodes():
        if isinstance(node.op, Pool | Map | Select | SelectSet):
            own = node.op.before or 0
            need(
                found.setdefault(node.op.level, own) == own,
                f"%{node.name}: entries of level {node.op.level} begin {own} before their place",
            )
    return found


def _of_queries(node: Node) -> bool:
    return isinstance(node.op, Cluster) and node.op.of is not None


def segments(graph: Graph) -> Mapping[str, int | None]:
    """Of every level whose entries are cut from an order: tokens of a segment, None of no segment.

    An entry may hold any token of its segment, or of the sequence: complete, begun and forced are
    said of whole segments.
    """
    return {
        node.op.level: node.op.segment if isinstance(node.op, Permute) else None
        for node in graph.nodes()
        if isinstance(node.op, Permute | Cluster) and not _of_queries(node)
    }


def assigned(graph: Graph) -> Mapping[str, Node]:
    """Of every level whose entries are nodes or runs: what says in which of them each token is."""
    return {node.op.level: node for node in graph.nodes() if isinstance(node.op, Assign | Runs)}


def anchors(graph: Graph) -> Mapping[str, Anchors]:
    """Of every level whose entries lie behind each row: where they lie."""
    ops = (node.op for node in graph.nodes())
    return {op.level: op.anchors for op in ops if isinstance(op, Score) and op.anchors}


def short_last(graph: Graph, level: str, *, causal: bool | None = None) -> bool:
    """Whether the level's last entry may be short: pooled over its true length, never if causal.

    causal: As the graph is, where it is left out; rows that choose together have a short one all the same.
    """
    size, stride = partitions(graph)[level]
    linear = any(
        isinstance(node.op, Pool) and node.op.level == level and node.op.how in ("linear", "mlp")
        for node in graph.nodes()
    )
    whole = graph.meta.causal if causal is None else causal
    return not whole and size == stride and not linear


def _verify_unique(graph: Graph) -> None:
    owners = [
        f"level {node.op.level} selects"
        if isinstance(node.op, Select | SelectSet)
        else f"branch {node.op.branch}"
        for node in graph.nodes()
        if isinstance(node.op, Select | SelectSet | Attend)
    ]
    for owner in owners:
        need(owners.count(owner) == 1, f"{owner} more than once")


def _verify_outputs(graph: Graph) -> None:
    outputs = graph.outputs
    need_dims(graph[outputs.o].type, ("B", "T", "Hq", "Dv"))
    for name in outputs.lse.values():
        need(isinstance(graph[name].op, LogSumExp), f"%{name} is not a log-sum-exp")
        need_dims(graph[name].type, ("B", "Hq", "T"))
    for level, name in outputs.selection.items():
        op = graph[name].op
        need(
            isinstance(op, Select | SelectSet | Recall) and op.level == level,
            f"%{name} is not a selection of {level}",
        )
    for name in outputs.streams.values():
        need_dims(graph[name].type, ("B", "T", "Hq", "Dv"))
    for name in outputs.loss.values():
        need_dims(graph[name].type, ())
