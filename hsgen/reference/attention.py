"""Branches: what each row sees of which keys, softmax, and how branches are combined."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hsgen.reference.choice import ONE, fixed
from hsgen.reference.deltas import from_changes
from hsgen.reference.entries import complete_entries, kept_entries, own_seen, token_mask
from hsgen.reference.grids import grid_mask
from hsgen.reference.inputs import named
from hsgen.reference.partitions import anchors
from hsgen.reference.pyramids import log_counts, log_of, means_of
from hsgen.reference.queries import of_rows, pooled_queries, together
from hsgen.reference.routes import on_way
from hsgen.reference.rows import Rows, Scored, spread
from hsgen.reference.scores import dot, softmax
from hsgen.spec import Attend, Combine, Spans, Static, Stripes


def what_is_seen(rows: Rows, levels: dict[str, Scored]) -> dict[str, Keys]:
    """By branch, the keys that it attends to, and which of them each row sees."""
    return {branch.name: _taken(rows, branch, levels) for branch in rows.spec.attend}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Combined:
    """o: [T, Hq, Dv]; lse: [T, Hq] by branch; outputs: [T, Hq, Dv] by branch, times its gate."""

    o: Tensor
    lse: dict[str, Tensor]
    outputs: dict[str, Tensor]


def attend_all(rows: Rows, branches: dict[str, Keys]) -> Combined:
    """Every branch, combined.

    A sink is in no log-sum-exp: o is what it would be without, times sigmoid(lse - sink).
    """
    combine = rows.spec.combine or Combine()
    combined = _combined(rows, combine, branches)
    if combine.output_gate:
        # bits of a sigmoid in single precision differ by strides
        gate = rows.x["output_gate"].contiguous().sigmoid()
        gate = gate if combine.output_gate == "channel" else gate.unsqueeze(-1)
        return replace(combined, o=combined.o * gate)
    return combined


def _combined(rows: Rows, combine: Combine, branches: dict[str, Keys]) -> Combined:
    q = rows.x["q"]
    if combine.softmax:
        sink = rows.x["sink"] if combine.sink else None
        parts = [part for keys in branches.values() for part in _parts(keys)]
        o, lse = _attention(q, _union(parts), rows.spec.attend[0], sink)
        return Combined(o=o, lse={"o": lse}, outputs={})
    attended = {
        branch.name: (_weighed if branch.spans or branch.softmax else _attend_alone)(
            rows, branches, branch
        )
        for branch in rows.spec.attend
    }
    outputs = {name: o for name, (o, _) in attended.items()}
    lse = {name: lse for name, (_, lse) in attended.items()}
    if combine.gates:
        gates = rows.x["gates"].unbind(2 if combine.gates == "channel" else -1)
        outputs = {
            name: o * (gate if combine.gates == "channel" else gate[..., None])
            for (name, o), gate in zip(outputs.items(), gates, strict=True)
        }
    first = next(iter(outputs.values()))
    if combine.streams or len(outputs) == 1:
        return Combined(o=first, lse=lse, outputs=outputs)
    if not combine.gates:  # a head is on the way of one, and sees nothing on the others
        lse = {"o": torch.stack([*lse.values()], -1).amax(-1)}
    return Combined(o=torch.stack([*outputs.values()], -1).sum(-1), lse=lse, outputs=outputs)


def _queries(rows: Rows, branch: Attend) -> Tensor:
    """What a branch attends by: each row's own query, or the one of its rows together.  [T, Hq, D]"""
    q = rows.x["q"]
    if branch.query is None:
        return q
    level = rows.spec.level(branch.over or "")
    clusters = rows.clusters.get(level.name)
    groups = together(rows.spec.rows_of(level), rows.p, rows.lengths, clusters)
    return of_rows(pooled_queries(level, q, groups, rows.Hkv), groups)


def _sink_of(rows: Rows, branch: Attend) -> Tensor | None:
    return rows.x[f"{branch.name}_sink"] if branch.sink else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Keys:
    """What a branch attends to: `source` names the keys, visible: bool[T, H, S].

    raw: Whether keys are the caller's tokens, in the caller's order.
    more: Other keys under the same softmax.
    weighed: bool[T, H, S] and [T, H], softmaxes of their own and the weight of each output.
    """

    source: str
    raw: bool
    k: Tensor
    v: Tensor
    visible: Tensor
    bias: Tensor | None = None  # [S, Hkv], added to logits
    more: tuple[Keys, ...] = ()
    far: tuple[Tensor, Tensor] | None = None  # other keys, and where they are read: bool[T, 1, S]
    weighed: tuple[tuple[Tensor, Tensor], ...] = ()


