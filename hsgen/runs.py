"""Runs of tokens: sequences that are cut where keys change, and tokens that are kept by their runs' scores.

How alike the keys before and after each token are says where runs begin: no two begin nearer than a span,
but for the first one.  So there are few, and each is one key.  All tokens of a run have its score; a block of
rows ranks runs, each as many entries as it has tokens, and of what ties the earlier tokens are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hsgen import rows
from hsgen.graph import Graph, Input, Map, Node, Pool, PoolRows, Runs, Score, Select
from hsgen.graph import block_of as rows_of_block
from hsgen.kernels import tunables
from hsgen.plan import Param
from hsgen.rows import (
    SEQ,
    Chunk,
    Entries,
    RowsContext,
    Scoring,
    Shape,
    chunks,
    count,
    jit,
    number,
    pointer,
    tensor,
)
from hsgen.together import CAPACITY, TILE_FIRST

How = Literal["sides", "begin", "run"]
RUN = (
    pointer("RUN", "i32", "[B, S] the run of each token"),
    count("run_b", "RUN: batch stride"),
)
FIRST = count("first_b", "runs from one sequence to the next; packed: 2")
STARTS = pointer("STARTS", "i32", "[runs] where each begins")
NUMBER = pointer("NUMBER", "i32", "[Z] runs of each sequence")


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """From keys to the tokens that blocks of rows keep by their runs' scores."""

    queries: Node
    runs: Node
    keys: Node
    score: Node
    mapped: Node
    selection: Node

    @property
    def names(self) -> tuple[str, ...]:
        """What is done between queries and the choice."""
        return self.runs.name, self.keys.name, self.score.name, self.mapped.name

    @property
    def cut(self) -> Runs:
        assert isinstance(self.runs.op, Runs)
        return self.runs.op

    @property
    def span(self) -> int:
        assert self.cut.span is not None, "a caller's boundaries are refused"
        return self.cut.span


def way_to(graph: Graph, name: str) -> Way | None:
    """The way that an operator, or a choice, is on; None where it is on no such way."""
    ways = (_way(graph, node) for node in graph.nodes() if isinstance(node.op, Select))
    return next((way for way in ways if way and name in (*way.names, way.selection.name)), None)


def _way(graph: Graph, selection: Node) -> Way | None:
    """Back from a choice of tokens."""
    op, block = selection.op, rows_of_block(selection.type.dims[1])
    mapped = graph[selection.inputs[0]]
    if not isinstance(op, Select) or len(selection.inputs) != 1 or block is None:
        return None
    if not isinstance(mapped.op, Map) or len(mapped.inputs) != 2:
        return None
    score, runs = graph.operands(mapped)
    if not isinstance(score.op, Score) or len(score.inputs) != 3 or score.inputs[2] != runs.name:
        return None
    queries, keys = graph[score.inputs[0]], graph[score.inputs[1]]
    if not isinstance(runs.op, Runs) or not isinstance(keys.op, Pool):
        return None
    if not isinstance(queries.op, PoolRows) or keys.inputs[1:] != (runs.name,):
        return None
    way = Way(
        queries=queries, runs=runs, keys=keys, score=score, mapped=mapped, selection=selection
    )
    plain = (
        PoolRows(level=queries.op.level, how=queries.op.how, block=block, last=None),
        Pool(level=keys.op.level, how=keys.op.how, size=0, stride=0, position=False, cut="runs"),
        Score(
            level=score.op.level,
            form="dot",
            scale=score.op.scale,
            size=0,
            stride=0,
            within=None,
            cut="runs",
        ),
        Map(
            level=mapped.op.level,
            how="upsample",
            size=1,
            stride=1,
            ratio=1,
            taps=((0, 1),),
            cut="runs",
        ),
        Select(
            level=op.level,
            size=1,
            stride=1,
            k=op.k,
            width=op.width,
            first=op.first,
            last=op.last,
            counted=op.counted,
            final=True,
            within=None,
        ),
    )
    source, pooled = graph[runs.inputs[0]], graph[keys.inputs[0]]
    goes = (
        (queries.op, keys.op, score.op, mapped.op, op) == plain
        and queries.inputs == ("q",)
        and queries.op.how in ("mean", "max")
        and keys.op.how in ("mean", "sum_rsqrt")
        and runs.op.span is not None
        and all(isinstance(x.op, Input) and len(x.type.dims) == 4 for x in (source, pooled))
        and score.type.dims[2] == "Hq"
        and _alone(graph, way)
    )
    return way if goes else None


