"""Sparse attentions of video and of long prompts, as their shipped specs have them, beside naive loops."""

from __future__ import annotations

import math

import pytest
import torch
from conformance import systems
from plan_cases import random_tensors
from torch import Tensor

from hsgen.reference import reference
from hsgen.reference.permutes import cluster_of, order_of
from hsgen.selection import members
from hsgen.spec import KMeans, Spec

Tensors = dict[str, Tensor]


def small(name: str, *, group: int = 1, dim: int = 6) -> Spec:
    """Blocks of 8 keys and 16 rows, or as the spec has them; every head chooses."""
    return systems.small(name, group=group, kv=2, dims=(dim, 5))


def softmax_over(logits: list[Tensor], values: list[Tensor]) -> Tensor:
    return torch.stack(logits).softmax(0) @ torch.stack(values)


# --- PSA


def psa_masses(q: Tensor, k: Tensor, block: int) -> list[Tensor]:
    """What each block of 8 keys is worth, by block of rows: of every other row and key."""
    found = []
    for rows in q.split(block):
        peaks = []
        for row in rows[::2]:
            logits = k[::2] @ row * len(row) ** -0.5
            parts = (logits - logits.max()).exp().split(4)
            peaks.append(torch.stack([part.max() for part in parts]))
        found.append(torch.stack(peaks).amax(0))
    return found


def tiers_by_number(masses: Tensor, budgets: dict[int, int]) -> list[int]:
    """How many tokens of each block become one; 0: none is read."""
    ranked = masses.argsort(descending=True, stable=True).tolist()
    merge = [0] * len(ranked)
    for width, number in budgets.items():
        for block in [ranked.pop(0) for _ in range(number)]:
            merge[block] = width
    return merge


def tiers_by_mass(masses: Tensor, shares: dict[int, float], least: float) -> list[int]:
    """The same by the part of the mass up to each tier's end; whole blocks are a part of all at least."""
    merge, before, total = [0] * len(masses), 0.0, float(masses.sum())
    for place, block in enumerate(masses.argsort(descending=True, stable=True).tolist()):
        whole = place < math.ceil(least * len(masses))
        left = [width for width, share in shares.items() if before < share * total]
        merge[block] = 1 if whole else left[0] if left else 0
        before += float(masses[block])
    return merge


@pytest.mark.parametrize("name", ["psa", "psa_mass"])
def test_psa_is_its_card(name: str) -> None:
    """Of 20 blocks 0.1 whole, up to 0.15 by 2, up to 0.35 by 8: 2, 1 and 4; the rest is not read.

    By mass 0.4 whole, up to 0.5 by 2, up to 0.6 by 4, up to 0.8 by 8; 2 blocks whole at least.
    """
    spec = small(name)
    block = spec.levels[1].query.block
    x = random_tensors(spec, 32, 160)
    x["q"] *= 4
    o = reference(spec, x).o
    used = set()
    for h in range(2):
        q, k, v = (x[name][0, :, h] for name in "qkv")
        for r, masses in enumerate(psa_masses(q, k, block)):
            if name == "psa":
                merge = tiers_by_number(masses, {1: 2, 2: 1, 8: 4})
            else:
                merge = tiers_by_mass(masses, {1: 0.4, 2: 0.5, 4: 0.6, 8: 0.8}, 0.06)
            used |= set(merge)
            for t in range(r * block, (r + 1) * block):
                logits, values = [], []
                for n, width in enumerate(merge):
                    for s in range(n * 8, n * 8 + 8, width) if width else ():
                        logits.append(k[s : s + width].mean(0) @ q[t] * 6**-0.5 + math.log(width))
                        values.append(v[s : s + width].mean(0))
                torch.testing.assert_close(o[0, t, h], softmax_over(logits, values))
    assert used == ({0, 1, 2, 8} if name == "psa" else {0, 1, 2, 4, 8})


def test_a_row_of_psa_counts_as_much_as_another() -> None:
    """A row's greatest logit is 1 whatever its softmax: masses would let peaked rows choose alone."""
    spec = small("psa")
    x = random_tensors(spec, 16, 64)
    before = reference(spec, x).scores["block"]
    x["q"][:, :16:2] *= 1e-6  # flat rows: every block holds a key that is nearly their greatest
    flat = reference(spec, x).scores["block"]
    assert (flat > 0.999).all()
    assert not (before > 0.999).all()


# --- PBS-Attn


