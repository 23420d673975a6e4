"""The plan of a spec means what the reference says the spec means."""

from __future__ import annotations

import random

import pytest
import torch
from graph_interpreter import evaluate
from plan_cases import (
    CALLS,
    CASES,
    GATES,
    ORDERS,
    POOLED,
    ROUTES,
    SELECTED,
    SETS,
    TOGETHER,
    TRAINED,
    WINDOW,
    blocks,
    one_of_each,
    random_tensors,
    state_tensors,
    top,
)
from plan_cases import spec as make
from plan_cases_buckets import BUCKETS
from plan_cases_estimates import ESTIMATES
from plan_cases_odd import ODD, ODD_CALLS
from plan_cases_production import PRODUCTION
from plan_cases_slash import SLASH
from plan_cases_trees import TREES
from plan_cases_weighed import GATHERED, WEIGHED

from hsgen import passes
from hsgen import spec as language
from hsgen.analysis import describe
from hsgen.errors import PlanError, SpecError
from hsgen.graph import Attend, Graph, Map, dump
from hsgen.planner import plan
from hsgen.reference import Kept, reference
from hsgen.schedule import schedule
from hsgen.spec import Force, Level, Pool, Score, Select, Spec, Tokens
from hsgen.spec.files import shipped
from hsgen.target import H100

LENGTHS = [(1, 1), (13, 13), (37, 37), (5, 30)]  # query rows, keys


def planned(spec: Spec) -> list[Graph]:
    """Planned, and planned and rewritten where that is another graph."""
    graph = plan(spec)
    rewritten = passes.run(graph)
    return [graph] if rewritten == graph else [graph, rewritten]


def check_against_reference(spec: Spec, rows: int, keys: int) -> None:
    tensors = random_tensors(spec, rows, keys, batch=2)
    expected = reference(spec, tensors)
    for graph in planned(spec):
        actual = evaluate(graph, tensors)
        assert set(actual.selection) == set(expected.selection)
        for level, indices in actual.selection.items():
            assert torch.equal(indices, expected.selection[level].indices), level
        torch.testing.assert_close(actual.o, expected.o)
        assert set(actual.lse) == set(expected.lse)
        for branch, lse in actual.lse.items():
            torch.testing.assert_close(lse, expected.lse[branch], msg=branch)
        assert_same(actual.streams, expected.streams)
        assert_same(actual.loss, expected.loss)


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize(("rows", "keys"), [(13, 13), (5, 22)])
@pytest.mark.parametrize("spec", [*CALLS, *ODD_CALLS], ids=lambda spec: spec.name)
def test_calls_after_calls_mean_what_the_reference_says(spec: Spec, rows: int, keys: int) -> None:
    """Six calls, each with tensors of its own and the state of the one before."""
    language.verify(spec)
    graphs = planned(spec)
    state: dict[str, Kept] = {}
    for call in range(6):
        tensors = random_tensors(spec, rows, keys, batch=2, seed=call)
        expected = reference(spec, tensors, state=state)
        for graph in graphs:
            kept = state_tensors(graph, state, rows, keys, batch=2)
            actual = evaluate(graph, tensors | kept)
            torch.testing.assert_close(actual.o, expected.o)
            for level, chosen in expected.selection.items():
                assert torch.equal(actual.selection[level], chosen.indices), (call, level)
            if spec.reuse_of(spec.levels[-1].name) is None or call >= spec.reuse[0].dense:
                assert_same(actual.loss, expected.loss)
        for level, after in expected.state.items():
            if after.scores is not None:
                found = actual.state[f"{level}.scores"]
                dim = graph[graph.outputs.state[f"{level}.scores"]].type.dims[1]
                each = after.scores[:, one_of_each(dim, rows, keys)]
                torch.testing.assert_close(found, each)
        state = expected.state


SPECS = [
    *(*CASES, *SETS, *ORDERS, *PRODUCTION, *TOGETHER, *ROUTES, *ODD, *TRAINED, *WEIGHED),
    *(*GATHERED, *TREES, *ESTIMATES, *SLASH, *BUCKETS),
]


@pytest.mark.parametrize(
    ("spec", "rows", "keys"),
    [
        pytest.param(
            *(spec, *lengths),
            id=f"{spec.name}-{lengths[0]}-{lengths[1]}",
            # one row, and of the other lengths specs take turns at one
            marks=pytest.mark.full if turn and (number + turn) % 3 else (),
        )
        for number, spec in enumerate(SPECS)
        for turn, lengths in enumerate(LENGTHS)
    ],
)
def test_plan_means_what_the_reference_says(spec: Spec, rows: int, keys: int) -> None:
    check_against_reference(spec, rows, keys)


@pytest.mark.parametrize("seed", range(20))
def test_random_specs_mean_what_the_reference_says(seed: int) -> None:
    check_against_reference(random_spec(random.Random(seed)), 19, 23)


