"""Columns, diagonals and blocks head by head: by hand, by loops written from the papers, and laws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from plan_cases import UNION, random_tensors, top
from plan_cases import spec as make
from plan_cases_slash import MASS, SLASH, SLASHES, columns, flex, near, slash, sparge, wide

from hsgen.analysis import causality, costs, laws
from hsgen.errors import PlanError, SpecError
from hsgen.planner import plan
from hsgen.reference import reference
from hsgen.reference.likeness import alike
from hsgen.reference.routes import computed_ways
from hsgen.schedule import schedule
from hsgen.selection import members
from hsgen.spec import Attend, Blocks, HeadDim, Heads, Query, Score, Select, Spec, verify
from hsgen.target import H100

NAMES = [case.name for case in SLASH]


def chosen(spec: Spec, tensors: dict, level: str = "slash", **more: object) -> torch.Tensor:
    """bool[T, Hs, N] of the first sequence."""
    selection = reference(spec, tensors, **more).selection[level]
    N = -(-tensors["k"].shape[1] // spec.level(level).partition.stride)
    return members(selection, N)[0]


def seen(spec: Spec, tensors: dict) -> torch.Tensor:
    """What each row attends, read off an output whose values are one-hot.  bool[T, Hq, S]"""
    S = tensors["k"].shape[1]
    eye = torch.eye(S, dtype=torch.float64)[None, :, None].expand(1, -1, spec.heads.kv, -1)
    wide = spec.model_copy(update={"head_dim": HeadDim(qk=spec.head_dim.qk, v=S)})
    return reference(wide, tensors | {"v": eye}).o[0] > 0


def one_head(*levels: object, branches: list[Attend], **more: object) -> Spec:
    spec = make("one", [*levels], branches, kv=1, **more)
    return spec.model_copy(update={"heads": Heads(query=1, kv=1)})


# --- by hand


def test_diagonals_are_counted_back_from_each_row() -> None:
    """Logits of three keys: 2, 0, 1 for each row, so that each choice can be read off."""
    spec = one_head(slash(Select(top_k=1), query=None, score=MASS), branches=[SLASHES])
    keys = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64)
    x = random_tensors(spec, 3, 3, batch=1)
    x["q"] = torch.zeros_like(x["q"])
    x["q"][..., 0] = spec.head_dim.qk**0.5
    x["k"] = torch.zeros_like(x["k"])
    x["k"][0, :, 0, 0] = keys
    found = reference(spec, x)
    assert found.selection["slash"].indices[0, :, 0, 0].tolist() == [0, 1, 2]  # always key 0
    mass = torch.tensor([1.0, 0.0, 2.0]).double().softmax(0)  # of row 2: keys 2, 1, 0
    torch.testing.assert_close(found.scores["slash"][0, 2, 0], mass)


def test_masses_are_summed_along_diagonals_of_the_last_rows() -> None:
    """Two last rows that give all mass to the key 2 before them: the diagonal 2, for every row."""
    spec = one_head(slash(Select(top_k=1), query=Query(last=2, reduce="sum")), branches=[SLASHES])
    x = random_tensors(spec, 5, 5, batch=1)
    x["q"], x["k"] = torch.zeros_like(x["q"]), torch.zeros_like(x["k"])
    for row in (3, 4):
        x["q"][0, row, 0, row - 2] = 1e3
        x["k"][0, row - 2, 0, row - 2] = 1.0
    found = seen(spec, x)[:, 0]
    assert found.nonzero().tolist() == [[2, 0], [3, 1], [4, 2]]  # rows 0 and 1 have no such key


def test_wide_diagonals_are_blocks_of_rows_and_keys() -> None:
    spec = one_head(*wide(4, near(1, 1)), branches=[SLASHES])
    x = random_tensors(spec, 10, 10, batch=1)
    expected = [[s // 4 == t // 4 and s <= t for s in range(10)] for t in range(10)]
    assert seen(spec, x)[:, 0].tolist() == expected


def test_a_token_that_both_reach_counts_once() -> None:
    """Every column and every diagonal: dense attention, whatever is in both."""
    spec = one_head(
        columns(Select(top_k=99)), slash(Select(top_k=99)),
        branches=[Attend(name="columns", over="block"), SLASHES], combine=UNION,
    )  # fmt: skip
    dense = one_head(branches=[Attend(name="all", window="all")])
    x = random_tensors(spec, 9, 9, batch=1)
    torch.testing.assert_close(reference(spec, x).o, reference(dense, x).o)


# --- by loops written from the papers


def vertical_slash(q, k, n_v, n_s, last, first_columns, near_diagonals):
    """Of one head: the mask of MInference's vertical-slash heads.  [T, D], [T, D] -> bool[T, T]"""
    T = len(q)
    vertical, diagonal = [0.0] * T, [0.0] * T
    for t in range(max(0, T - last), T):
        logits = [(q[t] @ k[s] / len(q[t]) ** 0.5).item() for s in range(t + 1)]
        masses = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
        for s, mass in enumerate(masses):
            vertical[s] += mass
            diagonal[t - s] += mass
    for s in range(min(first_columns, T)):
        vertical[s] = float("inf")
    for o in range(min(near_diagonals, T)):
        diagonal[o] = float("inf")
    best = [sorted(range(T), key=lambda i: (-x[i], i)) for x in (vertical, diagonal)]  # noqa: B023
    kept_v, kept_s = {*best[0][:n_v]}, {*best[1][:n_s]}
    return [[s <= t and (s in kept_v or t - s in kept_s) for s in range(T)] for t in range(T)]


