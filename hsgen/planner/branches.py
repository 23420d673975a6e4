"""Branches and how they are combined."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from hsgen import spec as language
from hsgen.errors import PlanError
from hsgen.graph import (
    Attend,
    AxisWindow,
    Cut,
    Delta,
    Gate,
    LogSumExp,
    Node,
    OutputGate,
    Outputs,
    Pattern,
    Spans,
    Switch,
    Union,
)
from hsgen.planner.builder import Builder, some
from hsgen.planner.calls import plan_losses
from hsgen.planner.entries import pooled, score_query
from hsgen.planner.orders import cut_of, order, row_cut_of, row_order
from hsgen.planner.routes import taken
from hsgen.planner.scores import anchors_of


def plan_branch(builder: Builder, branch: language.Attend) -> Node:
    """One attend and its log-sum-exp."""
    weighed: tuple[Node, ...] = ()
    if branch.over is None or _opened(builder, branch):
        over = "static" if branch.static else "all" if _all(branch) else "window"
        size = branch.static.blocks if branch.static else 1
        units = language.Blocks(size=size, stride=size)
        op, selection, cut = _attend(builder, branch, over=over, partition=units), None, ()
    else:
        level = builder.spec.level(branch.over)
        if branch.values == "pooled":
            return _plan_pooled_branch(builder, branch, level)
        by_token = language.Tokens | language.Diagonals
        single = isinstance(level.partition, by_token) and level.partition.size == 1
        over = "tokens" if single else "blocks"
        over = "tiers" if branch.values == "tiers" else over
        over = "spans" if branch.spans else over
        op = _attend(builder, branch, over=over, partition=level.partition, cut=cut_of(level))
        if branch.spans:
            op = replace(op, spans=_spans(level, branch.spans))
            weighed = (builder.scores[level.name],)
        selection = builder.attended.get(level.name, builder.selections[level.name])
        cut = order(builder, level)
    keys = builder.keys(branch.kv)
    values = keys if branch.storage else builder.values(branch.kv)
    bias = builder.bias() if branch.bias == "learned" else None
    far = _far_keys(builder, branch, keys) if branch.delta else None
    read = [_query(builder, branch), keys, values, *some(selection), *weighed]
    operands = [*read, *some(bias), *some(far), *cut]
    if selection is not None and branch.over is not None:
        op, rows = _of_rows(builder, op, builder.spec.level(branch.over))
        operands += rows
    return _with_log_sum_exp(builder, branch, op, *operands)


def _all(branch: language.Attend) -> bool:
    """Whether a branch that no level narrows attends every token."""
    return branch.window == "all" or branch.over is not None


def _opened(builder: Builder, branch: language.Attend) -> bool:
    """Whether a branch attends every token in every call, and what its level chooses serves others."""
    reuse = builder.spec.reuse_of(branch.over)
    raw = branch.values == "raw" and not (branch.rows or branch.spans or branch.query)
    return reuse is not None and reuse.fresh and reuse.opens and raw


def _plan_pooled_branch(builder: Builder, branch: language.Attend, level: language.Level) -> Node:
    """All entries of a level, or those that it selects.

    Raises:
        PlanError: the level narrows another's choice without choosing itself.
    """
    if level.select is None and level.within is not None:
        raise PlanError(
            f"branch '{branch.name}' attends pooled children of a beam: the graph has no operator yet",
            span=builder.place(branch, "values"),
            help=f"write 'select' in '{level.name}', or attend a level without 'within'",
        )
    keys = pooled(builder, level, "key")
    values = keys
    if branch.storage is None:
        values = pooled(builder, level, "value")
    cut = cut_of(level) if branch.bias else None
    op = _attend(builder, branch, over="pooled", partition=level.partition, cut=cut)
    selection = builder.selections.get(level.name)
    ordered = order(builder, level) if cut else ()
    operands = [_query(builder, branch), keys, values, *some(selection), *ordered]
    if selection is not None:
        op, rows = _of_rows(builder, op, level)
        operands += rows
    return _with_log_sum_exp(builder, branch, op, *operands)


def _query(builder: Builder, branch: language.Attend) -> Node:
    """Each row's own query, or the one of rows that choose together."""
    if branch.query is None:
        return builder.query()
    return score_query(builder, builder.spec.level(branch.over or ""))


def _of_rows(
    builder: Builder, op: Attend, level: language.Level
) -> tuple[Attend, tuple[Node, ...]]:
    """The same where clusters of queries say which rows a selection is of."""
    return replace(op, row_cut=row_cut_of(level)), row_order(builder, level)


def _far_keys(builder: Builder, branch: language.Attend, keys: Node) -> Node:
    assert branch.delta is not None
    op = Delta(threshold=branch.delta.threshold, against=branch.delta.against)
    return builder.add(f"{branch.name}.far", op, keys, at=builder.place(branch, "delta"))


def _with_log_sum_exp(
    builder: Builder, branch: language.Attend, op: Attend, *operands: Node
) -> Node:
    said = "over" if branch.values == "raw" else "values"
    at = builder.place(
        branch, "static" if branch.static else "window" if branch.over is None else said
    )
    sink = builder.input(f"{branch.name}_sink", "parameter", "Hq") if branch.sink else None
    last = (*some(sink), *taken(builder, branch.when))
    made = builder.add(f"{branch.name}.o", op, *operands, *last, at=at)
    builder.add(f"{branch.name}.lse", LogSumExp(), made)
    return made