def _alone(graph: Graph, way: Way) -> bool:
    """Whether nothing else reads what is on the way."""
    read = (*way.names, way.selection.name)
    return all(user.name in read for name in way.names for user in graph.users(name))


# --- loops


def score(shape: Shape, *, name: str, block: int, span: int, scale: float) -> RowsContext:
    """Scores of runs by one query a block of rows, of those that begin by its last row."""
    scoring = Scoring(
        form="dot",
        scale=scale,
        entries=Entries(size=span, stride=span),
        pooled=True,
        normalise=False,
        share="head",
        reduce=None,
        rows=block,
    )
    context = rows.score(shape, scoring, name=name, heads=1, dim=shape.qk)
    last = f"tl.minimum(last * {block} + {block - 1}, k_len - 1)" if shape.causal else "k_len - 1"
    where = "RUN + z.to(tl.int64) * run_b + k_first"
    begun = (
        f"last_token = {last}",
        f"run_of_last = {where} + tl.maximum(last_token, 0)",
        "stop = tl.load(run_of_last, mask=last_token >= 0, other=-1) + 1",
    )
    setup = tuple(
        line
        for each in context.setup
        for line in (begun if each.startswith("stop = ") else (each,))
    )
    at = [p.name for p in context.params].index("SCORES")
    return replace(
        context,
        params=(*context.params[:at], *RUN, FIRST, *context.params[at:]),
        key_row=f"z.to(tl.int64) * first_b + k_first // {span}",
        setup=setup,
    )


# --- kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsContext:
    """Everything `_segments_runs.jinja` reads.

    `sides`: how alike the keys before and after each token are; `begin`: where runs begin, and the run of
    each token; `run`: one key a run.
    """

    name: str
    how: How
    header: str = ""
    pieces: str = ""
    heads: int
    head_dim: int
    span: int
    threshold: float = 0.0
    pool: str = ""

    @property
    def summary(self) -> str:
        match self.how:
            case "sides":
                return f"how alike the {self.span} keys before and after each token are."
            case "begin":
                return "where runs of tokens begin, and which one each token is in."
            case "run":
                return f"one key a run: {self.pool} of its tokens."

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def below(self) -> str:
        """What is less alike than this begins a run."""
        return number(self.threshold)

    @property
    def divisor(self) -> str:
        """What a sum of a run's keys is divided by."""
        tokens = "(end - start).to(tl.float32)"
        return f"tl.sqrt_rn({tokens})" if self.pool == "sum_rsqrt" else tokens

    @property
    def params(self) -> tuple[Param, ...]:
        k = tensor("K", "k", "[B, S, Hkv, D]", "bth")
        alike = pointer("ALIKE", "f32", "f32[B, S] cosine, mean over heads")
        match self.how:
            case "sides":
                return (*k, alike, RUN[1], *SEQ, *tunables("BLOCK_N"))
            case "begin":
                return (alike, *RUN, STARTS, NUMBER, FIRST, *SEQ, *tunables("BLOCK_N"))
            case "run":
                made = pointer("POOLED", "input", "[runs, Hkv, D]")
                return (*k, made, STARTS, NUMBER, FIRST, *SEQ, *tunables("BLOCK_N"))

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRunsContext:
    """Everything `_rank_runs.jinja` reads: the best tokens of each block of rows, by their runs' scores."""

    name: str
    header: str = ""
    pieces: str = ""
    how: Literal["runs"] = "runs"
    heads: int
    rows: int  # of a block
    span: int
    k: int
    width: int  # slots of a list
    first: int
    last: int
    counted: bool
    causal: bool

    @property
    def summary(self) -> str:
        return f"the {self.k} best tokens of each block of rows, by the scores of their runs."

    @property
    def params(self) -> tuple[Param, ...]:
        return (
            pointer("SCORES", "f32", f"f32[chunk rows, {self.heads}, capacity] of runs"),
            pointer("SELECTION", "i32", f"[blocks, {self.heads}, {self.width}]"),
            *RUN,
            STARTS,
            FIRST,
            *SEQ,
            TILE_FIRST,
            CAPACITY,
            *tunables("BLOCK_T", "BLOCK_R", "BLOCK_N"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)
