"""Columns and diagonals of a prompt, which its last rows choose once for all rows, head by head.

A column is a key that all rows see, a diagonal one that lies as far before each of them.  Both are lists of a
sequence and head.  A tile of rows gathers its columns; of diagonals it walks steps of keys, which cross the
same ones wherever the tile lies, if they begin as far before its end: so one list of steps is that of all
tiles, and of bits, the farthest first, each row has those of a step side by side.  What lies on a diagonal is
left to it, so that no key counts twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from hsgen.graph import (
    Attend,
    Graph,
    Input,
    LogSumExp,
    Node,
    Normalise,
    Pattern,
    ReduceRows,
    Route,
    Score,
    Select,
    Union,
    block_of,
)
from hsgen.kernels import tunables
from hsgen.plan import Param
from hsgen.rows import (
    LOG2_E,
    OUTPUTS,
    QUERY,
    SEQ,
    Phase,
    RowsContext,
    Shape,
    blocks,
    count,
    heads_of,
    jit,
    keys_and_values,
    number,
    pointer,
)

MOST_LAST = 128  # rows that choose for all
MOST_ROWS = 128  # of a tile
STEP = 64  # keys of one, at most: of a row as bits a word


# --- what of a graph kernels do as a whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """From the last rows' logits to a list of tokens or diagonals for all rows."""

    score: Node
    lse: Node
    normalised: Node
    together: Node
    selection: Node

    @property
    def names(self) -> tuple[str, ...]:
        return self.score.name, self.lse.name, self.normalised.name, self.together.name

    @property
    def last(self) -> int:
        """Rows that choose."""
        assert isinstance(self.together.op, ReduceRows)
        return self.together.op.last or 0


def chain_of(graph: Graph, name: str) -> Chain | None:
    """The chain that an operator is part of; None where it is of none, or of one that no kernel goes."""
    chains = (_chain(graph, node) for node in graph.nodes() if isinstance(node.op, Select))
    return next((x for x in chains if x and name in (*x.names, x.selection.name)), None)


def _chain(graph: Graph, selection: Node) -> Chain | None:
    together = graph[selection.inputs[0]]
    if not isinstance(together.op, ReduceRows) or together.op.last is None:
        return None
    normalised = graph[together.inputs[0]]
    if not isinstance(normalised.op, Normalise) or len(normalised.inputs) != 2:
        return None
    score, lse = graph.operands(normalised)
    op, chosen = score.op, selection.op
    if not isinstance(op, Score) or not isinstance(chosen, Select) or len(score.inputs) != 2:
        return None
    plain = (
        Score(
            level=op.level,
            form="dot",
            scale=op.scale,
            size=1,
            stride=1,
            within=None,
            diagonal=op.diagonal,
        ),
        LogSumExp(),
        Normalise(level=op.level),
        ReduceRows(level=op.level, how=together.op.how, block=None, last=together.op.last),
        Select(
            level=op.level,
            size=1,
            stride=1,
            k=chosen.k,
            width=chosen.width,
            first=chosen.first,
            last=chosen.last,
            counted=chosen.counted,
            final=True,
            within=None,
            when=chosen.when,
            ways=chosen.ways,
            diagonal=op.diagonal,
        ),
    )
    if (op, lse.op, normalised.op, together.op, chosen) != plain or lse.inputs != (score.name,):
        return None
    queries, keys = graph.operands(score)
    given = queries.name == "q" and isinstance(keys.op, Input) and len(keys.type.dims) == 4
    last = together.op.last
    few = last & (last - 1) == 0 and last <= MOST_LAST and together.op.how in ("sum", "mean")
    found = Chain(
        score=score, lse=lse, normalised=normalised, together=together, selection=selection
    )
    known = (*found.names, selection.name)
    alone = all(user.name in known for name in found.names for user in graph.users(name))
    apart = selection.type.dims[2] == "Hq"
    return found if given and few and alone and apart and graph.meta.causal else None


