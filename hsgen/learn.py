"""What fills the `learn` skeleton: a KL of an index against attention, and its gradients, from a scratch.

Of a turn of rows the scratch has two numbers a token: its score, and what the heads of attention give it.
The first becomes the gradient of the score, from which those of queries and keys are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hsgen.plan import Param
from hsgen.rows import (
    LOG2_E,
    SEQ,
    Chunk,
    chunks,
    constexprs,
    count,
    jit,
    lse,
    next_power,
    number,
    pointer,
    tensor,
)

How = Literal["scores", "rows", "queries", "keys"]
GAIN = 4096.0  # of gradients of scores, so that those of long rows are no subnormal fp16 numbers
SLOPE = (
    2.0**-6
)  # of slopes of a distance, so that their sums over rows are no infinite fp16 numbers
LEAST = 2.0**-126  # of attention, that a row learns from: the reciprocal of less may be infinite
LINE = 128  # numbers: rows of the scratch are so many, or some times as many, so that tiles are read whole
WIDEST = 128  # columns of a head that a dot takes at a time

_INDEX = (
    *tensor("Q_INDEX", "qi", "[B, T, Hi, Di]", "bth"),
    *tensor("K_INDEX", "ki", "[B, S, Di]", "bt"),
)
_WEIGHT = tensor("WEIGHT", "w", "[B, T, Hi]", "bt")
_ATTENTION = (
    *tensor("Q", "q", "[B, T, Hq, Dqk]", "bth"),
    *tensor("K", "k", "[B, S, Hkv, Dqk]", "bth"),
    *lse(),
)
_SCORES = pointer("SCORES", "f32", "f32[rows, lines * 128] scores, then their gradients")
_TARGET = pointer("TARGET", "f32", "f32[rows, lines * 128] what attention gives")
_LIST = tensor("SELECTION", "sel", "i32[B, T, 1, K] tokens", "bts", "i32")
_PARENTS = tensor("PARENT", "par", "i32[B, T, 1, K] surviving parents", "bts", "i32")
_DQ = tensor("DQ", "dq", "gradient of Q_INDEX", "bth")
_DW = tensor("DW", "dw", "gradient of WEIGHT", "bt")
_DK = tensor("DK", "dk", "f32[parts, B, S, Di] gradient of K_INDEX", "sbt", "f32")
_TURN = count("tile_first", "the turn's first tile")
_LINES = count("lines", "of 128 numbers in a row of the scratch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """An index that learns, and whom it learns from.

    restricted: only tokens that rows chose, or below parents that they chose, count.
    width: slots of a row's list of tokens; 0: it has none.  parents: of its list of parents, likewise.
    """

    loss: str
    heads: int
    dim: int
    weighted: bool
    scale: float
    query_heads: int
    group: int
    qk: int
    attention_scale: float
    most: bool  # the greatest of the heads, not their sum
    causal: bool
    width: int
    parents: int
    parent_size: int
    precision: str

    @property
    def restricted(self) -> bool:
        return bool(self.width or self.parents)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnContext:
    """Everything `learn.py.jinja` reads."""

    name: str
    summary: str
    how: How
    index: Index
    params: tuple[Param, ...]
    derives: bool = False  # rows leave the gradients of their scores
    header: str = ""
    pieces: str = ""

    @property
    def index_chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.index.dim)

    @property
    def qk_chunks(self) -> tuple[Chunk, ...]:
        """Of a head of attention, of which wide ones are multiplied part by part."""
        whole, rest = divmod(self.index.qk, WIDEST)
        cut = [Chunk(index=i, offset=i * WIDEST, width=WIDEST, source=0) for i in range(whole)]
        for c in chunks(rest):
            offset = whole * WIDEST + c.offset
            cut.append(Chunk(index=len(cut), offset=offset, width=c.width, source=0))
        return tuple(cut)

    @property
    def seen(self) -> str:
        """Where what each row `token` sees ends, as an expression."""
        return "tl.minimum(q_offset + token + 1, k_len)" if self.index.causal else "k_len"

    @property
    def scale_log2(self) -> str:
        return number(self.index.attention_scale * LOG2_E)

    @property
    def line(self) -> int:
        return LINE

    @property
    def gain(self) -> str:
        return number(GAIN)

    @property
    def least(self) -> str:
        return number(LEAST)

    @property
    def share(self) -> str:
        """What gradients are times, beside what a row's weights say."""
        return number(self.index.scale / GAIN)

    @property
    def padded_parents(self) -> int:
        return next_power(self.index.parents)

    @property
    def padded_children(self) -> int:
        return next_power(self.index.parent_size)

    @property
    def jit(self) -> str:
        return jit(self.params)


