"""Anchors at distances behind a row that grow by a power, and attention to the spans that end at the best.

Anchors are scored row by row: those of neighbouring rows are neighbours, but seldom the same.  Spans are long
and begin anywhere, so rows are gathered to the block of keys that a span begins in, as in `buckets`; the
window, which each of a row's softmaxes has, is attended once (arXiv:2601.18401).  All of it lies behind a
row, whether the spec is causal or not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hsgen import buckets, rows
from hsgen.graph import Anchors, Attend, Graph, Input, Node, Score, Select, Spans
from hsgen.kernels import tunables
from hsgen.plan import Param
from hsgen.rows import SEQ, Chunk, Phase, RowsContext, Scoring, Shape, chunks, next_power, pointer

STRIDE = 64  # tokens of the blocks that spans begin in
ROWS = 32  # rows and slots of a program that finds spans


def scored(graph: Graph, node: Node) -> bool:
    """Whether anchors are scored as kernels know it: by each query head, for lists of the best."""
    op = node.op
    assert isinstance(op, Score)
    plain = Score(
        level=op.level,
        form="dot",
        scale=op.scale,
        size=1,
        stride=1,
        within=None,
        anchors=op.anchors,
    )
    chosen = [x for x in graph.users(node.name) if not isinstance(x.op, Attend)]
    known = bool(chosen) and all(isinstance(x.op, Select) for x in chosen)
    return op == plain and len(node.inputs) == 2 and _given(graph, node) and known


def attended(graph: Graph, node: Node) -> bool:
    """Whether a branch is one over spans that kernels know: the only one, of keys that the caller gives."""
    op = node.op
    if not isinstance(op, Attend) or op.spans is None or len(node.inputs) != 5:
        return False
    plain = Attend(
        branch=op.branch,
        over="spans",
        scale=op.scale,
        size=1,
        stride=1,
        window=None,
        softcap=op.softcap,
        spans=op.spans,
    )
    selection, scores = graph.operands(node)[3:]
    alone = sum(isinstance(x.op, Attend) for x in graph.nodes()) == 1
    of_heads = selection.type.dims[1:3] == ("T", "Hq")
    chosen = isinstance(selection.op, Select) and isinstance(scores.op, Score)
    made = chosen and selection.inputs == (scores.name,)
    return op == plain and alone and of_heads and made and _given(graph, node)


def _given(graph: Graph, node: Node) -> bool:
    """Whether queries, keys and values are the caller's, of as many heads as there are."""
    of = graph.operands(node)[: 3 if isinstance(node.op, Attend) else 2]
    heads = ("Hq", *("Hkv",) * (len(of) - 1))
    given = all(isinstance(x.op, Input) and len(x.type.dims) == 4 for x in of)
    return given and tuple(x.type.dims[2] for x in of) == heads


# --- loops


def score(shape: Shape, scoring: Scoring, anchors: Anchors, *, name: str) -> RowsContext:
    """Scores of the anchors of one row, by all heads of a key head, the oldest first."""
    heads = shape.group
    context = rows.score(shape, scoring, name=name, heads=heads, dim=shape.qk)
    power = anchors.power
    phase = Phase(
        kind="behind",
        comment="every anchor, the oldest first",
        start="0",
        stop="stop",
        inside="n < stop",
        written="inside",
        body=(f"k_at = anchor_of(n, last, {power})",),
    )
    row = f"tl.program_id(0).to(tl.int64) * {shape.query_heads} + row_head"
    return replace(
        context,
        summary="scores of the anchors behind each row.",
        tile="tl.program_id(0) // BLOCK_T + tile_first",
        setup=(
            f"stop = anchors_limit(last, k_len, {power}, {anchors.first})",
            "score_alive = alive",
            f"score_row = {row}",
        ),
        phases=(phase,),
    )


