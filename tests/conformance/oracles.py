"""Is an outcome right?  Errors against float64, and every level's selection by an oracle of its own."""

import math
from dataclasses import dataclass, replace

import torch
from tolerances import UNITS, in_eight, tolerance

from conformance import systems
from conformance.calls import value_side
from conformance.systems import selecting
from hsgen.reference import reference, tensor_kinds
from hsgen.reference.partitions import begins
from hsgen.spec import Attend, Ragged

ZERO = 2.0**-126  # float32 below it is 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One rule that does not hold, with where and by how much."""

    rule: str
    detail: str

    def __str__(self):
        return f"{self.rule}: {self.detail}"


def check(call, outcome):
    """Every rule for every output of a call; raises AssertionError with all that do not hold."""
    raise_if(findings(call, outcome))


def raise_if(found):
    """AssertionError with every finding, or nothing."""
    if found:
        raise AssertionError("\n".join(str(finding) for finding in found))


def findings(call, outcome):
    """Selections by their own oracle; o and lse against the reference on the kernel's selection."""
    chosen = {level.name: outcome.selection[level.name] for level in selecting(call.spec)}
    given = {} if "selection" in call.options else {"selection": chosen}
    exact = call.reference(**given)
    found = shape_findings(exact, outcome)
    if found:
        return found
    if "selection" not in call.options:
        found += selection_findings(call, outcome, exact)
    plain = call.reference(dtype=call.dtype, **given)
    found += error_findings(call, outcome.o, exact.o, plain.o, lse=exact.lse, given=given)
    for branch, lse in outcome.lse.items():
        found += lse_findings(call, branch, lse, exact.lse[branch])
    return found


def shape_findings(exact, outcome):
    """Shapes and dtypes, before anything is compared."""
    pairs = {"o": (outcome.o, exact.o)}
    pairs |= {f"lse[{name}]": (outcome.lse.get(name), t) for name, t in exact.lse.items()}
    found = [
        Finding(rule="shape", detail=f"{name}: expected {list(want.shape)}, got {_shape(got)}")
        for name, (got, want) in pairs.items()
        if got is None or got.shape != want.shape
    ]
    wrong = [name for name, t in outcome.lse.items() if t.dtype != torch.float32]
    return found + [Finding(rule="dtype", detail=f"lse[{name}] is no float32") for name in wrong]


def _shape(t):
    return None if t is None else list(t.shape)


# --- o and lse


def error_findings(call, o, exact, plain, *, lse, given):
    """R-nan, R-max, R-row, R-bias.  o, exact, plain: [..., Hq, Dv]; lse as a Result has it.

    `given`: the selection that `exact` was computed with, where it is not the call's.
    """
    limit = tolerance(call.dtype, o.device)
    # a plain computation can overflow where a kernel must not
    plain = torch.where(plain.isfinite(), plain, exact.to(plain.dtype)).double()
    u, o = limit.output, o.double()
    found = nan_findings("o", o, exact)
    if found or not o.numel():
        return found
    error, own = o - exact, plain - exact
    logits = logit_error(call, lse, limit.arithmetic)
    bound = 2 * own.abs().max() + u * exact.abs().max() + logits.max() + ZERO
    found += _over("R-max", error.abs().max() / bound, "o")
    others = 2 * u * _rms(exact) + logits + ZERO
    used = _rms(error) / (limit.own * _rms(own) + others)
    if used.max() > 1 and call.dtype == torch.float32:
        usual = torch.maximum(_rms(own), sum_error(call, exact, limit.arithmetic, given))
        used = _rms(error) / (limit.own * usual + others)
    found += _over("R-row", used.max(), f"o at {_where(used)}")
    # errors of single rows cancel, those of a wrong scale do not; what rounding has in common, the
    # plain computation has too
    rows = max(1, int((exact != 0).any(-1).sum()))
    size = exact.square().sum().clamp(min=ZERO)
    single = u + 2 * (own.square().sum() / size).sqrt()
    bias, common = (((e * exact).sum() / size).abs() for e in (error, own))
    allowed = limit.bias * u + common + single / math.sqrt(rows)
    return found + _over("R-bias", bias / allowed, "o")


def logit_error(call, lse, unit):
    """What the rounding of large logits does to a row, about: two roundings, and values of size 1.

    Where a few keys have all the weight, the plain computation may be right by luck.  -> [..., T, Hq]
    """
    sizes = torch.stack([torch.where(t.isfinite(), t, 0.0).abs() for t in lse.values()])
    values = [t.double() for t in value_side(call).values()]
    spread = max(float(v.square().mean().sqrt()) if v.numel() else 0.0 for v in values)
    return (2 * unit * spread * (1 + sizes.amax(0))).transpose(-1, -2)


