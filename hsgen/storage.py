"""What a cache keeps of a spec: tokens as callers bring them, and the entries that are pooled of them.

Numbers only: no tensors, and nothing of kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hsgen.analysis import causality, causality_text
from hsgen.errors import PlanError
from hsgen.graph import Graph, Input, Node, Norm, Pool, Rotate, Round


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A tensor with a row a token: keys, values, those of a branch or of an index."""

    name: str
    dims: tuple[int, ...]  # behind batch and tokens

    @property
    def numbers(self) -> int:
        """Of a token."""
        return math.prod(self.dims)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Pooled entries: entry e is of tokens up to e * stride + size, and kept once all are there."""

    name: str  # of the node that makes them
    level: str
    size: int
    stride: int
    heads: int
    width: int  # numbers of one entry and head

    @property
    def numbers(self) -> float:
        """Of a token: its part of an entry."""
        return self.heads * self.width / self.stride


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """Everything that a cache keeps."""

    streams: tuple[Stream, ...]
    levels: tuple[Kept, ...]


def storage_of(graph: Graph) -> Storage:
    """What a cache of a spec keeps, heads and head dims bound.

    Raises:
        PlanError: a row depends on tokens after it, or the spec reads something that grows in another way.
    """
    if causality(graph) != "token":
        raise PlanError(
            f"{graph.meta.name}: no cache, as causality is {causality_text(graph)}: a row depends on "
            "more than the tokens up to its own, so a step is no row of prefill",
            help="decode, and chunks of prefill in a cache, exist for causality token",
        )
    for name in ("Hq", "Hkv", "Dqk", "Dv"):
        if name not in graph.sizes:
            raise PlanError(
                f"{name} is not known: a cache needs `heads` and `head_dim`, in the spec or of load_kernel"
            )
    streams: list[Stream] = []
    levels: list[Kept] = []
    for node in graph.nodes():
        match node.op:
            case Input(role=role) if role != "state":
                if stream := _stream(graph, node):
                    streams.append(stream)
            case Round() if "T" not in node.type.dims:
                raise PlanError(
                    f"%{node.name}: no cache keeps keys rounded to {node.op.dtype} yet",
                    span=node.span,
                )
            case Pool():
                levels.append(_level(graph, node, node.op))
            case _:
                pass
    return Storage(streams=tuple(streams), levels=tuple(levels))


def _stream(graph: Graph, node: Node) -> Stream | None:
    """An input that grows by a row a token; None of one that does not grow."""
    dims = node.type.dims
    if dims[:2] == ("B", "S"):
        return Stream(name=node.name, dims=tuple(_size(graph, dim) for dim in dims[2:]))
    if "S" in dims or any(dim.startswith("N_") for dim in dims):
        shape = ", ".join(dims)
        raise PlanError(f"{node.name} [{shape}]: no cache keeps such a tensor yet", span=node.span)
    return None


def _level(graph: Graph, node: Node, op: Pool) -> Kept:
    """A pool, by the name of its last norm or rotation."""
    heads, *rest = [_size(graph, dim) for dim in node.type.dims[2:]]
    if not rest:  # an index has no heads
        heads, rest = 1, [heads]
    last = node
    while nexts := [x for x in graph.users(last.name) if isinstance(x.op, Norm | Rotate)]:
        last = nexts[0]
    return Kept(
        name=last.name,
        level=op.level,
        size=op.size - (op.before or 0),
        stride=op.stride,
        heads=heads,
        width=math.prod(rest),
    )


def _size(graph: Graph, dim: str) -> int:
    return int(dim) if dim.isdecimal() else graph.sizes[dim]