def sum_of_branch(rows: Rows, name: str) -> Tensor:
    """The log-sum-exp of a branch that chooses by position alone.  -> [T, Hq]"""
    branch = next(branch for branch in rows.spec.attend if branch.name == name)
    return _attention(rows.x["q"], [_taken(rows, branch, {})], branch, None)[1]


def _parts(keys: Keys) -> list[Keys]:
    return [keys, *keys.more]


def _taken(rows: Rows, branch: Attend, levels: dict[str, Scored]) -> Keys:
    """The same for heads that take a way on which the branch is; the others see nothing."""
    keys = _branch(rows, branch, levels)
    way = on_way(rows.spec, rows.taken, branch.when)
    if way is None:
        return keys

    def on(visible: Tensor) -> Tensor:
        return spread(visible, len(way)) & way[:, None]

    more = tuple(replace(x, visible=on(x.visible)) for x in keys.more)
    weighed = tuple((on(visible), weight) for visible, weight in keys.weighed)
    return replace(keys, visible=on(keys.visible), more=more, weighed=weighed)


def _branch(rows: Rows, branch: Attend, levels: dict[str, Scored]) -> Keys:
    """The keys of one branch, and which of them each row sees."""
    if branch.over and branch.values == "pooled":
        level, keys = levels[branch.over], rows.pooled[branch.over]
        complete = complete_entries(rows, rows.spec.level(branch.over))
        visible = complete[:, None] & level.candidates
        if level.chosen is not None:
            visible = visible & (~level.chosen if branch.which == "skipped" else level.chosen)
        v = _latent(rows, keys["key"]) if branch.storage else keys["value"]
        bias = log_counts(rows.layouts[branch.over], v) if branch.bias else None
        source = f"{branch.over} {branch.bias or ''}"
        return Keys(source=source, raw=False, k=keys["key"], v=v, visible=visible, bias=bias)
    k = rows.x[named("k", branch.kv)]
    v = _latent(rows, k) if branch.storage else rows.x[named("v", branch.kv)]
    distance = (rows.p[:, None] - torch.arange(len(k), device=k.device)).unsqueeze(1)  # [T, 1, S]
    visible = distance >= 0 if rows.spec.causal else torch.ones_like(distance, dtype=torch.bool)
    if branch.static:
        near = _static_mask(branch.static, rows.p, len(k), rows.x["q"].shape[1], rows.spec.causal)
        if branch.static.grid:
            near = near | grid_mask(rows.spec, branch.static.grid, rows.p, len(k))[:, None]
        visible = visible & near
    elif branch.window:
        visible = visible if branch.window == "all" else visible & (distance.abs() < branch.window)
    else:
        assert branch.over is not None, f"branch {branch.name} attends to nothing"
        if branch.values == "tiers":
            return _tiers(rows, branch, levels[branch.over], k, v, visible)
        if branch.spans is not None:
            return _spans(rows, branch, levels[branch.over], k, v)
        visible = visible & _tokens_of_level(rows, branch.over, levels, len(k))
    if branch.rows:
        visible = visible & own_seen(visible, rows.p)
    bias = rows.x["bias"] if branch.bias == "learned" else None
    source = f"raw {branch.kv or ''} {branch.storage or ''} {branch.bias or ''}"
    far = None
    if branch.delta:
        far = from_changes(branch.delta, k), distance.abs() >= branch.delta.window
    keys = Keys(source=source, raw=True, k=k, v=v, visible=visible, bias=bias, far=far)
    if branch.softmax is None:
        return keys
    assert branch.over is not None, f"branch {branch.name} attends no entries"
    return replace(keys, weighed=_by_entry(rows, branch.over, levels, visible))


def _by_entry(
    rows: Rows, name: str, levels: dict[str, Scored], visible: Tensor
) -> tuple[tuple[Tensor, Tensor], ...]:
    """What each row sees of every entry that it chose, those that it sees something of alike."""
    level, chosen = rows.spec.level(name), levels[name].chosen
    assert chosen is not None, f"{name} is attended raw and must select"
    entry = torch.arange(chosen.shape[-1], device=chosen.device)
    seen = [visible & token_mask(rows, level, chosen & (entry == e)) for e in entry]
    some = [each.any(-1).double() for each in seen]
    many = sum(some, torch.zeros_like(visible.any(-1), dtype=torch.double)).clamp(min=1)
    return tuple((each, one / many) for each, one in zip(seen, some, strict=True))


