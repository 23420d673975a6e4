"""Evaluates a Graph one operator after another, in plain torch float64, loops and all.

Shares no code with the reference: where both agree, the planner has understood the spec, and a pass
that changes no result here has kept the meaning.  Dense batches, aligned at the bottom right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from hsgen.graph import (
    Attend,
    AxisWindow,
    Gate,
    Graph,
    Input,
    LogSumExp,
    Map,
    Node,
    Normalise,
    Pool,
    Reduce,
    Score,
    Select,
    SelectSet,
    Union,
    partitions,
    short_last,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """value: [B, T, H, N]; there: bool[B, T, H, N], complete and inside the beam, if any."""

    value: Tensor
    there: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chosen:
    """member: bool[B, T, H, N]; indices: i32[B, T, H, K], ascending, -1 padded."""

    member: Tensor
    indices: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attended:
    """o: [B, T, Hq, Dv], lse: [B, Hq, T]; seen: bool[B, T, Hq, keys], for a union."""

    o: Tensor
    lse: Tensor
    seen: Tensor | None = None


Value = Tensor | Scores | Chosen | Attended


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluation:
    o: Tensor
    lse: dict[str, Tensor]
    selection: dict[str, Tensor]
    values: dict[str, Value]


def evaluate(graph: Graph, tensors: Mapping[str, Tensor]) -> Evaluation:
    """Every node of `graph`, on these inputs."""
    rows = tensors["q"].shape[1]
    keys = next(x.shape[1] for name, x in tensors.items() if name.startswith("k"))
    run = _Run(
        graph=graph,
        tensors=tensors,
        keys=keys,
        positions=[keys - rows + t for t in range(rows)],
        levels=partitions(graph),
        values={},
    )
    for node in graph.nodes():
        run.values[node.name] = _evaluate(run, node)
    o = run.values[graph.outputs.o]
    return Evaluation(
        o=o if isinstance(o, Tensor) else o.o,
        lse={branch: run.values[name] for branch, name in graph.outputs.lse.items()},
        selection={x: run.values[name].indices for x, name in graph.outputs.selection.items()},
        values=run.values,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Run:
    graph: Graph
    tensors: Mapping[str, Tensor]
    keys: int  # S
    positions: list[int]  # of the rows
    levels: Mapping[str, tuple[int, int]]  # size, stride
    values: dict[str, Value]

    def entries(self, level: str) -> int:
        return math.ceil(self.keys / self.levels[level][1])

    def complete_mask(self, level: str) -> Tensor:
        """Which entries count for which rows.  bool[1, T, 1, N]"""
        size, stride = self.levels[level]
        short = short_last(self.graph, level)
        rows = []
        for p in self.positions:
            ends = [e * stride + size for e in range(self.entries(level))]
            if self.graph.meta.causal:
                rows.append([end <= min(p + 1, self.keys) for end in ends])
            else:
                rows.append([end <= self.keys or short for end in ends])
        return torch.tensor(rows).view(1, len(rows), 1, -1)


def _evaluate(run: _Run, node: Node) -> Value:
    operands = [run.values[name] for name in node.inputs]
    match node.op:
        case Input():
            return run.tensors[node.name].double()
        case Pool():
            return _pool(run, node.op, *operands)
        case Score():
            return _score(run, node.op, operands)
        case LogSumExp():
            x = operands[0]
            return x.lse if isinstance(x, Attended) else _masked(x).logsumexp(-1).transpose(1, 2)
        case Normalise():
            score, lse = operands
            total = lse.transpose(1, 2).unsqueeze(-1)
            mass = (_masked(score) - total).exp()
            nothing = ~score.there | (total == -math.inf)
            return Scores(value=mass.masked_fill(nothing, 0.0), there=score.there)
        case Reduce():
            return _reduce(run, node.op, *operands)
        case Map():
            return _map(run, node.op, *operands)
        case Select():
            return _select(run, node.op, *operands)
        case SelectSet():
            return _select_set(run, node.op, *operands)
        case Attend():
            return _attend(run, node, *operands)
        case Gate():
            gates, *branches = operands
            return sum(gates[..., c, None] * branch.o for c, branch in enumerate(branches))
        case Union():
            return _union(run, node)
        case _:
            assert_never(node.op)


def _masked(score: Scores) -> Tensor:
    return score.value.masked_fill(~score.there, -math.inf)


def _spread(x: Tensor, heads: int) -> Tensor:
    """Selection heads to more heads, dim 2."""
    return x.repeat_interleave(heads // x.shape[2], 2)


def _pool(
    run: _Run, op: Pool, x: Tensor, weight: Tensor | None = None, position: Tensor | None = None
) -> Tensor:
    entries = []
    for e in range(run.entries(op.level)):
        tokens = x[:, e * op.stride : e * op.stride + op.size]  # [B, slots, (H,) D]
        if op.how == "mean":
            entries.append(tokens.mean(1))
        elif op.how == "max":
            entries.append(tokens.amax(1))
        elif op.how == "minmax":
            entries.append(torch.stack((tokens.amin(1), tokens.amax(1)), -2))
        elif op.how == "sum_rsqrt":
            entries.append(tokens.sum(1) / tokens.shape[1] ** 0.5)
        else:
            entries.append(_linear(op, tokens, weight, position))
    return torch.stack(entries, 1)


def _linear(op: Pool, tokens: Tensor, weight: Tensor, position: Tensor | None) -> Tensor:
    """[B, size, (H,) D] -> [B, (H,) D], 0 where the entry lacks tokens."""
    if tokens.shape[1] < op.size:
        return torch.zeros_like(tokens[:, 0])
    by_head = tokens if tokens.ndim == 4 else tokens.unsqueeze(2)
    total = 0.0
    for slot in range(op.size):
        y = by_head[:, slot] + (0.0 if position is None else position[:, slot])
        total = total + (y.unsqueeze(-2) @ weight[:, slot]).squeeze(-2)
    return total if tokens.ndim == 4 else total.squeeze(1)


def _dots(q: Tensor, k: Tensor) -> Tensor:
    """[B, T, Hq, D], [B, N, Hkv, D] -> [B, T, Hq, N]"""
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return torch.einsum("bthd,bnhd->bthn", q, keys)


def _score(run: _Run, op: Score, operands: list[Value]) -> Scores:
    query, keys = operands[:2]
    if op.form == "dot":
        value = _dots(query, keys)
    elif op.form == "index_dot":
        value = torch.einsum("bthd,bnd->bthn", query, keys)
    elif op.form == "bound":
        bounds = keys.repeat_interleave(query.shape[2] // keys.shape[2], 2).transpose(1, 2)
        corners = query.transpose(1, 2)[:, :, :, None, None] * bounds[:, :, None]
        value = corners.amax(-2).sum(-1).transpose(1, 2)  # [B, H, T, N, 2, D]
    else:
        heads = torch.einsum("bthd,bnd->bthn", query, keys).clamp(min=0)
        value = (operands[2].unsqueeze(-1) * heads).sum(2, keepdim=True)
    there = run.complete_mask(op.level).expand(value.shape)
    if op.within is not None:
        there = there & _in_beam(run, op, operands[-1], value.shape[2])
    scale = query.shape[-1] ** -0.5 if op.scale is None else op.scale
    return Scores(value=value * scale, there=there)


def _in_beam(run: _Run, op: Score | Select, parent: Chosen, heads: int) -> Tensor:
    """Children of chosen parents.  bool[B, T, heads, N]"""
    assert op.within is not None
    size, _ = run.levels[op.within]
    parents = [e * op.stride // size for e in range(run.entries(op.level))]
    return _spread(parent.member[..., parents], heads)


def _reduce(run: _Run, op: Reduce, score: Scores) -> Scores:
    heads = {"group": run.graph.sizes["Hkv"], "all": 1}[op.share]
    grouped = score.value.unflatten(2, (heads, -1))
    how = {"sum": grouped.sum, "mean": grouped.mean, "max": grouped.amax}[op.how]
    there = score.there.unflatten(2, (heads, -1))
    assert (there.all(3) == there.any(3)).all(), "heads that share differ in what they see"
    return Scores(value=how(3), there=there.all(3))


def _map(run: _Run, op: Map, source: Scores) -> Scores:
    none = -math.inf if op.how == "max" else 0.0
    gathered = []
    for e in range(run.entries(op.level)):
        value = torch.full_like(source.value[..., 0], none)
        for offset, weight in op.taps:
            i = e * op.ratio + offset
            if not 0 <= i < source.value.shape[-1]:
                continue
            x = source.value[..., i].masked_fill(~source.there[..., i], none)
            value = torch.maximum(value, x) if op.how == "max" else value + weight * x
        gathered.append(value)
    value = torch.stack(gathered, -1)
    return Scores(value=value, there=run.complete_mask(op.level).expand(value.shape))


def _select(run: _Run, op: Select, score: Scores, parent: Chosen | None = None) -> Chosen:
    B, T, H, N = score.value.shape
    beam = torch.ones(B, T, H, N, dtype=torch.bool)
    if parent is not None:
        beam = _in_beam(run, op, parent, H)
    member = torch.zeros(B, T, H, N, dtype=torch.bool)
    indices = torch.full((B, T, H, op.width), -1, dtype=torch.int32)
    for b, t, h in ((b, t, h) for b in range(B) for t in range(T) for h in range(H)):
        row, inside = score.value[b, t, h].tolist(), beam[b, t, h].tolist()
        forced = {e for e in _forced(run, op, run.positions[t], N) if inside[e]}
        there = score.there[b, t, h].tolist()
        candidates = [e for e in range(N) if e in forced or (there[e] and inside[e])]
        best = sorted(candidates, key=lambda e: (e not in forced, -row[e], e))  # noqa: B023
        kept = sorted(best[: op.k + (0 if op.counted else len(forced))])
        member[b, t, h, kept] = True
        indices[b, t, h, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
    return Chosen(member=member, indices=indices)


def _forced(run: _Run, op: Select, p: int, N: int) -> set[int]:
    own = p // op.stride
    first = range(op.first)
    last = range(own - op.last + 1, own + 1)
    upper = min(own, N - 1) if run.graph.meta.causal else N - 1
    return {e for e in (*first, *last) if 0 <= e <= upper}


def _select_set(run: _Run, op: SelectSet, score: Scores) -> Chosen:
    """Python's own integers and sorting; one ranking a row, or one of all rows of a head."""
    B, T, H, N = score.value.shape
    member = torch.zeros(B, T, H, N, dtype=torch.bool)
    for b, h in ((b, h) for b in range(B) for h in range(H)):
        rows = [_row_of(run, op, score, (b, t, h)) for t in range(T)]
        together = rows if op.scope != "head" else [[entry for row in rows for entry in row]]
        reached = {x.where for group in together for x in _reached(op, group)}
        for row in rows:
            ranked = _ranked(op, row)
            kept = [x for i, x in enumerate(ranked) if x.where in reached or i < (op.least or 0)]
            if op.most is not None:
                kept = [x for x in kept if x in ranked[: op.most]]
            for x in (*kept, *(x for x in row if x.forced)):
                member[b, x.where[0], h, x.where[1]] = True
    width = int(member.sum(-1).max()) if member.numel() else 0
    entries = torch.arange(N, dtype=torch.int32).expand(member.shape)
    listed = entries.masked_fill(~member, N).sort(-1).values[..., :width]
    return Chosen(member=member, indices=listed.masked_fill(listed == N, -1))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    where: tuple[int, int]  # row, entry
    score: float
    forced: bool
    there: bool


