"""Spec -> Graph: one operator a node, each level's steps in the fixed order of the language.

pool -> score (form, scale) -> normalise -> reduce over heads -> map -> select, then the branches.
Decides nothing about kernels; what the graph cannot say is a PlanError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from hsgen import spec as language
from hsgen.errors import PlanError
from hsgen.graph import (
    COARSENESS,
    SHARE_HEADS,
    Attend,
    Gate,
    Graph,
    Input,
    LogSumExp,
    Map,
    Meta,
    Node,
    Normalise,
    Op,
    Outputs,
    Pool,
    Reduce,
    Role,
    Score,
    Select,
    TensorType,
    Union,
    result_type,
    verify,
)


def plan(spec: language.Spec) -> Graph:
    """The operators of a spec, one a node, verified."""
    builder = _Builder(spec=spec)
    for level in spec.levels:
        _plan_level(builder, level)
    branches = [_plan_branch(builder, branch) for branch in spec.attend]
    outputs = _plan_combine(builder, branches)
    graph = Graph.build(
        builder.nodes.values(), outputs=outputs, sizes=_sizes(spec), meta=_meta(spec)
    )
    return verify(graph)


def _sizes(spec: language.Spec) -> dict[str, int]:
    sizes: dict[str, int] = {}
    if spec.heads is not None:
        sizes |= {"Hq": spec.heads.query, "Hkv": spec.heads.kv, "G": spec.heads.group}
    if spec.head_dim is not None:
        sizes |= {"Dqk": spec.head_dim.qk, "Dv": spec.head_dim.v}
    if spec.index is not None:
        sizes |= {"Hi": spec.index.heads, "Di": spec.index.dim}
    return sizes


def _meta(spec: language.Spec) -> Meta:
    return Meta(name=spec.name, source=spec.source, causal=spec.causal)


@dataclass(slots=True, kw_only=True)
class _Builder:
    """The graph while it grows: nodes by name, and the scores each level offers to others."""

    spec: language.Spec
    nodes: dict[str, Node] = field(default_factory=dict[str, Node])
    scores: dict[str, Node] = field(default_factory=dict[str, Node])
    selections: dict[str, Node] = field(default_factory=dict[str, Node])

    def add(self, name: str, op: Op, *operands: Node) -> Node:
        """The node `name`, made now or the same one again."""
        type_ = result_type(op, operands)
        inputs = tuple(operand.name for operand in operands)
        return self.nodes.setdefault(name, Node(name=name, op=op, inputs=inputs, type=type_))

    def input(self, name: str, role: Role, *dims: str) -> Node:
        """A tensor of the caller, in the dtype of the query."""
        type_ = TensorType(dtype="input", dims=dims)
        node = Node(name=name, op=Input(role=role), inputs=(), type=type_)
        return self.nodes.setdefault(name, node)

    def query(self) -> Node:
        return self.input("q", "query", "B", "T", "Hq", "Dqk")

    def keys(self, kv: str | None) -> Node:
        return self.input(f"k_{kv}" if kv else "k", "keys", "B", "S", "Hkv", "Dqk")

    def values(self, kv: str | None) -> Node:
        return self.input(f"v_{kv}" if kv else "v", "values", "B", "S", "Hkv", "Dv")

    def attention_scale(self) -> float | None:
        dim = self.spec.head_dim
        return None if dim is None else 1 / math.sqrt(dim.qk)


# --- levels


def _plan_level(builder: _Builder, level: language.Level) -> None:
    parent = _parent(builder, level)
    if level.score.source is None:
        score = _plan_score(builder, level, parent)
    else:
        score = _plan_map(builder, level, level.score.source)
    builder.scores[level.name] = score
    if level.select is not None:
        operands = (score,) if parent is None else (score, parent)
        selection = builder.add(f"{level.name}.selection", _select(level, level.select), *operands)
        builder.selections[level.name] = selection


def _parent(builder: _Builder, level: language.Level) -> Node | None:
    """The selection that a level's candidates are children of."""
    if level.within is None:
        return None
    if level.within not in builder.selections:
        raise PlanError(f"level {level.name} is within {level.within}, which selects nothing")
    return builder.selections[level.within]


