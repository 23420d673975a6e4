"""The plan of a spec means what the reference says the spec means."""

from __future__ import annotations

import pytest
import torch
from graph_interpreter import evaluate
from plan_cases import CASES, random_tensors

from hsgen import passes
from hsgen.planner import plan
from hsgen.reference import reference
from hsgen.spec import Spec

LENGTHS = [(1, 1), (13, 13), (37, 37), (5, 30)]  # query rows, keys


@pytest.mark.parametrize("rows, keys", LENGTHS)
@pytest.mark.parametrize("spec", CASES, ids=lambda spec: spec.name)
def test_plan_means_what_the_reference_says(spec: Spec, rows: int, keys: int) -> None:
    tensors = random_tensors(spec, rows, keys, batch=2)
    expected = reference(spec, tensors)
    for graph in (plan(spec), passes.run(plan(spec))):
        actual = evaluate(graph, tensors)
        assert set(actual.selection) == set(expected.selection)
        for level, indices in actual.selection.items():
            assert torch.equal(indices, expected.selection[level].indices), level
        torch.testing.assert_close(actual.o, expected.o)
        assert set(actual.lse) == set(expected.lse)
        for branch, lse in actual.lse.items():
            torch.testing.assert_close(lse, expected.lse[branch], msg=branch)
