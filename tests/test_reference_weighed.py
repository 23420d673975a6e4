"""Entries that stand for several tokens: pyramids, compensation, pooling errors; walks that stop."""

from __future__ import annotations

import math

import pytest
import torch
from plan_cases import (
    BY_MASS,
    DOT,
    MEAN,
    SELECTED,
    UNION,
    WINDOW,
    blocks,
    ordered,
    random_tensors,
    top,
    top_p,
)
from plan_cases import spec as make
from plan_cases_weighed import (
    BOTH,
    BY_TIER,
    GATHERED,
    REST,
    TIERS,
    WEIGHED,
    compensated,
    pyramid,
    stopping,
)
from torch import Tensor

from hsgen import spec as language
from hsgen.analysis import causality
from hsgen.planner import plan
from hsgen.reference import Result, reference
from hsgen.reference.choice import tiers_of
from hsgen.reference.permutes import cluster_of, order_of
from hsgen.selection import members
from hsgen.spec import EarlyStop, Force, KMeans, Level, Score, Select, Spec, Tier, Tokens

ROWS = 29


def run(spec: Spec, tensors: dict[str, Tensor], **more: object) -> Result:
    return reference(spec, tensors, keep_seen=True, **more)


def test_specs_are_written_and_read_again() -> None:
    for spec in (*WEIGHED, *GATHERED):
        assert language.parse(language.dump(spec)) == spec


# --- pyramids


def tiers(select: Select, scores: list[float], forced: tuple[int, ...] = ()) -> list[int]:
    row = torch.tensor(scores).double().view(1, 1, -1)
    must = torch.zeros_like(row, dtype=torch.bool)
    must[..., list(forced)] = True
    return tiers_of(select, row, torch.ones_like(must), must).flatten().tolist()


def test_quotas_of_entries_by_hand() -> None:
    """PSA: of ten blocks the best is read whole, half a block more by 2 rounds up, two by 8."""
    quota = (
        Tier(merge=1, fraction=0.1),
        Tier(merge=2, fraction=0.05),
        Tier(merge=8, fraction=0.2),
    )
    select = Select(quota=quota)
    assert tiers(select, [3, 9, 1, 8, 7, 6, 5, 4, 2, 0]) == [-1, 0, -1, 1, 2, 2, -1, -1, -1, -1]
    equal = [1.0] * 10  # ties go to the lower position
    assert tiers(select, equal) == [0, 1, 2, 2, -1, -1, -1, -1, -1, -1]


def test_forced_entries_are_of_the_first_tier() -> None:
    """Text blocks of PSA: whole, whatever their score, inside its quota or on top of it."""
    quota = (Tier(merge=1, fraction=0.25), Tier(merge=4, fraction=0.25))
    assert tiers(Select(quota=quota), [4, 3, 2, 1], (3,)) == [1, -1, -1, 0]
    added = Select(quota=quota, force=Force(counted=False))
    assert tiers(added, [4, 3, 2, 1, 0], (4,)) == [0, 1, -1, -1, 0]
    assert tiers(Select(quota=quota), [4, 3, 2, 1], (2, 3)) == [-1, -1, 0, 0]


def test_quotas_of_mass_by_hand() -> None:
    """The entry that crosses a bound is of the tier that it crosses; `least` widens tiers."""
    quota = (Tier(merge=1, mass=0.4), Tier(merge=2, mass=0.2), Tier(merge=4, mass=0.2))
    assert tiers(Select(quota=quota), [0.3, 0.3, 0.2, 0.1, 0.1]) == [0, 0, 2, -1, -1]
    least = (quota[0].model_copy(update={"least": 0.6}), *quota[1:])
    assert tiers(Select(quota=least), [0.3, 0.3, 0.2, 0.1, 0.1]) == [0, 0, 0, -1, -1]


