"""Walks down a ranking: blocks of rows take tokens of earlier segments, best first, until a step adds little.

A block of rows ranks all tokens of the segments before its own by one query, and takes so many at a time.
It stops behind the first step that adds less than a part to the softmax of each of its rows.  Nobody knows
how far it walks, so its choice is bits, one a slot of the keys' order; lists are made of these for some
blocks at a time.  What the own block has is another branch's, whatever lists a caller brings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hsgen import rows
from hsgen.graph import (
    Attend,
    Graph,
    Input,
    LogSumExp,
    Node,
    Permute,
    Pool,
    PoolRows,
    Score,
    SelectSet,
)
from hsgen.graph import block_of as rows_of_block
from hsgen.kernels import tunables
from hsgen.plan import Param
from hsgen.rows import (
    LOG2_E,
    ORDER,
    SEQ,
    Chunk,
    Entries,
    Phase,
    RowsContext,
    Scoring,
    Shape,
    chunks,
    count,
    jit,
    next_power,
    number,
    pointer,
    tensor,
)
from hsgen.sorting import order_of
from hsgen.together import CAPACITY, TILE_FIRST

BITS = pointer("BITS", "i32", "[blocks, Hq, words] a bit for each slot")
WORDS = count("bit_words", "words of a row of bits")


def walked(graph: Graph, node: Node) -> bool:
    """Whether a selection is a walk that kernels know: of blocks of whole segments, each head for itself."""
    op = node.op
    if (
        not graph.meta.causal
        or not isinstance(op, SelectSet)
        or op.rule != "early_stop"
        or len(node.inputs) != 5
    ):
        return False
    score, query, keys, before, order = graph.operands(node)
    block = rows_of_block(node.type.dims[1])
    plain = SelectSet(
        level=op.level,
        size=1,
        stride=1,
        rule="early_stop",
        value=op.value,
        first=0,
        last=0,
        counted=op.counted,
        step=op.step,
        cut="order",
    )
    return (
        op == plain
        and node.type.dims[2] == "Hq"
        and isinstance(query.op, Input)
        and isinstance(keys.op, Input)
        and isinstance(order.op, Permute)
        and _parts(block, order.op.segment)
        and order.op.segment != 1
        and _scored(graph, score)
        and _sum_of_own(graph, before, block)
    )


def _scored(graph: Graph, node: Node) -> bool:
    """Whether scores are dots of one query a block with the keys that are walked."""
    if not isinstance(node.op, Score) or len(node.inputs) != 2:
        return False
    query, keys = graph.operands(node)
    plain = Score(
        level=node.op.level, form="dot", scale=node.op.scale, size=1, stride=1, within=None
    )
    means = isinstance(query.op, PoolRows) and query.op.how == "mean"
    return means and node.op == plain and order_of(graph, keys) is not None


def read_in_place(graph: Graph, pool: Node) -> bool:
    """Whether entries are tokens that walks alone score: keys are read through their order."""
    if not isinstance(pool.op, Pool) or pool.op.size != 1:
        return False
    scores = graph.users(pool.name)
    return bool(scores) and all(
        walked(graph, x) for score in scores for x in graph.users(score.name)
    )


def _sum_of_own(graph: Graph, node: Node, block: int | None) -> bool:
    """Whether a walk goes on from what each row's own segment gives it."""
    if not isinstance(node.op, LogSumExp):
        return False
    branch = graph[node.inputs[0]]
    return isinstance(branch.op, Attend) and _parts(block, own_blocks(branch.op))


def _parts(block: int | None, part: int | None) -> bool:
    """Whether a block of rows has a number of whole parts."""
    return block is not None and part is not None and block % part == 0


def own_of(graph: Graph, selection: Node) -> int:
    """Tokens of the blocks of which each row has its own beside a walk."""
    branch = graph[graph[selection.inputs[3]].inputs[0]].op
    assert isinstance(branch, Attend), "a walk goes on from a branch"
    return own_blocks(branch) or 1


