"""Evaluates a Graph one operator after another, in plain torch float64, loops and all.

Shares no code with the reference: where both agree, the planner has understood the spec, and a pass
that changes no result here has kept the meaning.  Dense batches, aligned at the bottom right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import assert_never

import torch
from interpreter_searches import anchors_behind, assign, drawn, entropies, halved, runs
from torch import Tensor

from hsgen.graph import (
    Assign,
    Attend,
    AxisTile,
    AxisWindow,
    Carry,
    Cluster,
    Delta,
    Distance,
    Divergence,
    Entropies,
    Gate,
    Graph,
    Input,
    LogSumExp,
    Map,
    Node,
    Norm,
    Normalise,
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
    Turns,
    Union,
    Unlike,
    anchors,
    assigned,
    befores,
    block_of,
    partitions,
    segments,
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
    tier: Tensor | None = None  # i64[B, T, H, N], of a pyramid; -1 of what is left out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attended:
    """o: [B, T, Hq, Dv], lse: [B, Hq, T]; parts: by where keys come from, for a union."""

    o: Tensor
    lse: Tensor
    parts: Mapping[tuple, _Part]

    @property
    def seen(self) -> Tensor | None:
        """bool[B, T, Hq, keys], where keys are of one kind."""
        return next(iter(self.parts.values())).seen if len(self.parts) == 1 else None


Value = Tensor | Scores | Chosen | Attended


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluation:
    o: Tensor
    lse: dict[str, Tensor]
    selection: dict[str, Tensor]
    streams: dict[str, Tensor]
    loss: dict[str, Tensor]
    state: dict[str, Tensor]  # indices, or scores with -inf where there is none
    values: dict[str, Value]


def evaluate(graph: Graph, tensors: Mapping[str, Tensor]) -> Evaluation:
    """Every node of `graph`, on these inputs."""
    rows = tensors["q"].shape[1]
    keys = next(x.shape[1] for name, x in tensors.items() if name == "k" or name[:2] == "k_")
    run = _Run(
        graph=graph,
        tensors=tensors,
        keys=keys,
        positions=[keys - rows + t for t in range(rows)],
        levels=partitions(graph),
        befores=befores(graph),
        segments=segments(graph),
        values={},
    )
    for node in graph.nodes():
        run.values[node.name] = _evaluate(run, node)
    return Evaluation(
        o=_output(run, graph.outputs.o),
        streams={x: _output(run, name) for x, name in graph.outputs.streams.items()},
        loss={x: run.values[name] for x, name in graph.outputs.loss.items()},
        state={
            x: _masked(value) if isinstance(value := run.values[name], Scores) else value.indices
            for x, name in graph.outputs.state.items()
        },
        lse={branch: run.values[name] for branch, name in graph.outputs.lse.items()},
        selection={
            x: _by_rows(run, name, run.values[name]).indices
            for x, name in graph.outputs.selection.items()
        },
        values=run.values,
    )


def _output(run: _Run, name: str) -> Tensor:
    value = run.values[name]
    return value if isinstance(value, Tensor) else value.o


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Run:
    graph: Graph
    tensors: Mapping[str, Tensor]
    keys: int  # S
    positions: list[int]  # of the rows
    levels: Mapping[str, tuple[int, int]]  # size, stride
    befores: Mapping[str, int]  # tokens of an entry before its place
    segments: Mapping[str, int | None]  # of levels that are cut from an order
    values: dict[str, Value]

    def entries(self, level: str) -> int:
        if behind := anchors(self.graph).get(level):
            return max(len(anchors_behind(behind, p)) for p in self.positions)
        if (starts := self.starts(level)) is not None:
            return max(map(len, starts))
        if self.levels[level][1] == 0:
            return self.graph.sizes[f"N_{level}"]
        return math.ceil(self.keys / self.levels[level][1])

    def span(self, level: str, e: int) -> tuple[int, int]:
        """First token and end of what entry e may hold, whatever the data."""
        size, stride = self.levels[level]
        if level not in self.segments:
            start = e * stride - self.befores.get(level, 0)
            return start, start + size
        segment = self.segments[level]
        if segment is None:
            return 0, self.keys
        start = e * size // segment * segment
        return start, start + segment

    def starts(self, level: str) -> list[list[int]] | None:
        """Where runs start, by sequence; None where entries are no runs."""
        node = assigned(self.graph).get(level)
        if node is None or not isinstance(node.op, Runs):
            return None
        found = self.values[node.name].tolist()
        return [[row.index(run) for run in sorted(set(row))] for row in found]

    def _run_mask(self, level: str, spans: list[tuple[int, int]], whole: bool) -> Tensor:
        """Runs that count for the rows of some positions.  bool[B, R, 1, N]"""
        found, N = [], self.entries(level)
        for starts in self.starts(level) or []:
            known = [*starts, self.keys]  # that a run has ended is known once the next has begun
            counts = known[1:] if whole else starts
            rows = [
                [at <= last and (at < self.keys) for at in counts]
                if self.graph.meta.causal
                else [True] * len(starts)
                for _, last in spans
            ]
            found.append([row + [False] * (N - len(starts)) for row in rows])
        return torch.tensor(found).view(len(found), len(spans), 1, N)

    def complete_mask(self, level: str) -> Tensor:
        """Which entries count for which rows.  bool[1 or B, T, 1, N]"""
        if behind := anchors(self.graph).get(level):
            many = [len(anchors_behind(behind, p)) for p in self.positions]
            seen = [[e < own for e in range(max(many))] for own in many]
            return torch.tensor(seen, dtype=torch.bool).view(1, len(many), 1, max(many))
        if self.starts(level) is not None:
            return self._run_mask(level, [(p, p) for p in self.positions], whole=True)
        if level in assigned(self.graph):  # a node is there once a token is in it
            return torch.ones(1, 1, 1, self.entries(level), dtype=torch.bool)
        short = short_last(self.graph, level)
        rows = []
        for p in self.positions:
            ends = [self.span(level, e)[1] for e in range(self.entries(level))]
            if self.graph.meta.causal:
                rows.append([end <= min(p + 1, self.keys) for end in ends])
            else:
                rows.append([end <= self.keys or short for end in ends])
        return torch.tensor(rows).view(1, len(rows), 1, -1)

    def row_of(self, dim: str) -> list[int]:
        """Which of the rows of a dimension stands for each row."""
        if dim == "T":
            return list(range(len(self.positions)))
        block = block_of(dim)
        named = [0 if block is None else p // block for p in self.positions]
        if axes := self.tiles_of(dim):
            named = [_tile(axes, p) for p in self.positions]
        return [sorted(set(named)).index(name) for name in named]

    def tiles_of(self, dim: str) -> tuple[AxisTile, ...] | None:
        """The axes whose tiles the rows of a dimension are."""
        ops = [x.op for x in self.graph.nodes() if x.type.dims[1:2] == (dim,)]
        return next((op.tiles for op in ops if isinstance(op, PoolRows | ReduceRows)), None)

    def spans(self, dim: str) -> list[tuple[int, int]]:
        """First and last position, by name, of each row of a dimension."""
        if dim == "T":
            return [(p, p) for p in self.positions]
        block = block_of(dim)
        if block is None:
            return [(self.positions[-1], self.positions[-1])]
        if self.tiles_of(dim):  # nobody asks where: there is no causality
            return [(0, self.keys - 1)] * (max(self.row_of(dim), default=-1) + 1)
        names = sorted({p // block for p in self.positions})
        return [(name * block, name * block + block - 1) for name in names]

    def span_of(self, dim: str, row: int) -> tuple[int, int]:
        """The same of one of them; of clusters and slots of an order, which are nowhere, all."""
        spans = self.spans(dim)
        return spans[row] if row < len(spans) else (self.positions[0], self.positions[-1])

    def visible_mask(self, level: str, dim: str) -> Tensor:
        """Which entries count for the rows of a dimension.  bool[1, R, 1, N]"""
        if dim == "T":
            return self.complete_mask(level)
        if self.starts(level) is not None:
            return self._run_mask(level, self.spans(dim), whole=False)
        if level in assigned(self.graph):
            return torch.ones(1, 1, 1, self.entries(level), dtype=torch.bool)
        whole = whole_only(self.graph, level)
        sorted_ = level in self.segments and self.graph.meta.causal
        rows = []
        for first, last in self.spans(dim) if self.graph.meta.causal else [(0, self.keys)]:
            ends = [self.span(level, e) for e in range(self.entries(level))]
            rows.append(
                [
                    end <= min(first + 1, self.keys)
                    if sorted_
                    else (start <= last or not self.graph.meta.causal)
                    and (end <= self.keys or not whole)
                    for start, end in ends
                ]
            )
        return torch.tensor(rows).view(1, len(rows), 1, -1)


def whole_only(graph: Graph, level: str) -> bool:
    """Whether entries that lack tokens have no meaning."""
    size, stride = partitions(graph)[level]
    return size != stride or any(
        isinstance(node.op, Pool) and node.op.level == level and node.op.how == "linear"
        for node in graph.nodes()
    )


def _evaluate(run: _Run, node: Node) -> Value:
    operands = [run.values[name] for name in node.inputs]
    match node.op:
        case Input():
            return run.tensors[node.name].double()
        case Cluster():
            return _cluster(node.op, *operands)
        case Permute():
            return _permute(node.op, *operands)
        case Assign():
            return assign(node.op, *operands)
        case Runs():
            return runs(node.op, *operands)
        case Switch():
            return _switch(operands)
        case Route():
            return _route(run, node.op, *operands)
        case Pool():
            order = operands.pop() if node.op.cut else None
            return _pool(run, node.op, operands, order)
        case Delta():
            return _from_changes(node.op, *operands)
        case Norm():
            x, weight = operands
            return x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + 1e-6) ** 0.5 * weight
        case Rotate():
            return _rotate(run, node.op, *operands)
        case PoolRows() if node.op.cut:
            return _pool_clusters(node.op, *operands)
        case PoolRows():
            return _pool_rows(run, node.op, *operands)
        case PoolHeads():
            heads = run.graph.sizes["Hkv"] if node.op.share == "group" else 1
            return operands[0].unflatten(2, (heads, -1)).mean(3)
        case Score():
            return _score(run, node, operands)
        case LogSumExp():
            x = operands[0]
            return x.lse if isinstance(x, Attended) else _masked(x).logsumexp(-1).transpose(1, 2)
        case Normalise(by="max"):
            (score,) = operands
            top = _masked(score).amax(-1, keepdim=True)
            value = (score.value - top).exp().masked_fill(~score.there, 0.0)
            return Scores(value=value, there=score.there)
        case Normalise():
            score, lse = operands
            total = lse.transpose(1, 2).unsqueeze(-1)
            mass = (_masked(score) - total).exp()
            nothing = ~score.there | (total == -math.inf)
            return Scores(value=mass.masked_fill(nothing, 0.0), there=score.there)
        case Reduce():
            return _reduce(run, node.op, *operands)
        case ReduceRows():
            return _reduce_rows(run, node, *operands)
        case Unlike():
            return _unlike(run, node.op, *operands)
        case Map():
            return _map(run, node, operands[0])
        case Select():
            operands = operands[:-1] if node.op.when else operands
            return _off_way(_select(run, node, *operands), _on_way(run, node))
        case SelectSet():
            operands = operands[:-1] if node.op.when else operands
            score, *more = operands
            if node.op.rule == "early_stop":
                kept = _walk(run, node, *operands)
            else:
                order = more.pop() if node.op.cut else None
                more = more[:-1] if node.op.where else more  # read where rows are made
                split = more.pop() if node.op.apart else None
                kept = _select_set(run, node, score, order, *more)
                if split is not None:
                    kept = _select_apart(run, node, score, order, more, split)
            chosen = _off_way(kept, _on_way(run, node))
            width = int(chosen.member.sum(-1).max()) if chosen.member.numel() else 0
            return replace(chosen, indices=chosen.indices[..., :width])
        case Attend():
            return _attend(run, node, *(operands[:-1] if node.op.when else operands))
        case Recall():
            return _recall(run, node, operands)
        case Carry():
            return _carry(node.op, *operands)
        case Divergence():
            return _divergence(run, node, *operands)
        case Distance():
            return _distance(node.op, *operands)
        case Entropies():
            return entropies(node.op, operands)
        case Gate(column=column, each=each):
            gates, *branches = operands
            gates = gates if each else gates[..., None]
            if column is not None:
                return gates[..., column, :] * branches[0].o
            return sum(gates[..., c, :] * branch.o for c, branch in enumerate(branches))
        case Union():
            return _union(run, node)
        case OutputGate():
            gate, x = operands
            o = x.o if isinstance(x, Attended) else x
            open_ = 1 / (1 + (-gate).exp())
            return o * (open_ if node.op.each == "channel" else open_[..., None])
        case Round():
            return _round(node.op, *operands)
        case _:
            assert_never(node.op)


def _route(run: _Run, op: Route, number: Tensor | None = None, *more: Scores) -> Tensor:
    """The number of each head's way, or one that no way has.  -> int64[B, Hq]"""
    batch, heads = run.tensors["q"].shape[0], run.graph.sizes["Hq"]
    if op.divergence is not None:
        far = [[_apart(b, h, number, *more) for h in range(heads)] for b in range(batch)]
        return torch.tensor([[int(x >= op.divergence) for x in row] for row in far])
    taken = torch.full((batch, heads), -7)
    for b, h in ((b, h) for b in range(batch) for h in range(heads)):
        if number is None:
            at = h
        else:
            which = {"layer": (0,), "head": (h,), "sample": (b,), "sample_head": (b, h)}[op.by]
            at = int(number[which])
        if op.repeats:
            at %= len(op.places)
        if 0 <= at < len(op.places):
            taken[b, h] = op.places[at]
    return taken