def test_means_stand_for_their_tokens() -> None:
    """A naive loop over one row: raw blocks, means of 2 and of 3 with ln 2 and ln 3, one softmax."""
    spec = make("one", pyramid(*TIERS), [BY_TIER], kv=4, causal=False)
    tensors = random_tensors(spec, 3, 24)
    result = reference(spec, tensors)
    for t, h in ((t, h) for t in range(3) for h in range(4)):
        q, k, v = tensors["q"][0, t, h], tensors["k"][0, :, h], tensors["v"][0, :, h]
        scores = result.scores["block"][0, t, h]
        merges = [[1, 1, 2, 3][i] for i in scores.argsort(descending=True).argsort().tolist()]
        logits, values = [], []
        for block, merge in enumerate(merges):  # 0.3, 0.5 and 0.75 of four, rounded up: 2, 2, 3
            if scores.argsort(descending=True).tolist().index(block) == 3:
                continue
            merge = 1 if merge == 1 else 3
            for s in range(block * 6, block * 6 + 6, merge):
                logits.append(q @ k[s : s + merge].mean(0) * 6**-0.5 + math.log(merge))
                values.append(v[s : s + merge].mean(0))
        expected = torch.stack(logits).softmax(0) @ torch.stack(values)
        torch.testing.assert_close(result.o[0, t, h], expected)


@pytest.mark.parametrize("block", [4, 8, 16])
def test_a_tier_reads_its_own_blocks_alone(block: int) -> None:
    """PSA's `range(2)`: with few means a block, lanes read means of other blocks of the sequence."""
    quota = (Tier(merge=1, fraction=0.25), Tier(merge=4, fraction=0.5))
    level = Level(
        name="block", partition=blocks(block), pool=MEAN, score=DOT, select=Select(quota=quota)
    )
    spec = make("own_blocks", [level], [BY_TIER], kv=4, causal=False)
    tensors = random_tensors(spec, 2, 8 * block)
    result = reference(spec, tensors)
    kept = members(result.selection["block"], 8)[0]  # [T, Hq, N]
    changed = {name: x.clone() for name, x in tensors.items()}
    for n in range(8):
        changed["v"][0, n * block : (n + 1) * block] = 1e6
        same = (reference(spec, changed).o == result.o)[0].all(-1)  # [T, Hq]
        assert torch.equal(same, ~kept[..., n])
        changed["v"] = tensors["v"].clone()


def test_constant_values_come_back_from_any_tier() -> None:
    for spec in WEIGHED[:6]:
        tensors = random_tensors(spec, ROWS, ROWS)
        tensors["v"].fill_(1.0)
        o, lse = reference(spec, tensors).o, next(iter(reference(spec, tensors).lse.values()))
        seen = (lse > -math.inf).transpose(1, 2)
        torch.testing.assert_close(o[seen], torch.ones_like(o[seen]))
        assert (o[~seen] == 0).all()


def test_a_given_choice_keeps_its_tiers() -> None:
    spec = WEIGHED[0]
    tensors = random_tensors(spec, ROWS, ROWS)
    result = reference(spec, tensors)
    again = reference(spec, tensors, selection=result.selection)
    torch.testing.assert_close(again.o, result.o)


# --- what is skipped


def test_equal_keys_and_values_make_compensation_exact() -> None:
    """SVG-EAR: where all tokens of an entry are one, its centroid with ln n is all of them."""
    level = Level(
        name="block",
        partition=blocks(4),
        pool=BOTH,
        score=DOT,
        select=Select(top_k=2),
    )
    spec = make("exact", [level], [SELECTED, REST], combine=UNION, causal=False)
    dense = make("dense", [], [language.Attend(name="all", window="all")], causal=False)
    tensors = random_tensors(spec, 5, 24)
    for name in ("k", "v"):
        tensors[name] = tensors[name][:, ::4].repeat_interleave(4, 1)
    torch.testing.assert_close(reference(spec, tensors).o, reference(dense, tensors).o)