def own_blocks(op: Attend) -> int | None:
    """Tokens of the blocks of which a static pattern shows each row its own, where that is all it shows."""
    pattern = op.pattern
    if op.over != "static" or pattern is None or pattern.axes or pattern.stride or pattern.by_way:
        return None
    alone = pattern.spans == ((1, 0, 0),) and pattern.dilation == 1 and not pattern.power_of_two
    return op.size if alone and op.size == op.stride else None


def beside(graph: Graph, one: Node, other: Node) -> bool:
    """Whether a walk has no token of the other branch, which has those of each row's own segment."""
    for walk, own in ((one, other), (other, one)):
        if isinstance(walk.op, Attend) and walk.op.over == "blocks" and walk.op.cut == "order":
            selection = graph[walk.inputs[3]]
            sum_of = selection.inputs[3] if walked(graph, selection) else ""
            return bool(sum_of) and graph[sum_of].inputs == (own.name,)
    return False


def sums_of_walks(graph: Graph, branch: Node) -> bool:
    """Whether all that reads a branch's log-sum-exp are walks."""
    sums = [x for x in graph.users(branch.name) if isinstance(x.op, LogSumExp)]
    return all(walked(graph, user) for x in sums for user in graph.users(x.name))


# --- loops


def score(shape: Shape, *, name: str, block: int, segment: int, scale: float) -> RowsContext:
    """Scores of the tokens of slots by one query a block of rows."""
    scoring = Scoring(
        form="dot",
        scale=scale,
        entries=Entries(size=1, stride=1),
        pooled=False,
        normalise=False,
        share="head",
        reduce=None,
        rows=block,
    )
    context = rows.score(shape, scoring, name=name, heads=1, dim=shape.qk)
    stop = f"stop = settled_limit(last * {block}, k_len, {segment}, 1, {shape.causal}, True)"
    names = [p.name for p in context.params]
    at = names.index("SCORES")
    setup = tuple(stop if line.startswith("stop = ") else line for line in context.setup)
    return replace(
        context,
        params=(*context.params[:at], *ORDER, *context.params[at:]),
        order_head=rows.kv_head("order_h", shape, per_head=True),
        setup=setup,
    )


def attend(shape: Shape, *, name: str, scale: float, block: int, own: int) -> RowsContext:
    """One softmax over the tokens of a block's list, or of those of its rows with a bit for each.

    own: tokens of the blocks of which each row has its own in another branch.
    """
    heads = rows.heads_of(shape, per_head=True)
    list_row = f"tl.program_id(0).to(tl.int64) * {shape.query_heads} + head"
    before = f"k_at[None, :] < position[:, None] // {own} * {own}"
    return RowsContext(
        name=name,
        summary="attention over the tokens that rows chose together, of segments before their own.",
        params=(
            *rows.QUERY,
            *rows.keys_and_values(shape),
            pointer("COUNTS", "i32", "[tiles, Hq, 2] of all rows, of some"),
            pointer("ENTRIES", "i32", "[lists, Hq, capacity] slots"),
            pointer("WORDS", "i32", "[tiles, Hq, capacity, words] members, by slot"),
            CAPACITY,
            count("members", "words of a slot; 0: every row is a member, and a list is a block's"),
            *rows.OUTPUTS,
            *ORDER,
            *SEQ,
            TILE_FIRST,
            *rows.BLOCKS,
        ),
        acc="softmax",
        **heads,
        key_row="k_first",
        tile="tl.program_id(0) + tile_first",
        together="part",
        rows_together=block,
        order_head=rows.kv_head("order_h", shape, per_head=True),
        setup=(
            f"list_row = {list_row}",
            "full = tl.load(COUNTS + list_row * 2)",
            "partial = tl.load(COUNTS + list_row * 2 + 1)",
            f"block_list = (tile // parts - tile_first // parts).to(tl.int64) * {shape.query_heads} + head",
            "list_base = tl.where(members == 0, block_list, list_row) * capacity",
            "num_words: tl.constexpr = (BLOCK_T + 31) // 32",
            "word = tl.minimum(rows, BLOCK_T - 1) // 32",
            "bit = rows % 32",
        ),
        phases=(
            Phase(
                kind="slots",
                comment="tokens of all rows",
                start="0",
                stop="full",
                slots=1,
                inside="(n >= 0) & (n < k_len)",
                visible=("inside[None, :]",),
            ),
            Phase(
                kind="slots",
                comment="tokens of members, of segments before their own",
                start="full",
                stop="partial",
                slots=1,
                inside="(n >= 0) & (n < k_len)",
                body=(
                    "words = WORDS + (list_base + tl.maximum(n, 0))[None, :] * num_words",
                    "words += word[:, None]",
                    "chosen = tl.load(words, mask=(n >= 0)[None, :] & (word < members)[:, None], other=0)",
                    "chosen = (chosen >> bit[:, None]) & 1",
                ),
                visible=("chosen != 0", before),
            ),
        ),
        scale_log2=number(scale * LOG2_E),
        precision=shape.precision,
    )


