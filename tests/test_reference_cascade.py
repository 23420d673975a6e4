"""Cascades of rows that choose together: by hand, by a loop from SpAtten's card, and the laws."""

from __future__ import annotations

import math

import pytest
import torch
from plan_cases import CALLS, SELECTED, cascade, random_tensors, top
from plan_cases import spec as make
from torch import Tensor

from hsgen.analysis import causality, laws
from hsgen.errors import PlanError
from hsgen.planner import plan
from hsgen.reference import Result, reference
from hsgen.schedule import schedule
from hsgen.spec import Attend, HeadDim, Heads, Query, Reuse, Select, Spec, load
from hsgen.target import H100

ALL_ROWS = Query(last=99, reduce="sum", rows="chosen")
KEPT = Attend(name="selected", over="block", rows="chosen")
ALONE = {"heads": Heads(query=1, kv=1), "head_dim": HeadDim(qk=1, v=1)}


def over_layers(**more: object) -> tuple[Reuse, ...]:
    return (Reuse(level="block", over="layers", role="candidates", **more),)


CASCADE = {"reuse": over_layers(accumulate=True, attend="given")}


def spatten(fraction: float = 0.6, query: Query = ALL_ROWS, **more: object) -> Spec:
    levels = cascade(Select(fraction=fraction), query, share="all")
    return make("spatten", levels, [KEPT], **CASCADE, **more)


def column(*numbers: float) -> Tensor:
    """One channel of one head: [1, T, 1, 1]"""
    return torch.tensor(numbers, dtype=torch.float64).view(1, -1, 1, 1)


def play(made: Spec, layers: list[dict[str, Tensor]], **more: Tensor) -> list[Result]:
    """Layers with the state of the one before."""
    found: list[Result] = []
    for x in layers:
        state = found[-1].state if found else None
        found.append(reference(made, x, state=state, **more))
    return found


def tokens(result: Result, row: int = -1) -> list[int]:
    chosen = result.selection["block"].indices[0, row, 0]
    return [int(e) for e in chosen if e >= 0]


# --- by hand


def logits(*numbers: float) -> dict[str, Tensor]:
    """Queries are 1, so that keys are logits; the value of token s is 10^s."""
    n = len(numbers)
    return {
        "q": column(*[1.0] * n),
        "k": column(*(math.log(y) for y in numbers)),
        "v": column(*(10.0**s for s in range(n))),
    }


def test_a_cascade_over_three_layers() -> None:
    """Four tokens, every row sees all of them; of each layer's tokens the better half stays, or 3 of 4.

    Layer 0: shares 1 4 2 3 of 10, four rows: importance 0.4 1.6 0.8 1.2; 0.6 of 4 are 3: 1 2 3 stay.
    Layer 1: shares of 1 2 3 are 1 5 2 of 8, three rows: 1.6 + 0.375, 0.8 + 1.875, 1.2 + 0.75, which is
    1.975 2.675 1.95; 0.6 of 3 are 2: 1 and 2 stay, and 1 by what it had before.
    Layer 2: shares of 1 2 are 9 1 of 10, two rows: 1.975 + 1.8, 2.675 + 0.2; both stay.
    """
    made = make(
        "by_hand", cascade(Select(fraction=0.6), ALL_ROWS), [KEPT], causal=False, **CASCADE, **ALONE
    )
    layers = [logits(1, 4, 2, 3), logits(99, 1, 5, 2), logits(99, 9, 1, 99)]
    first, second, third = play(made, layers)
    assert [tokens(x) for x in (first, second, third)] == [[1, 2, 3], [1, 2], [1, 2]]
    kept = [x.state["block"].scores[0, -1, 0].tolist() for x in (first, second, third)]
    none = -math.inf
    assert kept[0] == pytest.approx([0.4, 1.6, 0.8, 1.2])
    assert kept[1] == pytest.approx([none, 1.975, 2.675, 1.95])
    assert kept[2] == pytest.approx([none, 3.775, 2.875, none])
    # a layer attends what the ones before have left, and rows that are dropped put out nothing
    assert first.o.flatten().tolist() == pytest.approx([(1 + 40 + 200 + 3000) / 10] * 4)
    assert second.o.flatten().tolist() == pytest.approx([0, *[(10 + 500 + 2000) / 8] * 3])
    assert third.o.flatten().tolist() == pytest.approx([0, *[(90 + 100) / 10] * 2, 0])
    assert torch.isneginf(third.lse["selected"][0, 0, [0, 3]]).all()


def test_rows_without_a_word_of_it_go_on_having_a_say() -> None:
    """The same second layer, to which row 0 adds its share as well: four rows instead of three."""
    query = Query(last=99, reduce="sum")
    made = make(
        "all_say", cascade(Select(fraction=0.6), query), [KEPT], causal=False, **CASCADE, **ALONE
    )
    _, second = play(made, [logits(1, 4, 2, 3), logits(99, 1, 5, 2)])
    kept = second.state["block"].scores[0, -1, 0].tolist()
    assert kept[1:] == pytest.approx([1.6 + 0.5, 0.8 + 2.5, 1.2 + 1.0])
    assert tokens(second) == [2, 3]


def test_ties_go_to_the_earlier_token() -> None:
    made = make(
        "ties", cascade(Select(fraction=0.5), ALL_ROWS), [KEPT], causal=False, **CASCADE, **ALONE
    )
    found = play(made, [logits(1, 1, 1, 1)] * 3)
    assert [tokens(x) for x in found] == [[0, 1], [0], [0]]


