"""Costs of specs whose calls take over what others chose: means over a pattern, or a call that chooses."""

from __future__ import annotations

import pytest
from plan_cases import MEAN, blocks, top
from plan_cases import spec as make

from hsgen import spec as language
from hsgen.analysis import at_most, calls_text, costs, dense, describe, must_move, total
from hsgen.analysis.calls import FRESH, SHARED, computed
from hsgen.graph import Graph
from hsgen.planner import plan
from hsgen.spec import Attend, Level, Reuse, Score, Select, Spec

TOKENS = 4096


def chunks(select: Select | None = None, **reuse: object) -> Spec:
    """Blocks of 16 by their means, 8 of which a row keeps."""
    level = Level(
        name="chunk",
        partition=blocks(16),
        pool=MEAN,
        score=Score(form="dot"),
        select=select or top(8, last=1),
    )
    given = {"level": "chunk", "over": "layers", "role": "final", **reuse}
    more = {"reuse": (Reuse(**given),)} if reuse else {}
    branch = Attend(name="selected", over="chunk")
    return language.verify(make("chunks", [level], [branch], **more))


def flops(graph: Graph, name: str | None = None) -> float:
    cost = total(graph) if name is None else costs(graph)[name]
    return cost.flops.evaluate(TOKENS)


ALONE = plan(chunks())


@pytest.mark.parametrize(
    ("reuse", "fresh"),
    [({"every": 4}, 1 / 4), ({"pattern": "FFSFSSSS"}, 3 / 8), ({"every": 3, "lead": 5}, 1 / 3)],
)
def test_shared_calls_attend_and_choose_nothing(reuse: dict[str, object], fresh: float) -> None:
    """First calls are few, and do not count."""
    whole, attend = flops(ALONE), flops(ALONE, "selected.o")
    expected = fresh * whole + (1 - fresh) * attend
    assert flops(plan(chunks(**reuse))) == pytest.approx(expected)


def test_a_call_whose_choice_serves_others_attends_everything() -> None:
    graph = plan(chunks(pattern="FS", attend="given"))
    attend, full = flops(ALONE, "selected.o"), dense(ALONE).flops.evaluate(TOKENS)
    fresh = flops(ALONE) - attend + full
    assert flops(graph) == pytest.approx((fresh + attend) / 2)
    assert flops(graph, "selected.o") == full
    assert at_most(graph) == ()  # all of them, or 8 blocks


@pytest.mark.parametrize(
    "reuse", [{"over": "steps"}, {"dense": 3}, {"role": "candidates", "every": 4}]
)
def test_without_a_pattern_costs_are_of_a_call_that_chooses(reuse: dict[str, object]) -> None:
    """One call serves all others, or how much is left to choose among is not known."""
    graph = plan(chunks(**reuse))
    assert flops(graph) == pytest.approx(flops(ALONE))
    assert calls_text(graph) == "a call that chooses"
    assert "totals against dense attention, a call that chooses" in describe(graph)


def test_text_says_of_which_calls_costs_are() -> None:
    text = describe(plan(chunks(every=4)))
    assert "16-bit inputs, a call that chooses\n" in text
    assert "totals against dense attention, mean of 4 calls, 1 of which chooses\n" in text
    assert calls_text(plan(chunks(pattern="FFS"))) == "mean of 3 calls, 2 of which choose"
    assert calls_text(ALONE) == ""
    assert "a call that chooses" not in describe(ALONE)


def test_a_bound_stays_one_where_it_is_taken_over() -> None:
    assert at_most(plan(chunks(Select(threshold=0.5), every=2))) == ("selected.o",)


def test_a_call_reads_what_its_turn_needs() -> None:
    """One that chooses no kept set, one that takes over nothing that only choosing reads."""
    graph = plan(chunks(every=2))
    fresh, shared = computed(graph, FRESH), computed(graph, SHARED)
    assert "chunk.kept" in shared - fresh
    assert "chunk.score" in fresh - shared
    assert "selected.o" in fresh & shared
    read, kept = must_move(ALONE).evaluate(TOKENS), must_move(graph).evaluate(TOKENS)
    hands_on = must_move(plan(chunks(over="steps"))).evaluate(TOKENS)
    assert read <= hands_on < kept
