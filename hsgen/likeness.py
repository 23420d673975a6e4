"""How alike the tokens of a block are: what fills `_segments_alike.jinja`.

The mean cosine of all pairs of a block is the squared length of the mean of its unit vectors, so a block
is read once.  Keys are taken less their sequence's mean, whose sums are made before, piece by piece, in
float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hsgen.kernels import tunables
from hsgen.plan import Param
from hsgen.rows import SEQ, Chunk, chunks, count, jit, number, pointer, tensor

PIECE = 1024  # tokens that one program sums
AT_ONCE = 16  # sums of pieces that are added at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class LikenessContext:
    """Everything `_segments_alike.jinja` reads.

    `sums`: of pieces of PIECE tokens.  `alike`: which blocks, of `size` tokens or of so many rows, have a
    mean cosine of at most `similarity`; `centred`: of keys less the mean that sums of pieces give.
    """

    name: str
    how: Literal["sums", "alike"]
    header: str = ""
    pieces: str = ""
    heads: int
    head_dim: int
    size: int = PIECE
    rows: bool = False  # blocks are of rows
    short: bool = False
    similarity: float = 0.0
    centred: bool = False

    @property
    def summary(self) -> str:
        if self.how == "sums":
            return f"the sum of every {self.size} tokens."
        return f"whether the {'rows' if self.rows else 'tokens'} of a block are unlike, as 1."

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def piece(self) -> int:
        return PIECE

    @property
    def at_once(self) -> int:
        return AT_ONCE

    @property
    def threshold(self) -> str:
        return number(self.similarity)

    @property
    def params(self) -> tuple[Param, ...]:
        of = "[B, T, H, D]" if self.rows else "[B, S, H, D]"
        sums = pointer("SUMS", "f32", f"f32[Z, pieces, {self.heads}, {self.head_dim}]")
        length = count(
            "length", "entries of a sequence; packed: 1 if the last may be short, else 0"
        )
        if self.how == "sums":
            return (*tensor("X", "x", of, "bth"), sums, length, *SEQ, *tunables("BLOCK_J"))
        made = f"[blocks, {self.heads}]" if self.rows else f"[{self.heads}, entries]"
        return (
            *tensor("X", "x", of, "bth"),
            *((sums, count("pieces", "of a sequence; packed: 1")) if self.centred else ()),
            pointer("UNLIKE", "i32", f"i32{made}"),
            *(() if self.rows else (length, count("entries", "of all sequences"))),
            *SEQ,
            *tunables("BLOCK_J"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)