def _plan_score(builder: _Builder, level: language.Level, parent: Node | None) -> Node:
    """form, scale -> normalise -> reduce over heads."""
    score = level.score
    if score.form == "relu_weighted":
        index_query = builder.input("q_index", "index_query", "B", "T", "Hi", "Di")
        weights = builder.input("w_index", "index_weights", "B", "T", "Hi")
        operands = [index_query, _score_keys(builder, level), weights]
    else:
        operands = [builder.query(), _score_keys(builder, level)]
    op = Score(
        level=level.name,
        form=score.form or "dot",
        scale=_scale(builder, score),
        size=level.partition.size,
        stride=level.partition.stride,
        within=level.within,
    )
    made = builder.add(f"{level.name}.score", op, *operands, *((parent,) if parent else ()))
    if score.normalise is not None:
        lse = builder.add(f"{level.name}.score_lse", LogSumExp(), made)
        made = builder.add(f"{level.name}.mass", Normalise(level=level.name), made, lse)
    return _plan_reduce(builder, level, made)


def _scale(builder: _Builder, score: language.Score) -> float | None:
    match score.scale:
        case "none":
            return 1.0
        case None:
            return 1.0 if score.form == "relu_weighted" else builder.attention_scale()
        case _:
            return float(score.scale)


def _plan_reduce(builder: _Builder, level: language.Level, made: Node) -> Node:
    """Nothing where the heads already agree, as those of an index do."""
    share = level.score.share
    if COARSENESS[made.type.dims[2]] >= COARSENESS[SHARE_HEADS[share]] or share == "head":
        return made
    if level.score.reduce is None:
        raise PlanError(f"level {level.name}: share {share} needs `reduce: sum`, `mean` or `max`")
    return builder.add(f"{level.name}.reduced", Reduce(share=share, how=level.score.reduce), made)


def _plan_map(builder: _Builder, level: language.Level, source: str) -> Node:
    """Scores of another level, after its own steps -> reduce over heads -> map."""
    if source not in builder.scores:
        raise PlanError(f"level {level.name} maps scores of {source}, which comes later")
    if builder.spec.level(source).within is not None:
        raise PlanError(f"level {level.name} maps {source}, which is scored inside a beam only")
    made = _plan_reduce(builder, level, builder.scores[source])
    op = _map(builder.spec.level(source).partition, level)
    return builder.add(f"{level.name}.mapped", op, made)


def _map(source: language.Partition, level: language.Level) -> Map:
    target = level.partition
    how = level.score.map
    if how is None:
        raise PlanError(f"level {level.name}: `from` needs `map: overlap_sum`, `sum` or `max`")
    if target.stride % source.stride:
        raise PlanError(f"level {level.name}: stride {target.stride} / {source.stride}")
    return Map(
        level=level.name,
        how=how,
        size=target.size,
        stride=target.stride,
        ratio=target.stride // source.stride,
        taps=_overlap_taps(source, target) if how == "overlap_sum" else _inner_taps(source, target),
    )


def _overlap_taps(
    source: language.Partition, target: language.Partition
) -> tuple[tuple[int, int], ...]:
    """NSA eq. 9: how many pairs of a stride of the source and one of the target coincide.

    Cut both into pieces of the source's stride: source entry i has pieces i .. i + wide - 1.
    Offset o counts the pairs (a, b), a < wide, b < long, with a + b = o + wide - 1.
    """
    if source.size % source.stride or target.size % source.stride:
        raise PlanError(
            f"overlap_sum needs whole strides of {source.stride} in {source.size} and {target.size}"
        )
    wide, long = source.size // source.stride, target.size // source.stride
    weights = [0] * (wide + long - 1)
    for a in range(wide):
        for b in range(long):
            weights[a + b] += 1
    return tuple((index - (wide - 1), weight) for index, weight in enumerate(weights))


