"""Gradients of entries that gates weigh, and that are normed and rotated; see `_segments_unweigh.jinja`.

An entry y is the sum of w x over its tokens, w their softmax of gate + position, channel by channel.  With
size = (mean(y^2) + eps)^1/2 what is kept is u = y / size times a learned norm, turned.  Turned back, the
gradient of that is d, and g = d * norm: dy = (g - u mean(g u)) / size, of a token dx = w dy, of its gate
dx (x - y).  Entries leave y, dy and the logarithm of their softmax's sum: tokens, gates and what is learned
have theirs from these, each of one program, in one order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hsgen import rows
from hsgen.kernels import SegmentsContext, tunables
from hsgen.plan import Param
from hsgen.rows import SEQ, Chunk, chunks, count, pointer

How = Literal["unfinish", "unweigh", "slots", "norms", "turns"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnweighContext:
    """Everything `segments.py.jinja` reads to go back through entries that gates weigh.

    unfinish: of every entry, before it was normed and turned.  unweigh: tokens and their gates.
    slots: learned positions of gates.  norms: the learned norm.  turns: tables of angles.
    """

    name: str
    how: How
    header: str = ""
    pieces: str = ""
    pool: SegmentsContext  # what made the entries
    adds: tuple[bool, bool] = (False, False)  # to gradients of tokens and of gates

    @property
    def summary(self) -> str:
        match self.how:
            case "unfinish":
                return "the gradient of entries, from that of what they are normed and turned to."
            case "unweigh":
                return "the gradient of tokens and their gates, from those of the entries that they are in."
            case "slots":
                return "the gradient of learned positions of gates, from those of all entries."
            case "norms":
                return "the gradient of a learned norm, from those of all entries."
            case "turns":
                return "the gradient of cos and sin, from those of the entries that they turn."

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.pool.head_dim)

    @property
    def taps(self) -> int:
        """Entries that a token is in, at most."""
        return -(-self.pool.size // self.pool.stride)

    @property
    def entries(self) -> str:
        """How many entries a sequence has."""
        pool = self.pool
        return f"pooled_entries(k_len, {pool.size - pool.before}, {pool.stride}, {pool.short})"

    @property
    def row(self) -> int:
        """From one entry to the next one."""
        return self.pool.heads * self.pool.head_dim

    @property
    def place(self) -> str:
        """A token's place, from where the first entry begins on."""
        return f"(t + {self.pool.before})" if self.pool.before else "t"

    @property
    def stores(self) -> tuple[str, str]:
        """How tokens and gates get theirs."""
        tokens, gates = ("add_rows" if each else "store_rows" for each in self.adds)
        return tokens, gates

    @property
    def params(self) -> tuple[Param, ...]:
        pool = self.pool
        of = f"f32[B, N, {pool.heads}, {pool.head_dim}]"
        grads = pointer("GRADS", "f32", f"{of} of entries, normed and turned")
        means = pointer("MEANS", "f32", f"{of} entries as they were before that")
        sums = pointer("SUMS", "f32", f"{of} log2 of the sum of an entry's softmax")
        of_means = pointer("DMEANS", "f32", f"{of} gradient of MEANS")
        parts = pointer("PARTS", "f32", f"{of} what each entry gives the norm")
        weight = pointer("NORM", "input", f"[{pool.head_dim}]")
        norm = (weight,) if pool.normed else ()
        tables = pool.turn.tables if pool.turn else ()
        shape = f"[{pool.heads}, {pool.size}, {pool.head_dim}]"
        position = (pointer("POSITION", "input", shape),) if pool.position else ()
        tokens = (*pool.keys, *pool.gates, *position)
        weighed = (*tokens, means, sums, of_means)
        length = count("pool_length", "entries of one sequence; packed: 0, or 1 with short ones")
        match self.how:
            case "unfinish":
                made = (means, sums, of_means, *((parts,) if norm else ()))
                read, tiles = (*tokens, *norm, *tables, grads), ("BLOCK_E", "BLOCK_J")
            case "unweigh":
                made = (*_gradient(pool.keys), *_gradient(pool.gates))
                made = (*made, count("length", "of one sequence; packed: 0"))
                read, tiles = weighed, ("BLOCK_V", "BLOCK_D")
            case "slots":
                made = _gradient(position)
                read, tiles = weighed, ("BLOCK_E", "BLOCK_D")
            case "norms":
                made = _gradient((weight,))
                read, tiles = (parts,), ("BLOCK_E", "BLOCK_D")
            case "turns":
                made = (*_gradient(tables[:3]), *_gradient(tables[3:]))
                read, tiles = (*norm, grads, means), ("BLOCK_E",)
        return (*read, *made, length, *SEQ, *tunables(*tiles))

    @property
    def jit(self) -> str:
        return rows.jit(self.params)


def _gradient(of: tuple[Param, ...]) -> tuple[Param, ...]:
    """Of a tensor and its strides those of its gradient."""
    x, *strides = of
    return (
        replace(x, name=f"D{x.name}", comment=f"{x.comment} gradient of {x.name}"),
        *(replace(each, name=f"d{each.name}", comment=f"D{each.comment}") for each in strides),
    )