def sum_error(call, exact, unit, given):
    """How far a row of float64 moves where the terms of its dots are off as much as sums are.

    -> [..., T, Hq].  Where two keys have nearly all the weight between them, a plain computation whose
    two dots are off by the same is right by luck; and where a large query meets them nearly at right
    angles, their logits are small and the terms of their sums are not.  In a sum of D terms each is
    rounded up to D times, in either direction: off by sqrt(D) / 2 units.  Every number of q moves by its
    last place, up or down; root mean square of a few draws.
    """
    generator = torch.Generator().manual_seed(0)
    q, moved = call.tensors["q"], []
    for _ in range(4):
        up = torch.randint(0, 2, q.shape, generator=generator).to(q.device) == 1
        other = torch.nextafter(q, torch.where(up, torch.inf, -torch.inf).to(q.dtype))
        moved.append(_rms(call.with_tensors(q=other).reference(**given).o - exact))
    units = q.shape[-1] ** 0.5 / 2 * unit / UNITS[torch.float32]
    return torch.stack(moved).square().mean(0).sqrt() * units


def nan_findings(name, got, exact):
    """R-nan: finite where it must be, exactly 0 or -inf where that is the answer."""
    found = []
    wrong = ~got.isfinite() & exact.isfinite()
    if wrong.any():
        found.append(Finding(rule="R-nan", detail=f"{name} is {got[wrong][0]} at {_where(wrong)}"))
    for value in (0.0, -math.inf):
        wrong = (exact == value) & (got != value)
        # a sum that happens to be 0 is no row that must be 0
        wrong = wrong & (exact == value).all(-1, keepdim=True) if value == 0.0 else wrong
        if wrong.any():
            detail = f"{name} is {got[wrong][0]}, not {value}, at {_where(wrong)}"
            found.append(Finding(rule="R-nan", detail=detail))
    return found


def lse_findings(call, branch, got, exact):
    """R-lse: as far from float64 as the rounding of scores and of one sum allows.  [..., Hq, T]"""
    found = nan_findings(f"lse[{branch}]", got.double(), exact)
    seen = exact.isfinite()
    if found or not seen.any():
        return found
    unit = tolerance(call.dtype, got.device).arithmetic
    bound = logit_bound(call, branch) + 16 * unit * (1 + exact.abs())
    used = torch.where(seen, (got.double() - exact).abs() / bound, 0.0)
    return _over("R-lse", used.max(), f"lse[{branch}] at {_where(used)}")


def logit_bound(call, branch):
    """Rounding error of a branch's largest logit, or of a union's, as sums of many terms have it.

    -> [B, Hq, T].  Of every channel the largest key is taken, wherever it is.
    """
    branches = [each for each in call.spec.attend if branch in ("o", each.name)]
    return torch.stack([_logit_bound(call, each) for each in branches]).amax(0)


def _logit_bound(call, attend):
    spec = call.spec
    q = call.tensors["q"].double().abs()
    group, D = spec.heads.group, q.shape[-1]
    terms = D
    largest = torch.zeros(spec.heads.kv, D, dtype=torch.float64, device=q.device)
    k = call.tensors[_branch_keys(spec, attend)].double().abs()
    if attend.values == "pooled" and spec.level(attend.over).pool.series:
        k = k.amax(-2)
    k = k.flatten(0, -3)
    k = torch.where(k.isfinite(), k, 0.0)
    largest = torch.maximum(largest, k.amax(0) if len(k) else largest)
    if attend.values == "pooled":
        pooled, more = _largest_pooled(call, spec.level(attend.over), largest)
        largest, terms = torch.maximum(largest, pooled), terms + more
    largest = largest.repeat_interleave(group, 0)  # [Hq, D]
    scale = attend.scale or D**-0.5
    logits = (q * largest).sum(-1) * scale
    limit = tolerance(call.dtype, q.device)
    level = spec.level(attend.over) if attend.values == "pooled" else None
    rounded = limit.stored if level and _rounds(level) else 0.0
    return ((terms**0.5 + 8) * limit.arithmetic + rounded) * logits.transpose(-1, -2)


def _branch_keys(spec, attend):
    kv = spec.level(attend.over).kv if attend.values == "pooled" else attend.kv
    return f"k_{kv}" if kv else "k"


