"""What an operator makes of its operands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import assert_never

from hsgen.graph.nodes import GraphError, Node, TensorType
from hsgen.graph.ops import (
    Assign,
    Attend,
    Carry,
    Cluster,
    Cut,
    Delta,
    Distance,
    Divergence,
    Entropies,
    Gate,
    Input,
    LogSumExp,
    Map,
    Norm,
    Normalise,
    Op,
    OutputGate,
    Permute,
    Pool,
    PoolHeads,
    PoolRows,
    Recall,
    Reduce,
    ReduceRows,
    Rotate,
    Round,
    Route,
    Runs,
    Score,
    Select,
    SelectSet,
    Switch,
    Union,
    Unlike,
)
from hsgen.graph.rows import block_of, is_rows, own_entries, rows_dim


def result_type(op: Op, operands: Sequence[Node]) -> TensorType:
    """The type of `op` applied to `operands`; GraphError where they do not fit."""
    types = [operand.type for operand in operands]
    match op:
        case Input():
            raise GraphError("an input has the type it is given")
        case Cluster() | Permute() | Assign() | Runs():
            return _order_type(op, operands)
        case Pool() | PoolRows() | PoolHeads():
            return _pooled_type(op, operands)
        case Score():
            return _score_type(op, operands)
        case LogSumExp() | Normalise() | Reduce() | ReduceRows() | Map():
            return _step_type(op, operands)
        case Select() | SelectSet() | Unlike():
            return _selection_type(op, operands)
        case Attend() | Route() | Gate() | Switch() | Union() | OutputGate():
            return _output_type(op, operands)
        case Round() | Norm() | Rotate() | Delta():
            return _vector_type(op, types)
        case Recall() | Carry() | Divergence() | Distance() | Entropies():
            return _calls_type(op, types)
        case _:
            assert_never(op)


def _output_type(
    op: Attend | Route | Gate | Switch | Union | OutputGate, operands: Sequence[Node]
) -> TensorType:
    """Of what has a vector a row and query head, and of what tells heads apart."""
    types = [operand.type for operand in operands]
    match op:
        case Attend():
            return _attend_type(op, operands)
        case Route():
            return _route_type(op, types)
        case Switch():
            return _switch_type(operands)
        case Gate():
            return _gate_type(op, types)
        case Union():
            return _union_type(op, operands)
        case OutputGate():
            _need_count(types, 2)
            need_dims(types[0], ("B", "T", "Hq", *(("Dv",) if op.each == "channel" else ())))
            need_dims(types[1], ("B", "T", "Hq", "Dv"))
            return types[1]
        case _:
            assert_never(op)


def _switch_type(operands: Sequence[Node]) -> TensorType:
    """Attends of one route, no two of which are on the same way."""
    whens = [operand.op.when for operand in operands if isinstance(operand.op, Attend)]
    need(len(whens) == len(operands) >= 2, "a switch needs at least two attends")
    need(None not in whens and len({*whens}) == len(whens), f"attends on the ways {whens} overlap")
    return _agree([operand.type for operand in operands])


def _pooled_type(op: Pool | PoolRows | PoolHeads, operands: Sequence[Node]) -> TensorType:
    types = [operand.type for operand in operands]
    match op:
        case Pool():
            return _pool_type(op, operands)
        case PoolRows():
            rest = _cut_from(op.cut, operands, op.level)
            return _pool_rows_type(op, [operand.type for operand in rest])
        case PoolHeads():
            return _pool_heads_type(op, types)


def _step_type(
    op: LogSumExp | Normalise | Reduce | ReduceRows | Map, operands: Sequence[Node]
) -> TensorType:
    """What scores go through before a selection."""
    types = [operand.type for operand in operands]
    match op:
        case LogSumExp():
            return _log_sum_exp_type(operands)
        case Normalise():
            return _normalise_type(op, operands)
        case Reduce():
            return _reduce_type(op, types)
        case ReduceRows():
            return _reduce_rows_type(op, types)
        case Map():
            return _map_type(op, operands)


def _calls_type(
    op: Recall | Carry | Divergence | Distance | Entropies, types: Sequence[TensorType]
) -> TensorType:
    """What calls hand on, and losses."""
    match op:
        case Recall():
            return _recall_type(op, types)
        case Carry():
            return _carry_type(types)
        case Divergence() | Distance():
            return _loss_type(op, types)
        case Entropies():
            return _entropies_type(op, types)


def _gate_type(op: Gate, types: Sequence[TensorType]) -> TensorType:
    need(len(types) >= 2, "gates need a tensor of gates and at least one branch")
    if op.column is None:
        width = ("Dv",) if op.each else ()
        need_dims(types[0], ("B", "T", "Hq", str(len(types) - 1), *width))
        return _agree(types[1:])
    _need_count(types, 2)
    need(0 <= op.column < int(types[0].dims[3]), f"no gate {op.column} in {types[0]}")
    return types[1]


def _recall_type(op: Recall, types: Sequence[TensorType]) -> TensorType:
    """A list where every set that may be taken is one, else bitmap rows; of every row, what it takes."""
    rows, lists = f"W_{op.level}", f"K_{op.level}"
    if op.width is not None:
        need(set(op.takes) == {"kept"}, "what is brought is all that is taken")
        _need_count(types, 1)
        need_dims(types[0], ("B", "T", types[0].dims[2], lists))
        return types[0]
    sets = types[:-1]
    _need_count(types, 1 + ("own" in op.takes) + ("kept" in op.takes))
    need(bool(sets), "a recall takes something")
    need_dims(types[-1], ("1",))
    first = _agree([TensorType(dtype=x.dtype, dims=("B", "T", *x.dims[2:])) for x in sets])
    need(first.dims[-1] in (rows, lists), f"{first} is not a selection of level {op.level}")
    last = rows if "all" in op.takes else first.dims[-1]
    return TensorType(dtype="i32", dims=(*first.dims[:-1], last))


def _carry_type(types: Sequence[TensorType]) -> TensorType:
    _need_count(types, 3)
    need(types[1] == types[0], f"scores {types[0]} and kept ones {types[1]} differ")
    need_dims(types[2], ("1",))
    return types[0]


def _loss_type(op: Divergence | Distance, types: Sequence[TensorType]) -> TensorType:
    if isinstance(op, Distance):
        _need_count(types, 2)
        need_dims(_agree(types), ("B", "T", "Hq", "Dv"))
        return TensorType(dtype="f32", dims=())
    selected = op.over == "selected"
    _need_count(types, 3 + selected)
    _, rows, heads, entries = _score_dims(types[0])
    need((rows == "T") == (op.rows is None), f"{rows} rows choose together")
    need(entries.partition("_")[2] == op.level, f"scores {types[0]} are not of level {op.level}")
    need_dims(types[1], ("B", "T", "Hq", "Dqk"))
    need_dims(types[2], ("B", "S", "Hkv", "Dqk"))
    if selected:
        need(types[3].dims[2] == heads, f"{types[3]} is not what {types[0]} chooses")
    return TensorType(dtype="f32", dims=())


def _entropies_type(op: Entropies, types: Sequence[TensorType]) -> TensorType:
    _need_count(types, 3 * len(op.levels))
    need(len(op.branching) == len(op.levels) > 0, f"levels {op.levels} of {op.branching} children")
    nodes = 1
    for i, branching in enumerate(op.branching):
        query, keys, centroids = types[3 * i : 3 * i + 3]
        nodes *= branching
        need_dims(query, ("B", "T", "Hq", "Dqk"))
        need_dims(keys, ("B", "S", "Hkv", "Dqk"))
        need_dims(centroids, ("Hkv", str(nodes), "Dqk"))
    return TensorType(dtype="f32", dims=())


def need(condition: bool, message: str) -> None:
    if not condition:
        raise GraphError(message)


def need_dims(actual: TensorType, dims: tuple[str, ...]) -> None:
    need(actual.dims == dims, f"expected [{', '.join(dims)}], got {actual}")


def _need_count(operands: Sequence[object], *counts: int) -> None:
    expected = " or ".join(str(count) for count in counts)
    need(len(operands) in counts, f"expected {expected} operands, got {len(operands)}")


def _agree(types: Sequence[TensorType]) -> TensorType:
    for other in types[1:]:
        need(other == types[0], f"branches differ: {types[0]} and {other}")
    return types[0]


def _ordered_type(keys: TensorType) -> TensorType:
    """One number a token or row, and head."""
    need(keys.dims[:1] == ("B",) and len(keys.dims) == 4, f"expected [B, S, H, D], got {keys}")
    return TensorType(dtype="i32", dims=keys.dims[:3])


def _order_type(op: Cluster | Permute | Assign | Runs, operands: Sequence[Node]) -> TensorType:
    """keys [B, S, H, D] and judges [B, T, Hq, D], clusters or an order [B, S, H] -> i32[B, S, H]"""
    if isinstance(op, Assign | Runs):
        return _assigned_type(op, operands)
    if isinstance(op, Cluster):
        _need_count(operands, 1)
        _need_side(op, operands[0].type)
        return _ordered_type(operands[0].type)
    _need_count(operands, 2 if op.by == "mass" else 1)
    need(operands[0].type.dims[1] == "S", f"expected [B, S, ...], got {operands[0].type}")
    sorts = op.by in ("mass", "mean")
    need((op.segment is not None) == sorts, "segments are what sorting stays inside")
    need((op.last is not None) == (op.by == "mass"), "it is masses that the last rows give")
    if sorts:
        return _ordered_type(operands[0].type)
    need(len(operands[0].type.dims) == 3, f"expected [B, S, H], got {operands[0].type}")
    clusters = isinstance(operands[0].op, Cluster)
    need(clusters == (op.by == "clusters"), f"%{operands[0].name} does not say clusters")
    return TensorType(dtype="i32", dims=operands[0].type.dims)


def _assigned_type(op: Assign | Runs, operands: Sequence[Node]) -> TensorType:
    """keys [B, S, H, D], centroids [H, N, D], [nodes above [B, S, H]] -> i32[B, S, H]; [B, S] of runs"""
    if isinstance(op, Runs):
        _need_count(operands, 1)
        x = operands[0].type
        given = op.span is None
        need((op.threshold is None) == given, "a threshold is one of what spans are compared by")
        need(
            x.dims == ("B", "S") if given else len(x.dims) == 4, f"{x} do not say where runs begin"
        )
        return TensorType(dtype="i32", dims=("B", "S"))
    _need_count(operands, 2, 3)
    keys, centroids, *above = operands
    assigned = _ordered_type(keys.type)
    need_dims(centroids.type, (keys.type.dims[2], str(op.nodes), keys.type.dims[3]))
    need(op.nodes % op.branching == 0, f"{op.nodes} nodes in families of {op.branching}")
    parents = [node.op.nodes for node in above if isinstance(node.op, Assign)]
    need(len(parents) == len(above), "nodes lie in nodes")
    need(op.nodes == op.branching * (parents or [1])[0], f"{op.nodes} nodes of {op.branching} each")
    if op.takes is None:
        return assigned
    need(not above and op.capacity is None, "nodes that take their tokens are those of one level")
    return TensorType(dtype="i32", dims=(*assigned.dims, str(op.nodes)))


def _need_side(op: Cluster, x: TensorType) -> None:
    rows = "S" if op.of is None else "T"
    need(x.dims[1] == rows, f"expected [B, {rows}, ...], got {x}")


_CUTS: Mapping[Cut, type[Permute | Cluster | Assign | Runs]] = MappingProxyType(
    {"order": Permute, "clusters": Cluster, "nodes": Assign, "runs": Runs}
)


def _cut_from(cut: Cut | None, operands: Sequence[Node], level: str | None) -> Sequence[Node]:
    """The other operands, where the last one says what entries are cut from."""
    if cut is None:
        return operands
    *others, last = operands
    need(isinstance(last.op, _CUTS[cut]), f"%{last.name} is no {cut}")
    assert isinstance(last.op, Permute | Cluster | Assign | Runs)
    need(level in (None, last.op.level), f"%{last.name} orders another level")
    return others


def _owned_cut(op: Score | Select | SelectSet, operands: Sequence[Node], at: int) -> Sequence[Node]:
    """The other operands, where one of them says of every token the slot, node or run that it is in."""
    if op.cut is None:
        return operands
    need(0 < at < len(operands), f"level {op.level} needs what says its {op.cut}")
    within = op.within if isinstance(op, Score | Select) else None
    of_parent = op.cut in ("nodes", "runs") and op.size > 0
    need(not of_parent or op.size == 1, f"entries of {op.size} are in no {op.cut}")
    _cut_from(op.cut, operands[: at + 1], within if of_parent else op.level)
    return [*operands[:at], *operands[at + 1 :]]


def _vector_type(op: Round | Norm | Rotate | Delta, types: Sequence[TensorType]) -> TensorType:
    """Of what changes vectors one by one."""
    x, *others = types
    match op:
        case Round():
            _need_count(types, 1)
        case Delta():
            _need_count(types, 1)
            need_dims(x, ("B", "S", "Hkv", "Dqk"))
        case Norm():
            _need_count(types, 2)
            need_dims(others[0], x.dims[-1:])
            need(x.dims[1] == f"N_{op.level}", f"{x} is not of level {op.level}")
        case Rotate():
            _need_count(types, 1 if op.base is not None else 3)
            for angles in others:
                need_dims(angles, ("B", "S", str(op.dims // 2)))
            rows = "S" if op.at == "token" else f"N_{op.level}"
            if op.rows is not None:
                rows = "T" if op.at == "token" else rows_dim(op.rows, None)
            need(x.dims[1] == rows, f"{x} are not what lies at {op.at}")
        case _:
            assert_never(op)
    return TensorType(dtype="f32", dims=x.dims)


def _pool_type(op: Pool, operands: Sequence[Node]) -> TensorType:
    """x [B, S, H, D], weight [H, size, D, D], position [H, size, D] -> f32[B, N, H, D]

    An index has no head dimension: x [B, S, D] -> f32[B, N, D], H = 1 in its parameters.  Series
    are a dimension before the last.
    """
    if op.how == "centroid":
        _need_count(operands, 1)
        heads, nodes, dim = operands[0].type.dims
        need(op.size == 0 and nodes.isdecimal(), f"{operands[0].type} are no centroids")
        return TensorType(dtype="f32", dims=("B", f"N_{op.level}", heads, dim))
    types = [operand.type for operand in _cut_from(op.cut, operands, op.level)]
    need((op.size == 0) == (op.cut in ("clusters", "runs")), f"entries of {op.size} tokens")
    need(op.seed is None or op.how == "sample", "it is for sampling that there is a seed")
    need(
        op.position is False or op.how in ("linear", "mlp", "gated"),
        "only linear, mlp and gated pooling have positions",
    )
    counts = {"gated": 2, "linear": 2, "max_min_mean": 2, "mlp": 3}
    _need_count(types, counts.get(op.how, 1) + op.position)
    need((op.softmax is not None) == (op.how == "gated"), "a softmax is one of gates")
    x = types[0]
    need(x.dims[:2] == ("B", "S"), f"expected [B, S, ...], got {x}")
    if op.series is not None:
        need(x.dims[-2] == str(op.series), f"expected {op.series} series, got {x}")
        need(op.size == op.series * op.stride, f"{op.series} series in entries of {op.size}")
    heads = x.dims[2 : -1 if op.series is None else -2]
    _need_learned(op, types, heads)
    rows = ("2",) if op.how == "minmax" else ()
    wide = f"{op.size}*{x.dims[-1]}" if op.how == "antidiagonal" else x.dims[-1]
    return TensorType(dtype=types[0].dtype, dims=("B", f"N_{op.level}", *heads, *rows, wide))


def _need_learned(op: Pool, types: Sequence[TensorType], heads: tuple[str, ...]) -> None:
    """Gates, weights and positions of a pool fit what is pooled."""
    dim, size, own = types[0].dims[-1], str(op.size), heads or ("1",)
    channels = () if op.softmax == "token" else (dim,)
    match op.how:
        case "gated":
            many = () if op.series is None else (str(op.series),)
            heads_of_gates = ("Hkv",) if heads else ()  # those of keys, also for values
            need_dims(types[1], ("B", "S", *heads_of_gates, *many, *channels))
        case "linear":
            need_dims(types[1], (*own, size, dim, dim))
        case "max_min_mean":
            need_dims(types[1], (*own, "3", dim, dim))
        case "mlp":
            hidden = types[1].dims[-1]
            need_dims(types[1], (*own, size, dim, hidden))
            need_dims(types[2], (*own, hidden, dim))
        case "mean" | "max" | "minmax" | "sum_rsqrt" | "first" | "antidiagonal":
            return
        case "sample" | "centroid":
            return
        case _:
            assert_never(op.how)
    if op.position:
        need_dims(types[-1], (*own, size, *channels))


def _pool_rows_type(op: PoolRows, types: Sequence[TensorType]) -> TensorType:
    _need_count(types, 1)
    batch, rows, heads, dim = types[0].dims
    need(rows == "T", f"expected rows of their own, got {types[0]}")
    which = (op.block, op.last, op.tiles, op.clusters)
    need(which.count(None) == 3, "rows are those of a block, tile or cluster, or the last ones")
    need((op.clusters is not None) == (op.cut == "clusters"), "clusters are those of an order")
    wide = f"{op.block}*{dim}" if op.how == "antidiagonal" else dim
    return TensorType(dtype="f32", dims=(batch, _rows_of(op), heads, wide))


def _rows_of(op: PoolRows | ReduceRows) -> str:
    tile = None if op.tiles is None else tuple(axis.tile for axis in op.tiles)
    return rows_dim(op.block, op.last, tile, op.clusters if isinstance(op, PoolRows) else None)


def _pool_heads_type(op: PoolHeads, types: Sequence[TensorType]) -> TensorType:
    _need_count(types, 1)
    batch, rows, heads, dim = types[0].dims
    need(COARSENESS[heads] < COARSENESS[SHARE_HEADS[op.share]], f"{types[0]} already agrees")
    return TensorType(dtype="f32", dims=(batch, rows, SHARE_HEADS[op.share], dim))


def _reduce_rows_type(op: ReduceRows, types: Sequence[TensorType]) -> TensorType:
    """T to blocks, blocks to coarser ones; T to one."""
    _need_count(types, 1)
    batch, rows, heads, entries = _score_dims(types[0])
    which = (op.block, op.last, op.tiles)
    need(which.count(None) == 2, "rows are those of a block, of a tile, or the last ones")
    fine = block_of(rows)
    fits = rows == "T" or (fine is not None and op.block is not None and op.block % fine == 0)
    fits = fits and (rows == "T" or op.tiles is None)
    need(fits, f"rows of {types[0]} are not rows of one of {_rows_of(op)}")
    return TensorType(dtype="f32", dims=(batch, _rows_of(op), heads, entries))


def _union_type(op: Union, operands: Sequence[Node]) -> TensorType:
    branches = operands[:-1] if op.sink else operands
    need(len(branches) >= 1, "a union needs at least one branch")
    if op.sink:
        need_dims(operands[-1].type, ("Hq",))
    for branch in branches:
        need(isinstance(branch.op, Attend), f"%{branch.name} is not an attend")
        assert isinstance(branch.op, Attend)
        need(branch.op.sink is None, f"%{branch.name} has a sink of its own inside a union")
        apart = branch.op.spans or branch.op.softmax
        need(not apart, f"%{branch.name} has softmaxes of its own inside a union")
    return _agree([branch.type for branch in branches])


def _entry_dim(op: Score, keys: Node) -> str:
    """N_x or C_x; checked against the keys, which are pooled entries or, for tokens, raw."""
    by_token = op.size == op.stride == 1 or op.halves is not None
    tokens = by_token and keys.type.dims[1] == "S"
    need(
        tokens or keys.type.dims[1] == f"N_{op.level}",
        f"keys {keys.type} are not of level {op.level}",
    )
    return f"N_{op.level}" if op.within is None else f"C_{op.level}"


def _score_type(op: Score, operands: Sequence[Node]) -> TensorType:
    operands = _owned_cut(
        op, operands, len(operands) - 1 - (op.within is not None) - bool(op.among)
    )
    if op.form == "bias":
        return _bias_score_type(op, operands)
    if op.form == "given":
        return _given_score_type(op, operands)
    need(op.parts is None, "it is given scores that parts of a row have")
    need(op.form == "dot" or not (op.anchors or op.halves), "it is dots that are searched")
    need(op.anchors is None or op.within is None, "anchors lie in no entries")
    halves = op.halves
    need(halves is None or op.size % halves.until == 0, f"{op.size} is not halved {halves}")
    along = (
        op.form == "dot" and op.size == 1 and op.within is None and operands[0].type.dims[1] == "T"
    )
    need(op.diagonal is None or along, "it is rows and tokens that lie on diagonals")
    if op.among:
        _need_recalled(op, operands[-1])
    alone = bool(op.among) and operands[0].type.dims[1] == "T"
    need(op.rows is None or alone, "it is single rows that recall their own tokens")
    weighted, coded = op.form == "relu_weighted", op.codes is not None
    last = (op.within is not None) + bool(op.among)
    known = 2 + weighted + coded + bool(op.biased) + last
    _need_count(operands, *((known + 1, known + 3) if op.form == "pooling_error" else (known,)))
    need(op.counted is None or op.form == "dot", "it is logits that counts are added to")
    query, keys = operands[0].type, operands[1]
    need(len(query.dims) == 4 and is_rows(query.dims[1]), f"expected [B, T, Hq, Dqk], got {query}")
    rows, heads, dim = query.dims[1:]
    if halves is not None and halves.rows is not None:
        need(rows == "T", f"rows of {query} are one already")
        rows = _rows_of(halves.rows)
    if op.biased:
        need(op.form in ("dot", "bound"), "an index has no bias")
        need_dims(operands[2].type, ("B", keys.type.dims[1], "Hkv"))
    if op.form in ("relu_weighted", "relu_sum", "index_dot"):
        need_dims(query, ("B", rows, "Hi", "Di"))
        need(keys.type.dims[2:] == ("Di",), f"expected [B, N, Di], got {keys.type}")
        if weighted:
            need_dims(operands[2].type, ("B", rows, "Hi"))
    else:
        need(heads in COARSENESS and dim.endswith("Dqk"), f"expected [B, T, Hq, Dqk], got {query}")
        held = "1" if heads == "1" else "Hkv"
        vectors = (held, "2", "Dqk") if op.form == "bound" else (held, dim)
        expected = ", ".join(("B", "N", *vectors))
        need(keys.type.dims[2:] == vectors, f"expected [{expected}], got {keys.type}")
    need(coded == (op.form == "code_match"), "codes are what code_match compares")
    if op.codes is not None:
        runs = operands[2].type.dims[0]
        need_dims(operands[2].type, (runs, str(op.codes.words), str(op.codes.dim)))
    if op.within is not None:
        _need_parent(op, operands[-1])
        _need_rows(operands[-1], rows)
    summed = "Hkv" if op.grouped else "1"
    heads = {"relu_weighted": summed, "relu_sum": summed, "index_dot": "Hkv"}.get(op.form, heads)
    return TensorType(dtype="f32", dims=("B", rows, heads, _entry_dim(op, keys)))


def _need_rows(parent: Node, rows: str) -> None:
    """Rows of one choice must be rows of one choice of the parent."""
    theirs = parent.type.dims[1]
    fine, coarse = block_of(rows), block_of(theirs)
    need(
        rows in ("T", theirs)
        or theirs == "1"
        or (fine is not None and coarse is not None and coarse % fine == 0),
        f"{rows} rows are not in one of the {theirs} rows of %{parent.name}",
    )


def _bias_score_type(op: Score, operands: Sequence[Node]) -> TensorType:
    _need_count(operands, 1 + (op.within is not None))
    keys = operands[0]
    need(keys.type.dims[2:] == ("Hkv",), f"expected [B, N, Hkv], got {keys.type}")
    if op.within is not None:
        _need_parent(op, operands[-1])
    return TensorType(dtype="f32", dims=("B", "T", "Hkv", _entry_dim(op, keys)))


def _given_score_type(op: Score, operands: Sequence[Node]) -> TensorType:
    _need_count(operands, 1 + (op.within is not None) + bool(op.among))
    given = operands[0].type
    need(len(given.dims) == 4, f"expected [B, T, H, N], got {given}")
    need_dims(given, ("B", "T", given.dims[2], f"N_{op.level}"))
    need(given.dims[2] in COARSENESS, f"no heads choose by {given}")
    if op.among:
        _need_recalled(op, operands[-1])
    if op.within is not None:
        _need_parent(op, operands[-1])
    last = f"N_{op.level}" if op.within is None else f"C_{op.level}"
    return TensorType(dtype="f32", dims=("B", "T", given.dims[2], last))


def _need_recalled(op: Score, among: Node) -> None:
    """Kept entries, of every row: rows that choose together have kept the same."""
    need(op.within is None, "kept entries are not children of others")
    need(
        isinstance(among.op, Recall) and among.op.level == op.level,
        f"%{among.name} is not a recalled selection of level {op.level}",
    )


def _need_parent(op: Score | Select, parent: Node) -> None:
    select = parent.op
    need(
        isinstance(select, Select | Recall) and select.level == op.within,
        f"%{parent.name} is not the selection of level {op.within}",
    )
    assert isinstance(select, Select | Recall)
    if op.cut in ("nodes", "runs"):
        need(select.size == 0, f"level {op.within} has no {op.cut}")
        return
    need(
        op.size > 0
        and select.size == select.stride > 0
        and op.size == op.stride
        and select.size % op.size == 0,
        f"entries of {op.size} do not nest in entries of {select.size} of level {op.within}",
    )


def _log_sum_exp_type(operands: Sequence[Node]) -> TensorType:
    _need_count(operands, 1)
    operand = operands[0]
    need(
        isinstance(operand.op, Score | Attend | Switch | Union),
        f"%{operand.name} has no log-sum-exp: it is neither a score nor an attend",
    )
    _, rows, heads, _ = operand.type.dims
    return TensorType(dtype="f32", dims=("B", heads, rows))


def _normalise_type(op: Normalise, operands: Sequence[Node]) -> TensorType:
    _need_count(operands, 2 if op.by is None else 1)
    score, *sums = operands
    need(
        isinstance(score.op, Score) and score.op.level == op.level,
        f"%{score.name} is not the score of level {op.level}",
    )
    for lse in sums:
        need(isinstance(lse.op, LogSumExp), f"%{lse.name} is not a log-sum-exp")
        need_dims(lse.type, ("B", score.type.dims[2], score.type.dims[1]))
    return score.type


def _reduce_type(op: Reduce, types: Sequence[TensorType]) -> TensorType:
    _need_count(types, 1)
    batch, rows, heads, entries = _score_dims(types[0])
    need(COARSENESS[heads] < COARSENESS[SHARE_HEADS[op.share]], f"{types[0]} already agrees")
    return TensorType(dtype="f32", dims=(batch, rows, SHARE_HEADS[op.share], entries))


SHARE_HEADS: Mapping[str, str] = MappingProxyType({"head": "Hq", "group": "Hkv", "all": "1"})


COARSENESS: Mapping[str, int] = MappingProxyType({"Hq": 0, "Hkv": 1, "1": 2})


def _score_dims(score: TensorType) -> tuple[str, str, str, str]:
    need(
        score.dtype == "f32" and len(score.dims) == 4 and is_rows(score.dims[1]),
        f"expected f32[B, T, H, N], got {score}",
    )
    batch, rows, heads, entries = score.dims
    return batch, rows, heads, entries


def _map_type(op: Map, operands: Sequence[Node]) -> TensorType:
    types = [operand.type for operand in _cut_from(op.cut, operands, None)]
    _need_count(types, 1)
    need(op.cut is None or (op.how == "upsample" and op.size == 1), "it is tokens that runs hold")
    batch, rows, heads, entries = _score_dims(types[0])
    need(entries.startswith("N_"), f"scores of a beam's children cannot be mapped: {types[0]}")
    runs = operands[1].op.level if op.cut and isinstance(operands[1].op, Runs) else None
    need(runs in (None, entries.removeprefix("N_")), f"{types[0]} are not the scores of {runs}")
    need(bool(op.taps) and all(weight > 0 for _, weight in op.taps), "a map needs taps")
    return TensorType(dtype="f32", dims=(batch, rows, heads, f"N_{op.level}"))


def _without_route(op: Select | SelectSet | Attend, operands: Sequence[Node]) -> Sequence[Node]:
    """The operands before the route, which is there with `when` and has that way."""
    if op.when is None:
        return operands
    need(bool(operands), "expected a route")
    route = operands[-1]
    need(isinstance(route.op, Route), f"%{route.name} is not a route")
    assert isinstance(route.op, Route)
    need(op.when in route.op.ways, f"%{route.name} has no way {op.when}")
    return operands[:-1]


def _route_type(op: Route, types: Sequence[TensorType]) -> TensorType:
    dims = ROUTE_DIMS[op.by]
    if op.divergence is not None:
        _need_count(types, 2)
        need(op.by == "sample_head" and op.places == (0, 1), "it is a head that two ways are of")
        for each in types:
            need(each.dims[:3] == ("B", "1", "Hq"), f"expected f32[B, 1, Hq, N], got {each}")
        return TensorType(dtype="i32", dims=dims)
    _need_count(types, 0 if op.repeats and op.by == "head" else 1)
    need(not op.repeats or not op.by.startswith("sample"), "sequences have no numbers")
    need(bool(op.places) and len(set(op.ways)) == len(op.ways), "a route of nothing")
    need({*range(len(op.ways))} == {*op.places}, f"places {op.places} of {len(op.ways)} ways")
    for each in types:
        need(
            each == TensorType(dtype="i32", dims=dims),
            f"expected i32[{', '.join(dims)}], got {each}",
        )
    return TensorType(dtype="i32", dims=dims)


ROUTE_DIMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"layer": ("1",), "head": ("Hq",), "sample": ("Z",), "sample_head": ("Z", "Hq")}
)


def _unlike_type(op: Unlike, types: Sequence[TensorType]) -> TensorType:
    _need_count(types, 2)
    need_dims(types[0], ("B", "T", "Hq", "Dqk"))
    need_dims(types[1], ("B", "S", "Hkv", "Dqk"))
    return TensorType(dtype="i32", dims=("B", rows_dim(op.block, None), "Hq", f"N_{op.level}"))


def _selection_type(op: Select | SelectSet | Unlike, operands: Sequence[Node]) -> TensorType:
    if isinstance(op, Unlike):
        return _unlike_type(op, [operand.type for operand in operands])
    heads = operands[0].type.dims[2] if operands and len(operands[0].type.dims) == 4 else ""
    by_head = op.when is not None and "Hq" in operands[-1].type.dims
    need(not by_head or heads == "Hq", f"heads share a selection of {op.level}, and not their way")
    operands = _without_route(op, operands)
    operands = _owned_cut(op, operands, len(operands) - 1)
    lists = isinstance(op, Select)
    return _select_type(op, operands) if lists else _select_set_type(op, operands)


def _select_type(op: Select, operands: Sequence[Node]) -> TensorType:
    _need_count(operands, 1 + (op.within is not None) + (op.joined is not None))
    batch, rows, heads, entries = _score_dims(operands[0].type)
    of_level = (f"N_{op.level}",) if op.within is None else (f"N_{op.level}", f"C_{op.level}")
    need(entries in of_level, f"scores {operands[0].type} are not of level {op.level}")
    if op.within is not None:
        parent = operands[1]
        _need_parent(op, parent)
        need(
            COARSENESS[parent.type.dims[2]] >= COARSENESS[heads],
            f"heads that share a selection of {op.level} have different beams of {op.within}",
        )
        _need_rows(parent, rows)
    if op.joined is not None:
        _need_same_entries(op, operands[-1], heads)
    last = op.last + own_entries(rows, op.stride) - 1 if op.last else 0
    forced = _first_entries(op) + last
    need(op.k >= 1, "a selection of nothing")
    need(not op.counted or op.k >= forced, f"{forced} entries are forced into {op.k}")
    more = (0 if op.counted else forced) + bool(op.tail)
    need(op.width == op.k + more, f"width {op.width} does not fit")
    return TensorType(dtype="i32", dims=(batch, rows, heads, f"K_{op.level}"))


def _first_entries(op: Select) -> int:
    """How many entries are forced as first ones, or hold one of the first tokens, at most."""
    if op.sink is None:
        return op.first
    if op.cut is not None:  # each in another entry
        return op.first + op.sink
    return max(op.first, -(-(op.sink + (op.before or 0)) // op.stride))


def _need_same_entries(op: Select, joined: Node, heads: str) -> None:
    """Whether a selection may be forced into another one."""
    other = joined.op
    need(
        isinstance(other, Select) and other.level == op.joined,
        f"%{joined.name} is not the selection of level {op.joined}",
    )
    assert isinstance(other, Select)
    need(
        (other.size, other.stride) == (op.size, op.stride),
        f"entries of {other.size} are forced among those of {op.size}",
    )
    need(
        COARSENESS[joined.type.dims[2]] >= COARSENESS[heads],
        f"heads that share a selection of {op.level} force different ones",
    )


_OF_HEADS = ("fraction", "top_k", "tokens")


def keeps_part(score: TensorType, other: TensorType) -> bool:
    """Whether a budget is the part that the prompt's last rows keep, and not their number."""
    return other.dims[1] == "1" != score.dims[1]