def _apart(b: int, h: int, *scores: Scores) -> float:
    """The root of the mean of both relative entropies to the middle, in nats."""
    rows = [_masked(x)[b, 0, h].tolist() for x in scores]
    rows = [[0.0 if mass == -math.inf else mass for mass in row] for row in rows]
    p, q = ([mass / (sum(row) or 1.0) for mass in row] for row in rows)
    found = 0.0
    for x, y in zip(p, q, strict=True):
        found += sum(z * math.log(2 * z / (x + y)) / 2 for z in (x, y) if z > 0)
    return max(found, 0.0) ** 0.5


def _switch(branches: list[Attended]) -> Attended:
    """Of each row and head the branch that sees something; no two do."""
    o, lse = branches[0].o, branches[0].lse
    for branch in branches[1:]:
        assert not ((lse > -math.inf) & (branch.lse > -math.inf)).any(), "branches overlap"
        sees = branch.lse > -math.inf
        o = torch.where(sees.transpose(1, 2)[..., None], branch.o, o)
        lse = torch.where(sees, branch.lse, lse)
    return Attended(o=o, lse=lse, parts={})


def _on_way(run: _Run, node: Node) -> Tensor | None:
    """The heads that are on the way of an operator.  -> bool[B, 1, Hq, 1]; None: all"""
    if node.op.when is None:
        return None
    route = run.graph[node.inputs[-1]].op
    return (run.values[node.inputs[-1]] == route.ways.index(node.op.when))[:, None, :, None]


def _off_way(chosen: Chosen, way: Tensor | None) -> Chosen:
    """A selection whose heads keep nothing where they take another way."""
    if way is None:
        return chosen
    heads = chosen.member.shape[2]
    way = way if heads == way.shape[2] else way[:, :, :1]
    return replace(
        chosen,
        member=chosen.member & way,
        indices=torch.where(way, chosen.indices, torch.full_like(chosen.indices, -1)),
    )


def _masked(score: Scores) -> Tensor:
    return score.value.masked_fill(~score.there, -math.inf)