def _latent(rows: Rows, k: Tensor) -> Tensor:
    """The first v channels of every key, which are its value.  [S, H, D] -> [S, H, Dv]"""
    assert rows.spec.head_dim is not None, "head_dim must be bound"
    return k[..., : rows.spec.head_dim.v]


def _tokens_of_level(rows: Rows, name: str, levels: dict[str, Scored], S: int) -> Tensor:
    """Tokens of what a branch over a level attends: its choice, or as the call's turn has it."""
    level, taken = rows.spec.level(name), rows.reused.get(name)
    if taken and taken.attends_all:
        return torch.ones(1, 1, S, dtype=torch.bool, device=rows.p.device)
    chosen = levels[name].chosen
    if taken and taken.attends_kept:
        chosen = kept_entries(rows, level)
    assert chosen is not None, f"{name} is attended raw and must select"
    return token_mask(rows, level, chosen)


def _tiers(
    rows: Rows, branch: Attend, scored: Scored, k: Tensor, v: Tensor, visible: Tensor
) -> Keys:
    """The entries of each tier, token by token or as means."""
    level = rows.spec.level(branch.over or "")
    assert level.select is not None
    assert level.select.quota is not None
    assert scored.tiers is not None, f"{branch.over} is attended by tiers and must have quotas"
    nothing = torch.zeros_like(visible)
    source = f"raw {branch.kv or ''} {branch.storage or ''} "
    raw = Keys(source=source, raw=True, k=k, v=v, visible=nothing)
    more: list[Keys] = []
    for i, tier in enumerate(level.select.quota):
        if tier.merge == 1:
            seen = visible & token_mask(rows, level, scored.tiers == i)
            raw = replace(raw, visible=seen)
            continue
        means = means_of(rows, level, tier.merge, scored.tiers == i, k, v)
        bias = log_of(means.count, k) if branch.bias else None
        source = f"{branch.over} by {tier.merge} {branch.bias or ''} {branch.kv or ''}"
        more.append(
            Keys(source=source, raw=False, k=means.k, v=means.v, visible=means.visible, bias=bias)
        )
    return replace(raw, more=tuple(more))


def _spans(rows: Rows, branch: Attend, level: Scored, k: Tensor, v: Tensor) -> Keys:
    """The span before each chosen anchor and the window, each with the weight of its anchor."""
    spans, stripes = branch.spans, rows.spec.level(branch.over or "").partition
    assert spans is not None
    assert isinstance(stripes, Stripes)
    assert level.chosen is not None
    token = torch.arange(len(k), device=k.device)
    p = rows.p[:, None]
    near = ((token <= p) & (token > p - spans.window))[:, None]  # [T, 1, S]
    anchor, _ = anchors(stripes, rows.p, rows.S)
    reach = torch.tensor([_reach(spans, t) for t in rows.p.tolist()], device=k.device)
    weight, _ = softmax(level.scores, level.chosen)  # [T, Hs, N]
    lone = ~level.chosen.any(-1)  # a row without an anchor
    weighed = [(near.expand(-1, level.chosen.shape[1], -1), lone.to(weight.dtype))]
    union = near
    for j in range(anchor.shape[1]):
        at = anchor[:, j, None]
        span = ((token <= at) & (token >= at - reach[:, None]))[:, None] | near
        taken = level.chosen[..., j, None]
        weighed.append((span & taken, weight[..., j]))
        union = union | (span & taken)
    return Keys(
        source=f"spans {branch.name}",
        raw=True,
        k=k,
        v=v,
        visible=union,
        bias=rows.x["bias"] if branch.bias else None,
        weighed=tuple(weighed),
    )


def _reach(spans: Spans, p: int) -> int:
    """How far a span reaches before its anchor; float64, to the nearest 2^-20, then rounded up."""
    return math.ceil(round(spans.factor * max(p + 1, 0) ** spans.power * (1 << 20)) / (1 << 20))


def _attend_alone(rows: Rows, branches: dict[str, Keys], branch: Attend) -> tuple[Tensor, Tensor]:
    q, keys = _queries(rows, branch), _parts(branches[branch.name])
    return _attention(q, keys, branch, _sink_of(rows, branch))