def _select_set_type(op: SelectSet, operands: Sequence[Node]) -> TensorType:
    if op.where is not None:
        *operands, unlike = operands
        need(isinstance(unlike.op, Unlike), f"%{unlike.name} says of no entry how alike it is")
        need_dims(unlike.type, operands[0].type.dims)
    choosing = operands[0].type.dims[2] if operands else ""
    if op.apart is not None:
        *operands, split = operands
        need_dims(split.type, ("Z",))
    need((op.budget_from is not None) == (op.rule == "budget_from"), "a budget of no level")
    if op.budget_from is not None:
        *operands, other = operands
        need(
            isinstance(other.op, Select | SelectSet | Recall) and other.op.level == op.budget_from,
            f"%{other.name} is not the selection of level {op.budget_from}",
        )
        assert isinstance(other.op, Select | SelectSet | Recall)
        heads, part = operands[0].type.dims[2], keeps_part(operands[0].type, other.type)
        sized = op.size > 0 and other.op.size > 0 and not part
        need(op.budget_in is None or sized, "entries of any size hold no number of tokens")
        coarser = COARSENESS[other.type.dims[2]] >= COARSENESS[heads]
        same = coarser and other.type.dims[1] == operands[0].type.dims[1]
        need(part or same, "others choose for others")
        choosing = (
            min(heads, other.type.dims[2], key=lambda dim: COARSENESS[dim]) if part else heads
        )
    walks = op.rule == "early_stop"
    _need_count(operands, *((3, 4) if walks else (1,)))
    batch, rows, heads, entries = _score_dims(operands[0].type)
    need(entries == f"N_{op.level}", f"scores {operands[0].type} are not of level {op.level}")
    by_mass = op.rule == "top_p"
    need(not by_mass or op.scope in ("row", "head"), "masses are of rows or of heads")
    need(op.scope != "row" or by_mass, "what is of a row is not said")
    need(op.scope != "head" or by_mass or op.rule == "fraction", "it is parts that rows share")
    need(op.scope != "entry" or op.rule == "top_k", "entries take a number of rows")
    need(op.scope != "heads" or op.rule in _OF_HEADS, "heads share no such rule")
    need((op.tiers is not None) == (op.rule == "quota"), "tiers are those of quotas")
    need((op.step is not None) == walks, "steps are those of a walk")
    need((op.boundary is not None) == by_mass, "a boundary is one of masses")
    need(op.of != "all" or op.rule == "fraction", "it is a fraction that is of all")
    need(op.of != "rest" or by_mass, "it is masses that are of the rest")
    need(op.most is None or op.most >= (op.least or 0), f"at least {op.least} of {op.most}")
    tiers = (str(len(op.tiers.steps)),) if op.tiers else ()
    return TensorType(dtype="i32", dims=(batch, rows, choosing, *tiers, f"W_{op.level}"))