def _largest_pooled(call, level, largest):
    """The largest pooled key of every channel, at most, and how many terms one sums.  -> [Hkv, D]"""
    terms = level.partition.size
    if level.pool.keys == "max_min_mean":
        weight = call.tensors[f"{level.name}_key_weight"].double().abs()
        largest, terms = torch.einsum("hd,hsde->he", largest, weight), terms + weight.shape[-1]
    if level.pool.then:
        weight = call.tensors[f"{level.name}_key_norm"].double().abs()
        largest, terms = len(weight) ** 0.5 * weight.expand_as(largest), terms + len(weight)
    if level.pool.rotate:
        largest = 2 * largest.amax(-1, keepdim=True).expand_as(largest)
        if not level.pool.rotate.base:  # tables are any numbers
            largest = largest * max(
                float(call.tensors[f"{x}_{level.name}"].abs().max()) for x in ("cos", "sin")
            )
    if level.pool.keys != "linear":
        return largest, terms
    weight = call.tensors[f"{level.name}_key_weight"].double().abs()
    position = call.tensors.get(f"{level.name}_key_position")
    slots = largest.unsqueeze(1) + (0 if position is None else position.double().abs())
    return torch.einsum("hsd,hsde->he", slots.expand(weight.shape[:3]), weight), weight[
        0, ..., 0
    ].numel()


def _rms(x):
    return x.square().mean(-1).sqrt()


def _over(rule, used, what):
    used = float(used)
    if used <= 1.0:
        return []
    return [Finding(rule=rule, detail=f"{what}: error is {used:.3g} of what is allowed")]


def _where(x):
    """Index of the largest element."""
    flat = int(x.to(torch.float64).flatten().argmax())
    index = []
    for n in reversed(x.shape):
        index.append(flat % n)
        flat //= n
    return tuple(reversed(index))


# --- selections


def selection_findings(call, outcome, exact):
    """Structure, and certified near-optimality, of every level given the kernel's own parents."""
    bounds = score_bounds(call, exact)
    found = []
    for level in selecting(call.spec):
        indices = outcome.selection[level.name]
        name = level.name
        state = (exact.scores[name], exact.candidates[name], exact.forced[name])
        if level.when:  # heads on other ways choose none
            way = _on_way(call, level.when, exact)[..., None]
            state = (state[0], state[1] & way, state[2] & way)
        width, kept = systems.slots(call.spec, level, call.keys), None
        if _by_mass(level.select) or level.select.scope == "entry":  # see below
            kept = (indices >= 0).sum(-1)
        elif (
            level.select.budget_from and call.spec.part_of(level) is None
        ):  # of which it says how many
            kept = (outcome.selection[level.select.budget_from] >= 0).sum(-1)
            if level.select.budget_in:  # as many as hold more of them
                source = call.spec.level(level.select.budget_from)
                kept = kept * source.partition.size // level.partition.size + 1
            kept = kept + state[2].sum(-1) * (not level.select.force.counted)
            kept = torch.minimum(kept, state[1].sum(-1))
        elif level.select.counts_vary:  # by positions alone
            own = call.reference().selection[name]
            kept = _spread(own.indices, state[0].shape[-1]).sum(-1)
        found += structure_findings(level, indices, *state[1:], width=width, kept=kept)
        if not found and level.select.scope == "entry":
            found += _entry_findings(call, level, indices, *state[:2], bounds[name])
        elif not found:
            for scores, candidates, forced in _sides(call, level, *state):
                found += gap_findings(level, indices, scores, candidates, forced, bounds[name])
            if level.select.top_p:
                top_p = level.select.top_p
                assert not top_p.max and top_p.of in (None, "rest"), "another"
                findings_of = _pair_findings if top_p.scope == "head" else mass_findings
                of = (call,) if top_p.scope == "head" else ()
                found += findings_of(
                    *of,
                    level,
                    indices,
                    *state,
                    bounds[name],
                    part=top_p.mass,
                    least=top_p.min,
                )
            if level.select.quota and _by_mass(level.select):
                parts = sum(tier.mass for tier in level.select.quota)
                fewest = max(tier.least or 0.0 for tier in level.select.quota)
                least = torch.ceil(fewest * state[1].sum(-1))
                found += mass_findings(
                    level, indices, *state, bounds[name], part=parts, least=least
                )
            if level.select.threshold:
                found += threshold_findings(level, indices, *state, bounds[name])
            if level.select.early_stop:
                found += walk_findings(call, level, indices, *state[:2], bounds[name])
    return found


def _on_way(call, when, exact):
    """The heads that a route sends one way.  -> bool[Hq], or of one that is computed bool[..., Hq] by row"""
    if statistic := call.spec.route.statistic:
        near = root_divergence(*(exact.scores[name] for name in statistic.levels))
        return (near < statistic.threshold) == (when == statistic.below)
    if table := call.spec.route.table:
        heads = torch.arange(call.spec.heads.query, device=call.device)
        return torch.tensor([way == when for way in table], device=call.device)[heads % len(table)]
    names = call.spec.route.input
    ways = [names[n] if 0 <= n < len(names) else None for n in call.tensors["route"].tolist()]
    return torch.tensor([way == when for way in ways], device=call.device)