def test_what_is_skipped_is_the_complement() -> None:
    spec = make("rest", compensated(), [SELECTED, REST], combine=UNION, causal=False)
    alone = make("alone", compensated(), [REST], causal=False)
    tensors = random_tensors(spec, 5, 21)
    lse = reference(alone, tensors).lse["rest"]
    raw = make("raw", compensated(), [SELECTED], causal=False)
    raw = raw.model_copy(update={"levels": (raw.levels[0].model_copy(update={"pool": MEAN}),)})
    both = torch.logaddexp(lse, reference(raw, tensors).lse["selected"])
    torch.testing.assert_close(reference(spec, tensors).lse["o"], both)


def test_pooling_errors_by_hand() -> None:
    """One key channel, two blocks of 2: |e^(qk mean - m) v mean - e^(qk - m) v|^2, a token."""
    level = Level(
        name="block",
        partition=blocks(2),
        pool=BOTH,
        score=Score(form="pooling_error", scale="none"),
        select=top(1),
    )
    spec = make("error", [level], [SELECTED], kv=1, causal=False).model_copy(
        update={"heads": language.Heads(query=1, kv=1), "head_dim": language.HeadDim(qk=1, v=1)}
    )
    k, v = [0.0, 2.0, 1.0, 1.0], [1.0, 3.0, 5.0, 7.0]
    tensors = {
        "q": torch.ones(1, 1, 1, 1).double(),
        "k": torch.tensor(k).double().view(1, 4, 1, 1),
        "v": torch.tensor(v).double().view(1, 4, 1, 1),
    }
    result = reference(spec, tensors)
    mean = math.exp(1 - 2)
    first = ((mean * 2 - math.exp(-2) * 1) ** 2 + (mean * 2 - 1 * 3) ** 2) / 2
    second = ((mean * 6 - mean * 5) ** 2 + (mean * 6 - mean * 7) ** 2) / 2
    torch.testing.assert_close(
        result.scores["block"].flatten(), torch.tensor([first, second]).double()
    )
    assert result.selection["block"].indices.flatten().tolist() == [0]


