"""Gradients of pools: from those of entries back to tokens and to learned maps; see `segments.py.jinja`.

A token has a few entries, so tokens stay and add those of theirs; a map has all entries, so its tiles stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hsgen import axes, rows
from hsgen.kernels import PoolHow, tunables
from hsgen.plan import Param
from hsgen.rows import SEQ, Chunk, chunks, count, pointer, tensor

How = Literal["unpool", "unmap", "weights", "positions"]
DERIVED: tuple[PoolHow, ...] = ("mean", "sum_rsqrt", "linear")  # pools that have a gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpoolContext:
    """Everything `segments.py.jinja` reads to go back through a pool.

    unpool: tokens of a sum of tokens.  unmap: tokens of a learned map.  weights, positions: of the map.
    """

    name: str
    how: How
    header: str = ""
    pieces: str = ""
    pool: PoolHow
    heads: int
    head_dim: int
    size: int
    stride: int
    short: bool = False
    position: bool = False
    precision: str
    adds: bool = False  # to gradients of branches
    by_turns: bool = False  # heads have turns, and gradients of entries are those of a turn's heads

    @property
    def summary(self) -> str:
        match self.how:
            case "unpool" | "unmap":
                return "the gradient of tokens, from those of the entries that they are in."
            case "weights":
                return "the gradient of a learned map, from those of all entries."
            case "positions":
                return "the gradient of learned positions, from those of all entries."

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def taps(self) -> int:
        """Entries that a token is in, at most."""
        return -(-self.size // self.stride)

    @property
    def entries(self) -> str:
        """How many entries a sequence has."""
        return f"pooled_entries(k_len, {self.size}, {self.stride}, {self.short})"

    @property
    def divisor(self) -> str:
        """What a sum over the tokens was divided by, of each entry."""
        tokens = "tl.maximum(tokens, 1).to(tl.float32)"
        return f"tl.sqrt_rn({tokens})" if self.pool == "sum_rsqrt" else tokens

    @property
    def held(self) -> str:
        """Heads of an entry's gradients."""
        return "tl.num_programs(1)" if self.by_turns else str(self.heads)

    @property
    def held_head(self) -> str:
        """Which of these a program has."""
        return "turn_head" if self.by_turns else "head"

    @property
    def row(self) -> str:
        """From one entry's gradients to the next one's."""
        if self.by_turns:
            return f"tl.num_programs(1) * {self.head_dim}"
        return str(self.heads * self.head_dim)

    @property
    def store(self) -> str:
        return "add_rows" if self.adds else "store_rows"

    @property
    def params(self) -> tuple[Param, ...]:
        grads = pointer("GRADS", "f32", f"f32[B, N, {self.heads}, {self.head_dim}] of entries")
        pool_length = count(
            "pool_length", "entries of one sequence; packed: 0, or 1 with short ones"
        )
        tokens = tensor("DX", "dx", f"[B, S, {self.heads}, {self.head_dim}]", "bth")
        weight = pointer(
            "WEIGHT",
            "input",
            f"[{self.heads}, {self.size}, {self.head_dim}, {self.head_dim}]",
        )
        position = pointer("POSITION", "input", f"[{self.heads}, {self.size}, {self.head_dim}]")
        length = count("length", "of one sequence; packed: 0")
        match self.how:
            case "unpool":
                turn = (axes.HEAD_FIRST,) if self.by_turns else ()
                return (grads, *tokens, pool_length, length, *SEQ, *turn, *tunables("BLOCK_V"))
            case "unmap":
                tiles = tunables("BLOCK_E", "BLOCK_D")
                return (grads, weight, *tokens, pool_length, length, *SEQ, *tiles)
            case "weights":
                x = tensor("X", "x", f"[B, S, {self.heads}, {self.head_dim}]", "bth")
                read = (grads, *x, *((position,) if self.position else ()))
                made = pointer("DWEIGHT", "input", "as WEIGHT")
            case "positions":
                read, made = (grads, weight), pointer("DPOSITION", "input", "as POSITION")
        return (*read, made, pool_length, *SEQ, *tunables("BLOCK_E", "BLOCK_D"))

    @property
    def jit(self) -> str:
        return rows.jit(self.params)