def root_divergence(one, other):
    """Of the parts that two scores are of their sums: by entropies, that of their mean less their mean."""
    p, q = (torch.where(x.isfinite(), x, 0.0) for x in (one, other))
    p, q = (x / x.sum(-1, keepdim=True).clamp(min=ZERO) for x in (p, q))
    of_mean, *apart = (torch.special.entr(x).sum(-1) for x in ((p + q) / 2, p, q))
    return (of_mean - sum(apart) / 2).clamp(min=0.0).sqrt()


def _sides(call, level, scores, candidates, forced):
    """Candidates that are chosen apart from each other: of most levels all are chosen together."""
    if not level.select.apart:
        return [(scores, candidates, forced)]
    split = call.tensors[f"{level.name}_split"].long()
    if "cu_seqlens_q" in call.options:
        split = split.repeat_interleave(call.options["cu_seqlens_q"].diff().long())
    split = split.view(-1, *(1,) * (scores.ndim - 1))
    late = torch.arange(scores.shape[-1], device=scores.device) * level.partition.stride >= split
    return [(scores, candidates & side, forced) for side in (late, ~late)]


def _by_mass(select):
    """Whether how many entries a row keeps depends on what they weigh."""
    tiers = select.quota and select.quota[0].fraction is None
    return bool(select.top_p or select.threshold or select.early_stop or tiers)


def structure_findings(level, indices, candidates, forced, *, width, kept=None):
    """Ascending, padded at the end, candidates only, forced ones all, as many as there must be."""
    N = candidates.shape[-1]
    if indices.shape != (*candidates.shape[:-1], width) or indices.dtype != torch.int32:
        detail = f"{level.name}: expected i32{[*candidates.shape[:-1], width]}, got "
        return [Finding(rule="structure", detail=f"{detail}{indices.dtype}{list(indices.shape)}")]
    used = indices >= 0
    wanted = candidates.sum(-1)
    force = level.select.force
    assert not force.tail or not (force.counted and force.first), "which of them is the tail?"
    extra = forced.sum(-1) * (not force.counted or bool(force.tail))
    wanted = torch.minimum(wanted, level.select.budget + extra) if kept is None else kept
    rising = (indices[..., 1:] > indices[..., :-1]) | ~used[..., 1:]
    inside = torch.where(used, indices, 0).clamp(max=max(N - 1, 0)).long()
    known = candidates.gather(-1, inside) if N else torch.zeros_like(used)
    rules = {
        "is in range or -1": (indices >= -1) & (indices < N),
        "is padded at the end": used[..., :-1] | ~used[..., 1:],
        "rises": rising,
        "has candidates only": known | ~used,
        "has as many as there must be": used.sum(-1) == wanted,
        "has every forced entry": (_spread(indices, N) | ~forced).all(-1),
    }
    return [
        Finding(rule="structure", detail=f"{level.name} {rule}: not at {_where(~holds)}")
        for rule, holds in rules.items()
        if not holds.all()
    ]


def gap_findings(level, indices, scores, candidates, forced, bound):
    """No unselected score lies above a selected one by more than both of their errors."""
    chosen = _spread(indices, scores.shape[-1])
    if not scores.numel():
        return []
    free = candidates & ~forced
    lowest = torch.where(free & chosen, scores + bound, math.inf).amin(-1)
    highest = torch.where(free & ~chosen, scores - bound, -math.inf).amax(-1)
    wrong = lowest < highest
    if not wrong.any():
        return []
    at = _where(wrong)
    detail = f"{level.name} at {at}: {highest[at]:.9g} is left out, {lowest[at]:.9g} is in"
    return [Finding(rule="gap", detail=detail)]


def mass_findings(level, indices, scores, candidates, forced, bound, *, part, least):
    """What is chosen reaches its part of the mass, and without its lowest entry does not; within errors.

    Or it does not exceed it, but would with one more; of the rest, forced entries have no mass.
    """
    chosen = _spread(indices, scores.shape[-1])
    if not scores.numel():
        return []
    top_p = level.select.top_p
    if top_p and top_p.of == "rest":
        candidates, chosen, forced = candidates & ~forced, chosen & ~forced, forced & False
    if top_p and top_p.boundary == "drop":
        return _within_mass(
            level, chosen, scores, candidates, forced, bound, part=part, least=least
        )
    mass = torch.where(candidates, scores, 0.0).clamp(min=0.0)
    error = torch.where(candidates, bound, 0.0).sum(-1) + 2.0**-28
    wanted, reached = part * mass.sum(-1), torch.where(chosen, mass, 0.0).sum(-1)
    ranked = chosen & ~forced
    counted = chosen if level.select.force.counted else ranked
    lowest = torch.where(ranked, mass, math.inf).amin(-1)
    before = torch.where(counted, mass, 0.0).sum(-1) - lowest
    enough = ranked.sum(-1) <= least  # as many as there must be, whatever they weigh
    rules = {
        f"reaches {part} of the mass": reached + error >= wanted,
        "ends there": (before - error < wanted) | enough,
    }
    return [
        Finding(rule="mass", detail=f"{level.name} {rule}: not at {_where(~holds)}")
        for rule, holds in rules.items()
        if not holds.all()
    ]


