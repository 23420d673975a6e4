"""The suite itself: it passes what is right, and notices everything that is wrong."""

import pytest
import torch

from conformance import backends, cases, laws, probes, systems
from conformance.covering import pairwise
from conformance.lab import Lab
from conformance.mutants import ERRORS, MUTANTS
from conformance.oracles import check, gathered
from hsgen import passes, planner, schedule
from hsgen.errors import PlanError
from hsgen.target import H100

CHECKS = {c.name: c for c in (*probes.CHECKS, *laws.CHECKS)}


def run_check(name, run, spec, dtype=torch.float32):
    """One check, or all covering cases one by one."""
    if name == ERRORS:
        for case in cases.CASES:
            call = cases.build(spec, case)
            check(call, run(call))
    else:
        CHECKS[name](Lab(run=run, name=spec, dtype=dtype))


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        (name, spec)
        for name in (ERRORS, *CHECKS)
        for spec in systems.STRUCTURES
        if name == ERRORS or CHECKS[name].applies(systems.small(spec))
    ],
)
def test_suite_passes_the_reference_in_float32(name, spec):
    run_check(name, backends.stand_in, spec)


@pytest.mark.parametrize(
    ("mutant", "name"),
    [
        pytest.param(mutant, name, id=f"{mutant.name}-{name}")
        for mutant in MUTANTS
        for name in mutant.caught_by
    ],
)
def test_suite_notices_what_is_wrong(mutant, name):
    with pytest.raises(AssertionError):
        run_check(name, mutant.run, mutant.spec)


@pytest.mark.parametrize("name", systems.FILES)
def test_what_no_kernel_does_is_refused_where_the_text_says_it(name):
    graph = passes.run(planner.plan(systems.load(name)))
    if name not in systems.REFUSED:
        assert schedule.schedule(graph, H100).kernels
        return
    with pytest.raises(PlanError, match=systems.REFUSED[name]) as caught:
        schedule.schedule(graph, H100)
    assert caught.value.span.file == str(systems.FILES[name])


def test_names_of_exceptions_are_those_of_specs():
    assert {*systems.REFUSED, *systems.PRESETS, *systems.PRESETS.values()} <= set(systems.FILES)
    assert not set(systems.PRESETS.values()) & {*systems.REFUSED, *systems.PRESETS}


@pytest.mark.parametrize("name", systems.PRESETS)
def test_presets_are_another_spec_with_other_numbers(name):
    def structure(name):
        spec = systems.small(name)
        return spec.model_copy(update={"name": "either", "source": None})

    assert structure(name) == structure(systems.PRESETS[name])


def test_every_pair_of_settings_is_met():
    factors = cases.FACTORS
    for a, left in factors.items():
        for b, right in factors.items():
            if a != b:
                met = {(case[a], case[b]) for case in cases.CASES}
                assert met == {(x, y) for x in left for y in right}


def test_covering_arrays_do_not_change():
    factors = {"a": (1, 2), "b": (3, 4), "c": (5, 6)}
    assert pairwise(factors) == pairwise(factors)
    assert len(pairwise(factors)) == 4


def test_shrunk_specs_keep_their_structure():
    nsa = systems.small("nsa")
    compressed, block = nsa.levels
    assert (compressed.partition.size, compressed.partition.stride) == (4, 2)
    assert block.partition.size == 8
    weights = gathered(compressed, block, 8, 2)
    assert weights[:, 1].tolist() == [0, 0, 0, 1, 2, 2, 2, 1]
