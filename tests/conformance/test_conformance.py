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
LANES_AND_DTYPES = [
    pytest.param(*lane.values, word, id=f"{word}-{lane.id}", marks=lane.marks)
    for lane in LANES
    for word in DTYPES
    if (lane.id, word) != ("cpu", "bf16")  # the covering cases have it
]


def applicable(checks):
    """(spec, check) wherever the check's precondition holds for the spec."""
    return [
        pytest.param(name, check, id=f"{name}-{check.name}")
        for name in systems.STRUCTURES
        for check in checks
        if check.applies(systems.small(name))
    ]


def laws_of_each():
    """(spec, law, dtype, lane): each pair in one dtype; on the CPU specs alike take turns at the laws."""
    words, alike = list(DTYPES), list(systems.ALIKE)
    for i, pair in enumerate(applicable(laws.CHECKS)):
        name, law = pair.values
        turn = laws.CHECKS.index(law) + (alike.index(name) if name in alike else 0)
        for lane in LANES:
            if name in alike and lane.values == ("cpu",) and turn % 4:
                continue
            word = words[i % len(words)]
            values = (*pair.values, word, *lane.values)
            yield pytest.param(*values, id=f"{pair.id}-{word}-{lane.id}", marks=lane.marks)


def probes_of_each():
    """(spec, probe, dtype, lane); on the CPU each pair in one dtype, and specs alike take turns."""
    words, alike = [word for word in DTYPES if word != "bf16"], list(systems.ALIKE)
    for i, pair in enumerate(applicable(probes.CHECKS)):
        name, probe = pair.values
        turn = probes.CHECKS.index(probe) + (alike.index(name) if name in alike else 0)
        for lane in LANES_AND_DTYPES:
            device, word = lane.values
            if device == "cpu" and word != words[i % 2]:
                continue
            if device == "cpu" and name in alike and turn % 3:
                continue
            values = (*pair.values, word, device)
            yield pytest.param(*values, id=f"{pair.id}-{lane.id}", marks=lane.marks)


def cases_of_each():
    """(spec, case, lane): specs alike meet a few of the covering cases on the CPU, all on a GPU."""
    for name in systems.KERNELS:
        for lane in LANES:
            (device,) = lane.values
            alike = name in systems.ALIKE and device == "cpu"
            for case in cases.FEW if alike or name in systems.PRESETS else cases.CASES:
                words = f"{name}-{cases.case_id(case)}-{lane.id}"
                yield pytest.param(name, case, device, id=words, marks=lane.marks)


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
    for case in cases.FEW if lane == "cpu" else cases.CASES:
        call = cases.build(name, case, device=lane, seed=seed)
        _right_twice(call, lane, forced={"index_selected": SCHEDULES[schedule]})


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("name", ["moba", "quest"])
def test_blocks_that_rows_come_to_are_right(name, lane, seed):
    """The order that long blocks get, here of short ones."""
    for case in cases.FEW if lane == "cpu" else cases.CASES:
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