def _attend_type(op: Attend, operands: Sequence[Node]) -> TensorType:
    operands = _without_route(op, operands)
    selected = op.over in ("blocks", "tokens", "spans", "tiers")
    need((op.spans is not None) == (op.over == "spans"), "spans are attended with over=spans")
    if op.sink:
        *operands, sink = operands
        need_dims(sink.type, ("Hq",))
    operands = _cut_from(op.row_cut, operands, None)
    operands = _cut_from(op.cut, operands, None)
    if op.near is not None:
        *operands, far = operands
        need(isinstance(far.op, Delta), f"%{far.name} are no far keys")
        need(op.over != "pooled", "it is tokens that are far")
        need_dims(far.type, operands[1].type.dims)
    if op.biased:
        need(op.over != "pooled", "it is tokens that have a bias")
        need_dims(operands[-1].type, ("B", "S", "Hkv"))
        operands = operands[:-1]
    if op.spans:
        operands = _without_anchors(operands)
    _need_count(operands, *((4,) if selected else (3, 4) if op.over == "pooled" else (3,)))
    selection = operands[3] if len(operands) == 4 else None
    query, keys, values = (operand.type for operand in operands[:3])
    need(is_rows(query.dims[1]), f"expected rows, got {query}")
    need_dims(query, ("B", query.dims[1], "Hq", "Dqk"))
    need(keys.dims[1] == values.dims[1], f"keys {keys} and values {values} differ in length")
    rows = keys.dims[1]
    need((rows != "S") == (op.over == "pooled"), f"keys {keys} do not fit over={op.over}")
    need_dims(keys, ("B", rows, "Hkv", "Dqk"))
    need_dims(values, ("B", rows, "Hkv", "Dqk" if op.latent else "Dv"))
    need((op.window is not None) == (op.over == "window"), "a window is attended with over=window")
    need(
        (op.pattern is not None) == (op.over == "static"), "a pattern is attended with over=static"
    )
    entries = op.over in ("blocks", "tokens")
    need(op.softmax is None or entries, "it is selected entries that have a softmax each")
    need((op.merges is not None) == (op.over == "tiers"), "tiers are attended with over=tiers")
    need(
        op.which is None or selection is not None, "what is skipped is what a selection leaves out"
    )
    need(op.over not in ("tokens", "spans") or op.size == 1, f"tokens have size 1, not {op.size}")
    if selection is not None:
        select = selection.op
        need(
            isinstance(select, Select | SelectSet | Recall)
            and (select.size, select.stride) == (op.size, op.stride)
            and (not isinstance(select, SelectSet) or select.parts == op.parts)
            and (isinstance(select, Recall) or select.diagonal == op.diagonal)
            and (op.over != "pooled" or rows == f"N_{select.level}"),
            f"%{selection.name} is not a selection of entries of {op.size}",
        )
    return TensorType(dtype="input", dims=("B", "T", "Hq", "Dv"))


def _without_anchors(operands: Sequence[Node]) -> Sequence[Node]:
    """The operands before the scores of a selection's anchors."""
    *others, scores = operands
    need(len(others) == 4, "spans are those of a selection, weighed by its scores")
    need(
        scores.type.dims[2] == others[3].type.dims[2],
        f"{scores.type} is not what {others[3].type} chooses",
    )
    return others