def _within_mass(level, chosen, scores, candidates, forced, bound, *, part, least):
    """What is chosen does not exceed its part, or must be; with the greatest one that is left it would."""
    assert level.select.top_p.of == "rest" or level.select.force.counted, "another"
    mass = torch.where(candidates, scores, 0.0).clamp(min=0.0)
    error = torch.where(candidates, bound, 0.0).sum(-1) + 2.0**-28
    wanted, reached = part * mass.sum(-1), torch.where(chosen, mass, 0.0).sum(-1)
    left = torch.where(candidates & ~chosen, mass, -math.inf).amax(-1)
    few = (chosen & ~forced).sum(-1) <= least
    rules = {
        f"does not exceed {part} of the mass": (reached - error <= wanted)
        | few
        | (chosen == forced).all(-1),
        "would with one more": (left == -math.inf) | (reached + left + error > wanted),
    }
    return [
        Finding(rule="mass", detail=f"{level.name} {rule}: not at {_where(~holds)}")
        for rule, holds in rules.items()
        if not holds.all()
    ]


def _pair_findings(call, level, indices, scores, candidates, forced, bound, *, part, least):
    """The same of all rows of a sequence and head together, beside which entries are forced.

    What is forced may be among the best as well: it is where it weighs more than what is, and is not where it
    weighs less than what is left.
    """
    top_p = level.select.top_p
    assert not level.select.force.counted and not least, "another"
    found, chosen = [], _spread(indices, scores.shape[-1])
    for rows in _one_of_each_block(call, call.spec.rows_of(level).block):
        state = (chosen, scores, candidates, forced, bound)
        state = (x.flatten(0, -3)[rows].transpose(0, 1).flatten(1) for x in state)
        taken, mass, there, must, error = state
        if not mass.numel():
            continue
        mass = torch.where(there, mass, 0.0).clamp(min=0.0)
        wrong = torch.where(there, error, 0.0).sum(-1) + there.sum(-1) * 2.0**-30
        wanted, ranked = part * mass.sum(-1), taken & ~must
        lowest = torch.where(ranked, mass + error, math.inf).amin(-1, keepdim=True)
        left = torch.where(there & ~taken, mass - error, -math.inf).amax(-1, keepdim=True)
        surely = ranked | (must & (mass - error > lowest))
        perhaps = ranked | (must & (mass + error >= left))
        least_of_it, most_of_it = (torch.where(x, mass, 0.0).sum(-1) for x in (surely, perhaps))
        left, lowest = left.squeeze(-1), lowest.squeeze(-1)
        rules = {
            "are the best": left <= lowest,
            f"do not exceed {part} of the mass": least_of_it - wrong <= wanted,
            "would with one more": (left == -math.inf) | (most_of_it + left + wrong > wanted),
        }
        if top_p.boundary == "keep":
            rules = {
                "are the best": left <= lowest,
                f"reach {part} of the mass": most_of_it + wrong >= wanted,
                "end there": (lowest == math.inf) | (least_of_it - lowest - wrong < wanted),
            }
        found += [
            Finding(rule="mass", detail=f"{level.name}: pairs {rule}: not at {_where(~holds)}")
            for rule, holds in rules.items()
            if not holds.all()
        ]
    return found


def _entry_findings(call, level, indices, scores, candidates, bound):
    """Of each sequence and head the rows of every entry: as many as there must be, and the best."""
    found, chosen = [], _spread(indices, scores.shape[-1])
    for rows in _one_of_each_block(call, 1):
        state = (chosen, scores, candidates, bound.expand_as(scores))
        taken, score, there, error = (x.flatten(0, -3)[rows].transpose(0, 2) for x in state)
        if not score.numel():
            continue
        wanted = there.sum(-1).clamp(max=level.select.top_k)
        lowest = torch.where(taken, score + error, math.inf).amin(-1)
        highest = torch.where(there & ~taken, score - error, -math.inf).amax(-1)
        rules = {
            "has as many rows as there must be": taken.sum(-1) == wanted,
            "has the best rows": lowest >= highest,
        }
        found += [
            Finding(rule="entry", detail=f"{level.name} {rule}: not at {_where(~holds)}")
            for rule, holds in rules.items()
            if not holds.all()
        ]
    return found


