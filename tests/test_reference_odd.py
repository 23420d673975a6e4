"""Codes, deltas, estimates and cascades: small cases worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from plan_cases import SELECTED, blocks, random_tensors, top
from plan_cases import spec as make
from plan_cases_odd import CHOSEN_ROWS, EIGHTH, apart, coded, compressed_tokens, estimated, tiled
from torch import Tensor

from hsgen.analysis import causality, laws
from hsgen.errors import PlanError
from hsgen.planner import plan
from hsgen.reference import Kept, reference
from hsgen.spec import (
    Attend,
    Codes,
    Combine,
    Delta,
    Force,
    Level,
    Pool,
    Reuse,
    Score,
    Select,
    Spec,
    Tokens,
    TopP,
)


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


# --- keys from their changes

KEYS = [0.0, 0.4, 0.8, 1.9, 1.6, 2.3]


def logits_of(delta: Delta, keys: list[float], **more: object) -> list[float]:
    """What the last row reads of each key: its logits, the query being 1."""
    spec = make("s", [], [Attend(name="s", window="all", delta=delta, scale=1.0)], kv=4, **more)
    x = {name: torch.zeros_like(y) for name, y in random_tensors(spec, 6, 6).items()}
    x["q"][..., 0] = 1.0
    x["k"][0, :, :, 0] = torch.tensor(keys, dtype=torch.float64)[:, None]
    found = []
    for s in range(6):
        only = x | {"v": torch.zeros_like(x["v"])}
        only["v"][:, s] = 1.0
        result = reference(spec, only)
        found.append((result.o[0, 5, 0, 0].log() + result.lse["s"][0, 0, 5]).item())
    return found


def test_small_changes_are_lost_for_good() -> None:
    """Of the changes .4, .4, 1.1, -.3, .7 those above a half are kept: 0 0 0 1.1 1.1, and the own key."""
    found = logits_of(Delta(threshold=0.5, window=1), KEYS)
    torch.testing.assert_close(torch.tensor(found), torch.tensor([0.0, 0.0, 0.0, 1.1, 1.1, 2.3]))


def test_changes_from_what_was_kept_never_stray() -> None:
    """.4 stays 0, .8 is a half away and is kept, 1.9 as well; 1.6 stays 1.9."""
    found = logits_of(Delta(threshold=0.5, window=1, against="kept"), KEYS)
    torch.testing.assert_close(torch.tensor(found), torch.tensor([0.0, 0.0, 0.8, 1.9, 1.9, 2.3]))


def test_near_keys_are_read_as_they_are() -> None:
    found = logits_of(Delta(threshold=0.5, window=3), KEYS)
    torch.testing.assert_close(torch.tensor(found), torch.tensor([0.0, 0.0, 0.0, 1.9, 1.6, 2.3]))


def test_a_change_of_the_threshold_itself_is_not_kept() -> None:
    """Also: without a threshold's worth of change a channel keeps its first value for ever."""
    found = logits_of(Delta(threshold=0.5, window=1), [0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    torch.testing.assert_close(torch.tensor(found), torch.tensor([0.0] * 5 + [2.5]))


@pytest.mark.parametrize("against", ["previous", "kept"])
def test_changes_restart_with_each_document(against: str) -> None:
    delta = Delta(threshold=0.8, window=2, against=against)
    documents_alone(make("s", [], [Attend(name="s", window="all", delta=delta)]), (3, 17, 9))


@pytest.mark.parametrize("against", ["previous", "kept"])
def test_a_threshold_below_every_change_is_dense(against: str) -> None:
    """And gradients reach keys by what is kept of them."""
    branch = Attend(name="s", window="all")
    delta = Delta(threshold=1e-9, window=2, against=against)
    far = make("s", [], [branch.model_copy(update={"delta": delta})])
    x = random_tensors(far, 12, 12)
    torch.testing.assert_close(reference(far, x).o, reference(make("s", [], [branch]), x).o)
    y = {name: z.clone().requires_grad_() for name, z in x.items()}
    some = Delta(threshold=0.8, window=2, against=against)
    reference(make("s", [], [branch.model_copy(update={"delta": some})]), y).o.sum().backward()
    assert y["k"].grad.isfinite().all() and (y["k"].grad != 0).any()


# --- fewer rows and keys


def of_given(select: Select, **more: object) -> Spec:
    """Tokens by scores that are given, one for all heads."""
    score = Score(form="given", share="all", **more)
    level = Level(name="block", partition=Tokens(), score=score, select=select)
    return make("given", [level], [CHOSEN_ROWS], kv=4)


def test_a_row_that_is_not_chosen_puts_out_nothing() -> None:
    """Of six tokens 0, 2 and 5 are chosen by every row: the others are no keys, and no rows."""
    spec = of_given(Select(threshold=0.5))
    x = random_tensors(spec, 6, 6)
    x["block_score"] = torch.tensor([1.0, 0, 1, 0, 0, 1]).expand(1, 6, 1, 6)
    assert seen(spec, x) == [{0}, set(), {0, 2}, set(), set(), {0, 2, 5}]
    result = reference(spec, x)
    assert (result.o[0, [1, 3, 4]] == 0).all()
    assert (result.lse["selected"][0, :, [1, 3, 4]] == -torch.inf).all()
    kept = [0, 2, 5]
    few = {name: y[:, kept] for name, y in x.items() if name != "block_score"}
    dense = make("dense", [], [Attend(name="selected", window="all")], kv=4)
    torch.testing.assert_close(result.o[:, kept], reference(dense, few).o)


def chosen_by(top_p: TopP, masses: list[float], **force: int) -> set[int]:
    """What the last of some rows keeps of tokens that have these masses."""
    n = len(masses)
    spec = of_given(Select(top_p=top_p, force=Force(**force)), normalise="softmax")
    spec = spec.model_copy(update={"attend": (SELECTED,)})
    x = random_tensors(spec, 1, n)
    x["block_score"] = torch.tensor(masses, dtype=torch.float64).log().view(1, 1, 1, n)
    return seen(spec, x)[0]


def test_masses_of_the_rest_leave_forced_entries_out() -> None:
    """The last of five tokens has half of the mass.  Of the rest .4 .3 .2 .1: .9 is reached by three; the
    forced one is on top, and no part of a least number."""
    masses = [0.05, 0.2, 0.1, 0.15, 0.5]
    rest = {"boundary": "drop", "of": "rest"}
    assert chosen_by(TopP(mass=0.91, **rest), masses, last=1) == {1, 2, 3, 4}
    assert chosen_by(TopP(mass=0.91, boundary="drop"), masses, last=1) == {1, 3, 4}
    assert chosen_by(TopP(mass=0.1, **rest), masses, last=1) == {4}
    assert chosen_by(TopP(mass=0.1, min=2, **rest), masses, last=1) == {1, 3, 4}


def test_scores_around_are_summed() -> None:
    """1 2 4 8 over three at a time, what lies outside being 0: 3 7 14 12."""
    given = Level(name="one", partition=Tokens(), score=Score(form="given", share="all"))
    score = Score(source="one", map="around", width=3)
    level = Level(name="block", partition=Tokens(), score=score, select=Select(top_k=2))
    spec = make("around", [given, level], [SELECTED], kv=4)
    x = random_tensors(spec, 1, 4)
    x["one_score"] = torch.tensor([1.0, 2, 4, 8]).view(1, 1, 1, 4)
    result = reference(spec, x)
    assert result.scores["block"][0, 0, 0].tolist() == [3, 7, 14, 12]
    assert result.selection["block"].indices[0, 0, 0].tolist() == [2, 3]


def test_heads_keep_as_many_tokens_and_not_the_same_ones() -> None:
    spec = make("compressed", compressed_tokens(), [CHOSEN_ROWS])
    x = random_tensors(spec, 21, 21)
    result = reference(spec, x)
    kept = [len([i for i in row if i >= 0]) for row in result.selection["block"].indices[0, 20]]
    shared = [i for i in result.selection["all"].indices[0, 20, 0] if i >= 0]
    assert kept == [len(shared)] * 4
    assert 2 < len(shared) < 21
    assert not torch.equal(*result.selection["block"].indices[0, 20, :2])
    last = result.selection["block"].indices[0, 20]
    assert all({19, 20} <= set(row.tolist()) for row in last)  # of the prompt, always


def test_tokens_that_go_are_those_of_theirs() -> None:
    """The rule of theirs, written out: from the least on, until the part that may go is reached; one more."""
    spec = make("compressed", compressed_tokens(), [CHOSEN_ROWS])
    x = random_tensors(spec, 40, 40)
    scores = reference(spec, x).scores["all"][0, -1, 0, :38]
    rising = (scores / scores.sum()).sort().values.cumsum(0)
    gone = int((rising < 0.2).sum()) + 1
    kept = reference(spec, x).selection["all"].indices[0, -1, 0]
    assert len([i for i in kept if i >= 0]) == 40 - gone


def test_documents_are_compressed_one_by_one() -> None:
    documents_alone(make("compressed", compressed_tokens(), [CHOSEN_ROWS]), (3, 17, 9))


def test_compression_asks_the_whole_prompt() -> None:
    assert causality(plan(make("compressed", compressed_tokens(), [CHOSEN_ROWS]))) == "prompt"


def test_rows_that_are_left_out_have_no_gradients() -> None:
    spec = make("compressed", compressed_tokens(), [CHOSEN_ROWS])
    x = {name: y.requires_grad_() for name, y in random_tensors(spec, 21, 21).items()}
    result = reference(spec, x)
    result.o.sum().backward()
    empty = (result.lse["selected"] == -torch.inf).transpose(1, 2)
    assert empty.any()
    assert (x["q"].grad[empty] == 0).all() and x["k"].grad.isfinite().all()


# --- entries that are chosen apart


def sides(select: Select, split: int, scores: list[float]) -> set[int]:
    """What the last row keeps of blocks of two that have these scores."""
    n = len(scores)
    level = Level(
        name="block",
        partition=blocks(2),
        score=Score(form="given", share="all"),
        select=select,
    )
    spec = make("apart", [level], [SELECTED], kv=4)
    x = random_tensors(spec, 1, 2 * n)
    x["block_score"] = torch.tensor(scores, dtype=torch.float64).view(1, 1, 1, n)
    x["block_split"] = torch.tensor([split])
    return {i for i in reference(spec, x).selection["block"].indices[0, 0, 0].tolist() if i >= 0}


def test_each_side_keeps_what_the_rule_says() -> None:
    """Blocks 0 to 3 lie before token 7, block 3 with one token after it; 4 and 5 behind."""
    scores = [9.0, 8, 7, 6, 2, 1]
    assert sides(Select(top_k=1, apart="input"), 7, scores) == {0, 4}
    assert sides(Select(fraction=0.5, apart="input"), 7, scores) == {0, 1, 4}
    assert sides(Select(tokens=4, apart="input"), 7, scores) == {0, 1, 4, 5}
    assert sides(Select(top_k=2, apart="input"), 0, scores) == {0, 1}
    assert sides(Select(top_k=2, apart="input"), 99, scores) == {0, 1}


def test_what_is_forced_counts_on_its_side() -> None:
    select = Select(top_k=2, apart="input", force=Force(first=1, last=1))
    assert sides(select, 6, [0.0, 8, 7, 6, 2, 1]) == {0, 1, 3, 5}


def diffusion(**reuse: object) -> Spec:
    kept = Reuse(level="block", over="steps", role="final", attend="given", **reuse)
    levels = apart(Select(fraction=0.4, apart="input"))
    return make("steps", levels, [SELECTED], causal=False, reuse=(kept,))


def test_early_steps_are_dense_and_later_ones_reuse_one_choice() -> None:
    """Two dense steps; the third is dense as well and chooses; from the fourth on the choice stays."""
    spec = diffusion(dense=2)
    dense = make("dense", [], [Attend(name="selected", window="all")], causal=False)
    state: dict[str, Kept] = {}
    chosen = []
    for step in range(5):
        x = random_tensors(spec, 16, 16, seed=step)
        result = reference(spec, x, state=state)
        state = result.state
        full = reference(dense, x).o
        assert torch.allclose(result.o, full) == (step < 3)
        chosen.append(result.selection.get("block"))
    assert torch.equal(chosen[2].indices, chosen[3].indices)
    assert torch.equal(chosen[2].indices, chosen[4].indices)


def test_a_block_of_rows_has_one_choice_of_two_parts() -> None:
    """The rule of theirs, written out: mean |P| of tiles, the best 0.4 of those before and behind."""
    spec = diffusion()
    x = random_tensors(spec, 16, 16)
    x["block_split"] = torch.tensor([8])
    p = (
        torch.einsum("thd,shd->hts", x["q"][0], x["k"][0].repeat_interleave(2, 1)) * 6**-0.5
    ).softmax(-1)
    tiles = p.unflatten(1, (4, 4)).unflatten(-1, (4, 4)).mean((2, 4))  # [H, 4, 4]
    found = reference(spec, x).selection["block"].indices[0]
    for t in (0, 5, 15):
        for h in range(4):
            row = tiles[h, t // 4]
            kept = {int(row[:2].argmax()), 2 + int(row[2:].argmax())}
            assert {i for i in found[t, h].tolist() if i >= 0} == kept


# --- tiles of axes


def tile_numbers(axes: tuple[int, ...], tile: tuple[int, ...]) -> list[int]:
    """Which tile each token is in, counted tile after tile along the axes."""
    counts = [-(-n // size) for n, size in zip(axes, tile, strict=True)]
    names = list(itertools.product(*map(range, counts)))
    tokens = itertools.product(*map(range, axes))
    return [names.index(tuple(i // s for i, s in zip(at, tile, strict=True))) for at in tokens]


def video(tile: tuple[int, ...], axes: tuple[int, ...], **select: object) -> Spec:
    """The two branches of vsa."""
    coarse = tiled("coarse", pool=Pool(keys="mean", values="mean"), tile=tile)
    levels = [coarse, tiled(select=Select(**select), tile=tile)]
    branches = [
        Attend(name="coarse", over="coarse", values="pooled", query="pooled"),
        SELECTED,
    ]
    combine = Combine(gates="channel")
    return make("video", levels, branches, kv=4, causal=False, axes=axes, combine=combine)


@pytest.mark.parametrize(
    ("axes", "tile"), [((4, 6), (2, 3)), ((3, 5), (2, 2)), ((3, 2, 5), (2, 2, 2)), ((7,), (3,))]
)
def test_coarse_and_fine_tiles_are_those_of_the_card(
    axes: tuple[int, ...], tile: tuple[int, ...]
) -> None:
    """Means of tiles, short ones over what they have; softmax over tiles for a tile; the best two."""
    spec = video(tile, axes, top_k=2)
    T = math.prod(axes)
    x = random_tensors(spec, T, T)
    of = torch.tensor(tile_numbers(axes, tile))
    n = int(of.max()) + 1
    q, k, v = (
        torch.stack([x[name][0][of == i].mean(0) for i in range(n)]) for name in ("q", "k", "v")
    )
    logits = torch.einsum("qhd,khd->hqk", q, k) * 6**-0.5
    coarse = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v)[of]
    best = logits.topk(2).indices  # [H, n, 2]
    fine = torch.zeros_like(coarse)
    for t, h in itertools.product(range(T), range(4)):
        seen = torch.isin(of, best[h, of[t]])
        p = (x["k"][0, seen, h] @ x["q"][0, t, h] * 6**-0.5).softmax(0)
        fine[t, h] = p @ x["v"][0, seen, h]
    gates = x["gates"][0]
    expected = gates[:, :, 0] * coarse + gates[:, :, 1] * fine
    torch.testing.assert_close(reference(spec, x).o[0], expected)


def test_equal_tiles_are_taken_in_order() -> None:
    """Theirs, too: lower tiles first, exactly k of them."""
    spec = video((2, 2), (4, 6), top_k=2)
    x = random_tensors(spec, 24, 24)
    x["q"] = torch.zeros_like(x["q"])
    assert reference(spec, x).selection["block"].indices.flatten(0, 2).unique(dim=0).tolist() == [
        [0, 1]
    ]


def test_gradients_reach_what_is_pooled_and_not_what_is_chosen() -> None:
    spec = video((2, 2), (4, 5), top_k=1)
    x = {name: y.requires_grad_() for name, y in random_tensors(spec, 20, 20).items()}
    reference(spec, x).o.sum().backward()
    assert all((x[name].grad != 0).all(-1).all() for name in ("q", "v"))
    closed = {name: y.detach().clone() for name, y in x.items()}
    closed["gates"][..., 0, :] = 0
    closed = {name: y.requires_grad_() for name, y in closed.items()}
    reference(spec, closed).o.sum().backward()
    assert (closed["v"].grad[0] == 0).all(-1).any()


def test_all_heads_choose_regions_together() -> None:
    """BiFormer: means over a region of all channels of all heads, the best two for every head."""
    level = tiled(select=top(2), tile=(2, 3), share="all", reduce="sum")
    spec = make("regions", [level], [SELECTED], kv=4, causal=False, axes=(4, 6))
    x = random_tensors(spec, 24, 24)
    of = torch.tensor(tile_numbers((4, 6), (2, 3)))
    q, k = (torch.stack([x[n][0][of == i].mean(0).flatten() for i in range(4)]) for n in ("q", "k"))
    best = (q @ k.T).topk(2).indices.sort(-1).values
    found = reference(spec, x).selection["block"].indices[0, :, 0]
    assert torch.equal(found.long(), best[of])


def test_open_axes_are_bound_before_they_are_planned() -> None:
    spec = video((2, 2), (4, 5), top_k=1).model_copy(update={"axes": ("any", 5)})
    with pytest.raises(PlanError, match="axes that are not known"):
        plan(spec)
    x = random_tensors(spec, 20, 20)
    torch.testing.assert_close(reference(spec, x).o, reference(video((2, 2), (4, 5), top_k=1), x).o)