def joined(graph: Graph) -> tuple[Graph, Mapping[str, str]]:
    """The same graph, for schedules, where branches attend columns and diagonals: two of one way are one, and
    a route by head that the caller gives is read where heads are; as it is where it has more than that.

    And by which node each that is gone is done.
    """
    union = next((node for node in graph.nodes() if isinstance(node.op, Union)), None)
    total = union or graph[graph.outputs.o]
    branches = graph.operands(total) if union else (total,)
    routes = [node for node in graph.nodes() if isinstance(node.op, Route)]
    kinds = {node.name: _kind(graph, node) for node in branches}
    shared = {kind for kind in kinds.values() if kind in ("columns", "diagonals")}
    if (
        not shared
        or None in kinds.values()
        or len({(*x.inputs[:3], _scale(x)) for x in branches}) > 1
        or (union is not None and isinstance(union.op, Union) and union.op.sink)
        or not all(_by_head(route) for route in routes)
        or len(routes) > 1
        or not _apart(branches, kinds)
    ):
        return graph, {}
    changed: dict[str, Node] = {}
    gone: dict[str, str] = {}
    for node in branches:
        beside = _columns_of(node, branches, kinds)
        if beside is not None:
            gone[beside.name] = node.name
            more = (*node.inputs[:4], beside.inputs[3], *node.inputs[4:])
            changed[node.name] = replace(node, inputs=more)
    reads = next(name for name, kind in kinds.items() if kind in shared and name not in gone)
    gone |= dict.fromkeys((route.name for route in routes), reads)
    nodes: list[Node] = []
    for node in graph.nodes():
        if node.name in gone:
            continue
        node = changed.get(node.name, node)  # noqa: PLW2901
        if routes:
            node = _without_route(node, routes[0])  # noqa: PLW2901
        inputs = tuple(name for name in node.inputs if name not in gone)
        nodes.append(replace(node, inputs=inputs))
    return graph.with_nodes(nodes), gone


def _without_route(node: Node, route: Node) -> Node:
    """A node that reads what the caller gives, a pattern with the numbers of ways in it."""
    inputs = tuple(route.inputs[0] if name == route.name else name for name in node.inputs)
    op = node.op
    if isinstance(op, Attend) and op.over == "static" and op.when is not None:
        assert isinstance(route.op, Route)
        assert op.pattern is not None
        (span,) = op.pattern.spans
        spans = tuple(span if n in ways(route.op, op.when) else (0, 0, 0) for n in _numbers(route))
        op = replace(op, pattern=replace(op.pattern, spans=spans, by_head=True))
    if isinstance(op, Select) and op.when is not None:
        assert isinstance(route.op, Route)
        numbers = ways(route.op, op.when)
        op = replace(op, ways=numbers)
    return replace(node, op=op, inputs=inputs)


def _numbers(route: Node) -> range:
    assert isinstance(route.op, Route)
    return range(len(route.op.places))


def ways(route: Route, when: str) -> tuple[int, ...]:
    """The caller's numbers that are a way."""
    return tuple(n for n, place in enumerate(route.places) if route.ways[place] == when)


def _by_head(route: Node) -> bool:
    op = route.op
    assert isinstance(op, Route)
    return op.by == "head" and not op.repeats and op.divergence is None


def _scale(node: Node) -> float | None:
    assert isinstance(node.op, Attend)
    return node.op.scale


def _kind(graph: Graph, node: Node) -> Literal["columns", "diagonals", "blocks", "pattern"] | None:
    """What a branch attends; None where it is none of these, or more."""
    op = node.op
    if not isinstance(op, Attend):
        return None
    plain = Attend(
        branch=op.branch,
        over=op.over,
        scale=op.scale,
        size=op.size,
        stride=op.stride,
        window=None,
        pattern=op.pattern,
        when=op.when,
        diagonal=op.diagonal,
    )
    lists = sum(isinstance(x.op, Select) for x in graph.operands(node)[3:])
    if op != plain or len(node.inputs) != 3 + lists + (op.when is not None):
        return None
    match op:
        case Attend(over="tokens") if chain_of(graph, node.inputs[3]):
            return "diagonals" if op.diagonal else "columns"
        case Attend(over="blocks", diagonal=None) if block_of(graph[node.inputs[3]].type.dims[1]):
            return "blocks" if isinstance(graph[node.inputs[3]].op, Select) else None
        case Attend(
            over="static", size=1, when=str(), pattern=Pattern(spans=(span,)) as pattern
        ) if not lists:
            usual = Pattern(spans=(span,), dilation=1, stride=None, shift=0, power_of_two=False)
            return "pattern" if pattern == usual else None
        case _:
            return None