def _row_of(run: _Run, op: SelectSet, score: Scores, at: tuple[int, int, int]) -> list[_Entry]:
    """The candidates of one row."""
    values, there = score.value[at].tolist(), score.there[at].tolist()
    forced = _forced(run, op, run.positions[at[1]], len(values))
    return [
        _Entry(where=(at[1], e), score=x if there[e] else -math.inf, forced=e in forced, there=seen)
        for e, (x, seen) in enumerate(zip(values, there, strict=True))
        if seen or e in forced
    ]


def _ranked(op: SelectSet, entries: list[_Entry]) -> list[_Entry]:
    if op.rule == "top_p" and not op.counted:
        entries = [x for x in entries if x.there]
        return sorted(entries, key=lambda x: (-x.score, x.where))
    return sorted(entries, key=lambda x: (not x.forced, -x.score, x.where))


def _reached(op: SelectSet, entries: list[_Entry]) -> list[_Entry]:
    ranked = _ranked(op, entries)
    if op.rule == "threshold":
        return [x for x in ranked if x.score > op.value]
    one = 1 << 30
    part = round(op.value * one)
    if op.rule == "fraction":
        keep = -(-part * len(entries) // one)
        return ranked[: keep + (0 if op.counted else sum(x.forced for x in entries))]
    masses = [round(max(x.score, 0.0) * one) for x in ranked]
    goal, sums, kept = part * sum(masses), 0, []
    for x, mass in zip(ranked, masses, strict=True):
        if sums * one < goal if op.boundary == "keep" else (sums + mass) * one <= goal:
            kept.append(x)
        sums += mass
    return kept


def _attend(
    run: _Run, node: Node, query: Tensor, keys: Tensor, values: Tensor, chosen: Chosen | None = None
) -> Attended:
    op = node.op
    assert isinstance(op, Attend)
    if op.over == "pooled":
        pool = run.graph[node.inputs[1]].op
        assert isinstance(pool, Pool)
        seen = run.complete_mask(pool.level)
    else:
        seen = _seen_tokens(run, op, keys, chosen)
    seen = _spread(seen.expand(query.shape[0], -1, -1, -1), query.shape[2])
    return _softmax(op.scale, query, [(keys, values, seen)])


def _seen_tokens(run: _Run, op: Attend, keys: Tensor, chosen: Chosen | None) -> Tensor:
    """bool[B or 1, T, H, S]"""
    rows = []
    if op.pattern is not None:
        return _seen_by_pattern(run, op, keys.shape[1])
    for p in run.positions:
        token = torch.arange(keys.shape[1])
        visible = token <= p if run.graph.meta.causal else token >= 0
        if op.window is not None:
            visible = visible & ((p - token).abs() < op.window)
        rows.append(visible)
    visible = torch.stack(rows)[None, :, None]
    if chosen is None:
        return visible
    covered = torch.zeros(*chosen.member.shape[:3], keys.shape[1], dtype=torch.bool)
    for e in range(chosen.member.shape[-1]):
        start = e * op.stride
        covered[..., start : start + op.size] |= chosen.member[..., e, None]
    return covered & visible


def _seen_by_pattern(run: _Run, op: Attend, S: int) -> Tensor:
    """bool[1, T, Hq, S], token by token."""
    pattern, causal = op.pattern, run.graph.meta.causal
    assert pattern is not None
    seen = torch.zeros(1, len(run.positions), run.graph.sizes["Hq"], S, dtype=torch.bool)
    for t, h, s in (
        (t, h, s) for t in range(seen.shape[1]) for h in range(seen.shape[2]) for s in range(S)
    ):
        p = run.positions[t]
        window, growth, sink = pattern.spans[h % len(pattern.spans)]
        window += growth * max(0, -(-S // op.size) - window) >> 30
        unit = s // op.size
        d = p // op.size - unit if causal else abs(p // op.size - unit)
        near = 0 <= d < window * pattern.dilation and d % pattern.dilation == 0
        strided = pattern.stride and (unit + 1 + pattern.shift * h) % pattern.stride == 0
        power = pattern.power_of_two and (d == 0 or (d > 0 and d.bit_count() == 1))
        shown = near or unit < sink or strided or power
        shown = shown or (bool(pattern.axes) and _in_windows(pattern.axes, p, s, S))
        seen[0, t, h, s] = bool(shown) and (s <= p or not causal)
    return seen


def _in_windows(axes: tuple[AxisWindow, ...], p: int, s: int, S: int) -> bool:
    """Whether token s lies in the window of the row at p along every axis, from the last one on."""
    for back, axis in enumerate(reversed(axes)):
        last = back == len(axes) - 1
        n = axis.length or -(-S // math.prod(other.length or 1 for other in axes))
        i, j = (p, s) if last else (p % n, s % n)
        p, s = p // n, s // n
        if i % axis.dilation != j % axis.dilation:
            return False
        line = list(range(i % axis.dilation, n, axis.dilation))  # the steps of its residue class
        at = line.index(i)
        group = line[at // axis.stride * axis.stride :][: axis.stride]
        if axis.causal:
            shown = line[max(line.index(group[-1]) - axis.window + 1, 0) : at + 1]
        else:
            middle = min(line.index(group[0]) + axis.stride // 2, len(line) - 1)
            start = max(middle - axis.window // 2, 0)
            while start > 0 and start + axis.window > len(line):
                start -= 1
            shown = line[start : start + axis.window]
        if j not in shown:
            return False
    return True


def _softmax(
    scale: float | None, query: Tensor, parts: list[tuple[Tensor, Tensor, Tensor]]
) -> Attended:
    """One softmax over parts of (keys, values, seen); a row that sees nothing: 0 and -inf."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = [(_dots(query, k) * scale).masked_fill(~seen, -math.inf) for k, _, seen in parts]
    lse = torch.cat(logits, -1).logsumexp(-1)  # [B, T, Hq]
    o = 0.0
    for logit, (_, v, _) in zip(logits, parts, strict=True):
        weights = (logit - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
        values = v.repeat_interleave(query.shape[2] // v.shape[2], 2)
        o = o + torch.einsum("bthn,bnhd->bthd", weights, values)
    seen = parts[0][2] if len(parts) == 1 else None
    return Attended(o=o, lse=lse.transpose(1, 2), seen=seen)


def _union(run: _Run, node: Node) -> Attended:
    """Branches over the same keys see what either sees."""
    merged: dict[tuple[str, str], Tensor] = {}
    attends = run.graph.operands(node)
    for attend in attends:
        source = (attend.inputs[1], attend.inputs[2])
        seen = run.values[attend.name].seen
        merged[source] = merged[source] | seen if source in merged else seen
    query = run.values[attends[0].inputs[0]]
    parts = [(run.values[k], run.values[v], seen) for (k, v), seen in merged.items()]
    return _softmax(attends[0].op.scale, query, parts)
