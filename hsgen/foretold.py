"""Heads that choose in one of two ways, by whether means foretell where a prompt's last rows attend.

The mean of the last rows and the mean keys of blocks make an estimate of what these rows give each block.
Where it is near to what they do give, by the Jensen-Shannon divergence of both, blocks of rows choose blocks
by such means; else all rows have the columns of blocks, and the diagonals of blocks, that the last rows give
most.  Which it is stands in a word a sequence and head, made on the device: both choices end in lists of
blocks, and what lists a tile's blocks looks which of them are its head's.
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
    Map,
    Node,
    Normalise,
    Pool,
    PoolRows,
    ReduceRows,
    Route,
    Score,
    SelectSet,
    Union,
    block_of,
)
from hsgen.kernels import tunables
from hsgen.pairs import ways_of
from hsgen.plan import Param
from hsgen.rows import (
    BIT_WORDS,
    SEQ,
    Chunk,
    bits_of,
    chunks,
    count,
    jit,
    number,
    pointer,
    tensor,
)
from hsgen.slashes import MOST_LAST, Chain
from hsgen.together import TILE_FIRST, WIDTH

MOST_SIZE = 256  # tokens of a block, whose masses are summed in one tile


# --- what of a graph kernels do as a whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Blocks, or diagonals of blocks, that all rows have: as many as hold more tokens than `chain` keeps."""

    chain: Chain
    mapped: Node
    selection: Node

    @property
    def names(self) -> tuple[str, ...]:
        return *self.chain.names, self.chain.selection.name, self.mapped.name, self.selection.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What the mean of the last rows gives the means of blocks."""

    queries: Node
    keys: Node
    score: Node
    lse: Node
    mass: Node

    @property
    def names(self) -> tuple[str, ...]:
        """All but the keys, which are pooled as others are."""
        return self.queries.name, self.score.name, self.lse.name, self.mass.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Foretold:
    """One attention over what heads have chosen in either way."""

    attend: Node
    blocks: Node  # the selection of blocks of rows
    columns: Kept
    diagonals: Kept
    route: Node
    estimate: Estimate
    mapped: Node  # what the estimate is held against

    @property
    def names(self) -> tuple[str, ...]:
        """What is launched here; blocks of rows choose as they do without a route."""
        own = (self.attend.name, self.route.name, self.mapped.name)
        return *self.columns.names, *self.diagonals.names, *self.estimate.names, *own

    @property
    def size(self) -> int:
        """Tokens of a block, and rows of one."""
        return _set(self.blocks).size

    @property
    def level(self) -> str:
        """That of these rows' choice."""
        return _set(self.blocks).level

    @property
    def way(self) -> int:
        """The number of the way of heads whose blocks of rows choose."""
        return way_of(self.blocks, self.route)


def way_of(selection: Node, route: Node) -> int:
    """The number that a route has where this is chosen."""
    assert isinstance(route.op, Route)
    return route.op.ways.index(_set(selection).when or "")


def joined(graph: Graph) -> tuple[Graph, Mapping[str, str]]:
    """The same graph, for schedules, where branches of two such ways are one, whose heads have lists of
    either, and keys that are pooled alike are pooled once; as it is where they are anything else.

    And by which node each that is gone is done.
    """
    union = next((node for node in graph.nodes() if isinstance(node.op, Union)), None)
    if union is None or any(not isinstance(x.op, Attend) for x in graph.operands(union)):
        return graph, {}
    kinds = {_kind(graph, node): node for node in graph.operands(union)}
    if len(kinds) != len(union.inputs) or {*kinds} != {"blocks", "columns", "diagonals"}:
        return graph, {}
    blocks, columns, diagonals = (kinds[kind] for kind in ("blocks", "columns", "diagonals"))
    if {x.inputs[:3] + x.inputs[4:] for x in (columns, diagonals)} != {
        blocks.inputs[:3] + blocks.inputs[4:]
    } or len({_scale(x) for x in kinds.values()}) > 1:
        return graph, {}
    assert isinstance(blocks.op, Attend)
    chosen = tuple(x.inputs[3] for x in (blocks, columns, diagonals))
    one = replace(
        union,
        op=replace(blocks.op, when=None),
        inputs=(*blocks.inputs[:3], *chosen, blocks.inputs[-1]),
    )
    gone = dict.fromkeys(union.inputs, union.name)
    others = [node for node in graph.nodes() if node.name not in (*gone, union.name)]
    made, pools = _pooled_once(graph.with_nodes((*others, one)))
    return (made, {**gone, **pools}) if foretold(made) else (graph, {})


