"""The inputs, in the order of a signature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from hsgen.graph.nodes import Graph, Node, TensorType
from hsgen.graph.ops import (
    Assign,
    Attend,
    Carry,
    Cluster,
    Delta,
    Distance,
    Divergence,
    Entropies,
    Gate,
    Input,
    LogSumExp,
    Map,
    Norm,
    Normalise,
    Op,
    OutputGate,
    Permute,
    Pool,
    PoolHeads,
    PoolRows,
    Recall,
    Reduce,
    ReduceRows,
    Role,
    Rotate,
    Round,
    Route,
    Runs,
    Score,
    Select,
    SelectSet,
    Switch,
    Union,
    Unlike,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInput:
    """A tensor that the caller passes: `str()` is a line of a docstring."""

    name: str
    type: TensorType
    role: Role
    about: str

    def __str__(self) -> str:
        return f"{self.name} [{', '.join(self.type.dims)}]: {self.about}"


def tensor_inputs(graph: Graph) -> tuple[TensorInput, ...]:
    """Every input: q, k, v first, then keys and values of branches, index, gates, parameters."""
    return tuple(
        TensorInput(name=node.name, type=node.type, role=node.op.role, about=_about(graph, node))
        for node in graph.nodes()
        if isinstance(node.op, Input)
    )


_PLAIN = {
    "index_query": "queries of the index",
    "index_keys": "keys of the index, shared by its heads",
    "index_weights": "weight of each head of the index",
    "output_gate": "gate of the output, before its sigmoid",
}


_OF = {
    "starts": "not 0 where an entry begins",
    "codebook": "codewords of every run of channels",
    "scores": "score of every entry",
    "split": "the token from which on entries are chosen apart",
    "order": "which token each slot has",
    "bias": "what is added to the logits of each key, or scores it",
    "state": "what earlier calls hand on",
}


def _about(graph: Graph, node: Node) -> str:
    assert isinstance(node.op, Input)
    users = graph.users(node.name)
    whose = sorted({_owner(user.op) for user in users} - {""})
    of = f" of {', '.join(whose)}" if whose else ""
    match node.op.role:
        case "index_query" | "index_keys" | "index_weights" | "output_gate" as role:
            return _PLAIN[role]
        case "query":
            return "queries" if node.name == "q" else f"queries{of}"
        case "keys" | "values" as role:
            return f"{role}{of}"
        case "codebook" | "scores" | "split" | "order" | "starts" | "bias" | "state" as role:
            return f"{_OF[role]}{of}"
        case "gates":
            return _about_gates(graph, users)
        case "route":
            return _about_route(users)
        case "pool_gates":
            return f"gates of tokens{of}, before their softmax"
        case "angles":
            return f"{node.name[:3]} of every position{of}"
        case "parameter":
            return _about_parameter(users, of)
        case _:
            assert_never(node.op.role)


def _about_gates(graph: Graph, users: tuple[Node, ...]) -> str:
    gated = [graph[name].op for user in users for name in user.inputs[1:]]
    names = [op.branch for op in gated if isinstance(op, Attend)]
    return f"gate of each branch: {', '.join(names)}"


def _about_route(users: tuple[Node, ...]) -> str:
    routes = [user.op for user in users if isinstance(user.op, Route)]
    if any(route.repeats for route in routes):
        return "number of the layer, from 0"
    ways = [route.ways[place] for route in routes for place in route.places]
    return f"way that is taken: {', '.join(f'{i} {way}' for i, way in enumerate(ways))}"


def _about_parameter(users: tuple[Node, ...], of: str) -> str:
    if any(isinstance(user.op, Attend | Union) for user in users):
        return f"learned sink{of}"
    if any(isinstance(user.op, Assign) for user in users):
        return f"learned centroids{of}"
    norms = any(isinstance(user.op, Norm) for user in users)
    return f"learned {'norm' if norms else 'pooling'}{of}"


def _owner(op: Op) -> str:
    """The level or branch that an operator belongs to, in words."""
    match op:
        case Cluster() | Permute() | Recall() | Carry() | Pool() | Norm() | Rotate():
            return f"level {op.level}"
        case PoolRows() | PoolHeads() | ReduceRows() | Assign() | Runs():
            return f"level {op.level}"
        case Score() | Normalise() | Map() | Select() | SelectSet() | Unlike():
            return f"level {op.level}"
        case Attend():
            return f"branch {op.branch}"
        case Input() | Round() | Delta() | LogSumExp() | Reduce() | Route() | Switch():
            return ""
        case Gate() | Union() | OutputGate() | Divergence() | Distance() | Entropies():
            return ""
        case _:
            assert_never(op)
