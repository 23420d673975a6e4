"""The suite itself: it passes what is right, and notices everything that is wrong."""

import pytest
import torch

from conformance import backends, calls, cases, laws, probes, systems
from conformance.covering import pairwise
from conformance.lab import Lab
from conformance.mutants import ERRORS, MUTANTS
from conformance.oracles import check, error_findings, gathered
from conformance.test_conformance import MAIN, always, laws_of_each, probes_of_each
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


def pairs():
    """(check, spec): each run has those that kernels are asked about too."""
    asked = {
        (c.name, s) for some in (laws_of_each(), probes_of_each()) for s, c, *_ in always(some)
    }
    small = {spec: systems.small(spec) for spec in systems.STRUCTURES}
    for name in (ERRORS, *CHECKS):
        for spec in systems.STRUCTURES:
            if name == ERRORS or CHECKS[name].applies(small[spec]):
                every = (name, spec) in asked or (name == ERRORS and spec in MAIN)
                yield pytest.param(name, spec, marks=() if every else pytest.mark.full)


@pytest.mark.parametrize(("name", "spec"), list(pairs()))
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


def large_queries(seed):
    """Large queries, some at right angles to the keys that have the weight: their sums round most."""
    call = calls.make(systems.small("minimax_m3"), seed=seed)
    call = call.with_tensors(q=call.tensors["q"] * 100)
    exact = call.reference()
    return call, exact, {"selection": {name: s.indices for name, s in exact.selection.items()}}


def found_in(call, exact, given, other):
    """What is found in the outputs of another call, computed in float32."""
    o, plain = (x.reference(dtype=torch.float32, **given).o for x in (other, call))
    return error_findings(call, o, exact.o, plain, lse=exact.lse, given=given)


def test_sums_may_be_taken_in_another_order():
    """Rows between two keys are then off by many times what the first order makes of them."""
    for seed in range(60):
        call, exact, given = large_queries(seed)
        turned = {name: call.tensors[name].flip(-1) for name in ("q", "k")}
        assert not found_in(call, exact, given, call.with_tensors(**turned))


def test_large_queries_with_fewer_bits_are_noticed():
    """18 bits of each number, where float32 has 24."""
    for seed in range(10):
        call, exact, given = large_queries(seed)
        q = call.tensors["q"]
        step = torch.exp2(q.abs().log2().floor() - 17)
        rounded = call.with_tensors(q=(q / step).round() * step)
        assert any(x.rule == "R-row" for x in found_in(call, exact, given, rounded)), seed


def test_names_of_exceptions_are_those_of_specs():
    as_others = systems.PRESETS | systems.ALIKE
    known = {*systems.FILES, *systems.EXAMPLES}
    assert {*systems.REFUSED, *as_others, *as_others.values()} <= known
    assert not set(systems.PRESETS.values()) & {*systems.REFUSED, *systems.PRESETS}
    assert not set(systems.ALIKE.values()) & {*systems.REFUSED, *as_others}


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