def _weighed(rows: Rows, branches: dict[str, Keys], branch: Attend) -> tuple[Tensor, Tensor]:
    """The mean of outputs, each of a softmax of its own; the log-sum-exp is of all that is seen."""
    q, keys, sink = rows.x["q"], branches[branch.name], _sink_of(rows, branch)
    o = q.new_zeros(*q.shape[:2], keys.v.shape[-1])
    for visible, weight in keys.weighed:
        part, _ = _attention(q, [replace(keys, visible=visible)], branch, sink)
        o = o + spread(weight[..., None], q.shape[1]) * part
    return o, _attention(q, [keys], branch, sink)[1]


def _static_mask(static: Static, p: Tensor, S: int, Hq: int, causal: bool) -> Tensor:
    """Which tokens a static pattern shows to each row and head.  p: [T] -> bool[T, Hq, S]"""
    unit = torch.arange(S, device=p.device) // static.blocks
    head = torch.arange(Hq, device=p.device)[:, None]
    d = (p // static.blocks)[:, None, None] - unit
    if not causal:
        d = d.abs()
    seen = torch.zeros(len(p), Hq, S, dtype=torch.bool, device=p.device)
    windows, sinks = _spans_of_heads(static, Hq, -(-S // static.blocks))
    for h, (window, sink) in enumerate(zip(windows, sinks, strict=True)):
        near = (
            (d[:, 0] >= 0) & (d[:, 0] < window * static.dilation) & (d[:, 0] % static.dilation == 0)
        )
        seen[:, h] = near | (unit < sink)
    if static.stride is not None:
        seen = seen | ((unit + 1 + static.shift * head) % static.stride == 0)
    if static.power_of_two:
        seen = seen | ((d >= 0) & (d & (d - 1) == 0))
    return seen


def _spans_of_heads(static: Static, Hq: int, N: int) -> tuple[list[int], list[int]]:
    """Window and sink of every head, in units, of which the sequence has N."""
    if not static.per_head:
        return [static.window or 0] * Hq, [static.sink] * Hq
    spans = [static.per_head[h % len(static.per_head)] for h in range(Hq)]
    grown = [fixed(span.grow, up=True) * max(0, N - span.window) // ONE for span in spans]
    windows = [span.window + more for span, more in zip(spans, grown, strict=True)]
    return windows, [span.sink for span in spans]


def _union(branches: list[Keys]) -> list[Keys]:
    """Merge branches over the same keys: a token counts once, however often it is reached."""
    merged: dict[str, Keys] = {}
    for keys in branches:
        if (seen := merged.get(keys.source)) is None:
            merged[keys.source] = keys
        else:
            heads = max(seen.visible.shape[1], keys.visible.shape[1])
            either = spread(seen.visible, heads) | spread(keys.visible, heads)
            merged[keys.source] = replace(seen, visible=either)
    return list(merged.values())


def _logits(q: Tensor, part: Keys, how: Attend) -> Tensor:
    """Scaled dot products, then the cap, then what is added to those of a key.  -> [T, Hq, S]"""
    scale = q.shape[-1] ** -0.5 if how.scale is None else how.scale
    logits = dot(q, part.k) * scale
    if part.far is not None:
        keys, where_far = part.far
        logits = torch.where(where_far, dot(q, keys) * scale, logits)
    if how.softcap is not None:
        logits = how.softcap * (logits / how.softcap).tanh()
    return logits if part.bias is None else logits + spread(part.bias.T[None], q.shape[1])


def _attention(
    q: Tensor, parts: list[Keys], how: Attend, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One softmax over all keys of all parts.  q: [T, Hq, D] -> o [T, Hq, Dv], lse [T, Hq]

    how: scale and softcap, which all parts have in common.  sink: [Hq], one more logit.
    """
    Hq = q.shape[1]
    logits = torch.cat([_logits(q, part, how) for part in parts], -1)
    visible = torch.cat([spread(part.visible, Hq) for part in parts], -1)
    weights, lse = softmax(logits, visible)
    v = torch.cat([part.v for part in parts])  # [S, Hkv, Dv]
    if sink is not None:
        weights = weights * (lse - sink).sigmoid().unsqueeze(-1)
    grouped = weights.unflatten(1, (v.shape[1], -1))
    return torch.einsum("tkgs,skd->tkgd", grouped, v).flatten(1, 2), lse