def _spread(x: Tensor, heads: int) -> Tensor:
    """Selection heads to more heads, dim 2."""
    return x.repeat_interleave(heads // x.shape[2], 2)


def _cluster(op: Cluster, keys: Tensor) -> Tensor:
    """Sequence by sequence, head by head, token by token."""
    B, S, H, _ = keys.shape
    found = torch.zeros(B, S, H, dtype=torch.int64)
    if op.tiles is not None:
        counts = [range(-(-axis.length // axis.tile)) for axis in op.tiles]
        places = [*itertools.product(*counts)]
        for s in range(S):
            found[:, s] = places.index(_tile(op.tiles, s))
        return found
    for b, h in ((b, h) for b in range(B) for h in range(H)):
        x = keys[b, :, h]
        centroids = [x[i * S // op.clusters] for i in range(op.clusters)]
        for _ in range(op.iterations):
            away = torch.stack([((x - c) ** 2).sum(-1) for c in centroids], -1).tolist()
            nearest = torch.tensor([row.index(min(row)) for row in away])
            found[b, :, h] = nearest
            for i in nearest.unique().tolist():
                centroids[i] = x[nearest == i].mean(0)
    return found


def _of_rows(y: Tensor, groups: Tensor) -> Tensor:
    """Row by row and head by head what the group has.  [B, R, Hs, ...], [B, T, H] -> [B, T, H, ...]"""
    B, T, H = groups.shape
    each = [
        [[y[b, groups[b, t, h], h * y.shape[2] // H] for h in range(H)] for t in range(T)]
        for b in range(B)
    ]
    return torch.stack([torch.stack([torch.stack(heads) for heads in rows]) for rows in each])


def _permute(op: Permute, x: Tensor, judges: Tensor | None = None) -> Tensor:
    """[B, S, H, D], or [B, S, H] of clusters and given orders -> [B, S, H]"""
    B, S, H = x.shape[:3]
    found = torch.full((B, S, H), -1)
    for b, h in ((b, h) for b in range(B) for h in range(H)):
        y = x[b, :, h]
        if op.by == "given":
            slots = [int(token) for token in y]
            good = [0 <= t < S and t not in slots[:i] for i, t in enumerate(slots)]
            order = [t if ok else -1 for t, ok in zip(slots, good, strict=True)]
        elif op.by == "clusters":
            order = sorted(range(S), key=lambda s: (int(y[s]), s))  # noqa: B023
        else:
            weights = _sorting_weights(op, y, judges, b, h, H)
            whole = S // op.segment * op.segment
            order = sorted(range(whole), key=lambda s: (s // op.segment, -weights[s], s))  # noqa: B023
            order += range(whole, S)
        found[b, :, h] = torch.tensor(order)
    return found


def _sorting_weights(
    op: Permute, y: Tensor, judges: Tensor | None, b: int, h: int, heads: int
) -> list[float]:
    """Of the tokens of whole segments of one head."""
    whole = len(y) // op.segment * op.segment
    if op.by == "mean":
        middles = [y[s : s + op.segment].mean(0) for s in range(0, whole, op.segment)]
        return [float(y[s] @ middles[s // op.segment]) for s in range(whole)]
    group = judges.shape[2] // heads
    total = torch.zeros(whole, dtype=y.dtype)
    for q in judges[b, -op.last :, h * group : (h + 1) * group].flatten(0, 1):
        total += torch.softmax(y[:whole] @ q / q.shape[0] ** 0.5, 0)
    return total.tolist()


def _tokens_of(run: _Run, level: str, e: int, order: Tensor | None, cut: str | None) -> list[list]:
    """Which tokens entry e has, by sequence and head; all alike where there is no order."""
    size, stride = run.levels[level]
    if order is None:
        return [[list(range(e * stride, min(e * stride + size, run.keys)))]]
    found = []
    order = order[..., None] if cut == "runs" else order
    for by_head in order.transpose(1, 2).tolist():
        if cut in ("clusters", "nodes", "runs"):
            found.append([[s for s, i in enumerate(row) if i == e] for row in by_head])
        else:
            found.append([[s for s in row[e * size : (e + 1) * size] if s >= 0] for row in by_head])
    return found


def _pool(run: _Run, op: Pool, operands: list[Tensor], order: Tensor | None) -> Tensor:
    if op.how == "gated":
        assert order is None, "gates in place only"
        return _gated(run, op, operands)
    if op.how == "centroid":
        lengths = (operands[0] ** 2).sum(-1, keepdim=True).sqrt()
        return (operands[0] / lengths).transpose(0, 1).expand(len(run.tensors["q"]), -1, -1, -1)
    if op.how == "sample" and order is None:
        return _sampled(run, op, operands[0])
    if order is None:
        return _pool_in_place(run, op, *operands)
    x, *learned = operands
    B, _, H, _ = x.shape
    where = [_tokens_of(run, op.level, e, order, op.cut) for e in range(run.entries(op.level))]
    rows = [
        [
            [
                _of_head(op, x[b, _of(op, tokens[b][h % len(tokens[b])], h, e), h], learned, h)
                for h in range(H)
            ]
            for e, tokens in enumerate(where)
        ]
        for b in range(B)
    ]
    return torch.stack([torch.stack([torch.stack(heads) for heads in row]) for row in rows])


def _of(op: Pool, tokens: list[int], h: int, e: int) -> list[int]:
    """The tokens that an entry is made of: all of them, or the one that is drawn."""
    if op.how != "sample" or not tokens:
        return tokens
    return [tokens[drawn(op.seed, h, e, len(tokens))]]


def _sampled(run: _Run, op: Pool, x: Tensor) -> Tensor:
    """Of each entry one token, by each head.  [B, S, (H,) D] -> [B, N, (H,) D]"""
    by_head = x if x.ndim == 4 else x.unsqueeze(2)
    entries = []
    for e in range(run.entries(op.level)):
        there = [s for s in range(e * op.stride, e * op.stride + op.size) if s < x.shape[1]]
        heads = range(by_head.shape[2])
        chosen = [by_head[:, _of(op, there, h, e)[0], h] for h in heads]
        entries.append(torch.stack(chosen, 1))
    made = torch.stack(entries, 1)
    return made if x.ndim == 4 else made.squeeze(2)


def _of_head(op: Pool, tokens: Tensor, learned: list[Tensor], h: int) -> Tensor:
    """The entry that some tokens of one head make, 0 of none.  [slots, D] -> [D], or [2, D]"""
    if not len(tokens):
        return tokens.new_zeros((2, tokens.shape[1]) if op.how == "minmax" else tokens.shape[1:])
    made = _summed_up(op, tokens[None, :, None], *(x[h : h + 1] for x in learned))
    return made[0, 0]


def _pool_in_place(run: _Run, op: Pool, x: Tensor, *learned: Tensor) -> Tensor:
    entries = []
    for e in range(run.entries(op.level)):
        start = e * op.stride - (op.before or 0)
        if op.series is None:
            tokens = x[:, max(0, start) : start + op.size]  # [B, slots, (H,) D]
        else:
            tokens = _in_series(op, x, start)
        entries.append(_summed_up(op, tokens, *learned))
    return torch.stack(entries, 1)


def _in_series(op: Pool, x: Tensor, start: int) -> Tensor:
    """An entry's tokens [B, slots, (H,) D], each in its slot's series.  x: [B, S, (H,) series, D]"""
    slots = [s for s in range(op.size) if 0 <= start + s < x.shape[1]]
    return torch.stack([x[:, start + s, ..., s // op.stride, :] for s in slots], 1)


def _gated(run: _Run, op: Pool, operands: list[Tensor]) -> Tensor:
    """Weights that sum to 1 over an entry's tokens, channel by channel or for all.  In place"""
    x, gates, *position = operands
    if op.softmax == "token":
        gates, position = gates[..., None], [p[..., None] for p in position]
    entries = []
    for e in range(run.entries(op.level)):
        start = e * op.stride - (op.before or 0)
        tops, bottoms = 0.0, 0.0
        for s in range(op.size):
            if not 0 <= start + s < x.shape[1]:
                continue
            series = s // op.stride
            token = x[:, start + s] if op.series is None else x[:, start + s, ..., series, :]
            gate = gates[:, start + s] if op.series is None else gates[:, start + s, ..., series, :]
            if position:
                bias = position[0][:, s]  # [H, D]
                gate = gate + (bias if token.ndim == 3 else bias[0])
            tops, bottoms = tops + gate.exp() * token, bottoms + gate.exp()
        entries.append(tops / bottoms)
    return torch.stack(entries, 1)


def _rotate(
    run: _Run, op: Rotate, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
) -> Tensor:
    """Entry by entry, pair by pair.  x: [B, N, ..., D]"""
    made, half = x.clone(), op.dims // 2
    first = 0 if op.channels == "first" else x.shape[-1] - op.dims
    places = [n if op.at == "token" else n * op.stride for n in range(x.shape[1])]
    if op.rows is not None:
        blocks = sorted({p // op.rows * op.rows for p in run.positions})
        places = run.positions if op.at == "token" else blocks
    for e, i in ((e, i) for e in range(x.shape[1]) for i in range(half)):
        a, b = (i, i + half) if op.pairs == "halves" else (2 * i, 2 * i + 1)
        a, b = first + a, first + b
        if cos is not None:
            at = places[e]
            turn = (cos[:, at, i], sin[:, at, i])
            c, s = (y.view(len(y), *(1,) * (x.ndim - 3)) for y in turn)
        else:
            place = places[e]
            if op.at == "centre":
                place += (op.size - 1) / 2 - (op.before or 0)
            angle = place / op.base ** (2 * i / op.dims)
            c, s = math.cos(angle), math.sin(angle)
        made[:, e, ..., a] = x[:, e, ..., a] * c - x[:, e, ..., b] * s
        made[:, e, ..., b] = x[:, e, ..., a] * s + x[:, e, ..., b] * c
    return made


def _summed_up(op: Pool, tokens: Tensor, *learned: Tensor) -> Tensor:
    """One entry.  [B, slots, (H,) D] -> [B, (H,) D], of minmax [B, (H,) 2, D]"""
    if op.how in ("mean", "sample"):  # of one that is drawn
        return tokens.mean(1)
    if op.how == "max":
        return tokens.amax(1)
    if op.how == "minmax":
        return torch.stack((tokens.amin(1), tokens.amax(1)), -2)
    if op.how == "sum_rsqrt":
        return tokens.sum(1) / tokens.shape[1] ** 0.5
    if op.how == "first":
        return tokens[:, 0]
    if op.how == "antidiagonal":
        lacking = tokens.new_zeros(len(tokens), op.size - tokens.shape[1], *tokens.shape[2:])
        return torch.cat([*torch.cat((tokens, lacking), 1).unbind(1)], -1)
    weight = learned[0]
    if op.how == "max_min_mean":
        parts = (tokens.amax(1), tokens.amin(1), tokens.mean(1))
        return _linear(op, torch.stack(parts, 1), weight, None, slots=3)
    position = learned[-1] if op.position else None
    made = _linear(op, tokens, weight, position)
    if op.how == "linear":
        return made
    by_head = (made if tokens.ndim == 4 else made.unsqueeze(1)).clamp(min=0)
    out = torch.stack([by_head[:, h] @ learned[1][h] for h in range(by_head.shape[1])], 1)
    return out if tokens.ndim == 4 else out.squeeze(1)


def _tile(axes: tuple[AxisTile, ...], p: int) -> tuple[int, ...]:
    """Where a token's tile lies along every axis, from the last axis on, then turned round."""
    found = []
    for axis in reversed(axes[1:]):
        found.append(p % axis.length // axis.tile)
        p //= axis.length
    return (p // axes[0].tile, *reversed(found))


def _pool_clusters(op: PoolRows, q: Tensor, cluster: Tensor) -> Tensor:
    """One query a cluster, head by head; 0 where no row is in it."""
    B, T, H = q.shape[:3]
    made = torch.zeros(B, op.clusters, H, q.shape[3], dtype=q.dtype)
    for b, r, h in ((b, r, h) for b in range(B) for r in range(op.clusters) for h in range(H)):
        asked = [t for t in range(T) if cluster[b, t, h] == r]
        if asked:
            rows = q[b, asked, h]
            made[b, r, h] = {"mean": rows.mean(0), "max": rows.amax(0), "first": rows[0]}[op.how]
    return made


def _pool_rows(run: _Run, op: PoolRows, q: Tensor) -> Tensor:
    made = []
    for asked in _asked(run, op):
        rows = [q[:, t] for t in asked if t is not None]
        if op.how == "antidiagonal":
            slots = [torch.zeros_like(q[:, 0]) if t is None else q[:, t] for t in asked]
            made.append(torch.cat(slots[::-1], -1) / len(slots))
        elif op.how == "first":
            made.append(rows[0])
        else:
            stacked = torch.stack(rows)
            made.append(stacked.mean(0) if op.how == "mean" else stacked.amax(0))
    return torch.stack(made, 1)


def _asked(run: _Run, op: PoolRows | ReduceRows) -> list[list[int | None]]:
    """The rows that stand for each group, slot by slot; None where a block lacks one."""
    rows, block, last = range(len(run.positions)), op.block, op.last
    if op.tiles is not None:
        tiles = [_tile(op.tiles, p) for p in run.positions]
        return [[t for t in rows if tiles[t] == tile] for tile in sorted(set(tiles))]
    if last is not None:
        return [[*rows][-last:]]
    assert block is not None
    names = sorted({p // block for p in run.positions})
    where = {p: t for t, p in enumerate(run.positions)}
    return [[where.get(name * block + slot) for slot in range(block)] for name in names]


def _reduce_rows(run: _Run, node: Node, score: Scores) -> Scores:
    op = node.op
    assert isinstance(op, ReduceRows)
    fine = run.row_of(run.graph[node.inputs[0]].type.dims[1])
    none = -math.inf if op.how == "max" else 0.0
    value = score.value
    if not isinstance(run.graph[node.inputs[0]].op, Map):  # those are of sources that a row sees
        value = value.masked_fill(~score.there, none)
    made = []
    for asked in _asked(run, op):
        rows = sorted({fine[t] for t in asked if t is not None})
        stacked = torch.stack([value[:, row] for row in rows])
        made.append({"sum": stacked.sum, "mean": stacked.mean, "max": stacked.amax}[op.how](0))
    value = torch.stack(made, 1)
    level = node.type.dims[-1].partition("_")[2]
    there = run.visible_mask(level, node.type.dims[1]).expand(value.shape)
    scored = [x for x in run.graph.nodes() if isinstance(x.op, Score) and x.op.level == level]
    for each in scored:
        if each.op.within is not None:  # rows of a group have one parent's choice
            parent = run.values[each.inputs[-1]]
            there = there & _in_beam(run, replace(each, type=node.type), parent, value.shape[2])
        if each.op.among:
            recalled = run.values[each.inputs[-1]].member[:, _one_of_each(run, node)]
            there = there & _spread(recalled, value.shape[2])
    return Scores(value=value, there=there)


def _linear(
    op: Pool, tokens: Tensor, weight: Tensor, position: Tensor | None, *, slots: int | None = None
) -> Tensor:
    """[B, size, (H,) D] -> [B, (H,) D'], 0 where the entry lacks tokens."""
    slots = slots or op.size
    if tokens.shape[1] < slots:
        return tokens[:, 0, ..., :1].expand(*tokens[:, 0].shape[:-1], weight.shape[-1]) * 0.0
    by_head = tokens if tokens.ndim == 4 else tokens.unsqueeze(2)
    total = 0.0
    for slot in range(slots):
        y = by_head[:, slot] + (0.0 if position is None else position[:, slot])
        total = total + (y.unsqueeze(-2) @ weight[:, slot]).squeeze(-2)
    return total if tokens.ndim == 4 else total.squeeze(1)


def _round(op: Round, x: Tensor) -> Tensor:
    """One vector after another, a number at a time: the nearest of the 253 numbers of e4m3."""
    if op.dtype in ("int8", "int4"):
        return _whole(x, 127 if op.dtype == "int8" else 7)
    bf16 = x.to(torch.bfloat16).double()
    if op.dtype == "bf16":
        return bf16
    vectors = []
    for vector in bf16.flatten(0, -2):
        scale = 1.0
        if op.dtype == "fp8":
            greatest = max(float(vector.abs().max()), 1e-4)
            scale = 2.0 ** math.ceil(math.log2(greatest / 448))
        vectors.append([scale * _nearest_e4m3(float(y) / scale) for y in vector])
    return torch.tensor(vectors, dtype=torch.float64).view(x.shape)


def _whole(x: Tensor, most: int) -> Tensor:
    """By fractions, whose rounding is to even."""
    vectors = []
    for vector in x.flatten(0, -2).tolist():
        greatest = max(map(abs, vector))
        step = Fraction(greatest) / most
        vectors.append([round(Fraction(y) / step) * step if greatest else 0 for y in vector])
    return torch.tensor([[float(y) for y in row] for row in vectors]).double().view(x.shape)


def _e4m3_numbers() -> list[float]:
    """Not negative: subnormal steps of 2^-9, then eight in each octave up to 448."""
    octaves = [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)]
    return [m * 2.0**-9 for m in range(8)] + octaves[:-1]


E4M3 = _e4m3_numbers()


def _nearest_e4m3(y: float) -> float:
    """Ties to the even mantissa, which are those of even places in the list."""
    place = min(range(len(E4M3)), key=lambda i: (abs(E4M3[i] - abs(y)), i % 2))
    return math.copysign(E4M3[place], y)


def _dots(q: Tensor, k: Tensor) -> Tensor:
    """[B, T, Hq, D], [B, N, Hkv, D] -> [B, T, Hq, N]"""
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return torch.einsum("bthd,bnhd->bthn", q, keys)


def _score(run: _Run, node: Node, operands: list[Value]) -> Scores:
    op = node.op
    assert isinstance(op, Score)
    if op.form == "given":
        value, *more = operands
        there = run.complete_mask(op.level).expand(value.shape)
        there = there & _among(run, node, more[-1], value.shape[2]) if op.among else there
        there = there & _in_beam(run, node, more[-1], value.shape[2]) if op.within else there
        return Scores(value=value * (1.0 if op.scale is None else op.scale), there=there)
    if op.form == "bias":
        value = operands[0].transpose(1, 2)[:, None].expand(-1, len(run.positions), -1, -1)
        there = run.complete_mask(op.level).expand(value.shape)
        if op.within is not None:
            there = there & _in_beam(run, node, operands[-1], value.shape[2])
        return Scores(value=value * (1.0 if op.scale is None else op.scale), there=there)
    query, keys = operands[:2]
    if op.anchors or op.halves:
        value = _searched(run, node, _dots(query, keys))
    elif op.form == "dot":
        value = _dots(query, keys)
    elif op.form == "cosine":
        query, keys = (
            x / (x**2).sum(-1, keepdim=True).sqrt().clamp(min=1e-12) for x in operands[:2]
        )
        value = _dots(query, keys)
    elif op.form == "code_match":
        value = _equal_codes(op, query, keys, operands[2])
    elif op.form == "pooling_error":
        value = _pooling_error(run, node, operands)
    elif op.form == "index_dot":
        value = torch.einsum("bthd,bnd->bthn", query, keys)
    elif op.form == "bound":
        bounds = keys.repeat_interleave(query.shape[2] // keys.shape[2], 2).transpose(1, 2)
        corners = query.transpose(1, 2)[:, :, :, None, None] * bounds[:, :, None]
        value = corners.amax(-2).sum(-1).transpose(1, 2)  # [B, H, T, N, 2, D]
    else:
        heads = torch.einsum("bthd,bnd->bthn", query, keys).clamp(min=0)
        if op.form == "relu_weighted":
            heads = operands[2].unsqueeze(-1) * heads
        groups = run.graph.sizes["Hkv"] if op.grouped else 1
        value = torch.stack([part.sum(2) for part in heads.chunk(groups, 2)], 2)
    there = run.visible_mask(op.level, node.type.dims[1]).expand(value.shape)
    there = there & _has_tokens(run, node, value.shape)
    if op.among:
        there = there & _among(run, node, operands[-1], value.shape[2])
    if op.within is not None:
        there = there & _in_beam(run, node, operands[-1], value.shape[2])
    if op.diagonal:  # entry by entry: the key that lies so far before the row
        keys_of = [[max(p - e, 0) for e in range(run.keys)] for p in run.positions]
        value = torch.stack([value[:, t, :, s] for t, s in enumerate(keys_of)], 1)
    if op.form == "pooling_error":
        return Scores(value=value, there=there)
    scale = query.shape[-1] ** -0.5 if op.scale is None else op.scale
    value = value * scale
    if op.biased:
        value = value + _spread(operands[2].transpose(1, 2)[:, None], value.shape[2])
    if op.counted:
        order = operands[2] if op.cut else None
        value = value + _spread(_log_counts(run, op.level, order, op.cut), value.shape[2])
    return Scores(value=value, there=there)


def _counts(run: _Run, level: str, order: Tensor | None, cut: str | None) -> Tensor:
    """Tokens of every entry.  [B or 1, 1, H or 1, N]"""
    found = [_tokens_of(run, level, e, order, cut) for e in range(run.entries(level))]
    numbers = [[[len(tokens) for tokens in row] for row in entry] for entry in found]
    return torch.tensor(numbers).permute(1, 2, 0).unsqueeze(1)


def _log_counts(run: _Run, level: str, order: Tensor | None, cut: str | None) -> Tensor:
    return _counts(run, level, order, cut).clamp(min=1).double().log()


def _pooling_error(run: _Run, node: Node, operands: list[Value]) -> Tensor:
    """Token by token: what its entry's mean would have made of it."""
    op = node.op
    assert isinstance(op, Score)
    query, means, keys, *rest = operands
    order = rest.pop() if op.cut else None
    group = query.shape[2] // keys.shape[2]
    scale = query.shape[-1] ** -0.5 if op.scale is None else op.scale
    B, T, H, _ = query.shape
    N = run.entries(op.level)
    value = torch.zeros(B, T, H, N, dtype=query.dtype)
    complete = run.visible_mask(op.level, node.type.dims[1]).expand(-1, T, -1, -1)[0, :, 0]
    where = [_tokens_of(run, op.level, e, order, op.cut) for e in range(N)]
    for b, t, h in ((b, t, h) for b in range(B) for t in range(T) for h in range(H)):
        kv = h // group
        tokens = [(w[b] if order is not None else w[0]) for w in where]
        tokens = [w[kv] if order is not None else w[0] for w in tokens]
        seen = [e for e in range(N) if complete[t, e] and tokens[e]]
        exact = {e: keys[b, tokens[e], kv] @ query[b, t, h] * scale for e in seen}
        whole = {e: means[b, e, kv] @ query[b, t, h] * scale for e in seen}
        top = max((float(x) for e in seen for x in (*exact[e], whole[e])), default=0.0)
        for e in seen:
            one, many = (whole[e] - top).exp(), (exact[e] - top).exp()
            if rest:
                mean, values = rest
                off = one * mean[b, e, kv] - many[:, None] * values[b, tokens[e], kv]
                value[b, t, h, e] = (off**2).sum(-1).mean()
            else:
                value[b, t, h, e] = ((one - many) ** 2).mean()
    return value


def _equal_codes(op: Score, query: Tensor, keys: Tensor, codebook: Tensor) -> Tensor:
    """[B, T, Hq, D], [B, N, Hkv, D], [runs, words, dim] -> [B, T, Hq, N], pair after pair"""
    codes, runs = op.codes, codebook.shape[0]

    def nearest(x: Tensor) -> list[int]:
        found = []
        for run in range(runs):
            part = x[run * codes.dim : (run + 1) * codes.dim]
            power = 1 if codes.distance == "l1" else 2
            away = [((part - word).abs() ** power).sum().item() for word in codebook[run]]
            found.append(away.index(min(away)))
        return found

    group = query.shape[2] // keys.shape[2]
    value = query.new_zeros(*query.shape[:3], keys.shape[1])
    B, N, H = keys.shape[:3]
    asked = {at: nearest(query[at]) for at in itertools.product(*map(range, query.shape[:3]))}
    for b, n, h in ((b, n, h) for b in range(B) for n in range(N) for h in range(H)):
        code = nearest(keys[b, n, h])
        for t, g in ((t, g) for t in range(query.shape[1]) for g in range(group)):
            other = asked[b, t, h * group + g]
            equal = sum(x == y for x, y in zip(code, other, strict=True))
            if codes.buckets:
                equal = min(equal // (runs // codes.buckets), codes.buckets - 1)
            value[b, t, h * group + g, n] = equal
    return value


def _searched(run: _Run, node: Node, dots: Tensor) -> Tensor:
    """What is searched of the logits of tokens: anchors behind each row, or halves of intervals."""
    op = node.op
    assert isinstance(op, Score)
    spans = run.spans(node.type.dims[1])
    if op.halves and op.halves.rows:
        dots = _asked_logits(run, op.halves.rows, dots)
    B, R, H = dots.shape[:3]
    value = torch.full((B, R, H, run.entries(op.level)), -math.inf, dtype=dots.dtype)
    for b, r, h in ((b, r, h) for b in range(B) for r in range(R) for h in range(H)):
        last = spans[r][1]
        row = dots[b, r, h].tolist()
        if op.anchors:
            for e, token in enumerate(anchors_behind(op.anchors, last)):
                value[b, r, h, e] = row[token]
            continue
        seen = row[: max(last + 1, 0)] if run.graph.meta.causal else row
        for e in range(value.shape[-1]):
            value[b, r, h, e] = halved(seen, e * op.size, op.size, op.halves.until)
    return value


def _asked_logits(run: _Run, rows_of: ReduceRows, dots: Tensor) -> Tensor:
    """Logits of rows that search as one, token by token; what a row does not see is 0, or nothing."""
    none = -math.inf if rows_of.how == "max" else 0.0
    made = []
    for asked in _asked(run, rows_of):
        rows = []
        for t in (t for t in asked if t is not None):
            hidden = torch.arange(dots.shape[-1]) > run.positions[t]
            rows.append(dots[:, t].masked_fill(hidden & run.graph.meta.causal, none))
        stacked = torch.stack(rows)
        how = {"sum": stacked.sum, "mean": stacked.mean, "max": stacked.amax}[rows_of.how]
        made.append(how(0))
    return torch.stack(made, 1)


def _has_tokens(run: _Run, node: Node, shape: torch.Size) -> Tensor:
    """Entries of an order, and nodes, that hold any token.  bool[B, 1 or R, H, N]"""
    op = node.op
    assert isinstance(op, Score)
    found = torch.ones(1, 1, 1, run.entries(op.level), dtype=torch.bool)
    if op.cut == "nodes" and op.size == 0:
        return _nodes_there(run, node, shape[2])
    for node in run.graph.nodes():
        if not isinstance(node.op, Pool) or node.op.level != op.level or node.op.cut is None:
            continue
        order = run.values[node.inputs[-1]]
        by_entry = [
            _tokens_of(run, op.level, e, order, node.op.cut) for e in range(run.entries(op.level))
        ]
        some = torch.tensor([[[bool(x) for x in row] for row in entry] for entry in by_entry])
        found = _spread(some.permute(1, 2, 0).unsqueeze(1), shape[2])  # [N, B, H] -> [B, 1, H, N]
    return found


def _nodes_there(run: _Run, node: Node, heads: int) -> Tensor:
    """Nodes that a token is in which the last of the rows sees.  bool[B, R, heads, N]"""
    of = run.values[assigned(run.graph)[node.op.level].name]  # [B, S, Hkv]
    spans = run.spans(node.type.dims[1])
    found = []
    for _, last in spans:
        seen = of[:, : max(last + 1, 0)] if run.graph.meta.causal else of
        entries = range(run.entries(node.op.level))
        if of.ndim == 4:  # whether a node has each token
            found.append([seen[..., e].bool().any(1) for e in entries])
            continue
        found.append([(seen == e).any(1) for e in entries])
    by_row = [torch.stack(each, -1) for each in found]  # [B, Hkv, N]
    return _spread(torch.stack(by_row, 1), heads)


def _held(of: Tensor, member: Tensor, heads: int) -> Tensor:
    """Tokens of chosen nodes or runs.  [B, S, Hkv] or [B, S], bool[B, R, H, N] -> bool[B, R, heads, S]"""
    of = of[..., None] if of.ndim == 2 else of
    heads = max(heads, of.shape[2])
    member = _spread(member, heads)
    found = torch.zeros(*member.shape[:3], of.shape[1], dtype=torch.bool)
    B, S = of.shape[:2]
    for b, s, h in ((b, s, h) for b in range(B) for s in range(S) for h in range(heads)):
        if of.ndim == 4:
            has = of[b, s, h * of.shape[2] // heads].bool()
            found[b, :, h, s] = (member[b, :, h] & has).any(-1)
            continue
        entry = int(of[b, s, h * of.shape[2] // heads])
        if entry >= 0:
            found[b, :, h, s] = member[b, :, h, entry]
    return found


def _one_of_each(run: _Run, node: Node) -> list[int]:
    """The last row of each group that a node has."""
    row = run.row_of(node.type.dims[1])
    return [max(t for t, r in enumerate(row) if r == group) for group in sorted(set(row))]


def _among(run: _Run, node: Node, recalled: Chosen, heads: int) -> Tensor:
    """Recalled entries; of a row that has a say by its own token, none where that is dropped."""
    op = node.op
    assert isinstance(op, Score)
    member = recalled.member[:, _one_of_each(run, node)].clone()
    if op.rows:
        for t, p in enumerate(run.positions):
            held = range(member.shape[-1])
            own = [e for e in held if e * op.stride <= p < e * op.stride + op.size]
            member[:, t] &= member[:, t, :, own].any(-1, keepdim=True)
    return _spread(member, heads)


def _in_beam(run: _Run, node: Node, parent: Chosen, heads: int) -> Tensor:
    """Children of chosen parents.  bool[B, R, heads, N]"""
    op = node.op
    assert isinstance(op, Score | Select)
    assert op.within is not None
    size, _ = run.levels[op.within]
    above = run.graph[node.inputs[1 if isinstance(op, Select) else -1]].type.dims[1]
    row, theirs = run.row_of(node.type.dims[1]), run.row_of(above)
    mine = [theirs[row.index(r)] for r in range(len(run.spans(node.type.dims[1])))]
    member = parent.member[:, mine]
    own = assigned(run.graph).get(op.level)
    if own is not None:
        parents = [e // own.op.branching for e in range(run.entries(op.level))]
    elif op.cut is not None:
        return _held(run.values[assigned(run.graph)[op.within].name], member, heads)
    else:
        parents = [e * op.stride // size for e in range(run.entries(op.level))]
    return _spread(member[..., parents], heads)


def _reduce(run: _Run, op: Reduce, score: Scores) -> Scores:
    heads = {"group": run.graph.sizes["Hkv"], "all": 1}[op.share]
    grouped = score.value.unflatten(2, (heads, -1))
    how = {"sum": grouped.sum, "mean": grouped.mean, "max": grouped.amax}[op.how]
    there = score.there.unflatten(2, (heads, -1))
    assert (there.all(3) == there.any(3)).all(), "heads that share differ in what they see"
    return Scores(value=how(3), there=there.all(3))


def _map(run: _Run, node: Node, source: Scores) -> Scores:
    op = node.op
    assert isinstance(op, Map)
    if op.how == "upsample":
        return _upsample(run, node, source)
    none = -math.inf if op.how == "max" else 0.0
    gathered = []
    for e in range(run.entries(op.level)):
        count = torch.zeros_like(source.value[..., 0])
        value = torch.full_like(source.value[..., 0], none)
        for offset, weight in op.taps:
            i = e * op.ratio + offset
            if not 0 <= i < source.value.shape[-1]:
                continue
            x = source.value[..., i].masked_fill(~source.there[..., i], none)
            value = torch.maximum(value, x) if op.how == "max" else value + weight * x
            count += source.there[..., i]
        gathered.append(value / count.clamp(min=1) if op.how == "mean" else value)
    value = torch.stack(gathered, -1)
    there = run.visible_mask(op.level, node.type.dims[1]).expand(value.shape)
    return Scores(value=value, there=there)


def _upsample(run: _Run, node: Node, source: Scores) -> Scores:
    """Every entry with the score of the one that holds it."""
    op, value = node.op, _masked(source)
    N = run.entries(op.level)
    made = torch.full((*value.shape[:3], N), -math.inf, dtype=value.dtype)
    of = run.values[node.inputs[1]] if op.cut else None
    for b, e in ((b, e) for b in range(len(value)) for e in range(N)):
        made[b, ..., e] = value[b, ..., e // op.ratio if of is None else int(of[b, e])]
    there = run.visible_mask(op.level, node.type.dims[1]).expand(made.shape)
    return Scores(value=made, there=there)


def _select(run: _Run, node: Node, score: Scores, *others: Value) -> Chosen:
    op, others = node.op, list(others)
    assert isinstance(op, Select)
    order = others.pop() if op.cut else None
    B, T, H, N = score.value.shape
    beam = torch.ones(B, T, H, N, dtype=torch.bool)
    if op.within is not None:
        beam = _in_beam(run, node, others[0], H)
    joined = torch.zeros_like(beam) if op.joined is None else _spread(others[-1].member, H)
    values, there_of, beam_of, joined_of = (
        x.tolist() for x in (score.value, score.there, beam, joined)
    )
    members, lists = [], []
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        row, inside, there = values[b][t][h], beam_of[b][t][h], there_of[b][t][h]
        last = run.span_of(node.type.dims[1], t)[1]
        sinks = _sinks(run, node, order, (b, h, H), last)
        at = run.positions[t] if op.tail else -1
        tail = {e for e in _tail(run, op, b, at, there) if inside[e]}
        forced = {e for e in _forced(run, node, b, t, N) | sinks if inside[e]}
        forced |= {e for e, taken in enumerate(joined_of[b][t][h]) if taken and inside[e]}
        forced -= tail
        candidates = [e for e in range(N) if e in forced or (there[e] and inside[e])]
        best = sorted(candidates, key=lambda e: (e not in forced, -row[e], e))  # noqa: B023
        kept = sorted({*best[: op.k + (0 if op.counted else len(forced))], *tail})
        members.append([e in kept for e in range(N)])
        lists.append(kept + [-1] * (op.width - len(kept)))
    return Chosen(
        member=torch.tensor(members, dtype=torch.bool).view(B, T, H, N),
        indices=torch.tensor(lists, dtype=torch.int32).view(B, T, H, op.width),
    )


def _tail(run: _Run, op: Select | SelectSet, b: int, p: int, there: list[bool]) -> set[int]:
    """The entry of position p, if it is not there yet."""
    if not op.tail or p < 0:
        return set()  # nor has an entry a place where entries are clusters
    starts = run.starts(op.level)
    own = sum(at <= p for at in starts[b]) - 1 if starts else p // op.stride
    return set() if there[own] else {own}


def _forced(run: _Run, node: Node, b: int, row: int, N: int) -> set[int]:
    """The first entries, and the last ones of every position that the row stands for."""
    op = node.op
    assert isinstance(op, Select | SelectSet)
    first, last = run.span_of(node.type.dims[1], row)
    if not (op.first or op.last):
        return set()
    before = getattr(op, "before", None) or 0
    starts = run.starts(op.level)
    places = starts[b] if starts else [run.span(op.level, e)[0] + before for e in range(N)]
    begins = sorted(set(places))
    unit = [begins.index(place) for place in places]
    own = [
        max((u for u, begin in enumerate(begins) if begin <= p), default=-1)
        for p in range(first, last + 1)
    ]
    upper = own[-1] if run.graph.meta.causal else N - 1
    return {
        e
        for e in range(len(places))
        if (unit[e] < op.first and unit[e] <= upper)
        or any(mine - op.last < unit[e] <= mine for mine in own)
    }


def _sinks(
    run: _Run, node: Node, order: Tensor | None, at: tuple[int, int, int], last: int
) -> set[int]:
    """Entries with one of the first tokens.  `at`: sequence, head, and how many heads choose"""
    op, (b, h, heads) = node.op, at
    assert isinstance(op, Select | SelectSet)
    found: set[int] = set()
    for e in range(run.entries(op.level) if op.sink else 0):
        where = _tokens_of(run, op.level, e, order, op.cut)
        row = where[b if order is not None else 0]
        tokens = row[h * len(row) // heads]
        if any(s < op.sink for s in tokens):
            if run.span(op.level, e)[0] <= last or not run.graph.meta.causal:
                found.add(e)
    return found


def _walk(
    run: _Run, node: Node, score: Scores, query: Tensor, keys: Tensor, *more: Tensor
) -> Chosen:
    """Group by group, step by step."""
    op, rest = node.op, list(more)
    assert isinstance(op, SelectSet)
    order = rest.pop() if op.cut else None
    B, R, H, N = score.value.shape
    group = query.shape[2] // H
    dots = _dots(query, keys) * query.shape[-1] ** -0.5
    member = torch.zeros(B, R, H, N, dtype=torch.bool)
    group_of = run.row_of(node.type.dims[1])
    for b, h, r in ((b, h, r) for b in range(B) for h in range(H) for r in range(R)):
        asked = [
            (t, g)
            for t in range(len(run.positions))
            for g in range(h * group, (h + 1) * group)
            if group_of[t] == r
        ]
        sums = {(t, g): float(rest[0][b, g, t].exp()) if rest else 0.0 for t, g in asked}
        ranked = _ranked(op, _row_of(run, node, score, (b, r, h), order))
        for step in range(-(-N // op.step)):
            part = [x.where[1] for x in ranked[step * op.step : (step + 1) * op.step]]
            member[b, r, h, part] = True
            tokens = [_tokens_of(run, op.level, e, order, op.cut) for e in part]
            tokens = [row[b if order is not None else 0] for row in tokens]
            tokens = [s for row in tokens for s in row[h * len(row) // H]]
            little = True
            for t, g in asked:
                seen = [s for s in tokens if s <= run.positions[t] or not run.graph.meta.causal]
                gain = sum(float(dots[b, t, g, s].exp()) for s in seen)
                sums[t, g] += gain
                little = little and (gain == 0 or gain < op.value * sums[t, g])
            if little:
                break
    return _chosen(member)


def _select_set(
    run: _Run,
    node: Node,
    score: Scores,
    order: Tensor | None = None,
    other: Chosen | None = None,
    inside: list[bool] | None = None,
) -> Chosen:
    """Python's own integers and sorting; one ranking a row, or one of all rows of a head."""
    op = node.op
    assert isinstance(op, SelectSet)
    B, T, H, N = score.value.shape
    member = torch.zeros(B, T, H, N, dtype=torch.bool)
    tiers = torch.full((B, T, H, N), -1)
    for b, t in ((b, t) for b in range(B) for t in range(T) if op.scope == "heads"):
        heads = [
            [(h, x) for x in _row_of(run, node, score, (b, t, h), order, inside)] for h in range(H)
        ]
        for h, x in _best_of_heads(run, op, heads, t, N):
            member[b, t, h, x.where[1]] = True
    if other and run.graph[node.inputs[1]].type.dims[1] == "1" != node.type.dims[1]:
        return _chosen(_part_of(run, node, score, other, order, inside))
    for b, t, h in itertools.product(range(B), range(T), range(H) if other else ()):
        ranked = _ranked(op, _row_of(run, node, score, (b, t, h), order, inside))
        keep = int(other.member[b, t, h * other.member.shape[2] // H].sum())
        if op.budget_in is not None:  # one entry more than so many tokens fill
            borrowed = next(
                x.op for x in run.graph.operands(node)[1:] if x.op.level == op.budget_from
            )
            keep = math.floor(Fraction(keep * borrowed.size, op.size)) + 1
        keep += 0 if op.counted else sum(x.forced for x in ranked)
        for x in ranked[:keep]:
            member[b, t, h, x.where[1]] = True
    apart = op.scope != "heads" and other is None
    for b, h in ((b, h) for b in range(B) for h in range(H) if apart):
        rows = [_row_of(run, node, score, (b, t, h), order, inside) for t in range(T)]
        if op.tiers is not None:
            for x, tier in ((x, tier) for row in rows for x, tier in _in_tiers(op, row)):
                member[b, x.where[0], h, x.where[1]] = True
                tiers[b, x.where[0], h, x.where[1]] = tier
            continue
        together = rows if op.scope != "head" else [[entry for row in rows for entry in row]]
        if op.scope == "entry":
            together = [[x for row in rows for x in row if x.where[1] == e] for e in range(N)]
        reached = {x.where for group in together for x in _reached(run, op, group, N)}
        for row in rows:
            ranked = _ranked(op, row)
            kept = [x for i, x in enumerate(ranked) if x.where in reached or i < (op.least or 0)]
            if op.most is not None:
                kept = [x for x in kept if x in ranked[: op.most]]
            for x in (*kept, *(x for x in row if x.forced)):
                member[b, x.where[0], h, x.where[1]] = True
    for b, h in ((b, h) for b in range(B) for h in range(H)):
        for t, p in enumerate(run.positions if op.tail else ()):
            own = _tail(run, op, b, p, score.there[b, t, h].tolist())
            member[b, t, h, sorted(e for e in own if inside is None or inside[e])] = True
    return _chosen(member, tiers if op.tiers else None)


def _part_of(
    run: _Run,
    node: Node,
    score: Scores,
    other: Chosen,
    order: Tensor | None,
    inside: list[bool] | None,
) -> Tensor:
    """As large a part of every row's candidates as the last rows keep of theirs, head by head."""
    op, theirs = node.op, run.graph[node.inputs[1]]
    B, T, H, N = score.value.shape
    heads = max(H, other.member.shape[2])
    member = torch.zeros(B, T, heads, N, dtype=torch.bool)
    seen = run.visible_mask(theirs.op.level, "1")[0, 0, 0].tolist()
    M = len(seen)
    for b, h in itertools.product(range(B), range(heads)):
        kept = int(other.member[b, 0, h * other.member.shape[2] // heads].sum())
        forced = _forced(run, theirs, b, 0, M)
        part = Fraction(kept, max(1, sum(x or e in forced for e, x in enumerate(seen))))
        for t in range(T):
            ranked = _ranked(op, _row_of(run, node, score, (b, t, h * H // heads), order, inside))
            own = sum(x.forced for x in ranked)
            keep = max(math.ceil(part * len(ranked)), op.least or 0)
            keep = max(keep, own) if op.counted else keep + own
            member[b, t, h, [x.where[1] for x in ranked[:keep]]] = True
    return member


def _chosen(member: Tensor, tier: Tensor | None = None) -> Chosen:
    N = member.shape[-1]
    width = int(member.sum(-1).max()) if member.numel() else 0
    entries = torch.arange(N, dtype=torch.int32).expand(member.shape)
    listed = entries.masked_fill(~member, N).sort(-1).values[..., :width]
    return Chosen(member=member, indices=listed.masked_fill(listed == N, -1), tier=tier)


def _in_tiers(op: SelectSet, row: list[_Entry]) -> list[tuple[_Entry, int]]:
    """What a row keeps, and the tier that each entry is in."""
    free = [x for x in row if op.counted or not x.forced]
    ranked = sorted(free, key=lambda x: (not x.forced, -x.score, x.where))
    one, total, before = 1 << 30, 0, 0
    masses = [round(max(x.score, 0.0) * one) if x.there else 0 for x in ranked]
    total = sum(masses)
    found = [(x, 0) for x in row if x.forced]
    for i, (x, mass) in enumerate(zip(ranked, masses, strict=True)):
        for tier, (_, part, least) in enumerate(op.tiers.steps):
            by_count = least if op.tiers.by == "mass" else max(part, least)
            if i < -(-by_count * len(ranked) // one) or (
                op.tiers.by == "mass" and before * one < part * total
            ):
                found += [] if x.forced else [(x, tier)]
                break
        before += mass
    return found


def _select_apart(
    run: _Run,
    node: Node,
    score: Scores,
    order: Tensor | None,
    others: list[Chosen],
    split: Tensor,
) -> Chosen:
    """Twice, each time with the entries of one side only: what is forced is kept where it lies."""
    N = score.value.shape[-1]
    member = torch.zeros_like(score.there)
    for b, late in itertools.product(range(len(split)), (False, True)):
        side = [(run.span(node.op.level, e)[0] >= int(split[b])) == late for e in range(N)]
        inside = torch.tensor(side)
        batch = slice(b, b + 1)
        one = Scores(value=score.value[batch], there=score.there[batch] & inside)
        cut = [Chosen(member=x.member[batch], indices=x.indices[batch]) for x in others]
        part = None if order is None else order[batch]
        member[b] |= _select_set(run, node, one, part, *cut, inside=side).member[0]
    return Chosen(member=member, indices=_indices(member))


def _best_of_heads(
    run: _Run, op: SelectSet, heads: list[list[tuple[int, _Entry]]], t: int, N: int
) -> list[tuple[int, _Entry]]:
    """Entries of all heads of one row, in one ranking."""
    found = [x for head in heads for x in head]
    ranked = sorted(found, key=lambda x: (not x[1].forced, -x[1].score, x[0], x[1].where))
    forced = [x for x in found if x[1].forced]
    if op.rule == "fraction":
        whole = len(heads) * N if op.of == "all" else len(found)
        keep = math.ceil(Fraction(math.floor(op.value * (1 << 30)), 1 << 30) * whole)
    else:
        keep = _whole_budget(run, op, t, len(heads))
    kept = ranked[: keep + (0 if op.counted else len(forced))]
    return [*kept, *(forced if op.rule == "fraction" else [])]


def _whole_budget(run: _Run, op: SelectSet, t: int, heads: int) -> int:
    """Entries of some heads together, by their number or by the tokens that they fill."""
    if op.rule == "top_k":
        return heads * int(op.value)
    p = run.positions[t]
    seen = max(1, min(p + 1, run.keys) if run.graph.meta.causal else run.keys)
    of_one = Fraction(seen, op.parts) if op.parts else Fraction(op.size)
    return max(1, round(heads * int(op.value) / of_one))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    where: tuple[int, int]  # row, entry
    score: float
    forced: bool
    there: bool


def _unlike(run: _Run, op: Unlike, query: Tensor, keys: Tensor) -> Tensor:
    """Pair after pair of tokens of each entry, and of the rows that choose together."""
    keys = keys - keys.mean(1, keepdim=True) if op.centred else keys
    B, S, G = keys.shape[0], keys.shape[1], query.shape[2] // keys.shape[2]

    def apart(x: Tensor) -> bool:
        pairs = [
            torch.nn.functional.cosine_similarity(y, z, dim=0, eps=1e-300).item()
            for y in x
            for z in x
        ]
        return sum(pairs) / len(pairs) <= op.similarity

    entries = [range(e * op.size, min(e * op.size + op.size, S)) for e in range(-(-S // op.size))]
    named = [p // op.block for p in run.positions]
    rows = [[t for t, own in enumerate(named) if own == name] for name in sorted(set(named))]
    found = torch.zeros(B, len(rows), query.shape[2], len(entries), dtype=torch.bool)
    for b, h in itertools.product(range(B), range(query.shape[2])):
        of_keys = [apart(keys[b, list(tokens), h // G]) for tokens in entries]
        for r, asked in enumerate(rows):
            of_rows = apart(query[b, asked, h])
            found[b, r, h] = torch.tensor([of_rows or of_key for of_key in of_keys])
    return found


def _row_of(
    run: _Run,
    node: Node,
    score: Scores,
    at: tuple[int, int, int],
    order: Tensor | None = None,
    inside: list[bool] | None = None,
) -> list[_Entry]:
    """The candidates of one row."""
    op = node.op
    assert isinstance(op, SelectSet)
    values, there = score.value[at].tolist(), score.there[at].tolist()
    b, row, _ = at
    tail = _tail(run, op, b, run.positions[row], there) if op.tail else set()
    forced = _forced(run, node, b, row, len(values)) - tail
    last = run.span_of(node.type.dims[1], row)[1]
    forced |= _sinks(run, node, order, (b, at[2], score.value.shape[2]), last)
    if op.where:
        (unlike,) = (x.name for x in run.graph.operands(node) if isinstance(x.op, Unlike))
        forced |= {e for e, seen in enumerate(there) if seen and run.values[unlike][at][e]}
    return [
        _Entry(where=(at[1], e), score=x if there[e] else -math.inf, forced=e in forced, there=seen)
        for e, (x, seen) in enumerate(zip(values, there, strict=True))
        if (seen or e in forced) and (inside is None or inside[e])
    ]


def _ranked(op: SelectSet, entries: list[_Entry]) -> list[_Entry]:
    if op.of == "rest":
        return sorted((x for x in entries if not x.forced), key=lambda x: (-x.score, x.where))
    if op.rule == "top_p" and not op.counted:
        entries = [x for x in entries if x.there]
        return sorted(entries, key=lambda x: (-x.score, x.where))
    return sorted(entries, key=lambda x: (not x.forced, -x.score, x.where))


def _reached(run: _Run, op: SelectSet, entries: list[_Entry], all_entries: int) -> list[_Entry]:
    ranked = _ranked(op, entries)
    if op.rule in ("tokens", "top_k"):
        keep = _whole_budget(run, op, entries[0].where[0], 1) if entries else 0
        return ranked[: keep + (0 if op.counted else sum(x.forced for x in entries))]
    if op.rule == "threshold":
        return [x for x in ranked if x.score > op.value]
    one = 1 << 30
    up = op.rule == "top_p" and op.boundary == "drop"  # against how the product is rounded
    part = math.ceil(op.value * one) if up else math.floor(op.value * one)
    if op.rule == "fraction":
        whole = all_entries if op.of == "all" else len(entries)
        keep = -(-part * whole // one)
        return ranked[: keep + (0 if op.counted else sum(x.forced for x in entries))]
    masses = [round(max(x.score, 0.0) * one) for x in ranked]
    goal, sums, kept = part * sum(masses), 0, []
    for x, mass in zip(ranked, masses, strict=True):
        if sums * one < goal if op.boundary == "keep" else (sums + mass) * one <= goal:
            kept.append(x)
        sums += mass
    return kept


def _attend(
    run: _Run, node: Node, query: Tensor, keys: Tensor, values: Tensor, *more: Value
) -> Attended:
    op = node.op
    assert isinstance(op, Attend)
    query = query[:, run.row_of(run.graph[node.inputs[0]].type.dims[1])]
    *more, sink = more if op.sink else (*more, None)
    rest = list(more)
    if op.row_cut:  # as `_by_rows` finds it
        rest.pop()
    order = rest.pop() if op.cut else None
    far = rest.pop() if op.near is not None else None
    bias = rest.pop() if op.biased else None
    weighed = rest.pop() if op.spans else None
    (chosen,) = rest or (None,)
    if chosen is not None:
        chosen = _by_rows(run, node.inputs[3], chosen)
    values = _values(run, op, values)
    if op.over == "tiers":
        parts = _tier_parts(run, node, keys, values, chosen, order)
    elif op.over == "pooled":
        part = _pooled_part(run, node, keys, values, chosen, order)
        parts = {(*node.inputs[1:3], op.counted): part}
    else:
        seen = _seen_tokens(run, op, keys, chosen, order, query.shape[2])
        bias = bias.transpose(1, 2)[:, None] if op.biased else None
        part = _Part(k=keys, v=values, seen=seen, bias=bias)
        parts = {(*node.inputs[1:3], op.biased): part}
        if far is not None:
            token, row = torch.arange(keys.shape[1]), torch.tensor(run.positions)[:, None]
            near = ((row - token).abs() < op.near)[None, :, None]
            away = replace(part, k=far, seen=seen & ~near)
            parts = {"near": replace(part, seen=seen & near), "far": away}
    way = _on_way(run, node)
    whole = [_spread(part.seen, query.shape[2]) for part in parts.values()]
    for source, part in parts.items():
        seen = _spread(part.seen.expand(query.shape[0], -1, -1, -1), query.shape[2]).clone()
        for t, p in enumerate(run.positions if op.rows else ()):
            own = [y[:, t, :, p] for y in whole] if p >= 0 else [torch.tensor(False)]
            seen[:, t] &= torch.stack(own).any(0)[..., None]
        parts[source] = replace(part, seen=seen if way is None else seen & way)
    if op.spans:
        return _spans(run, op, query, next(iter(parts.items())), (chosen, weighed, way), sink)
    if op.softmax:
        return _entry_by_entry(run, op, query, parts, (chosen, order), sink)
    return _softmax(op, query, parts, sink)


def _entry_by_entry(
    run: _Run,
    op: Attend,
    query: Tensor,
    parts: dict,
    choice: tuple[Chosen, Tensor | None],
    sink: Tensor | None,
) -> Attended:
    """A softmax for each chosen entry, and the mean of those that are not empty."""
    chosen, order = choice
    heads, o, many = query.shape[2], 0.0, 0.0
    keys = next(iter(parts.values())).k
    for e in range(chosen.member.shape[-1]):
        alone = torch.zeros_like(chosen.member)
        alone[..., e] = chosen.member[..., e]
        mine = _seen_tokens(run, op, keys, replace(chosen, member=alone), order, heads)
        mine = _spread(mine, heads)
        each = {name: replace(part, seen=part.seen & mine) for name, part in parts.items()}
        some = torch.stack([part.seen.any(-1) for part in each.values()]).any(0).double()
        part = _softmax(op, query, each, sink)
        o = o + part.o * some[..., None]
        many = many + some
    both = _softmax(op, query, parts, sink)
    return Attended(o=o / many.clamp(min=1)[..., None], lse=both.lse, parts=both.parts)


def _from_changes(op: Delta, keys: Tensor) -> Tensor:
    """Token after token, channel by channel."""
    found = keys.clone()
    for b, s, h, d in itertools.product(*map(range, keys.shape)):
        if s == 0:
            continue
        before = (found if op.against == "kept" else keys)[b, s - 1, h, d]
        change = keys[b, s, h, d] - before
        found[b, s, h, d] = found[b, s - 1, h, d] + (change if abs(change) > op.threshold else 0.0)
    return found


def _spans(
    run: _Run,
    op: Attend,
    query: Tensor,
    source: tuple[tuple, _Part],
    choice: tuple[Chosen, Scores, Tensor | None],
    sink: Tensor | None,
) -> Attended:
    """Anchor by anchor: where some row and head has chosen it, its span, with a softmax of its own."""
    name, keys = source
    chosen, scores, way = choice
    spans, heads = op.spans, query.shape[2]
    member = _spread(chosen.member, heads)
    member = member if way is None else member & way
    logits = _spread(scores.value.masked_fill(~chosen.member, -math.inf), heads)
    weights = logits.softmax(-1).nan_to_num(0.0)
    alone = ~member.any(-1, keepdim=True) if way is None else ~member.any(-1, keepdim=True) & way
    on = torch.cat((member, alone), -1)  # rows without an anchor have their window
    weights = torch.cat((weights, alone.double()), -1)
    union, o = torch.zeros(*query.shape[:3], keys.k.shape[1], dtype=torch.bool), 0.0
    for e in range(on.shape[-1]):
        seen = torch.zeros_like(union)
        for t, p in enumerate(run.positions):
            behind = anchors_behind(spans.anchors, p)
            shown = {s for s in range(keys.k.shape[1]) if p - spans.window < s <= p}
            if e < len(behind):
                reach = math.ceil(round(spans.factor * (p + 1) ** spans.power * 2**20) / 2**20)
                shown |= set(range(max(0, behind[e] - reach), behind[e] + 1))
            seen[:, t, :, sorted(shown)] = on[:, t, :, e, None]
        part = _softmax(op, query, {name: replace(keys, seen=seen)}, sink)
        o = o + weights[..., e, None] * part.o
        union = union | seen
    both = _softmax(op, query, {name: replace(keys, seen=union)}, sink)
    return Attended(o=o, lse=both.lse, parts=both.parts)


def _by_rows(run: _Run, name: str, chosen: Chosen) -> Chosen:
    """A selection row by row, whichever rows choose together."""
    node = run.graph[name]
    pools = [x for x in run.graph.nodes() if isinstance(x.op, PoolRows) and x.op.cut]
    pools = [x for x in pools if x.op.level == getattr(node.op, "level", None)]
    if not pools:
        row = run.row_of(node.type.dims[1])
        tier = None if chosen.tier is None else chosen.tier[:, row]
        return Chosen(member=chosen.member[:, row], indices=chosen.indices[:, row], tier=tier)
    groups = run.values[pools[0].inputs[1]]
    tier = None if chosen.tier is None else _of_rows(chosen.tier, groups)
    return Chosen(
        member=_of_rows(chosen.member, groups), indices=_of_rows(chosen.indices, groups), tier=tier
    )


def _values(run: _Run, op: Attend, values: Tensor) -> Tensor:
    return values[..., : run.graph.sizes["Dv"]] if op.latent else values


def _pooled_part(
    run: _Run,
    node: Node,
    keys: Tensor,
    values: Tensor,
    chosen: Chosen | None,
    order: Tensor | None,
) -> _Part:
    """All entries that are complete, or those of them that are selected, or that are not."""
    op, pool = node.op, run.graph[node.inputs[1]]
    seen = run.complete_mask(pool.op.level)
    while not isinstance(pool.op, Pool):  # normed or turned
        pool = run.graph[pool.inputs[0]]
    cut = pool.op.cut
    counts = _counts(run, pool.op.level, run.values[pool.inputs[-1]] if cut else None, cut)
    if op.which == "skipped":
        there = _spread(counts > 0, max(counts.shape[2], chosen.member.shape[2]))
        seen = seen & ~chosen.member & there
    elif chosen is None and cut is not None:
        seen = seen & (counts > 0)
    elif chosen is not None:
        seen = seen & chosen.member
    bias = _log_counts(run, pool.op.level, order, op.cut) if op.counted else None
    return _Part(k=keys, v=values, seen=seen, bias=bias)


def _tier_parts(
    run: _Run,
    node: Node,
    keys: Tensor,
    values: Tensor,
    chosen: Chosen,
    order: Tensor | None,
) -> dict[tuple, _Part]:
    """Token by token where a tier merges nothing; means of tokens in a row elsewhere."""
    op = node.op
    level = next(x.op.level for x in run.graph.operands(node) if isinstance(x.op, SelectSet))
    B, _, H, _ = keys.shape
    heads = run.graph.sizes["Hq"]
    parts = {}
    for i, merge in enumerate(op.merges):
        mine = Chosen(member=chosen.tier == i, indices=chosen.indices)
        if merge == 1:
            seen = _seen_tokens(run, op, keys, mine, order, heads)
            parts[*node.inputs[1:3], None] = _Part(k=keys, v=values, seen=seen)
            continue
        k, v, sees, counts = [], [], [], []
        for e in range(run.entries(level)):
            where = _tokens_of(run, level, e, order, op.cut)
            for c in range(-(-op.size // merge)):
                pieces = [[h[c * merge : (c + 1) * merge] for h in row] for row in where]
                pieces = [[row[min(h, len(row) - 1)] for h in range(H)] for row in pieces]
                pieces = [pieces[min(b, len(pieces) - 1)] for b in range(B)]
                k.append(_means(keys, pieces))
                v.append(_means(values, pieces))
                counts.append([[len(x) for x in row] for row in pieces])
                whole = [
                    [[bool(x) and (max(x) <= p or not run.graph.meta.causal) for x in row] for row in pieces]
                    for p in run.positions
                ]  # fmt: skip
                member = _spread(mine.member, heads)[..., e]  # [B, T, Hq]
                there = torch.tensor(whole).transpose(0, 1)  # [B, T, H]
                sees.append(member & there.repeat_interleave(heads // H, 2))
        bias = torch.tensor(counts).clamp(min=1).double().log().permute(1, 2, 0).unsqueeze(1)
        parts[level, merge, op.counted] = _Part(
            k=torch.stack(k, 1),
            v=torch.stack(v, 1),
            seen=torch.stack(sees, -1),
            bias=bias if op.counted else None,
        )
    return parts


def _means(x: Tensor, where: list[list[list[int]]]) -> Tensor:
    """[B, S, H, D] -> [B, H, D]"""
    rows = [
        torch.stack([x[b, w, h].mean(0) if w else torch.zeros_like(x[b, 0, h]) for h, w in enumerate(row)])
        for b, row in enumerate(where)
    ]  # fmt: skip
    return torch.stack(rows)


def _seen_tokens(
    run: _Run, op: Attend, keys: Tensor, chosen: Chosen | None, order: Tensor | None, heads: int
) -> Tensor:
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
    if op.cut in ("nodes", "runs"):
        return _held(order, chosen.member, heads) & visible
    if op.cut is not None:
        return _seen_in_order(op, _spread(chosen.member, heads), order) & visible
    if op.parts is not None:
        return _seen_in_parts(run, op, chosen.member, keys.shape[1]) & visible
    covered = torch.zeros(*chosen.member.shape[:3], keys.shape[1], dtype=torch.bool)
    if op.diagonal:
        for t, p in enumerate(run.positions):
            for s in range(p + 1):
                covered[:, t, :, s] = chosen.member[:, t, :, p // op.size - s // op.size]
        return covered & visible
    for e in range(chosen.member.shape[-1]):
        start = e * op.stride - (op.before or 0)
        covered[..., max(0, start) : start + op.size] |= chosen.member[..., e, None]
    return covered & visible


def _seen_in_parts(run: _Run, op: Attend, member: Tensor, S: int) -> Tensor:
    """Tokens whose middle lies in a chosen part of what the row sees; on a border, the lower one."""
    seen = torch.zeros(*member.shape[:3], S, dtype=torch.bool)
    for t, p in enumerate(run.positions):
        n = min(p + 1, S) if run.graph.meta.causal else S
        for j in range(n):
            part = math.ceil(Fraction(2 * j + 1, 2 * n) * op.parts) - 1
            seen[:, t, :, j] = member[:, t, :, part]
    return seen


def _seen_in_order(op: Attend, member: Tensor, order: Tensor) -> Tensor:
    """Tokens of chosen entries, wherever they stand.  bool[B, T, Hq, S]"""
    B, S, H = order.shape
    seen = torch.zeros(*member.shape[:3], S, dtype=torch.bool)
    group = member.shape[2] // H
    for b, h, i in ((b, h, i) for b in range(B) for h in range(H) for i in range(S)):
        entry, token = (i // op.size, int(order[b, i, h])) if op.size else (int(order[b, i, h]), i)
        if token >= 0:
            heads = slice(h * group, (h + 1) * group)
            seen[b, :, heads, token] = member[b, :, heads, entry]
    return seen


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """Keys under one softmax: [B, N, Hkv, D], [B, N, Hkv, Dv], bool[B, T, Hq, N], [B or 1, 1, H, N]."""

    k: Tensor
    v: Tensor
    seen: Tensor
    bias: Tensor | None = None


def _softmax(
    op: Attend, query: Tensor, parts: Mapping[tuple, _Part], sink: Tensor | None
) -> Attended:
    """One softmax over parts; a row that sees nothing: 0 and -inf."""
    scale = query.shape[-1] ** -0.5 if op.scale is None else op.scale
    logits = []
    for part in parts.values():
        logit = _dots(query, part.k) * scale
        if op.softcap is not None:
            logit = op.softcap * torch.tanh(logit / op.softcap)
        if part.bias is not None:
            logit = logit + _spread(part.bias, logit.shape[2])
        logits.append(logit.masked_fill(~part.seen, -math.inf))
    lse = torch.cat(logits, -1).logsumexp(-1)  # [B, T, Hq]
    total = lse if sink is None else torch.logaddexp(lse, sink)
    o = 0.0
    for logit, part in zip(logits, parts.values(), strict=True):
        weights = (logit - total.unsqueeze(-1)).exp().nan_to_num(0.0)
        values = part.v.repeat_interleave(query.shape[2] // part.v.shape[2], 2)
        o = o + torch.einsum("bthn,bnhd->bthd", weights, values)
    return Attended(o=o, lse=lse.transpose(1, 2), parts=parts)


def _union(run: _Run, node: Node) -> Attended:
    """Branches over the same keys see what either sees."""
    assert isinstance(node.op, Union)
    merged: dict[tuple, _Part] = {}
    operands = run.graph.operands(node)
    attends = operands[:-1] if node.op.sink else operands
    sink = run.values[operands[-1].name] if node.op.sink else None
    for attend in attends:
        for source, part in run.values[attend.name].parts.items():
            seen = merged[source].seen | part.seen if source in merged else part.seen
            merged[source] = replace(part, seen=seen)
    query = run.values[attends[0].inputs[0]]
    return _softmax(attends[0].op, query, merged, sink)


# --- calls after calls, and losses


def _turn(turns: Turns, calls: int) -> int:
    """0 of a dense call, 1 of a fresh one, 2 of one that shares: letters, written out."""
    letters = "D" * turns.dense + "F" * turns.lead
    while len(letters) <= calls:
        if turns.pattern is not None:
            letters += turns.pattern
        elif turns.every is not None:
            letters += "F" + "S" * (turns.every - 1)
        else:
            letters += "F" + "S" * calls
    return "DFS".index(letters[calls])


def _recall(run: _Run, node: Node, operands: list[Value]) -> Chosen:
    """The set of the turn; kept entries that a row cannot have seen are dropped."""
    op = node.op
    if op.width is None:
        *sets, calls = operands
        which = op.takes[_turn(op.turns, int(calls))]
    else:
        sets, which = operands, "kept"
    begun = [
        [e * op.stride <= p or not run.graph.meta.causal for e in range(run.entries(op.level))]
        for p in run.positions
    ]
    seen = torch.tensor(begun)[None, :, None]
    if which == "own":
        row = run.row_of(run.graph[node.inputs[0]].type.dims[1])
        return Chosen(member=sets[0].member[:, row], indices=sets[0].indices[:, row])
    if which == "all":
        first = sets[0]
        heads = first.member.shape[2] if isinstance(first, Chosen) else first.shape[2]
        member = seen.expand(run.tensors["q"].shape[0], -1, heads, -1)
        return Chosen(member=member, indices=_indices(member))
    kept = sets[-1].long()
    member = torch.zeros(*kept.shape[:3], run.entries(op.level), dtype=torch.bool)
    for e in range(member.shape[-1]):
        member[..., e] = (kept == e).any(-1)
    member = member & seen
    return Chosen(member=member, indices=_indices(member, kept.shape[-1]))


def _indices(member: Tensor, width: int | None = None) -> Tensor:
    """Ascending, -1 padded."""
    N = member.shape[-1]
    width = int(member.sum(-1).max()) if width is None else width
    entries = torch.arange(N, dtype=torch.int32).expand(member.shape)
    listed = entries.masked_fill(~member, N).sort(-1).values
    listed = torch.nn.functional.pad(listed, (0, max(0, width - N)), value=N)[..., :width]
    return listed.masked_fill(listed == N, -1)


def _carry(op: Carry, score: Scores, kept: Tensor, calls: Tensor) -> Scores:
    if _turn(op.turns, int(calls)) != 2:
        return score
    if op.how == "keep":
        return Scores(value=kept, there=kept > -math.inf)
    return Scores(value=score.value + kept.nan_to_num(neginf=0.0), there=score.there)


def _divergence(
    run: _Run,
    node: Node,
    score: Scores,
    query: Tensor,
    keys: Tensor,
    chosen: Chosen | None = None,
) -> Tensor:
    """Row after row, or block after block of rows."""
    op = node.op
    assert isinstance(op, Divergence)
    scale = query.shape[-1] ** -0.5 if op.scale is None else op.scale
    logits = _dots(query, keys) * scale
    B, T, H, N = score.value.shape
    together = {"sum": torch.sum, "max": torch.amax}
    found = []
    row_of = run.row_of(run.graph[node.inputs[0]].type.dims[1])
    asked = [[t for t, row in enumerate(row_of) if row == i] for i in range(T)]
    for b, t, h in ((b, t, h) for b in range(B) for t in range(T) for h in range(H)):
        heads = query.shape[2] // H
        masses = torch.zeros(len(asked[t]), heads, run.keys, dtype=logits.dtype)
        for i, row in enumerate(asked[t]):
            seen = run.positions[row] + 1 if run.graph.meta.causal else run.keys
            if seen > 0:
                near = logits[b, row, h * heads : (h + 1) * heads, :seen]
                masses[i, :, :seen] = near.softmax(-1)
        p = together[op.heads](masses, 1)  # [rows, S]
        inside = (
            score.there[b, t, h]
            if chosen is None
            else score.there[b, t, h] & chosen.member[b, t, h]
        )
        which = [e for e in range(N) if inside[e]]
        target = [p[:, e * op.stride : e * op.stride + op.size] for e in which]
        target = [together[op.tokens](x, 1) for x in target if x.shape[1]]
        target = [together[op.rows or "sum"](x, 0) for x in target]
        if not target or sum(target) == 0:
            continue
        target = torch.stack(target) / sum(target)
        values = score.value[b, t, h, which]
        learnt = values / values.sum() if op.masses else values.softmax(-1)
        found.append((target * (target / learnt).log()).nan_to_num(0.0).sum())
    return torch.stack(found).mean() if found else torch.zeros((), dtype=torch.float64)


def _distance(op: Distance, student: Attended | Tensor, teacher: Attended | Tensor) -> Tensor:
    a, b = (x if isinstance(x, Tensor) else x.o for x in (student, teacher))
    d = (a - b).abs()
    each = d * d if op.form == "mse" else torch.where(d < 1, d * d / 2, d - 0.5)
    return each.mean() * (2 if op.toward == "both" else 1)