def _inner_taps(
    source: language.Partition, target: language.Partition
) -> tuple[tuple[int, int], ...]:
    """Source entries that lie wholly inside the target entry, once each."""
    if source.size > target.size:
        raise PlanError(f"entries of {source.size} do not fit into entries of {target.size}")
    return tuple((o, 1) for o in range((target.size - source.size) // source.stride + 1))


def _select(level: language.Level, select: language.Select) -> Select:
    return Select(
        level=level.name,
        size=level.partition.size,
        stride=level.partition.stride,
        k=select.budget,
        width=select.width,
        first=select.force.first,
        last=select.force.last,
        counted=select.force.counted,
        final=select.top_k is not None,
        within=level.within,
    )


# --- keys and values of entries


def _score_keys(builder: _Builder, level: language.Level) -> Node:
    if level.score.form == "relu_weighted":
        raw = builder.input("k_index", "index_keys", "B", "S", "Di")
    else:
        raw = builder.keys(level.kv)
    if isinstance(level.partition, language.Tokens):
        return raw
    return _pooled(builder, level, raw, "key")


def _pooled(builder: _Builder, level: language.Level, raw: Node, which: str) -> Node:
    """One vector an entry: level.keys or level.values, pooled once however often it is used."""
    pool = level.pool or language.Pool()
    how = pool.keys if which == "key" else pool.values
    if how is None:
        raise PlanError(f"level {level.name} needs pooled {which}s: `pool: {{{which}s: mean}}`")
    position = how == "linear" and pool.position is not None
    op = Pool(
        level=level.name,
        how=how,
        size=level.partition.size,
        stride=level.partition.stride,
        position=position,
    )
    heads, dim = raw.type.dims[2] if len(raw.type.dims) == 4 else "1", raw.type.dims[-1]
    slots = str(level.partition.size)
    operands = [raw]
    if how == "linear":
        name = f"{level.name}_{which}_weight"
        operands.append(builder.input(name, "parameter", heads, slots, dim, dim))
    if position:
        name = f"{level.name}_{which}_position"
        operands.append(builder.input(name, "parameter", heads, slots, dim))
    return builder.add(f"{level.name}.{which}s", op, *operands)


# --- branches


def _plan_branch(builder: _Builder, branch: language.Attend) -> Node:
    """One attend and its log-sum-exp."""
    if branch.window is not None:
        keys, values = builder.keys(branch.kv), builder.values(branch.kv)
        op = _attend(builder, branch, over="window", partition=language.Tokens())
        made = builder.add(f"{branch.name}.o", op, builder.query(), keys, values)
    elif branch.over is None:
        raise PlanError(f"branch {branch.name} attends nothing: `over` or `window`")
    elif branch.values == "pooled":
        made = _plan_pooled_branch(builder, branch, builder.spec.level(branch.over))
    else:
        made = _plan_selected_branch(builder, branch, builder.spec.level(branch.over))
    builder.add(f"{branch.name}.lse", LogSumExp(), made)
    return made


def _plan_pooled_branch(builder: _Builder, branch: language.Attend, level: language.Level) -> Node:
    if level.score.form == "relu_weighted" or branch.kv not in (None, level.kv):
        raise PlanError(f"branch {branch.name}: level {level.name} pools other keys")
    if level.select is not None or level.within is not None:
        raise PlanError(f"branch {branch.name}: pooled entries of a selection are not planned yet")
    keys = _pooled(builder, level, builder.keys(level.kv), "key")
    values = _pooled(builder, level, builder.values(level.kv), "value")
    op = _attend(builder, branch, over="pooled", partition=level.partition)
    return builder.add(f"{branch.name}.o", op, builder.query(), keys, values)


def _plan_selected_branch(
    builder: _Builder, branch: language.Attend, level: language.Level
) -> Node:
    if level.name not in builder.selections:
        raise PlanError(f"branch {branch.name}: level {level.name} selects nothing")
    over = "tokens" if isinstance(level.partition, language.Tokens) else "blocks"
    op = _attend(builder, branch, over=over, partition=level.partition)
    keys, values = builder.keys(branch.kv), builder.values(branch.kv)
    selection = builder.selections[level.name]
    return builder.add(f"{branch.name}.o", op, builder.query(), keys, values, selection)


def _attend(
    builder: _Builder,
    branch: language.Attend,
    *,
    over: Literal["blocks", "tokens", "pooled", "window"],
    partition: language.Partition,
) -> Attend:
    return Attend(
        branch=branch.name,
        over=over,
        scale=builder.attention_scale(),
        size=partition.size,
        stride=partition.stride,
        window=branch.window,
    )


def _plan_combine(builder: _Builder, branches: list[Node]) -> Outputs:
    """The output: the only branch, gated branches, or one softmax over all of them."""
    combine = builder.spec.combine or language.Combine()
    names = [branch.name for branch in builder.spec.attend]
    lse = {name: f"{name}.lse" for name in names}
    if combine.gates is not None:
        gates = builder.input("gates", "gates", "B", "T", "Hq", str(len(branches)))
        made = builder.add("o", Gate(), gates, *branches)
    elif combine.softmax is not None:
        made = builder.add("o", Union(), *branches)
        lse = {"o": builder.add("lse", LogSumExp(), made).name}
    elif len(branches) == 1:
        made = branches[0]
    else:
        raise PlanError(f"{len(branches)} branches need `combine`")
    selection = {level: node.name for level, node in builder.selections.items()}
    return Outputs(o=made.name, lse=lse, selection=selection)