# --- by a loop


@pytest.mark.parametrize("causal", [True, False])
def test_spatten_is_what_its_card_says(causal: bool) -> None:
    """Importance: sum of probabilities over heads, rows and layers; a dropped token stays dropped."""
    made, n = spatten(causal=causal), 11
    layers = [random_tensors(made, n, n, seed=seed) for seed in range(4)]
    alive, importance = list(range(n)), dict.fromkeys(range(n), 0.0)
    for x, result in zip(layers, play(made, layers), strict=True):
        k, v = (x[name][0].repeat_interleave(2, 1) for name in ("k", "v"))
        wanted = torch.zeros(n, 4, 5, dtype=torch.float64)
        for t in alive:
            seen = [s for s in alive if s <= t or not causal]
            for h in range(4):
                share = (k[seen, h] @ x["q"][0, t, h] * 6**-0.5).softmax(0)
                wanted[t, h] = share @ v[seen, h]
                for s, y in zip(seen, share.tolist(), strict=True):
                    importance[s] += y
        torch.testing.assert_close(result.o[0], wanted)
        best = sorted(alive, key=lambda s: (-importance[s], s))
        alive = sorted(best[: math.ceil(0.6 * len(alive))])
        assert tokens(result) == alive
    assert len(alive) < 4


# --- laws


def test_what_is_dropped_never_comes_back() -> None:
    made = spatten()
    found = play(made, [random_tensors(made, 12, 12, seed=seed) for seed in range(5)])
    sets = [set(tokens(x)) for x in found]
    assert all(later <= earlier for earlier, later in zip(sets, sets[1:], strict=False))


def test_dropped_tokens_have_no_effect_on_later_layers() -> None:
    made = spatten()
    x, y = (random_tensors(made, 12, 12, seed=seed) for seed in (0, 1))
    first, second = play(made, [x, y])
    gone = sorted({*range(12)} - {*tokens(first)})
    other = {name: tensor.clone() for name, tensor in y.items()}
    for tensor in other.values():
        tensor[:, gone] = 7.0
    again = reference(made, other, state=first.state)
    assert torch.equal(again.o, second.o) and tokens(again) == tokens(second)


def test_a_cascade_that_keeps_all_is_dense_attention() -> None:
    made = spatten(fraction=1.0)
    dense = make("dense", [], [Attend(name="selected", window="all")])
    layers = [random_tensors(made, 9, 9, seed=seed) for seed in range(3)]
    for x, result in zip(layers, play(made, layers), strict=True):
        torch.testing.assert_close(result.o, reference(dense, x).o)


def test_packed_layers_equal_their_documents() -> None:
    made, lengths = spatten(), (7, 0, 12, 1)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    spans = list(zip([0, *ends], ends, strict=False))
    layers = [random_tensors(made, sum(lengths), sum(lengths), seed=seed) for seed in range(3)]
    flat = [{name: y[0] for name, y in x.items()} for x in layers]
    packed = play(made, flat, cu_seqlens_q=torch.tensor([0, *ends]))
    for a, b in spans:
        alone = play(made, [{name: y[:, a:b] for name, y in x.items()} for x in layers])
        for one, all_ in zip(alone, packed, strict=True):
            torch.testing.assert_close(all_.o[a:b], one.o[0])


def test_calls_of_no_rows_and_gradients() -> None:
    made = spatten()
    found = play(made, [random_tensors(made, 0, 4, seed=seed) for seed in range(3)])
    assert all(x.o.shape == (1, 0, 4, 5) for x in found)
    layers = [random_tensors(made, 8, 8, seed=seed) for seed in range(3)]
    layers = [{name: y.requires_grad_() for name, y in x.items()} for x in layers]
    last = play(made, layers)[-1]
    for grad in torch.autograd.grad(last.o.sum(), [*layers[-1].values()]):
        assert grad.isfinite().all()


def test_a_fresh_call_ends_the_cascade() -> None:
    reuse = over_layers(every=2, accumulate=True)
    made = make("c", cascade(top(4), ALL_ROWS), [SELECTED], reuse=reuse)
    layers = [random_tensors(made, 9, 9, seed=seed) for seed in range(3)]
    found = play(made, layers)
    assert tokens(found[1]) == tokens(found[0])
    assert tokens(found[2]) == tokens(reference(made, layers[2]))


@pytest.mark.parametrize("case", [c for c in CALLS if "cascade_of" in c.name], ids=lambda c: c.name)
def test_rows_together_keep_one_set(case: Spec) -> None:
    """Rows of a group choose the same in every call, as far as each sees it."""
    rows = case.levels[0].query
    layers = [random_tensors(case, 12, 12, seed=seed) for seed in range(4)]
    for result in play(case, layers):
        if "block" not in result.selection:
            continue
        chosen = result.selection["block"].indices[0]
        for t in range(11):
            together = rows.last is not None or t // rows.block == (t + 1) // rows.block
            assert not together or torch.equal(chosen[t], chosen[t + 1])


# --- shipped


def test_shipped_spec() -> None:
    made = load("spatten")
    graph = plan(made)
    assert causality(graph) == "prompt"
    assert not laws(graph).future_never_changes_the_past
    assert [made.reuse[0].turn(call)[0] for call in range(4)] == list("fsss")
    with pytest.raises(PlanError, match="takes over a selection"):
        schedule(graph, H100)
