"""A learned term that asks no query: what it selects, what it adds, and selections that force others."""

from __future__ import annotations

import math

import pytest
import torch
from plan_cases import SELECTED, dma, nosa, random_tensors
from plan_cases import spec as make

from hsgen.analysis import causality, laws
from hsgen.planner import plan
from hsgen.reference import reference
from hsgen.spec import Attend, Level, Score, Select, Tokens

BIASED = Attend(name="selected", over="block", bias="learned")


def kept_by_bias(bias: torch.Tensor, t: int, k: int) -> list[int]:
    """The card of DMA: of the tokens up to t, those of greatest bias; ties to the earlier one."""
    return sorted(sorted(range(t + 1), key=lambda s: (-float(bias[s]), s))[:k])


def test_dma_is_its_card() -> None:
    """top-k of the bias, causal, a key head at a time; then softmax of q k / sqrt(d) + bias."""
    spec = make("dma", dma(), [BIASED])
    x = random_tensors(spec, 15, 15)
    result = reference(spec, x)
    for t in range(15):
        for h in range(4):
            kept = kept_by_bias(x["bias"][0, :, h // 2], t, 6)
            logits = [
                float(x["q"][0, t, h] @ x["k"][0, s, h // 2]) / math.sqrt(6)
                + float(x["bias"][0, s, h // 2])
                for s in kept
            ]
            weights = torch.tensor(logits, dtype=torch.float64).softmax(0)
            expected = sum(w * x["v"][0, s, h // 2] for w, s in zip(weights, kept, strict=True))
            torch.testing.assert_close(result.o[0, t, h], expected)
            indices = result.selection["block"].indices[0, t, h // 2]
            assert [s for s in indices.tolist() if s >= 0] == kept


def test_a_tie_of_biases_goes_to_the_earlier_token() -> None:
    """softplus of a large negative number is 0 for many tokens: plateaus are the rule, not the exception."""
    spec = make("ties", dma(), [BIASED])
    x = random_tensors(spec, 9, 9)
    x["bias"] = torch.zeros_like(x["bias"])
    assert reference(spec, x).selection["block"].indices[0, 8, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_the_bias_learns_by_kept_tokens_only() -> None:
    """Gradient reaches the bias through the logits of kept tokens; the choice itself is a constant."""
    spec = make("grads", dma(), [BIASED])
    x = random_tensors(spec, 12, 12)
    x["bias"] = x["bias"].requires_grad_()
    result = reference(spec, x)
    result.o[0, -1].sum().backward()
    kept = {s for h in range(2) for s in result.selection["block"].indices[0, -1, h].tolist()}
    moved = {s for s in range(12) if x["bias"].grad[0, s].abs().sum() > 0}
    assert moved and moved <= kept
    unbiased = make("none", dma(), [SELECTED])
    x["bias"].grad = None
    assert not reference(unbiased, x).o.requires_grad  # nothing but the choice reads it


def test_a_bias_of_zeros_changes_nothing() -> None:
    spec = make("dense", [], [Attend(name="o", window="all", bias="learned")])
    plain = make("dense", [], [Attend(name="o", window="all")])
    x = random_tensors(spec, 7, 7)
    x["bias"] = torch.zeros_like(x["bias"])
    assert torch.equal(reference(spec, x).o, reference(plain, x).o)
    assert laws(plan(plain)).dense_when_all_selected
    assert not laws(plan(spec)).dense_when_all_selected


def test_a_bias_of_minus_infinity_is_a_mask_and_no_nan() -> None:
    """Peers that add such a mask turn a row of it into NaN; here it is an empty row."""
    spec = make("masked", [], [Attend(name="o", window="all", bias="learned")])
    x = random_tensors(spec, 5, 5)
    x["bias"] = x["bias"].clone()
    x["bias"][0, :2] = -math.inf
    result = reference(spec, x)
    assert torch.equal(result.o[0, :2], torch.zeros_like(result.o[0, :2]))
    assert bool((result.lse["o"][0, :, :2] == -math.inf).all())
    assert bool(result.o.isfinite().all())


def test_a_score_adds_the_mean_bias_of_an_entry() -> None:
    level = Level(
        name="block",
        partition=Tokens(),
        score=Score(form="dot", bias="learned", scale=0.5),
        select=Select(top_k=2),
    )
    spec = make("added", [level], [SELECTED])
    x = random_tensors(spec, 6, 6)
    scores = reference(spec, x).scores["block"][0, 5, 3]
    for s in range(6):
        dot = 0.5 * (x["q"][0, 5, 3] @ x["k"][0, s, 1])
        torch.testing.assert_close(scores[s], dot + x["bias"][0, s, 1])


def test_nosa_is_its_card() -> None:
    """k1 blocks by queries; they are forced, and the rest of k are those of greatest pooled bias."""
    spec = make("nosa", nosa(), [BIASED])
    x = random_tensors(spec, 40, 40)
    result = reference(spec, x)
    for t, h in ((39, 0), (39, 1), (30, 0), (9, 1)):
        asked = {b for b in result.selection["asked"].indices[0, t, h].tolist() if b >= 0}
        kernels = {i: float(x["bias"][0, 2 * i : 2 * i + 4, h].mean()) for i in range(20)}
        there = {i: value for i, value in kernels.items() if 2 * i + 4 <= t + 1}
        best = {}
        for b in range(5):
            touching = [there[i] for i in range(4 * b - 1, 4 * b + 4) if i in there]
            if 8 * b + 8 <= t + 1 or b in asked:
                best[b] = math.inf if b in asked else max(touching, default=-math.inf)
        expected = sorted(sorted(best, key=lambda b: (-best[b], b))[:3])
        got = [b for b in result.selection["block"].indices[0, t, h].tolist() if b >= 0]
        assert got == expected
        assert asked <= set(got)


def test_only_so_many_blocks_change_with_the_query() -> None:
    """What NOSA is for: two queries at one position differ in at most k1 blocks."""
    spec = make("nosa", nosa(), [BIASED])
    x = random_tensors(spec, 64, 64)
    first = reference(spec, x).selection["block"].indices[0, -1]
    second = reference(spec, {**x, "q": -x["q"]}).selection["block"].indices[0, -1]
    for mine, theirs in zip(first.tolist(), second.tolist(), strict=True):
        assert len(set(mine) - set(theirs)) <= 2


def test_documents_one_by_one() -> None:
    spec = make("nosa", nosa(), [BIASED])
    x = random_tensors(spec, 30, 30)
    ends = torch.tensor([0, 11, 30])
    packed = reference(spec, {name: y[0] for name, y in x.items()}, cu_seqlens_q=ends).o
    for a, b in ((0, 11), (11, 30)):
        alone = reference(spec, {name: y[:, a:b] for name, y in x.items()}).o[0]
        torch.testing.assert_close(packed[a:b], alone)


@pytest.mark.parametrize("name", ["dma", "nosa"])
def test_later_tokens_change_nothing(name: str) -> None:
    levels = {"dma": dma, "nosa": nosa}[name]()
    spec = make(name, levels, [BIASED])
    assert causality(plan(spec)) == "token"
    x = random_tensors(spec, 40, 40)
    before = reference(spec, x).o[:, :21]
    late = {n: torch.cat((y[:, :21], 1e3 + y[:, 21:]), 1) for n, y in x.items() if n != "q"}
    assert torch.equal(reference(spec, {**x, **late}).o[:, :21], before)
