"""What fills the `learn` skeleton of a learned tree's dual entropy: how sharply keys and queries choose their
way down, and how evenly.

One walk tells each vector's way, log-sum-exp and entropy by level, and sums shares of a tile of rows.  Sums
over tiles, in their order, tell the balance.  From what each vector kept of its way gradients are made, of
vectors by tiles of these and of centroids by tiles of those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hsgen.plan import Param
from hsgen.rows import SEQ, Chunk, chunks, constexprs, count, jit, number, pointer, tensor

How = Literal["walk", "balance", "vectors", "nodes", "centroids"]
Side = Literal["k", "q"]
PULL = 256.0  # of gradients, so that those of single vectors are no subnormal fp16 numbers
LEAST = 1e-12  # of a length, as PyTorch normalises
SUMMARIES: dict[How, str] = {
    "walk": "the way of each vector down a tree, and sums of its shares by node.",
    "balance": "affinity less balance of each sequence and key head.",
    "vectors": "gradients of vectors that go down a tree.",
    "nodes": "gradients of unit centroids.",
    "centroids": "gradients of centroids, of any length.",
}

_VECTORS = tensor("X", "x", "[B, T, H, Dqk] vectors", "bth")
_SEQUENCES = (
    *SEQ,
    count("length", "rows of keys from one sequence to the next; packed: 0"),
)
_ROWS = count("all_rows", "of all sequences")
_BLOCK_E = Param(name="BLOCK_E", kind="constexpr", comment="nodes a step")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A level of a tree: `first` nodes are in levels above."""

    index: int
    nodes: int
    branching: int
    first: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropiesContext:
    """What `learn.py.jinja` reads of a tree's kernels.

    heads: of keys, each with a tree.  group: heads of vectors that go down one.
    """

    name: str
    how: How
    side: Side
    heads: int
    group: int
    query_group: int
    head_dim: int
    stages: tuple[Stage, ...]
    temperature: float
    weight: float  # of balance
    precision: str
    parts: int  # numbers of the vectors' type that have all bits of one of 32
    header: str = ""
    pieces: str = ""

    @property
    def summary(self) -> str:
        return SUMMARIES[self.how]

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def cuts(self) -> range:
        return range(self.parts)

    @property
    def nodes(self) -> int:
        """Of all levels."""
        return sum(stage.nodes for stage in self.stages)

    @property
    def sums(self) -> int:
        """Numbers of a tile of rows: shares of all nodes, and entropy."""
        return self.nodes + 1

    @property
    def sharpness(self) -> str:
        """What a cosine is times."""
        return number(1 / self.temperature)

    @property
    def slope(self) -> str:
        """What gradients of cosines are times, with what `Execution` divides by again."""
        return number(PULL / self.temperature)

    @property
    def balance(self) -> str:
        return number(self.weight)

    @property
    def least(self) -> str:
        return number(LEAST)

    @property
    def vector_heads(self) -> int:
        return self.heads * self.group

    @property
    def params(self) -> tuple[Param, ...]:
        units = tuple(
            pointer(
                f"UNIT{x.index}", "f32", f"f32[{self.heads}, {x.nodes}, {self.head_dim}] centroids"
            )
            for x in self.stages
        )
        of = f"[{len(self.stages)}, {self.vector_heads}, rows]"
        families = pointer("FAMILIES", "i32", f"i32{of} the node above")
        stats = pointer("STATS", "f32", f"f32{of[:-1]}, 2] log-sum-exp, and what follows from it")
        logs = pointer("LOGS", "f32", f"f32[Z, 2, {self.heads}, {self.nodes}] of mean shares")
        match self.how:
            case "walk":
                return (
                    *_VECTORS,
                    *units,
                    families,
                    stats,
                    pointer("SUMS", "f32", f"f32[tiles, {self.heads}, {self.sums}]"),
                    *_SEQUENCES,
                    _ROWS,
                    *constexprs("BLOCK_T", "BLOCK_M"),
                    _BLOCK_E,
                )
            case "balance":
                return (
                    pointer("K_SUMS", "f32", f"f32[tiles, {self.heads}, {self.sums}] of keys"),
                    pointer("Q_SUMS", "f32", f"f32[tiles, {self.heads}, {self.sums}] of queries"),
                    logs,
                    pointer("ROWS", "f32", f"f32[Z, {self.heads}, 2] loss, and keys that count"),
                    *_SEQUENCES,
                    *constexprs("BLOCK_T"),
                    _BLOCK_E,
                )
            case "vectors":
                return (
                    *_VECTORS,
                    *units,
                    families,
                    stats,
                    logs,
                    *tensor("DX", "dx", "gradient of X", "bth"),
                    *_SEQUENCES,
                    _ROWS,
                    *constexprs("BLOCK_T", "BLOCK_M"),
                    _BLOCK_E,
                )
            case "nodes":
                return (
                    *_VECTORS,
                    *units,
                    families,
                    stats,
                    logs,
                    pointer("DUNIT", "f32", f"f32[parts, {self.heads}, {self.nodes}, D] sums"),
                    *_SEQUENCES,
                    _ROWS,
                    count("tiles", "of rows of all sequences"),
                    *constexprs("BLOCK_T", "BLOCK_M"),
                    _BLOCK_E,
                )
            case "centroids":
                return (
                    pointer("CENTROIDS", "input", f"[{self.heads}, nodes, {self.head_dim}]"),
                    Param(name="c_h", kind="stride", comment="CENTROIDS: head stride"),
                    Param(name="c_n", kind="stride", comment="CENTROIDS: node stride"),
                    pointer("DUNIT", "f32", f"f32[parts, {self.heads}, {self.nodes}, D] sums"),
                    pointer("DC", "f32", "gradient of CENTROIDS"),
                    count("parts", "of each sum"),
                    count("nodes", "of the level"),
                    count("first", "nodes of levels above"),
                    _BLOCK_E,
                )

    @property
    def jit(self) -> str:
        return jit(self.params)
