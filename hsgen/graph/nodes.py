"""Operators applied to each other: Node, Graph, and what is wrong with one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import get_args

import networkx as nx

from hsgen.errors import HsgenError, Span
from hsgen.graph.ops import Assign, Cluster, DType, Input, Op, Recall, Role, Score, Select
from hsgen.graph.text import align, op_text


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorType:
    """dtype and symbolic dimensions, as in f32[B, T, Hkv, N_block]."""

    dtype: DType
    dims: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(self.dims)}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One operator applied: its name, operands and result type."""

    name: str
    op: Op
    inputs: tuple[str, ...]
    type: TensorType
    span: Span | None = field(default=None, compare=False, repr=False)  # where the text asks for it


class GraphError(HsgenError):
    """The graph is not well formed: a mistake in a pass, or in a graph edited by hand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """What the graph keeps of its spec besides the operators."""

    name: str
    source: str | None = None
    causal: bool = True
    digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Names of the nodes that the caller gets: o, lse per branch, selection per selecting level.

    streams: branches that are outputs of their own.  loss: numbers, by name.  state: what the next
    call is to be given, by level, and as `level.scores`.
    """

    o: str
    lse: Mapping[str, str]
    selection: Mapping[str, str]
    streams: Mapping[str, str] = field(default_factory=dict[str, str])
    loss: Mapping[str, str] = field(default_factory=dict[str, str])
    state: Mapping[str, str] = field(default_factory=dict[str, str])

    def names(self) -> tuple[str, ...]:
        groups = (self.lse, self.selection, self.streams, self.loss, self.state)
        return (self.o, *(name for group in groups for name in group.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """The operators of one spec, frozen; passes make new ones.  The order is deterministic."""

    order: tuple[Node, ...]  # topological; inputs first, as in a signature, else ties by name
    outputs: Outputs
    sizes: Mapping[str, int]  # the dimensions that the spec fixes
    meta: Meta
    digraph: nx.DiGraph[str] = field(compare=False, repr=False)

    @staticmethod
    def build(
        nodes: Iterable[Node], *, outputs: Outputs, sizes: Mapping[str, int], meta: Meta
    ) -> Graph:
        """Wire nodes by the names of their operands.  Sizes of selections follow from the nodes."""
        digraph: nx.DiGraph[str] = nx.DiGraph()
        by_name: dict[str, Node] = {}
        for node in nodes:
            if node.name in by_name:
                raise GraphError(f"%{node.name} is defined twice")
            by_name[node.name] = node
            digraph.add_node(node.name, node=node)
        for node in by_name.values():
            for operand in node.inputs:
                if operand not in by_name:
                    raise GraphError(f"%{node.name} reads %{operand}, which is not defined")
                digraph.add_edge(operand, node.name)
        try:
            names = list(
                nx.lexicographical_topological_sort(digraph, lambda name: _rank(by_name[name]))
            )
        except nx.NetworkXUnfeasible:
            cycle = " -> ".join(f"%{edge[0]}" for edge in nx.find_cycle(digraph))
            raise GraphError(f"the graph has a cycle: {cycle}") from None
        order = tuple(by_name[name] for name in names)
        return Graph(
            order=order,
            outputs=outputs,
            sizes=MappingProxyType(_known_sizes(order, sizes)),
            meta=meta,
            digraph=nx.freeze(digraph),
        )

    def with_nodes(self, nodes: Iterable[Node], *, outputs: Outputs | None = None) -> Graph:
        """The same spec with other nodes (all of them, in any order)."""
        return Graph.build(nodes, outputs=outputs or self.outputs, sizes=self.sizes, meta=self.meta)

    def replacing(self, *changed: Node) -> Graph:
        """The same graph with some nodes exchanged, by name."""
        by_name = {node.name: node for node in changed}
        for name in by_name:
            self[name]  # an unknown name is an error
        return self.with_nodes(by_name.get(node.name, node) for node in self.order)

    def nodes(self) -> tuple[Node, ...]:
        """Every node: inputs as in a signature, then operands before users, ties by name."""
        return self.order

    def operands(self, node: Node) -> tuple[Node, ...]:
        return tuple(self[name] for name in node.inputs)

    def users(self, name: str) -> tuple[Node, ...]:
        """The nodes that read `name`, in order."""
        readers = set(self.digraph.successors(name))
        return tuple(node for node in self.order if node.name in readers)

    def __getitem__(self, name: str) -> Node:
        if name not in self.digraph:
            raise GraphError(f"no node %{name}")
        return self.digraph.nodes[name]["node"]

    def __contains__(self, name: str) -> bool:
        return name in self.digraph

    def __str__(self) -> str:
        return dump(self)


def _rank(node: Node) -> tuple[bool, bool, int, str]:
    """Order of nodes that are ready: q, k, v, other inputs by role and name, then by name."""
    if not isinstance(node.op, Input):
        return True, False, 0, node.name
    return False, node.name not in ("q", "k", "v"), get_args(Role).index(node.op.role), node.name


FIXED_SIZES = ("Hq", "Hkv", "G", "Dqk", "Dv", "Hi", "Di")  # fixed by the spec, not by a call


def _known_sizes(order: Sequence[Node], sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes given, and those that follow from them and from the selections."""
    known = {name: sizes[name] for name in FIXED_SIZES if name in sizes}
    if "Hq" in known and "Hkv" in known:
        known["G"] = known["Hq"] // known["Hkv"]
    selects = {node.op.level: node.op for node in order if isinstance(node.op, Select)}
    branching: dict[str, int] = {}
    for select in selects.values():
        known[f"K_{select.level}"] = select.width
    for node in order:
        if isinstance(node.op, Recall) and node.op.width:
            known[f"K_{node.op.level}"] = node.op.width
    for node in order:
        if isinstance(node.op, Cluster) and node.op.of is None:
            known[f"N_{node.op.level}"] = node.op.clusters
        if isinstance(node.op, Score) and node.op.parts is not None:
            known[f"N_{node.op.level}"] = node.op.parts
        if isinstance(node.op, Assign):
            known[f"N_{node.op.level}"] = node.op.nodes
            branching[node.op.level] = node.op.branching
    for score in (node.op for node in order if isinstance(node.op, Score)):
        parent = selects.get(score.within or "")
        children = branching.get(score.level) or (
            parent and score.size and parent.size // score.size
        )
        if parent and children:  # nodes and runs have any number of tokens
            known[f"C_{score.level}"] = parent.width * children
    return known


def dump(graph: Graph) -> str:
    """The graph as text, one line a node, aligned.  Equal graphs give equal text."""
    inputs = [
        (f"%{node.name}", f"= {op_text(node.op)}", f": {node.type}")
        for node in graph.nodes()
        if isinstance(node.op, Input)
    ]
    operators = [
        (
            f"%{node.name}",
            f"= {op_text(node.op)}",
            f": {node.type}",
            f"<- {', '.join(f'%{name}' for name in node.inputs)}",
        )
        for node in graph.nodes()
        if not isinstance(node.op, Input)
    ]
    sizes = "".join(f", {name}={size}" for name, size in graph.sizes.items())
    head = f"graph {graph.meta.name}(causal={graph.meta.causal}{sizes})"
    outputs = graph.outputs
    tail = [f"return o=%{outputs.o}"]
    tail += [f"lse.{branch}=%{name}" for branch, name in outputs.lse.items()]
    tail += [f"selection.{level}=%{name}" for level, name in outputs.selection.items()]
    tail += [f"stream.{branch}=%{name}" for branch, name in outputs.streams.items()]
    tail += [f"loss.{loss}=%{name}" for loss, name in outputs.loss.items()]
    tail += [f"state.{level}=%{name}" for level, name in outputs.state.items()]
    return "\n".join([head, *align(inputs), *align(operators), ", ".join(tail)]) + "\n"