def _one_of_each_block(call, block):
    """Of each sequence a row of every block of rows, among the rows of all."""
    T, S = call.tokens, call.keys
    ends_q, ends_k = ([n * z for z in range(len(call.tensors["q"]) + 1)] for n in (T, S))
    if call.packed:
        ends_q = call.options["cu_seqlens_q"].tolist()
        ends_k = call.options.get("cu_seqlens_k", call.options["cu_seqlens_q"]).tolist()
    lens, offset = call.options.get("kv_lens"), call.options.get("q_offset")
    for z, (begin, end) in enumerate(zip(ends_q, ends_q[1:], strict=False)):
        keys = ends_k[z + 1] - ends_k[z]
        keys = keys if lens is None else min(keys, int(lens[z]))
        first = keys - (end - begin)
        if offset is not None:
            first = int(torch.as_tensor(offset).reshape(-1).expand(len(ends_q) - 1)[z])
        number = torch.arange(first, first + end - begin) // block
        begins = torch.ones_like(number, dtype=torch.bool)
        begins[1:] = number[1:] != number[:-1]
        yield begin + begins.nonzero().squeeze(1).to(call.device)


def threshold_findings(level, indices, scores, candidates, forced, bound):
    """What is above the threshold by more than its error is in, what is as far below is not."""
    chosen, threshold = _spread(indices, scores.shape[-1]), level.select.threshold
    free = candidates & ~forced
    rules = {
        "left out": free & ~chosen & (scores - bound > threshold),
        "in": free & chosen & (scores + bound <= threshold),
    }
    return [
        Finding(
            rule="threshold",
            detail=f"{level.name} at {_where(wrong)}: {scores[wrong][0]} is {what}",
        )
        for what, wrong in rules.items()
        if wrong.any()
    ]


STOP = 0.02  # part of a gain that may be wrong
FARTHEST = 40.0  # from 0, of logits whose weights float32 tells apart


def walk_findings(call, level, indices, scores, candidates, bound):
    """A walk is no longer than one that asks for a little less, no shorter than one that asks for more.

    Nobody knows which step adds a part where logits lie so far apart that float32 has no number for a weight,
    nor where scores lie so near that rounding says which entries a step has.
    """
    lengths = [call.tensors[name].double().norm(dim=-1).flatten() for name in "qk"]
    most = [float(x.max()) if len(x) else 0.0 for x in lengths]
    if most[0] * most[1] * call.spec.head_dim.qk**-0.5 > FARTHEST or not indices.numel():
        return []
    ordered = torch.where(candidates, scores, torch.inf).sort(-1).values
    gaps = (ordered[..., 1:] - ordered[..., :-1]).nan_to_num(torch.inf, torch.inf)
    clear = (gaps > 2 * bound.amax(-1, keepdim=True)).all(-1)
    used, ends = (indices >= 0).sum(-1), []
    for part in (1 + STOP, 1 - STOP):
        stop = level.select.early_stop
        stop = stop.model_copy(update={"gain": min(1.0, stop.gain * part)})
        select = level.select.model_copy(update={"early_stop": stop})
        levels = tuple(
            x if x.name != level.name else x.model_copy(update={"select": select})
            for x in call.spec.levels
        )
        other = replace(call, spec=call.spec.model_copy(update={"levels": levels}))
        ends.append((other.reference().selection[level.name].indices >= 0).sum(-1))
    wrong = clear & ((used < ends[0]) | (used > ends[1]))
    if not wrong.any():
        return []
    at = _where(wrong)
    detail = f"{level.name} at {at}: {used[at]} entries, from {ends[0][at]} to {ends[1][at]} there must be"
    return [Finding(rule="walk", detail=detail)]


def _spread(indices, N):
    """Lists as masks.  [..., K] -> bool[..., N]"""
    slots = torch.where((indices >= 0) & (indices < N), indices, N).long()
    mask = torch.zeros(*indices.shape[:-1], N + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, slots, torch.ones_like(slots, dtype=torch.bool))[..., :N]


