"""Buckets that take rows and keys: by hand, by loops written from the paper, and laws."""

from __future__ import annotations

import math

import pytest
import torch
from plan_cases import random_tensors
from plan_cases import spec as make
from plan_cases_buckets import APART, BUCKETS, COSINE, ROWS, buckets

from hsgen import spec as language
from hsgen.analysis import at_most, causality, not_dense_because
from hsgen.errors import PlanError, SpecError
from hsgen.planner import plan
from hsgen.reference import reference
from hsgen.refusals import refuse
from hsgen.selection import members
from hsgen.spec import HeadDim, Heads, LearnedTree, Select, Spec


def tiny(*, takes: int, rows: int) -> Spec:
    """One head of two channels, two buckets, and one channel of values."""
    select = Select(top_k=rows, scope="entry")
    spec = make("tiny", buckets(takes=takes, select=select), [APART])
    level = spec.levels[0].model_copy(update={"partition": LearnedTree(branching=2, takes=takes)})
    sizes = {"heads": Heads(query=1, kv=1), "head_dim": HeadDim(qk=2, v=1)}
    return spec.model_copy(update={"levels": (level,)} | sizes)


def tensors(q: list, k: list, v: list) -> dict[str, torch.Tensor]:
    """Centroids along the two axes, of lengths that must not matter."""
    rows = {"q": q, "k": k, "v": [[x] for x in v]}
    found = {n: torch.tensor(y).double()[None, :, None] for n, y in rows.items()}
    return found | {"block_centroids": torch.tensor([[[3.0, 0.0], [0.0, 0.1]]]).double()}


def chosen(spec: Spec, x: dict[str, torch.Tensor], entries: int) -> torch.Tensor:
    """bool[T, Hs, N] of the first sequence."""
    return members(reference(spec, x).selection["block"], entries)[0]


# --- by hand


def test_buckets_take_keys_and_rows_by_hand() -> None:
    """Keys 0, 1 and 3 lie along the first axis or between, so 0 and 3 are bucket 0, 1 and 2 bucket 1.

    Row 3 is long and along the first axis; row 2, short, is nearer to the second than row 1 is.
    Bucket 0 takes rows 0 and 3, of those that see key 0; bucket 1 rows 2 and 1.
    """
    q = [[1.0, 0.0], [0.8, 0.6], [0.0, 0.01], [9.0, 1.0]]
    k = [[2.0, 0.0], [0.6, 0.8], [0.0, 0.1], [1.0, 0.2]]
    spec, x = tiny(takes=2, rows=2), tensors(q, k, [1.0, 2.0, 4.0, 8.0])
    found = reference(spec, x)
    assert members(found.selection["block"], 2)[0, :, 0].tolist() == [
        [True, False],
        [False, True],
        [False, True],
        [True, False],
    ]
    # row 2: logits 0.01 * 0.8 and 0.01 * 0.1, by root 2
    one, two = math.exp(0.008 / 2**0.5), math.exp(0.001 / 2**0.5)
    first, last = math.exp(18 / 2**0.5), math.exp(9.2 / 2**0.5)
    expected = [
        1.0,  # itself alone
        2.0,  # key 1 alone: key 2 is later
        (2 * one + 4 * two) / (one + two),
        (first * 1 + last * 8) / (first + last),
    ]
    torch.testing.assert_close(found.o[0, :, 0, 0], torch.tensor(expected).double())


def test_the_output_is_the_mean_of_a_rows_buckets() -> None:
    """Both buckets take the last row; key 0 alone is in one, key 1 alone in the other.

    The authors' code divides by the number of buckets plus 1e-5: half a hundred-thousandth too little.
    """
    x = tensors([[-1.0, 0.5], [7.0, 7.0]], [[1.0, 0.0], [0.0, 1.0]], [10.0, 20.0])
    found = reference(tiny(takes=1, rows=1), x)
    assert found.o[0, 1, 0, 0].item() == 15.0
    both = math.log(2) + 7 / 2**0.5  # of all that is seen, each once
    assert found.lse["apart"][0, 0, 1].item() == pytest.approx(both)


def test_a_key_in_two_buckets_counts_in_each() -> None:
    """Key 0 is in both, key 1 in one: 1 of one bucket, the mean of 1 and 5 of the other."""
    x = tensors([[1.0, 0.0]] * 2, [[1.0, 1.0], [0.0, 0.0]], [1.0, 5.0])
    x["k"][0, 1, 0] = torch.tensor([1.0, 1.0])  # alike: ties go to the earlier
    spec = tiny(takes=1, rows=2)
    assert reference(spec, x).o[0, 1, 0, 0].item() == 1.0
    wide = tiny(takes=2, rows=2)
    assert reference(wide, x).o[0, 1, 0, 0].item() == pytest.approx(3.0)


def test_rows_that_no_bucket_takes_are_zero() -> None:
    """And of equally near rows the earlier are taken."""
    x = tensors([[1.0, 1.0]] * 4, [[1.0, 1.0]] * 4, [1.0, 2.0, 3.0, 4.0])
    found = reference(tiny(takes=4, rows=2), x)
    assert chosen(tiny(takes=4, rows=2), x, 2).any(-1)[:, 0].tolist() == [True, True, False, False]
    assert found.o[0, 2:].abs().max() == 0
    assert (found.lse["apart"][0, 0, 2:] == -math.inf).all()


