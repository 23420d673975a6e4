"""What fills the `learn` skeleton of a KL of pooled scores, a gate of blocks, against pooled attention.

One pass over keys makes, of a tile of rows and a head, each row's log-sum-exp and what each entry has of it:
of its tokens the greatest logit, or the log-sum-exp.  Both are of a turn of rows.  From them a unit, a row or
a block of rows that scores together, gets its target, its divergence and the gradients of its scores.  What
follows goes back from vectors to tokens: turns, norms, maps, pools.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hsgen.kernels import Turn
from hsgen.learn import GAIN, LEAST, WIDEST
from hsgen.plan import Param
from hsgen.rows import (
    LOG2_E,
    SEQ,
    Chunk,
    chunks,
    count,
    jit,
    next_power,
    number,
    pointer,
    tensor,
)

How = Literal[
    "truth",
    "marks",
    "shares",
    "of_queries",
    "of_entries",
    "parts",
    "finish",
    "maps",
    "tokens",
    "unpool",
]
Take = Literal["sum", "max"]
SUMMARIES: dict[How, str] = {
    "truth": "log-sum-exp of rows, and what entries have of it, in one pass over keys.",
    "marks": "scores of entries by the queries of units.",
    "shares": "the divergence of each unit, and the gradients of its scores.",
    "of_queries": "gradients of the queries of units.",
    "of_entries": "gradients of entries, to which each turn of rows adds.",
    "parts": "the greatest, the least and the mean of each entry's tokens.",
    "finish": "gradients of entries before they were turned and normed.",
    "maps": "gradients of the maps of an entry's parts.",
    "tokens": "gradients of an entry's tokens.",
    "unpool": "gradients of rows from those of units.",
}
STEP = 64  # tokens of a step, at least
LANES = 16  # units of a dot, at least


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A gate that learns, and whom it learns from.

    rows: of a unit.  heads, key_heads: that score, and of entries.  query_heads, kv_heads: of attention.
    """

    loss: str
    rows: int
    size: int
    short: bool
    causal: bool
    heads: int
    key_heads: int
    dim: int
    scale: float
    query_heads: int
    kv_heads: int
    qk: int
    attention_scale: float
    by_heads: Take
    by_tokens: Take
    by_rows: Take
    how: Literal["max_min_mean", "mean"]
    normed: bool
    key_turn: Turn | None
    query_turn: Turn | None
    precision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GateContext:
    """What `learn.py.jinja` reads of a gate's kernels."""

    name: str
    how: How
    gate: Gate
    derives: bool = False  # units leave the gradients of their scores
    header: str = ""
    pieces: str = ""

    @property
    def summary(self) -> str:
        return SUMMARIES[self.how]

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.gate.dim)

    @property
    def qk_chunks(self) -> tuple[Chunk, ...]:
        """Of a head of attention, of which wide ones are multiplied part by part."""
        whole, rest = divmod(self.gate.qk, WIDEST)
        cut = [Chunk(index=i, offset=i * WIDEST, width=WIDEST, source=0) for i in range(whole)]
        for c in chunks(rest):
            offset = whole * WIDEST + c.offset
            cut.append(Chunk(index=len(cut), offset=offset, width=c.width, source=0))
        return tuple(cut)

    @property
    def together(self) -> bool:
        """Whether units are blocks of rows, whose queries are kept in float32."""
        return self.gate.rows > 1

    @property
    def per(self) -> int:
        """Heads of attention that a score is for."""
        return self.gate.query_heads // self.gate.heads

    @property
    def group(self) -> int:
        return self.gate.query_heads // self.gate.kv_heads

    @property
    def key_group(self) -> int:
        """Heads that score the same entries."""
        return self.gate.heads // self.gate.key_heads

    @property
    def padded(self) -> int:
        """Tokens of an entry, as a tile."""
        return next_power(self.gate.size)

    @property
    def step(self) -> int:
        """Tokens of a step of keys: whole entries, or a part of one."""
        return max(STEP, min(self.padded, 128))

    @property
    def entries(self) -> int:
        """Of a step."""
        return max(1, self.step // self.padded)

    @property
    def pieces_of_entry(self) -> int:
        """Steps that an entry takes."""
        return max(1, self.padded // self.step)

    @property
    def scale_log2(self) -> str:
        return number(self.gate.attention_scale * LOG2_E)

    @property
    def scale(self) -> str:
        return number(self.gate.scale)

    @property
    def gain(self) -> str:
        return number(GAIN)

    @property
    def share(self) -> str:
        """What gradients are times."""
        return number(self.gate.scale / GAIN)

    @property
    def least(self) -> str:
        return number(LEAST)

    @property
    def sides(self) -> int:
        """Vectors that an entry's is mapped of, or is."""
        return 3 if self.gate.how == "max_min_mean" else 1

    @property
    def slice(self) -> int:
        """Columns of a step of a map."""
        return min(64, self.gate.dim & -self.gate.dim)

    def limit(self, unit: str) -> str:
        """Entries that a unit scores: those below this."""
        gate = self.gate
        if self.together:
            said = f"{gate.rows}, {gate.size}, {gate.size}, {gate.causal}, {gate.short}"
            return f"begun_limit({unit}, k_len, {said})"
        said = f"{gate.size}, {gate.size}, {gate.causal}, {gate.short}"
        return f"complete_limit({unit}, k_len, {said})"

    @property
    def params(self) -> tuple[Param, ...]:
        gate = self.gate
        turn = count("tile_first", "the turn's first tile")
        slots = count("slots", "rows of a turn")
        units = count("units", "of a turn")
        entries = count("entries", "most of a sequence")
        length = count("length", "entries from one sequence to the next")
        truth = pointer("TRUTH", "f32", f"f32[{gate.query_heads}, entries, slots] logarithms")
        sums = pointer("LSE", "f32", f"f32[{gate.query_heads}, slots] of rows")
        scores = pointer("SCORES", "f32", f"f32[{gate.heads}, entries, units]")
        of = f"{gate.key_heads}, {gate.dim}]"
        keys = pointer("ENTRIES", "input", f"[pool rows, {of}")
        dk = pointer("DENTRIES", "f32", f"f32[pool rows, {of} gradients")
        before = pointer("BEFORE", "f32", f"f32[pool rows, {of} before turn and norm")
        parts = pointer("PARTS", "f32", f"f32[{self.sides}, pool rows, {of}")
        pool_rows = count("pool_rows", "of all sequences")
        dq = pointer(
            "DUNITS", "f32" if self.together else "input", f"[units, {gate.heads}, {gate.dim}]"
        )
        weight = pointer("WEIGHT", "input", f"[{gate.key_heads}, 3, {gate.dim}, {gate.dim}]")
        tiles = _tunables("BLOCK_U")
        if self.together:
            q = (pointer("UNITS", "f32", f"f32[blocks, {gate.heads}, {gate.dim}]"),)
        else:
            q = tensor("UNITS", "u", f"[B, T, {gate.heads}, {gate.dim}]", "bth")
        x = tensor("X", "x", f"[B, S, {of}", "bth")
        match self.how:
            case "truth":
                return (
                    *tensor("Q", "q", "[B, T, Hq, Dqk]", "bth"),
                    *tensor("K", "k", "[B, S, Hkv, Dqk]", "bth"),
                    truth,
                    sums,
                    slots,
                    entries,
                    *SEQ,
                    turn,
                    *tiles,
                )
            case "marks":
                return (*q, keys, scores, units, entries, length, *SEQ, turn, *_lanes())
            case "shares":
                target = pointer("TARGET", "f32", f"f32[{gate.heads}, entries, units]")
                rows = pointer("ROWS", "f32", f"f32[blocks, {gate.heads}, 2] loss, and 1")
                scratch = (truth, sums, scores, target)
                return (*scratch, rows, slots, units, entries, *SEQ, turn, *_lanes())
            case "of_queries":
                return (keys, scores, dq, units, entries, length, *SEQ, turn, *_lanes())
            case "of_entries":
                here = count("count", "tiles of the turn")
                return (*q, scores, dk, units, entries, length, *SEQ, turn, here, *_lanes())
            case "parts":
                return (*x, parts, pool_rows, length, *SEQ, *_tunables("BLOCK_E", "BLOCK_J"))
            case "finish":
                norm = (
                    pointer("NORM", "input", f"[{gate.dim}]"),
                    pointer("DNORM", "f32", f"f32[programs, {gate.dim}] gradients of NORM"),
                )
                return (
                    *((parts, *((weight,) if self.sides == 3 else ())) if gate.normed else ()),
                    *(norm if gate.normed else ()),
                    *(gate.key_turn.tables if gate.key_turn else ()),
                    dk,
                    before,
                    pool_rows,
                    length,
                    *SEQ,
                    *_tunables("BLOCK_E"),
                )
            case "maps":
                made = pointer("DWEIGHT", "f32", "gradient of WEIGHT, of a sum over rows")
                return (parts, before, made, pool_rows, *_tunables("BLOCK_N"))
            case "tokens":
                return (
                    *((*x, parts, weight) if self.sides == 3 else ()),
                    before,
                    *tensor("DX", "dx", "gradient of X", "bth"),
                    pool_rows,
                    length,
                    *SEQ,
                    *_tunables("BLOCK_E", "BLOCK_J"),
                )
            case "unpool":
                return (
                    dq,
                    *(gate.query_turn.tables if gate.query_turn else ()),
                    *tensor("DX", "dx", f"[B, T, {gate.heads}, {gate.dim}] gradient", "bth"),
                    *SEQ,
                    *_tunables("BLOCK_R"),
                )

    @property
    def jit(self) -> str:
        return jit(self.params)


def _tunables(*names: str) -> tuple[Param, ...]:
    comments = {
        "BLOCK_U": "units a tile",
        "BLOCK_N": "entries a step",
        "BLOCK_E": "entries a tile",
        "BLOCK_J": "tokens of an entry a step",
        "BLOCK_R": "rows a tile",
    }
    return tuple(Param(name=n, kind="constexpr", comment=comments[n]) for n in names)


def _lanes() -> tuple[Param, ...]:
    return _tunables("BLOCK_U", "BLOCK_N")
