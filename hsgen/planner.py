"""Spec -> Graph: one operator a node, each level's steps in the fixed order of the language.

pool -> score (form, scale) -> normalise -> reduce over heads -> map -> select, then the branches.
Decides nothing about kernels.  Takes the rules of the language for granted; what they allow and the
graph cannot say is a PlanError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from hsgen import spec as language
from hsgen.errors import PlanError, Span
from hsgen.graph import (
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
    Pattern,
    Pool,
    Reduce,
    Role,
    Score,
    Select,
    SelectSet,
    TensorType,
    Union,
    result_type,
    verify,
)


def plan(spec: language.Spec) -> Graph:
    """The operators of a spec, one a node, verified.

    Heads and head dims that the spec leaves open stay names without sizes.

    Raises:
        SpecError: the spec, made in Python, breaks rules of the language.
        PlanError: the graph has no operators for it yet.
    """
    builder = _Builder(spec=language.verify(spec))
    for level in spec.levels:
        _plan_level(builder, level)
    branches = [_plan_branch(builder, i, branch) for i, branch in enumerate(spec.attend)]
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
    return Meta(name=spec.name, source=spec.source, causal=spec.causal, digest=spec.digest)


@dataclass(slots=True, kw_only=True)
class _Builder:
    """The graph while it grows: nodes by name, and the scores each level offers to others."""

    spec: language.Spec
    nodes: dict[str, Node] = field(default_factory=dict[str, Node])
    scores: dict[str, Node] = field(default_factory=dict[str, Node])
    selections: dict[str, Node] = field(default_factory=dict[str, Node])

    def add(self, name: str, op: Op, *operands: Node, at: Span | None = None) -> Node:
        """The node `name`, made now or the same one again; the text asks for it `at` a place."""
        type_ = result_type(op, operands)
        inputs = tuple(operand.name for operand in operands)
        node = Node(name=name, op=op, inputs=inputs, type=type_, span=at)
        return self.nodes.setdefault(name, node)

    def place(self, item: language.Level | language.Attend, *field: str) -> Span | None:
        """Where the text says a field of a level or of a branch."""
        if isinstance(item, language.Level):
            return self.spec.span("levels", self.spec.levels.index(item), *field)
        return self.spec.span("attend", self.spec.attend.index(item), *field)

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
    parent = builder.selections[level.within] if level.within else None
    if level.score.source is None:
        score = _plan_score(builder, level, parent)
    else:
        score = _plan_map(builder, level, builder.spec.level(level.score.source))
    builder.scores[level.name] = score
    if level.select is not None:
        op = (
            _select_set(level, level.select)
            if level.select.counts_vary
            else _select(level, level.select)
        )
        at = builder.place(level, "select")
        selection = builder.add(f"{level.name}.selection", op, score, *_some(parent), at=at)
        builder.selections[level.name] = selection


def _some(node: Node | None) -> tuple[Node, ...]:
    return () if node is None else (node,)


def _plan_score(builder: _Builder, level: language.Level, parent: Node | None) -> Node:
    """form, scale -> normalise -> reduce over heads."""
    score = level.score
    assert score.form is not None
    op = Score(
        level=level.name,
        form=score.form,
        scale=_scale(builder, score),
        size=level.partition.size,
        stride=level.partition.stride,
        within=level.within,
    )
    operands = [_score_query(builder, level), _score_keys(builder, level)]
    if score.form == "relu_weighted":
        operands.append(builder.input("w_index", "index_weights", "B", "T", "Hi"))
    at = builder.place(level, "score", "form")
    made = builder.add(f"{level.name}.score", op, *operands, *_some(parent), at=at)
    if score.normalise is not None:
        at = builder.place(level, "score", "normalise")
        summed = builder.nodes[f"{score.lse_from or level.name}.score"]
        lse = builder.add(f"{score.lse_from or level.name}.score_lse", LogSumExp(), summed, at=at)
        made = builder.add(f"{level.name}.mass", Normalise(level=level.name), made, lse, at=at)
    if score.share == "head" or score.reduce is None:
        return made  # the heads of an index are one score already
    at = builder.place(level, "score", "share")
    reduce = Reduce(share=score.share, how=score.reduce)
    return builder.add(f"{level.name}.reduced", reduce, made, at=at)


def _scale(builder: _Builder, score: language.Score) -> float | None:
    match score.scale:
        case "none":
            return 1.0
        case None:
            return 1.0 if score.form == "relu_weighted" else builder.attention_scale()
        case _:
            return float(score.scale)


def _plan_map(builder: _Builder, level: language.Level, source: language.Level) -> Node:
    """The scores of another level, after its own steps, carried over."""
    how, target = level.score.map, level.partition
    assert how is not None
    op = Map(
        level=level.name,
        how="max" if how == "overlap_max" else how,
        size=target.size,
        stride=target.stride,
        ratio=target.stride // source.partition.stride,
        taps=_TAPS[how](source.partition, target),
    )
    at = builder.place(level, "score", "map")
    return builder.add(f"{level.name}.mapped", op, builder.scores[source.name], at=at)


def _overlap_taps(
    source: language.Partition, target: language.Partition
) -> tuple[tuple[int, int], ...]:
    """NSA eq. 9: how many pairs of a stride of the source and one of the target coincide.

    Cut both into pieces of the source's stride: source entry i has pieces i .. i + wide - 1.
    Offset o counts the pairs (a, b), a < wide, b < long, with a + b = o + wide - 1.
    """
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
    return tuple((o, 1) for o in range((target.size - source.size) // source.stride + 1))


def _touching_taps(
    source: language.Partition, target: language.Partition
) -> tuple[tuple[int, int], ...]:
    """Source entries that share a token with the target entry, once each."""
    before = -(-source.size // source.stride) - 1
    return tuple((o, 1) for o in range(-before, target.size // source.stride))


_TAPS = {
    "overlap_sum": _overlap_taps,
    "overlap_max": _touching_taps,
    "sum": _inner_taps,
    "max": _inner_taps,
}


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


def _select_set(level: language.Level, select: language.Select) -> SelectSet:
    rule = select.rules[0]
    assert rule in ("fraction", "threshold", "top_p")
    top_p = select.top_p
    value = select.fraction if rule == "fraction" else select.threshold
    return SelectSet(
        level=level.name,
        size=level.partition.size,
        stride=level.partition.stride,
        rule=rule,
        value=float((top_p.mass if top_p else value) or 0.0),
        first=select.force.first,
        last=select.force.last,
        counted=select.force.counted,
        boundary=top_p.boundary if top_p else None,
        scope=top_p.scope if top_p else None,
        least=top_p.min if top_p else None,
        most=top_p.max if top_p else None,
    )


# --- keys and values of entries


def _score_query(builder: _Builder, level: language.Level) -> Node:
    if level.score.form == "relu_weighted":
        return builder.input("q_index", "index_query", "B", "T", "Hi", "Di")
    return builder.query()


def _score_keys(builder: _Builder, level: language.Level) -> Node:
    if level.score.form == "relu_weighted":
        raw = builder.input("k_index", "index_keys", "B", "S", "Di")
    else:
        raw = builder.keys(level.kv)
    tokens = isinstance(level.partition, language.Tokens)
    return raw if tokens else _pooled(builder, level, raw, "key")


def _pooled(
    builder: _Builder, level: language.Level, raw: Node, which: Literal["key", "value"]
) -> Node:
    """One vector an entry: level.keys or level.values, pooled once however often it is used."""
    assert level.pool is not None
    how = level.pool.keys if which == "key" else level.pool.values
    assert how is not None
    position = how == "linear" and level.pool.position is not None
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
    at = builder.place(level, "pool", "keys" if which == "key" else "values")
    return builder.add(f"{level.name}.{which}s", op, *operands, at=at)


# --- branches


def _plan_branch(builder: _Builder, i: int, branch: language.Attend) -> Node:
    """One attend and its log-sum-exp."""
    if branch.over is None:
        over = "static" if branch.static else "all" if branch.window == "all" else "window"
        size = branch.static.blocks if branch.static else 1
        units = language.Blocks(size=size, stride=size)
        op, selection = _attend(builder, branch, over=over, partition=units), None
    else:
        level = builder.spec.level(branch.over)
        if branch.values == "pooled":
            return _plan_pooled_branch(builder, i, branch, level)
        over = "tokens" if isinstance(level.partition, language.Tokens) else "blocks"
        op = _attend(builder, branch, over=over, partition=level.partition)
        selection = builder.selections[level.name]
    operands = [builder.query(), builder.keys(branch.kv), builder.values(branch.kv)]
    return _with_log_sum_exp(builder, branch, op, *operands, *_some(selection))


def _plan_pooled_branch(
    builder: _Builder, i: int, branch: language.Attend, level: language.Level
) -> Node:
    if level.select is not None or level.within is not None:
        raise PlanError(
            f"branch '{branch.name}' attends pooled entries of a selection: no kernel does yet",
            span=builder.spec.span("attend", i, "values"),
            help=f"remove 'values: pooled', or attend a level without 'select', not '{level.name}'",
        )
    keys = _pooled(builder, level, builder.keys(level.kv), "key")
    values = _pooled(builder, level, builder.values(level.kv), "value")
    op = _attend(builder, branch, over="pooled", partition=level.partition)
    return _with_log_sum_exp(builder, branch, op, builder.query(), keys, values)


def _with_log_sum_exp(
    builder: _Builder, branch: language.Attend, op: Attend, *operands: Node
) -> Node:
    at = builder.place(
        branch, "static" if branch.static else "window" if branch.over is None else "over"
    )
    made = builder.add(f"{branch.name}.o", op, *operands, at=at)
    builder.add(f"{branch.name}.lse", LogSumExp(), made)
    return made


def _attend(
    builder: _Builder,
    branch: language.Attend,
    *,
    over: Literal["blocks", "tokens", "pooled", "window", "static", "all"],
    partition: language.Partition,
) -> Attend:
    return Attend(
        branch=branch.name,
        over=over,
        scale=builder.attention_scale(),
        size=partition.size,
        stride=partition.stride,
        window=None if branch.window == "all" else branch.window,
        pattern=_pattern(branch.static) if branch.static else None,
    )


def _pattern(static: language.Static) -> Pattern:
    spans = [(span.window, round(span.grow * (1 << 30)), span.sink) for span in static.per_head]
    return Pattern(
        spans=tuple(spans) or ((static.window or 0, 0, static.sink),),
        dilation=static.dilation,
        stride=static.stride,
        shift=static.shift,
        power_of_two=static.power_of_two,
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
        at = builder.spec.span("combine", "softmax")
        made = builder.add("o", Union(), *branches, at=at)
        lse = {"o": builder.add("lse", LogSumExp(), made).name}
    else:
        (made,) = branches
    selection = {level: node.name for level, node in builder.selections.items()}
    return Outputs(o=made.name, lse=lse, selection=selection)