def test_a_bucket_takes_rows_that_see_a_key_of_it() -> None:
    """Its key is the last one: with memory keys theirs gives rows before it room all the same."""
    x = tensors([[1.0, 0.0]] * 3, [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]], [1.0, 2.0, 3.0])
    spec = tiny(takes=1, rows=1)
    assert chosen(spec, x, 2)[:, 0, 0].tolist() == [False, False, True]
    assert chosen(spec.model_copy(update={"causal": False}), x, 2)[:, 0, 0].tolist() == [
        True,
        False,
        False,
    ]


# --- by loops from the paper


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_shared_queries_and_keys_are_the_papers_algorithm(seed: int, causal: bool) -> None:
    """Of shared vectors a bucket's rows are its keys, so that each row sees itself there."""
    spec = make("shared", buckets(takes=7), [APART], causal=causal)
    spec = spec.model_copy(update={"heads": Heads(query=2, kv=2)})
    x = random_tensors(spec, 23, 23, seed=seed)
    x["q"] = x["k"]
    found = reference(spec, x).o
    for b in range(len(found)):
        for h in range(2):
            one = {n: x[n][b, :, h] for n in "kv"}
            expected = algorithm(one["k"], one["v"], x["block_centroids"][h], 7, causal=causal)
            torch.testing.assert_close(found[b, :, h], expected)


def algorithm(
    x: torch.Tensor, v: torch.Tensor, centroids: torch.Tensor, w: int, *, causal: bool
) -> torch.Tensor:
    """Sort by the product with each centroid, gather, attend, scatter the mean."""
    total, count = torch.zeros_like(v), torch.zeros(len(x), 1).double()
    for mu in centroids:
        near = (x / x.norm(dim=-1, keepdim=True)) @ mu
        at = near.topk(w).indices.sort().values
        logits = x[at] @ x[at].T / x.shape[-1] ** 0.5
        if causal:
            logits = logits.masked_fill(torch.ones(w, w).triu(1).bool(), -math.inf)
        total[at] += logits.softmax(-1) @ v[at]
        count[at] += 1
    return total / count.clamp(min=1)


# --- laws


def test_specs_are_written_and_read_again() -> None:
    for spec in BUCKETS:
        assert language.parse(language.dump(spec)) == spec


def test_every_entry_takes_no_more_rows_than_it_may() -> None:
    spec = BUCKETS[0]
    for T in (3, 7, 31):
        taken = chosen(spec, random_tensors(spec, T, T), 5).sum(0)
        assert (taken <= 7).all()
        assert (taken > 0).all()


def test_a_packed_batch_is_its_documents() -> None:
    spec, lengths = BUCKETS[0], (5, 13, 9)
    x = random_tensors(spec, sum(lengths), sum(lengths), batch=1)
    edges = torch.tensor([0, 5, 18, 27])
    packed = {n: y if n == "block_centroids" else y[0] for n, y in x.items()}
    found = reference(spec, packed, cu_seqlens_q=edges).o
    for a, b in zip(edges[:-1], edges[1:], strict=True):
        one = {n: y if n == "block_centroids" else y[:, a:b] for n, y in x.items()}
        torch.testing.assert_close(found[a:b], reference(spec, one).o[0])


def test_values_and_attention_learn_and_the_choice_does_not() -> None:
    spec = BUCKETS[0]
    x = {n: y.requires_grad_() for n, y in random_tensors(spec, 17, 17).items()}
    reference(spec, x).o.square().sum().backward()
    found = {n: y.grad is not None and bool(y.grad.any()) for n, y in x.items()}
    assert found == {"q": True, "k": True, "v": True, "block_centroids": False}


def test_buckets_look_ahead_and_cost_as_much_as_they_hold() -> None:
    graph = plan(BUCKETS[0])
    assert causality(graph) == "prompt"
    assert causality(plan(BUCKETS[1])) == "none"
    assert "apart.o" in at_most(graph)
    assert "softmax of its own for every entry" in (not_dense_because(graph) or "")
    by_row = plan(next(spec for spec in BUCKETS if spec.name == "overlapping_blocks_apart"))
    assert causality(by_row) == "token"
    rows = plan(next(spec for spec in BUCKETS if spec.name == "blocks_take_rows"))
    assert causality(rows) == "prompt"


def test_kernels_refuse_them_by_name() -> None:
    by_name = {spec.name: spec for spec in BUCKETS}
    for spec, words in (
        (by_name["buckets_of_groups"], "no kernel pools by centroid"),
        (by_name["blocks_take_rows"], "level block: no kernel scores by cosines"),
    ):
        with pytest.raises(PlanError, match=words):
            refuse(plan(spec))


# --- what has no meaning


@pytest.mark.parametrize(
    ("partition", "words"),
    [
        (LearnedTree(branching=5, takes=3, capacity=1.5), "room for its own has 'capacity'"),
    ],
)
def test_nodes_take_or_have_room(partition: LearnedTree, words: str) -> None:
    level = buckets()[0].model_copy(update={"partition": partition})
    with pytest.raises(SpecError, match=words):
        language.verify(make("wrong", [level], [APART]))


def test_entries_take_a_number_of_rows() -> None:
    part = ROWS.model_copy(update={"top_k": None, "fraction": 0.5})
    with pytest.raises(SpecError, match="an entry takes a number of rows"):
        language.verify(make("wrong", buckets(select=part, score=COSINE), [APART]))
