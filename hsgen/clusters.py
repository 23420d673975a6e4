"""What fills the `clusters` skeleton: k-means of keys and of queries, and rows that attend by clusters.

A round gives each token the nearest centroid, counts how many tokens of each cluster every chunk has, sorts
tokens by cluster, and leaves the mean of each cluster in the centroids.  A centroid is kept as numbers of the
tokens' type whose sum it is, so that dots of either are exact; the first of them is the mean as keys have it.
A sequence whose tokens have all stayed where they were is done with: its programs return at once.

Clusters of rows then score clusters of keys by their means, and what they choose are bits.  A tile has rows
of one cluster; its program writes down the tokens of the clusters that these chose, and walks them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hsgen.graph import (
    Attend,
    Cluster,
    Graph,
    Input,
    LogSumExp,
    Node,
    Normalise,
    Pool,
    PoolRows,
    Score,
    SelectSet,
    Union,
)
from hsgen.kernels import tunables
from hsgen.plan import Param
from hsgen.rows import (
    LOG2_E,
    OUTPUT_GRADIENT,
    OUTPUTS,
    SEQ,
    SUMS,
    Chunk,
    chunks,
    count,
    jit,
    next_power,
    number,
    pointer,
    tensor,
)

PLACED = 64  # tokens that are put in their places together
CHUNK = 256  # tokens whose clusters are counted together, a multiple
LEAST_CLUSTERS = 64  # of a tile: fewer are padded
MOST_CLUSTERS = 4096  # whose bits, and how many tokens they have, are in registers

How = Literal[
    "start",
    "assign",
    "tally",
    "starts",
    "place",
    "update",
    "tiles",
    "score",
    "values",
    "errors",
    "choose",
    "attend",
    "members",
    "spread",
    "bits",
    "unite",
    "queries",
    "keys",
    "means",
]
GRADIENTS: tuple[How, ...] = ("queries", "keys", "means")
DOTS: tuple[How, ...] = ("assign", "score", "errors", "attend", *GRADIENTS)
SUMMARIES: dict[How, str] = {
    "start": "centroids that are tokens evenly spaced.",
    "assign": "the nearest centroid of every token, of equals the first.",
    "tally": "how many tokens of a chunk are in each cluster.",
    "starts": "how many are before each chunk, and where clusters begin.",
    "place": "tokens by cluster, in order.",
    "update": "the mean of each cluster; where one has no token, what was there.",
    "tiles": "how many tiles of rows are before those of each cluster.",
    "score": "what clusters of rows give clusters of keys, by their means.",
    "values": "the mean value of each cluster, and how its values lie to it.",
    "errors": "what clusters of rows get wrong by the means of clusters of keys.",
    "choose": "the best clusters of keys of each cluster of rows, as bits.",
    "attend": "tiles of rows of a cluster, over the tokens of what it chose.",
    "members": "which clusters of keys each row has chosen for itself, as bits.",
    "spread": "every row with what its cluster chose.",
    "bits": "what the cluster of each row has chosen, as bits of the row.",
    "unite": "which clusters of keys any row of a tile has chosen.",
    "queries": "the gradient of queries.",
    "keys": "the gradients of keys and values.",
    "means": "the gradients of means that are attended, for each of their tokens.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClustersContext:
    """Everything `clusters.py.jinja` reads.

    `heads` and `clusters` are those of the side whose tokens are clustered: keys, or with `rows` queries.
    """

    name: str
    how: How
    header: str = ""
    pieces: str = ""
    query_heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    row_clusters: int
    key_clusters: int
    iterations: int = 1
    rows: bool = False
    scale: float = 1.0
    counted: bool = False  # the logarithm of how many keys a cluster has is added to its score
    mass: int = 0  # > 0: the part of all masses that is reached, in units of 2^-30
    least: int = 0  # clusters that are kept whatever they weigh
    tells: bool = False  # how many are kept is told
    rest: bool = False  # what is not chosen is attended as means
    given: bool = False  # rows have lists of their own
    precision: str = "tf32x3"
    cuts: int = 3  # numbers of the tokens' type that make a centroid

    @property
    def summary(self) -> str:
        if self.given and self.how == "attend":
            return (
                "tiles of rows of a cluster, over the tokens of what any of them chose for itself."
            )
        if self.how == "choose" and not self.mass:
            return "as many clusters as others kept, those with the greatest errors, as bits."
        return SUMMARIES[self.how]

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.head_dim)

    @property
    def v_chunks(self) -> tuple[Chunk, ...]:
        return chunks(self.v_dim)

    @property
    def heads(self) -> int:
        return self.query_heads if self.rows else self.kv_heads

    @property
    def clusters(self) -> int:
        return self.row_clusters if self.rows else self.key_clusters

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads

    @property
    def padded(self) -> int:
        """`clusters` as a tile."""
        return padded(self.clusters)

    @property
    def padded_rows(self) -> int:
        return padded(self.row_clusters)

    @property
    def padded_keys(self) -> int:
        return padded(self.key_clusters)

    @property
    def words(self) -> int:
        """Of the bits of all clusters of keys."""
        return self.padded_keys // 32

    @property
    def steps(self) -> int:
        """Halvings of a list of clusters."""
        return self.padded_keys.bit_length()

    @property
    def first(self) -> int:
        """The column of `SEQ` that says where the tokens of a sequence begin."""
        return 1 if self.rows else 4

    @property
    def length(self) -> int:
        """The column that says how many there are."""
        return 2 if self.rows else 5

    @property
    def chunk(self) -> int:
        return CHUNK

    @property
    def placed(self) -> int:
        return PLACED

    @property
    def scale_log2(self) -> str:
        return number(self.scale * LOG2_E)

    @property
    def scaled(self) -> str:
        return number(self.scale)

    @property
    def params(self) -> tuple[Param, ...]:
        return _params(self)

    @property
    def jit(self) -> str:
        return jit(self.params)


def padded(clusters: int) -> int:
    """Clusters as a tile."""
    return max(LEAST_CLUSTERS, next_power(clusters))


def _params(k: ClustersContext) -> tuple[Param, ...]:
    match k.how:
        case "attend" | "members" | "queries":
            return _of_attention(k)
        case "bits" | "unite" | "keys" | "means":
            return _of_gradients(k)
        case "tiles" | "score" | "values" | "errors" | "choose" | "spread":
            return _of_choice(k)
        case _:
            return _of_round(k)


_SIDE = (
    count("rows", "of all sequences"),
    count("length", "rows from one sequence to the next; packed: 0"),
)
_Q_SIDE = (
    count("q_rows", "of queries, of all sequences"),
    count("q_length", "the same of queries"),
)
_CHUNKS = count("chunks", f"of {CHUNK} tokens, of all sequences")
_TURN = count("turn", "the round")
_PAIR_FIRST = count("pair_first", "the turn's first head, of those of all sequences")
_TILE_FIRST = count("tile_first", "the turn's first tile")
_LEFT = pointer("LEFT", "f32", "f32[3, Hkv, keys] of each slot's value: see `values`")
_KEYS = tensor("K", "k", "[B, S, Hkv, Dqk]", "bth")
_VALUES = tensor("V", "v", "[B, S, Hkv, Dv]", "bth")


def _i32(name: str, *dims: object, what: str = "") -> Param:
    shape = f"[{', '.join(map(str, dims))}]"
    return pointer(name, "i32", f"{shape} {what}" if what else shape)


def _centers(k: ClustersContext, name: str, *, rows: bool) -> Param:
    heads, clusters = (k.query_heads, k.row_clusters) if rows else (k.kv_heads, k.key_clusters)
    shape = f"[Z, {heads}, {k.cuts}, {clusters}, {k.head_dim}]"
    return pointer(name, "input", f"{shape} centroids of {'queries' if rows else 'keys'}, in parts")


def _starts(k: ClustersContext, name: str, *, rows: bool) -> Param:
    heads, wide = (k.query_heads, k.padded_rows) if rows else (k.kv_heads, k.padded_keys)
    return _i32(name, "Z", heads, f"{wide} + 1", what="the first slot of each cluster")


def _chosen(k: ClustersContext) -> Param:
    dims = ("Z", k.query_heads, k.row_clusters, k.words)
    return _i32("CHOSEN", *dims, what="bits of clusters of keys")


def _of_round(k: ClustersContext) -> tuple[Param, ...]:
    """Of k-means."""
    x = tensor("X", "x", "[B, S, H, Dqk]", "bth")
    centers = _centers(k, "CENTERS", rows=k.rows)
    half = pointer("HALF", "f32", f"f32[Z, {k.heads}, {k.clusters}] half of their squares")
    labels = (_i32("LABELS", k.heads, "rows", what="the cluster of each token"), *_SIDE)
    counts = (_i32("COUNTS", k.heads, "chunks", k.padded, what="tokens of clusters"), _CHUNKS)
    starts = _starts(k, "STARTS", rows=k.rows)
    order = _i32("ORDER", k.heads, "rows", what="the token of each slot")
    moved = _i32("MOVED", "rounds", "Z", k.heads, what="whether a token has moved")
    of_round = (moved, *SEQ, _TURN)
    match k.how:
        case "start":
            return (*x, centers, half, *SEQ[:1], *tunables("BLOCK_E"))
        case "assign":
            return (*x, centers, half, *labels, *of_round, *tunables("BLOCK_N", "BLOCK_E"))
        case "tally":
            return (*labels, *counts, *of_round)
        case "starts":
            return (*counts, _SIDE[1], starts, *of_round)
        case "place":
            return (*labels, *counts, starts, order, *of_round)
        case _:
            at = (*x, starts, order, *_SIDE, centers, half, *of_round)
            return (*at, *tunables("BLOCK_N"))


def _of_choice(k: ClustersContext) -> tuple[Param, ...]:
    """Of what clusters of rows choose."""
    centers = (
        _centers(k, "ROW_CENTERS", rows=True),
        _centers(k, "KEY_CENTERS", rows=False),
    )
    starts = _starts(k, "KEY_STARTS", rows=False)
    order = (_i32("KEY_ORDER", k.kv_heads, "keys", what="the token of each slot"), *_SIDE)
    scores = pointer(
        "SCORES", "f32", f"f32[turn, {k.row_clusters}, {k.padded_keys}] of a turn's heads"
    )
    match k.how:
        case "tiles":
            tiles = _tiles(k)
            return (_starts(k, "ROW_STARTS", rows=True), tiles, *tunables("BLOCK_T"))
        case "score":
            return (*centers, starts, scores, _PAIR_FIRST, *tunables("BLOCK_R", "BLOCK_E"))
        case "values":
            of = (starts, *order, _value_means(k), _LEFT)
            return (*_VALUES, *of, *SEQ[:1], *tunables("BLOCK_N"))
        case "errors":
            of = (*centers, starts, *order, _LEFT, scores)
            return (*_KEYS, *of, *SEQ[:1], _PAIR_FIRST, *tunables("BLOCK_R", "BLOCK_N"))
        case "choose":
            kept = _i32("KEPT", "Z", k.query_heads, k.row_clusters, what="how many")
            told = (kept,) if k.tells or not k.mass else ()
            return (scores, starts, _chosen(k), *told, _PAIR_FIRST, *tunables("BLOCK_R"))
        case _:
            labels = _i32("ROW_LABELS", k.query_heads, "rows", what="the cluster of each row")
            made = _i32("SELECTION", "rows", k.query_heads, k.key_clusters)
            return (labels, *_Q_SIDE, _chosen(k), made, *SEQ, *tunables("BLOCK_T"))


def _of_attention(k: ClustersContext) -> tuple[Param, ...]:
    """Of rows that attend."""
    q = tensor("Q", "q", "[B, T, Hq, Dqk]", "bth")
    starts = _starts(k, "KEY_STARTS", rows=False)
    means = (_centers(k, "KEY_CENTERS", rows=False), _value_means(k)) if k.rest else ()
    words = _i32("WORDS", "rows", k.query_heads, k.words, what="bits of what a row chose")
    if k.how == "members":
        dims = ("turn * BLOCK_T", k.query_heads, k.padded_keys)
        members = _i32("MEMBERS", *dims, what="1 of what a row chose")
        selection = tensor("SELECTION", "s", "[B, T, Hq, K]", "bths", "i32")
        of = (count("width", "K"), members, words, *SEQ, _TILE_FIRST)
        return (*selection, *of, *tunables("BLOCK_T", "BLOCK_K"))
    order = _i32("KEY_ORDER", k.kv_heads, "keys", what="the token of each slot")
    row_order = _i32("ROW_ORDER", k.query_heads, "rows", what="the row of each slot")
    labels = _i32("KEY_LABELS", k.kv_heads, "keys", what="the cluster of each token")
    chosen = (words, labels) if k.given else (_chosen(k),)
    return (
        *(*q, *_KEYS, *_VALUES, *chosen, starts, order, *_SIDE, *means),
        *(_starts(k, "ROW_STARTS", rows=True), row_order, *_Q_SIDE, _tiles(k)),
        *(_i32("SCRATCH", "programs", "room"), count("room", "of a program's words")),
        *(count("most", "tiles of a head, at most"), count("items", "tiles of all heads")),
        *((*OUTPUT_GRADIENT, *SUMS, *_DQ) if k.how == "queries" else OUTPUTS),
        *SEQ[:1],
        *tunables("BLOCK_T", "BLOCK_N", "BLOCK_K"),
    )


_DQ = tensor("DQ", "dq", "[B, T, Hq, Dqk]", "bth")


def _of_gradients(k: ClustersContext) -> tuple[Param, ...]:
    """Of bits of rows, and of keys that stay."""
    words = _i32("WORDS", "rows", k.query_heads, k.words, what="bits of what a row chose")
    if k.how == "bits":
        labels = _i32("ROW_LABELS", k.query_heads, "rows", what="the cluster of each row")
        return (labels, *_Q_SIDE, _chosen(k), words, *SEQ, *tunables("BLOCK_T"))
    dims = ("Z", k.query_heads, "tiles", k.words)
    united = (
        _i32("TILE_WORDS", *dims, what="of what any of its rows chose"),
        count("tiles", "of rows of a sequence and head"),
    )
    order = _i32("ROW_ORDER", k.query_heads, "rows", what="the row of each slot")
    if k.how == "unite":
        return (order, *_Q_SIDE, words, *united, *SEQ[:1], *tunables("BLOCK_T"))
    q = tensor("Q", "q", "[B, T, Hq, Dqk]", "bth")
    of_rows = (order, *_Q_SIDE, words, *OUTPUT_GRADIENT, *SUMS)
    parts = tuple(
        pointer(
            f"PART_{x}", "f32", f"f32[Z, {k.kv_heads}, {k.key_clusters}, {dim}] a token of means"
        )
        for x, dim in (("K", k.head_dim), ("V", k.v_dim))
    )
    tiles = tunables("BLOCK_T", "BLOCK_N")
    if k.how == "means":
        starts = _starts(k, "KEY_STARTS", rows=False)
        means = (_centers(k, "KEY_CENTERS", rows=False), _value_means(k))
        return (*q, starts, *means, *of_rows, *parts, *SEQ[:1], *tiles)
    key_order = _i32("KEY_ORDER", k.kv_heads, "keys", what="the token of each slot")
    labels = _i32("KEY_LABELS", k.kv_heads, "keys", what="the cluster of each token")
    grads = (
        *tensor("DK", "dk", "[B, S, Hkv, Dqk]", "bth"),
        *tensor("DV", "dv", "[B, S, Hkv, Dv]", "bth"),
    )
    of_keys = (*q, *_KEYS, *_VALUES, key_order, labels, *_SIDE)
    return (*of_keys, *of_rows, *united, *(parts if k.rest else ()), *grads, *SEQ[:1], *tiles)


def _value_means(k: ClustersContext) -> Param:
    return pointer("VALUE_MEANS", "input", f"[Z, {k.kv_heads}, {k.key_clusters}, {k.v_dim}]")


def _tiles(k: ClustersContext) -> Param:
    return _i32("TILES", "Z", k.query_heads, f"{k.padded_rows} + 1", what="tiles before each")


# --- which clusters kernels attend by


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A level: the nodes of a graph that cluster, score and choose."""

    keys: Node  # the clusters of keys
    rows: Node
    means: Node
    queries: Node
    values: Node | None
    score: Node
    lse: Node | None
    normalised: Node | None
    select: Node

    @property
    def names(self) -> tuple[str, ...]:
        found = (
            *(self.keys, self.rows, self.means, self.queries, self.values),
            *(self.score, self.lse, self.normalised, self.select),
        )
        return tuple(node.name for node in found if node is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clustering:
    """All that a graph does, where it attends by clusters: by masses, or by errors, as many as by masses."""

    mass: Stage
    error: Stage | None
    exact: Node
    rest: Node | None
    names: frozenset[str]

    @property
    def attended(self) -> Stage:
        return self.error or self.mass

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (self.mass, *((self.error,) if self.error else ()))


def clustering_of(graph: Graph) -> Clustering | None:
    """What kernels do as a whole; None of a graph that has no clusters, or does other things with them."""
    if graph.meta.causal:
        return None
    selects = [node for node in graph.nodes() if isinstance(node.op, SelectSet)]
    stages = [_stage(graph, node) for node in selects]
    attends = [node for node in graph.nodes() if isinstance(node.op, Attend)]
    if not stages or None in stages or len(stages) > 2 or not 1 <= len(attends) <= 2:
        return None
    mass = next((x for x in stages if x and x.normalised), None)
    error = next((x for x in stages if x and not x.normalised), None)
    if mass is None or (len(stages) == 2) != (error is not None):
        return None
    if error and not (error.select.inputs[1:] == (mass.select.name,) and _alike(mass, error)):
        return None
    stage = error or mass
    exact = next((x for x in attends if _exact(x, stage)), None)
    rest = next((x for x in attends if _rest(x, stage)), None)
    if exact is None or (len(attends) == 2) != (rest is not None):
        return None
    if rest is not None and scale_of(rest) != scale_of(exact):
        return None
    unions = [node for node in graph.nodes() if isinstance(node.op, Union)]
    if (rest is not None) != (len(unions) == 1) or any(len(x.inputs) > 2 for x in unions):
        return None
    found = {name for x in stages if x for name in x.names} | {x.name for x in attends}
    found |= {x.name for x in unions}
    outputs = {x.name for x in (*attends, *unions)}
    found |= {
        node.name
        for node in graph.nodes()
        if isinstance(node.op, LogSumExp) and node.inputs[0] in outputs
    }
    others = [x for x in graph.nodes() if x.name not in found and not isinstance(x.op, Input)]
    if others:
        return None
    return Clustering(mass=mass, error=error, exact=exact, rest=rest, names=frozenset(found))


def scale_of(attend: Node) -> float:
    """What a branch's logits are times."""
    assert isinstance(attend.op, Attend)
    return attend.op.scale if attend.op.scale is not None else 1.0


def slots_of(graph: Graph, name: str) -> int | None:
    """Slots of a row of a choice of clusters, of which there may be all; None of any other choice."""
    found = clustering_of(graph)
    for stage in found.stages if found else ():
        if stage.select.name == name and isinstance(stage.keys.op, Cluster):
            return stage.keys.op.clusters
    return None


def _stage(graph: Graph, select: Node) -> Stage | None:
    """Back from a choice."""
    normalised = graph[select.inputs[0]]
    score, lse = normalised, None
    if isinstance(normalised.op, Normalise):
        score = graph[normalised.inputs[0]]
        lse = graph[normalised.inputs[1]] if len(normalised.inputs) > 1 else None
        if lse is None or lse.inputs != (score.name,) or normalised.op.by is not None:
            return None
    if not isinstance(score.op, Score):
        return None
    queries, means = graph[score.inputs[0]], graph[score.inputs[1]]
    if not isinstance(queries.op, PoolRows) or not isinstance(means.op, Pool):
        return None
    if len(queries.inputs) != 2 or len(means.inputs) != 2:
        return None
    rows, keys = graph[queries.inputs[1]], graph[means.inputs[1]]
    values: Node | None = None
    if score.op.form == "pooling_error":
        if len(score.inputs) != 6:
            return None
        values = graph[score.inputs[3]]
        if score.inputs[2] != "k" or score.inputs[4] != "v" or values.inputs != ("v", keys.name):
            return None
    stage = Stage(
        keys=keys,
        rows=rows,
        means=means,
        queries=queries,
        values=values,
        score=score,
        lse=lse,
        normalised=normalised if lse else None,
        select=select,
    )
    return stage if _plain(stage) else None


def _plain(stage: Stage) -> bool:
    """Whether no operator of a level is more than kernels do."""
    keys, rows, select, score = stage.keys.op, stage.rows.op, stage.select.op, stage.score.op
    if not isinstance(keys, Cluster) or not isinstance(rows, Cluster):
        return False
    assert isinstance(select, SelectSet)
    assert isinstance(score, Score)
    level = select.level
    if max(keys.clusters, rows.clusters) > MOST_CLUSTERS or not keys.iterations:
        return False
    mean = Pool(level=level, how="mean", position=False, cut="clusters", size=0, stride=0)
    by_mass = stage.normalised is not None
    wanted = (
        (keys, Cluster(level=level, clusters=keys.clusters, iterations=keys.iterations)),
        (
            rows,
            Cluster(level=level, clusters=rows.clusters, iterations=rows.iterations, of="queries"),
        ),
        (stage.means.op, mean),
        (stage.values.op if stage.values else mean, mean),
        (
            stage.queries.op,
            PoolRows(
                level=level,
                how="mean",
                block=None,
                last=None,
                clusters=rows.clusters,
                cut="clusters",
            ),
        ),
        (
            score,
            Score(
                level=level,
                form="dot" if by_mass else "pooling_error",
                scale=score.scale,
                within=None,
                counted=score.counted if by_mass else None,
                cut="clusters",
                size=0,
                stride=0,
            ),
        ),
        (
            select,
            SelectSet(
                level=level,
                rule="top_p",
                value=select.value,
                first=0,
                last=0,
                counted=select.counted,
                boundary="keep",
                scope="row",
                least=select.least,
                size=0,
                stride=0,
            )
            if by_mass
            else SelectSet(
                level=level,
                rule="budget_from",
                value=select.value,
                first=0,
                last=0,
                counted=select.counted,
                budget_from=select.budget_from,
                size=0,
                stride=0,
            ),
        ),
    )
    inputs = (
        stage.keys.inputs,
        stage.rows.inputs,
        stage.queries.inputs[:1],
        stage.means.inputs[:1],
    )
    return all(a == b for a, b in wanted) and inputs == (("k",), ("q",), ("q",), ("k",))


def _alike(one: Stage, other: Stage) -> bool:
    """Whether two levels have the same clusters."""
    mine, theirs = one.keys.op, other.keys.op
    rows, their_rows = one.rows.op, other.rows.op
    assert isinstance(mine, Cluster)
    assert isinstance(theirs, Cluster)
    assert isinstance(rows, Cluster)
    assert isinstance(their_rows, Cluster)
    same_keys = mine == replace(theirs, level=mine.level)
    return same_keys and rows == replace(their_rows, level=rows.level)


def _exact(node: Node, stage: Stage) -> bool:
    """Whether a branch attends the tokens of what was chosen."""
    op = node.op
    assert isinstance(op, Attend)
    plain = Attend(
        branch=op.branch,
        over="blocks",
        scale=op.scale,
        size=0,
        stride=0,
        window=None,
        cut="clusters",
        row_cut="clusters",
    )
    orders = (stage.keys.name, stage.rows.name)
    return op == plain and node.inputs == ("q", "k", "v", stage.select.name, *orders)


def _rest(node: Node, stage: Stage) -> bool:
    """Whether a branch attends what was not, as means of so many tokens."""
    op = node.op
    assert isinstance(op, Attend)
    plain = Attend(
        branch=op.branch,
        over="pooled",
        scale=op.scale,
        size=0,
        stride=0,
        window=None,
        cut="clusters",
        which="skipped",
        counted=True,
        row_cut="clusters",
    )
    if stage.values is None or op != plain:
        return False
    means = (stage.means.name, stage.values.name)
    orders = (stage.keys.name, stage.rows.name)
    return node.inputs == ("q", *means, stage.select.name, *orders)


def lacking(graph: Graph, node: Node) -> str:
    """What of clusters that are not attended as a whole no kernel does."""
    op = node.op
    assert isinstance(op, Cluster)
    most = max((x.op.clusters for x in graph.nodes() if isinstance(x.op, Cluster)), default=0)
    if most > MOST_CLUSTERS:
        return f"has more than {MOST_CLUSTERS} clusters"
    if graph.meta.causal:
        return "clusters what rows see by their places"
    return f"clusters {op.of or 'keys'} but for masses, or errors, of means of all of them"