def score_bounds(call, exact):
    """Rounding error of every score in float32, at most.  {level: like its scores}

    A form's error is a count of operations times the same form of absolute values; a softmax turns
    absolute errors of scores into relative ones of masses; sums over heads and maps add errors up.
    """
    limit = tolerance(call.dtype, call.tensors["q"].device)
    unit = limit.arithmetic
    sizes = _form_only(call, absolute=True)
    masses = _form_only(call, absolute=False) if _normalises(call.spec) else {}
    by_branch = any(isinstance(call.spec.summed(x), Attend) for x in call.spec.levels)
    unrounded = _form_only(call, absolute=True, rounded=False) if by_branch else {}
    bounds = {}
    for level in call.spec.levels:
        if level.score.source:
            bounds[level.name] = _map_bound(call, level, exact, bounds[level.score.source], unit)
            continue
        bound = _form_bound(call.spec, level, limit) * sizes[level.name]
        if level.score.form == "cosine":  # of 1 at most, and two lengths are rounded besides
            bound = (3 * call.spec.head_dim.qk + 16) * unit * torch.ones_like(bound)
        if level.score.normalise:
            mass = masses[level.name].clamp(min=0.0)  # -inf where there is no entry
            summed = call.spec.summed(level) or level
            if isinstance(summed, Attend):  # of vectors that are not rounded, and as many terms
                total = _form_bound(call.spec, level, limit) * unrounded[level.name]
            else:
                total = _form_bound(call.spec, summed, limit) * sizes[summed.name]
            worst = bound.amax(-1, keepdim=True) + total.amax(-1, keepdim=True)
            bound = mass * (worst + 32 * unit) + ZERO
            size = mass
        elif level.score.form == "pooling_error":  # of weights of 1 at most, squared, and of values
            value = call.tensors["v"].double().square().sum(-1).max()
            worst = bound.amax(-1, keepdim=True).expand_as(bound) + 32 * unit
            bound = size = 4 * value * worst
        else:
            size = sizes[level.name]
        bounds[level.name] = _reduce_bound(level, exact.scores[level.name], bound, size, unit)
    return bounds


def _form_bound(spec, level, limit):
    """Of a score's form, as a part of the same form of absolute values."""
    bound = _terms(spec, level) * limit.arithmetic + (limit.stored if _rounds(level) else 0.0)
    eight = level.score.by_index and spec.index.dtype in ("fp8", "fp8_unscaled") and limit.eight
    return bound + (in_eight(spec.index.dim) if eight else 0.0)


def _rounds(level):
    """Whether what is pooled is a sum, which is rounded where it is kept, and no token's own number."""
    how = level.pool.keys if level.pool else None
    if level.pool and (level.pool.then or level.pool.rotate):
        return True
    return how not in (None, "max", "minmax", "first", "antidiagonal")


def _normalises(spec):
    return any(level.score.normalise for level in spec.levels)


def _form_only(call, *, absolute, rounded=True):
    """Scores of every level that has a form, by query head, unreduced; of absolute values, unnormalised.

    rounded: Of vectors in as few bits as a level's own rule says.
    """
    spec, levels, starts = call.spec, [], {}
    for level in spec.levels:
        if isinstance(level.partition, Ragged) and level.partition.boundaries != "given":
            starts[f"{level.name}_starts"] = _starts(call, level)  # not those of absolute values
            given = level.partition.model_copy(
                update={"boundaries": "given", "span": None, "threshold": None}
            )
            level = level.model_copy(update={"partition": given})
        if level.score.form:
            agreed = level.query is not None and level.query.heads is not None  # before they score
            summed = level.score.sums_index  # as they score
            changes = {"reduce": None} | ({} if agreed or summed else {"share": "head"})
            changes |= {"normalise": None} if absolute else {}
            changes |= {} if rounded else {"dtype": None}
            if absolute and isinstance(call.spec.summed(level), Attend):
                changes |= {"lse_from": None}
            if absolute and level.score.form == "pooling_error":
                changes |= {"form": "dot"}  # whose terms errors have as well
            score = level.score.model_copy(update=changes)
            alone = {"score": score, "within": None, "select": None, "when": None}
            levels.append(level.model_copy(update=alone))
    kv = next((b.kv for b in spec.attend if b.values == "raw"), None)
    window = Attend(name="none", window=1, kv=kv, storage=spec.attend[0].storage)
    named = {x.score.lse_from for x in levels}
    attend = tuple(x for x in spec.attend if x.name in named)[:1] or (window,)
    alone = {"levels": tuple(levels), "attend": attend, "combine": None, "reuse": ()}
    plain = spec.model_copy(update=alone | {"route": None})
    tensors = {n: t.double() for n, t in call.tensors.items() if n in tensor_kinds(plain)}
    tensors |= starts
    if absolute:
        tensors = {n: t if _weighs(spec, n) else t.abs() for n, t in tensors.items()}
    options = {n: v for n, v in call.options.items() if n != "selection"}
    scores = reference(plain, tensors, **options).scores
    return {name: torch.where(s.isfinite(), s, 0.0) for name, s in scores.items()}


