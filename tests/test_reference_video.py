"""Orders of keys, pyramids, compensation: what sorted, clustered and pooled attentions mean."""

from __future__ import annotations

import math

import pytest
import torch
from plan_cases import (
    BY_MASS,
    BY_MEAN,
    FREE,
    ORDERS,
    SELECTED,
    blocks,
    ordered,
    random_tensors,
    top,
)
from plan_cases import spec as make
from plan_cases_weighed import GATHERED, WEIGHED
from torch import Tensor

from hsgen import spec as language
from hsgen.analysis import causality, laws
from hsgen.planner import plan
from hsgen.reference import Result, reference
from hsgen.reference.permutes import cluster_of, order_of
from hsgen.selection import members
from hsgen.spec import Gather, KMeans, Select, SortInSegment, Spec

ROWS = 29


def run(spec: Spec, tensors: dict[str, Tensor], **more: object) -> Result:
    return reference(spec, tensors, keep_seen=True, **more)


# --- orders


def test_sorting_stays_inside_segments_and_leaves_the_rest() -> None:
    """By mass of the last rows: of one query and D = 1 the greatest products come first."""
    keys = torch.tensor([1.0, 3, 2, 0, 5, 4, 4, 7, 9]).view(9, 1, 1)
    order = SortInSegment(segment=4, by="mass", last=1)
    at = order_of(order, keys, torch.ones(3, 1, 1), 1, None)
    assert at.tolist() == [[1, 2, 0, 3, 7, 4, 5, 6, 8]]  # 4 and 4: the earlier one first
    at = order_of(order, keys, -torch.ones(3, 1, 1), 1, None)
    assert at.tolist() == [[3, 0, 2, 1, 5, 6, 4, 7, 8]]


def test_masses_are_means_of_softmaxes_not_of_products() -> None:
    """Two judges: the one that is sure decides, and masses are of all whole segments together."""
    keys = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.9]]).unsqueeze(1)
    judges = torch.tensor([[8.0, 0.0], [0.0, 0.1]]).unsqueeze(1)
    order = SortInSegment(segment=4, by="mass", last=2)
    masses = (judges[:, 0] @ keys[:, 0].T * 2**-0.5).softmax(-1).mean(0)
    assert order_of(order, keys, judges, 1, None)[0].tolist() == masses.argsort().flip(0).tolist()
    assert order_of(order, keys, judges, 1, None)[0, 0] == 1


def test_a_key_head_is_sorted_by_all_its_query_heads() -> None:
    keys = torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(0)).double()
    judges = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1)).double()
    order = SortInSegment(segment=8, by="mass", last=2)
    at = order_of(order, keys, judges, 3, None)
    for h in range(2):
        logits = judges[1:, 3 * h : 3 * h + 3].flatten(0, 1) @ keys[:, h].T / 2
        assert at[h].tolist() == logits.softmax(-1).mean(0).argsort(descending=True).tolist()


def test_sorting_by_the_mean_of_a_segment() -> None:
    keys = torch.tensor([1.0, -2, 4, -5, 1, 1]).view(6, 1, 1)
    order = SortInSegment(segment=2, by="mean")
    assert order_of(order, keys, keys, 1, None).tolist() == [[1, 0, 3, 2, 4, 5]]


def test_k_means_by_hand() -> None:
    """Starts at tokens 0 and 2; a token as near to both goes to the first: 1, then 2."""
    keys = torch.tensor([0.0, 1.0, 2.0, 5.0]).view(4, 1, 1)
    for iterations, expected in ((1, [0, 0, 1, 1]), (2, [0, 0, 0, 1]), (9, [0, 0, 0, 1])):
        found = cluster_of(KMeans(clusters=2, iterations=iterations), keys)
        assert found.tolist() == [expected], iterations
    keys = torch.tensor([0.0, 4.0, 4.5, 5.0, 9.0, 10.0]).view(6, 1, 1)  # from tokens 0 and 3
    assert cluster_of(KMeans(clusters=2, iterations=1), keys).tolist() == [[0, 1, 1, 1, 1, 1]]


def test_more_clusters_than_tokens_leave_some_empty() -> None:
    keys = torch.arange(3.0).view(3, 1, 1)
    found = cluster_of(KMeans(clusters=5, iterations=2), keys)
    assert found.tolist() == [[0, 2, 4]]  # clusters 1 and 3 start where earlier ones do


def test_gathering_ignores_what_is_no_token_and_what_comes_twice() -> None:
    given = torch.tensor([[2.0], [-1.0], [0.0], [2.0], [9.0]])
    at = order_of(Gather(), torch.zeros(5, 1, 1), torch.zeros(1, 1, 1), 1, given)
    assert at.tolist() == [[2, -1, 0, -1, -1]]


# --- entries cut from an order


@pytest.mark.parametrize("spec", [*ORDERS, *WEIGHED, *GATHERED], ids=lambda spec: spec.name)
def test_packed_documents_equal_separate_ones(spec: Spec) -> None:
    lengths = [1, 7, 24, 13]
    parts = [random_tensors(spec, n, n) for n in lengths]
    kinds = {name: x.shape[:2] == (1, 13) for name, x in parts[-1].items()}
    packed = {
        name: torch.cat([part[name][0] for part in parts]) if by_token else parts[0][name]
        for name, by_token in kinds.items()
    }
    ends = torch.tensor([0, *lengths]).cumsum(0)
    together = reference(spec, packed, cu_seqlens_q=ends)
    for part, a, b in zip(parts, ends, ends[1:], strict=False):
        torch.testing.assert_close(together.o[a:b], reference(spec, part).o[0])


