"""All pairs of a head are ranked together: what fills `_rank_pairs.jinja`.

A block of rows has as many entries as the head's best pairs are of it, all or none.  Masses of all rows of
a call lie in a scratch; one program a head and sequence finds where the best pairs end, a part of them or a
part of what they weigh, and how many of those that lie at the edge the rows before each one take, so that
rows then make their lists each for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hsgen import axes
from hsgen.kernels import EntriesOfBlocks, ties_of_masses, tunables
from hsgen.plan import Param
from hsgen.rows import SEQ, count, jit, pointer

CAPACITY = count("capacity", "row length of the scratch")


def ways_of(heads: int) -> Param:
    """Which way each head takes, as kernels that look at the prompt say it."""
    return pointer("WAYS", "i32", f"[Z, {heads}] way of each head")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsContext(EntriesOfBlocks):
    """Everything `_rank_pairs.jinja` reads: entries as in a RankContext, of blocks of `rows` rows.

    `masses`: the softmax of each row in place, and which blocks have a row.  `edges`: where the best pairs
    end.  `lists`: of each row.
    """

    name: str
    how: Literal["masses", "edges", "lists"]
    header: str = ""
    pieces: str = ""
    heads: int  # selection heads
    counted: bool
    part: int = 0  # of the pairs, in units of 2^-30
    mass: int = (
        0  # > 0: in place of it, the part of all masses that is reached; what is forced is beside
    )
    drop: bool = False  # of a mass: the pair that crosses it is left out
    slotted: bool = False  # rows and keys are slots of tiles of axes
    way: int | None = None  # the number of the way that a head must be on to choose any

    @property
    def summary(self) -> str:
        match self.how:
            case "masses":
                return "the softmax of each block of rows, in place of its logits."
            case "edges":
                return (
                    "where the best pairs of a head end, and what rows before each one take there."
                )
            case "lists":
                return "the entries of each block of rows among the best pairs of its head."

    @property
    def wanted(self) -> str:
        """How many pairs a head keeps, all forced ones too."""
        part = f"part_of(candidates, {self.part})"
        return f"tl.maximum({part}, forced)" if self.counted else f"{part} + forced"

    @property
    def ties(self) -> str:
        """How many pairs are taken of those at the edge of masses."""
        return ties_of_masses(drop=self.drop)

    @property
    def params(self) -> tuple[Param, ...]:
        scores = pointer("SCORES", "f32", f"f32[tiles * BLOCK_T, {self.heads}, capacity]")
        there = pointer("THERE", "i32", "i32[tiles * BLOCK_T] 1 of a block that has a row")
        edges = pointer("EDGES", "i32", f"i32[Z, {self.heads}, 3] low, high, how many of low")
        before = pointer(
            "BEFORE", "i32", f"i32[tiles * BLOCK_T, {self.heads}] of low in rows before"
        )
        ways = (ways_of(self.heads),) if self.way is not None else ()
        match self.how:
            case "masses":
                order = (axes.ORDER,) if self.slotted else ()
                return (scores, there, *order, *SEQ, CAPACITY, *tunables("BLOCK_T", "BLOCK_N"))
            case "edges":
                tiles = tunables("BLOCK_T", "BLOCK_R", "BLOCK_N")
                return (scores, there, edges, before, *ways, *SEQ, CAPACITY, *tiles)
            case "lists":
                return (
                    scores,
                    there,
                    edges,
                    before,
                    pointer("SELECTION", "i32", f"i32[blocks, {self.heads}, width]"),
                    *ways,
                    *SEQ,
                    CAPACITY,
                    count("width", "slots of a row"),
                    *tunables("BLOCK_T", "BLOCK_N"),
                )

    @property
    def jit(self) -> str:
        return jit(self.params)