def attend(shape: Shape, *, name: str, scale: float, width: int, window: int) -> RowsContext:
    """The spans of rows that begin in one block, without the window: each a part of its own; told alone is
    what no span before has.
    """
    entries = rows.Entries(size=STRIDE, stride=STRIDE)
    context = buckets.attend(shape, name=name, scale=scale, entries=entries, width=width)
    names = [p.name for p in context.params]
    listed, written = names.index("O"), names.index("length")
    params = (
        *context.params[:listed],
        pointer("SPANS", "i32", SPANS),
        *context.params[listed:written],
        replace(PART_OWN, name="OWN"),
        *context.params[written:],
    )
    row = f"(item // {width}).to(tl.int64) * {shape.query_heads} + head"
    last = f"position - {window}" if window else "position"
    return replace(
        context,
        summary="attention of rows to spans that begin in one block, a softmax each.",
        params=params,
        rows_comment="rows with a span that begins in one block, of one query head",
        setup=(
            f"spans = SPANS + (({row}) * {width} + item % {width}) * 3",
            "begin = tl.load(spans, mask=alive, other=0x7FFFFFFF)",
            "anchor = tl.load(spans + 1, mask=alive, other=-1)",
            f"end = tl.minimum(anchor, {last})",
            "own_from = tl.load(spans + 2, mask=alive, other=0)",
            "stop = tl.minimum(tl.max(end, 0) + 1, k_len)",
        ),
        phases=(
            Phase(
                kind="range",
                comment="keys from the block's first one to the end of the last span",
                start=f"entry * {STRIDE}",
                stop="stop",
                inside="n < stop",
                visible=("n[None, :] >= begin[:, None]", "n[None, :] <= end[:, None]"),
            ),
        ),
        own_from="own_from",
    )


# --- kernels

SPANS = "[rows, Hq, slots, 3] first token, the anchor, and from where on no span before has any"
WEIGHTS = pointer("WEIGHTS", "f32", "f32[rows, Hq, slots] of each span's softmax, -1 of none")
PART_OWN = pointer("PART_OWN", "f32", "f32[turn heads, items] sums of what no span before has")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpansContext:
    """Everything `_index_spans.jinja` reads."""

    name: str
    header: str = ""
    pieces: str = ""
    shape: Shape
    width: int  # anchors of a row
    spans: Spans
    scale: float  # of the scores
    how: str = "spans"

    @property
    def summary(self) -> str:
        return "of each anchor that a row chose its span, and what it weighs."

    @property
    def heads(self) -> int:
        return self.shape.query_heads

    @property
    def key_head(self) -> str:
        return rows.kv_head("k_h", self.shape, per_head=True)

    @property
    def padded_width(self) -> int:
        """`width` as a tile."""
        return next_power(self.width)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.shape.qk)

    @property
    def scale_log2(self) -> str:
        return rows.number(self.scale * rows.LOG2_E)

    @property
    def power(self) -> int:
        return self.spans.anchors.power

    @property
    def of_anchors(self) -> str:
        """The last arguments of `anchors_limit`."""
        return f"{self.power}, {self.spans.anchors.first}"

    @property
    def of_reach(self) -> str:
        """Those of `span_reach`."""
        return f"{rows.number(self.spans.factor)}, {rows.number(self.spans.power)}"

    @property
    def window(self) -> int:
        return self.spans.window

    @property
    def stride(self) -> int:
        return STRIDE

    @property
    def params(self) -> tuple[Param, ...]:
        chosen = f"[rows, {self.heads}, {self.width}]"
        return (
            *rows.tensor("Q", "q", "[B, T, Hq, Dqk] that score anchors", "bth"),
            *rows.tensor("K", "k", "[B, S, Hkv, Dqk]", "bth"),
            pointer("SELECTION", "i32", f"{chosen} anchors, ascending, then -1"),
            pointer("STARTS", "i32", f"{chosen} the block that a span begins in, -1 of none"),
            pointer("SPANS", "i32", SPANS),
            WEIGHTS,
            *SEQ,
            *tunables("BLOCK_R"),
        )

    @property
    def jit(self) -> str:
        return rows.jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeansContext:
    """Everything `_merge_spans.jinja` reads."""

    name: str
    header: str = ""
    pieces: str = ""
    heads: int  # query heads
    width: int  # spans of a row
    window: bool  # whether the output and the log-sum-exp are there of what all spans have beside theirs
    head_dim: int  # of a value
    how: str = "spans"

    @property
    def summary(self) -> str:
        return "the mean of the softmaxes of each row's spans, by the weights of their anchors."

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def params(self) -> tuple[Param, ...]:
        return (
            pointer("PART_O", "input", f"[turn heads, items, {self.head_dim}]"),
            buckets.PART_LSE,
            PART_OWN,
            WEIGHTS,
            *rows.OUTPUTS,
            buckets.ITEMS,
            *SEQ,
            buckets.HEAD_FIRST,
            *tunables("BLOCK_R"),
        )

    @property
    def jit(self) -> str:
        return rows.jit(self.params)
