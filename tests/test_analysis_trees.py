"""What the graph derives of trees, runs, halves and stripes: causality, laws, costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from graph_interpreter import Attended, Scores, evaluate
from plan_cases import random_tensors
from plan_cases import spec as make
from plan_cases_trees import TREES

from hsgen import passes
from hsgen.analysis import (
    Polynomial,
    at_most,
    causality,
    costs,
    describe,
    laws,
    not_dense_because,
)
from hsgen.errors import PlanError
from hsgen.graph import Attend, Graph, Score, Select, SelectSet
from hsgen.planner import plan
from hsgen.schedule import schedule
from hsgen.spec import Attend as Branch
from hsgen.spec import Kl, Loss, Reuse, Spec
from hsgen.target import H100

each_case = pytest.mark.parametrize("spec", TREES, ids=lambda spec: spec.name)
# later keys say what tokens are in, later rows which are chosen
PROMPT = {"tree_capacity", "runs_found", "upsampled_together", "halved_last"}
TOGETHER = {"tree_together", "runs_together", "halved_together", "halved_rows", "halved_means"}


@each_case
def test_causality(spec: Spec) -> None:
    expected = (
        "none"
        if not spec.causal
        else "prompt"
        if spec.name in PROMPT
        else "query_block"
        if spec.name in TOGETHER
        else "token"
    )
    assert causality(plan(spec)) == expected


@each_case
def test_the_future_never_changes_the_past_where_the_law_says(spec: Spec) -> None:
    graph = plan(spec)
    x, other = (random_tensors(spec, 37, 37, seed=seed) for seed in (0, 1))
    learned = ("_centroids",)
    changed = {
        n: y if n.endswith(learned) else torch.cat((y[:, :21], other[n][:, 21:]), 1)
        for n, y in x.items()
    }
    before, after = evaluate(graph, x).o[:, :21], evaluate(graph, changed).o[:, :21]
    if laws(graph).future_never_changes_the_past:
        assert torch.equal(before, after)


def all_selected(graph: Graph) -> Graph:
    changed = [
        replace(node, op=replace(node.op, k=64, width=64 + bool(node.op.tail), counted=True))
        for node in graph.nodes()
        if isinstance(node.op, Select)
    ]
    return graph.replacing(*changed)


def has_budgets(spec: Spec) -> bool:
    """Whether every selection has a number of entries that can be raised."""
    return not any(isinstance(node.op, SelectSet) for node in plan(spec).nodes())


@pytest.mark.parametrize("spec", filter(has_budgets, TREES), ids=lambda spec: spec.name)
def test_dense_when_all_selected_where_the_law_says(spec: Spec) -> None:
    assert spec.heads is not None
    tensors = random_tensors(spec, 37, 37)
    window = Branch(name="all", window="all")
    dense = plan(make("dense", [], [window], causal=spec.causal, kv=spec.heads.kv))
    expected = evaluate(dense, {name: tensors[name] for name in ("q", "k", "v")}).o
    actual = evaluate(all_selected(plan(spec)), tensors).o
    holds = laws(plan(spec)).dense_when_all_selected
    assert torch.allclose(actual, expected) == holds, not_dense_because(plan(spec))


def reason(name: str) -> str | None:
    return not_dense_because(plan(next(spec for spec in TREES if spec.name == name)))


def test_reasons() -> None:
    assert reason("stripes") == "branch spans has a softmax of its own for every span"
    assert reason("runs_drawn") == "level block does not force the own run"
    assert reason("tree_capacity") == "nodes of level leaf leave out what they have no room for"
    assert reason("tree") is None


@each_case
def test_costs_are_at_least_what_the_interpreter_sees(spec: Spec) -> None:
    tokens = 48
    graph = passes.run(plan(spec))
    values = evaluate(graph, random_tensors(spec, tokens, tokens)).values
    for node in graph.nodes():
        value, flops = values[node.name], costs(graph)[node.name].flops.evaluate(tokens)
        assert flops >= 0, node.name
        if isinstance(node.op, Score) and node.op.form == "dot" and isinstance(value, Scores):
            probes = (
                2 * (node.op.size // node.op.halves.until).bit_length() - 2 if node.op.halves else 1
            )
            assert flops * 1.3 >= 2 * 6 * probes * value.there[0].sum().item(), node.name
        if isinstance(node.op, Attend) and isinstance(value, Attended):
            assert value.seen is not None
            slack = 1.35 if spec.name in TOGETHER else 1.1  # of blocks of rows the mean is a guess
            assert flops * slack >= 2 * (6 + 5) * value.seen[0].sum().item(), node.name


def test_anchors_cost_the_root_of_what_is_behind() -> None:
    """Row p has floor(sqrt(p + 1)) anchors; summed over 4096 rows, within one percent."""
    spec = next(spec for spec in TREES if spec.name == "stripes")
    flops = costs(plan(spec))["block.score"].flops
    exact = sum(int((p + 1) ** 0.5) for p in range(4096)) * 4 * 2 * 6
    assert flops.evaluate(4096) == pytest.approx(exact, rel=0.01)


def test_what_is_bounded_is_said() -> None:
    by_name = {spec.name: passes.run(plan(spec)) for spec in TREES}
    assert at_most(by_name["stripes"]) == ("spans.o",)
    assert at_most(by_name["tree"]) == ("block.score",)
    assert at_most(by_name["runs"]) == ("block.score", "selected.o")
    assert at_most(by_name["halved"]) == ()


@each_case
def test_describe_has_every_node(spec: Spec) -> None:
    graph = passes.run(plan(spec))
    text = describe(graph)
    assert all(node.name in text for node in graph.nodes())
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_polynomials_of_other_powers() -> None:
    one = Polynomial(t1=2.0, others=((1.5, 3.0),))
    both = (one + Polynomial(t2=1.0, others=((1.5, 1.0), (1.25, 5.0)))) * 2
    assert str(both) == "2 T^2 + 8 T^1.5 + 10 T^1.25 + 4 T"
    assert both.evaluate(16) == 2 * 256 + 8 * 64 + 10 * 32 + 4 * 16


@pytest.mark.parametrize(
    "more",
    [
        {"reuse": (Reuse(level="block", over="layers", role="final", every=4),)},
        {"loss": Loss(kl=Kl(level="block"))},
    ],
)
def test_what_calls_hand_on_lies_in_place(more: dict[str, object]) -> None:
    spec = next(spec for spec in TREES if spec.name == "runs").model_copy(update=more)
    with pytest.raises(PlanError, match="level block: the graph has no"):
        plan(spec)


@each_case
def test_kernels_refuse_them_in_words(spec: Spec) -> None:
    halved = spec.name == "halved_rows"  # of which kernels lack but the size of its heads
    words = "head dim Dqk: expected a multiple of 16" if halved else r"no kernel .* yet"
    with pytest.raises(PlanError, match=words):
        schedule(passes.run(plan(spec)), H100)
