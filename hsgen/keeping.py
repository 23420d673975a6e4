"""Tokens that each head keeps, as keys and as rows, by the masses that a sequence's last rows give them.

Masses are of every token, smoothed over some on both sides.  Of all heads together they say how many tokens
stay, and of each head which ones: a list of tokens.  Rows are put in another order, those that stay first,
so that tiles have no row that was dropped, and walk the list; a row that was dropped puts out 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hsgen import rows
from hsgen.graph import (
    Attend,
    Graph,
    Input,
    LogSumExp,
    Map,
    Node,
    Normalise,
    Reduce,
    ReduceRows,
    Score,
    SelectSet,
)
from hsgen.kernels import tunables
from hsgen.plan import Param
from hsgen.rows import SEQ, Phase, RowsContext, Shape, count, jit, number, pointer

WIDTH = count("width", "slots of a list")
COUNTS = pointer("COUNTS", "i32", "[Z, Hq, 2] tokens that are kept, of how many")
STAY = pointer("STAY", "i32", "[Z, Hq, 2] kept tokens before the first row, and kept rows")
# an order of rows, as kernels look it up
ROWS = (
    pointer("ROWS", "i32", "[B, Hq, T] rows of each head, kept ones first"),
    count("rows_b", "ROWS: batch stride"),
    count("rows_h", "ROWS: head stride"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """From queries and keys to the smoothed masses of tokens."""

    score: Node
    lse: Node
    normalised: Node
    reduced: Node | None  # over all heads
    together: Node
    mapped: Node

    @property
    def names(self) -> tuple[str, ...]:
        each = (self.score, self.lse, self.normalised, self.reduced, self.together, self.mapped)
        return tuple(node.name for node in each if node)

    @property
    def last(self) -> int:
        """Rows at the end of a sequence that give masses."""
        assert isinstance(self.together.op, ReduceRows)
        return self.together.op.last or 0

    @property
    def width(self) -> int:
        """Tokens that a mass is smoothed over."""
        assert isinstance(self.mapped.op, Map)
        return len(self.mapped.op.taps)

    @property
    def scale(self) -> float:
        assert isinstance(self.score.op, Score)
        return 1.0 if self.score.op.scale is None else self.score.op.scale

    @property
    def weighing(self) -> tuple[object, ...]:
        """What the masses of every head follow from."""
        assert isinstance(self.together.op, ReduceRows)
        return *self.score.inputs, self.scale, self.last, self.together.op.how


def way_to(graph: Graph, name: str) -> Way | None:
    """The way that an operator is on; None where it is on no such way."""
    ways = (_way(graph, node) for node in graph.nodes() if isinstance(node.op, Map))
    return next((way for way in ways if way and name in way.names), None)


def _way(graph: Graph, mapped: Node) -> Way | None:
    """Back from smoothed masses."""
    together = graph[mapped.inputs[0]]
    if not isinstance(together.op, ReduceRows) or not together.op.last:
        return None
    before = graph[together.inputs[0]]
    reduced = before if isinstance(before.op, Reduce) else None
    normalised = graph[reduced.inputs[0]] if reduced else before
    if not isinstance(normalised.op, Normalise) or len(normalised.inputs) != 2:
        return None
    score, lse = graph.operands(normalised)
    if not isinstance(score.op, Score) or len(score.inputs) != 2:
        return None
    if not isinstance(lse.op, LogSumExp) or lse.inputs != (score.name,):
        return None
    way = Way(
        score=score,
        lse=lse,
        normalised=normalised,
        reduced=reduced,
        together=together,
        mapped=mapped,
    )
    queries, keys = graph.operands(score)
    op = together.op
    assert isinstance(mapped.op, Map)
    side = len(mapped.op.taps) // 2
    plain = (
        Score(
            level=score.op.level, form="dot", scale=score.op.scale, size=1, stride=1, within=None
        ),
        Normalise(level=score.op.level),
        ReduceRows(level=op.level, how=op.how, block=None, last=op.last),
        Map(
            level=mapped.op.level,
            how="sum",
            size=1,
            stride=1,
            ratio=1,
            taps=tuple((i, 1) for i in range(-side, side + 1)),
        ),
    )
    goes = (
        queries.name == "q"
        and isinstance(keys.op, Input)
        and len(keys.type.dims) == 4
        and (score.op, normalised.op, op, mapped.op) == plain
        and op.how in ("mean", "sum")
        and (reduced is None or reduced.op == Reduce(share="all", how="mean"))
        and _alone(graph, way)
    )
    return way if goes else None


def _alone(graph: Graph, way: Way) -> bool:
    """Whether nothing else reads what is on the way to its end."""
    inner = [graph[name] for name in way.names if name != way.mapped.name]
    return all(user.name in way.names for node in inner for user in graph.users(node.name))


def says(graph: Graph, node: Node) -> bool:
    """Whether a choice of all heads says how many tokens each keeps, and nothing else."""
    op, way = node.op, way_to(graph, node.inputs[0]) if node.inputs else None
    if way is None or way.reduced is None or not isinstance(op, SelectSet):
        return False
    plain = SelectSet(
        level=op.level,
        size=1,
        stride=1,
        rule="top_p",
        value=op.value,
        first=op.first,
        last=op.last,
        counted=op.counted,
        boundary=op.boundary,
        scope="row",
        least=op.least,
        of="rest" if op.of == "rest" else None,
    )
    users = [user.op for user in graph.users(node.name)]
    return op == plain and all(isinstance(x, SelectSet) and x.rule == "budget_from" for x in users)


def keeps(graph: Graph, node: Node) -> bool:
    """Whether a choice is of each head, of as many tokens as one of all heads says."""
    op, way = node.op, way_to(graph, node.inputs[0]) if node.inputs else None
    if way is None or way.reduced is not None or not isinstance(op, SelectSet):
        return False
    plain = SelectSet(
        level=op.level,
        size=1,
        stride=1,
        rule="budget_from",
        value=op.value,
        first=op.first,
        last=op.last,
        counted=op.counted,
        budget_from=op.budget_from,
    )
    if op != plain or len(node.inputs) != 2:
        return False
    source = graph[node.inputs[1]]
    asked = source.op
    if not says(graph, source) or not isinstance(asked, SelectSet):
        return False
    there = way_to(graph, source.inputs[0])
    forced = (op.first, op.last) == (asked.first, asked.last)
    return forced and there is not None and there.last == way.last


def attended(graph: Graph, node: Node) -> bool:
    """Whether a branch attends to what heads keep, and drops the rows of what they do not."""
    op = node.op
    if not isinstance(op, Attend) or op.over != "tokens" or op.rows != "chosen":
        return False
    queries, keys, values, selection, *_ = graph.operands(node)
    given = all(isinstance(x.op, Input) for x in (queries, keys, values))
    plain = not op.latent and not op.biased and op.cut is None
    return given and plain and keeps(graph, selection)


# --- loops


def attend(shape: Shape, *, name: str, scale: float) -> RowsContext:
    """One softmax over the tokens that a head keeps, of the rows that it keeps; others see none."""
    listed = f"(z * {shape.query_heads} + head).to(tl.int64) * width"
    each = "before + slot + 1" if shape.causal else "everything"
    walked = "before + tl.minimum(t0 + BLOCK_T, kept)" if shape.causal else "everything"
    every = "before + t0 + 1" if shape.causal else "everything"
    return RowsContext(
        name=name,
        summary="attention over the tokens that a head keeps, of the rows that it keeps.",
        params=(
            *rows.QUERY,
            *rows.keys_and_values(shape),
            pointer("LISTS", "i32", "[Z, Hq, width] kept tokens, ascending"),
            *(() if shape.causal else (COUNTS,)),
            STAY,
            WIDTH,
            *ROWS,
            *rows.OUTPUTS,
            *SEQ,
            *rows.BLOCKS,
        ),
        acc="softmax",
        **rows.heads_of(shape, per_head=True),
        key_row="k_first",
        sifted=True,
        list_of_keys=f"LISTS + {listed}",
        setup=(
            f"own = z * {shape.query_heads} + head",
            "before = tl.load(STAY + own * 2)",
            "kept = tl.load(STAY + own * 2 + 1)",
            *(() if shape.causal else ("everything = tl.load(COUNTS + own * 2)",)),
            "slot = t0 + rows",
            f"seen = tl.where(slot < kept, {each}, 0)",
            f"stop = tl.where(t0 < kept, {walked}, 0)",
            f"full = tl.where(t0 + BLOCK_T <= kept, {every}, 0) // BLOCK_N * BLOCK_N",
        ),
        phases=(
            Phase(kind="range", comment="tokens of all rows", start="0", stop="full"),
            Phase(
                kind="range",
                comment="tokens of the first of the rows, or the last tokens",
                start="full",
                stop="stop",
                inside="n < stop",
                visible=("n[None, :] < seen[:, None]",),
            ),
        ),
        scale_log2=number(scale * rows.LOG2_E),
        precision=shape.precision,
    )


# --- kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class SiftContext:
    """Everything `_index_sift.jinja` reads: the order of each head's rows, those that it keeps first."""

    name: str
    header: str = ""
    pieces: str = ""
    how: Literal["sift"] = "sift"
    heads: int

    @property
    def summary(self) -> str:
        return "each head's rows, first those of tokens that it keeps, then the others."

    @property
    def params(self) -> tuple[Param, ...]:
        lists = pointer("LISTS", "i32", f"[Z, {self.heads}, width] kept tokens, ascending")
        return (lists, COUNTS, STAY, WIDTH, *ROWS, *SEQ, *tunables("BLOCK_T"))

    @property
    def jit(self) -> str:
        return jit(self.params)