def pbs_choice(spec: Spec, x: Tensors, mass: float) -> Tensor:
    """By block of 8 rows: bool[Hq, R, N], from the card, with the keys where the order puts them."""
    order = spec.levels[0].permute.keys
    at = order_of(order, x["k"][0], x["q"][0], 2, None)  # [Hkv, S]
    S, Hq = x["k"].shape[1], x["q"].shape[2]
    rows, N = -(-S // 8), -(-S // 8)
    kept = torch.zeros(Hq, rows, N, dtype=torch.bool)
    for h, r in ((h, r) for h in range(Hq) for r in range(rows)):
        slots = at[h // 2].split(8)
        segment = r * 8 // 16
        query = x["q"][0, r * 8 : r * 8 + 8, h].mean(0)
        earlier = [n for n in range(N) if n * 8 // 16 < segment]
        if earlier:
            keys = torch.stack([x["k"][0, slots[n], h // 2].mean(0) for n in earlier])
            p = (keys @ query * len(query) ** -0.5).softmax(0).tolist()
            total = 0.0
            for n in sorted(earlier, key=lambda n: -p[n]):  # noqa: B023
                if total < mass:
                    kept[h, r, n] = True
                total += p[n]
        for n in range(N):
            kept[h, r, n] |= n * 8 // 16 == segment or bool((slots[n] == 0).any())
    return kept


def test_pbs_attn_is_its_card() -> None:
    spec = small("pbs_attn", group=2)
    x = random_tensors(spec, 60, 60)
    result = reference(spec, x, keep_seen=True)
    kept = pbs_choice(spec, x, spec.levels[0].select.top_p.mass)
    chosen = members(result.selection["block"], kept.shape[-1])[0].transpose(0, 1)  # [Hq, T, N]
    begun = torch.arange(kept.shape[-1]) * 8 // 16 * 16 <= torch.arange(60)[:, None]
    assert torch.equal(chosen & begun, kept.repeat_interleave(8, 1)[:, :60] & begun)
    at = order_of(spec.levels[0].permute.keys, x["k"][0], x["q"][0], 2, None)
    for t, h in ((t, h) for t in range(60) for h in range(4)):
        blocks = at[h // 2].split(8)
        tokens = [s for n, block in enumerate(blocks) if kept[h, t // 8, n] for s in block.tolist()]
        assert (
            sorted(s for s in tokens if s <= t)
            == result.seen["selected"][0, t, h].nonzero().flatten().tolist()
        )


def test_all_of_the_mass_is_all_of_the_past() -> None:
    """PBS-Attn: where rounded sums never reach the threshold, none of the blocks is kept."""
    spec = small("pbs_attn", group=2)
    level = spec.levels[0]
    top_p = level.select.top_p.model_copy(update={"mass": 1.0})
    select = level.select.model_copy(update={"top_p": top_p})
    spec = spec.model_copy(update={"levels": (level.model_copy(update={"select": select}),)})
    x = random_tensors(spec, 61, 61)
    seen = reference(spec, x, keep_seen=True).seen["selected"][0]
    past = torch.arange(61) <= torch.arange(61)[:, None]
    assert torch.equal(seen, past[:, None].expand_as(seen))


@pytest.mark.parametrize("group", [1, 3])
def test_pbs_attn_of_a_group_is_that_of_repeated_keys_where_masses_agree(group: int) -> None:
    """They assert as many key heads as query heads; a group shares its order, not its choice."""
    spec = small("pbs_attn", group=group)
    x = random_tensors(spec, 40, 40)
    x["q"] = x["q"][:, :, ::group].repeat_interleave(group, 2)
    one = small("pbs_attn", group=1)
    alone = reference(one, x | {"q": x["q"][:, :, ::group]}).o
    torch.testing.assert_close(reference(spec, x).o[:, :, ::group], alone)


# --- S2O


def s2o_walk(q: Tensor, k: Tensor, start: int, gain: float, step: int) -> set[int]:
    """Tokens before a segment that all of its rows walk: q [8, D], k [start + 8, D]."""
    scale = q.shape[1] ** -0.5
    logits = q @ k.T * scale
    own = [logits[i, start : start + i + 1].exp().sum() for i in range(len(q))]
    ranked = (k[:start] @ q.mean(0)).argsort(descending=True, stable=True).tolist()
    walked: set[int] = set()
    for n in range(0, len(ranked), step):
        part = ranked[n : n + step]
        walked |= {*part}
        gains = [logits[i, part].exp().sum() for i in range(len(q))]
        own = [a + b for a, b in zip(own, gains, strict=True)]
        if all(b < gain * a for a, b in zip(own, gains, strict=True)):
            break
    return walked


def test_s2o_is_its_card() -> None:
    """Segments of 8, 3 keys a step, a gain of 0.2; a segment sees itself and what it walks."""
    spec = small("s2o", group=2)
    segment = spec.attend[0]
    static = segment.static.model_copy(update={"blocks": 8})
    whole = (segment.model_copy(update={"static": static}), spec.attend[1])
    spec = spec.model_copy(update={"attend": whole})
    stop = spec.levels[0].select.early_stop
    assert (spec.levels[0].query.block, stop.entries, stop.gain) == (8, 3, 0.2)
    x = random_tensors(spec, 40, 40)
    x["q"] *= 3  # walks of different lengths
    result = reference(spec, x, keep_seen=True)
    lengths = set()
    for h, start in ((h, start) for h in range(4) for start in range(0, 40, 8)):
        q, k = x["q"][0, start : start + 8, h], x["k"][0, :, h // 2]
        walked = s2o_walk(q, k[: start + 8], start, 0.2, 3)
        lengths.add(len(walked))
        for t in range(start, start + 8):
            tokens = result.seen["history"][0, t, h].nonzero().flatten().tolist()
            assert {*tokens} == walked
            seen = sorted(walked | {*range(start, t + 1)})
            logits = [k[s] @ x["q"][0, t, h] * 6**-0.5 for s in seen]
            expected = softmax_over(logits, [x["v"][0, s, h // 2] for s in seen])
            torch.testing.assert_close(result.o[0, t, h], expected)
    assert len(lengths) > 3


# --- SVG2 and SVG-EAR


def clusters(order: KMeans, x: Tensor) -> list[list[int]]:
    """Tokens of each cluster, of x [S, D]."""
    of = cluster_of(order, x[:, None])[0].tolist()
    return [[s for s, c in enumerate(of) if c == i] for i in range(order.clusters)]


def masses(q: Tensor, k: Tensor, groups: list[list[int]]) -> dict[int, float]:
    """By key cluster that has keys: how much its mean weighs for the mean of some queries."""
    logit = {
        i: float(k[group].mean(0) @ q.mean(0)) * q.shape[1] ** -0.5
        for i, group in enumerate(groups)
        if group
    }
    weight = {i: len(groups[i]) * math.exp(x) for i, x in logit.items()}
    total = sum(weight.values())
    return {i: x / total for i, x in weight.items()}


def best_until(mass: dict[int, float], part: float, least: int) -> list[int]:
    """The greatest until the part is reached, the one that crosses too, and so many at least."""
    ranked, total, kept = sorted(mass, key=lambda i: (-mass[i], i)), 0.0, []
    for i in ranked:
        if total < part or len(kept) < least:
            kept.append(i)
        total += mass[i]
    return kept


@pytest.mark.parametrize("repeats", [1, 7])
def test_svg2_is_its_card(repeats: int) -> None:
    """Equal keys leave clusters without keys, whose means are of nothing: they are not there."""
    spec = small("svg2")
    level = spec.levels[0]
    x = random_tensors(spec, 30, 50)
    x["k"] = x["k"][:, ::repeats].repeat_interleave(repeats, 1)[:, :50]
    result = reference(spec, x, keep_seen=True)
    for h in range(2):
        q, k, v = (x[name][0, :, h] for name in "qkv")
        keys = clusters(level.permute.keys, k)
        for rows in clusters(level.permute.queries, q):
            if not rows:
                continue
            top_p = level.select.top_p
            kept = best_until(masses(q[rows], k, keys), top_p.mass, top_p.min)
            tokens = sorted(s for i in kept for s in keys[i])
            for t in rows:
                assert result.seen["selected"][0, t, h].nonzero().flatten().tolist() == tokens
                logits = [k[s] @ q[t] * 6**-0.5 for s in tokens]
                expected = softmax_over(logits, [v[s] for s in tokens])
                torch.testing.assert_close(result.o[0, t, h], expected)


def errors(q: Tensor, k: Tensor, v: Tensor, groups: list[list[int]]) -> dict[int, float]:
    """By key cluster: how wrong its mean key and value are, a token on average."""
    query, scale = q.mean(0), q.shape[1] ** -0.5
    there = [i for i, group in enumerate(groups) if group]
    means = {i: float(k[groups[i]].mean(0) @ query) * scale for i in there}
    exact = {i: (k[groups[i]] @ query * scale).tolist() for i in there}
    top = max(x for i in there for x in (means[i], *exact[i]))
    found = {}
    for i in there:
        mean = v[groups[i]].mean(0)
        parts = [
            float(((math.exp(means[i] - top) * mean - math.exp(x - top) * v[s]) ** 2).sum())
            for x, s in zip(exact[i], groups[i], strict=True)
        ]
        found[i] = sum(parts) / len(parts)
    return found


def test_svg_ear_is_its_card() -> None:
    spec = small("svg_ear")
    mass, error = spec.levels
    x = random_tensors(spec, 25, 40)
    result = reference(spec, x)
    for h in range(2):
        q, k, v = (x[name][0, :, h] for name in "qkv")
        keys = clusters(error.permute.keys, k)
        for rows in clusters(error.permute.queries, q):
            if not rows:
                continue
            budget = len(best_until(masses(q[rows], k, keys), mass.select.top_p.mass, 0))
            wrong = errors(q[rows], k, v, keys)
            exact = sorted(wrong, key=lambda i: (-wrong[i], i))[:budget]  # noqa: B023
            for t in rows:
                logits, values = [], []
                for i in wrong:
                    if i in exact:
                        logits += [k[s] @ q[t] * 6**-0.5 for s in keys[i]]
                        values += [v[s] for s in keys[i]]
                    else:
                        logits.append(k[keys[i]].mean(0) @ q[t] * 6**-0.5 + math.log(len(keys[i])))
                        values.append(v[keys[i]].mean(0))
                torch.testing.assert_close(result.o[0, t, h], softmax_over(logits, values))


# --- DraftAttention


def boxes(frames: int) -> list[list[int]]:
    """Tokens of boxes of 2 x 4 in frames of 4 x 8, in the order of boxes."""
    return [
        [f * 32 + y * 8 + x for y in range(i, i + 2) for x in range(j, j + 4)]
        for f in range(frames)
        for i in range(0, 4, 2)
        for j in range(0, 8, 4)
    ]


def drafted(name: str) -> Spec:
    """Boxes of 2 x 4 in two frames of 4 x 8."""
    spec = small(name)
    level, tile = spec.levels[0], (1, 2, 4)
    order = level.permute.keys.model_copy(update={"tile": tile})
    changes = {
        "permute": level.permute.model_copy(update={"keys": order}),
        "query": level.query.model_copy(update={"tile": tile}),
    }
    level = level.model_copy(update=changes)
    return spec.model_copy(update={"axes": (2, 4, 8), "levels": (level,)})


@pytest.mark.parametrize("name", ["draft_attention", "draft_attention_head"])
def test_draft_attention_is_its_card(name: str) -> None:
    """Two frames are 8 boxes: a tenth of a row's 8, rounded up, or of a head's 64, which is 7."""
    spec = drafted(name)
    x = random_tensors(spec, 64, 64)
    x["q"] *= 4
    result = reference(spec, x, keep_seen=True)
    groups, empty = boxes(2), 0
    for h in range(2):
        q, k = x["q"][0, :, h], x["k"][0, :, h]
        pooled = [torch.stack([y[group].mean(0) for group in groups]) for y in (q, k)]
        p = (pooled[0] @ pooled[1].T * 6**-0.5).softmax(-1)
        if name == "draft_attention":
            kept = p >= p.amax(-1, keepdim=True)
        else:
            kept = p >= p.flatten().sort(descending=True).values[6]
        for r, rows in enumerate(groups):
            tokens = sorted(s for n, group in enumerate(groups) if kept[r, n] for s in group)
            empty += not tokens
            for t in rows:
                assert result.seen["selected"][0, t, h].nonzero().flatten().tolist() == tokens
                if not tokens:
                    assert (result.o[0, t, h] == 0).all()
    assert bool(empty) == (name == "draft_attention_head")
    assert not result.o.isnan().any()


def test_a_box_of_queries_chooses_as_one_wherever_its_rows_stand() -> None:
    """Rows of a box are not next to each other: blocks of rows in place would mix boxes."""
    x = random_tensors(drafted("draft_attention"), 64, 64)
    chosen = members(reference(drafted("draft_attention"), x).selection["box"], 8)[0]
    for rows in boxes(2):
        assert (chosen[rows] == chosen[rows[0]]).all()
    assert not (chosen[:8] == chosen[0]).all()


# --- BiFormer


def test_biformer_released_is_flatter_and_chooses_the_same() -> None:
    """Logits over the root of 2 x 32 channels, not of 32: as queries that are so much shorter."""
    as_paper, released = (
        systems.load(name).model_copy(update={"axes": (16, 24)})
        for name in ("biformer", "biformer_released")
    )
    x = random_tensors(released, 384, 384)
    found = reference(released, x)
    short = reference(as_paper, x | {"q": x["q"] * 0.5**0.5})
    torch.testing.assert_close(found.o, short.o)
    assert torch.equal(found.selection["region"].indices, short.selection["region"].indices)