def _pooled_once(graph: Graph) -> tuple[Graph, Mapping[str, str]]:
    """The same graph, where the first of pools that are alike is all of them."""
    first: dict[object, str] = {}
    gone: dict[str, str] = {}
    for node in graph.nodes():
        if isinstance(node.op, Pool):
            one = first.setdefault((node.inputs, replace(node.op, level="")), node.name)
            if one != node.name:
                gone[node.name] = one
    nodes = (node for node in graph.nodes() if node.name not in gone)
    renamed = (replace(x, inputs=tuple(gone.get(name, name) for name in x.inputs)) for x in nodes)
    return graph.with_nodes(renamed), gone


def _scale(node: Node) -> float | None:
    assert isinstance(node.op, Attend)
    return node.op.scale


def _kind(graph: Graph, node: Node) -> Literal["blocks", "columns", "diagonals"] | None:
    """What a branch attends on one way; None where it is anything else."""
    op = node.op
    assert isinstance(op, Attend)
    plain = Attend(
        branch=op.branch,
        over="blocks",
        scale=op.scale,
        size=op.size,
        stride=op.size,
        window=None,
        when=op.when,
        diagonal=op.diagonal,
    )
    if op != plain or op.when is None or len(node.inputs) != 5:
        return None
    if block_of(graph[node.inputs[3]].type.dims[1]):
        return None if op.diagonal else "blocks"
    return "diagonals" if op.diagonal else "columns"


def foretold(graph: Graph) -> Foretold | None:
    """The attention of a graph as `joined` makes it; None where it has none, or one that no kernel goes."""
    node = next((x for x in graph.nodes() if isinstance(x.op, Attend) and len(x.inputs) == 7), None)
    if node is None or not graph.meta.causal:
        return None
    blocks, columns, diagonals, route = graph.operands(node)[3:]
    if not isinstance(route.op, Route) or len(route.inputs) != 2:
        return None
    estimate = _estimate(graph, graph[route.inputs[0]])
    mapped = graph[route.inputs[1]]
    kept = tuple(_kept(graph, x) for x in (columns, diagonals))
    if estimate is None or None in kept or not isinstance(blocks.op, SelectSet):
        return None
    one, other = kept
    assert one is not None
    assert other is not None
    found = Foretold(
        attend=node,
        blocks=blocks,
        columns=one,
        diagonals=other,
        route=route,
        estimate=estimate,
        mapped=mapped,
    )
    return found if _goes(graph, found) else None


def _goes(graph: Graph, found: Foretold) -> bool:
    """Whether kernels do all of it, and nothing else reads what is on the way."""
    route, columns, diagonals = found.route.op, found.columns, found.diagonals
    assert isinstance(route, Route)
    ways = tuple(_set(x).when for x in (columns.selection, found.blocks))
    plain = Route(
        by="sample_head",
        ways=route.ways,
        places=(0, 1),
        repeats=False,
        divergence=route.divergence,
    )
    last = columns.chain.last
    rows = found.estimate.queries.op
    given = {columns.chain.score.inputs, diagonals.chain.score.inputs}
    alike = (found.size, block_of(found.blocks.type.dims[1])) == (_set(columns.selection).size,) * 2
    users = {user.name for name in found.names for user in graph.users(name)}
    read = {found.blocks.name, *(x.name for x in graph.users(found.attend.name))}
    return (
        route == plain
        and route.divergence is not None
        and len({*ways}) == 2
        and {*ways} == {*route.ways}
        and _set(diagonals.selection).when == ways[0]
        and _set(diagonals.selection).size == found.size
        and alike
        and _pools_blocks(graph, found)
        and given == {("q", *found.estimate.keys.inputs)}
        and isinstance(rows, PoolRows)
        and rows.last == last == diagonals.chain.last
        and _is_power(last)
        and last <= MOST_LAST
        and _is_power(found.size)
        and found.size <= MOST_SIZE
        and _sums(found.mapped, columns.chain.together, found.size)
        and users <= {*found.names, *read}
        and found.blocks.type.dims[2] == "Hq"
    )


def _pools_blocks(graph: Graph, found: Foretold) -> bool:
    """Whether blocks of rows score the keys of the estimate."""
    mass = graph[found.blocks.inputs[0]]
    score = graph[mass.inputs[0]]
    return isinstance(score.op, Score) and score.inputs[1:] == (found.estimate.keys.name,)


