"""The graph while it grows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hsgen import spec as language
from hsgen.errors import Span
from hsgen.graph import DType, Input, Node, Op, Role, TensorType, result_type


@dataclass(slots=True, kw_only=True)
class Builder:
    """The graph while it grows: nodes by name, and the scores each level offers to others."""

    spec: language.Spec
    nodes: dict[str, Node] = field(default_factory=dict[str, Node])
    scores: dict[str, Node] = field(default_factory=dict[str, Node])
    assigned: dict[str, Node] = field(default_factory=dict[str, Node])  # nodes and runs of tokens
    selections: dict[str, Node] = field(default_factory=dict[str, Node])
    attended: dict[str, Node] = field(default_factory=dict[str, Node])  # where not the selection
    state: dict[str, Node] = field(default_factory=dict[str, Node])  # for the next call
    recalled: dict[tuple[str, tuple[str, ...]], Node] = field(
        default_factory=dict[tuple[str, tuple[str, ...]], Node]
    )

    def add(self, name: str, op: Op, *operands: Node, at: Span | None = None) -> Node:
        """The node `name`, made now or the same one again; the text asks for it `at` a place."""
        type_ = result_type(op, operands)
        inputs = tuple(operand.name for operand in operands)
        node = Node(name=name, op=op, inputs=inputs, type=type_, span=at)
        return self.nodes.setdefault(name, node)

    def place(self, item: language.Level | language.Attend, *field: str) -> Span | None:
        """Where the text says a field of a level or of a branch."""
        if isinstance(item, language.Level):
            return self.spec.span("levels", self.spec.levels.index(item), *field)
        return self.spec.span("attend", self.spec.attend.index(item), *field)

    def input(self, name: str, role: Role, *dims: str, dtype: DType = "input") -> Node:
        """A tensor of the caller, in the dtype of the query unless it says otherwise."""
        type_ = TensorType(dtype=dtype, dims=dims)
        node = Node(name=name, op=Input(role=role), inputs=(), type=type_)
        return self.nodes.setdefault(name, node)

    def query(self, q: str | None = None, heads: str = "Hq") -> Node:
        return self.input(f"q_{q}" if q else "q", "query", "B", "T", heads, "Dqk")

    def keys(self, kv: str | None) -> Node:
        return self.input(f"k_{kv}" if kv else "k", "keys", "B", "S", "Hkv", "Dqk")

    def values(self, kv: str | None) -> Node:
        return self.input(f"v_{kv}" if kv else "v", "values", "B", "S", "Hkv", "Dv")

    def bias(self) -> Node:
        return self.input("bias", "bias", "B", "S", "Hkv")

    def attention_scale(self) -> float | None:
        dim = self.spec.head_dim
        return None if dim is None else 1 / math.sqrt(dim.qk)


def some(node: Node | None) -> tuple[Node, ...]:
    return () if node is None else (node,)
