"""Codes, deltas, estimates and cascades: small cases worked out by hand."""

from __future__ import annotations

import torch
from plan_cases import SELECTED, random_tensors
from plan_cases import spec as make
from plan_cases_odd import EIGHTH, coded, estimated
from torch import Tensor

from hsgen.analysis import causality, laws
from hsgen.planner import plan
from hsgen.reference import reference
from hsgen.spec import Codes, Select, Spec


def column(*numbers: float) -> Tensor:
    """One channel of one head: [1, T, 1, 1]"""
    return torch.tensor(numbers, dtype=torch.float64).view(1, -1, 1, 1)


def seen(spec: Spec, x: dict[str, Tensor]) -> list[set[int]]:
    """What head 0 of each row attends to."""
    y = reference(spec, x, keep_seen=True).seen["selected"][0, :, 0]
    return [set(row.nonzero().flatten().tolist()) for row in y]


def documents_alone(spec: Spec, lengths: tuple[int, ...]) -> None:
    """A packed batch equals its documents one by one."""
    x = random_tensors(spec, sum(lengths), sum(lengths))
    learned = [name for name, y in x.items() if y.shape[:2] != (1, sum(lengths))]
    packed = {name: y if name in learned else y[0] for name, y in x.items()}
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    together = reference(spec, packed, cu_seqlens_q=torch.tensor(ends)).o
    for a, b in zip(ends, ends[1:], strict=False):
        alone = {name: y if name in learned else y[:, a:b] for name, y in x.items()}
        torch.testing.assert_close(together[a:b], reference(spec, alone).o[0])


# --- codes


def coded_spec(codes: Codes, select: Select = EIGHTH, **more: object) -> Spec:
    return make("coded", coded(codes, select), [SELECTED], kv=4, **more)


def scores_of(codes: Codes, q: list[float], k: list[float], book: list) -> Tensor:
    """Of one row, which is the last, and one head; four heads have the same."""
    x = {
        "q": torch.tensor(q, dtype=torch.float64).expand(1, 1, 4, 6),
        "k": torch.tensor(k, dtype=torch.float64).view(1, -1, 1, 6).expand(1, -1, 4, 6),
        "block_codebook": torch.tensor(book, dtype=torch.float64),
    }
    x["v"] = torch.zeros(1, x["k"].shape[1], 4, 5, dtype=torch.float64)
    return reference(coded_spec(codes), x).scores["block"][0, 0, 0]


BOOK = [[[0.0, 0.0], [4.0, 4.0]]] * 3  # two codewords for each of three runs


def test_a_score_is_the_number_of_equal_codes() -> None:
    """Codes of the query 0 1 1; of the keys 0 1 1, 0 0 0, 1 0 0 and, at equal distance, 0 0 1."""
    keys = [
        *(0.0, 1.0, 4.0, 3.0, 5.0, 5.0),
        *(0.0, 0.0, 1.0, 1.0, -3.0, 0.0),
        *(9.0, 4.0, 1.0, 1.0, -3.0, 0.0),
        *(2.0, 2.0, 2.0, 2.0, 3.0, 3.0),
    ]
    query = [0.0, 0.0, 3.0, 3.0, 4.0, 9.0]
    assert scores_of(Codes(words=2, dim=2), query, keys, BOOK).tolist() == [3, 1, 0, 2]


def test_distances_are_those_that_are_asked_for() -> None:
    """(4, 0) lies 4 from the first codeword and 5 from the other by l1, 4 and sqrt(13) by l2."""
    book = [[[0.0, 0.0], [2.0, 3.0]]] * 3
    query, key = [4.0, 0.0] * 3, [0.0, 0.0] * 3
    assert scores_of(Codes(words=2, dim=2, distance="l1"), query, key, book).tolist() == [3]
    assert scores_of(Codes(words=2, dim=2, distance="l2"), query, key, book).tolist() == [0]


def test_counts_fall_into_buckets() -> None:
    """Six runs in 4 buckets of one count each, 3 to 6 in the last; in 2 buckets of three, 3 to 6."""
    book = [[[0.0], [1.0]]] * 6
    keys = [float(i < equal) for equal in range(7) for i in range(6)]
    ones = [1.0] * 6
    four = scores_of(Codes(words=2, dim=1, buckets=4), ones, keys, book)
    two = scores_of(Codes(words=2, dim=1, buckets=2), ones, keys, book)
    assert four.tolist() == [0, 1, 2, 3, 3, 3, 3]
    assert two.tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_a_part_of_all_is_the_same_number_in_every_row() -> None:
    """An eighth of 20 tokens, rounded up, is 3: rows before that see all, equal scores the earliest.

    Peer bug: SPT-proto fills the empty slots of a short row with key 0, which then counts many times.
    """
    spec = coded_spec(Codes(words=1, dim=2), Select(fraction=0.125, of="all"))
    x = random_tensors(spec, 20, 20)
    assert seen(spec, x) == [{0}, {0, 1}] + [{0, 1, 2}] * 18
    x["q"] = torch.zeros_like(x["q"])
    o = reference(spec, x).o[0]
    torch.testing.assert_close(o[0], x["v"][0, 0])
    torch.testing.assert_close(o[7], x["v"][0, :3].mean(0))