def _apart(branches: tuple[Node, ...], kinds: Mapping[str, str | None]) -> bool:
    """Whether no two branches of one way reach the same keys, but for columns and diagonals."""
    found: dict[str | None, list[str | None]] = {}
    for node in branches:
        assert isinstance(node.op, Attend)
        found.setdefault(node.op.when, []).append(kinds[node.name])
    if None in found and len(found) > 1:  # one that all heads have
        return False
    both = ["columns", "diagonals"]
    return all(len(kind) == 1 or sorted(map(str, kind)) == both for kind in found.values())


def _columns_of(
    node: Node, branches: tuple[Node, ...], kinds: Mapping[str, str | None]
) -> Node | None:
    """The columns beside diagonals, of the same way."""
    if kinds[node.name] != "diagonals":
        return None
    assert isinstance(node.op, Attend)
    others = (x for x in branches if kinds[x.name] == "columns" and isinstance(x.op, Attend))
    return next((x for x in others if x.op.when == node.op.when), None)  # type: ignore[union-attr]


def lists_of(graph: Graph, node: Node) -> tuple[Node | None, Node | None]:
    """The selections of a branch over columns, diagonals, or both: columns, diagonals; of others none."""
    if _kind(graph, node) not in ("columns", "diagonals"):
        return None, None
    chosen = [x for x in graph.operands(node)[3:] if isinstance(x.op, Select)]
    chosen = [x for x in chosen if chain_of(graph, x.name)]
    by_kind = {bool(x.op.diagonal): x for x in chosen if isinstance(x.op, Select)}
    return by_kind.get(False), by_kind.get(True)


def reached(graph: Graph, node: Node) -> bool:
    """Whether an operator is part of what this module's kernels do, of a graph as `joined` makes it."""
    over = [user for user in graph.nodes() if any(lists_of(graph, user))]
    if node.name in {x.name for x in over}:
        return True
    chain = chain_of(graph, node.name)
    read = {name for user in over for name in user.inputs}
    return chain is not None and chain.selection.name in read