def _attend(
    builder: Builder,
    branch: language.Attend,
    *,
    over: Literal["blocks", "tokens", "spans", "pooled", "tiers", "window", "static", "all"],
    partition: language.Partition,
    cut: Cut | None = None,
) -> Attend:
    return Attend(
        branch=branch.name,
        over=over,
        scale=builder.attention_scale() if branch.scale is None else branch.scale,
        size=partition.size,
        stride=partition.stride,
        window=None if branch.window == "all" else branch.window,
        pattern=_pattern(builder.spec, branch.static) if branch.static else None,
        cut=cut,
        parts=partition.count if isinstance(partition, language.Parts) else None,
        before=partition.before if isinstance(partition, language.Blocks) else None,
        latent=True if branch.storage else None,
        softcap=branch.softcap,
        sink=True if branch.sink else None,
        when=branch.when,
        biased=True if branch.bias == "learned" else None,
        merges=_merges(builder, branch),
        which=branch.which,
        counted=True if branch.bias == "log_count" else None,
        near=branch.delta.window if branch.delta else None,
        rows=branch.rows,
        softmax=branch.softmax,
        diagonal=True if isinstance(partition, language.Diagonals) else None,
    )


def _merges(builder: Builder, branch: language.Attend) -> tuple[int, ...] | None:
    """How many tokens the means of each tier are of."""
    if branch.values != "tiers" or branch.over is None:
        return None
    select = builder.spec.level(branch.over).select
    assert select is not None
    return tuple(tier.merge for tier in select.quota or ())


def _spans(level: language.Level, spans: language.Spans) -> Spans:
    anchors = anchors_of(level)
    assert anchors is not None, "spans end at anchors"
    return Spans(anchors=anchors, factor=spans.factor, power=spans.power, window=spans.window)


def _pattern(spec: language.Spec, static: language.Static) -> Pattern:
    spans = [(span.window, math.ceil(span.grow * (1 << 30)), span.sink) for span in static.per_head]
    return Pattern(
        spans=tuple(spans) or ((static.window or 0, 0, static.sink),),
        dilation=static.dilation,
        stride=static.stride,
        shift=static.shift,
        power_of_two=static.power_of_two,
        axes=_axes(spec, static.grid) if static.grid else (),
    )


def _axes(spec: language.Spec, grid: language.GridWindow) -> tuple[AxisWindow, ...]:
    assert spec.axes is not None
    ones = (1,) * len(spec.axes)
    return tuple(
        AxisWindow(
            length=None if length == "any" else length,
            window=window,
            stride=stride,
            dilation=dilation,
            causal=causal,
        )
        for length, window, stride, dilation, causal in zip(
            spec.axes,
            grid.window,
            grid.stride or ones,
            grid.dilation or ones,
            grid.causal or (False,) * len(ones),
            strict=True,
        )
    )


def plan_combine(builder: Builder, branches: list[Node]) -> Outputs:
    """The output: the only branch, gated branches, or one softmax over all of them."""
    combine = builder.spec.combine or language.Combine()
    names = [branch.name for branch in builder.spec.attend]
    lse = {name: f"{name}.lse" for name in names}
    outputs, gates = dict(zip(names, branches, strict=True)), ()
    if combine.gates is not None:
        each = "channel" if combine.gates == "channel" else None
        width = ("Dv",) if each else ()
        gates = (builder.input("gates", "gates", "B", "T", "Hq", str(len(branches)), *width),)
        if combine.streams is not None or (builder.spec.loss and builder.spec.loss.distill):
            outputs = {
                name: builder.add(
                    f"{name}.gated", Gate(column=c, each=each), *gates, branch, at=branch.span
                )
                for c, (name, branch) in enumerate(outputs.items())
            }
    if combine.streams is not None:
        made = next(iter(outputs.values()))
    elif gates:
        each = "channel" if combine.gates == "channel" else None
        at = builder.spec.span("combine", "gates")
        made = builder.add("o", Gate(each=each), *gates, *branches, at=at)
    elif combine.softmax is not None:
        at = builder.spec.span("combine", "softmax")
        sink = builder.input("sink", "parameter", "Hq") if combine.sink else None
        union = Union(sink=True if combine.sink else None)
        made = builder.add("o", union, *branches, *some(sink), at=at)
        lse = {"o": builder.add("lse", LogSumExp(), made).name}
    elif len(branches) > 1:
        made = builder.add("o", Switch(), *branches, at=builder.spec.span("route"))
        lse = {"o": builder.add("lse", LogSumExp(), made).name}
    else:
        (made,) = branches
    if combine.output_gate is not None:
        at = builder.spec.span("combine", "output_gate")
        width = ("Dv",) if combine.output_gate == "channel" else ()
        gate = builder.input("output_gate", "output_gate", "B", "T", "Hq", *width)
        made = builder.add("gated", OutputGate(each=combine.output_gate), gate, made, at=at)
    losses = plan_losses(builder, outputs)
    return Outputs(
        o=made.name,
        lse=lse,
        selection=_names(builder.selections),
        streams=_names(outputs) if combine.streams is not None else {},
        loss=_names(losses),
        state=_names(builder.state),
    )


def _names(nodes: Mapping[str, Node]) -> dict[str, str]:
    return {key: node.name for key, node in nodes.items()}
