"""Passes keep the meaning, node by node where nodes survive."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from graph_interpreter import evaluate
from plan_cases import CASES, GATES, blocks, random_tensors
from plan_cases import spec as make

from hsgen import passes
from hsgen import spec as language
from hsgen.graph import Graph, GraphError, Normalise, Select
from hsgen.planner import plan
from hsgen.spec import Attend, Level, Pool, Score, Spec

SHARING = {"nsa", "nsa_wide", "nsa_not_causal", "nsa_union"}  # nsa_scale scores by another scale

BORROWING = """
hsgen: 1
name: borrowing
levels:
  - name: coarse
    partition: {blocks: 8}
    pool: {keys: mean}
    score: {form: dot}
  - name: block
    partition: {blocks: 4}
    pool: {keys: mean}
    score: {form: dot, normalise: softmax, lse_from: coarse}
    select: {top_k: 3}
attend: [{name: selected, over: block}]
"""
SELECTED_UPPER = Attend(name="selected", over="upper")

each_case = pytest.mark.parametrize("spec", CASES, ids=lambda spec: spec.name)
each_pass = pytest.mark.parametrize("each", passes.PASSES, ids=lambda each: each.__name__)


@each_pass
@each_case
def test_a_pass_keeps_the_meaning(spec: Spec, each: passes.Pass) -> None:
    """Selections bit for bit; numbers up to another order of summation."""
    tensors = random_tensors(spec, 21, 29)
    before, after = evaluate(plan(spec), tensors), evaluate(each(plan(spec)), tensors)
    torch.testing.assert_close(after.o, before.o)
    for level, indices in before.selection.items():
        assert torch.equal(after.selection[level], indices)
    for branch, lse in before.lse.items():
        torch.testing.assert_close(after.lse[branch], lse)


@each_pass
@each_case
def test_a_pass_is_idempotent(spec: Spec, each: passes.Pass) -> None:
    once = each(plan(spec))
    assert each(once) == once


@each_case
def test_log_sum_exp_is_shared_exactly_where_it_is_the_same(spec: Spec) -> None:
    graph = passes.run(plan(spec))
    if "compressed.mass" in graph:
        source = spec.level("compressed").score.lse_from
        if source:  # another level's: no branch attends it
            assert graph["compressed.mass"].inputs[1] == f"{source}.score_lse"
            return
        shared = graph["compressed.mass"].inputs[1] == "compressed.lse"
        assert shared == (spec.name in SHARING)
        assert shared != ("compressed.score_lse" in graph)


def test_logits_are_ranked_where_their_own_softmax_alone_would_be() -> None:
    """A loss may want the masses all the same; sums over heads do."""
    graph = passes.run(plan(language.load("seer_attention_r")))
    assert graph["block.selection"].inputs[0] == "block.score"
    assert "block.mass" in graph
    assert not {"block.mass", "block.score_lse"} & {
        x.name for x in passes.without_losses(graph).nodes()
    }
    nsa = passes.run(plan(language.load("nsa")))
    assert any(isinstance(node.op, Normalise) for node in nsa.nodes())


def test_masses_by_another_sum_are_ranked_as_they_are() -> None:
    """It may be of nothing, and then all of them are alike."""
    graph = plan(language.parse(BORROWING))
    borrowed = graph["block.mass"].inputs
    assert borrowed == ("block.score", "coarse.score_lse")
    assert passes.rank_logits(graph) == graph


def test_a_branch_with_other_keys_shares_nothing() -> None:
    """Same level, but the branch's keys were pooled by another operator."""
    nsa = plan(next(spec for spec in CASES if spec.name == "nsa"))
    other = replace(nsa["compressed.keys"], name="other.keys")
    attend = nsa["compressed.o"]
    attend = replace(attend, inputs=("q", "other.keys", *attend.inputs[2:]))
    graph = passes.run(nsa.with_nodes([*nsa.nodes(), other]).replacing(attend))
    assert graph["compressed.mass"].inputs == ("compressed.score", "compressed.score_lse")


@pytest.mark.parametrize(
    ("select", "softcap"), [(language.Select(top_k=3), None), (None, 5.0), (None, None)]
)
def test_a_branch_whose_sum_is_another_shares_nothing(
    select: language.Select | None, softcap: float | None
) -> None:
    """One that attends selected entries alone, which scores select; one that caps its logits."""
    level = Level(
        name="block",
        partition=blocks(4),
        pool=Pool(keys="mean", values="mean"),
        score=Score(form="dot", normalise="softmax"),
        select=select,
    )
    branch = Attend(name="summary", over="block", values="pooled", softcap=softcap)
    upper = Level(
        name="upper",
        partition=blocks(8),
        score=Score(source="block", map="sum"),
        select=language.Select(top_k=2),
    )
    spec = make("summaries", [level, upper], [branch, SELECTED_UPPER], combine=GATES)
    graph = passes.run(plan(spec))
    shared = graph["block.mass"].inputs[1] == "summary.lse"
    assert shared == (select is None and softcap is None)
    tensors = random_tensors(spec, 21, 29)
    torch.testing.assert_close(evaluate(graph, tensors).o, evaluate(plan(spec), tensors).o)


def test_dead_nodes_go() -> None:
    graph = plan(CASES[0])
    unused = replace(graph["block.keys"], name="unused")
    assert passes.drop_dead(graph.with_nodes([*graph.nodes(), unused])) == graph


def test_an_error_names_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def widen_selections(graph: Graph) -> Graph:
        node = next(node for node in graph.nodes() if isinstance(node.op, Select))
        return graph.replacing(replace(node, op=replace(node.op, width=99)))

    monkeypatch.setattr(passes, "PASSES", (passes.drop_dead, widen_selections))
    with pytest.raises(GraphError, match="after widen_selections: %block.selection: width 99"):
        passes.run(plan(CASES[0]))


def test_the_interpreter_sees_a_changed_meaning() -> None:
    graph = plan(CASES[0])
    node = graph["block.selection"]
    fewer = graph.replacing(replace(node, op=replace(node.op, k=2, width=2)))
    tensors = random_tensors(CASES[0], 37, 37)
    assert not torch.allclose(evaluate(graph, tensors).o, evaluate(fewer, tensors).o)
