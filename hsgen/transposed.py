"""What fills the `index` skeleton to list, of blocks of 64 tokens, the rows that chose any of them.

A row is marked at the blocks of its tokens, a bit each, in a table of a turn's blocks by all rows; of each
block the rows that are marked then move to the front of a list, with their words.  Bits are set in any order
and places are counted by one program, so lists ascend and have the same bits in every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hsgen import rows
from hsgen.kernels import tunables
from hsgen.plan import Param
from hsgen.rows import MARKED, SEQ, Entries, count, pointer, tensor

BUCKET_FIRST = count("bucket_first", "the turn's first block")
CHUNK = count("chunk", "blocks of a turn, at most")
TOKENS = count("tokens", "rows of a sequence; packed: of all")
LENGTH = count("length", "of one sequence; packed: 0")


def lists(own: int) -> tuple[Param, ...]:
    """What says of a turn's blocks which rows chose which tokens, `own` words a row."""
    words = f"i64[lists, chunk, tokens, {own}]" if own > 1 else "i64[lists, chunk, tokens]"
    return (
        pointer("COUNTS", "i32", "[lists, chunk] rows of each block"),
        pointer("LIST", "i32", "[lists, chunk, tokens] these, ascending, within their sequence"),
        pointer("MARKS", "i64", f"{words} tokens that each chose, as bits"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TransposedContext:
    """Everything `index.py.jinja` reads to list, of each block, the rows that chose any of its tokens."""

    name: str
    how: Literal["mark", "front"]
    header: str = ""
    pieces: str = ""
    heads: int  # selection heads
    own: int  # of these, those whose rows are in one list
    width: int  # slots of a row of the selection
    causal: bool
    entries: Entries | None = None  # that are chosen in place of tokens

    @property
    def summary(self) -> str:
        if self.how == "mark":
            return f"a bit for each {self.one} that a row chose, in words of 64."
        return (
            f"the rows that chose any {self.one} of a block, in their order, and which {self.many}."
        )

    @property
    def one(self) -> str:
        return "entry" if self.entries else "token"

    @property
    def many(self) -> str:
        return "entries" if self.entries else "tokens"

    @property
    def seen(self) -> str:
        """How many tokens each row sees, or entries that are complete."""
        return rows.seen_by("q_offset + t", self.entries, causal=self.causal)

    @property
    def block(self) -> int:
        """Tokens from a block to the next one."""
        return MARKED * (self.entries.stride if self.entries else 1)

    @property
    def until(self) -> str:
        """From where a block begins to the first row that may have chosen any of it, where that is behind."""
        return f" + {self.entries.size - 1}" if self.entries else ""

    @property
    def params(self) -> tuple[Param, ...]:
        shape = f"[B, T, {self.heads}, {self.width}] {self.many}, -1 anywhere"
        comment = f"[{self.heads}, chunk, tokens] {self.many} as bits; 0 between turns"
        bits = pointer("BITS", "i64", comment)
        sizes = (LENGTH, CHUNK, TOKENS, *SEQ, BUCKET_FIRST)
        if self.how == "mark":
            selection = tensor("SELECTION", "s", shape, "bths", "i32")
            return (*selection, bits, *sizes, *tunables("BLOCK_T", "BLOCK_K"))
        return (bits, *lists(self.own), *sizes, *tunables("BLOCK_N"))

    @property
    def jit(self) -> str:
        return rows.jit(self.params)