@pytest.mark.parametrize("T", [1, 3, 21])
def test_minference_is_its_paper(T: int) -> None:
    spec = next(case for case in SLASH if case.name == "minference")
    x = random_tensors(spec, T, T, batch=1)
    x["route"] = torch.zeros(spec.heads.query, dtype=torch.int32)
    found, group = seen(spec, x), spec.heads.group
    for h in range(spec.heads.query):
        q, k = x["q"][0, :, h], x["k"][0, :, h // group]
        assert found[:, h].tolist() == vertical_slash(q, k, 4, 3, 4, 2, 1), h


def test_each_head_takes_its_way() -> None:
    spec = next(case for case in SLASH if case.name == "minference")
    x = random_tensors(spec, 21, 21, batch=1)
    masks = []
    for way in range(3):
        x["route"] = torch.full((spec.heads.query,), way, dtype=torch.int32)
        masks.append(seen(spec, x))
    x["route"] = torch.tensor([2, 0, 1, 0], dtype=torch.int32)[: spec.heads.query]
    found = seen(spec, x)
    for h, way in enumerate(x["route"].tolist()):
        assert torch.equal(found[:, h], masks[way][:, h])


# --- FlexPrefill


def distance(p: list[float], q: list[float]) -> float:
    """The root of the Jensen-Shannon divergence, number by number."""
    found = 0.0
    for x, y in zip(p, q, strict=True):
        middle = (x + y) / 2
        found += sum(z * math.log(z / middle) for z in (x, y) if z > 0) / 2
    return math.sqrt(max(found, 0.0))


def flex_prefill(q, k, B, gamma, tau):
    """Of one head: its mask and its distance, as the card says.  [T, D], [T, D]"""
    T, D = q.shape
    N = -(-T // B)
    last = range(max(0, T - B), T)
    true = torch.zeros(len(last), T, dtype=torch.float64)
    for i, t in enumerate(last):
        true[i, : t + 1] = (k[: t + 1] @ q[t] / D**0.5).softmax(0)
    column, diagonal = true.mean(0).tolist(), [0.0] * T
    for i, t in enumerate(last):
        for s in range(t + 1):
            diagonal[t - s] += true[i, s].item() / len(last)
    by_block = [[sum(x[n * B : n * B + B]) for n in range(N)] for x in (column, diagonal)]
    means = torch.stack([k[n * B : n * B + B].mean(0) for n in range(N)])
    estimate = (means @ q[last.start :].mean(0) / D**0.5).softmax(0).tolist()
    far = distance(estimate, by_block[0])
    kept = {(n, 0) for n in range(N)} | {(n, n) for n in range(N)}
    if far < tau:
        masses = []
        for m in range(N):
            row = (means[: m + 1] @ q[m * B : m * B + B].mean(0) / D**0.5).softmax(0).tolist()
            masses += [(-mass, m, n) for n, mass in enumerate(row)]
        total = 0.0
        for mass, m, n in sorted(masses):
            total -= mass
            kept |= {(m, n)} if total <= gamma * N else set()
    else:
        for which, (tokens, sums) in enumerate(zip((column, diagonal), by_block, strict=True)):
            running = itertools.accumulate(sorted(tokens, reverse=True))
            fewest = 1 + sum(x < gamma * sum(tokens) for x in running)
            best = sorted(range(1, N), key=lambda n: (-sums[n], n))[: fewest // B]
            for m, n in itertools.product(range(N), (0, *best)):
                kept |= {(m, n) if which == 0 else (m, m - n)}
    mask = [[s <= t and (t // B, s // B) in kept for s in range(T)] for t in range(T)]
    return mask, far


@pytest.mark.parametrize("T", [4, 20, 36])
@pytest.mark.parametrize("tau", [1e-6, 0.15, 1.0])
def test_flex_prefill_is_its_card(T: int, tau: float) -> None:
    """Heads of one prompt go both ways where the threshold lies between their distances."""
    spec = flex(tau)
    x = random_tensors(spec, T, T, batch=1)
    found, group = seen(spec, x), spec.heads.group
    for h in range(spec.heads.query):
        mask, _ = flex_prefill(x["q"][0, :, h], x["k"][0, :, h // group], 4, 0.6, tau)
        assert found[:, h].tolist() == mask, h


def test_distances_are_of_prompts_and_heads() -> None:
    """A head of one sequence takes a way that the same head of another does not take."""
    x = random_tensors(flex(1.0), 24, 24, batch=6)
    far = [
        flex_prefill(x["q"][b, :, h], x["k"][b, :, h // 2], 4, 0.6, 1.0)[1]
        for b, h in itertools.product(range(6), range(4))
    ]
    spec = flex(sorted(far)[12])
    below = torch.tensor(far).view(6, 4) < sorted(far)[12]
    found = reference(spec, x).selection["pooled"].words.ne(0).any(-1)  # [B, T, Hq]
    assert torch.equal(found.any(1), below) and below.any(0).ne(below.all(0)).any()
    ways = [reference(spec, {n: y[b : b + 1] for n, y in x.items()}) for b in range(6)]
    whole = reference(spec, x)
    torch.testing.assert_close(whole.o, torch.cat([way.o for way in ways]))


def test_equal_estimates_have_no_distance() -> None:
    """0, and not NaN: a mass that both say is 0 takes no part, where theirs is NaN and another way."""
    p = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]], dtype=torch.float64)
    q = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]], dtype=torch.float64)
    spec = flex(0.8)
    scores = {"estimate": p, "column_block": q}
    assert computed_ways(spec, scores).tolist() == [0, 1]  # the root of log 2 is 0.83
    assert computed_ways(flex(0.84), scores).tolist() == [0, 0]
    assert computed_ways(spec, {"estimate": p}) is None


def test_budgets_in_tokens_hold_more_than_is_kept() -> None:
    """Of 4 tokens an entry: 3 tokens are in one, 4 and 5 take two, as n // 128 + 1 of theirs."""
    for kept, blocks_kept in ((3, 1), (4, 2), (5, 2), (8, 3)):
        spec = one_head(
            columns(Select(top_k=kept), query=None).model_copy(update={"name": "token"}),
            columns(
                Select(budget_from="token", budget_in="tokens"),
                query=None,
                score=Score(source="token", map="sum"),
            ).model_copy(update={"partition": Blocks(size=4, stride=4)}),
            branches=[Attend(name="selected", over="block")],
        )
        x = random_tensors(spec, 16, 16, batch=1)
        assert chosen(spec, x, "block")[-1].sum() == blocks_kept


# --- SpargeAttn


def cosine(x, y) -> float:
    return (x @ y / (x.norm() * y.norm())).item()


def likeness(x) -> float:
    """Of a block, pair by pair."""
    return sum(cosine(y, z) for y in x for z in x) / len(x) ** 2


def sparge_blocks(q, k, rows, size, similarity, mass):
    """Of one head: key blocks by block of queries, as the card says.  [T, D], [T, D] -> rows of sets"""
    T, D = q.shape
    keys = [k[s : s + size] - k.mean(0) for s in range(0, T, size)]
    queries = [q[t : t + rows] for t in range(0, T, rows)]
    alike = [likeness(x) > similarity for x in keys]
    found = []
    for m, x in enumerate(queries):
        visible = [n for n in range(len(keys)) if n * size < (m + 1) * rows]
        unlike = likeness(x) <= similarity
        kept = {n for n in visible if unlike or not alike[n]}
        scored = [n for n in visible if alike[n]]
        logits = [(x.mean(0) @ keys[n].mean(0)).item() / D**0.5 for n in scored]
        masses = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
        total = 0.0
        for i, (share, n) in enumerate(sorted(zip(masses, scored, strict=True), reverse=True)):
            total += share
            kept |= {n} if total <= mass or i == 0 else set()
        found.append(kept)
    return found


@pytest.mark.parametrize(("rows", "size"), [(8, 4), (4, 8), (4, 4)])
@pytest.mark.parametrize("T", [3, 32, 41])
@pytest.mark.parametrize("similarity", [-1.0, 0.3, 1.0])
def test_sparge_is_its_card(rows: int, size: int, T: int, similarity: float) -> None:
    """Also blocks of 64 by 128, as on sm90, of a length that neither divides: theirs wants a mask of
    another shape there than their page says, and reads beside the one that it is given.
    """
    spec = sparge(similarity, rows=rows, size=size)
    x = alike_in_part(spec, T)
    found, group = chosen(spec, x, "block"), spec.heads.group
    for h in range(spec.heads.query):
        kept = sparge_blocks(x["q"][0, :, h], x["k"][0, :, h // group], rows, size, similarity, 0.7)
        for t in range(T):
            if len(kept[t // rows]) == 0:
                continue
            assert {*found[t, h].nonzero().flatten().tolist()} == kept[t // rows], (h, t)


def alike_in_part(spec: Spec, T: int) -> dict:
    """Tokens of every other run of 8 have much in common."""
    x = random_tensors(spec, T, T, batch=1)
    common = random_tensors(spec, 1, 1, batch=1, seed=5)
    often = (torch.arange(T) // 8 % 2 == 0)[None, :, None, None]
    return {n: y + 3 * common[n] * often if n in ("q", "k") else y for n, y in x.items()}


def test_sparge_sees_no_later_token_of_its_own_block() -> None:
    """Their CUDA calls pass False for causal, so that a row sees to the end of its key block."""
    spec = sparge(1.0)
    x = random_tensors(spec, 9, 9, batch=1)
    t, s = torch.arange(9)[:, None], torch.arange(9)
    assert torch.equal(seen(spec, x), (s <= t)[:, None].expand(-1, spec.heads.query, -1))


def test_keys_need_not_be_centred() -> None:
    """Theirs has no mean to read where keys are not smoothed.  One mean in all keys: all alike."""
    x = random_tensors(sparge(0.5), 16, 16, batch=1)
    x["k"] = x["k"] + 100 * torch.ones_like(x["k"])
    x["q"] = x["q"] + 100 * torch.ones_like(x["q"])
    plain = reference(sparge(0.9, centred=False), x)
    assert not plain.forced["block"].any()
    centred = reference(sparge(0.9), x)
    torch.testing.assert_close(plain.scores["block"], centred.scores["block"])
    assert centred.forced["block"].any()


def test_vectors_of_zeros_are_like_none() -> None:
    x = torch.zeros(3, 1, 2, dtype=torch.float64)
    there = torch.ones(3, 1, 1, dtype=torch.bool)
    assert alike(x, there).tolist() == [0.0]
    x[0] = torch.tensor([[3.0, 4.0]])
    assert alike(x, there).tolist() == pytest.approx([1 / 9])
    there[1:] = False
    assert alike(x, there).tolist() == pytest.approx([1.0])


def test_smoothing_changes_no_mass() -> None:
    """A mean that is taken off all keys is one number less in all logits of a row."""
    x = random_tensors(sparge(-1.0), 16, 16, batch=1)
    moved = x | {"k": x["k"] - x["k"].mean(1, keepdim=True)}
    one, other = (reference(sparge(-1.0), y).selection["block"].words for y in (x, moved))
    assert torch.equal(one, other)


def test_likeness_is_of_the_prompt_where_keys_are_centred() -> None:
    assert causality(plan(sparge(0.5))) == "prompt"
    assert causality(plan(sparge(0.5, centred=False))) == "query_block"


# --- edges and laws


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T", [1, 2, 5])
def test_few_rows_are_numbers(name: str, T: int) -> None:
    spec = SLASH[NAMES.index(name)]
    assert reference(spec, random_tensors(spec, T, T)).o.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_documents_of_a_batch_are_alone(name: str) -> None:
    spec = SLASH[NAMES.index(name)]
    lengths = [9, 1, 13]
    parts = [random_tensors(spec, n, n, batch=1, seed=i) for i, n in enumerate(lengths)]
    packed = {n: torch.cat([x[n][0] for x in parts]) for n in ("q", "k", "v")}
    route = {n: parts[0][n] for n in parts[0] if n == "route"}
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    found = reference(spec, packed | route, cu_seqlens_q=cu).o
    alone = [reference(spec, x | route).o[0] for x in parts]
    torch.testing.assert_close(found, torch.cat(alone))


def test_diagonals_of_each_row_are_causal() -> None:
    """Nothing of a whole prompt is asked: a decode step is a row of prefill."""
    spec = next(case for case in SLASH if case.name == "diagonals_of_each_row")
    graph = plan(spec)
    assert causality(graph) == "token"
    assert laws(graph).decode_equals_prefill_row
    x = random_tensors(spec, 14, 14, batch=1)
    step = {n: y[:, -1:] if n == "q" else y for n, y in x.items()}
    torch.testing.assert_close(reference(spec, step).o[:, 0], reference(spec, x).o[:, -1])


def test_what_only_the_last_rows_are_asked_costs_so_many_rows() -> None:
    """And not a score of every row with every key, which would be as much as dense attention."""
    spec = next(case for case in SLASH if case.name == "diagonals")
    T, last = 8192, 4
    found = costs(plan(spec))["slash.score"].flops.evaluate(T)
    assert found == 2 * spec.head_dim.qk * spec.heads.query * last * T


def test_a_chosen_diagonal_that_a_row_has_not_is_nothing() -> None:
    spec = one_head(slash(), branches=[SLASHES])
    x = random_tensors(spec, 6, 6, batch=1)
    given = torch.full((1, 6, 1, 3), -1, dtype=torch.int32)
    given[..., 0] = 4
    found = reference(spec, x, selection={"slash": given})
    assert (found.o[0, :4] == 0).all()
    torch.testing.assert_close(found.o[0, 4:, 0], x["v"][0, :2, 0])


def test_kernels_refuse_diagonals_by_name() -> None:
    spec = one_head(slash(query=None), branches=[SLASHES])
    with pytest.raises(PlanError, match="level slash: no kernel scores along diagonals yet"):
        schedule(plan(spec), H100)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (one_head(slash(), branches=[SLASHES], causal=False), "'causal: true' with 'diagonals'"),
        (one_head(slash(top(3, last=1)), branches=[SLASHES]), "next to the row"),
        (
            one_head(slash(score=MASS.model_copy(update={"form": "bias"})), branches=[SLASHES]),
            "form 'dot' for diagonals",
        ),
    ],
)
def test_what_diagonals_cannot_be(spec: Spec, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        verify(spec)
