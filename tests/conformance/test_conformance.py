"""Every spec in specs/ on the emitted kernels: on CPU through the interpreter, with -m gpu on a GPU."""

import functools

import pytest
import torch

from conformance import backends, cases, laws, probes, systems
from conformance.lab import Lab, same
from conformance.oracles import check

LANES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]
RUN = {"cpu": backends.interpreter, "cuda": backends.cuda}
AGAIN = {"cpu": functools.partial(backends.interpreter, seed=1), "cuda": backends.cuda}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GROUPS = {"fp32": 3, "fp16": 2, "bf16": 1}
FULL = pytest.mark.full
# Specs with loops that are theirs alone.
MAIN = [n for n in systems.KERNELS if n not in systems.ALIKE and n not in systems.PRESETS]
LANES_AND_DTYPES = [
    pytest.param(*lane.values, word, id=f"{word}-{lane.id}", marks=lane.marks)
    for lane in LANES
    for word in DTYPES
    if (lane.id, word) != ("cpu", "bf16")  # the covering cases have it
]


def applicable(checks):
    """(spec, check) wherever the check's precondition holds for the spec."""
    specs = {name: systems.small(name) for name in systems.STRUCTURES}
    return [
        pytest.param(name, check, id=f"{name}-{check.name}")
        for name, spec in specs.items()
        for check in checks
        if check.applies(spec)
    ]


def marks(lane, *, every):
    """What a GPU always runs, the CPU often only with all the rest of a product."""
    return lane.marks if every or lane.values[0] == "cuda" else (*lane.marks, FULL)


def always_taken(pairs, often):
    """Of (spec, check) those that every run has on the CPU: every second of a spec's own; of a spec with the
    loops of others one in so many, at least one; and of each check one spec that has it.
    """
    alike, taken = list(systems.ALIKE), set()
    for name in systems.STRUCTURES:
        own = [pair for pair in pairs if pair[0] == name]
        step = min(often, len(own)) if name in alike else 2
        turn = alike.index(name) if name in alike else MAIN.index(name)
        taken |= {pair for number, pair in enumerate(own) if (number + turn) % step == 0}
    for number, asked in enumerate(dict.fromkeys(pair[1] for pair in pairs)):
        holders = [pair for pair in pairs if pair[1] == asked]
        if not taken & {*holders}:
            taken.add(holders[number % len(holders)])
    return taken


def laws_of_each():
    """(spec, law, dtype, lane): each pair in one dtype."""
    words, pairs = list(DTYPES), applicable(laws.CHECKS)
    taken = always_taken([pair.values for pair in pairs], 14)
    for i, pair in enumerate(pairs):
        for lane in LANES:
            word = words[i % len(words)]
            values = (*pair.values, word, *lane.values)
            words_of_it = f"{pair.id}-{word}-{lane.id}"
            some = marks(lane, every=pair.values in taken)
            yield pytest.param(*values, id=words_of_it, marks=some)


def probes_of_each():
    """(spec, probe, dtype, lane); on the CPU each pair in one dtype."""
    words = [word for word in DTYPES if word != "bf16"]
    pairs = applicable(probes.CHECKS)
    taken = always_taken([pair.values for pair in pairs], 10)
    for i, pair in enumerate(pairs):
        for lane in LANES_AND_DTYPES:
            device, word = lane.values
            if device == "cuda" or word == words[i % 2]:
                values = (*pair.values, word, device)
                some = marks(lane, every=pair.values in taken)
                yield pytest.param(*values, id=f"{pair.id}-{lane.id}", marks=some)


def cases_of_each():
    """(spec, case, lane): of two specs one after the other in MAIN one has the cases that the other has
    not; hisa, whose levels are the slowest, has fewer.
    """
    for i, name in enumerate(systems.KERNELS):
        for lane in LANES:
            (device,) = lane.values
            other = name in systems.PRESETS or (name in systems.ALIKE and device == "cpu")
            some = cases.FEW if other else cases.CASES
            often, turn = 2, MAIN.index(name) if name in MAIN else i
            if name == "hisa" and not other:
                often = 3
            for number, case in enumerate(some):
                every = (number + turn) % often == 0
                words = f"{name}-{cases.case_id(case)}-{lane.id}"
                yield pytest.param(name, case, device, id=words, marks=marks(lane, every=every))


def always(some):
    """Values of what every run has on the CPU."""
    return [p.values for p in some if p.values[-1] == "cpu" and FULL.mark not in _marks(p)]


def _marks(parameters):
    return [getattr(each, "mark", each) for each in parameters.marks]


def test_every_run_has_each_case_law_and_probe():
    assert {cases.case_id(case) for _, case, _ in always(cases_of_each())} == {
        cases.case_id(case) for case in cases.CASES
    }
    assert {name for name, *_ in always(cases_of_each())} == set(systems.KERNELS)
    for some, checks in ((laws_of_each(), laws.CHECKS), (probes_of_each(), probes.CHECKS)):
        held = always(some)
        assert {check.name for _, check, *_ in held} == {check.name for check in checks}
        assert {name for name, *_ in held} == set(systems.STRUCTURES)


@pytest.mark.parametrize(("name", "case", "lane"), list(cases_of_each()))
def test_outputs_and_selections_are_right(name, case, lane, seed):
    call = cases.build(name, case, device=lane, seed=seed)
    check(call, RUN[lane](call))


SCHEDULES = {"union": {"DEAR": 0}, "rows": {"DEAR": 1 << 14}}


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["hisa", "dsa_gqa"])
def test_each_schedule_of_chosen_tokens_is_right(name, schedule, lane, seed):
    """Over the union of a tile's blocks, and row by row: each forced on every tile."""
    for case in cases.FEW[name == "hisa" :: 2] if lane == "cpu" else cases.CASES:
        call = cases.build(name, case, device=lane, seed=seed)
        _right_twice(call, lane, forced={"index_selected": SCHEDULES[schedule]})


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("name", ["moba", "quest"])
def test_blocks_that_rows_come_to_are_right(name, lane, seed):
    """The order that long blocks get, here of short ones."""
    for case in cases.FEW[name == "moba" :: 2] if lane == "cpu" else cases.CASES:
        call = cases.build(name, case, device=lane, seed=seed)
        _right_twice(call, lane, orders=(("selected", "keys"),))


def _right_twice(call, lane, **schedule):
    """Right, and with the same bits when programs run in another order: lists fill as they run."""
    outcome, again = RUN[lane](call, **schedule), AGAIN[lane](call, **schedule)
    check(call, outcome)
    same(outcome, again, what="two runs")


@pytest.mark.parametrize(("name", "probe", "dtype", "lane"), list(probes_of_each()))
def test_probe(name, probe, dtype, lane):
    probe(_lab(name, dtype, lane))


@pytest.mark.parametrize(("name", "law", "dtype", "lane"), list(laws_of_each()))
def test_law(name, law, dtype, lane):
    law(_lab(name, dtype, lane))


def _lab(name, dtype, lane):
    return Lab(
        run=RUN[lane],
        again=AGAIN[lane],
        name=name,
        dtype=DTYPES[dtype],
        device=lane,
        group=GROUPS[dtype],
    )
