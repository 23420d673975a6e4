"""Columns, diagonals and blocks head by head: by hand, by loops written from the papers, and laws."""

from __future__ import annotations

import itertools

import pytest
import torch
from plan_cases import UNION, random_tensors, top
from plan_cases import spec as make
from plan_cases_slash import MASS, SLASH, SLASHES, columns, near, slash, wide

from hsgen.analysis import causality, costs, laws
from hsgen.errors import PlanError, SpecError
from hsgen.planner import plan
from hsgen.reference import reference
from hsgen.schedule import schedule
from hsgen.selection import members
from hsgen.spec import Attend, HeadDim, Heads, Query, Select, Spec, verify
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