def test_logarithms_of_counts_make_masses_of_tokens() -> None:
    """SVG2: with equal keys in a cluster the mass of its centroid is that of its tokens."""
    spec = make(
        "mass", compensated(normalise="softmax"), [SELECTED, REST], combine=UNION, causal=False
    )
    tensors = random_tensors(spec, 4, 20)
    tensors["k"] = tensors["k"][:, :5].repeat(1, 4, 1, 1)
    result = reference(spec, tensors)
    logits = torch.einsum("thd,shd->ths", tensors["q"][0], tensors["k"][0].repeat_interleave(2, 1))
    mass = (logits * 6**-0.5).softmax(-1)
    for h in range(4):
        cluster = cluster_of(KMeans(clusters=5, iterations=2), tensors["k"][0])[h // 2]
        for i in range(5):
            score = result.scores["block"][0, :, h, i]
            there = (cluster == i).any()
            expected = mass[:, h][:, cluster == i].sum(-1)
            assert there or (score == -math.inf).all()
            if there:
                torch.testing.assert_close(score, expected)


# --- parts of a head, sinks and walks


def test_a_part_of_all_rows_of_a_head_leaves_some_empty() -> None:
    """DraftAttention's percentile is of a head: rows without a block give 0, not NaN."""
    level = Level(
        name="block",
        partition=blocks(4),
        pool=MEAN,
        score=Score(form="dot", normalise="softmax"),
        select=Select(fraction=0.25, scope="head"),
    )
    spec = make("draft", [level], [SELECTED], kv=4, causal=False)
    tensors = random_tensors(spec, 16, 16)
    tensors["q"][:, 1::2] *= 0.01  # flat rows, whose masses are all small
    result = reference(spec, tensors)
    counts = members(result.selection["block"], 4)[0].sum(-1)  # [T, Hq]
    assert (counts.sum(0) == 16).all()
    empty = counts == 0
    assert empty.any() and not result.o.isnan().any()
    assert (result.o[0][empty] == 0).all()
    assert (result.lse["selected"][0].T[empty] == -math.inf).all()
    row = spec.model_copy(
        update={"levels": (level.model_copy(update={"select": Select(fraction=0.25)}),)}
    )
    assert (members(reference(row, tensors).selection["block"], 4).sum(-1) == 1).all()


def test_sinks_are_found_wherever_sorting_puts_them() -> None:
    """PBS forces the block that holds token 0, which need not be the first block."""
    spec = make("sink", ordered(BY_MASS, select=top_p(0.01, force=Force(sink=1))), [SELECTED])
    tensors = random_tensors(spec, ROWS, ROWS)
    tensors["k"][:, 0] = -5 * tensors["q"][:, -3:].mean(1).unflatten(1, (2, 2)).mean(2)
    seen = run(spec, tensors).seen["selected"][0]
    assert seen[:, :, 0].all()
    at = order_of(BY_MASS, tensors["k"][0], tensors["q"][0], 2, None)
    assert ((at == 0).nonzero()[:, 1] >= 4).any(), "token 0 is in the first block of every head"


def walked(scores: list[float], logits: list[float], **stop: object) -> list[bool]:
    level = Level(
        name="block",
        partition=Tokens(),
        score=Score(form="dot", scale="none"),
        select=Select(early_stop=EarlyStop(**stop)),
    )
    spec = make("walk", [level], [SELECTED], kv=1, causal=False).model_copy(
        update={"heads": language.Heads(query=1, kv=1), "head_dim": language.HeadDim(qk=2, v=1)}
    )
    tensors = {
        "q": torch.tensor([2.0**0.5, 1e-9]).double().view(1, 1, 1, 2),
        "k": torch.tensor([logits, logits]).T.double().reshape(1, -1, 1, 2),
        "v": torch.ones(1, len(logits), 1, 1).double(),
    }
    assert scores == sorted(scores, reverse=True)
    return members(reference(spec, tensors).selection["block"], len(logits)).flatten().tolist()


def test_a_walk_stops_after_the_step_that_adds_little() -> None:
    """S2O: sums are 1, 1.5, 1.6, 1.61; the third step adds 1/16 of what it leaves, below 0.1."""
    logits = [math.log(x) for x in (1.0, 0.5, 0.1, 0.01)]
    assert walked([3, 2, 1, 0], logits, gain=0.1, entries=1) == [True, True, True, False]
    assert walked([3, 2, 1, 0], logits, gain=0.05, entries=1) == [True] * 4
    assert walked([3, 2, 1, 0], logits, gain=0.1, entries=2) == [True] * 4  # 0.11 of 1.61
    assert walked([3, 2, 1, 0], logits, gain=1.0, entries=1) == [True, True, False, False]


def test_a_walk_begins_with_what_another_branch_has() -> None:
    """A branch that has it all makes the first step the last."""
    spec = make(
        "after",
        stopping(gain=0.5, entries=2, after="window"),
        [SELECTED, WINDOW],
        combine=UNION,
    )
    tensors = random_tensors(spec, ROWS, ROWS)
    tensors["k"] *= 0.001  # all logits near 0: two more are less than half of five
    kept = members(reference(spec, tensors).selection["block"], ROWS)[0].sum(-1)
    assert (kept[8:] == 2).all()


def test_unranked_rows_do_not_hold_up_a_walk() -> None:
    spec = make("stopped", stopping(gain=0.2, entries=3), [SELECTED])
    tensors = random_tensors(spec, ROWS, ROWS)
    result = reference(spec, tensors)
    kept = members(result.selection["block"], ROWS)[0].sum(-1)
    assert (kept <= torch.arange(1, ROWS + 1)[:, None]).all() and not result.o.isnan().any()


@pytest.mark.parametrize("spec", WEIGHED, ids=lambda spec: spec.name)
def test_future_tokens_change_nothing_where_the_graph_says_so(spec: Spec) -> None:
    if causality(plan(spec)) != "token":
        return
    tensors = random_tensors(spec, ROWS, ROWS)
    changed = {name: x.clone() for name, x in tensors.items()}
    for x in changed.values():
        x[:, -3:] = 50 * x[:, -3:] + 1
    assert torch.equal(reference(spec, tensors).o[:, :-3], reference(spec, changed).o[:, :-3])