def _is_power(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _set(selection: Node) -> SelectSet:
    assert isinstance(selection.op, SelectSet)
    return selection.op


def _sums(node: Node, source: Node, size: int) -> bool:
    """Whether scores of blocks are the sums of what their tokens, or diagonals, have."""
    op = node.op
    if not isinstance(op, Map) or node.inputs != (source.name,):
        return False
    return op == Map(
        level=op.level,
        how="sum",
        size=size,
        stride=size,
        ratio=size,
        taps=tuple((i, 1) for i in range(size)),
    )


def _estimate(graph: Graph, mass: Node) -> Estimate | None:
    if not isinstance(mass.op, Normalise) or len(mass.inputs) != 2:
        return None
    score, lse = graph.operands(mass)
    if not isinstance(score.op, Score) or len(score.inputs) != 2:
        return None
    queries, keys = graph.operands(score)
    rows, pool, op = queries.op, keys.op, score.op
    if not isinstance(rows, PoolRows) or not isinstance(pool, Pool) or queries.inputs != ("q",):
        return None
    plain = (
        PoolRows(level=rows.level, how="mean", block=None, last=rows.last),
        Pool(level=pool.level, how="mean", size=pool.size, stride=pool.size, position=False),
        Score(
            level=op.level,
            form="dot",
            scale=op.scale,
            size=pool.size,
            stride=pool.size,
            within=None,
        ),
        LogSumExp(),
        Normalise(level=mass.op.level),
    )
    given = isinstance(graph[keys.inputs[0]].op, Input) and len(keys.type.dims) == 4
    if (rows, pool, op, lse.op, mass.op) != plain or lse.inputs != (score.name,) or not given:
        return None
    return Estimate(queries=queries, keys=keys, score=score, lse=lse, mass=mass)


def _kept(graph: Graph, selection: Node) -> Kept | None:
    op = selection.op
    if not isinstance(op, SelectSet) or len(selection.inputs) != 3:
        return None
    mapped, source, _ = graph.operands(selection)
    chain = _chain(graph, source)
    plain = SelectSet(
        level=op.level,
        size=op.size,
        stride=op.size,
        rule="budget_from",
        value=op.value,
        first=op.first,
        last=op.last,
        counted=op.counted,
        when=op.when,
        budget_from=op.budget_from,
        budget_in="tokens",
        diagonal=op.diagonal,
    )
    if chain is None or op != plain or _set(source).diagonal != op.diagonal:
        return None
    goes = _set(source).level == op.budget_from and _sums(mapped, chain.together, op.size)
    return Kept(chain=chain, mapped=mapped, selection=selection) if goes else None


def _chain(graph: Graph, selection: Node) -> Chain | None:
    """From the last rows' logits to the tokens, or diagonals, that have a part of their mass."""
    chosen, together = selection.op, graph[selection.inputs[0]]
    if not isinstance(chosen, SelectSet) or not isinstance(together.op, ReduceRows):
        return None
    normalised = graph[together.inputs[0]]
    if not isinstance(normalised.op, Normalise) or len(normalised.inputs) != 2:
        return None
    score, lse = graph.operands(normalised)
    op, reduced = score.op, together.op
    if not isinstance(op, Score) or len(score.inputs) != 2 or reduced.how == "max":
        return None
    plain = (
        Score(
            level=op.level,
            form="dot",
            scale=op.scale,
            size=1,
            stride=1,
            within=None,
            diagonal=chosen.diagonal,
        ),
        LogSumExp(),
        Normalise(level=op.level),
        ReduceRows(level=op.level, how=reduced.how, block=None, last=reduced.last),
        SelectSet(
            level=op.level,
            size=1,
            stride=1,
            rule="top_p",
            value=chosen.value,
            first=chosen.first,
            last=chosen.last,
            counted=chosen.counted,
            boundary=chosen.boundary,
            scope="row",
            least=chosen.least,
            diagonal=chosen.diagonal,
        ),
    )
    if (op, lse.op, normalised.op, reduced, chosen) != plain or lse.inputs != (score.name,):
        return None
    return Chain(
        score=score, lse=lse, normalised=normalised, together=together, selection=selection
    )


def reached(graph: Graph, node: Node) -> bool:
    """Whether an operator is part of what this module's kernels do, of a graph as `joined` makes it."""
    found = foretold(graph)
    return found is not None and node.name in found.names


# --- kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class WaysContext:
    """Everything `_maps_ways.jinja` reads: masses of blocks and of diagonals of blocks, how far an estimate
    is from the former, and by that the way of each head and how many of either it keeps.
    """

    name: str
    header: str = ""
    pieces: str = ""
    heads: int  # of queries
    group: int
    head_dim: int
    last: int  # rows that are asked
    size: int  # tokens of a block
    scale: float
    threshold: float  # of the root of the divergence
    below: int  # the number of the way where it is less
    above: int
    pooled: int  # that of the heads whose blocks of rows choose
    how: Literal["ways"] = "ways"

    @property
    def summary(self) -> str:
        return "the way of each head, and what it has to choose by on one of them."

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def softmax_scale(self) -> str:
        return number(self.scale)

    @property
    def nearest(self) -> str:
        """The greatest divergence of what is near, of which the root is the threshold."""
        return number(self.threshold * self.threshold)

    @property
    def params(self) -> tuple[Param, ...]:
        tokens, blocks = f"f32[Z, {self.heads}, tokens]", f"f32[Z, {self.heads}, capacity]"
        counts = f"i32[Z, {self.heads}, 2] how many"
        kept = f"i32[Z, {self.heads}] how many blocks of"
        return (
            *tensor("Q", "q", "[B, T, Hq, Dqk]", "bth"),
            *tensor("K", "k", "[B, N, Hkv, Dqk] mean keys of blocks", "bth"),
            pointer("COLUMNS", "f32", f"{tokens} mass of each key"),
            pointer("COLUMN_COUNTS", "i32", f"{counts} have enough of it"),
            pointer("DIAGONALS", "f32", f"{tokens} mass of each diagonal"),
            pointer("DIAGONAL_COUNTS", "i32", f"{counts} have enough of it"),
            count("tokens", "row length of masses"),
            pointer("ESTIMATES", "f32", f"{blocks} logits of blocks"),
            pointer("COLUMN_MASSES", "f32", f"{blocks} of blocks of keys"),
            pointer("DIAGONAL_MASSES", "f32", f"{blocks} of blocks of diagonals"),
            count("capacity", "row length of them"),
            pointer("KEPT_COLUMNS", "i32", f"{kept} keys are kept"),
            pointer("KEPT_DIAGONALS", "i32", f"{kept} diagonals are kept"),
            ways_of(self.heads),
            *SEQ,
            *tunables("BLOCK_N"),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)


@dataclass(frozen=True, slots=True, kw_only=True)
class EitherContext:
    """Everything `_index_either.jinja` reads: of a tile the list of its block of rows, or on another way than
    `way` the columns and the diagonals of its head.
    """

    name: str
    header: str = ""
    pieces: str = ""
    heads: int  # of queries
    rows: int  # of a block, and tokens of one
    way: int
    bits: bool = False  # of whole blocks of rows
    how: Literal["either"] = "either"

    @property
    def summary(self) -> str:
        see = "what its rows see, a bit by entry" if self.bits else "what rows of a tile see"
        return f"of a block's list, or of its head's columns and diagonals, {see}."

    @property
    def whole(self) -> str:
        """Blocks of which the first row sees every token, and so do those behind it."""
        return f"complete_limit(first, k_len, {self.rows}, {self.rows}, True, False)"

    @property
    def begun(self) -> str:
        """Blocks of which the last row may see a token."""
        return f"entry_limit(last, k_len, {self.rows}, True)"

    @property
    def params(self) -> tuple[Param, ...]:
        chosen, counts = f"[Z, {self.heads}, width] ascending", f"[Z, {self.heads}, 2] how many"
        tiles = f"[tiles, {self.heads}"
        made = (
            pointer("COUNTS", "i32", f"{tiles}, 2] of full blocks, of partial ones"),
            pointer("ENTRIES", "i32", f"{tiles}, width] full ones first"),
        )
        if self.bits:
            made = (bits_of(self.heads), BIT_WORDS)
        return (
            pointer("LISTS", "i32", f"[blocks, {self.heads}, width] ascending, then -1"),
            pointer("COLUMNS", "i32", f"{chosen}, blocks"),
            pointer("COLUMN_COUNTS", "i32", counts),
            pointer("DIAGONALS", "i32", f"{chosen}, blocks before the rows' own"),
            pointer("DIAGONAL_COUNTS", "i32", counts),
            ways_of(self.heads),
            *made,
            WIDTH,
            *SEQ,
            *(tunables("BLOCK_N") if self.bits else (TILE_FIRST, *tunables("BLOCK_T", "BLOCK_N"))),
        )

    @property
    def jit(self) -> str:
        return jit(self.params)