def test_codes_of_documents_are_their_own() -> None:
    documents_alone(coded_spec(Codes(words=3, dim=2)), (3, 17, 9))


def test_a_part_of_all_depends_on_the_length_of_the_prompt() -> None:
    codes = Codes(words=3, dim=2)
    assert causality(plan(coded_spec(codes))) == "prompt"
    assert causality(plan(coded_spec(codes, Select(fraction=0.2)))) == "token"
    assert laws(plan(coded_spec(codes))).dense_when_all_selected


def test_a_choice_by_codes_is_a_constant() -> None:
    spec = coded_spec(Codes(words=3, dim=2))
    x = {name: y.requires_grad_() for name, y in random_tensors(spec, 9, 9).items()}
    reference(spec, x).o.sum().backward()
    assert x["block_codebook"].grad is None
    assert all(x[name].grad.isfinite().all() for name in ("q", "k", "v"))


# --- estimates: scores that are given, of parts of what a row sees


def estimate(select: Select, count: int = 4, *, heads: int = 4, **more: object) -> Spec:
    share = {4: "head", 1: "all"}[heads]
    return make("estimate", estimated(count, select, share=share), [SELECTED], kv=4, **more)


def rows_of(spec: Spec, T: int, scores: Tensor) -> list[set[int]]:
    x = random_tensors(spec, T, T)
    x["block_score"] = scores.expand(1, T, *scores.shape[-2:])
    return seen(spec, x)


BEST_FIRST = torch.tensor([[4.0, 3.0, 2.0, 1.0]])


def test_parts_are_equal_and_of_what_a_row_sees() -> None:
    """Two of four parts: of 1 token, whose middle lies on the border of parts 1 and 2, the lower has it;
    of 5 tokens, with middles at .4, 1.2, 2, 2.8 and 3.6, the parts are 0, 1, 1, 2, 3."""
    spec = estimate(Select(top_k=2), heads=1)
    found = rows_of(spec, 8, BEST_FIRST)
    assert found == [{0}, {0}, {0, 1}, {0, 1}, {0, 1, 2}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2, 3}]
    last = rows_of(estimate(Select(top_k=1), heads=1), 8, BEST_FIRST.flip(-1))
    assert last == [set(), set(), {2}, {3}, {4}, {5}, {5, 6}, {6, 7}]


def test_parts_without_causality_are_of_all_tokens() -> None:
    spec = estimate(Select(top_k=2), heads=1, causal=False)
    assert rows_of(spec, 8, BEST_FIRST) == [{0, 1, 2, 3}] * 8


def test_a_budget_of_tokens_is_so_many_entries_as_they_fill() -> None:
    """3 tokens of n fill 12 / n of four parts: all up to n = 3; 12/5 and 12/6 are 2; 12/7 is 2; 12/8, a
    half, goes to the even 2."""
    found = rows_of(estimate(Select(tokens=3), heads=1), 8, BEST_FIRST)
    assert [len(row) for row in found] == [1, 2, 3, 3, 3, 3, 4, 4]
    one = rows_of(estimate(Select(tokens=1), heads=1), 16, BEST_FIRST)
    assert one[15] == {0, 1, 2, 3}  # 4 / 16 of a part is still one


def test_heads_share_a_budget() -> None:
    """Four heads, one part each on average: two of head 0, two of head 3; ties to the lower head."""
    spec = estimate(Select(top_k=1, scope="heads"))
    scores = torch.zeros(4, 4)
    scores[0, 2], scores[3, 1], scores[3, 3] = 5.0, 6.0, 7.0
    x = random_tensors(spec, 8, 8)
    x["block_score"] = scores.expand(1, 8, 4, 4)
    shown = reference(spec, x, keep_seen=True).seen["selected"][0, 7]
    assert [set(h.nonzero().flatten().tolist()) for h in shown] == [
        {0, 1, 4, 5},
        set(),
        set(),
        {2, 3, 6, 7},
    ]
    assert (reference(spec, x).o[0, 7, 1] == 0).all()  # a head that keeps nothing


def test_no_cell_is_cut_short() -> None:
    """Peer bug: SEA's CUDA path takes at most k tokens of a cell, its PyTorch path all of them."""
    found = rows_of(estimate(Select(tokens=1), count=2, heads=1), 32, torch.tensor([[1.0, 0.0]]))
    assert found[31] == set(range(16))


def test_documents_have_parts_of_their_own() -> None:
    documents_alone(estimate(Select(tokens=3, scope="heads")), (3, 17, 9))


def test_given_scores_learn_nothing_from_a_choice() -> None:
    spec = estimate(Select(tokens=2, scope="heads"))
    x = {name: y.requires_grad_() for name, y in random_tensors(spec, 9, 9).items()}
    reference(spec, x).o.sum().backward()
    assert x["block_score"].grad is None
    assert x["q"].grad.isfinite().all()


def test_parts_keep_the_promises_of_token_causality() -> None:
    graph = plan(estimate(Select(tokens=2, scope="heads")))
    assert causality(graph) == "token"
    assert laws(graph).dense_when_all_selected