def scores(index: Index) -> LearnContext:
    """Scores of a tile of rows at a tile of tokens, and what the heads of attention give these."""
    return LearnContext(
        name=f"scores_{index.loss}",
        summary="scores of an index, and what the heads of attention give each token.",
        how="scores",
        index=index,
        params=(
            *_INDEX,
            *(_WEIGHT if index.weighted else ()),
            *_ATTENTION,
            _SCORES,
            _TARGET,
            _LINES,
            *SEQ,
            _TURN,
            *constexprs("BLOCK_T", "BLOCK_N"),
        ),
    )


def rows(index: Index, *, derives: bool) -> LearnContext:
    """The divergence of each row; with `derives` the gradients of its scores, in their place."""
    after = ", and the gradients of its scores" if derives else ""
    return LearnContext(
        name=f"rows_{index.loss}",
        summary=f"the divergence of each row{after}.",
        how="rows",
        index=index,
        params=(
            _SCORES,
            _TARGET,
            *(_LIST if index.width else ()),
            *(_PARENTS if index.parents else ()),
            pointer("ROWS", "f32", "f32[rows, 2] divergence, and 1 where there is one"),
            _LINES,
            *SEQ,
            _TURN,
            *constexprs("BLOCK_T", "BLOCK_N"),
            *(
                (Param(name="BLOCK_K", kind="constexpr", comment="slots of a list a step"),)
                if index.width
                else ()
            ),
        ),
        derives=derives,
    )


def queries(index: Index) -> LearnContext:
    """Gradients of an index's queries and weights: rows of one head stay, keys stream past."""
    return LearnContext(
        name=f"dq_{index.loss}",
        summary="gradients of the queries and weights of an index.",
        how="queries",
        index=index,
        params=(
            *_INDEX,
            *(_WEIGHT if index.weighted else ()),
            _SCORES,
            *_DQ,
            *(_DW if index.weighted else ()),
            _LINES,
            *SEQ,
            _TURN,
            *constexprs("BLOCK_T", "BLOCK_N"),
        ),
    )


def keys(index: Index) -> LearnContext:
    """Gradients of an index's keys: keys stay, the heads of a turn's rows stream past."""
    return LearnContext(
        name=f"dk_{index.loss}",
        summary="gradients of the keys of an index, to which each turn of rows adds.",
        how="keys",
        index=index,
        params=(
            *_INDEX,
            *(_WEIGHT if index.weighted else ()),
            _SCORES,
            *_DK,
            _LINES,
            count("length", "keys of a sequence; 0 where they are packed"),
            *SEQ,
            _TURN,
            count("tiles", "of the turn"),
            *constexprs("BLOCK_T", "BLOCK_N"),
            Param(name="BLOCK_R", kind="constexpr", comment="rows of a tile a step"),
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DistanceContext:
    """What `learn.py.jinja` reads of the distance of two outputs; `derives`: gradients of both, or of one.

    both: each learns from the other, else the student from the teacher.
    """

    name: str
    how: Literal["distance"] = "distance"
    form: Literal["mse", "smooth_l1"]
    both: bool
    heads: int
    dim: int
    derives: bool
    header: str = ""
    pieces: str = ""

    @property
    def summary(self) -> str:
        return "how far two outputs are apart, of each tile of rows."

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.dim)

    @property
    def slope(self) -> str:
        """What slopes are times."""
        return number((2.0 if self.form == "mse" else 1.0) * SLOPE)

    @property
    def times(self) -> str:
        """How often a distance counts."""
        return "2.0" if self.both else "1.0"

    @property
    def params(self) -> tuple[Param, ...]:
        shape = f"[B, T, {self.heads}, {self.dim}]"
        student = tensor("DS", "ds", f"{shape} gradient of STUDENT", "bth")
        teacher = tensor("DT", "dt", f"{shape} gradient of TEACHER", "bth")
        made = (*student, *(teacher if self.both else ())) if self.derives else ()
        return (
            *tensor("STUDENT", "s", shape, "bth"),
            *tensor("TEACHER", "t", shape, "bth"),
            *made,
            pointer("ROWS", "f32", f"f32[tiles, {self.heads}, 2] sums, and of how many numbers"),
            *SEQ,
            Param(name="BLOCK_R", kind="constexpr", comment="rows a tile"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)