def random_spec(choice: random.Random) -> Spec:
    """A source level that is mapped, or scores and narrows by itself, with every key drawn."""
    share = choice.choice(["head", "group", "all"])
    stride = choice.choice([1, 2, 3, 4])
    size = stride * choice.choice([1, 2, 3])
    how = choice.choice(["mean", "max", "sum_rsqrt", "linear"])
    pooled = choice.random() < 0.5
    source = Level(
        name="compressed",
        partition=blocks(size, stride),
        kv=choice.choice([None, "own"]),
        pool=Pool(
            keys=how,
            values=choice.choice(["mean", "max", "sum_rsqrt", "linear"]) if pooled else None,
            position="learned" if how == "linear" else None,
        ),
        score=Score(
            form="dot",
            scale=choice.choice([None, "none", 0.5]),
            normalise=choice.choice([None, "softmax"]),
            share=share,
            reduce=None if share == "head" else choice.choice(["sum", "mean", "max"]),
        ),
    )
    counted = choice.random() < 0.5
    force = Force(first=choice.choice([0, 1]), last=choice.choice([0, 1, 2]), counted=counted)
    target = Level(
        name="block",
        partition=blocks(stride * 3),
        score=Score(
            source="compressed", map=choice.choice(["overlap_sum", "overlap_max", "sum", "max"])
        ),
        select=Select(top_k=3, force=force),
    )
    return language.verify(
        make(
            "drawn",
            [source, target],
            [SELECTED, WINDOW, *([POOLED] if pooled else [])],
            combine=GATES,
            kv=choice.choice([1, 2, 4]),
            causal=choice.random() < 0.7,
        )
    )


# --- what is planned


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_specs(name: str, golden) -> None:
    """What `hsgen show` tells of the graph; a refused spec's golden file is its refusal."""
    try:
        text = describe(passes.run(plan(language.load(name))))
    except PlanError as error:
        text = f"{error.message}\n"
    golden(f"{name}/graph.txt", text)


def test_taps_are_those_of_the_paper() -> None:
    """NSA, l = 32, d = 16, l' = 64: the coefficients 1 2 2 2 1 of eq. 9, from one entry before."""
    op = plan(language.load("nsa"))["block.mapped"].op
    assert isinstance(op, Map)
    assert (op.ratio, op.taps) == (4, ((-1, 1), (0, 2), (1, 2), (2, 2), (3, 1)))


@pytest.mark.parametrize(
    ("how", "taps"), [("sum", 7), ("max", 7), ("overlap_sum", 9), ("overlap_max", 9)]
)
def test_taps_are_counted(how: str, taps: int) -> None:
    source = CASES[[c.name for c in CASES].index("nsa")].levels[0]
    target = Level(
        name="block", partition=blocks(16), score=Score(source="compressed", map=how), select=top(2)
    )
    op = plan(make("taps", [source, target], [SELECTED, POOLED], combine=GATES))["block.mapped"].op
    assert isinstance(op, Map) and len(op.taps) == taps


def test_sizes_left_open_stay_names() -> None:
    bound = language.load("moba")
    open_ = bound.model_copy(update={"heads": None, "head_dim": None})
    graph = passes.run(plan(open_))
    assert dict(graph.sizes) == {"K_chunk": 3}
    attend = graph["selected.o"].op
    assert isinstance(attend, Attend) and attend.scale is None
    assert dump(plan(open_.bind(heads=(32, 32), head_dim=128))) == dump(plan(bound))


def test_names_of_levels_and_branches_never_meet() -> None:
    """A level and a branch of one name, which is also a suffix of node names."""
    level = Level(
        name="lse",
        partition=Tokens(),
        score=Score(form="dot", normalise="softmax"),
        select=top(2),
    )
    branch = language.Attend(name="lse", over="lse")
    graph = plan(make("names", [level], [branch]))
    assert {"lse.score_lse", "lse.mass", "lse.selection", "lse.o", "lse.lse"} <= {
        node.name for node in graph.nodes()
    }


def test_the_graph_knows_its_spec() -> None:
    spec = language.load("hisa")
    meta = plan(spec).meta
    assert (meta.name, meta.source, meta.digest) == ("hisa", "arXiv:2603.28458", spec.digest)


def test_pooled_entries_that_blocks_of_rows_chose_are_refused_where_they_are_written() -> None:
    text = """\
hsgen: 1
name: pooled_selection
heads: {query: 4, kv: 2}
head_dim: 16
levels:
  - name: block
    partition: {blocks: 8}
    pool: {keys: mean, values: mean}
    query: {block: 8, pool: mean}
    score: {form: dot}
    select: {top_k: 4}
attend:
  - {name: selected, over: block}
  - {name: summary, over: block, values: pooled}
combine: {gates: input}
"""
    graph = passes.run(plan(language.parse(text, "mine.yaml")))
    with pytest.raises(PlanError, match="branch summary: no kernel attends pooled") as caught:
        schedule(graph, H100)
    assert str(caught.value.span) == "mine.yaml:14:42"


def test_a_spec_made_in_python_is_judged() -> None:
    spec = make("broken", [], [language.Attend(name="selected", over="nowhere")])
    with pytest.raises(SpecError, match="nowhere"):
        plan(spec)