# --- kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class SlantsContext:
    """Everything `_index_slants.jinja` reads: of lists of diagonals their bits, and the steps they cross."""

    name: str
    header: str = ""
    pieces: str = ""
    heads: int
    width: int  # slots of a list
    columns: int = 0  # > 0: slots of a list of columns, which have bits too
    by_keys: bool = False  # steps are of rows, and counted from the first key of a tile on
    how: Literal["slants"] = "slants"

    @property
    def summary(self) -> str:
        steps = "rows that cross them" if self.by_keys else "keys that they cross"
        return f"the diagonals of a head as bits, and the steps of {steps}."

    @property
    def tile(self) -> tuple[str, str]:
        """How many of a tile stay, and how many a step has."""
        return ("BLOCK_N", "BLOCK_T") if self.by_keys else ("BLOCK_T", "BLOCK_N")

    @property
    def halvings(self) -> int:
        """Steps of a search in a list."""
        return self.width.bit_length()

    @property
    def params(self) -> tuple[Param, ...]:
        return (
            pointer("LISTS", "i32", f"[Z, {self.heads}, {self.width}] diagonals, ascending"),
            pointer("COUNTS", "i32", f"[Z, {self.heads}, 2] how many there are"),
            *(columns_of(self.heads, self.columns) if self.columns else ()),
            *slants_of(self.heads, columns=bool(self.columns)),
            *SEQ,
            *tunables("BLOCK_T", "BLOCK_N", "BLOCK_K"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


def columns_of(heads: int, width: int) -> tuple[Param, ...]:
    """The columns of each sequence and head."""
    return (
        pointer("COLUMNS", "i32", f"[Z, {heads}, {width}] keys, ascending"),
        pointer("COLUMN_COUNTS", "i32", f"[Z, {heads}, 2] how many there are"),
    )


def slants_of(heads: int, *, columns: bool) -> tuple[Param, ...]:
    """Diagonals, and perhaps columns, as bits, and steps of a tile that these cross."""
    bits = pointer("COLUMN_BITS", "i64", f"[Z, {heads}, words] keys that are columns")
    return (
        *((bits,) if columns else ()),
        pointer("BITS", "i64", f"[Z, {heads}, words] diagonals, the farthest first"),
        count("words", "of 64 diagonals"),
        pointer("STEPS", "i32", f"[Z, {heads}, 2, capacity] whole ones, others"),
        pointer("BEFORE", "i32", f"[Z, {heads}, 2, capacity + 1] of them that are nearer"),
        count("capacity", "steps of the longest sequence"),
    )


def attend(
    shape: Shape, *, name: str, scale: float, columns: int, diagonals: int, later: bool
) -> RowsContext:
    """One softmax over columns, diagonals, or both, of which no key counts twice.

    columns, diagonals: slots of their lists, 0 where there is none.  later: that heads without either are
    left as branches before have made them.
    """
    heads = heads_of(shape, per_head=True)
    params = [*QUERY, *keys_and_values(shape)]
    setup = [
        f"list_row = z.to(tl.int64) * {shape.query_heads} + head",
        "seen = tl.minimum(position + 1, k_len)",
    ]
    some: list[str] = []
    phases: list[Phase] = []
    if columns:
        params += columns_of(shape.query_heads, columns)
        setup += [
            f"list_base = list_row * {columns}",
            "columns = tl.load(COLUMN_COUNTS + list_row * 2)",
            f"columns = listed_below(COLUMNS + list_base, columns, last + 1, {columns.bit_length()})",
        ]
        some.append("columns")
        phases.append(
            Phase(
                kind="columns",
                comment="columns",
                start="0",
                stop="columns",
                inside="n >= 0",
                visible=("n[None, :] < seen[:, None]", "(n >= 0)[None, :]"),
            )
        )
    if diagonals:
        params += slants_of(shape.query_heads, columns=bool(columns))
        taken, column = (
            "taken = bits_from(column_bits, n0, words)",
            "column = tl.arange(0, BLOCK_N)",
        )
        but = ", but for columns" * bool(columns)
        setup += [
            *(("column_bits = COLUMN_BITS + list_row * words",) if columns else ()),
            "bits = BITS + list_row * words",
            "top = words * 64 - 1",
            "steps = STEPS + list_row * (2 * capacity)",
            "nearer = BEFORE + list_row * (2 * capacity + 2)",
            "end = first + BLOCK_T",
            "begun = tl.minimum(tl.maximum(end + BLOCK_N - 1, 0) // BLOCK_N, capacity)",
            "whole = tl.minimum(tl.maximum(end, 0) // BLOCK_N, capacity)",
            "behind = tl.minimum(tl.maximum(end - k_len + BLOCK_N - 1, 0) // BLOCK_N, whole)",
            "full_begin = tl.load(nearer + behind)",
            "full_end = tl.load(nearer + whole)",
            "partial = tl.load(nearer + capacity + 1 + begun)",
            "skipped = full_end - full_begin",
            "others = tl.load(nearer + begun) - skipped",
        ]
        some.append("skipped + others + partial")
        phases += [
            Phase(
                kind="crossed",
                comment="steps of which every row sees all" + but,
                start="full_begin",
                stop="full_end",
                body=(taken, column) if columns else (),
                visible=("((taken >> column.to(tl.int64)) & 1 == 0)[None, :]",) if columns else (),
            ),
            Phase(
                kind="crossed",
                comment="steps that some diagonals cross, of which each row sees those keys" + but,
                start="0",
                stop="partial + others",
                at=(
                    "whole_one = place - partial",
                    "whole_one += tl.where(whole_one < full_begin, 0, skipped)",
                    "place = tl.where(place < partial, capacity + place, whole_one)",
                ),
                body=(
                    "word = bits_from(bits, top - position + n0, words) & bits_between(-n0, k_len - n0)",
                    *((taken, "word &= ~taken") if columns else ()),
                    column,
                ),
                inside="(n >= 0) & (n < k_len)",
                visible=("marked(word, column)",),
            ),
        ]
    if later:
        setup += [f"if {' + '.join(some)} == 0:", "    return"]
    return RowsContext(
        name=name,
        summary="attention over columns and diagonals that the last rows chose for all.",
        params=(*params, *OUTPUTS, *SEQ, *blocks(heads)),
        acc="softmax",
        **heads,
        key_row="k_first",
        setup=tuple(setup),
        phases=tuple(phases),
        scale_log2=number(scale * LOG2_E),
        precision=shape.precision,
        units=STEP if diagonals else 0,
        most_tokens=MOST_ROWS,
    )
