"""What fills the `halved` skeleton: intervals that blocks of rows halve, for the best token they come upon.

A program has the rows of one block and some intervals, and does all rounds of their search: of every interval
the middles of both halves meet the rows, and the half of the better one is searched on.  What a search looks
at depends on what it found, so keys are gathered one by one; heads that share them take turns on the same
intervals, whose tokens are then near.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hsgen.kernels import tunables
from hsgen.plan import Param
from hsgen.rows import QUERY, SEQ, Chunk, count, jit, next_power, number, pointer, tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class HalvedContext:
    """Everything `halved.py.jinja` reads.

    `children` > 0: intervals are those of a block's list of parents, slot by slot.
    """

    name: str
    header: str = ""
    pieces: str = ""
    heads: int  # query heads that agree on a score
    group: int  # query heads of a key head
    qk_chunks: tuple[Chunk, ...]
    rows: int  # of a block
    size: int
    until: int
    short: bool
    causal: bool
    scale: float
    reduce: Literal["sum", "mean", "max"]
    precision: str
    children: int = 0
    parent_width: int = 0
    parent_heads: int = 1
    parent_head: str = "head"
    alike: bool = (
        False  # as `RowsContext` has them: its scores are those of no step, and not mapped
    )
    folded: Literal["", "sum", "max"] = ""
    planes: int = 1

    @property
    def summary(self) -> str:
        below = " below surviving parents" if self.children else ""
        return f"scores of halved intervals{below}: the best token that each block's search meets."

    @property
    def padded_rows(self) -> int:
        """`rows` as a tile."""
        return max(16, next_power(self.rows))

    @property
    def parts(self) -> int:
        """Programs of the heads that agree, those of a key head each, whose scores a rank puts together."""
        return max(1, self.heads // self.group)

    @property
    def places(self) -> str:
        """From an interval's score, of one part, to the next one's."""
        return f" * {self.parts} + part" if self.parts > 1 else ""

    @property
    def members(self) -> int:
        """Heads of a program."""
        return self.heads // self.parts

    @property
    def slots(self) -> int:
        """Intervals below a list of parents."""
        return self.parent_width * self.children

    @property
    def limit(self) -> str:
        """Intervals that a block may choose."""
        flags = f"{self.causal}, {self.short}"
        return f"begun_limit(place, k_len, {self.rows}, {self.size}, {self.size}, {flags})"

    @property
    def identity(self) -> str:
        """What no head adds to a score."""
        return 'float("-inf")' if self.reduce == "max" else "0.0"

    @property
    def reduced(self) -> str:
        """A score with one more head."""
        return "tl.maximum(total, best)" if self.reduce == "max" else "total + best"

    @property
    def scaled(self) -> str:
        """A score of all heads."""
        factor = self.scale / self.heads if self.reduce == "mean" else self.scale
        return "total" if factor == 1.0 else f"total * {number(factor)}"

    @property
    def params(self) -> tuple[Param, ...]:
        parents = f"[blocks, {self.parent_heads}, {self.parent_width}] surviving parents"
        return (
            *QUERY,
            *tensor("K", "k", "[B, S, Hkv, Dqk]", "bth"),
            *((pointer("PARENT", "i32", parents),) if self.children else ()),
            pointer("SCORES", "f32", f"f32[blocks of the chunk, H, capacity, {self.parts}]"),
            count("capacity", "row length of the scratch"),
            *SEQ,
            count("tile_first", "the chunk's first tile of blocks"),
            *tunables("BLOCK_T", "BLOCK_N"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)
