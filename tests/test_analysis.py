"""Causality, laws and costs that the graph derives, against what the interpreter does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from graph_interpreter import Attended, Chosen, Scores, evaluate
from plan_cases import CASES, blocks, random_tensors, top
from plan_cases import spec as make

from hsgen import passes
from hsgen.analysis import (
    Cost,
    Polynomial,
    causality,
    costs,
    dense,
    describe,
    laws,
    not_dense_because,
    quantity,
)
from hsgen.graph import Attend, Graph, GraphError, Score, Select
from hsgen.planner import plan
from hsgen.spec import Attend as Branch
from hsgen.spec import Combine, Level, Pool, Spec
from hsgen.spec import Score as Scoring

DENSE = {"moba_not_causal", "moba", "moba_gqa", "moba_group", "moba_all", "hisa", "tokens"}
DENSE |= {
    "hisa_blocks",
    "beam_of_dots",
    "uncounted",
    "infllm",
    "quest",
    "quest_group",
    "quest_not_causal",
}
POOLED = {"nsa", "nsa_wide", "nsa_scale", "nsa_not_causal", "nsa_union"}

each_case = pytest.mark.parametrize("spec", CASES, ids=lambda spec: spec.name)


# --- laws


@each_case
def test_causality_is_that_of_the_spec(spec: Spec) -> None:
    assert causality(plan(spec)) == ("token" if spec.causal else "none")


@each_case
def test_laws(spec: Spec) -> None:
    found = laws(plan(spec))
    assert found.dense_when_all_selected == (spec.name in DENSE)
    assert found.unselected_values_have_no_effect == (spec.name not in POOLED)
    assert found.future_never_changes_the_past == spec.causal
    assert found.decode_equals_prefill_row == spec.causal


def all_selected(graph: Graph) -> Graph:
    """The same graph with room for every entry in every selection."""
    changed = [
        replace(node, op=replace(node.op, k=64, width=64, counted=True))
        for node in graph.nodes()
        if isinstance(node.op, Select)
    ]
    return graph.replacing(*changed)


@each_case
def test_dense_when_all_selected_exactly_where_the_law_says(spec: Spec) -> None:
    tensors = random_tensors(spec, 37, 37)
    window = plan(make("dense", [], [Branch(name="window", window=64)], causal=spec.causal, kv=2))
    assert spec.heads is not None
    if spec.heads.kv != 2:
        window = plan(make("dense", [], [Branch(name="window", window=64)], kv=spec.heads.kv))
    expected = evaluate(window, {name: tensors[name] for name in ("q", "k", "v")}).o
    actual = evaluate(all_selected(plan(spec)), tensors).o
    holds = laws(plan(spec)).dense_when_all_selected
    assert torch.allclose(actual, expected) == holds, not_dense_because(plan(spec))


@each_case
def test_values_nobody_sees_have_no_effect_where_the_law_says(spec: Spec) -> None:
    graph = plan(spec)
    tensors = random_tensors(spec, 1, 37)
    before = evaluate(graph, tensors)
    changed = dict(tensors)
    for node in graph.nodes():
        if isinstance(node.op, Attend) and node.op.over != "pooled":
            name = node.inputs[2]
            unseen = changed[name].clone()
            unseen[~seen_tokens(graph, before.values, name)] = 1e9
            changed[name] = unseen
    after = evaluate(graph, changed)
    if laws(graph).unselected_values_have_no_effect:
        assert torch.equal(before.o, after.o)


def seen_tokens(graph: Graph, values: dict[str, object], v: str) -> torch.Tensor:
    """Tokens that some head of a group sees in some branch with these values.  bool[B, S, Hkv]"""
    seen = []
    for node in graph.nodes():
        if isinstance(node.op, Attend) and node.inputs[2] == v:
            attended = values[node.name]
            assert isinstance(attended, Attended) and attended.seen is not None
            by_group = attended.seen.unflatten(2, (graph.sizes["Hkv"], -1)).any(3)  # B, T, Hkv, S
            seen.append(by_group.any(1).transpose(1, 2))
    return torch.stack(seen).any(0)


@each_case
def test_the_future_never_changes_the_past_where_the_law_says(spec: Spec) -> None:
    graph = plan(spec)
    tensors = random_tensors(spec, 37, 37)
    changed = {
        name: x if name.endswith(("_weight", "_position")) else scrambled(x, after=20)
        for name, x in tensors.items()
    }
    before, after = evaluate(graph, tensors).o[:, :20], evaluate(graph, changed).o[:, :20]
    assert torch.equal(before, after) == laws(graph).future_never_changes_the_past


def scrambled(x: torch.Tensor, *, after: int) -> torch.Tensor:
    return torch.cat([x[:, :after], -3 * x[:, after:]], 1)


def test_reasons() -> None:
    level = Level(
        name="block",
        partition=blocks(8),
        pool=Pool(keys="mean"),
        score=Scoring(form="dot"),
        select=top(3),
    )
    selected = Branch(name="selected", over="block")
    assert not_dense_because(plan(make("free", [level], [selected]))) == (
        "level block does not force the own block"
    )
    window = Branch(name="window", window=3)
    union = make("union", [level], [selected, window], combine=Combine(softmax="union"))
    assert "own block" in str(not_dense_because(plan(union)))


# --- costs


@each_case
def test_pairs_are_those_that_the_interpreter_sees(spec: Spec) -> None:
    """T is a multiple of every size here, and large enough that selections are full."""
    tokens = 48
    graph = plan(spec)
    values = evaluate(graph, random_tensors(spec, tokens, tokens)).values
    found = costs(graph)
    for node in graph.nodes():
        value = values[node.name]
        if isinstance(node.op, Score):
            assert isinstance(value, Scores)
            per_pair = {"dot": 2 * 6, "bound": 4 * 6, "relu_weighted": 3 * (2 * 4 + 2)}[
                node.op.form
            ]
            expected = per_pair * value.there[0].sum().item()
        elif isinstance(node.op, Attend):
            assert isinstance(value, Attended) and value.seen is not None
            expected = 2 * (6 + 5) * value.seen[0].sum().item()
        else:
            continue
        actual = found[node.name].flops.evaluate(tokens)
        if is_exact(graph, node.name):
            assert actual == pytest.approx(expected), node.name
        else:
            assert expected <= actual * 1.05 and actual <= expected * 1.5, node.name


def is_exact(graph: Graph, name: str) -> bool:
    """Overlap, and a selection that need not have the own block, are counted roughly."""
    node = graph[name]
    assert isinstance(node.op, Attend | Score)
    selection = [x.op for x in graph.operands(node) if isinstance(x.op, Select)]
    own = all(x.last > 0 or x.size == 1 for x in selection)
    if node.op.size != node.op.stride:
        return not selection and graph.meta.causal
    return own or not graph.meta.causal


@pytest.mark.parametrize("tokens", [3, 8, 9, 40])
def test_a_short_sequence_costs_what_dense_costs(tokens: int) -> None:
    window = plan(make("window", [], [Branch(name="window", window=tokens)]))
    flops = costs(window)["window.o"].flops
    assert flops.evaluate(tokens) == pytest.approx(dense(window).flops.evaluate(tokens))
    assert flops.evaluate(1) == pytest.approx(dense(window).flops.evaluate(1))


def test_costs_add_piece_by_piece() -> None:
    early = Cost(pieces=((0, Polynomial(t2=1.0)), (4, Polynomial(t1=4.0))))
    late = Cost(pieces=((0, Polynomial(t0=1.0)), (8, Polynomial(t0=2.0))))
    total = early + late
    assert [total.evaluate(t) for t in (2, 5, 9)] == [4 + 1, 20 + 1, 36 + 2]
    assert total.start == 8
    assert str(total) == "4 T + 2"


def test_polynomials_print() -> None:
    assert str(Polynomial(t2=1.5, t1=-2048.0, t0=7.0)) == "1.5 T^2 - 2.05K T + 7"
    assert str(Polynomial(t1=-3.0)) == "- 3 T"
    assert str(Polynomial()) == "0"
    assert [quantity(x) for x in (0.5, 999.4, 999.6, 2.5e13)] == ["0.5", "999", "1K", "25T"]


def test_costs_need_sizes() -> None:
    unbound = CASES[0].model_copy(update={"heads": None})
    with pytest.raises(GraphError, match="Hq, Hkv"):
        costs(plan(unbound))
    assert "costs: known once Hq, Hkv are bound" in describe(plan(unbound))


@each_case
def test_describe_has_every_node(spec: Spec) -> None:
    graph = passes.run(plan(spec))
    text = describe(graph)
    assert all(node.name in text for node in graph.nodes())
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert math.isfinite(costs(graph)[graph.outputs.o].flops.evaluate(8192))


def test_interpreter_chooses_what_it_says() -> None:
    value = evaluate(plan(CASES[0]), random_tensors(CASES[0], 13, 13)).values["block.selection"]
    assert isinstance(value, Chosen)
    assert (value.indices >= 0).sum() == value.member.sum()