def _starts(call, level):
    """Where a level's runs begin, as a caller would say it.  -> f64[..., S]"""
    name = "k" if level.kv is None else f"k_{level.kv}"
    keys = call.tensors[name].double()
    if "cu_seqlens_k" in call.options:
        parts = keys.split(call.options["cu_seqlens_k"].diff().tolist())
    elif "cu_seqlens_q" in call.options:
        parts = keys.split(call.options["cu_seqlens_q"].diff().tolist())
    else:
        parts = keys.unbind(0)
    lengths = call.options.get("kv_lens")
    found = []
    for z, part in enumerate(parts):
        most = len(part) if lengths is None else min(len(part), int(lengths[z]))
        begin = torch.zeros(len(part), dtype=torch.float64, device=keys.device)
        begin[:most] = begins(level, level.partition, {name: part[:most]}).double()
        found.append(begin)
    return torch.cat(found) if keys.ndim == 3 else torch.stack(found)


def _weighs(spec, name):
    """Whether a tensor is one of gates, or added to them: weights stay what they are."""
    gated = [f"{x.name}_key_position" for x in spec.levels if x.pool and x.pool.keys == "gated"]
    return name == "z" or name.startswith("z_") or name in gated


def _terms(spec, level):
    """Roundings on the way to one score: of its pooled key, of its dot, of what comes after."""
    dim = spec.index.dim if level.score.by_index else spec.head_dim.qk
    if level.pool and level.pool.keys == "antidiagonal":
        dim *= level.partition.size
    heads = spec.index.heads if level.score.form in ("relu_weighted", "relu_sum") else 0
    pooled = level.partition.size if level.pool and level.pool.keys else 0
    if level.pool and level.pool.keys == "linear":
        pooled *= dim
    return dim + heads + pooled + 16


def _reduce_bound(level, scores, bound, size, unit):
    """[..., H, N] -> [..., Hs, N], for the heads that agree."""
    H, Hs = bound.shape[-2], scores.shape[-2]
    if Hs == H:
        return bound
    grouped, sizes = (y.unflatten(-2, (Hs, H // Hs)) for y in (bound, size))
    if level.score.reduce == "max":
        return grouped.amax(-2)
    total = grouped.sum(-2) + (H // Hs) * unit * sizes.sum(-2)
    return total / (H // Hs) if level.score.reduce == "mean" else total


def _map_bound(call, level, exact, bound, unit):
    """Errors of mapped scores: what an entry gathers, counted by pieces of the source's stride."""
    source = call.spec.level(level.score.source)
    scores = exact.scores[source.name]
    target = exact.scores[level.name]
    if level.query and level.query.reduce:  # masses of several rows: no worse than the worst part
        there = scores > 2.0**-100
        part = torch.where(there, bound / scores.clamp(min=2.0**-100), 0.0)
        worst = part.max() if part.numel() else 0.0
        return torch.where(target.isfinite(), target, 0.0).abs() * (worst + 64 * unit) + ZERO
    bound = _reduce_bound(level, target, bound, scores.abs(), unit)
    scores = torch.where(scores.isfinite(), scores, 0.0).abs()
    bound = (
        bound + 8 * unit * scores[..., : bound.shape[-2], :]
        if bound.shape == scores.shape
        else bound
    )
    if level.score.map == "upsample":  # as wrong as any run's
        return bound.amax(-1, keepdim=True).expand_as(target) if bound.numel() else bound
    weights = gathered(source, level, scores.shape[-1], target.shape[-1]).to(bound)
    if level.score.map in ("max", "overlap_max"):
        spread = torch.where(weights > 0, bound.unsqueeze(-1), 0.0)
        return spread.amax(-2)
    return bound @ weights


def gathered(source, target, N, M):
    """How often entry j of the target counts entry i of the source.  -> f64[N, M]"""
    d, width = source.partition.stride, source.partition.size
    step, size = target.partition.stride, target.partition.size
    weights = torch.zeros(N, M, dtype=torch.float64)
    for i in range(N):
        for j in range(M):
            start, end = j * step, j * step + size
            if target.score.map == "overlap_max":
                weights[i, j] = i * d < end and start < i * d + width
            elif target.score.map == "around":
                weights[i, j] = abs(i - j) <= target.score.width // 2
            elif target.score.map == "overlap_sum":  # pieces of d that both cover
                pieces = range(i * d, i * d + width, d)
                weights[i, j] = sum(start <= piece < end for piece in pieces)
            else:
                weights[i, j] = start <= i * d and i * d + width <= end
    return weights