# --- kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkContext:
    """Everything `_sorting_walk.jinja` reads."""

    name: str
    header: str = ""
    pieces: str = ""
    heads: int  # query heads
    group: int
    head_dim: int
    rows: int  # of a block
    segment: int
    step: int
    gain: float
    causal: bool
    scale: float
    precision: str
    how: str = "walk"

    @property
    def summary(self) -> str:
        return f"which tokens each block of rows takes, {self.step} at a time, best first."

    @property
    def padded_step(self) -> int:
        """`step` as a tile of a dot."""
        return max(16, next_power(self.step))

    @property
    def padded_rows(self) -> int:
        return next_power(self.rows)

    @property
    def scale_log2(self) -> str:
        return number(self.scale * LOG2_E)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def params(self) -> tuple[Param, ...]:
        return (
            *rows.QUERY,
            *tensor("K", "k", "[B, S, Hkv, Dqk]", "bth"),
            pointer("SCORES", "f32", f"f32[chunk rows, {self.heads}, capacity] by slot"),
            CAPACITY,
            *rows.lse(comment="f32[B, Hq, T] of the own segment"),
            *ORDER,
            BITS,
            WORDS,
            pointer("RANKED", "i32", f"[chunk rows, {self.heads}, 2, BLOCK_P] keys, slots"),
            pointer("SUMS", "f32", f"f32[chunk rows, {self.heads}, 2, {self.padded_rows}]"),
            *SEQ,
            TILE_FIRST,
            *tunables("BLOCK_T", "BLOCK_M", "BLOCK_N", "BLOCK_P"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsContext:
    """Everything `_index_unfold.jinja` reads: lists of some blocks, or of each row, made of bits."""

    name: str
    header: str = ""
    pieces: str = ""
    how: Literal["unfold", "unfold_rows"]
    heads: int
    rows: int  # of a block

    @property
    def summary(self) -> str:
        what = "every row's list" if self.how == "unfold_rows" else "lists of blocks of rows"
        return f"{what}, of the bits of what was chosen."

    @property
    def params(self) -> tuple[Param, ...]:
        if self.how == "unfold_rows":
            made = pointer("SELECTION", "i32", f"[rows, {self.heads}, width]")
            width = count("width", "slots of a list")
            return (BITS, made, WORDS, width, *SEQ, *tunables("BLOCK_N"))
        counts = pointer("COUNTS", "i32", f"[tiles of the turn, {self.heads}, 2] of all rows, 0")
        entries = pointer("ENTRIES", "i32", f"[blocks of the turn, {self.heads}, capacity]")
        return (
            BITS,
            counts,
            entries,
            WORDS,
            CAPACITY,
            *SEQ,
            TILE_FIRST,
            *tunables("BLOCK_T", "BLOCK_N"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)