@pytest.mark.parametrize("order", [BY_MASS, BY_MEAN], ids=["mass", "mean"])
def test_a_row_sees_its_own_segment_raw_and_others_by_choice(order: SortInSegment) -> None:
    """PBS: blocks of the own segment are forced, and a token is seen by its own position."""
    spec = make("own", ordered(order, select=top(9, last=1)), [SELECTED])
    seen = run(spec, random_tensors(spec, ROWS, ROWS)).seen["selected"][0]
    for t in range(ROWS):
        start = t // order.segment * order.segment
        assert seen[t, :, start : t + 1].all()
        assert not seen[t, :, t + 1 :].any()


def test_scores_are_of_whole_segments_before_the_own_one() -> None:
    """PBS excludes the own segment from the softmax, so that masses of earlier blocks sum to 1."""
    spec = make("before", ordered(BY_MASS), [SELECTED])
    result = run(spec, random_tensors(spec, ROWS, ROWS))
    scores, forced = result.scores["block"][0], result.forced["block"][0]
    for t in range(ROWS):
        whole = (t + 1) // 8 * 2  # two blocks of 4 a segment of 8
        assert (scores[t, :, :whole] > 0).all() and (scores[t, :, whole:] == -math.inf).all()
        if whole:
            torch.testing.assert_close(scores[t, :, :whole].sum(-1), torch.ones(4).double())
        own = range(t // 8 * 2, t // 8 * 2 + 2)
        assert [n for n in range(8) if forced[t, 0, n]] == [n for n in own if n < 8]


def test_every_entry_selected_is_dense_attention() -> None:
    dense = make("dense", [], [language.Attend(name="all", window="all")])
    for spec in ORDERS[:4]:
        levels = [level.model_copy(update={"select": top(99, last=1)}) for level in spec.levels]
        every = spec.model_copy(update={"levels": tuple(levels)})
        full = dense.model_copy(update={"heads": spec.heads, "causal": spec.causal})
        tensors = random_tensors(every, ROWS, ROWS)
        assert laws(plan(every)).dense_when_all_selected
        torch.testing.assert_close(reference(every, tensors).o, reference(full, tensors).o)


def test_the_last_rows_of_the_prompt_say_what_earlier_rows_see() -> None:
    """Sorting by mass looks at the whole prompt; sorting by means of whole segments does not."""
    for order, expected in ((BY_MASS, "prompt"), (BY_MEAN, "token")):
        spec = make("past", ordered(order), [SELECTED])
        assert causality(plan(spec)) == expected
        tensors = random_tensors(spec, ROWS, ROWS)
        changed = {name: x.clone() for name, x in tensors.items()}
        for x in changed.values():
            x[:, -2:] = -3 * x[:, -2:]
        same = reference(spec, tensors).o[:, :-2] == reference(spec, changed).o[:, :-2]
        assert bool(same.all()) == (expected == "token")


def test_clusters_are_attended_whole_and_empty_ones_never() -> None:
    spec = make(
        "clusters",
        ordered(KMeans(clusters=7, iterations=4), size=0, select=top(2)),
        [SELECTED],
        causal=False,
    )
    tensors = random_tensors(spec, 5, 5)
    result = run(spec, tensors)
    chosen = members(result.selection["block"], 7)[0]
    for h in range(2):
        cluster = cluster_of(KMeans(clusters=7, iterations=4), tensors["k"][0])[h]
        for t in range(5):
            assert set(chosen[t, 2 * h].nonzero().flatten().tolist()) <= set(cluster.tolist())
            assert torch.equal(result.seen["selected"][0, t, 2 * h], chosen[t, 2 * h][cluster])


def test_a_gathered_order_may_leave_tokens_out() -> None:
    spec = make("gathered", ordered(Gather(), select=top(9)), [SELECTED], causal=False)
    tensors = random_tensors(spec, 12, 12)
    tensors["block_key_order"][:, 3:6] = -1.0
    left_out = 12 - 3 - 1  # one more comes twice in the cases' orders
    seen = run(spec, tensors).seen["selected"]
    assert int(seen[0, 0, 0].sum()) in (left_out, left_out + 1)


@pytest.mark.parametrize("spec", [*ORDERS, *WEIGHED, *GATHERED], ids=lambda spec: spec.name)
def test_gradients_are_finite_and_reach_keys_and_values(spec: Spec) -> None:
    tensors = {
        name: x.clone().requires_grad_(not name.endswith("_order"))
        for name, x in random_tensors(spec, 14, 14).items()
    }
    reference(spec, tensors).o.sum().backward()
    for name, x in tensors.items():
        if not name.endswith("_order"):
            assert x.grad is not None and x.grad.isfinite().all(), name


def test_two_runs_give_the_same_bits() -> None:
    for spec in ORDERS:
        tensors = random_tensors(spec, ROWS, ROWS)
        assert torch.equal(reference(spec, tensors).o, reference(spec, tensors).o)


def test_specs_with_orders_are_written_and_read_again() -> None:
    for spec in ORDERS:
        assert language.parse(language.dump(spec)) == spec
    assert blocks(4) and isinstance(FREE, Select)
